"""``report.html``: one file that opens anywhere, of one run or of several side by side."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from ghost_dist import __version__
from ghost_dist.durable import write_bytes
from ghost_dist.errors import ConfigError
from ghost_dist.report import text
from ghost_dist.report.checks import remarks
from ghost_dist.report.choice import choice_of_layers
from ghost_dist.report.comparison import comparison_sections, comparison_title
from ghost_dist.report.drawings import perplexity_bars, stack_of
from ghost_dist.report.evaluation import agreement, tasks
from ghost_dist.report.facts import configuration, cost, provenance
from ghost_dist.report.fitting import after_the_fit, candidates, fits, operator
from ghost_dist.report.markup import Html, el, join, section
from ghost_dist.report.record import RunRecord, read_run
from ghost_dist.report.spectrum import spectra

GENERATOR = f"ghost_dist {__version__}"
_HEADING = re.compile(r'<h2 id="([\w-]+)-title">(.*?)</h2>')
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'"  # no request, no script, whatever a name holds
)


def write_report(
    runs: Sequence[Path], out: Path | None = None, device: torch.device | None = None
) -> Path:
    """Write the page of a run, or of several compared.

    Parameters
    ----------
    runs
        RUN folders; an unfinished one is reported as far as it is.
    out
        The file; None: ``RUN/report.html``, or ``comparison.html`` here for several.
    device
        Where spectra are computed that are not in ``RUN/report.json`` yet; None: the CPU.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    ConfigError
        If ``out`` exists and is not a report, or its folder does not.
    RunFolderError, CorruptStoreError
        If a folder is no RUN, or what it holds is damaged.
    """
    records = [read_run(Path(run)) for run in runs]
    if out is None:
        out = records[0].path / "report.html" if len(records) == 1 else Path("comparison.html")
    _check_target(out)
    if len(records) == 1:
        content = run_page(records[0], device)
    else:
        sections = comparison_sections(records)
        head = el(
            "header",
            el("p", "ghost_dist comparison", class_="kind"),
            el("h1", comparison_title(records)),
        )
        content = _page(comparison_title(records), head, sections)
    write_bytes(out, content.encode())
    return out


def run_page(run: RunRecord, device: torch.device | None = None) -> str:
    """The page of one run."""
    said = remarks(run)
    sections = [
        _remarks(said),
        agreement(run),
        tasks(run),
        choice_of_layers(run),
        fits(run),
        candidates(run),
        operator(run, spectra(run, device)),
        after_the_fit(run),
        cost(run),
        configuration(run),
        provenance(run),
    ]
    return _page(f"{run.name}: {headline(run)}", _header(run, len(said)), sections)


def headline(run: RunRecord) -> str:
    """The answer to "did it work?" in one sentence."""
    if not run.spans:
        return "No layer has been chosen yet"
    of = f" of {run.num_layers}" if run.num_layers else ""
    removed = f"{run.num_removed}{of} layers removed"
    if run.missing:
        return f"{removed}; not finished"
    if not run.perplexity:
        return f"{removed}; perplexity not measured"
    if run.operator == "none":
        return f"{removed}, nothing repaired"
    shares = [found[0] for name in run.perplexity if (found := run.gap_closed(name)) is not None]
    if not shares:
        return f"{removed}; the cut cost no perplexity"
    if max(shares) <= 0:
        return f"{removed}; the repair did not help"
    low, high = text.percent(min(shares)), text.percent(max(shares))
    number = low if low == high else f"{100 * min(shares):.0f} to {high}".replace("-", text.MINUS)
    return f"{removed}, {number} of the lost perplexity won back"


def _header(run: RunRecord, num_remarks: int) -> Html:
    """The first screen: what went, what it cost, what was won back."""
    facts: list[tuple[str, str, str]] = []
    if run.num_layers is not None and run.spans:
        left = run.num_layers - run.num_removed
        facts.append(("Layers", f"{run.num_layers} → {left}", f"{text.layers(run.spans)} removed"))
    if run.result is not None:
        before, after = (run.result["parameters"][key] for key in ("before", "after"))
        change = text.percent(after / before - 1, 1, sign=True)
        facts.append(("Parameters", f"{text.count(before)} → {text.count(after)}", change))
    if run.operator is not None:
        tokens = run.stages["tokens"].get("num_tokens", 0)
        fitted = f"from {tokens:,} tokens" if run.operator != "none" else "the plain cut"
        facts.append(("Operator", run.operator, fitted))
    done = [record["seconds"] for record in run.stages.values() if record]
    if done:
        facts.append(("Time", text.duration(sum(done)), (run.result or {}).get("device", "")))
    intervals = run.intervals
    bars = [
        perplexity_bars(
            name, value, intervals.get(name, {}), run.gap_closed(name), run.num_windows(name)
        )
        for name, value in run.perplexity.items()
    ]
    noted = f"{num_remarks} thing{'s' if num_remarks > 1 else ''} to know before you trust this"
    return el(
        "header",
        el("p", f"ghost_dist run {run.name} · {run.model}", class_="kind"),
        el("h1", headline(run)),
        el("p", el("a", noted, href="#remarks"), class_="alert") if num_remarks else None,
        el(
            "dl",
            [
                el("div", el("dt", name), el("dd", el("b", value), el("span", more)))
                for name, value, more in facts
            ],
            class_="key-figures",
        ),
        _removed(run),
        section("perplexity", "Perplexity", el("div", bars, class_="corpora")) if bars else None,
    )


def _removed(run: RunRecord) -> Html | None:
    """The stack, and what is in each gap."""
    if not run.spans:
        return None
    said = {
        None: "The operators are not solved yet.",
        "none": "Nothing was put in their place: this is the plain cut.",
        "fold": "The down_proj before each gap was refitted; nothing acts at the gap.",
        "replaceme": "The down_proj before each gap was refitted; nothing acts at the gap.",
    }.get(run.operator, f"Across each gap the operator {run.operator} carries the stream.")
    return section(
        "removed",
        "What was removed",
        el("p", f"Layers {text.layers(run.spans)}, counted from 0. {said}"),
        stack_of(run),
    )


def _remarks(said: Sequence[str]) -> Html | None:
    if not said:
        return None
    return section(
        "remarks",
        "Before you trust this",
        el("ul", [el("li", one) for one in said], class_="remarks"),
    )


def _page(title: str, header: Html, sections: Sequence[Html | None]) -> str:
    """The whole document; the navigation follows from the sections' headings."""
    shown = join(sections)
    links = [
        el("li", el("a", Html(name), href=f"#{anchor}"))
        for anchor, name in _HEADING.findall(header + shown)
    ]
    style = (importlib.resources.files(__package__) / "page.css").read_text(encoding="utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>'),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="generator", content=GENERATOR),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        Html(f"<style>\n{style}</style>"),
    )
    body = el(
        "body",
        el("a", "Skip to the content", href="#content", class_="skip"),
        header,
        el("div",
            el("nav", el("ul", links), aria_label="Sections"),
            el("main", shown, id="content", tabindex="-1"),
            class_="columns",
        ),
        el("footer", el("p", f"Written by {GENERATOR}. This file needs nothing beside it.")),
    )  # fmt: skip
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _check_target(out: Path) -> None:
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.absolute().parent} does not exist.")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file, such as {out / 'report.html'}.")
    if out.exists():
        with out.open("rb") as file:
            beginning = file.read(2048)
        if b'name="generator" content="ghost_dist' not in beginning:
            raise ConfigError(
                f"--out {out} exists and is not a report of ghost_dist; left as it is."
            )
