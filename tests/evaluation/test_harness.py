"""Tasks of lm-evaluation-harness on local data, in a whole run: against our own figures on the same
windows, and against log likelihoods of the exported checkpoint in plain transformers."""

import json
import re
import sys

import numpy as np
import pytest
import torch
import transformers
from local_tasks import bos_windows, write_choices, write_generation, write_rolling

from ghost_dist.errors import ConfigError
from ghost_dist.evaluation.harness import HarnessError, open_tasks
from ghost_dist.pipeline.recover import recover, run_stage_again

pytest.importorskip("lm_eval", reason="the extra harness is not installed")
pytestmark = [pytest.mark.model, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

LENGTH = 64
QUESTIONS = [
    {"question": "def parse_args(self, ", "choices": ["args=None", "raise", "@@@"], "answer": 0},
    {"question": "raise ", "choices": ["ValueError(", "12 12 12", "import"], "answer": 0},
    {"question": "import ", "choices": [")", "os", "((((("], "answer": 1},
    {"question": "for action in ", "choices": ["!!", "self._actions:"], "answer": 1},
]


@pytest.fixture(autouse=True)
def few_files(monkeypatch, tmp_path):
    """datasets looks through the current folder, with an environment of 100,000 files, for data."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def texts(model_folder, text_file):
    """Texts of windows by their number."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    found = bos_windows(text_file, tokenizer, windows=24, window_length=LENGTH)
    assert len(found) >= 4
    return found


@pytest.fixture(scope="module")
def finished(config_at, model_folder, text_file, texts, tmp_path_factory):
    """RUN folder and result of a run with three local tasks."""
    folder, root = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("harness")
    write_rolling(folder, texts.values())
    write_choices(folder, QUESTIONS)
    wanted = continuations(model_folder)  # by the dense model itself
    rows = [{"given": given, "wanted": words} for given, words in wanted.items()]
    write_generation(folder, rows)
    (folder / "_shared.yaml").write_text("metadata: {version: 1}\n")  # included by others, no task
    config = config_at(
        root / "run",
        calibration__window_length=LENGTH,
        calibration__window_bos=True,
        evaluation__corpora={"text": str(text_file)},
        evaluation__windows=24,
        evaluation__window_length=LENGTH,
        evaluation__tasks=[f"{folder}/"],
    )
    return root / "run", recover(config)


def continuations(folder):
    """What the model of a folder says behind each question, in plain transformers."""
    given = {"trust_remote_code": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **given)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given)
    said = {}
    for question in (row["question"] for row in QUESTIONS):
        ids = tokenizer(question, return_tensors="pt")["input_ids"]
        found = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        said[question] = tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    return said


def tasks_begun(run):
    """Variant and task of every one that was begun, in order."""
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [f"{row['variant']} {row['task']}" for row in rows if row["event"] == "task-start"]


def test_perplexity_of_the_harness_is_ours_on_the_same_windows(finished, texts):
    run, result = finished
    record = json.loads((run / "stages" / "evaluate.json").read_text())["outputs"]
    num_bytes = sum(len(text.encode()) for text in texts.values())
    num_words = sum(len(re.split(r"\s+", text)) for text in texts.values())
    for variant in ("dense", "pruned", "recovered"):
        nats = np.array(record["nats_per_window"]["text"][variant])[list(texts)].sum()
        found = result["tasks"]["local_text"][variant]
        values = {name: row["value"] for name, row in found["metrics"].items()}
        assert found["examples"] == len(texts)
        assert values["byte_perplexity"] == pytest.approx(np.exp(nats / num_bytes), rel=1e-6)
        assert values["bits_per_byte"] == pytest.approx(nats / num_bytes / np.log(2), rel=1e-6)
        assert values["word_perplexity"] == pytest.approx(np.exp(nats / num_words), rel=1e-5)
    ours = [record["nats_per_window"]["text"][v] for v in ("dense", "pruned", "recovered")]
    assert len({tuple(row) for row in ours}) == 3


def test_multiple_choice_is_that_of_the_exported_checkpoint(finished):
    run, result = finished
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        run / "checkpoint", trust_remote_code=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        run / "checkpoint", trust_remote_code=True, dtype=torch.float32
    )
    right = 0
    for row in QUESTIONS:
        context = len(tokenizer.encode(row["question"].rstrip()))  # its spaces are the choice's
        scores = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer.encode(row["question"] + choice)])
            with torch.no_grad():
                logits = torch.log_softmax(model(ids).logits[0].double(), -1)
            targets = ids[0, context:, None]
            scores.append(logits[context - 1 : -1].gather(1, targets).sum().item())
        right += int(np.argmax(scores)) == row["answer"]
    found = result["tasks"]["local_choice"]["recovered"]
    assert found["metrics"]["acc"]["value"] == right / len(QUESTIONS)
    assert found["metrics"]["acc"]["better"] == "higher"
    assert found["metrics"]["acc"]["stderr"] >= 0
    assert (found["examples"], found["shots"]) == (len(QUESTIONS), 0)


def test_a_generative_task_compares_what_the_exported_checkpoint_says(finished, model_folder):
    run, result = finished
    dense, recovered = continuations(model_folder), continuations(run / "checkpoint")
    same = sum(recovered[given] == words for given, words in dense.items()) / len(dense)
    found = result["tasks"]["local_said"]
    values = {name: of["metrics"]["exact_match"]["value"] for name, of in found.items()}
    assert (values["dense"], values["recovered"]) == (1, same)
    assert values["pruned"] < 1


