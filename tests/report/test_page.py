"""What the page says, judged against the run's own record; what it does with what is not there."""

import base64
import hashlib
import io
import json
import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ghost_dist.calibration.windows import load_windows
from ghost_dist.cli import main
from ghost_dist.durable import write_json, write_sealed
from ghost_dist.errors import ConfigError, CorruptStoreError, RunFolderError
from ghost_dist.pipeline import recover as recover_module
from ghost_dist.pipeline.candidates import candidates_of
from ghost_dist.pipeline.inputs import open_inputs
from ghost_dist.pipeline.recover import recover
from ghost_dist.pipeline.solving import Solver
from ghost_dist.progress import Reporter
from ghost_dist.report import page as page_module
from ghost_dist.report import terminal, text
from ghost_dist.report.figures import _STYLES
from ghost_dist.report.page import headline, write_report
from ghost_dist.report.record import RunRecord
from ghost_dist.run_folder import RunFolder, read_record
from ghost_dist.spans import Span
from ghost_dist.statistics.store import StatisticsStore


def page_of(run, tmp_path):
    out = tmp_path / "page.html"
    out.unlink(missing_ok=True)
    return write_report([run], out).read_text()


def test_recover_writes_the_page_with_the_figures_of_its_result(made_runs):
    for run in made_runs.values():
        page = (run / "report.html").read_text()
        result = json.loads((run / "result.json").read_text())
        assert all(text.span(span) in page for span in result["spans"])
        for values in result["perplexity"].values():
            assert all(f"<b>{text.perplexity(value)}</b>" in page for value in values.values())
        for variant, figures in result["agreement"]["text"].items():
            assert f">text, {variant}</th>" in page
            assert f">{text.number(figures['kl'])}</td>" in page
            assert f">{text.percent(figures['top1'], 1)}</td>" in page
        assert result["fingerprint"] in page
        assert f"{sum(stop - start for start, stop in result['spans'])} of 8 layers" in page
        strip = re.findall(r'<span class="(kept|removed)[^>]*>(?:<s>)?(\d)<', page)
        gone = {layer for start, stop in result["spans"] for layer in range(start, stop)}
        assert strip == [("removed" if n in gone else "kept", str(n)) for n in range(8)]
        assert "This run took" in page
        assert page.count('href="#words"') >= 2
        for fit in result["fit"]:
            assert text.number(fit["residual"]) in page


def test_page_asks_for_nothing_and_runs_nothing(made_runs):
    for run in made_runs.values():
        page = (run / "report.html").read_text()
        assert "<script" not in page
        assert not re.findall(r"""(?:src|href)=["'](?!#)""", page)
        assert not re.findall(r"url\(|@import", page)
        assert len(page) < 400_000


def test_a_page_with_a_table_to_choose_in_runs_its_script_and_no_other(made_runs, tmp_path):
    page = write_report(list(made_runs.values()), tmp_path / "all.html").read_text()
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    sha256 = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{sha256}'" in page


def test_lines_of_a_chart_differ():
    css = (Path(page_module.__file__).parent / "templates" / "page.css").read_text()
    tones = re.findall(r"^\.s\d.*?--tone: (.*?);(?: --dash: (.*?);)?", css, re.MULTILINE)
    assert len(tones) == len(set(tones)) == len(_STYLES)


def test_wheel_has_every_file_of_the_package():
    root = Path(__file__).parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    declared = project["tool"]["setuptools"]["package-data"]["ghost_dist"]
    package = root / "ghost_dist"
    files = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert files == {path for pattern in declared for path in package.glob(pattern)}


def test_same_run_gives_the_same_page(runs, tmp_path):
    assert page_of(runs["joint"], tmp_path) == page_of(runs["joint"], tmp_path)


def test_ridge_taken_lies_on_the_curve_of_the_whole_grid(made_runs):
    [fit] = json.loads((made_runs["joint"] / "result.json").read_text())["fit"]
    curve = fit["ridge_curve"]
    assert len(curve) >= 13
    assert curve == sorted(curve)
    assert [fit["relative_ridge"], fit["residual"]] in curve


