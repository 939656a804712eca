"""Proof that an exported folder is the recovered model: a fresh process loads it and uses it.

The one Python file of the folder that it may run is the modeling file that the export wrote; beside
it only code of a tokenizer that the run itself trusted.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.dynamic_module_utils import HF_MODULES_CACHE

from ghost_dist.errors import ExportError
from ghost_dist.export import reload_script
from ghost_dist.export.side_files import has_own_code, tokenizer_code

TIMEOUT_S = 3600.0  # of a fresh process
_ROUNDINGS = 4
_TEXTS = (
    "12 cats, 1234567 dogs and 3.14 naïve birds.",
    "  two blanks before,\tand a tab\n\n\nthree lines below   ",
    "def f(x: int) -> str:\n    return f'{x!r}' # Größe e\u0301 Ａﬁ 漢字かな 🙂\r\n",
)


@dataclass(frozen=True)
class Reloaded:
    """What a fresh process made of a checkpoint folder."""

    logits: Tensor  # float32, (windows, T, vocabulary)
    generated: Tensor  # (n,), greedy ids after the beginning of the first window, with a cache
    uncached: Tensor  # (n, vocabulary), logits of the positions that chose them, without one


def verify_reload(
    folder: Path,
    expected: Tensor,
    tokens: np.ndarray[Any, Any],
    *,
    num_layers: int,
    generate: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    device: torch.device,
    **asked: Any,
) -> float:
    """Compare ``folder``, loaded by plain transformers, with the recovered model and its tokenizer.

    Both usually agree bitwise; a library may sum in another order from one process to the next.
    Every layer adds about one rounding, relative, and independent ones add in quadrature, so
    4 sqrt(layers) eps max|logit| is allowed. Tokens that are chosen with a cache must be those
    that the model chooses without one, or be as good within the same bound, or those that the
    recovered model in memory generates with a cache: ``generate``, asked only where that is needed.

    ``expected``: logits, float32 on the CPU, (windows, T, vocabulary), of ``tokens``, (windows, T).
    ``asked``: as :func:`reload` takes it. Returns the largest difference of a logit.
    """
    found = reload(folder, tokens, dtype=dtype, device=device, **asked)
    difference = check_same_logits(folder, found.logits, expected, num_layers, dtype)
    chosen = found.uncached.gather(1, found.generated[:, None])[:, 0]
    lost = float((found.uncached.amax(1) - chosen).max())
    if not lost <= _allowed(found.uncached, num_layers, dtype):
        # Some families do not compute the same with a cache, cut or not (Moshi).
        rows = torch.from_numpy(np.asarray(tokens, dtype=np.int64)).to(device)
        if torch.equal(generate(rows).cpu(), found.generated):
            return difference
        raise ExportError(
            f"{folder} generates the tokens {found.generated.tolist()} with a cache, "
            f"{found.uncached.argmax(1).tolist()} without one (their logits differ by {lost:.3g}). "
            "It is not used; please report the family of the model and the versions."
        )
    return difference


def check_same_logits(
    folder: Path, found: Tensor, expected: Tensor, num_layers: int, dtype: torch.dtype
) -> float:
    """The largest difference of logits; an error if it is more than rounding, as above."""
    allowed = _allowed(expected, num_layers, dtype)
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


def _allowed(logits: Tensor, num_layers: int, dtype: torch.dtype) -> float:
    return _ROUNDINGS * math.sqrt(num_layers) * torch.finfo(dtype).eps * float(logits.abs().max())


@dataclass(frozen=True)
class FreshProcess:
    """Python that cannot import ghost_dist, and imports what a check needs before it is asked."""

    scratch: Path
    process: subprocess.Popen[str]


@contextlib.contextmanager
def fresh_process(device: torch.device | None = None) -> Iterator[FreshProcess]:
    """Start one without network, for a single check; it begins CUDA too if that is on a GPU."""
    with tempfile.TemporaryDirectory(prefix="ghost-reload-") as name:
        start = {
            # Without the code of checkpoints that this process keeps: the script keeps its own.
            "search_path": [p for p in sys.path if p and p != HF_MODULES_CACHE],
            "device": None if device is None else str(device),
            "num_threads": torch.get_num_threads(),
        }
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_MODULES_CACHE": str(Path(name, "modules")),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        with (
            Path(name, "stderr").open("w") as stderr,
            subprocess.Popen(
                [sys.executable, "-I", reload_script.__file__, json.dumps(start)],
                env=environment,
                cwd=name,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                text=True,
            ) as process,
        ):
            try:
                yield FreshProcess(Path(name), process)
            finally:
                process.terminate()


def reload(
    folder: Path,
    tokens: np.ndarray[Any, Any],
    *,
    tokenizer: Any = None,
    dtype: torch.dtype,
    device: torch.device,
    fresh: FreshProcess | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Reloaded:
    """Use a checkpoint folder in a fresh process; its token ids must be those of ``tokenizer``.

    Python code that is not ours is refused. ``fresh``: started before; None: now. ``meanwhile``:
    called while that process works.
    """
    with contextlib.nullcontext(fresh) if fresh else fresh_process(device) as fresh:
        np.save(fresh.scratch / "tokens.npy", np.asarray(tokens, dtype=np.int64))
        model = {
            "tokens": str(fresh.scratch / "tokens.npy"),
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
        }
        _ask(folder, fresh, model, tokenizer, meanwhile)
        files = (fresh.scratch / f"{part}.npy" for part in ("logits", "generated", "uncached"))
        return Reloaded(*(torch.from_numpy(np.load(file)) for file in files))


def verify_tokenizer(folder: Path, tokenizer: Any, fresh: FreshProcess | None = None) -> None:
    """Compare token ids of an exported folder, in a fresh process, with the original's."""
    with contextlib.nullcontext(fresh) if fresh else fresh_process() as fresh:
        _ask(folder, fresh, None, tokenizer)


