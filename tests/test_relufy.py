"""ReLU-fication and the training loop under it: what is swapped, that a cut-off run ends the same."""

import pytest
import torch
import transformers as tf
from transformers import AutoModelForSequenceClassification

import moefy
import tiny
import words
from moefy.finetune import Schedule, finetune
from moefy.relufy import load_for_task, relufy, with_activation
from moefy.sites import find_sites
from moefy.tasks import TASKS


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "whisper"])
def test_the_swap_changes_the_activation_and_nothing_else(family):
    model, feed = tiny.tiny(family), tiny.inputs(family)
    swapped = with_activation(model)
    assert {site.activation for site in find_sites(swapped)} == {"relu"}
    assert all(torch.equal(v, swapped.state_dict()[k]) for k, v in model.state_dict().items())
    again = type(swapped)(type(swapped.config).from_dict(swapped.config.to_dict())).eval()
    again.load_state_dict(swapped.state_dict())
    assert torch.equal(tiny.output(again, feed), tiny.output(swapped, feed))
    site = find_sites(swapped)[0]
    x = torch.randn(5, site.read().width)
    hidden = site.read().hidden(x)
    assert (hidden == 0).float().mean() > 0.2
    if {s.activation for s in find_sites(model)} == {"relu"}:
        assert torch.equal(tiny.output(model, feed), tiny.output(swapped, feed))


def encoder(path):
    """A bare BERT with its tokenizer, as sentence encoders are published."""
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=tiny.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    tf.BertModel(config).save_pretrained(path)
    words.tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def data(tmp_path):
    rows = [f"{'good' if i % 2 else 'bad'} {'film ' * (i % 5)}\t{i % 2}\n" for i in range(96)]
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    return tmp_path / "train.tsv"


def test_relufy_makes_an_ordinary_checkpoint_that_learned(tmp_path, data):
    trained = relufy(encoder(tmp_path / "dense"), tmp_path / "out", "sst2", data, epochs=6, batch_size=8, rate=2e-3)
    assert trained.done
    assert trained.step == 72
    assert not list(tmp_path.glob(".*"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.hidden_act == "relu"
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert moefy.evaluate_task(model, words.tokenizer(), "sst2", data)["accuracy"] > 0.9
    with pytest.raises(moefy.MoefyError, match="exists already"):
        relufy(tmp_path / "dense", tmp_path / "out", "sst2", data)
    with pytest.raises(moefy.MoefyError, match="mnli has 3 labels"):
        load_for_task(tmp_path / "out", TASKS["mnli"])


def test_a_run_that_was_cut_off_ends_with_the_same_weights(tmp_path, data):
    source, options = encoder(tmp_path / "dense"), {"epochs": 1, "batch_size": 8}
    relufy(source, tmp_path / "whole", "sst2", data, **options)
    for _ in range(40):
        trained = relufy(source, tmp_path / "pieces", "sst2", data, seconds=0.05, **options)
        if trained.done:
            break
        assert (tmp_path / ".pieces.training.safetensors").exists()
        assert not (tmp_path / "pieces").exists()
    whole, pieces = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "pieces")
    )
    assert all(torch.equal(whole[k], pieces[k]) for k in whole)


def test_a_state_of_another_training_or_a_broken_one_is_one_sentence(tmp_path, data):
    model, state = tiny.tiny("bert"), tmp_path / "state.safetensors"
    features = TASKS["sst2"].encode(model, words.tokenizer(), TASKS["sst2"].examples(_rows(data)))
    assert finetune(model, features, 0, Schedule(16, 8), state=state).done
    with pytest.raises(moefy.MoefyError, match="is the state of another training"):
        finetune(model, features, 0, Schedule(16, 4), state=state)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(moefy.MoefyError, match="cannot be read"):
        finetune(model, features, 0, Schedule(16, 8), state=state)
    with pytest.raises(moefy.MoefyError, match="nothing to train on"):
        finetune(model, [], 0, Schedule(16, 8), state=tmp_path / "other")


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path, data):
    model = tiny.tiny("bert")
    model.classifier.weight.data.fill_(float("inf"))
    features = TASKS["sst2"].encode(model, words.tokenizer(), TASKS["sst2"].examples(_rows(data)))
    with pytest.raises(moefy.MoefyError, match="loss is not finite at step 1"):
        finetune(model, features, 0, Schedule(16, 8), state=tmp_path / "state")


def test_a_relative_rate_moves_every_parameter_by_its_own_size(tmp_path, data):
    model = tiny.tiny("bert")
    features = TASKS["sst2"].encode(model, words.tokenizer(), TASKS["sst2"].examples(_rows(data)))[:8]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    schedule = Schedule(8, 8, rate=1e-2, weight_decay=0.0, relative=True)
    finetune(model, features, 0, schedule, state=tmp_path / "state")
    sizes = {name: float(p.square().mean().sqrt()) for name, p in before.items()}
    assert min(sizes.values()) < 0.1 < 0.9 < max(sizes.values())
    for name, p in model.named_parameters():
        # Adam's first step is the rate wherever the gradient is well above its epsilon.
        moved = float((p.detach() - before[name]).abs().max())
        if not name.endswith("key.bias"):  # softmax does not see it
            assert moved == pytest.approx(schedule.rate_at(0) * max(1e-3, sizes[name]), rel=0.05), name


def test_a_language_model_learns_its_targets(tmp_path):
    model, tokenizer = tiny.tiny("t5-v1.0"), words.tokenizer("t5")
    task, pairs = TASKS["t2t"], [("w1", "jump"), ("w2", "jump jump")] * 16
    features = task.encode(model, tokenizer, pairs)
    trained = finetune(model, features, 0, Schedule(640, 8, rate=5e-3), state=tmp_path / "state")
    assert trained.done
    assert task.evaluate(model, tokenizer, pairs[:2]) == {"exact_match": 1.0}


def _rows(path):
    from moefy.tasks.rows import read_rows

    return read_rows(path)
