"""The table of families has a row for every one, and a few rows are made again."""

import importlib.util

import pytest
import transformers
from markdown_blocks import ROOT

spec = importlib.util.spec_from_file_location("table", ROOT / "tests/benchmarks/families.py")
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)

PAGE = table.PAGE.read_text(encoding="utf-8")
pytestmark = pytest.mark.skipif(
    f"transformers {transformers.__version__} " not in PAGE, reason="the page is of another version"
)


def test_every_family_has_a_row():
    rows = table.read_page()
    assert list(rows) == list(table.MAPPING)
    assert all(result == "works" or notes for result, notes in rows.values())
    assert "wrong" not in {result for result, _ in rows.values()}
    assert f"{sum(result == 'works' for result, _ in rows.values())} work, " in PAGE


@pytest.mark.parametrize(
    "family",
    # settings by layer; a scale by depth, of which one cut is refused; shared weights; too large;
    # a named tuple from layer to layer
    ["gemma4_text", "diffllama", "zamba", "bert", "blt", "reformer"],
)
@pytest.mark.model
def test_row(family):
    assert table.row_of(family) == table.read_page()[family]