def _ask(
    folder: Path,
    fresh: FreshProcess,
    model: dict[str, str] | None,
    tokenizer: Any,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    texts, trusted = None, False
    if tokenizer is not None:
        # Special tokens between words, with blanks and without: they may swallow blanks.
        special = "".join(f"one{one}two {one} 3" for one in tokenizer.all_special_tokens[:32])
        texts, trusted = [*_TEXTS, special], has_own_code(tokenizer)
    request = {
        "folder": str(Path(folder).absolute()),
        "results": str(fresh.scratch),
        "trust_remote_code": has_our_code(Path(folder)) or trusted,
        "model": model,
        "texts": texts,
    }
    stdin = fresh.process.stdin
    assert stdin is not None, "it is a pipe"
    with contextlib.suppress(BrokenPipeError), stdin:  # it has ended; its exit status says how
        stdin.write(json.dumps(request))
    meanwhile()
    try:
        fresh.process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"Loading {folder} in a fresh process took more than {TIMEOUT_S:.0f} s."
        ) from error
    if fresh.process.returncode != 0:
        said = (fresh.scratch / "stderr").read_text(errors="replace").strip()
        raise ExportError(
            f"{folder} cannot be used by transformers in a fresh process (exit status "
            f"{fresh.process.returncode}):\n{said[-4000:]}"
        )
    if texts is None:
        return
    expected = reload_script.token_ids(tokenizer, texts)
    found = json.loads((fresh.scratch / "token_ids.json").read_bytes())
    for (text, ids), (other_text, other_ids) in zip(expected, found, strict=True):
        if (text, ids) != (other_text, other_ids):
            raise ExportError(
                f"{folder} tokenises {other_text!r} as {other_ids}, the original {text!r} as "
                f"{ids}. It is not used; please report the class of the tokenizer, "
                f"{type(tokenizer).__name__}, and the versions."
            )


def has_our_code(folder: Path) -> bool:
    """Whether the folder has a modeling file of ours; other code of a model is refused."""
    found = {path.name for path in folder.glob("**/*.py")} - tokenizer_code(folder)
    if not found:
        return False
    config = json.loads((folder / "config.json").read_bytes())
    modules = {name.partition(".")[0] + ".py" for name in config.get("auto_map", {}).values()}
    if found != modules or not all(n.startswith("modeling_ghost_") for n in found):
        raise ExportError(
            f"{folder} holds Python code that ghost_dist did not write "
            f"({', '.join(sorted(found))}); it is not run."
        )
    return True
