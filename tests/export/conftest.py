"""A fresh process that uses exported folders without ghost_dist."""

import json
import os
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def use_exported(forked):
    """Function that has ``use_exported.py`` do checks on the folders of one folder."""

    def use(root, wanted):
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": str(root / "modules"),
        }
        script = Path(__file__).with_name("use_exported.py")
        subprocess.run(
            [forked.program, "-I", str(script), str(root), json.dumps(wanted)],
            check=True,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        return json.loads((root / "results.json").read_text())

    return use
