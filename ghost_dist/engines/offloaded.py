"""A model of which one decoder layer at a time has weights: offloaded to its files.

The skeleton is the family's own causal LM on the meta device. A group of tensors (the embeddings,
one layer, or the final norm with the head) is read from the files, takes its place through
transformers' own conversions, is run over all that waits for it, and is dropped, while the next
group is being read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.conversions import convert_and_load, renamed
from ghost_dist.checkpoint.halves import forward_of
from ghost_dist.checkpoint.load import non_finite_weight, truncated_config
from ghost_dist.checkpoint.peers import ALONE, Peers
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.checkpoint.twin import restore_buffers, shapes_only
from ghost_dist.checkpoint.weight_reader import Reading, WeightReader
from ghost_dist.devices import SHARE_OF_FREE_MEMORY, free_bytes
from ghost_dist.engines.expert_parts import Inputs, RunLayer, SplitLayer, cannot_be_split
from ghost_dist.engines.layerwise import Group, LayerwiseModel
from ghost_dist.engines.memory import Residency, choose_residency
from ghost_dist.engines.model_sizes import loaded_sizes
from ghost_dist.errors import ConfigError
from ghost_dist.spans import Sublayer
from ghost_dist.statistics.span_sums import FlagsOnTheWay


class OffloadedModel(LayerwiseModel):
    """A model whose weights are read when their turn comes, of its first ``num_layers``.

    ``peers``: ranks that ask for the same at the same time. ``model_class`` and ``config`` are of
    an exported model; None: the family's own.
    """

    whole = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        keep_cached: bool = False,
        compiled: bool = False,
        peers: Peers = ALONE,
        model_class: Any = None,
        config: Any = None,
    ) -> None:
        if model_class is None:
            model_class = architecture.causal_lm_class
            config = truncated_config(checkpoint, architecture, num_layers)
        model = shapes_only(model_class, config, dtype)
        del model.get_submodule(architecture.layers)[num_layers:]
        restore_buffers(model, dict(model.named_buffers()), device)
        super().__init__(model, architecture)
        self._checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self._empty = dict(self.model.named_parameters(remove_duplicate=False))
        self._keys, self._targets = self._group_tensors()
        self.sizes = loaded_sizes(model, architecture, dtype)
        self._split: dict[Group, SplitLayer] = {}
        self._held = Residency()
        self._compiled, self.peers = compiled, peers
        self._noted_weights: list[tuple[list[str], FlagsOnTheWay]] = []
        self._reader = WeightReader(checkpoint, device, keep_cached=keep_cached, peers=peers)

    @property
    def bytes_read(self) -> int:
        """From the files so far, those of a group that is being read included."""
        return self._reader.bytes_read

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> OffloadedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hold(
        self,
        experts: int | Literal["auto"],
        *,
        batch_tokens: int,
        tokens: int,
        kept: int = 1,
        head: bool = True,
        free: int | None = None,
    ) -> Residency:
        """Set what of the layers is on the device at once; before anything is read.

        ``tokens`` of all streams go through a layer, and ``kept`` streams are kept of each: where
        the device is the host, they and what experts are asked and answer lie there too. ``head``:
        whether it is run. ``free`` bytes are taken to be free; None: those that are. Ranks that
        share the reading must be given the same number.
        """
        self._split, self._held = {}, Residency()
        stream_bytes = self.hidden_size * self.dtype.itemsize
        layers = self.sizes.layer_bytes(batch_tokens, head=head)
        free = free_bytes(self.device) if free is None else free
        room = int(SHARE_OF_FREE_MEMORY * free)
        asked = 0  # on a GPU it goes where there is room for it
        if self.device.type != "cuda":
            room -= tokens * stream_bytes * (kept + 1)  # one more is being saved
            asked = (1 + self.sizes.experts_per_token) * tokens * stream_bytes

        def fits(held: Residency) -> bool:
            return layers.at_once(held) + asked * (held.experts is not None) <= room

        family, routed = self.architecture.model_type, self._experts.values()
        problem = next((one.problem for one in routed if one.problem), None)
        most = max((one.count for one in routed), default=0)
        if problem and experts != "auto" and experts < most:
            raise cannot_be_split(family, problem)
        may_split = experts != "auto" or not self._compiled
        held = choose_residency(fits, layers.count if may_split else 0, experts)
        if held is None:
            if problem:
                raise cannot_be_split(family, problem)
            least, what = Residency(prefetch=False), "one whole layer at a time"
            if layers.count and may_split:
                least, what = Residency(1), "one routed expert at a time, with what is beside it,"
            weights, batch, left = (
                f"{nbytes / 1e9:.2f} GB"
                for nbytes in (layers.weights(least), layers.of_batch(least), max(0, room))
            )
            raise ConfigError(
                f"The layers do not fit {self.device}: {what} takes {weights}, a batch of "
                f"{batch_tokens} tokens {batch}, but only {left} may be filled. Take a smaller "
                "engine.batch, fewer or shorter calibration.windows, or a device with more memory."
            )
        if held.experts is not None:
            if self._compiled:
                raise ConfigError(
                    "engine.compile=true compiles whole layers, but engine.experts splits them: "
                    "set engine.compile=false."
                )
            self._split = {
                layer: self._split_layer(layer, held.experts, layers.at_once(held))
                for layer, found in self._experts.items()
                if found.count > held.experts
            }
        self._held = held
        return held

    def _split_layer(self, layer: int, at_once: int, reserve: int) -> SplitLayer:
        found = self._experts[layer]
        path = f"{self.architecture.layers}.{layer}.{found.path}"
        targets = [f"{path}.{name}" for name in found.parameters]
        return SplitLayer(
            self.model.get_submodule(path),
            [name for name in self._keys[layer] if self._target_of[name] in targets],
            at_once,
            checkpoint=self._checkpoint,
            family=self.architecture.model_type,
            reader=self._reader,
            install=partial(self._install, targets),
            device=self.device,
            reserve=reserve,
        )

    def bytes_at_once(self) -> int:
        """What weights take on the device at most."""
        return self.sizes.layer_bytes(0, head=True).weights(self._held)

    @contextlib.contextmanager
    def through(self, groups: Sequence[Group]) -> Iterator[Generator[Group]]:
        """As there, the next group being read where there is room; given up on leaving early."""
        with torch.inference_mode(), contextlib.closing(self._steps(groups)) as steps:
            yield steps

    def _steps(self, groups: Sequence[Group]) -> Generator[Group]:
        ahead: list[Reading] = []
        try:
            for number, group in enumerate(groups):
                reading = ahead.pop() if ahead else self._start(group)
                tensors = reading.wait()
                del reading  # it would hold the experts beside what they are stacked into
                if self._held.prefetch and number + 1 < len(groups):
                    ahead.append(self._start(groups[number + 1]))
                self._install(self._targets[group], tensors)
                if group == "head" and self._tied:
                    head = self.model.get_submodule(self.architecture.head)
                    head.weight = self._embeddings.weight
                del tensors
                try:
                    yield group
                finally:
                    self._release(group)
        finally:
            for reading in ahead:
                reading.cancel()

    @contextlib.contextmanager
    def running(
        self, layer: int, inputs: Inputs | None = None, *, tapped: bool = False
    ) -> Iterator[RunLayer]:
        with contextlib.ExitStack() as stack:
            run = stack.enter_context(super().running(layer, tapped=tapped))
            if self._compiled and not tapped:
                module = self.layers[layer]
                forward = torch.compile(module.forward, dynamic=False)
                stack.enter_context(forward_of(module, forward))
            split = self._split.get(layer)
            if split is not None and Sublayer(layer, "mlp") not in self._off:
                assert inputs is not None, "experts in parts are run for all inputs beforehand"
                stack.enter_context(split.answered(run, inputs))
            yield run

    def _group_tensors(self) -> tuple[dict[Group, list[str]], dict[Group, list[str]]]:
        """By group: names of tensors in the files, and of parameters in the model."""
        architecture = self.architecture
        in_layer = re.compile(re.escape(architecture.layers) + r"\.(\d+)\.")
        at_end = (f"{architecture.final_norm}.", f"{architecture.head}.")

        def group_of(target: str) -> Group:
            if found := in_layer.match(target):
                return int(found[1])
            return "head" if target.startswith(at_end) else "embeddings"

        groups: list[Group] = ["embeddings", *range(self.num_layers), "head"]
        keys: dict[Group, list[str]] = {group: [] for group in groups}
        targets: dict[Group, list[str]] = {group: [] for group in groups}
        for target in self.model.state_dict():
            targets[group_of(target)].append(target)
        places = renamed(self.model, self._checkpoint)
        self._target_of = {key: place.target for key, place in places.items()}
        for key, target in self._target_of.items():
            keys[group_of(target)].append(key)
        # A head that is tied to the embeddings is not in the files: it is them, read once more.
        weight = f"{architecture.head}.weight"
        self._tied = weight not in self._target_of.values()
        if self._tied:
            embedding = f"{architecture.embeddings}.weight"
            targets["head"].remove(weight)
            keys["head"] += [key for key, place in places.items() if place.target == embedding]
        return keys, targets

    def _start(self, group: Group) -> Reading:
        """Begin to read a group; of a split layer all but its routed experts."""
        names = self._keys[group]
        if split := self._split.get(group):
            names = [name for name in names if name not in split.names]
        return self._reader.start(names)

    def _install(self, targets: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        convert_and_load(self.model, self._checkpoint, tensors, self.dtype, self.device)
        self._note_weights(targets)

    def check_weights(self) -> None:
        """Also waits for the device: a call of its own, for when the next layers are under way."""
        noted, self._noted_weights = self._noted_weights, []
        for names, flags in noted:
            for name, finite in zip(names, flags.arrived(), strict=True):
                if not finite:
                    raise non_finite_weight(self._checkpoint.path, name, self.dtype)

    def _note_weights(self, targets: Sequence[str]) -> None:
        """Remember whether each weight is finite: its extremes are NaN or Inf if any number is."""
        names, extremes = [], []
        for name in targets:
            parent, _, leaf = name.rpartition(".")
            weight = getattr(self.model.get_submodule(parent), leaf)
            if weight.is_floating_point() and weight.numel() and not weight.is_meta:
                least, most = torch.aminmax(weight.detach())
                names.append(name)
                extremes.append((most * 0 + least * 0).float())  # Inf times 0 is NaN
        if names:
            self._noted_weights.append((names, FlagsOnTheWay(extremes)))

    def _release(self, group: Group) -> None:
        """Back to shapes; what the embeddings' group holds besides the table of tokens stays."""
        names, table = set(self._targets[group]), f"{self.architecture.embeddings}.weight"
        if group == "embeddings":
            names = {table}
        if group == "head" and self._tied:
            names |= {table, f"{self.architecture.head}.weight"}
        for name in names & self._empty.keys():
            parent, _, leaf = name.rpartition(".")
            self.model.get_submodule(parent)._parameters[leaf] = self._empty[name]
