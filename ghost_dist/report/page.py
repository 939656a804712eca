"""``report.html``: one file that opens anywhere, of one run, of several, or of a ``compare``.

The templates say what is on it and hold its tables; ``figures`` makes the charts.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from inspect import isfunction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ghost_dist import __version__
from ghost_dist.durable import write_bytes
from ghost_dist.errors import ConfigError
from ghost_dist.evaluation import task_rows
from ghost_dist.report import figures, plot, text, verdict
from ghost_dist.report.comparison import comparison
from ghost_dist.report.record import RunRecord
from ghost_dist.report.spectrum import spectra

if TYPE_CHECKING:
    import jinja2


def write_report(
    runs: Sequence[Path], out: Path | None = None, device: torch.device | None = None
) -> Path:
    """Write the page of a run as far as it is, or of several compared, and return its file.

    ``out`` None: ``RUN/report.html``, or ``comparison.html`` here for several. Spectra that are not
    in ``RUN/report.json`` yet are computed on ``device`` (None: the CPU).
    """
    records = [RunRecord(Path(run)) for run in runs]
    first = records[0]
    if out is None:
        out = first.path / "report.html" if len(records) == 1 else Path("comparison.html")
    _check_target(out)
    if len(records) == 1:
        template, content = "run.html.j2", _of_one(first, device)
    else:
        template, content = "comparison.html.j2", comparison(records)
    # Sections add their headings while they are written; the navigation is made of these.
    page = _pages().get_template(template).render(content, headings=[])
    write_bytes(out, page.encode())
    return out


def write_comparison(table: Mapping[str, Any], out: Path) -> None:
    """Write the page of what ``compare`` measured, which ``compare.json`` holds."""
    measured = [row for row in table["rows"] if "refused" not in row]
    first = next(iter(table["dense"]))
    measured.sort(key=lambda row: (row["remove"], row["perplexity"][first]))
    best = {row["remove"]: row for row in reversed(measured)}  # the first of each stays
    said = [f"{n} layers {best[n]['operator']} ({best[n]['selection']})" for n in sorted(best)]
    content = {
        "title": f"Lowest perplexity on {first}: without {text.join_words(said)}"
        if said
        else "No row was possible",
        "name": out.absolute().parent.name,
        "dense": table["dense"],
        "rows": measured,
        "refused": [row for row in table["rows"] if "refused" in row],
    }
    page = _pages().get_template("compare.html.j2").render(content, headings=[])
    write_bytes(out, page.encode())


def _of_one(run: RunRecord, device: torch.device | None) -> dict[str, Any]:
    helps = not verdict.no_better_than_cut(run.candidates, run.perplexity)
    return {
        "run": run,
        "headline": headline(run),
        "remarks": verdict.remarks(run),
        "remedies": verdict.remedies(run.config, run.path, run.fits, helps=helps),
        "load": text.load_words(run.path / "checkpoint"),
        "spectra": {
            f"{span} {matrix}".replace(", ", f",{text.NBSP}"): spectrum
            for span, matrices in spectra(run, device).items()
            for matrix, spectrum in matrices.items()
        },
        "configuration": yaml.safe_dump(run.config, sort_keys=False),
    }


def headline(run: RunRecord) -> str:
    """The answer to "did it work?" in one sentence."""
    if not run.spans and not run.sublayers:
        return "No layer has been chosen yet"
    of = f" of {run.num_layers}" if run.num_layers else ""
    halves = f" and {len(run.sublayers)} attentions or MLPs" if run.sublayers else ""
    removed = f"{len(run.removed)}{of} layers{halves} removed"
    if run.missing:
        return f"{removed}; not finished"
    if not run.perplexity:
        return f"{removed}; perplexity not measured"
    if run.operator == "none" and not run.sublayers:
        return f"{removed}, nothing repaired"
    shares = [found[0] for name in run.perplexity if (found := run.gap_closed(name)) is not None]
    if not shares:
        return f"{removed}; the cut cost no perplexity"
    if max(shares) <= 0:
        return f"{removed}; the repair did not help"
    low, high = text.percent(min(shares)), text.percent(max(shares))
    number = low if low == high else f"{100 * min(shares):.0f} to {high}"
    texts = text.join_words(list(run.perplexity))
    return f"{removed}, {number} of the lost perplexity won back on {texts}"


@functools.cache  # with its templates: compiling them takes longer than filling them
def _pages() -> jinja2.Environment:
    import jinja2
    import markupsafe

    pages = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {name: words for name, words in vars(text).items() if isfunction(words)}
    pages.filters |= {"tenths": "{:.1f}".format, "quote": shlex.quote}
    for module in (figures, plot, task_rows, text):
        pages.globals[module.__name__.rpartition(".")[2]] = module
    loader = pages.loader
    assert loader is not None
    script, _, _ = loader.get_source(pages, "choose.js")
    pages.globals |= {
        "version": __version__,
        "zip": zip,
        "script": markupsafe.Markup(script),
        # The page runs this script and no other.
        "script_sha256": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    return pages


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
