"""Write the recovered checkpoint from the byte ranges of the original; no model is built.

Weights in block-scaled FP8 are written as the bfloat16 that was calibrated.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghost_dist.checkpoint.architecture import Architecture, check_cut
from ghost_dist.checkpoint.halves import check_halves
from ghost_dist.checkpoint.layer_fields import cut_config
from ghost_dist.checkpoint.reader import FLOATS, INDEX, Checkpoint, read_tensor
from ghost_dist.checkpoint.repair import Repair
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.durable import json_bytes
from ghost_dist.errors import ExportError
from ghost_dist.export.modeling import ghost_config, modeling_file_name, modeling_source
from ghost_dist.export.shards import New, NewTensor, plan_shards, put_values, write_shard
from ghost_dist.export.side_files import copy_side_files, keep_tokenizer
from ghost_dist.progress import Advance
from ghost_dist.spans import kept_layers, operator_positions

_SLACK_BYTES = 64 << 20  # headers, tokenizer, file system
_SHARDS_AT_ONCE = 4
Shards = Mapping[str, Sequence[NewTensor]]


def export_checkpoint(
    source: Checkpoint,
    architecture: Architecture,
    variant: Variant,
    out: Path,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = 5_000_000_000,
    extra_files: Mapping[str, bytes | Path] | None = None,
    advance: Advance | None = None,
    copied: Copied | None = None,
) -> None:
    """Write a Hugging Face checkpoint folder of the recovered model; nothing is left if that fails.

    An operator that is float32 at its boundary is stored and computed in float32, any other in the
    dtype of the checkpoint, as is a new down_proj. If none acts at its boundary and only whole
    layers go, the result is a plain checkpoint of the family and needs no code. ``out``: a new
    folder or an empty one. ``tokenizer``: the original's. ``advance``: called with the bytes just
    written, which need not be on the disk yet. ``copied``: shards that are taken from there.
    """
    check_cut(architecture, source.config, variant.spans)
    check_halves(architecture, source.config, variant.spans, variant.sublayers)
    shards = plan_shards(_new_tensors(source, architecture, variant), max_shard_bytes)
    there = {} if copied is None else copied.of(shards)
    with new_folder(out, sum(t.nbytes for file in shards.keys() - there for t in shards[file])):
        write_weights(out, shards, there, advance or (lambda _: None))
        copy_side_files(source, out)
        _write_config(out, source, architecture, variant)
        if tokenizer is not None:
            other = source.taken_out or variant.has_code
            keep_tokenizer(tokenizer, out, new_model_type=other)
        for name, content in (extra_files or {}).items():
            given = content.read_bytes() if isinstance(content, Path) else content
            (out / name).write_bytes(given)


@contextlib.contextmanager
def new_folder(out: Path, nbytes: int) -> Iterator[None]:
    """Make a folder for so many bytes of weights, if there is room; nothing is left on an error."""
    try:
        _check_target(out, nbytes)
        try:
            out.mkdir(parents=True, exist_ok=True)
            yield
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise
    except OSError as error:
        raise not_written(out, error) from error


def not_written(out: Path, error: OSError) -> ExportError:
    """What to say when the disk refuses."""
    return ExportError(
        f"The checkpoint could not be written to {out}: {error.strerror or error}"
        f"{f' ({error.filename})' if error.filename else ''}. Nothing was left there; free "
        "space or choose another place and export again."
    )


def _new_tensors(
    source: Checkpoint, architecture: Architecture, variant: Variant
) -> list[NewTensor]:
    """Tensors of the new checkpoint: the old ones in their order, renumbered, then operators."""
    kept = kept_layers(variant.spans, architecture.num_layers)
    position = {old: new for new, old in enumerate(kept)}
    layer_name = re.compile(re.escape(architecture.tensor_prefix) + r"\.(\d+)\.(.*)")
    paths = architecture.down_projections
    replaced = {
        f"{architecture.tensor_prefix}.{layer}.{paths[layer]}.weight": down_FC
        for layer, down_FC in variant.downs.items()
    }
    halves = architecture.halves
    replaced |= {halves[o.layer][o.part].writer_tensor: w for o, w in variant.outputs.items()}
    gone = {name for one in variant.sublayers for name in halves[one.layer][one.part].tensors}
    tensors = []
    for old, tensor in sorted(source.tensors.items(), key=lambda t: (t[1].file, t[1].offset)):
        if old in architecture.unused or old in gone:
            continue
        name, weight_FC = old, replaced.get(old)
        match = layer_name.fullmatch(old)
        if match is not None:
            if int(match[1]) not in position:
                continue
            name = f"{architecture.tensor_prefix}.{position[int(match[1])]}.{match[2]}"
        if weight_FC is not None:
            stored = source.dtype if old in source.scales else FLOATS[tensor.dtype]
            where = f"The new weight {old}"
            tensors.append(_tensor(where, name, weight_FC, tensor.shape, stored, "values"))
        elif old in source.scales:
            nbytes = math.prod(tensor.shape) * torch.bfloat16.itemsize
            read = partial(read_tensor, source, old)
            tensors.append(NewTensor(name, "BF16", tensor.shape, nbytes, read))
        else:
            tensors.append(NewTensor.copied(source, old, name))
    dtype = torch.float32 if variant.keeps_float32 else source.dtype
    square = (architecture.hidden_size, architecture.hidden_size)
    for span, boundary in operator_positions(variant.spans).items():
        path = (
            f"{architecture.tensor_prefix}.{boundary}"
            if boundary < len(kept)
            else architecture.final_norm_in_files
        )
        operator = variant.operators.get(span, Repair())
        for part, value in operator.boundary_parts().items():
            where = f"The part {part} of the operator of span {span}"
            name = f"{path}.ghost.{part}.weight"
            tensors.append(_tensor(where, name, value, square, dtype, "yes"))
    return tensors


def _tensor(
    where: str, name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, new: New
) -> NewTensor:
    """A tensor in our layout (in, out) as one of ``nn.Linear``'s, whose shape is given."""
    if tuple(value.shape) != shape[::-1]:
        raise ExportError(f"{where} has shape {tuple(value.shape)}, expected {shape[::-1]}.")
    stored = value.detach().to("cpu", dtype)
    if not torch.isfinite(stored).all():
        raise ExportError(
            f"{where} holds NaN or Inf as {dtype}. Solve again, or set operator.dtype=float32."
        )
    return NewTensor.of(stored.T, name, new)