def test_ridge_beside_that_of_least_residual_keeps_the_whole_curve(made_runs):
    quiet = Reporter(console=Console(quiet=True))
    run = made_runs["spans"]
    config = RunFolder.stored_config(run)
    inputs = open_inputs(config, quiet)
    spans = tuple(Span(*span) for span in RunRecord(run).spans)
    store = StatisticsStore.open(run / "statistics.zarr")
    solver = Solver(inputs, spans, store, load_windows(run / "tokens.safetensors"), quiet)
    candidate = candidates_of(config.operator, spans, inputs.refittable)[0]
    shifted = solver.fit(replace(candidate, shift=0.25), spans[0]).fit
    plain = solver.fit(candidate, spans[0]).fit
    assert shifted.relative_ridge == pytest.approx(plain.relative_ridge * 10**0.25)
    assert len(shifted.ridge_curve) == len(plain.ridge_curve) + 1 >= 10
    assert set(plain.ridge_curve) < set(shifted.ridge_curve)
    assert (shifted.relative_ridge, shifted.residual) in shifted.ridge_curve


def test_recorded_nats_give_the_recorded_perplexity(made_runs):
    record = json.loads((made_runs["joint"] / "stages" / "evaluate.json").read_text())["outputs"]
    [(corpus, values)] = record["perplexity"].items()
    tokens = record["tokens_per_window"][corpus]
    assert tokens == 63
    for variant, value in values.items():
        nats = record["nats_per_window"][corpus][variant]
        assert len(nats) == 10
        # The sum in the result is over all tokens; so is this one.
        assert value == pytest.approx(2.718281828459045 ** (sum(nats) / (10 * tokens)), rel=1e-12)


def test_result_stays_small_and_channels_are_in_the_record(made_runs):
    result = (made_runs["joint"] / "result.json").read_text()
    assert "r2_channels" not in result
    assert "nats_per_window" not in result
    record = json.loads((made_runs["joint"] / "stages" / "solve.json").read_text())["outputs"]
    [row] = record["r2_channels"]
    assert len(row["r2"]) == 48
    [fit] = record["fits"]
    assert sorted(row["r2"])[24] >= fit["r2_channel_quantiles"][2] >= sorted(row["r2"])[23]


def test_unfinished_run_is_reported_as_far_as_it_is(make_config, tmp_path):
    recover(make_config(), again="solve")
    run = RunRecord(tmp_path / "run")
    assert run.result is None
    assert headline(run) == "2 of 8 layers removed; not finished"
    page = page_of(tmp_path / "run", tmp_path)
    assert "export still to do" in page
    assert "How well the gap is bridged" in page
    recover(make_config(), again="calibrate")
    assert "not finished" in page_of(tmp_path / "run", tmp_path)


def rewrite(path, record):
    record.pop("sha256", None)
    (write_sealed if path.parent.name == "stages" else write_json)(path, record)


def test_figures_of_a_stage_done_again_are_not_mixed_with_an_older_result(runs, tmp_path):
    path = runs["joint"] / "stages" / "solve.json"
    record = json.loads(path.read_text())
    record["outputs"]["fits"][0]["residual"] = 0.123456
    record["outputs"]["files"] = {"[0, 1)": "0" * 64}
    rewrite(path, record)
    page = page_of(runs["joint"], tmp_path)
    assert "Solve was done again after this result" in page
    assert "0.123" not in page
    assert "R² by channel</strong>" not in page


@pytest.mark.parametrize("losses", [[None], [None, 0.5], [0.5, None], [0.5]])
def test_a_refinement_without_a_finite_loss_has_a_report(runs, tmp_path, losses):
    outputs = {
        **read_record(runs["joint"], "solve")["outputs"],  # files, seconds, bytes
        "losses": [{"step": step, "loss": loss} for step, loss in enumerate(losses)],
        "improved": False,
    }
    write_sealed(runs["joint"] / "stages" / "refine.json", {"inputs": "", "outputs": outputs})
    shutil.copytree(runs["joint"] / "operators", runs["joint"] / "operators" / "refined")
    page = page_of(runs["joint"], tmp_path)
    assert ("NaN or Inf from the beginning" in page) == (losses == [None])
    assert ("Held-out loss by step" in page) == (losses != [None])


