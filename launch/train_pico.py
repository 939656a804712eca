"""Train the pico model, the small language model that the package ships, from nothing.

Its text is the source of Python's standard library. Three steps, each a sub-command:

    prepare  standard library folders -> tokenizer and token files (CPU, about two minutes)
    train    token files -> a checkpoint folder and its loss curve (one GPU, minutes)
    measure  checkpoint folder -> held-out perplexity, n-gram baselines, deleted layers (CPU)

    python launch/train_pico.py prepare --stdlib DIR [DIR ...] --out CORPUS
    python launch/train_pico.py train --corpus CORPUS --family llama --minutes 4 --out MODEL
    python launch/train_pico.py measure --corpus CORPUS --model MODEL --stdlib DIR [DIR ...]

Three sets of modules are kept apart. EVALUATION_MODULES give the reported figures and are looked
at once, by `measure`. VALIDATION_MODULES choose the checkpoint that is kept. Neither is trained
on, and nor is what repeats them: their tests, their C or Python twins, and any file that shares a
run of lines with them. All the rest, the calibration text of the demo included, is trained on.
`--family gemma3` and `--family qwen3` train models of the same size for tests; not shipped.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ghost_dist.assets.stdlib_text import EVALUATION_MODULES, stdlib_text

VALIDATION_MODULES = (
    *("statistics", "ftplib", "fileinput", "graphlib", "csv", "imaplib", "pstats"),
    *("rlcompleter", "sched"),
)

# Folders and files that are data, not text: tables of code points, generated help, build settings.
DATA_FOLDERS = {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
DATA_FILES = {"entities.py", "stringprep.py", "infinite_recursion.py", "_opcode_metadata.py"}
MAX_DIGIT_SHARE = 0.25  # of the characters that are not space: above it a file is a number table

END_OF_TEXT = "<|endoftext|>"  # id 0: separates files in training
VOCABULARY_SIZE = 3072
WINDOW = 1024  # tokens that one training or evaluation window predicts from
VALIDATION_WINDOWS = 64
SPLITS = ("train", "validation")
EVALUATIONS = 25  # evenly spaced over a training run

# Shape legend: B windows of a batch, T tokens of a window, V vocabulary.


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and run one step."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)

    step = steps.add_parser("prepare", help="train the tokenizer and write the token files")
    step.add_argument(
        "--stdlib",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="library folders (lib/python3.12); of each further one only the files "
        "are added whose lines are mostly new",
    )
    step.add_argument("--vocabulary", type=int, default=VOCABULARY_SIZE, help="number of tokens")
    step.add_argument("--out", type=Path, required=True, help="folder for the token files")

    step = steps.add_parser("train", help="train a model on the token files")
    step.add_argument("--corpus", type=Path, required=True, help="the folder that prepare wrote")
    step.add_argument("--family", choices=sorted(FAMILIES), default="llama")
    step.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    length = step.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimizer steps of the whole schedule")
    length.add_argument(
        "--minutes",
        type=float,
        help="the schedule ends after this time, the compilation not counted",
    )
    step.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    step.add_argument("--seed", type=int, default=0)
    step.add_argument("--layers", type=int, help="another depth than the family's")
    step.add_argument("--batch", type=int, default=64, help="windows of one step")
    step.add_argument("--window", type=int, default=WINDOW, help="tokens of a training window")
    step.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    step.add_argument("--weight-decay", type=float, default=0.1)
    step.add_argument(
        "--dropout",
        type=float,
        default=0.1,
        help="on the output of each attention and MLP block, and on the embedding",
    )
    step.add_argument("--no-compile", action="store_true", help="run the layers uncompiled")

    step = steps.add_parser("measure", help="held-out figures of a trained model, as JSON")
    step.add_argument("--corpus", type=Path, required=True, help="the folder that prepare wrote")
    step.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    step.add_argument(
        "--stdlib",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="library folders whose evaluation modules are measured; layers are "
        "deleted on the first",
    )
    step.add_argument("--device", default="cpu")

    arguments = parser.parse_args(argv)
    return {"prepare": prepare, "train": train, "measure": measure}[arguments.step](arguments)


# --- prepare ------------------------------------------------------------------------------------


def prepare(arguments: argparse.Namespace) -> int:
    """Write `tokenizer.json`, `train.npy`, `validation.npy` and `corpus.json` to `out`."""
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    held_out = [
        stdlib_text([name], root=root)
        for root in arguments.stdlib
        for name in (*EVALUATION_MODULES, *VALIDATION_MODULES)
    ]
    texts: list[str] = []
    sources: list[dict[str, Any]] = []
    seen_lines: set[str] = set()
    for root in arguments.stdlib:
        files = list(training_files(root, line_runs(held_out)))
        if seen_lines:
            files = [(name, text) for name, text in files if is_mostly_new(text, seen_lines)]
        for _, text in files:
            seen_lines.update(long_lines(text))
        texts += [text for _, text in files]
        num_bytes = sum(len(text.encode()) for _, text in files)
        sources.append({"stdlib": root.name, "files": len(files), "bytes": num_bytes})
        print(f"{root.name}: {len(files)} files, {num_bytes} bytes", flush=True)

    tokenizer = train_tokenizer(texts, arguments.vocabulary)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    # Validation text of the first folder: the one whose text the model sees most of.
    validation = [stdlib_text(VALIDATION_MODULES, root=arguments.stdlib[0])]
    num_tokens = {}
    for split, documents in (("train", texts), ("validation", validation)):
        ids = [0]
        for encoding in tokenizer.encode_batch(documents, add_special_tokens=False):
            ids += [*encoding.ids, 0]
        np.save(out / f"{split}.npy", np.asarray(ids, dtype=np.uint16))
        num_tokens[split] = len(ids)
    summary = {"sources": sources, "vocabulary": arguments.vocabulary, "tokens": num_tokens}
    (out / "corpus.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))
    return 0


def training_files(root: Path, held_out_runs: set[tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of each file below `root` that may be trained on, in sorted order."""
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if DATA_FOLDERS.intersection(name.parts) or name.name in DATA_FILES or is_held_out(name):
            continue
        if name.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # tests of source encodings
            continue
        if digit_share(text) > MAX_DIGIT_SHARE:
            continue
        if not held_out_runs.isdisjoint(line_runs([text])):
            print(f"left out, repeats held-out lines: {name}")
            continue
        if text.strip():
            yield str(name), text


