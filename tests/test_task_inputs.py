"""Tasks' model inputs: which ids, how long, and in what batches."""

import json
from types import SimpleNamespace

import pytest
import transformers as tf

import tiny
import words
from moefy.calibrate import positions
from moefy.tasks import TASKS, evaluate_task, task_batches, task_examples
from moefy.tasks.base import by_length, collate, longest_input, padded
from moefy.tasks.pairs import encode_pair
from task_data import SMALL, randomised, write


@pytest.mark.parametrize("task", TASKS)
def test_causal_models_train_on_the_ids_they_are_scored_on(task, data):
    """The whole text's tokens, of which the target's begin with its blank, and the end."""
    model, tokenizer = tiny.tiny("gpt2"), words.byte_level()
    model.config.n_positions = 512
    for feature in TASKS[task].encode(model, tokenizer, task_examples(task, data[task])):
        *ids, end = feature["input_ids"]
        *learned, last = [i for i in feature["labels"] if i != -100]
        assert end == last == tokenizer.eos_token_id
        assert ids == tokenizer(tokenizer.decode(ids))["input_ids"]
        target = tokenizer.decode(learned)
        assert target.startswith(" ")
        source = tokenizer.decode(ids).removesuffix(target)
        assert encode_pair(model, tokenizer, source, target.strip()) == (ids[: -len(learned)], learned)


@pytest.mark.parametrize(
    ("source", "target", "left", "right"),
    [
        ("the film", "positive", ["the", "\u0120film"], ["\u0120positive"]),
        ("the film ", "positive", ["the", "\u0120film"], ["\u0120positive"]),
        ("the film", " positive", ["the", "\u0120film"], ["\u0120positive"]),
        ("the film ", "", ["the", "\u0120film", "\u0120"], []),
        ("", "good", ["<end>"], ["\u0120good"]),
    ],
)
def test_the_blank_belongs_to_the_target(source, target, left, right):
    tokenizer = words.byte_level()
    pair = encode_pair(tiny.tiny("gpt2"), tokenizer, source, target)
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in pair] == [left, right]


def test_special_tokens_are_before_an_input_and_nowhere_else():
    tokenizer = words.tokenizer()
    pair = encode_pair(tiny.tiny("gpt2"), tokenizer, "w1 w2", "w3")
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in pair] == [["[CLS]", "w1", "w2"], ["w3"]]


LONG = {"sst2": {"sentence": "w1 " * 90, "label": 1}, "race": {"article": "w1 " * 90, "question": "w2"}}
LONG["race"] |= {"options": ["w3 " * 90, "w4"], "answer": "A"}
LONG["squad"] = {"question": "w1 " * 90, "context": "w2 " * 90 + "w8", "answers": [{"text": "w8", "answer_start": 270}]}
LONG["t2t"] = {"input": "w1 " * 90, "target": "w2 " * 90}


@pytest.mark.parametrize(
    ("task", "family"),
    [
        *((task, family) for task in LONG for family in ("gpt2", "t5-v1.0", "bart")),
        ("sst2", "RobertaForSequenceClassification"),
        ("sst2", "BertForSequenceClassification"),
        ("squad", "BertForQuestionAnswering"),
        ("squad", "RobertaForQuestionAnswering"),
        ("race", "RobertaForMultipleChoice"),
    ],
)
def test_inputs_longer_than_the_model(task, family, tmp_path):
    model, tokenizer = long_input_model(family)
    path = write(tmp_path / "a.jsonl", json.dumps(LONG[task]))
    assert evaluate_task(model, tokenizer, task, path)
    features = TASKS[task].encode(model, tokenizer, task_examples(task, path))
    batch = collate(features, 0)
    assert batch["input_ids"].shape[-1] <= 64 + 200 * (family == "t5-v1.0")
    if family == "gpt2":  # something of the input is left, whatever the target takes
        assert task in ("race", "t2t") or (batch["labels"] == -100).any()
    model(**{k: v for k, v in batch.items() if family != "bart" or k != "token_type_ids"})
    if task == "squad" and family.startswith("Bert"):
        assert any(f["start_positions"] for f in features)
    batches, _, _ = task_batches(model, tokenizer, task, path, tokens=10_000)  # a long context is several features
    assert sum(len(b["input_ids"]) for b in batches) == len(features)


def long_input_model(family):
    """A model of 64 positions (T5 has none) and its tokenizer."""
    if family.startswith(("Bert", "Roberta")):
        config = tf.BertConfig(**SMALL) if family.startswith("Bert") else tf.RobertaConfig(**SMALL, pad_token_id=1)
        return randomised(getattr(tf, family)(config)), words.tokenizer()
    if family != "bart":
        return randomised(tiny.tiny(family)), words.tokenizer("t5" if family.startswith("t5") else "bert")
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = tf.BartConfig(
        vocab_size=tiny.VOCAB, d_model=tiny.WIDTH, max_position_embeddings=64, **sizes, **heads, **special
    )
    return randomised(tf.BartForConditionalGeneration(config)), words.tokenizer("t5")


def test_the_longest_input_is_what_the_model_holds_and_at_most_2048_tokens():
    tokenizer, model = words.tokenizer(), tiny.tiny("llama")
    assert longest_input(model, tokenizer) == 64
    model.config.max_position_embeddings = 1024
    assert longest_input(model, tokenizer) == 1024
    model.config.max_position_embeddings = 8192
    assert longest_input(model, tokenizer) == 2048
    tokenizer.model_max_length = 700
    assert longest_input(model, tokenizer) == 700
    assert positions(tiny.tiny("roberta")) == 62  # its positions count from the padding's id on


def test_batches_hold_every_example_once_and_few_tokens():
    lengths = [5, 90, 1, 30, 30, 2000, 7]
    batches = list(by_length(lengths, tokens=100))
    assert sorted(i for b in batches for i in b) == list(range(7))
    assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= 100 for b in batches)


def test_padding_on_either_side():
    assert padded([[1, 2], [3]], 0).tolist() == [[1, 2], [3, 0]]
    assert padded([[1, 2], [3]], 0, left=True).tolist() == [[1, 2], [0, 3]]
    batch = collate([{"input_ids": [5, 6], "labels": [1]}, {"input_ids": [7], "labels": [1, 2]}], pad=9)
    assert batch["labels"].tolist() == [[1, -100], [1, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert SimpleNamespace(**batch).input_ids.tolist() == [[5, 6], [7, 9]]
