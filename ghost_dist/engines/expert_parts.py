"""A mixture layer whose routed experts are read and run in parts, each expert once for all windows.

    the layer without its routed experts runs until it calls them:  hidden states, indices, weights
    part after part of the experts:                                 one product per token and expert
    the layer runs again, and its experts answer with the weighted sums of those products

transformers keeps the routed experts of a layer in one module with a row per expert in each of its
parameters, called as ``experts(hidden_states, top_k_index, top_k_weights)``. That module's own
forward computes the products, with only the experts of a part in it; an expert sees the same rows
as in the whole layer. The sums are made as the module makes them, of products that all are there.
So the bits are those of the whole layer, but for what torch's elementwise functions compute without
vector instructions on a CPU, and there with several threads (docs/log.md).

Legend: N tokens of a batch, K experts of a token, C hidden width, S pairs of token and expert.
"""

import contextlib
import inspect
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ghost_dist.checkpoint.halves import forward_of
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.checkpoint.weight_reader import Reading, WeightReader
from ghost_dist.devices import SHARE_OF_FREE_MEMORY, empty_at, free_or_cached_bytes
from ghost_dist.errors import UnsupportedArchitectureError

_EXPERTS_PER_TOKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token"),
    *("top_k_experts", "moe_topk", "moe_k"),
)
RunLayer = Callable[[Tensor], Tensor]


class SeenEnough(Exception):  # noqa: N818 - no error: it ends a forward early
    """What was looked for is there."""


class Inputs:
    """Streams (W, T, C) that will go through a layer, batch by batch, as often as somebody asks."""

    def __init__(self, streams: Sequence[Tensor], batch: int, device: torch.device) -> None:
        self._streams, self._batch, self._device = streams, batch, device

    def __iter__(self) -> Iterator[Tensor]:
        """Batches (B, T, C) on the device, in the order in which the layer will run them."""
        for streams_WTC in self._streams:
            for first in range(0, len(streams_WTC), self._batch):
                yield streams_WTC[first : first + self._batch].to(self._device, non_blocking=True)

    @property
    def num_tokens(self) -> int:
        return sum(streams_WTC.shape[0] * streams_WTC.shape[1] for streams_WTC in self._streams)


@dataclass(frozen=True)
class RoutedExperts:
    path: str  # of their module in the layer
    count: int
    parameters: tuple[str, ...]  # names in the module; each has a row per expert
    problem: str | None = None  # why they cannot be run in parts


def routed_experts(layer: nn.Module) -> RoutedExperts | None:
    """The routed experts of a decoder layer; None for a layer without any."""
    found = [
        (path, module)
        for path, module in layer.named_modules()
        if not isinstance(module, nn.Conv1d)
        and any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))
    ]
    if not found:
        return None
    path, module = found[0]
    own = dict(module.named_parameters(recurse=False))
    count = max(len(parameter) for parameter in own.values() if parameter.ndim == 3)
    problem = None
    if len(found) > 1:
        problem = f"a layer has {len(found)} modules of experts, {path} and {found[1][0]}"
    elif getattr(module, "num_experts", None) != count or any(
        parameter.ndim < 2 or len(parameter) != count for parameter in own.values()
    ):
        problem = f"not every parameter of {path} has one row per expert"
    elif len(inspect.signature(type(module).forward).parameters) != 4:  # with self
        problem = f"{path} is not called with hidden states, indices and weights of experts"
    return RoutedExperts(path, count, tuple(own), problem)


def _tensors_of_experts(
    checkpoint: Checkpoint, names: Sequence[str], count: int, family: str
) -> tuple[list[list[str]], list[str]]:
    """Names of tensors in the files by the one expert that they hold, and of those with all.

    A tensor of one expert has two numbers in its name, those of the layer and of the expert.
    """
    of_expert: list[list[str]] = [[] for _ in range(count)]
    of_all = []
    for name in names:
        numbers = re.findall(r"\.(\d+)(?=\.)", name)
        shape = checkpoint.tensors[name].shape
        if len(numbers) == 2 and int(numbers[1]) < count:
            of_expert[int(numbers[1])].append(name)
        elif len(numbers) == 1 and shape and shape[0] == count and name not in checkpoint.scales:
            of_all.append(name)
        else:
            why = f"it is not known which experts the tensor {name} {list(shape)} holds"
            raise cannot_be_split(family, why)
    return of_expert, of_all


