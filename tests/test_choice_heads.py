"""Multiple-choice heads: scored, calibrated on, studied and trained, with any number of answers to a question."""

import json

import pytest
import torch
import transformers as tf

import moefy
import words
from moefy.sources.models import load_source
from moefy.study import study
from moefy.tasks import TASKS, evaluate_task, task_batches, task_calibration
from moefy.tuning.relufy import relufy
from task_data import SMALL, randomised, write


@pytest.fixture
def model():
    return randomised(tf.BertForMultipleChoice(tf.BertConfig(**SMALL)))


def questions(path, count, answers=lambda i: 2 + i % 3):
    """ARC's form: questions with two to four answers, of which the good one is right."""
    rows = []
    for i in range(count):
        texts = [f"bad w{(i + k) % 5}" for k in range(answers(i))]
        texts[i % len(texts)] = f"good w{i % 5}"
        rows.append({"question": f"w{i % 7} film", "choices": texts, "answer": i % len(texts)})
    return write(path, "\n".join(map(json.dumps, rows)))


def test_the_head_is_fed_token_types(model, tmp_path):
    """A head that differs by the token types alone: PIQA's pairs, one example at a time by transformers."""
    tokenizer = words.tokenizer()
    rows = [{"goal": f"w{i}", "sol1": f"w{i + 1} w{i + 2}", "sol2": f"w{i + 3}", "label": i % 2} for i in range(40)]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    right = {True: 0, False: 0}
    for row in rows:
        feed = tokenizer(
            [f"Question: {row['goal']}\nAnswer:"] * 2, [row["sol1"], row["sol2"]], padding=True, return_tensors="pt"
        )
        for typed in right:
            logits = model(**{k: v[None] for k, v in feed.items() if typed or k != "token_type_ids"}).logits
            right[typed] += int(logits.argmax()) == row["label"]
    assert right[True] != right[False]
    assert evaluate_task(model, tokenizer, "piqa", path) == {"accuracy": right[True] / 40}
    batches = task_calibration(model, tokenizer, "piqa", path, tokens=200)
    assert sum(int(b["attention_mask"].sum()) for b in batches) == pytest.approx(200, rel=0.15)
    assert all(b["token_type_ids"].any(-1).all() for b in batches)


def test_the_default_recipe_converts_it(model, tmp_path):
    """Its sensitivity needs the head's own logits, (questions, answers)."""
    tokenizer, path = words.tokenizer(), questions(tmp_path / "a.jsonl", 60)
    batches = task_calibration(model, tokenizer, "arc", path, tokens=400, batch_tokens=128)
    assert {b["input_ids"].shape[1] for b in batches} == {2, 3, 4}
    before = [model(**b).logits for b in batches]
    assert all(b["input_ids"].numel() <= 128 for b in batches)
    report = moefy.convert(model, moefy.Recipe.of("reconstructed", budget=0.6), batches)
    assert 0 < report.active_fraction <= 0.6
    assert report.calibration.tokens == sum(int(b["attention_mask"].sum()) for b in batches)
    after = [model(**b).logits for b in batches]
    assert all(a.shape == b.shape and not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_all_experts_active_equals_dense(model, tmp_path):
    batches = task_calibration(model, words.tokenizer(), "arc", questions(tmp_path / "a.jsonl", 60), tokens=300)
    before = [model(**b).logits for b in batches]
    moefy.convert(
        model, moefy.Recipe(construction="weights", router="mlp", expert_size=8, shared=0, active=1.0), batches
    )
    for batch, logits in zip(batches, before, strict=True):
        torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-5, atol=1e-5)


def test_the_study_tells_right_answers_from_wrong_ones(model, tmp_path):
    tokenizer, path = words.tokenizer(), questions(tmp_path / "a.jsonl", 90)
    batches, marks, names = task_batches(model, tokenizer, "arc", path, tokens=900)
    assert names == ("wrong answer", "right answer")
    for batch, mark in zip(batches, marks, strict=True):
        count, answers, _ = batch["input_ids"].shape
        assert mark.shape == (count * answers,)
        assert mark.view(count, answers).sum(1).tolist() == [1] * count
        good = tokenizer.convert_tokens_to_ids("good")
        assert torch.equal(mark.bool(), (batch["input_ids"] == good).any(-1).flatten())
    moefy.convert(
        model, moefy.Recipe(construction="weights", router="mlp", expert_size=8, shared=0, active=0.5), batches
    )
    found = study(model, tokenizer, batches, marks, names)
    assert found["sequences"] == {"tokens": sum(map(len, marks))}
    assert found["tokens"] == {"tokens": sum(int(b["attention_mask"].sum()) for b in batches)}
    assert "label" in next(iter(found["layers"].values()))["preferences"]


def test_relufy_gives_a_bare_encoder_this_head_and_it_learns(tmp_path):
    torch.manual_seed(0)
    tf.BertModel(tf.BertConfig(**SMALL)).save_pretrained(tmp_path / "dense")
    words.tokenizer().save_pretrained(tmp_path / "dense")
    path = questions(tmp_path / "a.jsonl", 120)
    options = {"epochs": 12, "batch_size": 8, "rate": 2e-3}
    while not relufy(tmp_path / "dense", tmp_path / "out", "arc", path, **options, seconds=2).done:
        pass  # it goes on where it was cut off
    made, tokenizer = load_source(tmp_path / "out")
    assert type(made).__name__ == "BertForMultipleChoice"
    assert made.config.hidden_act == "relu"
    assert evaluate_task(made, tokenizer, "arc", path)["accuracy"] > 0.9


def test_a_passage_is_cut_and_not_its_question(model):
    tokenizer = words.tokenizer()
    row = {"article": "w1 " * 200, "question": "film w2", "options": ["w3", "good"], "answer": "A"}
    (feature,) = TASKS["race"].encode(model, tokenizer, TASKS["race"].examples([row]))
    film, good = tokenizer.convert_tokens_to_ids(["film", "good"])
    assert all(len(ids) == 64 and film in ids for ids in feature["input_ids"])
    assert [good in ids for ids in feature["input_ids"]] == [False, True]
    assert tokenizer.truncation_side == "right"