@dataclass(frozen=True)
class Copied:
    """Shards of a cut, with nothing in the place of what goes: most bytes of any export of it."""

    folder: Path
    shards: Shards

    @staticmethod
    def plan(
        source: Checkpoint, architecture: Architecture, cut: Variant, folder: Path, max_bytes: int
    ) -> Copied:
        """What may be copied to a folder ahead; a single file is not, as its header may change."""
        shards = plan_shards(_new_tensors(source, architecture, cut), max_bytes)
        return Copied(folder, shards if len(shards) > 1 else {})

    def write(self, advance: Advance) -> Iterator[Path]:
        """Copy some at a time; what ``advance``, called in their threads, raises stops it."""

        def write(file: str) -> Path:
            write_shard(self.folder / file, self.shards[file], advance)
            return self.folder / file

        self.folder.mkdir(exist_ok=True)
        with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
            yield from pool.map(write, self.shards)

    def of(self, shards: Shards) -> dict[str, Path]:
        """The files that shards with the same tensors may be made of, by their names."""
        mine = {tuple(tensors): self.folder / file for file, tensors in self.shards.items()}
        wanted = {file: tuple(tensors) for file, tensors in shards.items()}
        return {file: mine[tensors] for file, tensors in wanted.items() if tensors in mine}


def write_weights(
    folder: Path, shards: Shards, there: Mapping[str, Path], advance: Advance
) -> None:
    lock = threading.Lock()

    def written(nbytes: int) -> None:
        with lock:
            advance(nbytes)

    def write(file: str) -> None:
        if file not in there:
            write_shard(folder / file, shards[file], written)
            return
        there[file].rename(folder / file)
        put_values(folder / file, shards[file])
        written(sum(tensor.nbytes for tensor in shards[file]))

    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        list(pool.map(write, shards))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for of in shards.values() for t in of)},
            "weight_map": {t.name: file for file, content in shards.items() for t in content},
        }
        (folder / INDEX).write_bytes(json_bytes(index))


def _write_config(
    folder: Path, source: Checkpoint, architecture: Architecture, variant: Variant
) -> None:
    config = cut_config(source.config, variant.spans, architecture.fields)
    config.pop("auto_map", None)
    if variant.has_code:
        config = ghost_config(config, architecture, variant)
        text = modeling_source(architecture, variant)
        (folder / modeling_file_name(architecture)).write_text(text, encoding="utf-8")
    # Not json_bytes: configurations of some families hold Infinity, and keep it.
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_target(out: Path, nbytes: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(
            f"{out} exists and is not an empty folder; nothing was written. Choose another place "
            "or remove it."
        )
    existing = next(parent for parent in out.absolute().parents if parent.is_dir())
    needed, free = nbytes + _SLACK_BYTES, shutil.disk_usage(existing).free
    if needed > free:
        raise ExportError(
            f"Not enough disk space at {existing} for the checkpoint: {needed / 1e9:.2f} GB needed,"
            f" {free / 1e9:.2f} GB free. Nothing was written; free space or choose another place."
        )
