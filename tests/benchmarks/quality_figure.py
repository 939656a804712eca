"""The figure of docs/benchmarks/compare.md: perplexity against the share of layers removed.

    pip install matplotlib
    python tests/benchmarks/quality_figure.py docs/benchmarks/compare.md docs/benchmarks/quality.svg

Reads the first table of the page: one panel a model, of its first text.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt

ROW = re.compile(
    r"\| (?P<model>[^,|]+), (?P<layers>\d+)(?: layers)?; (?P<text>[^/]+) / .*; "
    r"dense (?P<dense>[\d.]+) .*? \| (?P<removed>\d+) \| "
    r"(?P<paper>[\d.]+) / .*? \| (?P<cuts>[\d.]+) / .*? \| \*\*(?P<default>[\d.]+) / "
)
LINES = {
    "cuts": ("plain cuts, searched", "^-.", "#6b7280"),
    "paper": ("the paper's settings", "s--", "#b45309"),
    "default": ("default", "o-", "#1d4ed8"),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    models = defaultdict(list)
    for line in given.page.read_text().splitlines():
        if row := ROW.match(line):
            models[row["model"]].append(row)
    plt.rcParams.update({"svg.hashsalt": "ghost_dist", "font.size": 9, "svg.fonttype": "none"})
    figure, panels = plt.subplots(1, len(models), figsize=(3 * len(models), 2.9), layout="tight")
    for panel, (model, rows) in zip(panels, models.items(), strict=True):
        share = [100 * int(row["removed"]) / int(row["layers"]) for row in rows]
        for name, (label, style, colour) in LINES.items():
            values = [float(row[name]) for row in rows]
            panel.plot(share, values, style, color=colour, label=label, markersize=4)
        panel.axhline(float(rows[0]["dense"]), color="#6b7280", linestyle=":", label="dense")
        panel.set(title=model, xlabel="% of the layers removed", yscale="log")
        panel.set_ylabel(f"perplexity, {rows[0]['text']}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
        panel.tick_params(axis="y", which="minor", labelsize=7)
    panels[0].legend(frameon=False)
    figure.savefig(given.out, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
