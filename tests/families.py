"""Tiny random models of every family that is tested, saved as checkpoints.

Six layers, hidden size 64, vocabulary 128. Weights are drawn from N(0, 0.08^2), norms from
N(1, 0.08^2), so that no layer is close to the identity and a wrong wiring shows in the logits.
"""

import contextlib
import string

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from ghost_dist.checkpoint.repair import Repair
from ghost_dist.spans import Span, parse_sublayers

NUM_LAYERS = 6
HIDDEN = 64
VOCAB = 128

_COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 96}
_HEAD = {"head_dim": 16}
_MOE = {"num_experts_per_tok": 2}


def _config(name, **fields):
    return lambda: getattr(transformers, name)(**fields)


FAMILIES = {
    "llama": _config("LlamaConfig", **_GQA),
    "mistral": _config("MistralConfig", **_GQA, **_HEAD, sliding_window=8),
    "qwen2": _config(
        "Qwen2Config", **_GQA, use_sliding_window=True, sliding_window=8, max_window_layers=3
    ),
    "qwen3": _config("Qwen3Config", **_GQA, **_HEAD, tie_word_embeddings=True),
    "gemma2": _config("Gemma2Config", **_GQA, **_HEAD, sliding_window=8, query_pre_attn_scalar=16),
    "gemma3": _config(
        "Gemma3TextConfig",
        **_GQA,
        **_HEAD,
        sliding_window=8,
        sliding_window_pattern=3,
        query_pre_attn_scalar=16,
    ),
    "phi3": _config("Phi3Config", **_GQA, sliding_window=8),
    "olmo2": _config("Olmo2Config", **_GQA),
    "gpt_neox": _config("GPTNeoXConfig", **_COMMON, intermediate_size=96),
    "mixtral": _config("MixtralConfig", **_GQA, **_MOE, num_local_experts=4, sliding_window=None),
    "qwen3_moe": _config(
        "Qwen3MoeConfig",
        **_GQA,
        **_HEAD,
        **_MOE,
        num_experts=4,
        moe_intermediate_size=32,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ),
    "gpt_oss": _config(
        "GptOssConfig", **_GQA, **_HEAD, **_MOE, num_local_experts=4, sliding_window=8
    ),
    "opt": _config(
        "OPTConfig", **_COMMON, ffn_dim=96, word_embed_proj_dim=HIDDEN, do_layer_norm_before=True
    ),
    "gpt2": _config(
        "GPT2Config",
        n_embd=HIDDEN,
        n_layer=NUM_LAYERS,
        n_head=4,
        n_positions=128,
        vocab_size=VOCAB,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "smollm3": _config("SmolLM3Config", **_GQA, no_rope_layer_interval=3, use_sliding_window=False),
    "bamba": _config(  # attention and state-space layers by turns; its configuration holds Infinity
        "BambaConfig",
        **_GQA,
        attn_layer_indices=[0, 5],
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_n_groups=1,
        mamba_d_state=8,
    ),
    "falcon_h1": _config(  # the model class fills buffers of its layers
        "FalconH1Config",
        **_GQA,
        **_HEAD,
        mamba_d_ssm=128,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=8,
    ),
    "deepseek_v3": _config(
        "DeepseekV3Config",
        **{**_GQA, "num_key_value_heads": 4},
        **_MOE,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
}
"""Name to a function that makes the configuration."""

CUTS = {
    "middle": (Span(2, 4),),
    "two": (Span(1, 2), Span(3, 5)),
    "first": (Span(0, 2),),
    "second": (Span(1, 4),),
    "last": (Span(2, 3), Span(4, 6)),
}
"""Spans at every kind of place; odd and even shifts of the layers behind them."""


HALVES = {
    "attention": ((), parse_sublayers("attention:0,attention:3,attention:5")),
    "mlp": ((), parse_sublayers("mlp:0,mlp:2,mlp:5")),
    "mixed": ((Span(2, 4),), parse_sublayers("attention:0,mlp:1,mlp:4,attention:5")),
}
"""Spans, and attentions and MLPs of layers that stay, at the start, in the middle, at the end."""

HALVED = ("llama", "gemma3", "gpt_neox", "mixtral", "gpt_oss", "opt", "deepseek_v3")
"""Families that these are tried with in the suite; all: ``tests/benchmarks/families.py``."""

_ROOTS = {
    "attention": ("self_attn", "attention", "attn", "mamba"),
    "mlp": ("mlp", "feed_forward", "fc2"),
}


def random_model(family, dtype=torch.float32, seed=0):
    """A causal LM with random weights, in evaluation mode."""
    config = FAMILIES[family]()
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.08
            is_scale = parameter.ndim == 1 and "norm" in name and name.endswith("weight")
            centre = 1.0 if is_scale and "gemma" not in family else 0.0
            parameter.copy_(centre + noise)
    return model.to(dtype)


def save_checkpoint(family, folder, dtype=torch.float32, max_shard_size="60KB"):
    """Save a random model as a sharded checkpoint; returns the folder."""
    random_model(family, dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


TEXT = (string.printable[:94] + " the quick brown fox jumps over the lazy dog. ") * 60


def save_tokenizer(folder):
    """One token a character, ids 3 and up."""
    characters = {character: 3 + i for i, character in enumerate(string.printable[:95])}
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **characters}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def random_tokens(rows=2, length=24, seed=0):
    """int64 tokens of shape (rows, length), special tokens left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


def random_operators(spans, dtype=torch.float32):
    """One non-symmetric W (C, C) per span, far from the identity."""
    operators = {}
    for span in spans:
        draw = _normal(100 + span.start)
        operators[span] = Repair((torch.eye(HIDDEN) + draw(HIDDEN, HIDDEN) / 8).to(dtype))
    return operators


REPAIR_KINDS = ("ghost-joint", "fold", "stream+norm")


def random_repairs(kind, spans, architecture, dtype=torch.float32):
    """Repairs of another form; a span whose down_proj cannot be refitted has a plain W."""
    repairs = {}
    for span in spans:
        draw = _normal(200 + span.start)
        weight_CC = (torch.eye(HIDDEN) + draw(HIDDEN, HIDDEN) / 8).to(dtype)
        size = architecture.inner_sizes.get(span.start - 1)
        if kind in ("ghost-joint", "fold") and size is not None:
            down_FC = (draw(size, HIDDEN) / 12).to(dtype)
            repairs[span] = Repair(None if kind == "fold" else weight_CC, down_FC=down_FC)
        elif kind in ("stream+norm", "norm-linear"):
            normed_CC = (draw(HIDDEN, HIDDEN) / 8).to(dtype)
            kept_CC = weight_CC if kind == "stream+norm" else None
            repairs[span] = Repair(kept_CC, normed_CC, norm_eps=1e-5)
        else:
            repairs[span] = Repair(weight_CC)
    return repairs


def _normal(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


@contextlib.contextmanager
def oracle(model, layers, spans, operators, sublayers=()):
    """Let an uncut model compute as the recovered one, by none of the code under test.

    Every removed layer is told to give back its input, the first of a span to give what the
    operator makes of it; a replaced down_proj is told its new product, a removed half zero.
    """
    replaced = {s.start - 1: one.down_FC for s, one in operators.items()}
    stack = model.get_submodule(layers)
    handles = []
    for span in spans:
        for index in range(span.start, span.stop):

            def skip(_, args, kwargs, output, index=index, span=span):
                x = args[0] if args else kwargs["hidden_states"]
                if span in operators and index == span.start:
                    x = _repaired(operators[span], x)
                return (x, *output[1:]) if isinstance(output, tuple) else x

            handles.append(stack[index].register_forward_hook(skip, with_kwargs=True))
    for layer, down_FC in replaced.items():
        if down_FC is not None:

            def product(module, args, output, down_FC=down_FC):
                new = args[0] @ down_FC.to(output.dtype)
                return new if module.bias is None else new + module.bias

            handles.append(_down(stack[layer]).register_forward_hook(product))
    for sublayer in sublayers:
        children = dict(stack[sublayer.layer].named_children())
        root = next(children[name] for name in _ROOTS[sublayer.part] if name in children)
        handles.append(root.register_forward_hook(_zeroed))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zeroed(module, args, output):
    return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0


@torch.inference_mode()
def oracle_logits(model, layers, spans, operators, tokens, sublayers=()):
    """Logits of the recovered model; see :func:`oracle`."""
    with oracle(model, layers, spans, operators, sublayers):
        return torch.cat([model(row[None], use_cache=False).logits for row in tokens])


def _down(layer):
    for path in ("mlp.down_proj", "mlp.dense_4h_to_h", "fc2", "feed_forward.down_proj"):
        try:
            return layer.get_submodule(path)
        except AttributeError:
            continue
    raise AssertionError("no down_proj")


def _repaired(repair, x):
    y = x if repair.weight_CC is None else x @ repair.weight_CC.to(x.dtype)
    if repair.norm_weight_CC is not None:
        normed = x / (x.square().mean(-1, keepdim=True) + repair.norm_eps).sqrt()
        y = y + normed @ repair.norm_weight_CC.to(x.dtype)
    return y


def rounding(logits, num_layers=NUM_LAYERS, factor=16):
    """Difference that other summation orders may cause: one rounding per layer, in quadrature."""
    eps = torch.finfo(logits.dtype).eps
    return factor * num_layers**0.5 * eps * float(logits.abs().max())
