"""ReLU-fication and the training loop under it: what is swapped, that a cut-off run ends the same."""

import errno
import os
import signal

import pytest
import torch
import transformers as tf
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification

import moefy
import moefy.tuning.finetune
import tiny
import words
from moefy.sites import find_sites
from moefy.tasks import TASKS
from moefy.tuning.finetune import Schedule, finetune
from moefy.tuning.relufy import load_for_task, relufy, with_relu


@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f != "whisper"])
def test_the_swap_changes_the_activation_and_nothing_else(family):
    model, feed = tiny.tiny(family), tiny.inputs(family)
    swapped = with_relu(model)
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


def test_a_home_is_a_place_for_a_model_without_the_head(tmp_path, monkeypatch):
    encoder(tmp_path / "bert")
    monkeypatch.setenv("HOME", str(tmp_path))
    made, _ = load_for_task("~/bert", TASKS["sst2"])
    assert type(made).__name__ == "BertForSequenceClassification"


def test_a_run_that_was_cut_off_ends_with_the_same_weights(tmp_path, data):
    source, options = encoder(tmp_path / "dense"), {"epochs": 1, "batch_size": 8}
    relufy(source, tmp_path / "whole", "sst2", data, **options)
    for _ in range(40):
        trained = relufy(source, tmp_path / "pieces", "sst2", data, seconds=0.05, **options)
        if trained.done:
            break
        assert (tmp_path / ".pieces.training.safetensors").exists()
        assert not (tmp_path / "pieces").exists()
    assert same_weights(tmp_path / "whole", tmp_path / "pieces")


def test_a_run_that_was_cut_off_while_it_saved_ends_with_the_same_files(tmp_path, data, monkeypatch):
    source, options = encoder(tmp_path / "dense"), {"epochs": 1, "batch_size": 8}
    relufy(source, tmp_path / "whole", "sst2", data, **options)

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("moefy.tuning.relufy.save_dense", stopped)
        with pytest.raises(KeyboardInterrupt):
            relufy(source, tmp_path / "pieces", "sst2", data, **options)
    relufy(source, tmp_path / "pieces", "sst2", data, **options)
    files = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "pieces").iterdir())
    assert all((tmp_path / "whole" / f).read_bytes() == (tmp_path / "pieces" / f).read_bytes() for f in files)


def same_weights(*paths):
    first, second = (AutoModelForSequenceClassification.from_pretrained(path).state_dict() for path in paths)
    return all(torch.equal(first[k], second[k]) for k in first)