def is_held_out(name: Path) -> bool:
    """Say whether a part of the path names a held-out module, its tests or its twin.

    `difflib.py`, `test/test_difflib.py`, `_pydifflib.py` and `test/difflib_data.py` all count.
    """
    held_out = {module.split(".")[-1] for module in (*EVALUATION_MODULES, *VALIDATION_MODULES)}
    for part in name.with_suffix("").parts:
        bare = part.removeprefix("test_").removeprefix("_py").strip("_")
        if any(bare == module or bare.startswith(module + "_") for module in held_out):
            return True
    return False


def long_lines(text: str) -> list[str]:
    """Return the lines that say something: stripped, over 12 characters."""
    return [line for line in map(str.strip, text.splitlines()) if len(line) > 12]


def line_runs(texts: Sequence[str], length: int = 4) -> set[tuple[str, ...]]:
    """Return every run of `length` successive long lines of the texts."""
    runs: set[tuple[str, ...]] = set()
    for text in texts:
        lines = long_lines(text)
        runs.update(zip(*(lines[shift:] for shift in range(length)), strict=False))
    return runs


def is_mostly_new(text: str, seen_lines: set[str]) -> bool:
    """Say whether over half of the text's long lines were in no earlier folder."""
    lines = long_lines(text)
    return sum(line not in seen_lines for line in lines) > len(lines) / 2


def digit_share(text: str) -> float:
    """Return the share of digits among the characters that are not space."""
    visible = [character for character in text if not character.isspace()]
    return sum(character.isdigit() for character in visible) / max(1, len(visible))


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE: every byte has a token, so no text is out of its reach."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# --- train --------------------------------------------------------------------------------------