def experts_per_token(config: Any) -> int | None:
    """Routed experts that a token uses; None if the configuration has no name for it we know."""
    found = (getattr(config, name, None) for name in _EXPERTS_PER_TOKEN)
    return next((number for number in found if isinstance(number, int)), None)


@dataclass
class _Batch:
    """What the experts were asked for by one batch, and what they answered."""

    hidden_NC: Tensor  # on the device, or in page-locked host memory
    index_NK: Tensor
    weights_NK: Tensor
    products_SC: Tensor  # a row per pair, in the order in which experts came; where hidden_NC is
    pairs: list[Tensor] = field(default_factory=list)  # places in (N, K) of those rows, by part


class SplitLayer:
    """Runs one layer with its routed experts in parts of ``at_once`` at most.

    ``names`` are their tensors in the files; ``install`` puts what was read into the module.
    ``reserve``: bytes of the device that inputs and products must leave.
    """

    def __init__(
        self,
        experts: nn.Module,
        names: Sequence[str],
        at_once: int,
        *,
        checkpoint: Checkpoint,
        family: str,
        reader: WeightReader,
        install: Callable[[Mapping[str, Tensor]], None],
        device: torch.device,
        reserve: int,
    ) -> None:
        self._experts, self._family, self._reader, self._install = experts, family, reader, install
        self._device, self._reserve, self.names = device, reserve, frozenset(names)
        self._whole: dict[str, Any] = dict(experts.named_parameters(recurse=False))
        self._count = len(next(iter(self._whole.values())))
        self._of_expert, self._of_all = _tensors_of_experts(checkpoint, names, self._count, family)
        starts = range(0, self._count, at_once)
        self._parts = [range(first, min(first + at_once, self._count)) for first in starts]
        self._signature = inspect.signature(type(experts).forward)
        # Whether products are added expert by expert, rounded each time ("eager"), or at once; a
        # class without has_gate knows only its own forward.
        how = getattr(getattr(experts, "config", None), "_experts_implementation", None)
        self._one_after_the_other = not hasattr(experts, "has_gate") or how in (None, "eager")
        self._batches: deque[_Batch] = deque()
        self._place: torch.device | None = None

    @contextlib.contextmanager
    def answered(self, run: RunLayer, inputs: Inputs) -> Iterator[None]:
        """All parts are run for the inputs; then ``run`` may be called with each, in order."""
        self._place = None
        ahead = [self._start(self._parts[0])]
        try:
            self._record(run, inputs)
            for part, following in itertools.zip_longest(self._parts, self._parts[1:]):
                # Nothing here holds what was read once the module has it, stacked anew.
                self._hold(part, ahead.pop().wait())
                if following is not None:
                    ahead.append(self._start(following))
                for batch in self._batches:
                    self._run_part(part, batch)
                self._release()
            with forward_of(self._experts, self._answer):
                yield
        finally:
            for reading in ahead:
                reading.cancel()
            self._batches.clear()
            self._release()

    def _start(self, part: range) -> Reading:
        names = [name for expert in part for name in self._of_expert[expert]]
        return self._reader.start(names + self._of_all, dict.fromkeys(self._of_all, part))

    def _hold(self, part: range, tensors: Mapping[str, Tensor]) -> None:
        """Let the module hold these experts, and no others."""
        self._release()
        for name, whole in self._whole.items():
            empty = whole.new_empty(len(part), *whole.shape[1:])
            self._experts._parameters[name] = nn.Parameter(empty, requires_grad=False)
        self._experts.__dict__["num_experts"] = len(part)
        self._install(tensors)

    def _release(self) -> None:
        self._experts._parameters.update(self._whole)
        self._experts.__dict__["num_experts"] = self._count

    def _record(self, run: RunLayer, inputs: Inputs) -> None:

        def asked(*args: Any, **kwargs: Any) -> Tensor:
            hidden_NC, index_NK, weights_NK = self._arguments(args, kwargs)
            shapes = [
                tuple(x.shape) if isinstance(x, Tensor) else x
                for x in (hidden_NC, index_NK, weights_NK)
            ]
            if [len(shape or ()) for shape in shapes] != [2, 2, 2] or shapes[1] != shapes[2]:
                raise cannot_be_split(
                    self._family,
                    f"hidden states, indices and weights have shapes {shapes}, expected "
                    "(tokens, width), (tokens, experts of a token) and the same again",
                )
            self._batches.append(self._keep(hidden_NC, index_NK, weights_NK, inputs.num_tokens))
            raise SeenEnough

        with forward_of(self._experts, asked):
            for count, x_BTC in enumerate(inputs, 1):
                with contextlib.suppress(SeenEnough):
                    run(x_BTC)
                if len(self._batches) != count:
                    raise cannot_be_split(self._family, "a layer did not call them")

    def _keep(
        self, hidden_NC: Tensor, index_NK: Tensor, weights_NK: Tensor, num_tokens: int
    ) -> _Batch:
        shape = (index_NK.numel(), hidden_NC.shape[1])
        if self._place is None:
            nbytes = num_tokens * shape[1] * (1 + index_NK.shape[1]) * hidden_NC.dtype.itemsize
            room = SHARE_OF_FREE_MEMORY * free_or_cached_bytes(self._device) - self._reserve
            self._place = self._device if nbytes <= room else torch.device("cpu")
        # Every pair has its row, so that none has to be moved while parts come and go.
        products_SC = empty_at(self._place, shape, hidden_NC.dtype, self._device)
        if self._place != self._device:
            on_host = empty_at(self._place, hidden_NC.shape, hidden_NC.dtype, self._device)
            hidden_NC = on_host.copy_(hidden_NC, non_blocking=True)
        return _Batch(hidden_NC, index_NK, weights_NK, products_SC)

    def _run_part(self, part: range, batch: _Batch) -> None:
        """The products of a part, each for the tokens that chose the expert."""
        index_NK = batch.index_NK
        chosen_NK = (index_NK >= part.start) & (index_NK < part.stop)
        # An expert's rows come in the order in which its implementation takes them from the whole
        # batch: what vector instructions leave over at the end may be rounded otherwise.
        if self._one_after_the_other:
            choice, token = chosen_NK.T.nonzero().unbind(1)
        else:
            token, choice = chosen_NK.nonzero().unbind(1)
        if not len(token):
            return
        hidden_SC = batch.hidden_NC.to(self._device, non_blocking=True)[token]
        expert_S1 = index_NK[token, choice][:, None] - part.start
        ones_S1 = torch.ones_like(expert_S1, dtype=batch.weights_NK.dtype)
        products_SC = type(self._experts).forward(self._experts, hidden_SC, expert_S1, ones_S1)
        first = sum(map(len, batch.pairs))
        rows = batch.products_SC[first : first + len(token)]
        rows.copy_(products_SC, non_blocking=True)
        batch.pairs.append(token * index_NK.shape[1] + choice)

    def _answer(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted sums (N, C) of the next batch, as the experts' own forward makes them."""
        _, index_NK, _ = self._arguments(args, kwargs)
        if not self._batches or self._batches[0].index_NK.shape != index_NK.shape:
            raise cannot_be_split(self._family, "a layer called them more than once for a batch")
        batch = self._batches.popleft()
        n, k = index_NK.shape
        pairs_S = torch.cat(batch.pairs) if batch.pairs else batch.index_NK.new_empty(0)
        came_SC = batch.products_SC[: len(pairs_S)].to(self._device, non_blocking=True)
        # Zeros for indices behind the last expert, which stand for no expert.
        products_NKC = came_SC.new_zeros(n * k, came_SC.shape[1])
        products_NKC[pairs_S] = came_SC
        products_NKC = products_NKC.view(n, k, -1)
        weights_NK1 = batch.weights_NK[..., None]
        if not self._one_after_the_other:
            return (products_NKC * weights_NK1).sum(dim=1).to(came_SC.dtype)
        sum_NC = torch.zeros_like(products_NKC[:, 0])
        for choice_N in batch.index_NK.argsort(dim=1, stable=True).unbind(1):
            at_N11 = choice_N[:, None, None]
            product_NC = products_NKC.take_along_dim(at_N11, 1)[:, 0]
            weight_N1 = weights_NK1.take_along_dim(at_N11, 1)[:, 0]
            sum_NC += (product_NC * weight_N1).to(sum_NC.dtype)
        return sum_NC

    def _arguments(self, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        given = self._signature.bind(None, *args, **kwargs)
        given.apply_defaults()
        _, hidden_NC, index_NK, weights_NK = given.arguments.values()
        return hidden_NC, index_NK, weights_NK


def cannot_be_split(family: str, why: str) -> UnsupportedArchitectureError:
    """The error for a family whose experts would have to be run in parts."""
    return UnsupportedArchitectureError(
        f"Family {family}: its layers are too large, or engine.experts too small, to hold all "
        f"routed experts of a layer at once, and they cannot be run in parts ({why}). Take a "
        "device with more memory, a smaller engine.batch, or engine.experts=auto."
    )
