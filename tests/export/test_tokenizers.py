"""Tokenizers of exported folders: the same ids as the original's, whichever way it got its class.

transformers goes by the model type first, and does not know that of an export. A class that is
only named in ``tokenizer_config.json`` would often build another pipeline from the same files.
"""

import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from families import CUTS, random_operators
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from ghost_dist.checkpoint.load import load_tokenizer
from ghost_dist.checkpoint.reader import open_checkpoint
from ghost_dist.checkpoint.variant import Variant
from ghost_dist.errors import ExportError
from ghost_dist.export.rewrite import export_checkpoint
from ghost_dist.export.verify import reload, verify_tokenizer

CPU = torch.device("cpu")
SPANS = CUTS["middle"]
TEXTS = ["12 cats", "  two blanks", "a<s>b <|im|> c</s>", "1234 naïve 漢\n\n\tend  "]
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
OWN_CODE = """
from transformers import PreTrainedTokenizerFast
from .own_rules import RULES

class OwnTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, **arguments):
        for before, after in RULES.items():
            text = text.replace(before, after)
        return super().__call__(text, **arguments)
"""


def write_tokenizer(folder, **content):
    """Byte-level; every digit by itself, though a token "12" could be merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number + 4 for number, token in enumerate(alphabet)}
    vocabulary |= {"<pad>": 0, "<s>": 1, "</s>": 2, "12": 3, "<|im|>": 300}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("1", "2")]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<|im|>"]}
    content = {**special, "chat_template": TEMPLATE, **content}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def write_python_tokenizer(folder):
    """One of those that are not built on the tokenizers library."""
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz0123456789"})
    words = ["<unk>", *letters, *(f"{letter}@@" for letter in letters), "ca@@", "cat"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    content = {"tokenizer_class": "CTRLTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def write_own_tokenizer(folder):
    """A class of its own, in a file that imports another."""
    classes = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    write_tokenizer(folder, tokenizer_class="OwnTokenizer", auto_map=classes)
    (folder / "tokenization_own.py").write_text(OWN_CODE)
    (folder / "own_rules.py").write_text('RULES = {"cats": "dogs"}\n')
    (folder / "modeling_other.py").write_text("raise SystemExit('this ran')\n")


KINDS = {
    "named-by-mistake": ("olmo2", lambda f: write_tokenizer(f, tokenizer_class="GPT2Tokenizer")),
    "llama-by-mistake": ("mistral", lambda f: write_tokenizer(f, tokenizer_class="LlamaTokenizer")),
    "known-mistake": ("phi3", lambda f: write_tokenizer(f, tokenizer_class="LlamaTokenizer")),
    "of-the-family": ("qwen2", lambda f: write_tokenizer(f, tokenizer_class="GPT2Tokenizer")),
    "of-the-library": (
        "llama",
        lambda f: write_tokenizer(f, tokenizer_class="PreTrainedTokenizerFast"),
    ),
    "unnamed": ("mixtral", write_tokenizer),
    "python": ("llama", write_python_tokenizer),
    "own-code": ("llama", write_own_tokenizer),
}


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """Kind to the original, its tokenizer and the folder of the export."""
    root, made = tmp_path_factory.mktemp("tokenizers"), {}
    for kind, (family, write) in KINDS.items():
        source, architecture = checkpoint(family)
        folder = shutil.copytree(source.path, root / f"{kind}-original")
        for file in (*folder.glob("*token*"), *folder.glob("vocab.json")):
            file.unlink()
        write(folder)
        source = open_checkpoint(folder)
        tokenizer = load_tokenizer(folder, trust_remote_code=True)
        out = root / kind
        operators = random_operators(SPANS)
        export_checkpoint(source, architecture, Variant(SPANS, operators), out, tokenizer=tokenizer)
        made[kind] = (source, architecture, tokenizer, out)
    return made


@pytest.fixture(scope="module")
def ids_of_a_user(exported, forked, tmp_path_factory):
    """Kind to what a fresh process that has only transformers makes of the texts and of a chat."""
    script = """
