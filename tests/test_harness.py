"""lm-evaluation-harness drives a converted model with a task file and data on disk."""

import json

import pytest
import torch

import moefy
import tiny
import words
from extras import extra
from moefy.measure import harness

extra("lm_eval")

TASK = """
task: jumping
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"w{i}", "choices": ["w1 w2", "w3"], "answer": i % 2} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "jumping.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    return tmp_path / "tasks"


def test_a_converted_model_runs_a_local_task(tasks, tmp_path):
    model, feed = tiny.tiny("llama"), tiny.inputs("llama")
    moefy.convert(model, "cmoe", [feed])
    tokenizer = words.tokenizer()
    found = harness.run(model, tokenizer, ["jumping"], include=tasks, limit=4)
    right = [_best(model, tokenizer, f"w{i}") == i % 2 for i in range(4)]
    assert found["jumping"]["acc,none"] == sum(right) / 4

    with pytest.raises(moefy.MoefyError, match="knows no task 'unheard'"):
        harness.run(model, words.tokenizer(), ["unheard"], include=tasks)
    with pytest.raises(moefy.MoefyError, match="There is no folder"):
        harness.run(model, words.tokenizer(), ["jumping"], include=tmp_path / "nowhere")


@torch.no_grad()
def _best(model, tokenizer, question):
    """The choice with the highest log-likelihood after the question."""
    found = []
    for choice in ("w1 w2", "w3"):
        start, ids = len(tokenizer(question)["input_ids"]), tokenizer(f"{question} {choice}")["input_ids"]
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(float(logs[i - 1, ids[i]]) for i in range(start, len(ids))))
    return found.index(max(found))


@pytest.mark.parametrize("change", [("{{{{answer}}}}", "{{{{nope}}}}"), ("metric: acc", "metric: unheard_of")])
def test_a_task_file_with_a_mistake_is_a_sentence(change, tasks, tmp_path):
    (tasks / "jumping.yaml").write_text(TASK.replace(*change).format(data=tmp_path / "data.jsonl"))
    with pytest.raises(moefy.MoefyError, match=r"lm-evaluation-harness (cannot run|knows no task)"):
        harness.run(tiny.tiny("llama"), words.tokenizer(), ["jumping"], include=tasks)
