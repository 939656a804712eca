"""A causal LM of which single layers are run, on streams that are given.

What a layer gets besides the stream (masks, positions) the model's own forward makes: it is run
once for each shape of a batch while all layers hand their input on, and what each is given is kept.
Windows are full rows, so it depends on the shape alone.
"""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.halves import forward_of, in_form, zeros
from ghost_dist.checkpoint.surgery import set_weight
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.engines.expert_parts import Inputs, RunLayer, SeenEnough, routed_experts
from ghost_dist.engines.sharding import gather_width
from ghost_dist.spans import Sublayer

Group = int | Literal["embeddings", "head"]
"""What is at hand at a time: the embeddings, a layer, or the final norm with the head."""

_PROBE_TOKENS = 16
_PROBE_TOLERANCE = 0.02  # of the largest logit; a body that ran again is off by about all of it

_Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a module is called with

_TUPLE_LENGTH: dict[type, int] = {}
"""Length of the tuple in which a class of decoder layers returns its stream first; 0: alone."""


class LayerwiseModel:
    """All layers of a causal LM in memory, itself again outside of :meth:`through`."""

    whole = True  # all layers are at hand at once, so windows go through in batches

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self.model, self.architecture = model, architecture
        self.layers: nn.ModuleList = model.get_submodule(architecture.layers)
        self.num_layers, self.hidden_size = len(self.layers), architecture.hidden_size
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self._embeddings = model.get_submodule(architecture.embeddings)
        self.final_norm = model.get_submodule(architecture.final_norm)
        self._given: dict[tuple[int, ...], list[_Call]] = {}
        routed = {number: routed_experts(layer) for number, layer in enumerate(self.layers)}
        self._experts = {number: found for number, found in routed.items() if found is not None}
        self.routes = bool(self._experts)
        self._off: frozenset[Sublayer] = frozenset()
        self._body_output: Any = None
        self._head_by_itself: bool | None = None

    def bytes_at_once(self) -> int:
        """What weights still to come take on the device at most."""
        return 0

    def check_weights(self) -> None:
        """Raise for weights that hold NaN or Inf; those that are loaded as a whole were checked."""

    @contextlib.contextmanager
    def through(self, groups: Sequence[Group]) -> Iterator[Iterator[Group]]:
        """Groups one after the other, each with its weights while it is the current one."""
        with torch.inference_mode(), self.entered():
            yield iter(groups)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """No dropout, and what layers return is known."""
        training = self.model.training
        self.model.eval()
        _learn_return_types(self.model, self.layers)
        try:
            yield
        finally:
            self.model.train(training)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """The stream entering layer 0, shape (B, T, C); its group must be at hand."""
        kept: list[Tensor] = []

        def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append(args[0] if args else kwargs["hidden_states"])
            raise SeenEnough

        hook = self.layers[0].register_forward_pre_hook(keep, prepend=True, with_kwargs=True)
        with hook, contextlib.suppress(SeenEnough):
            self.model(input_ids=ids_BT, use_cache=False)
        return kept[0]

    @contextlib.contextmanager
    def running(
        self,
        layer: int,
        inputs: Inputs | None = None,  # noqa: ARG002 - for layers that are held in parts
        *,
        tapped: bool = False,
    ) -> Iterator[RunLayer]:
        """A function that runs one layer, whose group must be at hand, on a stream (B, T, C).

        ``inputs`` is what it will be called with, in that order: experts that are held in parts are
        run here, for all of it. A ``tapped`` layer is not compiled, since hooks inside it could be
        left out; set them once this context is entered, so that they see every input once.
        """
        module = self.layers[layer]

        def run(stream_BTC: Tensor) -> Tensor:
            args, kwargs = self._calls(tuple(stream_BTC.shape[:2]))[layer]
            output = module(stream_BTC, *args, **kwargs)
            left: Tensor = output[0] if isinstance(output, tuple) else output
            return left

        plain = MethodType(type(module).forward, module)
        with forward_of(module, plain) if tapped else contextlib.nullcontext():
            yield run

    def down_projection(self, layer: int) -> Any:
        """The module that ends the MLP of a layer, this rank's part; KeyError if it has none."""
        return self.layers[layer].get_submodule(self.architecture.down_projections[layer])

    def mlp_streams(
        self, layer: int, module: Any, input_BTF: Tensor, output_BTC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a tap gets of a down_proj: its whole input, and its output without the bias."""
        if module.bias is not None:
            output_BTC = output_BTC - module.bias
        return gather_width(input_BTF, self.architecture.inner_sizes[layer]), output_BTC

    @contextlib.contextmanager
    def as_in(self, variant: Variant, layer: int) -> Iterator[None]:
        """A layer, which must be at hand, with the matrices that it has in a variant."""
        changed = {}
        if layer in variant.downs:
            changed[self.down_projection(layer)] = variant.downs[layer]
        changed |= {self.writer(one): new_FC for one, new_FC in variant.outputs_of(layer).items()}
        with contextlib.ExitStack() as stack:
            for module, weight_FC in changed.items():
                stack.callback(setattr, module, "weight", module.weight)
                set_weight(module, weight_FC)
            yield

    def writer(self, sublayer: Sublayer) -> Any:
        """The linear module that ends a half."""
        half = self.architecture.halves[sublayer.layer][sublayer.part]
        return self.layers[sublayer.layer].get_submodule(half.writer)

    @contextlib.contextmanager
    def without(self, sublayers: Collection[Sublayer]) -> Iterator[None]:
        """Layers without these halves, for what is ``running`` tapped: compiled ones have them."""
        with contextlib.ExitStack() as stack:
            for sublayer in sublayers:
                half = self.architecture.halves[sublayer.layer][sublayer.part]
                root = self.layers[sublayer.layer].get_submodule(half.root)
                stack.enter_context(forward_of(root, zeros(self.hidden_size, half.outputs)))
            self._off = frozenset(sublayers)
            stack.callback(setattr, self, "_off", frozenset())
            yield

    def logits(self, stream_NC: Tensor) -> Tensor:
        """Logits (N, V) of streams that the final norm would get; its group must be at hand."""
        if self._head_by_itself is None:
            self._try_head()
        if self._head_by_itself:
            return self._head(stream_NC)
        # A forward takes them for one text, and there may be no more positions.
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        parts = torch.split(stream_NC, most or len(stream_NC))
        return torch.cat([self._forward(part_NC) for part_NC in parts])

    def _try_head(self) -> None:
        """See whether the head can be run without the masks and positions of a body's forward."""

        def note(_: Any, __: Any, output: Any) -> None:
            self._body_output = output

        shape, generator = (_PROBE_TOKENS, self.hidden_size), torch.Generator().manual_seed(0)
        stream_NC = torch.randn(shape, generator=generator).to(self.device, self.dtype)
        body = self.model.base_model
        with body.register_forward_hook(note):
            expected_NV = self._forward(stream_NC)
        self._head_by_itself = False
        if body is self.model:  # the family names no body
            return
        try:
            got_NV = self._head(stream_NC)
        except (AttributeError, TypeError, KeyError, IndexError):
            return
        tolerance = _PROBE_TOLERANCE * float(expected_NV.abs().max())
        self._head_by_itself = float((got_NV - expected_NV).abs().max()) <= tolerance

    def _head(self, stream_NC: Tensor) -> Tensor:
        """The model's forward with a body that answers at once: soft caps and scales stay its."""
        answer = copy.copy(self._body_output)
        answer["last_hidden_state"] = self.final_norm(stream_NC[None])
        with forward_of(self.model.base_model, lambda *_args, **_kwargs: answer):
            return self._logits_of(len(stream_NC))

    def _forward(self, stream_NC: Tensor) -> Tensor:
        """The model's forward, in which the final norm gets other streams."""

        def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (stream_NC[None], *args[1:])

        hook = self.final_norm.register_forward_pre_hook(enter, prepend=True)
        with hook, self._without_tokens(), _handing_on(self.layers):
            return self._logits_of(len(stream_NC))

    def _logits_of(self, num_tokens: int) -> Tensor:
        ids = torch.zeros(1, num_tokens, dtype=torch.int64, device=self.device)
        found: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return found

    def _calls(self, shape: tuple[int, ...]) -> list[_Call]:
        """For batches of a shape, what the model gives each layer besides the stream."""
        if shape not in self._given:
            calls: list[_Call] = []

            def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                # Not the stream, whose memory it would hold.
                kept = {name: v for name, v in kwargs.items() if name != "hidden_states"}
                calls.append((args[1:], kept))

            def stop(*_: Any) -> None:
                raise SeenEnough

            with contextlib.ExitStack() as hooks:
                hooks.enter_context(contextlib.suppress(SeenEnough))
                hooks.enter_context(self._without_tokens())
                hooks.enter_context(self.final_norm.register_forward_pre_hook(stop, prepend=True))
                hooks.enter_context(_handing_on(self.layers))  # the current one too
                for layer in self.layers:
                    layer.register_forward_pre_hook(note, with_kwargs=True)
                ids_BT = torch.zeros(*shape, dtype=torch.int64, device=self.device)
                self.model(input_ids=ids_BT, use_cache=False)
            self._given[shape] = calls
        return self._given[shape]

    @contextlib.contextmanager
    def _without_tokens(self) -> Iterator[None]:
        """Token embeddings answer with zeros, which nobody reads, and need no weights."""
        width = self._embeddings.embedding_dim

        def zeros(ids_BT: Tensor) -> Tensor:
            return torch.zeros(*ids_BT.shape, width, dtype=self.dtype, device=self.device)

        with forward_of(self._embeddings, zeros):
            yield


def adds_mlp_output(layers: LayerwiseModel, layer: int) -> bool:
    """Whether a layer adds the output of its down_proj to the stream as it is, tried on 4 tokens.

    False where it is normed or scaled first (Gemma 2 and 3, OLMo 2, Granite): there the stream is
    not linear in the down_proj.
    """
    kept: list[Tensor] = []
    module, ids_BT = layers.down_projection(layer), torch.arange(4, device=layers.device)[None]
    with layers.through(["embeddings"]), layers.running(layer, tapped=True) as run:
        stream_BTC = layers.embed(ids_BT)
        with module.register_forward_hook(lambda _m, _a, output: kept.append(output)):
            whole_BTC = run(stream_BTC).double()
        with module.register_forward_hook(lambda _m, _a, output: output * 0):
            change = whole_BTC - run(stream_BTC).double()
    product = kept[0].double().reshape(change.shape)  # some families flatten it
    slack = 1e-3 * product.norm() + 8 * torch.finfo(layers.dtype).eps * whole_BTC.norm()
    return bool((change - product).norm() <= slack)


@torch.inference_mode()
def _learn_return_types(model: Any, layers: Iterable[nn.Module]) -> None:
    """Look at what layers return; annotations are missing or wrong in several families."""

    def note(layer: nn.Module, _: Any, output: Any) -> None:
        _TUPLE_LENGTH[type(layer)] = len(output) if isinstance(output, tuple) else 0

    unknown = [layer for layer in layers if type(layer) not in _TUPLE_LENGTH]
    if not unknown:
        return
    with contextlib.ExitStack() as hooks:
        for layer in unknown:
            hooks.enter_context(layer.register_forward_hook(note))
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)


@contextlib.contextmanager
def _handing_on(layers: Iterable[Any]) -> Iterator[None]:
    """Let layers hand their input on, without what hangs on them (operators)."""
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(forward_of(layer, partial(_hand_on, _TUPLE_LENGTH[type(layer)])))
            for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
                stack.callback(setattr, layer, name, getattr(layer, name))
                setattr(layer, name, OrderedDict())
        yield


def _hand_on(length: int, /, *args: Any, **kwargs: Any) -> Any:
    """A forward that returns the stream that it is given."""
    return in_form(args[0] if args else kwargs["hidden_states"], length)