def shape(num_layers: int, vocabulary: int) -> dict[str, Any]:
    """Return the configuration fields that all families share."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": 192,
        "intermediate_size": 448,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }


def llama_config(num_layers: int, vocabulary: int) -> Any:
    """Llama, the shipped family."""
    return transformers.LlamaConfig(**shape(num_layers, vocabulary))


def qwen3_config(num_layers: int, vocabulary: int) -> Any:
    """Qwen3: a norm on each query and key."""
    return transformers.Qwen3Config(**shape(num_layers, vocabulary))


def gemma3_config(num_layers: int, vocabulary: int) -> Any:
    """Gemma 3: scaled embedding, a norm also after each block, two of three layers sliding."""
    layer_types = [
        "full_attention" if layer % 3 == 2 else "sliding_attention" for layer in range(num_layers)
    ]
    return transformers.Gemma3TextConfig(
        **shape(num_layers, vocabulary),
        query_pre_attn_scalar=32,  # the head width, or the attention logits start too small
        sliding_window=256,
        layer_types=layer_types,
    )


# Family: configuration, layers, and the modules whose output is added to the residual stream.
FAMILIES: dict[str, tuple[Callable[[int, int], Any], int, tuple[str, str]]] = {
    "llama": (llama_config, 20, ("self_attn.o_proj", "mlp.down_proj")),
    "qwen3": (qwen3_config, 20, ("self_attn.o_proj", "mlp.down_proj")),
    "gemma3": (gemma3_config, 18, ("post_attention_layernorm", "post_feedforward_layernorm")),
}


def train(arguments: argparse.Namespace) -> int:
    """Train one model; keep the checkpoint with the lowest validation loss in `out`."""
    started = time.perf_counter()
    torch.manual_seed(arguments.seed)
    transformers.utils.logging.disable_progress_bar()
    device = torch.device(arguments.device)
    tokens = {split: load_tokens(arguments.corpus, split, device) for split in SPLITS}
    corpus = json.loads((arguments.corpus / "corpus.json").read_text(encoding="utf-8"))
    model = build_model(arguments, corpus["vocabulary"]).to(device)
    if not arguments.no_compile:
        for layer in model.model.layers:  # one compilation serves all layers of a kind
            layer.compile(dynamic=False)
    loss_of = head_loss if arguments.no_compile else torch.compile(head_loss, dynamic=False)
    optimizer = build_optimizer(model, arguments, device)
    validation = windows_of(tokens["validation"], arguments.window)[:VALIDATION_WINDOWS]
    generator = torch.Generator(device="cpu").manual_seed(arguments.seed)
    batches = batches_of(tokens["train"], arguments.batch, arguments.window, generator)
    run = {
        "arguments": {
            name: value
            for name, value in vars(arguments).items()
            if isinstance(value, int | float | str)
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "versions": versions(device),
        "corpus": corpus,
        "curve": [],
    }
    print(f"{run['parameters']} parameters, {run['versions']}", flush=True)

    # The first steps compile. They train too, at a rate near zero, but are outside the schedule.
    for _ in range(2):
        training_step(model, loss_of, optimizer, next(batches), lr=1e-6)
        mean_loss(model, loss_of, validation)
    synchronize(device)
    run["compile_s"] = round(time.perf_counter() - started, 1)
    print(f"ready after {run['compile_s']} s", flush=True)

    started = time.perf_counter()
    best, step, progress, losses = math.inf, 0, 0.0, []
    while progress < 1.0:
        lr = arguments.lr * learning_rate_share(step, progress)
        losses.append(training_step(model, loss_of, optimizer, next(batches), lr))
        step += 1
        if arguments.steps:
            progress = step / arguments.steps
        else:  # the clock drives the schedule, so it ends in time on any GPU
            progress = (time.perf_counter() - started) / (60 * arguments.minutes)
        if progress * EVALUATIONS < len(run["curve"]) + 1 and progress < 1.0:
            continue
        held_out = mean_loss(model, loss_of, validation)
        num_tokens = step * arguments.batch * arguments.window
        point = {
            "step": step,
            "tokens": num_tokens,
            "epochs": round(num_tokens / len(tokens["train"]), 2),
            "seconds": round(time.perf_counter() - started, 1),
            "lr": round(lr, 6),
            "train_loss": round(torch.stack(losses).mean().item(), 4),
            "validation_loss": round(held_out, 4),
        }
        losses.clear()
        run["curve"].append(point)
        print(" ".join(f"{name}={value}" for name, value in point.items()), flush=True)
        if held_out < best:
            best = held_out
            run["kept_step"] = step
            save(model, arguments.corpus, arguments.out)
        # Beside the folder, not in it: the folder is shipped as it is.
        write_json(arguments.out.with_name(arguments.out.name + ".training.json"), run)
    print(f"kept the checkpoint with validation loss {best:.4f} in {arguments.out}", flush=True)
    return 0


def load_tokens(corpus: Path, split: str, device: torch.device) -> Tensor:
    """Return the token ids of a split, int64 on the device (80 MB for ten million)."""
    return torch.from_numpy(np.load(corpus / f"{split}.npy").astype(np.int64)).to(device)


def build_model(arguments: argparse.Namespace, vocabulary: int) -> Any:
    """Build the family's model with fresh float32 weights and dropout hooks."""
    config_of, num_layers, block_outputs = FAMILIES[arguments.family]
    config = config_of(arguments.layers or num_layers, vocabulary)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    model = model.to(torch.float32).train()
    # The stream sums 2 L block outputs: scaled down, it starts no larger than with one block.
    scale = 1 / math.sqrt(2 * config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.mul_(scale)
    if arguments.dropout:

        def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
            return functional.dropout(output, arguments.dropout, training=module.training)

        model.model.embed_tokens.register_forward_hook(drop)
        for layer in model.model.layers:
            for name in block_outputs:
                layer.get_submodule(name).register_forward_hook(drop)
    return model


def build_optimizer(
    model: Any, arguments: argparse.Namespace, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW; norm gains are not decayed."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": arguments.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda")


def batches_of(
    tokens: Tensor, batch: int, window: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield (B, T + 1) windows for ever; each epoch cuts the text at another phase."""
    offsets = torch.arange(window + 1, device=tokens.device)
    while True:
        phase = int(torch.randint(window, (1,), generator=generator))
        num_windows = (len(tokens) - 1 - phase) // window
        starts = torch.randperm(num_windows, generator=generator) * window + phase
        starts = starts.to(tokens.device)
        for first in range(0, num_windows - batch + 1, batch):
            yield tokens[starts[first : first + batch, None] + offsets]


def windows_of(tokens: Tensor, window: int) -> Tensor:
    """Cut the tokens into (B, T) windows, end to end; the remainder is dropped."""
    num_windows = len(tokens) // window
    return tokens[: num_windows * window].view(num_windows, window)


def learning_rate_share(step: int, progress: float, warm_up_steps: int = 150) -> float:
    """Linear warm-up by steps, then a cosine to 2 % by progress, which runs from 0 to 1."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(1.0, (step + 1) / warm_up_steps) * cosine


def head_loss(stream: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the tied head; stream (B, T, C), targets (B, T)."""
    logits = functional.linear(stream, weight).float()
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def window_loss(model: Any, loss_of: Callable[..., Tensor], windows: Tensor) -> Tensor:
    """Mean loss of predicting each window's tokens from those before."""
    # Autocast needs no loss scaling in bfloat16; the weights stay float32 for the optimizer.
    with torch.autocast(windows.device.type, dtype=torch.bfloat16):
        stream = model.model(windows[:, :-1], use_cache=False).last_hidden_state
        return loss_of(stream, model.lm_head.weight, windows[:, 1:])


def training_step(
    model: Any,
    loss_of: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    windows: Tensor,
    lr: float,
) -> Tensor:
    """Take one optimizer step; the loss stays on the device, so that the host runs ahead."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = window_loss(model, loss_of, windows)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


@torch.no_grad()
def mean_loss(model: Any, loss_of: Callable[..., Tensor], windows: Tensor) -> float:
    """Mean loss over all windows, in batches of 16, without dropout."""
    model.eval()
    # A batch of another size would compile again, so a last, smaller one is left out.
    batches = [batch for batch in torch.split(windows, 16) if len(batch) == min(16, len(windows))]
    losses = [window_loss(model, loss_of, batch) for batch in batches]
    model.train()
    return float(torch.stack(losses).mean())


def save(model: Any, corpus: Path, out: Path) -> None:
    """Write a bfloat16 checkpoint folder with its tokenizer."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    weights.pop("lm_head.weight", None)  # tied to the embedding
    config = copy.deepcopy(model.config)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(config)
    shell.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    shell.save_pretrained(out, state_dict=weights)
    (out / "model.safetensors").chmod(0o644)  # some versions write it for the owner only
    # Written here: what transformers writes by itself names its own version's classes.
    tokenizer_config = {
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,  # decoding gives back the very bytes of the text
        "eos_token": END_OF_TEXT,
        "model_max_length": config.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(out / "tokenizer_config.json", tokenizer_config)
    shutil.copyfile(corpus / "tokenizer.json", out / "tokenizer.json")


def versions(device: torch.device) -> dict[str, str]:
    """Return what the run ran on."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, one item a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


# --- measure ------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> int:
    """Print the held-out figures of a checkpoint as JSON."""
    device = torch.device(arguments.device)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model = model.to(device).eval()
    train_ids = np.load(arguments.corpus / "train.npy").astype(np.int64)
    result: dict[str, Any] = {"versions": versions(device), "evaluation": {}}
    first: Tensor | None = None
    for root in arguments.stdlib:
        text = stdlib_text(EVALUATION_MODULES, root=root)
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids, device=device)
        windows = windows_of(ids, WINDOW)
        first = windows if first is None else first
        nats = math.log(model_perplexity(model, windows))
        result["evaluation"][root.name] = {
            "bytes": len(text.encode()),
            "tokens": len(ids),
            "perplexity": round(math.exp(nats), 4),
            "bits_per_byte": round(nats / math.log(2) * len(ids) / len(text.encode()), 4),
            **n_gram_perplexities(train_ids, windows.cpu().numpy(), len(tokenizer)),
        }
    assert first is not None  # argparse asks for at least one folder
    num_layers = model.config.num_hidden_layers
    quarter = num_layers // 4
    result["deleted"] = {
        f"[{start}, {start + quarter})": round(
            model_perplexity(without_layers(model, start, start + quarter), first), 4
        )
        for start in range(num_layers - quarter + 1)
    }
    prompt = 'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self'
    ids = torch.tensor([tokenizer(prompt).input_ids], device=device)
    torch.manual_seed(0)  # drawn, not greedy: the likeliest token of a model this small repeats
    sample = model.generate(ids, max_new_tokens=120, do_sample=True, temperature=0.7)
    result["sample"] = tokenizer.decode(sample[0])
    print(json.dumps(result, indent=1))
    return 0


@torch.no_grad()
def model_perplexity(model: Any, windows: Tensor) -> float:
    """Perplexity over windows (B, T): each predicts its T - 1 last tokens from those before."""
    nats, num_tokens = 0.0, 0
    for batch in torch.split(windows, 8):
        logits = model(batch, use_cache=False).logits.float()
        targets = batch[:, 1:].flatten()
        nats += float(
            functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
        )
        num_tokens += targets.numel()
    return math.exp(nats / num_tokens)


def without_layers(model: Any, start: int, stop: int) -> Any:
    """Return the model with layers [start, stop) left out, nothing put in their place."""
    weights = model.model.layers
    config = copy.deepcopy(model.config)
    keep = [layer for layer in range(len(weights)) if not start <= layer < stop]
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in keep]
    config.num_hidden_layers = len(keep)
    pruned = type(model)(config).eval().to(model.device)
    pruned.load_state_dict(model.state_dict(), strict=False)
    for new, old in enumerate(keep):
        pruned.model.layers[new].load_state_dict(weights[old].state_dict())
    return pruned


def n_gram_perplexities(train_ids: Any, windows: Any, vocabulary: int) -> dict[str, float]:
    """Perplexity of a unigram and a bigram model of the training tokens, on the same targets.

    Unigram with add-one counts; the bigram is interpolated with it (Witten-Bell), so that a pair
    never seen costs no infinity. A model that learned only token frequencies would equal these.
    """
    unigram = np.bincount(train_ids, minlength=vocabulary) + 1.0
    unigram /= unigram.sum()
    pairs = np.zeros((vocabulary, vocabulary))
    np.add.at(pairs, (train_ids[:-1], train_ids[1:]), 1.0)
    count, kinds = pairs.sum(1), (pairs > 0).sum(1)
    before, target = windows[:, :-1].ravel(), windows[:, 1:].ravel()
    bigram = pairs[before, target] + kinds[before] * unigram[target]
    bigram /= np.maximum(count + kinds, 1)[before]
    return {
        "unigram_perplexity": round(float(np.exp(-np.log(unigram[target]).mean())), 2),
        "bigram_perplexity": round(float(np.exp(-np.log(bigram).mean())), 2),
    }


if __name__ == "__main__":
    sys.exit(main())
