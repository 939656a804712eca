"""docs/walkthrough.md is a doctest; transformers' cache of remote code is a folder of its own."""

import doctest
import os
import re
import subprocess

import pytest
from markdown_blocks import ROOT

PAGE = ROOT / "docs" / "walkthrough.md"

SCRIPT = """
import doctest, sys
failures, tried = doctest.testfile(sys.argv[1], module_relative=False)
print(f"{tried} tried")
sys.exit(bool(failures))
"""


@pytest.mark.model
@pytest.mark.timeout(300)
def test_every_line_prints_what_the_page_says(forked, tmp_path):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [forked.program, "-c", SCRIPT, str(PAGE)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    examples = len(doctest.DocTestParser().get_examples(PAGE.read_text(encoding="utf-8")))
    assert re.search(rf"^{examples} tried$", done.stdout, re.MULTILINE)
    assert examples > 40
