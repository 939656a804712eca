"""``ghost-dist bench-serving``: tokens a second of the dense, the pruned and the recovered model.

All three are in memory of one process and take turns (``turns.py``).
"""

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from ghost_dist.amounts import parse_target
from ghost_dist.calibration.windows import TokenWindows, load_windows
from ghost_dist.checkpoint.conversions import quiet_loading
from ghost_dist.checkpoint.load import load_causal_lm
from ghost_dist.checkpoint.surgery import insert_operators, remove_layers
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.devices import device_name, open_device
from ghost_dist.durable import json_bytes, write_bytes
from ghost_dist.errors import ConfigError, RunFolderError
from ghost_dist.export.verify import has_our_code
from ghost_dist.pipeline.automatic import compute_dtype
from ghost_dist.pipeline.inputs import open_model
from ghost_dist.pipeline.targets import kept_times, kv_numbers
from ghost_dist.pipeline.turns import BATCH, NEW, PROMPT, Turn, take_turns
from ghost_dist.report.page import write_report
from ghost_dist.run_folder import RunFolder, read_record, recover_command
from ghost_dist.spans import Span, kept_layers, parse_sublayers

SERVING = "serving"


def bench_serving(
    run: Path, *, batch: int = BATCH, prompt: int = PROMPT, new: int = NEW, rounds: int = 5
) -> dict[str, Any]:
    """Measure the models of a finished run, on the device and in the dtype of the run.

    ``batch`` sequences at once, of ``prompt`` tokens of the calibration text; ``new`` tokens, 2 at
    least, are generated for each, in ``rounds`` turns of each model and one before that does not
    count. Under ``variants`` by name: for ``prefill``, ``decode`` and the whole ``request`` tokens
    a second (``median``, ``low``, ``high``) and ``ratio``, the median over rounds of the dense
    model's time by this one's, with the ``ratio_range`` of the rounds: of five it holds the true
    median in 15 of 16 cases. Under ``target``, of a run that has one, what was predicted and what
    is. Also kept in ``RUN/result.json``, under ``serving``, and shown in the report.
    """
    config = RunFolder.stored_config(run)
    checkpoint, result = finished_checkpoint(run), run / "result.json"
    before, content = _state(run), json.loads(result.read_bytes())
    spans = tuple(Span(*span) for span in content["spans"])
    cut = Variant(spans, sublayers=parse_sublayers(",".join(content.get("sublayers", ()))))
    source, architecture, _ = open_model(config, kept_times(run))
    limit = source.config.get("max_position_embeddings")
    if min(batch, prompt, rounds) < 1 or new < 2:
        raise ConfigError(
            f"batch {batch}, prompt {prompt} and rounds {rounds} must be 1 at least, new {new} 2."
        )
    if limit is not None and prompt + new > limit:
        raise ConfigError(
            f"prompt {prompt} and new {new} are {prompt + new} tokens, the model was made for "
            f"{limit}. Take fewer."
        )
    device = open_device(config.engine.device)
    dtype = compute_dtype(config, source, device)
    pruned = load_causal_lm(source.path, dtype=dtype, device=device)
    remove_layers(pruned, architecture, spans)
    insert_operators(pruned, architecture, cut)
    models = {
        "dense": load_causal_lm(source.path, dtype=dtype, device=device),
        "pruned": pruned,
        "recovered": _as_users_do(checkpoint, dtype, device),
    }
    ids_BT = _prompts(load_windows(run / "tokens.safetensors"), batch, prompt).to(device)
    turns = take_turns(models, ids_BT, new, rounds)
    measured: dict[str, Any] = {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "batch": batch,
        "prompt": prompt,
        "new": new,
        "rounds": rounds,
        "variants": {
            name: {
                "layers": model.config.num_hidden_layers,
                "parameters": sum(p.numel() for p in model.parameters()),
                "weight_bytes": model.get_memory_footprint(),
                "peak_bytes": turns[name][0].peak_bytes,
                "cache_bytes": turns[name][0].cache_bytes,
                "prefill": _rates(batch * prompt, turns, name, "prefill_s"),
                "decode": _rates(batch * (new - 1), turns, name, "decode_s"),
                "request": _rates(batch * new, turns, name, "request_s"),
            }
            for name, model in models.items()
        },
    }
    if (target := content.get("target")) is not None:
        kind, _, part = parse_target(target["target"])
        dense, recovered = (measured["variants"][name] for name in ("dense", "recovered"))
        found = recovered[part or "request"]["ratio"]
        if kind == "speedup":
            target |= {"range": recovered[part or "request"]["ratio_range"]}
        if kind == "bytes":
            found = content["bytes"]["after"]
        if kind == "kv":  # of this length: windows that slide keep another share of a longer text
            found = recovered["cache_bytes"] / dense["cache_bytes"]
            kept = kv_numbers(source, architecture, prompt + new - 1)
            stay = kept_layers(spans, architecture.num_layers)
            target |= {"predicted": sum(kept[layer] for layer in stay) / sum(kept)}
        measured["target"] = {**target, "measured": found}
    _keep(RunFolder(config), before, measured)
    write_report([run])
    return measured


def finished_checkpoint(run: Path) -> Path:
    """Where the recovered checkpoint of a finished run is; RunFolderError if there is none."""
    checkpoint = run / "checkpoint"
    if not checkpoint.is_dir() or not (run / "result.json").is_file():
        raise RunFolderError(
            f"{run} has no recovered checkpoint yet. Finish it first: {recover_command(run)} --out "
            f"{shlex.quote(str(run))}"
        )
    return checkpoint


def exported(result: Path) -> dict[str, Any]:
    """What is known of a run when it is exported, of a result.json; speed is measured later."""
    return {k: v for k, v in json.loads(result.read_bytes()).items() if k != SERVING}


def _state(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What changes when a run is done again."""
    return exported(run / "result.json"), read_record(run, "export")


def _keep(run: RunFolder, before: object, measured: Mapping[str, Any]) -> None:
    with run:
        if _state(run.path) != before:
            raise RunFolderError(
                f"The run in {run.path} was done again while its models were measured: the figures "
                "are of the models before, and were not kept. Run bench-serving again."
            )
        content = exported(run.result)
        run.finish(SERVING, content["fingerprint"], measured)
        write_bytes(run.result, json_bytes({**content, SERVING: measured}))


def _rates(
    num_tokens: int, turns: Mapping[str, Sequence[Turn]], name: str, part: str
) -> dict[str, Any]:
    seconds = [getattr(turn, part) for turn in turns[name]]
    dense = [getattr(turn, part) for turn in turns["dense"]]
    ratios = [d / s for d, s in zip(dense, seconds, strict=True)]
    return {
        "median": num_tokens / statistics.median(seconds),
        "low": num_tokens / max(seconds),
        "high": num_tokens / min(seconds),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def _as_users_do(checkpoint: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The checkpoint by plain transformers, its own modeling file included."""
    with quiet_loading():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, trust_remote_code=has_our_code(checkpoint)
        )
    return model.to(device).eval()


def _prompts(windows: TokenWindows, batch: int, length: int) -> Tensor:
    """Consecutive calibration tokens, from the start again where they end; (batch, length)."""
    flat = np.resize(windows.tokens.reshape(-1), batch * length)
    return torch.from_numpy(flat.astype(np.int64)).reshape(batch, length)
