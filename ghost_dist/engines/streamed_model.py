"""A model of which one decoder layer at a time has weights.

The skeleton is the family's own causal LM on the meta device. A group of tensors (the embeddings,
one layer, or the final norm with the head) is read from the files, takes its place through
transformers' own conversions, is run over all that waits for it, and is dropped, while the next
group is being read. The model's own forward makes masks and positions; layers other than the one
at hand pass the stream on.
"""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.load import (
    check_loaded,
    non_finite_weight,
    quiet_loading,
    truncated_config,
)
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.checkpoint.surgery import handing_on
from ghost_dist.checkpoint.weight_reader import Reading, SharedRead, WeightReader
from ghost_dist.engines.conversions import convert_and_load, renamed
from ghost_dist.engines.shapes_only import restore_buffers, shapes_only
from ghost_dist.statistics.collect import FlagsOnTheWay

Group = int | Literal["embeddings", "head"]
RunLayer = Callable[[Tensor], Tensor]
"""Stream (B, T, C) entering a layer to the stream that leaves it; full rows, no padding."""


class _LayerDone(Exception):  # noqa: N818 - no error: it ends a forward early
    """The layer at hand has run."""


class StreamedModel:
    """Runs parts of a causal LM whose weights are read when their turn comes.

    Parameters
    ----------
    checkpoint, architecture
        Of the uncut model.
    num_layers
        Layers that will be run.
    dtype, device
        Of the computation.
    keep_cached
        As for :class:`~ghost_dist.checkpoint.weight_reader.WeightReader`.
    compiled
        Let ``torch.compile`` fuse what a layer does between its matrix products.
    shared
        As for :class:`~ghost_dist.checkpoint.weight_reader.WeightReader`.
    model_class, config
        Of an exported model; None: the family's own.

    Attributes
    ----------
    bytes_read
        From the files so far.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        *,
        num_layers: int,
        dtype: torch.dtype,
        device: torch.device,
        keep_cached: bool = False,
        compiled: bool = False,
        shared: SharedRead | None = None,
        model_class: Any = None,
        config: Any = None,
    ) -> None:
        self._checkpoint, self._architecture = checkpoint, architecture
        self.num_layers, self.hidden_size = num_layers, architecture.hidden_size
        self.dtype, self.device = dtype, device
        if model_class is None:
            model_class = getattr(transformers, architecture.causal_lm_class)
            config = truncated_config(checkpoint, architecture, num_layers)
        self._model = shapes_only(model_class, config, dtype)
        restore_buffers(
            self._model,
            {name: buffer.detach().clone() for name, buffer in self._model.named_buffers()},
            device,
        )
        self.layers = self._model.get_submodule(architecture.layers)
        self._embeddings = self._model.get_submodule(architecture.embeddings)
        self._norm = self._model.get_submodule(architecture.final_norm)
        self._empty = dict(self._model.named_parameters(remove_duplicate=False))
        self._keys, self._targets = self._group_tensors()
        self._compiled = compiled
        self._noted_weights: list[tuple[list[str], FlagsOnTheWay]] = []
        self._reader = WeightReader(checkpoint, device, keep_cached=keep_cached, shared=shared)
        # A layer that only hands on must not run what hangs on it, such as an exported operator.
        self._hooks = [
            (la._forward_pre_hooks, la._forward_pre_hooks_with_kwargs) for la in self.layers
        ]
        for layer in self.layers:
            layer.__dict__["forward"] = handing_on(type(layer))
            layer._forward_pre_hooks, layer._forward_pre_hooks_with_kwargs = (
                OrderedDict(),
                OrderedDict(),
            )

    @property
    def bytes_read(self) -> int:
        """Bytes read from the files so far, those of a group that is being read included."""
        return self._reader.bytes_read

    def close(self) -> None:
        """End reading."""
        self._reader.close()

    def __enter__(self) -> StreamedModel:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def group_bytes(self, group: Group) -> int:
        """Bytes of a group's tensors in the files."""
        return sum(map(self._checkpoint.stored_bytes, self._keys[group]))

    @contextlib.contextmanager
    def through(self, groups: Sequence[Group]) -> Iterator[Generator[Group]]:
        """Groups one after the other, each with its weights while it is the current one.

        While a group is at hand the next one is being read. What was read ahead is given up if the
        caller leaves early.
        """
        ahead: list[Reading] = []

        def steps() -> Generator[Group]:
            for number, group in enumerate(groups):
                reading = ahead.pop() if ahead else self._reader.start(self._keys[group])
                tensors = reading.wait()
                if number + 1 < len(groups):
                    ahead.append(self._reader.start(self._keys[groups[number + 1]]))
                self._install(group, tensors)
                del tensors
                try:
                    yield group
                finally:
                    self._release(group)

        running = steps()
        try:
            with torch.inference_mode():
                yield running
        finally:
            running.close()
            for reading in ahead:
                reading.cancel()

    def embed(self, ids_BT: Tensor) -> Tensor:
        """The stream entering layer 0, shape (B, T, C); its group must be at hand."""
        kept: list[Tensor] = []

        def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append(args[0] if args else kwargs["hidden_states"])
            raise _LayerDone

        handle = self.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with contextlib.suppress(_LayerDone):
                self._model(input_ids=ids_BT, use_cache=False)
        finally:
            handle.remove()
        return kept[0]

    @contextlib.contextmanager
    def running(self, layer: int, *, tapped: bool = False) -> Iterator[RunLayer]:
        """A function that runs one layer, whose group must be at hand.

        One that is ``tapped`` is not compiled: hooks inside it could be left out.
        """
        module = self.layers[layer]
        entering: list[Tensor] = []
        left: list[Tensor] = []
        given: dict[tuple[int, ...], tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            # Masks and positions of full rows depend on their shape alone.
            given[tuple(entering[0].shape[:2])] = args, kwargs
            if args:
                return (entering[0], *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": entering[0]}

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            left[:] = [output[0] if isinstance(output, tuple) else output]
            raise _LayerDone

        def run(stream_BTC: Tensor) -> Tensor:
            entering[:] = [stream_BTC]
            shape = tuple(stream_BTC.shape[:2])
            if shape in given:
                args, kwargs = given[shape]
                with contextlib.suppress(_LayerDone):
                    module(*args, **kwargs)
            else:
                self._forward(shape)
            return left.pop()

        hands_on = module.__dict__.pop("forward")
        if self._compiled and not tapped:
            module.__dict__["forward"] = torch.compile(module.forward, dynamic=False)
        no_hooks = module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
        module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs = self._hooks[layer]
        handles = [
            module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
            module.register_forward_hook(leave),
        ]
        try:
            yield run
        finally:
            module.__dict__["forward"] = hands_on
            entering.clear()
            for handle in handles:
                handle.remove()
            module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs = no_hooks

    def logits(self, stream_NC: Tensor) -> Tensor:
        """Logits (N, V) of streams that the final norm would get; its group must be at hand."""

        def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (stream_NC[None], *args[1:])

        handle = self._norm.register_forward_pre_hook(enter, prepend=True)
        try:
            with self._without_tokens():
                ids = torch.zeros(1, len(stream_NC), dtype=torch.int64, device=self.device)
                found: Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
        finally:
            handle.remove()
        return found

    def _forward(self, shape: tuple[int, ...]) -> None:
        with self._without_tokens(), contextlib.suppress(_LayerDone):
            ids_BT = torch.zeros(*shape, dtype=torch.int64, device=self.device)
            self._model(input_ids=ids_BT, use_cache=False)

    @contextlib.contextmanager
    def _without_tokens(self) -> Iterator[None]:
        """Token embeddings answer with zeros, which nobody reads, and need no weights."""
        width = self._embeddings.weight.shape[1]

        def zeros(ids_BT: Tensor) -> Tensor:
            return torch.zeros(*ids_BT.shape, width, dtype=self.dtype, device=self.device)

        self._embeddings.__dict__["forward"] = zeros
        try:
            yield
        finally:
            del self._embeddings.__dict__["forward"]

    def _group_tensors(self) -> tuple[dict[Group, list[str]], dict[Group, list[str]]]:
        """By group: names of tensors in the files, and of parameters in the model."""
        architecture = self._architecture
        in_layer = re.compile(re.escape(architecture.layers) + r"\.(\d+)\.")
        at_end = (f"{architecture.final_norm}.", f"{architecture.head}.")

        def group_of(target: str) -> Group:
            if found := in_layer.match(target):
                return int(found[1])
            return "head" if target.startswith(at_end) else "embeddings"

        groups: list[Group] = ["embeddings", *range(self.num_layers), "head"]
        keys: dict[Group, list[str]] = {group: [] for group in groups}
        targets: dict[Group, list[str]] = {group: [] for group in groups}
        for target in self._model.state_dict():
            targets[group_of(target)].append(target)
        target_of = {key: found[0] for key, found in renamed(self._model, self._checkpoint).items()}
        for key, target in target_of.items():
            keys[group_of(target)].append(key)
        # A head that is tied to the embeddings is not in the files: it is them, read once more.
        weight = f"{architecture.head}.weight"
        self._tied = weight not in target_of.values()
        if self._tied:
            embedding = f"{architecture.embeddings}.weight"
            targets["head"].remove(weight)
            keys["head"] += [key for key, target in target_of.items() if target == embedding]
        return keys, targets

    def _install(self, group: Group, tensors: dict[str, Tensor]) -> None:
        with quiet_loading():
            missing = convert_and_load(
                self._model, self._checkpoint, tensors, self.dtype, self.device
            )
        missing &= set(self._targets[group])
        check_loaded(self._checkpoint.path, nn.Module(), sorted(missing), self.dtype)
        self._note_weights(group)
        if group == "head" and self._tied:
            self._model.get_submodule(self._architecture.head).weight = self._embeddings.weight

    def check_weights(self) -> None:
        """Raise CheckpointError for weights installed so far that held NaN or Inf.

        Waits for the device; so it is a call of its own, for when the next layers are under way.
        """
        noted, self._noted_weights = self._noted_weights, []
        for names, flags in noted:
            for name, finite in zip(names, flags.arrived(), strict=True):
                if not finite:
                    raise non_finite_weight(self._checkpoint.path, name, self.dtype)

    def _note_weights(self, group: Group) -> None:
        """Remember whether each weight is finite: its extremes are NaN or Inf if any number is."""
        names, extremes = [], []
        for name in self._targets[group]:
            parent, _, leaf = name.rpartition(".")
            weight = getattr(self._model.get_submodule(parent), leaf)
            if weight.is_floating_point() and weight.numel() and not weight.is_meta:
                least, most = torch.aminmax(weight.detach())
                names.append(name)
                extremes.append((most * 0 + least * 0).float())  # Inf times 0 is NaN
        if names:
            self._noted_weights.append((names, FlagsOnTheWay(extremes)))

    def _release(self, group: Group) -> None:
        """Back to shapes; what the embeddings' group holds besides the table of tokens stays."""
        names = set(self._targets[group])
        if group == "embeddings":
            names = {f"{self._architecture.embeddings}.weight"}
        if group == "head" and self._tied:
            names |= {
                f"{self._architecture.embeddings}.weight",
                f"{self._architecture.head}.weight",
            }
        for name in names & self._empty.keys():
            parent, _, leaf = name.rpartition(".")
            self._model.get_submodule(parent)._parameters[leaf] = self._empty[name]