def test_ctrl_c_keeps_what_was_done(tmp_path, data, monkeypatch):
    source, options = encoder(tmp_path / "dense"), {"epochs": 1, "batch_size": 8}
    relufy(source, tmp_path / "whole", "sst2", data, **options)

    def stop_at(step):
        def progress(done, total):
            if done == step:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        relufy(source, tmp_path / "pieces", "sst2", data, progress=stop_at(3), **options)
    seen, step = [], torch.optim.AdamW.step

    def interrupted(self, *args, **kwargs):
        if len(seen) == 4:
            signal.raise_signal(signal.SIGHUP)  # in the middle of a step, which is done to its end
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        signal.signal(signal.SIGHUP, signal.default_int_handler)  # as in a command
        with pytest.raises(KeyboardInterrupt):
            relufy(source, tmp_path / "pieces", "sst2", data, progress=lambda done, _: seen.append(done), **options)
    assert seen == [4, 5, 6, 7]
    last = []
    relufy(source, tmp_path / "pieces", "sst2", data, progress=lambda done, _: last.append(done), **options)
    assert last == [9, 10, 11, 12]
    assert same_weights(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs must be above 0"),
        ({"epochs": float("nan")}, "epochs must be above 0"),
        ({"epochs": float("inf")}, "epochs must be above 0"),
        ({"epochs": 1e308}, "epochs must be above 0"),
        ({"rate": -1e-4}, "rate must be above 0"),
        ({"rate": float("nan")}, "rate must be above 0"),
        ({"seconds": 0}, "seconds must be above 0"),
        ({"seconds": -3}, "seconds must be above 0"),
        ({"batch_size": 0}, "batch size must be above 0"),
        ({"examples": 0}, "examples must be above 0"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_read(tmp_path, wrong, message):
    with pytest.raises(moefy.MoefyError, match=message):
        relufy(tmp_path / "no-model", tmp_path / "out", "sst2", tmp_path / "no-data", **wrong)
    assert not list(tmp_path.iterdir())


def test_converted_models_are_refused(tmp_path, data):
    model = tiny.tiny("bert")
    recipe = {"construction": "weights", "router": "similarity", "expert_size": 8, "shared": 0, "active": 2}
    moefy.convert(model, recipe, [tiny.inputs("bert", batch=24)])
    moefy.save(model, tmp_path / "moe", words.tokenizer())
    with pytest.raises(moefy.MoefyError, match="converted already"):
        relufy(tmp_path / "moe", tmp_path / "out", "sst2", data)


def test_a_failed_overwrite_keeps_the_old_model_and_goes_on(tmp_path, data, monkeypatch):
    source, out, options = encoder(tmp_path / "dense"), tmp_path / "out", {"epochs": 1, "overwrite": True}
    relufy(source, out, "sst2", data, batch_size=16)
    old = (out / "model.safetensors").read_bytes()

    def full(self, folder, **kwargs):
        (folder / "half.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(tf.BertForSequenceClassification, "save_pretrained", full)
        with pytest.raises(moefy.MoefyError, match="disk is full"):
            relufy(source, out, "sst2", data, **options)
    assert (out / "model.safetensors").read_bytes() == old
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".out.training.safetensors"]
    rename = type(out).rename

    def cut_off(self, target):
        if target == out:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(out), "rename", cut_off)
        with pytest.raises(KeyboardInterrupt):
            relufy(source, out, "sst2", data, **options)
    with pytest.raises(moefy.MoefyError, match="exists already"):  # the old one is back in its place
        relufy(source, out, "sst2", data, epochs=1)
    assert (out / "model.safetensors").read_bytes() == old
    trained = relufy(source, out, "sst2", data, **options)
    assert trained.done
    assert trained.loss is None  # all steps came from the state
    assert (out / "model.safetensors").read_bytes() != old
    assert not list(tmp_path.glob(".*"))


def test_a_state_of_another_training_or_a_broken_one_is_one_sentence(tmp_path, data):
    model, state = tiny.tiny("bert"), tmp_path / "state.safetensors"
    features = TASKS["sst2"].encode(model, words.tokenizer(), TASKS["sst2"].examples(_rows(data)))
    assert finetune(model, features, 0, Schedule(16, 8), state=state).done
    relabelled = [{**feature, "labels": 1 - feature["labels"]} for feature in features]
    for other in (
        (tiny.tiny("bert"), features, Schedule(16, 4)),
        (tiny.tiny("bert", seed=1), features, Schedule(16, 8)),
        (tiny.tiny("bert"), relabelled, Schedule(16, 8)),
        (tiny.tiny("bert"), features[::-1], Schedule(16, 8)),
    ):
        with pytest.raises(moefy.MoefyError, match="is the state of another training"):
            finetune(other[0], other[1], 0, other[2], state=state)
    assert finetune(tiny.tiny("bert"), features, 0, Schedule(16, 8), state=state).loss is None
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


def test_weights_that_are_not_finite_after_the_last_step_are_not_kept(tmp_path, data, monkeypatch):
    model = tiny.tiny("bert")
    features = TASKS["sst2"].encode(model, words.tokenizer(), TASKS["sst2"].examples(_rows(data)))
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: model.classifier.weight.data.fill_(float("nan")))
    with pytest.raises(moefy.MoefyError, match="not finite after step 1"):
        finetune(model, features, 0, Schedule(8, 8), state=tmp_path / "state")
    assert not list(tmp_path.glob("*state*"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("No space left")])
def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path, data, monkeypatch, error):
    model, state = tiny.tiny("bert"), tmp_path / "state"
    features = TASKS["sst2"].encode(model, words.tokenizer(), TASKS["sst2"].examples(_rows(data)))
    with pytest.raises(KeyboardInterrupt):
        finetune(model, features, 0, Schedule(16, 8), state=state, progress=_stop)
    before = state.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(moefy.tuning.finetune, "save_file", full)
    with pytest.raises(moefy.MoefyError, match=r"No space left.*the one before it is kept"):
        finetune(tiny.tiny("bert"), features, 0, Schedule(16, 8), state=state)
    assert state.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "train.tsv"]


@pytest.mark.parametrize("name", ["x" * 250, "file/state"])
def test_a_state_that_cannot_be_written_is_said_before_the_training(name, tmp_path, data):
    (tmp_path / "file").write_text("in the way")
    model = tiny.tiny("bert")
    features = TASKS["sst2"].encode(model, words.tokenizer(), TASKS["sst2"].examples(_rows(data)))
    with pytest.raises(moefy.MoefyError, match=r"The training state .* cannot be written"):
        finetune(model, features, 0, Schedule(16, 8), state=tmp_path / name, progress=_stop)


def _stop(done, total):
    raise KeyboardInterrupt


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


def test_an_encoder_is_not_trained_to_write_what_it_sees(tmp_path):
    (tmp_path / "t.txt").write_text("IN: w1 w2 OUT: w3 w4\n" * 4)
    with pytest.raises(moefy.MoefyError, match="needs a model that writes, and not an encoder"):
        relufy(encoder(tmp_path / "bare"), tmp_path / "out", "t2t", tmp_path / "t.txt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("steps", [1, 5, 15, 16, 100])
def test_no_rate_is_above_the_highest(steps):
    rates = [Schedule(steps, 1, 2e-3).rate_at(step) for step in range(steps)]
    assert min(rates) > 0
    assert max(rates) <= 2e-3
