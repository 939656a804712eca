"""Which layers' down_proj can be refitted: where a layer adds nothing else behind it."""

from dataclasses import replace
from typing import Any

import torch

from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.reader import Checkpoint
from ghost_dist.config import Config
from ghost_dist.engines.conformance import with_small_model
from ghost_dist.engines.layerwise import LayerwiseModel, adds_mlp_output
from ghost_dist.engines.resident import load_decoder
from ghost_dist.errors import UnsupportedArchitectureError
from ghost_dist.solver.operators import refits_down


def refittable_layers(
    config: Config,
    source: Checkpoint,
    architecture: Architecture,
    *,
    any_operator: bool = False,
    reads: bool = True,
) -> frozenset[int]:
    """Layers whose down_proj can be refitted, found on a small random model of the family.

    The classes decide, not the weights: one real layer may be larger than memory. Where no small
    model can be built the first real layer that has one is looked at, or nothing if not ``reads``.
    """
    operator, downs = config.operator, architecture.down_projections
    wanted = any_operator or operator.name == "auto" or refits_down(operator.name)
    if not wanted or not downs:
        return frozenset()

    def added(model: Any) -> bool:
        small = {
            number: path
            for number, layer in enumerate(model.get_submodule(architecture.layers))
            for path in set(downs.values()) & {path for path, _ in layer.named_modules()}
        }
        layers = LayerwiseModel(model, replace(architecture, down_projections=small))
        return adds_mlp_output(layers, min(small))

    try:
        found = with_small_model(source, architecture, 1, added)
    except UnsupportedArchitectureError:
        if not reads:
            raise
        cpu, first = torch.device("cpu"), min(downs)
        decoder = load_decoder(source.path, architecture, first + 1, torch.float32, cpu)
        found = adds_mlp_output(decoder, first)
    return frozenset(downs) if found else frozenset()
