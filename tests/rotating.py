"""A model with layers that are exactly linear: spans with a known, exact operator."""

import shutil

import torch
import transformers


def write_rotating_model(source, folder, layers):
    """A copy of a tiny Llama in which the given layers are exactly orthogonal maps.

    Attention is switched off (o_proj = 0). gate_proj is a constant 30, where SiLU is the identity
    in float32, so the MLP is linear in the normalised stream; all embeddings have one norm, and
    each layer is set to a random rotation, which keeps that norm, so the RMSNorm is linear too.
    """
    config = transformers.LlamaConfig.from_pretrained(source, mlp_bias=True)
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config)
    width = config.hidden_size
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings /= embeddings.square().mean(1, keepdim=True).sqrt()
        for index in layers:
            layer = model.model.layers[index]
            rotation, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.gate_proj.weight.zero_()
            layer.mlp.gate_proj.bias.fill_(30.0)
            layer.mlp.up_proj.weight.zero_()
            layer.mlp.up_proj.weight[:width] = torch.eye(width)
            layer.mlp.up_proj.bias.zero_()
            layer.mlp.down_proj.weight.zero_()
            layer.mlp.down_proj.weight[:, :width] = (rotation - torch.eye(width)) / 30
            layer.mlp.down_proj.bias.zero_()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