def test_agreement_has_the_interval_of_its_windows(made_runs, tmp_path):
    run = RunRecord(made_runs["joint"])
    windows = run.stages["evaluate"]["agreement_per_window"]["text"]["recovered"]["kl"]
    mean, error = np.mean(windows), np.std(windows) / len(windows) ** 0.5
    assert run.agreement["text"]["recovered"]["kl"] == pytest.approx(mean)
    low, high = run.agreement_intervals["text"]["recovered"]["kl"]
    assert low == pytest.approx(mean - 1.96 * error, abs=0.7 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.7 * error)
    shown = f"{text.number(low)} {text.DASH} {text.number(high)}"
    assert f">{shown}</td>" in page_of(made_runs["joint"], tmp_path)


def test_run_without_nats_per_window_has_no_intervals_and_says_so(runs, tmp_path):
    path = runs["cut"] / "stages" / "evaluate.json"
    record = json.loads(path.read_text())
    del record["outputs"]["nats_per_window"]
    record["outputs"]["agreement_per_window"] = {}
    rewrite(path, record)
    page = page_of(runs["cut"], tmp_path)
    assert "95 %" not in page
    assert "were not recorded, so no interval" in page


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ("low-rank", "Across each gap the operator low-rank carries the stream"),
        ("replaceme", "refitted; nothing acts at the gap"),
    ],
)
def test_a_run_with_what_is_gone_is_reported_and_verified(runs, capsys, gone, said):
    run = runs["spans"]
    for file in (run / "config.yaml", run / "result.json"):
        old = file.read_text().replace("name: ghost\n", f"name: {gone}\n  rank: 8\n")
        old = old.replace("criterion: search", "criterion: recoverability\n  min_length: 2\n")
        file.write_text(old.replace('"operator": "ghost"', f'"operator": "{gone}"'))
    for command in (["report", run], ["verify", run]):
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in command])
        assert not stopped.value.code
    assert f"operator {gone};" in capsys.readouterr().out
    assert said in (run / "report.html").read_text()
    with pytest.raises(RunFolderError, match=f"got '{gone}', expected"):
        RunFolder.stored_config(run)


