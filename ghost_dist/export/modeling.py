"""The modeling file of a recovered checkpoint, and what ``config.json`` says about it.

The model type is the family's with ``ghost_`` before it: under the family's own name transformers
would load the checkpoint without its operators and only warn.
"""

import importlib.resources
import string
from collections.abc import Mapping
from typing import Any

from ghost_dist import __version__
from ghost_dist.checkpoint.architecture import Architecture
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.spans import kept_layers, operator_positions

TEMPLATE = "modeling_template.py.txt"


def modeling_file_name(architecture: Architecture) -> str:
    return f"modeling_ghost_{architecture.model_type.replace('-', '_')}.py"


def modeling_source(architecture: Architecture, variant: Variant) -> str:
    """Text of the Python file: the template with the family's names put in."""
    template = (importlib.resources.files(__package__) / TEMPLATE).read_text(encoding="utf-8")
    return string.Template(template).substitute(
        version=__version__,
        base_model_type=architecture.model_type,
        base_config=architecture.config_class.__name__,
        base_model=architecture.base_class.__name__,
        base_causal_lm=architecture.causal_lm_class.__name__,
        base_prefix=architecture.base_prefix,
        model_type=f"ghost_{architecture.model_type}",
        config=f"Ghost{architecture.config_class.__name__}",
        model=f"Ghost{architecture.base_class.__name__}",
        causal_lm=f"Ghost{architecture.causal_lm_class.__name__}",
        layers=architecture.in_base(architecture.layers),
        final_norm=architecture.in_base(architecture.final_norm),
        final_norm_class=architecture.final_norm_class,
        float32_modules='("ghost",)' if variant.keeps_float32 else "()",
    )


def ghost_config(
    cut: Mapping[str, Any], architecture: Architecture, variant: Variant
) -> dict[str, Any]:
    """The cut ``config.json`` with the operators and the way to their code."""
    module = modeling_file_name(architecture).removesuffix(".py")
    sublayers = _sublayers(architecture, variant)
    return {
        **cut,
        "architectures": [f"Ghost{architecture.causal_lm_class.__name__}"],
        "auto_map": {
            "AutoConfig": f"{module}.Ghost{architecture.config_class.__name__}",
            "AutoModel": f"{module}.Ghost{architecture.base_class.__name__}",
            "AutoModelForCausalLM": f"{module}.Ghost{architecture.causal_lm_class.__name__}",
        },
        **({"ghost_sublayers": sublayers} if sublayers else {}),
        # What the modeling file builds operators from before their weights are loaded.
        "ghost_operators": [
            {
                "boundary": boundary,
                "linear": operator.weight_CC is not None,
                "norm_linear": operator.norm_weight_CC is not None,
                "norm_eps": operator.norm_eps,
            }
            for span, boundary in operator_positions(variant.spans).items()
            if span in variant.at_boundary
            for operator in [variant.operators[span]]
        ],
        "model_type": f"ghost_{architecture.model_type}",
    }


def _sublayers(architecture: Architecture, variant: Variant) -> list[dict[str, Any]]:
    """Which modules do nothing."""
    kept = kept_layers(variant.spans, architecture.num_layers)
    halves = [(one, architecture.halves[one.layer][one.part]) for one in variant.sublayers]
    return [
        {
            "layer": kept.index(one.layer),
            "part": one.part,
            "module": half.root,
            "outputs": half.outputs,
            "idle": list(half.idle),
        }
        for one, half in halves
    ]
