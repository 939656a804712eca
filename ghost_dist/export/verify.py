"""Proof that an exported folder is the recovered model: a fresh process loads it and computes.

The process imports torch and transformers only; the one Python file of the folder that it may run
is the modeling file that the export wrote.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghost_dist.errors import ExportError

_SCRIPT = Path(__file__).with_name("reload_script.py")
_ROUNDINGS = 4


def verify_reload(
    folder: Path,
    model: Any,
    tokens: np.ndarray[Any, Any],
    *,
    dtype: torch.dtype,
    device: torch.device,
    timeout_s: float = 3600.0,
) -> float:
    """Compare the logits of ``folder``, loaded by plain transformers, with those of ``model``.

    Both compute on the same device in the same dtype, window by window, so they usually agree
    bitwise; a library that sums in another order from one process to the next may differ by
    rounding. Every layer adds about one rounding, relative, and independent ones add in
    quadrature, so 4 sqrt(layers) eps max|logit| is allowed.

    Parameters
    ----------
    folder
        What ``export_checkpoint`` wrote.
    model
        The recovered model in memory (``remove_layers`` and ``insert_operators``).
    tokens
        Integers, shape (windows, T); a few hundred tokens are enough.
    dtype, device
        Of the computation; the device holds both models for a while.
    timeout_s
        How long the process may take, in seconds.

    Returns
    -------
    float
        Largest absolute difference of a logit.

    Raises
    ------
    ExportError
        If the process fails, or the logits differ by more than is allowed.
    """
    expected = _logits(model, tokens, device)
    found = reload_logits({folder: tokens}, dtype=dtype, device=device, timeout_s=timeout_s)[folder]
    return check_same_logits(folder, found, expected, model.config.num_hidden_layers, dtype)


def check_same_logits(
    folder: Path, found: Tensor, expected: Tensor, num_layers: int, dtype: torch.dtype
) -> float:
    """The largest difference of logits of an exported folder from those of the recovered model.

    Raises
    ------
    ExportError
        If it is more than rounding, see :func:`verify_reload`.
    """
    allowed = (
        _ROUNDINGS * math.sqrt(num_layers) * torch.finfo(dtype).eps * float(expected.abs().max())
    )
    if found.shape != expected.shape:
        raise ExportError(
            f"{folder} gives logits of shape {tuple(found.shape)}, the recovered model "
            f"{tuple(expected.shape)}. This checkpoint is not used."
        )
    difference = float((found - expected).abs().max())
    if not difference <= allowed:
        raise ExportError(
            f"{folder}, loaded by transformers, does not reproduce the "
            f"recovered model: the logits differ by {difference:.3g}, allowed are {allowed:.3g}. "
            "It is not used; please report the family of the model and the versions."
        )
    return difference


def reload_logits(
    jobs: dict[Path, np.ndarray[Any, Any]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    timeout_s: float = 3600.0,
) -> dict[Path, Tensor]:
    """Logits (float32, shape (windows, T, vocabulary)) of checkpoint folders for their tokens.

    One fresh process does all; it cannot import ghost_dist, reaches no network and keeps its copy
    of the modeling files in a temporary folder.

    Raises
    ------
    ExportError
        If a folder holds Python code that is not ours, or the process fails.
    """
    with tempfile.TemporaryDirectory(prefix="ghost-reload-") as scratch_name:
        scratch = Path(scratch_name)
        entries = []
        for number, (folder, tokens) in enumerate(jobs.items()):
            np.save(scratch / f"tokens-{number}.npy", np.asarray(tokens, dtype=np.int64))
            entries.append(
                {
                    "folder": str(Path(folder).absolute()),
                    "tokens": str(scratch / f"tokens-{number}.npy"),
                    "logits": str(scratch / f"logits-{number}.npy"),
                    "dtype": str(dtype).removeprefix("torch."),
                    "device": str(device),
                    "trust_remote_code": has_our_code(Path(folder)),
                    "num_threads": torch.get_num_threads(),
                }
            )
        request = {"search_path": [p for p in sys.path if p], "jobs": entries}
        (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
        _run([str(_SCRIPT), str(scratch / "request.json")], scratch, timeout_s, list(jobs))
        return {
            folder: torch.from_numpy(np.load(scratch / f"logits-{number}.npy"))
            for number, folder in enumerate(jobs)
        }


def _run(arguments: list[str], scratch: Path, timeout_s: float, folders: list[Path]) -> None:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    shown = ", ".join(map(str, folders))
    try:
        done = subprocess.run(
            [sys.executable, "-I", *arguments],
            env=environment,
            cwd=scratch,
            timeout=timeout_s,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"Loading {shown} in a fresh process took more than {timeout_s:.0f} s."
        ) from error
    if done.returncode != 0:
        raise ExportError(
            f"{shown} cannot be loaded by transformers in a fresh process (exit status "
            f"{done.returncode}):\n{done.stderr.strip()[-4000:]}"
        )


def has_our_code(folder: Path) -> bool:
    """Whether the folder has a modeling file of ours; any other code is refused."""
    found = sorted(path.name for path in folder.glob("**/*.py"))
    if not found:
        return False
    config = json.loads((folder / "config.json").read_bytes())
    modules = {name.partition(".")[0] + ".py" for name in config.get("auto_map", {}).values()}
    if set(found) != modules or not all(n.startswith("modeling_ghost_") for n in found):
        raise ExportError(
            f"{folder} holds Python code that ghost_dist did not write ({', '.join(found)}); it is "
            "not run."
        )
    return True


@torch.inference_mode()
def _logits(model: Any, tokens: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    rows = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
    logits = [model(row[None].to(device), use_cache=False).logits.float().cpu() for row in rows]
    return torch.cat(logits)