import json, sys, transformers
result = {}
for kind, folder, trust in json.loads(sys.argv[1]):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    texts = json.loads(sys.argv[2])
    found = [tokenizer(text)["input_ids"] for text in texts]
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": " 12 cats "}]
        found.append(tokenizer.apply_chat_template(chat, tokenize=False))
    result[f"{kind}-{trust}"] = found
print(json.dumps(result))
"""
    jobs = [
        (kind, str(out), trust)
        for kind, (_, _, _, out) in exported.items()
        for trust in (True, False)
        if trust or kind != "own-code"
    ]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    done = subprocess.run(
        [forked.program, "-c", script, json.dumps(jobs), json.dumps(TEXTS)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        cwd=tmp_path_factory.mktemp("elsewhere"),
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "trust"), [(k, t) for k in KINDS for t in (True, False) if t or k != "own-code"]
)
def test_same_ids(exported, ids_of_a_user, kind, trust):
    _, _, tokenizer, _ = exported[kind]
    expected = [tokenizer(text)["input_ids"] for text in TEXTS]
    if tokenizer.chat_template:
        expected.append("<s>user\n12 cats</s>")
    assert ids_of_a_user[f"{kind}-{trust}"] == expected


def test_the_originals_are_what_they_should_be(exported):
    """Or the test above would compare nothing: 3 is the token that no digit may be merged into."""
    tokenizers = {kind: tokenizer for kind, (_, _, tokenizer, _) in exported.items()}
    for kind in ("named-by-mistake", "llama-by-mistake", "known-mistake", "unnamed"):
        assert 3 not in tokenizers[kind]("12 cats")["input_ids"], kind
    assert type(tokenizers["of-the-family"]).__name__ == "Qwen2Tokenizer"
    assert type(tokenizers["python"]).__name__ == "CTRLTokenizer"
    own = tokenizers["own-code"]
    assert own("cats")["input_ids"] == own("dogs")["input_ids"]


def test_only_code_of_the_tokenizer_goes_along(exported):
    names = {file.name for file in exported["own-code"][3].glob("*.py")}
    assert names == {"modeling_ghost_llama.py", "tokenization_own.py", "own_rules.py"}


def test_code_that_was_not_run_is_not_asked_for(exported, checkpoint, tmp_path):
    """The class of transformers was taken, so the export must not name one that is not there."""
    source, architecture = checkpoint("qwen2")
    folder = shutil.copytree(source.path, tmp_path / "original")
    write_tokenizer(
        folder,
        tokenizer_class="Qwen2Tokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_x.X"]},
    )
    tokenizer = load_tokenizer(folder)
    for operators in (random_operators(SPANS), {}):
        out = tmp_path / f"out-{len(operators)}"
        source = open_checkpoint(folder)
        export_checkpoint(source, architecture, Variant(SPANS, operators), out, tokenizer=tokenizer)
        again = load_tokenizer(out, trust_remote_code=True)
        assert again("12 cats")["input_ids"] == tokenizer("12 cats")["input_ids"]


def test_verify_runs_code_that_the_run_trusted(exported):
    verify_tokenizer(exported["own-code"][3], exported["own-code"][2])


def test_verify_finds_other_ids(exported, tmp_path):
    _, _, tokenizer, out = exported["named-by-mistake"]
    broken = shutil.copytree(out, tmp_path / "broken")
    config = json.loads((broken / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "GPT2Tokenizer"
    (broken / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = np.ones((1, 4), dtype=np.int64)
    message = r"tokenises '12 cats.*' as \[3, .*the original '12 cats.*' as \[\d+, \d+,.*Tokenizers"
    with pytest.raises(ExportError, match=message):
        reload(broken, tokens, tokenizer=tokenizer, dtype=torch.float32, device=CPU)


def test_verify_finds_another_chat_template(exported, tmp_path):
    _, _, tokenizer, out = exported["unnamed"]
    broken = shutil.copytree(out, tmp_path / "broken")
    config = json.loads((broken / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE.replace(" | trim", "")
    (broken / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"user\\n 12 cats .* the original .*user\\n12 cats"):
        verify_tokenizer(broken, tokenizer)