def test_results_are_in_page_and_card(finished):
    run, result = finished
    value = result["tasks"]["local_text"]["recovered"]["metrics"]["byte_perplexity"]["value"]
    card = (run / "checkpoint" / "README.md").read_text()
    [row] = [line for line in card.splitlines() if "byte_perplexity" in line]
    assert row.startswith("| local_text | byte_perplexity ↓ |")
    shown = row.split("|")[-2].strip()
    assert float(shown) == pytest.approx(value, rel=1e-3)
    page = (run / "report.html").read_text()
    assert f">{shown}</td>" in page
    assert 'id="tasks-title"' in page


def test_a_stopped_evaluation_goes_on_where_it_was(finished, tmp_path):
    run, result = finished
    before = len(tasks_begun(run))
    run_stage_again(run, "evaluate", [])
    assert not tasks_begun(run)[before:]  # every task of every variant is on record
    (run / "stages" / "tasks-recovered.json").unlink()
    again = run_stage_again(run, "evaluate", [])
    assert tasks_begun(run)[before:] == [
        *("recovered local_choice", "recovered local_said", "recovered local_text"),
    ]
    assert again["tasks"] == result["tasks"]


def test_a_failing_task_is_named_and_what_was_done_is_kept(finished, tmp_path):
    run, result = finished
    first = write_choices(tmp_path, QUESTIONS, "first")
    broken = write_choices(tmp_path, QUESTIONS, "broken", process_results="!missing")
    text = broken.read_text().replace("'!missing'", "!function scoring.fail")
    broken.write_text(text)  # a tag, which PyYAML's dumper would quote
    (tmp_path / "scoring.py").write_text("def fail(doc, results):\n    raise OSError('no luck')\n")
    before = len(tasks_begun(run))
    tasks = f"evaluation.tasks=[{first}, {broken}]"
    with pytest.raises(HarnessError, match=r"Task broken failed.*OSError: no luck"):
        run_stage_again(run, "evaluate", [tasks])
    assert tasks_begun(run)[before:] == ["dense first", "dense broken"]
    before = len(tasks_begun(run))
    again = run_stage_again(run, "evaluate", [f"evaluation.tasks=[{first}]"])
    assert tasks_begun(run)[before:] == ["pruned first", "recovered first"]
    accuracies = [row["acc"] for row in _values(again["tasks"]["first"])]
    assert accuracies == [row["acc"] for row in _values(result["tasks"]["local_choice"])]


def _values(by_variant):
    return [one["metrics"] for one in by_variant.values()]


def test_what_decides_a_result_decides_its_fingerprint(tmp_path):
    def fingerprint(limit=None):
        [task] = open_tasks([str(file)], num_fewshot=None, limit=limit)
        return task.fingerprint

    file = write_choices(tmp_path, QUESTIONS)
    plain = fingerprint()
    assert fingerprint() == plain
    assert fingerprint(limit=2) != plain
    rows = (tmp_path / "local_choice.jsonl").read_text()
    (tmp_path / "local_choice.jsonl").write_text(rows.replace("12 12 12", "13 13 13"))
    changed = fingerprint()
    assert changed != plain
    file.write_text(file.read_text() + "description: 'Answer this.'\n")
    assert fingerprint() not in (plain, changed)


def test_limit_and_fewshot_reach_the_harness(finished, tmp_path):
    run, _ = finished
    file = write_choices(tmp_path, QUESTIONS, "shots", fewshot_split="test")
    again = run_stage_again(
        run,
        "evaluate",
        [
            f"evaluation.tasks=[{file}]",
            "evaluation.limit=3",
            "evaluation.num_fewshot=1",
            "evaluation.corpora={}",
        ],
    )
    assert again["perplexity"] == {}
    for row in again["tasks"]["shots"].values():
        assert (row["examples"], row["shots"]) == (3, 1)


def test_names_that_cannot_be_run_are_refused(tmp_path):
    def refused(*names):
        with pytest.raises(ConfigError) as caught:
            open_tasks(names, num_fewshot=None, limit=None)
        return str(caught.value)

    file = write_choices(tmp_path, QUESTIONS)
    assert "there is no file nowhere.yaml" in refused("nowhere.yaml")
    assert "there is no folder ./nowhere" in refused("./nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no YAML file" in refused(f"{tmp_path}/empty")
    assert "local_choice twice" in refused(str(file), str(file))
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\ntest_split: test\n")
    assert "bad.yaml cannot be opened" in refused(str(tmp_path / "bad.yaml"))
    # With the harness's own names; the tests run with HF_HUB_OFFLINE.
    assert "Did you mean arc_easy?" in refused("arc_esy")
    assert "arc_easy cannot be opened" in refused("paper")
    assert "no network" in refused("copa")


def test_the_extra_is_asked_for_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[harness\]'"):
        open_tasks(["arc_easy"], num_fewshot=None, limit=None)
    assert open_tasks([], num_fewshot=None, limit=None) == ()


def test_streaming_refuses_tasks(make_config):
    with pytest.raises(ConfigError, match=r"evaluation\.tasks runs the whole model"):
        make_config(engine__kind="streaming", evaluation__tasks=["arc_easy"])