def test_damaged_operator_is_refused(runs, tmp_path):
    (runs["joint"] / "report.json").unlink()
    [file] = (runs["joint"] / "operators").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CorruptStoreError, match="recover RUN/config.yaml makes it again"):
        write_report([runs["joint"]], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_failing_report_does_not_lose_the_run(make_config, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no ink")

    monkeypatch.setattr(recover_module, "write_report", fail)
    result = recover(make_config())
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert "no ink" in (tmp_path / "run" / "events.jsonl").read_text()
    assert not (tmp_path / "run" / "report.html").exists()


def test_target_that_is_no_report_is_left_alone(runs, tmp_path):
    mine = tmp_path / "thesis.html"
    mine.write_text("years of work")
    with pytest.raises(ConfigError, match="is not a report"):
        write_report([runs["cut"]], mine)
    assert mine.read_text() == "years of work"
    with pytest.raises(ConfigError, match="does not exist"):
        write_report([runs["cut"]], tmp_path / "nowhere" / "page.html")
    with pytest.raises(RunFolderError, match="not a RUN folder"):
        write_report([tmp_path])
    damaged = runs["spans"] / "result.json"
    damaged.write_text("{")
    with pytest.raises(RunFolderError, match=r"result\.json cannot be read"):
        write_report([runs["spans"]])


def test_comparison_says_where_runs_differ_and_does_not_rank_what_cannot_be_ranked(runs, tmp_path):
    out = tmp_path / "both.html"
    page = write_report([runs["joint"], runs["cut"]], out).read_text()
    assert ">operator.name<" in page  # a row of the table; remarks name fields, too
    assert ">calibration.windows<" not in page
    assert "has the lowest perplexity" in page
    assert "cannot be set against" not in page
    for name in ("result.json", "stages/evaluate.json"):
        path = runs["cut"] / name
        record = json.loads(path.read_text())
        for values in record.get("outputs", record)["perplexity"].values():
            values["dense"] *= 1.1
        rewrite(path, record)
    page = write_report([runs["joint"], runs["cut"]], out).read_text()
    assert "2 runs compared</h1>" in page
    assert "cannot be set against" in page


def test_command_writes_and_prints(runs, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(runs["spans"])])
    assert not stopped.value.code
    printed = capsys.readouterr().out
    assert f"report: {runs['spans'] / 'report.html'}" in printed.replace("\n", "")
    assert "recovered" in printed
    assert "<- taken" in printed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"residual": 1.2}, "no better than the plain cut"),
        ({"tokens_per_channel": 1.5}, "below 4"),
        ({"condition": 1e14}, "few are left"),
        ({"ridge_curve": [[1e-8, 0.5], [1e-4, 0.6], [1.0, 0.7]]}, "at the end of the ridges"),
    ],
)
def test_what_to_beware_of_is_said_in_words(runs, tmp_path, change, said):
    before = page_of(runs["spans"], tmp_path)
    for name, key in (("result.json", "fit"), ("stages/solve.json", "fits")):
        path = runs["spans"] / name
        record = json.loads(path.read_text())
        record.get("outputs", record)[key][0].update(change)
        rewrite(path, record)
    after = page_of(runs["spans"], tmp_path)
    assert after.count(said) > before.count(said)


def test_probes_and_what_is_lost_are_in_page_and_terminal(runs, tmp_path, capsys):
    path = runs["spans"] / "result.json"
    result = json.loads(path.read_text())
    assert set(result["probes"]) == {"brackets", "copying", "arithmetic"}
    lost = {"questions": 48, "dense": 0.9, "pruned": 0.1, "recovered": 0.2}
    page = page_of(runs["spans"], tmp_path)
    assert "the dense model fails too: brackets 0%" in page
    assert "too few positions: needle." in page
    rewrite(path, result | {"probes": {"copying": lost}})
    page = page_of(runs["spans"], tmp_path)
    assert re.search(r"copying</th>\s*<td[^>]*>48<.*?>90%<.*?>10%<.*?>20%<", page, re.DOTALL)
    assert "20% of copying (dense: 90%). Try 2 removed layers instead of 3: ghost-dist" in page
    assert "--set refine.steps=100" in page
    terminal.print_result(json.loads(path.read_text()), runs["spans"])
    said = capsys.readouterr().out
    assert "20% of copying (dense: 90%)." in said
    assert "too few positions: needle." in said
    assert re.search(r"copying\W+48\W+90%\W+10%\W+20%", said)
    new = ("generation", "probes", "unasked")
    old = {name: of for name, of in result.items() if name not in new}
    terminal.print_result(old, runs["spans"])
    assert "copying" not in capsys.readouterr().out


def test_the_table_of_sizes_fits_a_terminal_and_marks_the_chosen_one(monkeypatch):
    console = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(terminal, "console", console)
    row = {"kl": 0.1258, "removed": 0.18, "bytes": 12.7e6, "kv": 0.8, "speedup": 1.21}
    cuts = {"kv 60%": [[2, 3], [4, 7], [8, 9], [14, 16], [17, 18]], "4": [[4, 8]]}
    rows = [{**row, "wanted": wanted, "spans": spans} for wanted, spans in cuts.items()]
    terminal._print_pareto(rows, [[4, 8]])
    printed = console.file.getvalue()
    assert "…" not in printed
    assert all(title in printed for title in text.PARETO[2:])
    chosen = [line for line in printed.splitlines() if " * " in line and "[4" in line]
    assert re.search(r"0.1258\W+-18.0%\W+12.7\sMB\W+80.0%\W+1.21", chosen[0])
    assert len(chosen) == 1
