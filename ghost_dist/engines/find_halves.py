"""Which modules of a layer are its attention and its MLP, found by trying a small random model.

Names say little; what a module does shows when it adds zeros to the stream. Without its attention a
layer no longer mixes tokens, without its MLP too it hands its input on, and the two alone, one
after the other or side by side, are the layer. Where that is not so (a norm behind the sum, a third
module, an attention that adds the residual itself), the family has no halves that could go.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ghost_dist.checkpoint.architecture import Architecture, Half
from ghost_dist.checkpoint.conversions import renamed
from ghost_dist.checkpoint.halves import Nothing
from ghost_dist.checkpoint.layer_fields import read_config
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.checkpoint.twin import empty_model
from ghost_dist.engines.conformance import with_small_model
from ghost_dist.engines.expert_parts import RunLayer
from ghost_dist.engines.layerwise import LayerwiseModel
from ghost_dist.errors import UnsupportedArchitectureError
from ghost_dist.spans import PARTS, Part

_TOLERANCE = 1e-4  # of the largest entry, in float32
_TOKENS = 8

_Kind = tuple[tuple[str, str], ...]  # names and classes of what a layer consists of


def with_halves(source: Checkpoint, architecture: Architecture) -> Architecture:
    """The architecture with the halves of its layers; an error where no layer has any."""

    def found(model: Any) -> dict[_Kind, dict[Part, Half] | str]:
        width = model.config.hidden_size
        layers = LayerwiseModel(model, replace(architecture, hidden_size=width))
        of_kind: dict[_Kind, dict[Part, Half] | str] = {}
        for number, layer in enumerate(layers.layers):
            if _kind(layer) not in of_kind:
                with layers.through([number]), layers.running(number, tapped=True) as run:
                    of_kind[_kind(layer)] = _Trial(layer, run, width).halves()
        return of_kind

    of_kind = with_small_model(source, architecture, 1, found)
    whole = empty_model(architecture.causal_lm_class, read_config(source.config))
    of_layer: dict[str, dict[str, str]] = {}  # by layer: names in the files, and paths in it
    for name, place in renamed(whole, source).items():
        number, _, path = place.target.removeprefix(f"{architecture.layers}.").partition(".")
        of_layer.setdefault(number, {})[name] = path
    halves: dict[int, dict[Part, Half]] = {}
    for index, layer in enumerate(whole.get_submodule(architecture.layers)):
        of_this = of_kind.get(_kind(layer), "no small layer is like it")
        if isinstance(of_this, str):
            continue
        paths = of_layer.get(str(index), {})
        halves[index] = {
            part: _with_tensors(half, paths, source, architecture.hidden_size)
            for part, half in of_this.items()
        }
    if not halves:
        reasons = "; ".join(sorted({why for why in of_kind.values() if isinstance(why, str)}))
        raise UnsupportedArchitectureError(
            f"Family {architecture.model_type}: attentions and MLPs cannot be removed by "
            f"themselves: {reasons}. Remove whole layers (selection.spans)."
        )
    return replace(architecture, halves=halves)


def _kind(layer: nn.Module) -> _Kind:
    return tuple((name, type(child).__name__) for name, child in layer.named_children())


def _with_tensors(half: Half, paths: dict[str, str], source: Checkpoint, width: int) -> Half:
    owners = tuple(f"{owner}." for owner in (half.root, *half.idle))
    names = tuple(name for name, path in paths.items() if path.startswith(owners))
    whole = (name for name in paths if source.tensors[name].shape[:1] == (width,))
    weight = next((name for name in whole if paths[name] == f"{half.writer}.weight"), "")
    writer = half.writer if weight else ""
    return replace(half, tensors=names, writer=writer, writer_tensor=weight)


@dataclass
class _Trial:
    """One small layer, tried with parts of it replaced."""

    layer: nn.Module
    run: RunLayer
    width: int

    def halves(self) -> dict[Part, Half] | str:
        """Its halves, without their tensors, or why it has none."""
        generator = torch.Generator().manual_seed(0)
        x_BTC = torch.randn(1, _TOKENS, self.width, generator=generator)
        with_weights = {
            name: type(child).__name__.lower()
            for name, child in self.layer.named_children()
            if any(True for _ in child.parameters())
        }
        children = list(with_weights)
        roots = [name for name, kind in with_weights.items() if "norm" not in kind]
        self._outputs: dict[str, int] = {}

        def note(name: str, _: Any, __: Any, output: Any) -> None:
            self._outputs[name] = len(output) if isinstance(output, tuple) else 0

        with contextlib.ExitStack() as hooks:
            for name in roots:
                module = self.layer.get_submodule(name)
                hooks.enter_context(module.register_forward_hook(partial(note, name)))
            whole_BTC = self.run(x_BTC)
        mixers = [name for name in roots if self._mixes_tokens(name, x_BTC)]
        if len(mixers) != 1:
            return f"{len(mixers)} modules of a layer mix its tokens, not one"
        [attention] = mixers
        others = [name for name in roots if name != attention]
        ends = [name for name in others if self._gives(x_BTC, x_BTC, [attention, name])]
        if not ends:
            return "without its attention and one more module a layer still changes the stream"
        mlp = ends[-1]
        self._roots = (attention, mlp)
        after = self._without(self._without(x_BTC, [mlp]), [attention])
        beside = self._without(x_BTC, [mlp]) + self._without(x_BTC, [attention]) - x_BTC
        if not any(_close(both_BTC, whole_BTC) for both_BTC in (after, beside)):
            return "a layer is not what its attention and its MLP add to the stream"
        return {
            part: Half(
                root,
                self._outputs[root],
                self._idle(x_BTC, root, children),
                writer=self._writer(x_BTC, root),
            )
            for part, root in zip(PARTS, (attention, mlp), strict=True)
        }

    def _mixes_tokens(self, name: str, x_BTC: Tensor) -> bool:
        """Whether later tokens do not see the first one without this module."""
        other_BTC = x_BTC.clone()
        other_BTC[:, 0] = x_BTC[:, 1]
        try:
            left, other = self._without(x_BTC, [name]), self._without(other_BTC, [name])
        except RuntimeError:  # what follows it takes another width: it is a part of the MLP
            return False
        return _close(left[:, 1:], other[:, 1:])  # experts group tokens, which rounds otherwise

    def _idle(self, x_BTC: Tensor, root: str, children: Sequence[str]) -> tuple[str, ...]:
        """What does nothing for the stream once a half is gone."""
        expected_BTC = self._without(x_BTC, [root])
        idle: list[str] = []
        for name in children:
            if name != root and self._gives(expected_BTC, x_BTC, [root], [*idle, name]):
                idle.append(name)
        return tuple(idle)

    def _writer(self, x_BTC: Tensor, root: str) -> str:
        """The linear module whose output a half adds to the stream as it is; empty: none."""
        others = [other for other in self._roots if other != root]
        whole_BTC = self._without(x_BTC, others)
        for path, module in self.layer.get_submodule(root).named_modules(prefix=root):
            if not isinstance(module, nn.Linear) or module.out_features != self.width:
                continue
            product: list[Tensor] = []
            with module.register_forward_hook(lambda _m, _a, y, kept=product: kept.append(y)):
                self._without(x_BTC, others)
            with module.register_forward_hook(lambda _m, _a, output: output * 0):
                change_BTC = whole_BTC - self._without(x_BTC, others)
            fits = bool(product) and product[0].numel() == change_BTC.numel()
            if fits and _close(change_BTC, product[0].reshape(change_BTC.shape)):
                return str(path)
        return ""

    def _gives(
        self, expected_BTC: Tensor, x_BTC: Tensor, names: Sequence[str], idle: Sequence[str] = ()
    ) -> bool:
        try:
            return torch.equal(self._without(x_BTC, names, idle), expected_BTC)
        except (RuntimeError, TypeError, ValueError):  # another width; more is given or wanted
            return False

    def _without(self, x_BTC: Tensor, names: Sequence[str], idle: Sequence[str] = ()) -> Tensor:
        instead: dict[str, nn.Module] = {name: nn.Identity() for name in idle}
        instead |= {name: Nothing(self.width, self._outputs.get(name, 0)) for name in names}
        with contextlib.ExitStack() as stack:
            for name, module in instead.items():
                own = self.layer.get_submodule(name)
                stack.callback(self.layer.set_submodule, name, own)
                self.layer.set_submodule(name, module)
            return self.run(x_BTC)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= _TOLERANCE * b.abs().max())
