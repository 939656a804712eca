"""What the run cost, how it was configured, and where it comes from."""

from __future__ import annotations

import yaml

from ghost_dist.report import text
from ghost_dist.report.drawings import share_bars
from ghost_dist.report.markup import Child, Html, el, section
from ghost_dist.report.record import RunRecord, file_sha256


def cost(run: RunRecord) -> Html | None:
    """Seconds and memory of every stage."""
    done = {stage: record for stage, record in run.stages.items() if record}
    if not done:
        return None
    device = any(record["peak_device_bytes"] for record in done.values())
    rows = []
    for stage, record in done.items():
        cells = [text.duration(record["seconds"]), text.nbytes(record["peak_host_bytes"])]
        if device:
            cells.append(text.nbytes(record["peak_device_bytes"]))
        rows.append((stage, record["seconds"], cells))
    titles = ["Stage", "Share of the time", "Time", "Host memory"]
    titles += ["Device memory"] if device else []
    total = sum(record["seconds"] for record in done.values())
    times = run.sessions
    said = f"{text.duration(total)} in all" + (
        f", in {times} sessions (a stage counts the one that finished it)" if times > 1 else ""
    )
    note = el(
        "p",
        "Host memory is the most that the process had held by the end of the stage"
        + ("; device memory the most during the stage." if device else "."),
        class_="note",
    )
    return section(
        "cost", "Time and memory", el("p", said + "."), share_bars("Stages", titles, rows), note
    )


def configuration(run: RunRecord) -> Html:
    """The resolved configuration."""
    content = yaml.safe_dump(run.config, sort_keys=False)
    return section(
        "configuration",
        "Configuration",
        el("p", "As it was resolved; ", el("code", "ghost-dist recover FILE"), " takes it again."),
        el(
            "details",
            el("summary", "All fields"),
            el("pre", content, tabindex="0", role="region", aria_label="Configuration as YAML"),
        ),
    )


def provenance(run: RunRecord) -> Html:
    """Versions, device, fingerprints and hashes."""
    result = run.result or {}
    versions = result.get("versions", {})
    rows: list[tuple[str, Child]] = [
        ("Model", el("code", str(run.config["model"]["path"]))),
        ("Calibration text", el("code", str(run.config["calibration"]["source"]))),
        ("Calibration tokens", f"{run.stages['tokens'].get('num_tokens', 0):,}"),
    ]
    if result:
        difference = result["reload_max_abs_difference"]
        rows += [
            ("Device", result["device"]),
            ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
            (
                "Reloaded by plain transformers",
                f"largest difference of a logit {text.number(difference, 2)}",
            ),
            ("Fingerprint of the result", el("code", result["fingerprint"])),
        ]
    if "fingerprint" in run.stages["tokens"]:
        rows.append(("Fingerprint of the tokens", el("code", run.stages["tokens"]["fingerprint"])))
    rows += [
        (f"Operator {span}, sha256", el("code", sha256))
        for span, (_, sha256) in run.operator_files.items()
    ]
    for name in ("config.json", "result.json"):
        sha256 = file_sha256(run.path / "checkpoint" / name)
        if sha256 is not None:
            rows.append((f"checkpoint/{name}, sha256", el("code", sha256)))
    items = [el("div", el("dt", name), el("dd", value)) for name, value in rows]
    return section("provenance", "Provenance", el("dl", items, class_="facts"))
