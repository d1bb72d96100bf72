"""Light fine-tuning: what it learns ends up in the weights, and what is cut off or refused changes nothing."""

import importlib
import json
import sys

import pytest
import torch

import moefy
import tiny
from command import run
from moefy import kernels
from moefy.moe import moe_layers
from moefy.sources.tokenizer import load_tokenizer
from moefy.tuning import adapters
from moefy.tuning.losses import teacher_loss, text_loss
from moefy.tuning.tune import _measured, tune
from moefy.usage import usage
from native_problem import needs_native

RECIPE = moefy.Recipe(experts=6, shared=2, active=2, router="linear")


def windows(family="llama", count=24):
    """The same four windows over and over, so that there is something to learn in a few steps."""
    return [tiny.inputs(family, seed=i % 4) for i in range(count)]


def converted(family="llama", recipe=RECIPE):
    model = tiny.tiny(family)
    moefy.convert(model, recipe, [tiny.inputs(family, seed=9)])
    return model


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_tuning_lowers_the_loss_and_leaves_an_ordinary_model(family, tmp_path):
    model = converted(family)
    names, flags = set(model.state_dict()), [p.requires_grad for p in model.parameters()]
    before, feed = state_of(model), tiny.inputs(family)
    tuned = tune(model, windows(family), rate=5e-3)
    assert tuned.done
    assert tuned.steps == 22
    assert tuned.tokens == 22 * 21
    assert tuned.loss_after < tuned.loss_before - 0.2
    assert set(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == flags
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all("experts_" in n or "shared_" in n or "attn" in n or "attention" in n for n in changed)
    assert {part for part in ("experts_", "shared_", "att") if any(part in n for n in changed)} == {
        "experts_",
        "shared_",
        "att",
    }
    moefy.save(model, tmp_path / "tuned")
    again = moefy.load(tmp_path / "tuned")
    assert torch.equal(tiny.output(again, feed), tiny.output(model, feed))
    record = json.loads((tmp_path / "tuned" / "report.json").read_text())["tuned"]
    assert record[0]["loss_after"] == tuned.loss_after
    assert record[0]["options"]["rank"] == 8


def test_the_experts_alone():
    model = converted()
    before = state_of(model)
    tune(model, windows(), rate=5e-3, attention=False)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".mlp." in name and ".router." not in name for name in changed)


def test_a_teacher_is_imitated():
    # Random models agree with the dense one as they are: experts of which half is gone are farther away.
    dense, model = tiny.tiny("llama"), converted()
    with torch.no_grad():
        for moe in moe_layers(model).values():
            moe.unpack()
            moe.experts_down.mul_(6)
    tuned = tune(model, windows(), teacher=dense, rate=5e-3)
    assert tuned.loss == "distillation"
    assert tuned.loss_after < 0.8 * tuned.loss_before
    assert not dense.training


def test_losses_are_what_they_say():
    model, dense, batch = converted(), tiny.tiny("llama", seed=1), tiny.inputs("llama")
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        ours, theirs = (m(**batch).logits.double().log_softmax(-1) for m in (model, dense))
        kl = (theirs.exp() * (theirs - ours)).sum(-1)[mask].mean()
        picked = ours[:, :-1].gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        torch.testing.assert_close(teacher_loss(model, batch, dense).double(), kl, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(text_loss(model, batch).double(), -picked[mask[:, 1:]].mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "vit", "t5-v1.1"])
def test_models_of_other_kinds(family):
    model, dense = converted(family), tiny.tiny(family)
    with pytest.raises(moefy.MoefyError, match="no loss on inputs without labels"):
        tune(model, windows(family, 4))
    assert tune(model, windows(family, 6), teacher=dense).done
    labels = {"bert": torch.tensor([0, 1]), "vit": torch.tensor([2, 0]), "t5-v1.1": torch.full((2, 7), 5)}[family]
    labelled = [{**batch, "labels": labels} for batch in windows(family)]
    tuned = tune(model, labelled, rate=5e-3)
    assert tuned.loss_after < tuned.loss_before - 0.05


def test_gate_scale_and_balance():
    model = converted()
    tuned = tune(model, windows(), rate=1e-3, gate_scale=True, balance=0.1)
    for moe in moe_layers(model).values():
        assert moe.spec.gate_scale
        assert moe.spec.balance  # the gate scale's softmax is of the scores without it
        assert moe.router.scale.abs().min() > 0
        moved = moe.router.balance.abs()
        # All are sums of steps of one size, up or down: whole numbers of what is the largest over its number of steps.
        steps = [moved / moved.max() * most for most in range(1, tuned.steps + 1)]
        assert any(torch.allclose(each, each.round(), atol=1e-3) for each in steps)
    assert all(spec["gate_scale"] for spec in model.config.moefy["layers"].values())
    again = tune(model, windows(), rate=1e-3)  # keeps them as they are
    assert again.done
    assert all(moe.spec.gate_scale for moe in moe_layers(model).values())


def test_the_balance_evens_out_and_ends_in_a_linear_router():
    model = converted()

    def unevenness():
        with usage(model) as counted, torch.no_grad():
            for batch in windows(count=4):
                model(**batch)
        return sum(float((c.counts / c.counts.sum()).std()) for c in counted.values())

    before, biases = unevenness(), [moe.router.bias.clone() for moe in moe_layers(model).values()]
    tune(model, windows(count=60), rate=1e-6, balance=0.05)
    layers = list(moe_layers(model).values())
    assert not any(moe.spec.balance or moe.router.balance is not None for moe in layers)
    assert all(not torch.equal(moe.router.bias, bias) for moe, bias in zip(layers, biases, strict=True))
    assert unevenness() < 0.6 * before


def test_only_a_gate_scale():
    model = converted()
    before = state_of(model)
    tuned = tune(model, windows(), rank=0, gate_scale=True)
    assert tuned.trained == 2 * 4
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert all(moe.router.scale.abs().min() > 0 for moe in moe_layers(model).values())


def test_a_run_that_was_cut_off_ends_with_the_same_weights(tmp_path):
    options = {"rate": 5e-3, "gate_scale": True, "balance": 0.01, "epochs": 2}
    whole, pieces, start = converted(), converted(), state_of(converted())
    tune(whole, windows(), **options)
    state, runs = tmp_path / "state.safetensors", 0
    while not (tuned := tune(pieces, windows(), state=state, seconds=1e-3, **options)).done:
        assert same(state_of(pieces), start)
        assert tuned.loss_after is None
        runs += 1
    assert runs > 10
    assert same(state_of(pieces), state_of(whole))
    with pytest.raises(moefy.MoefyError, match="state of another training"):
        tune(converted(), windows(), state=state, **{**options, "gate_scale": False})


def test_what_fails_leaves_the_model_as_it_was():
    model = converted()
    before, flags = state_of(model), [p.requires_grad for p in model.parameters()]
    data = windows()
    data[3] = data[3] | {"labels": torch.full_like(data[3]["input_ids"], -100)}  # the mean of nothing
    with pytest.raises(moefy.MoefyError, match=r"loss is not finite at step (?!1;)"):
        tune(model, data, gate_scale=True, balance=0.1)
    assert same(state_of(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(type(module).__module__.startswith("peft.") for module in model.modules())
    assert tune(model, windows(), rate=1e-4).done


def test_without_peft_the_model_is_as_it_was(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    model = converted().requires_grad_(True)
    with pytest.raises(moefy.MoefyError, match="peft"):
        tune(model, windows())
    assert all(p.requires_grad for p in model.parameters())


def test_what_ends_in_the_last_measurement_leaves_the_model_as_it_was(monkeypatch):
    model, calls = converted(), []
    before = state_of(model)

    def stopped(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return _measured(*args)

    monkeypatch.setattr(importlib.import_module("moefy.tuning.tune"), "_measured", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune(model, windows(), gate_scale=True)
    assert same(state_of(model), before)
    assert not any(moe.spec.gate_scale for moe in moe_layers(model).values())


def test_a_state_is_of_one_models_experts(tmp_path):
    one, other = converted(), converted()
    with torch.no_grad():
        for moe in moe_layers(other).values():
            moe.experts_down.mul_(2)
    for model in (one, other):  # packed, as they are after any inference
        tiny.output(model, tiny.inputs("llama"))
    assert not tune(one, windows(), state=tmp_path / "state", seconds=1e-3).done
    with pytest.raises(moefy.MoefyError, match="state of another training"):
        tune(other, windows(), state=tmp_path / "state")


def test_float16_trains_in_float32():
    exact = tune(converted(), windows(), rate=5e-3).loss_after
    rounded = tune(converted().to(torch.float16), windows(), rate=5e-3).loss_after
    assert rounded == pytest.approx(exact, abs=0.02)


def test_a_teacher_of_an_encoder_decoder_looks_at_the_labels():
    model, teacher = tiny.tiny("t5-v1.0"), tiny.tiny("t5-v1.0", seed=1)
    feed = tiny.inputs("t5-v1.0")
    del feed["decoder_input_ids"]
    labels = torch.randint(3, 90, feed["input_ids"].shape)
    labels[0, 9:] = -100
    shifted = {**feed, "decoder_input_ids": model._shift_right(labels), "decoder_attention_mask": labels != -100}
    assert teacher_loss(model, {**feed, "labels": labels}, teacher).item() == pytest.approx(
        teacher_loss(model, shifted, teacher).item(), rel=1e-5
    )


def test_padding_on_the_left_is_no_text():
    model = converted()
    ids = torch.randint(3, 90, (1, 9))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    loss = text_loss(model, {"input_ids": padded, "attention_mask": mask, "position_ids": places})
    assert loss.item() == pytest.approx(text_loss(model, {"input_ids": ids}).item(), rel=1e-4)


@needs_native
def test_packed_layers_are_tuned_and_pack_again():
    model = converted()
    feed = tiny.inputs("llama")
    with torch.no_grad():
        model(**feed)
    assert all(moe.packed_bytes() for moe in moe_layers(model).values())
    tune(model, windows(), rate=5e-3, gate_scale=True)
    native = tiny.output(model, feed)
    assert all(moe.packed_bytes() for moe in moe_layers(model).values())
    with kernels.using("reference"):
        torch.testing.assert_close(tiny.output(model, feed), native, rtol=1e-4, atol=1e-4)


def test_bf16_learns_and_stays_bf16(tmp_path):
    moefy.save(converted(), tmp_path / "made")
    model = moefy.load(tmp_path / "made", dtype=torch.bfloat16)
    tuned = tune(model, windows(), rate=5e-3)
    assert tuned.loss_after < tuned.loss_before - 0.2
    kinds = {n.rpartition(".")[2]: v.dtype for n, v in model.state_dict().items() if ".mlp." in n and "router" not in n}
    assert {kind for name, kind in kinds.items() if name != "neurons"} == {torch.bfloat16}


@pytest.mark.parametrize("recipe", ["reconstructed", "shared-only"])
def test_other_recipes(recipe):
    model = converted(recipe=moefy.Recipe.of(recipe, budget=0.6, expert_size=4))
    tuned = tune(model, windows(), rate=5e-3)
    assert tuned.loss_after < tuned.loss_before - 0.2
    if recipe == "shared-only":
        with pytest.raises(moefy.MoefyError, match="routes nothing"):
            tune(model, windows(), gate_scale=True)


def test_what_cannot_be_tuned_is_a_sentence(monkeypatch):
    model = converted()
    for options, message in (
        ({"rank": 0}, "nothing to train"),
        ({"rank": -1}, "0 or more"),
        ({"rate": 0.0}, "rate must be above 0"),
        ({"balance": float("nan")}, "0 or more"),
        ({"epochs": 0}, "epochs must be above 0"),
        ({"teacher": tiny.tiny("bert")}, "shape"),
    ):
        with pytest.raises(moefy.MoefyError, match=message):
            tune(model, windows(), **options)
    with pytest.raises(moefy.MoefyError, match="convert it first"):
        tune(tiny.tiny("llama"), windows())
    with pytest.raises(moefy.MoefyError, match="at least two batches"):
        tune(model, windows(count=1))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(moefy.MoefyError, match="pip install peft"):
        tune(model, windows())
    assert tune(model, windows(), attention=False).done


def test_an_adapter_is_what_is_merged():
    model, feed = converted(), tiny.inputs("llama")
    before = tiny.output(model, feed)
    made = adapters.Adapters(model, 4, attention=True)
    torch.testing.assert_close(tiny.output(model, feed), before, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert "lora_" in name or name.endswith((".a", ".b"))
                p.add_(torch.randn_like(p) * 0.1)
        during = tiny.output(model, feed)
    assert (during - before).abs().max() > 0.01
    made.merge()
    torch.testing.assert_close(tiny.output(model, feed), during, rtol=1e-3, atol=1e-4)


@pytest.fixture
def place(dense, tmp_path, monkeypatch):
    """A folder with a converted model, its dense source, and text."""
    model = moefy.Recipe(experts=6, shared=2, active=2)
    loaded, tokenizer = tiny.tiny("llama"), load_tokenizer(str(dense))
    moefy.convert(loaded, model, [tiny.inputs("llama")])
    moefy.save(loaded, tmp_path / "moe", tokenizer)
    (tmp_path / "dense").symlink_to(dense)
    monkeypatch.chdir(tmp_path)
    return tmp_path


QUICK = ["--window", "16", "--samples", "40", "--rate", "0.005"]


def test_the_command_makes_a_checkpoint(place, monkeypatch, capsys):
    assert (
        run(monkeypatch, "tune", "moe", "out", *QUICK, "--teacher", "dense", "--gate-scale", "--balance", "0.01") == 0
    )
    shown = capsys.readouterr().out
    assert "distillation before" in shown
    assert "after" in shown
    made = moefy.load(place / "out")
    assert all(moe.spec.gate_scale for moe in moe_layers(made).values())
    assert made.config.moefy["tuned"][0]["step"] == 9
    assert (place / "out" / "tokenizer.json").exists()
    assert "Fine-tuned" in (place / "out" / "README.md").read_text()
    assert not list(place.glob(".*"))
    assert run(monkeypatch, "eval", "out", "--window", "16", "--windows", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1


def test_a_command_that_stops_goes_on(place, monkeypatch, capsys):
    assert run(monkeypatch, "tune", "moe", "whole", *QUICK) == 0
    for _ in range(40):
        assert run(monkeypatch, "tune", "moe", "out", *QUICK, "--seconds", "0.001") == 0
        if (place / "out").exists():
            break
        assert "repeat the command to go on" in capsys.readouterr().out
        assert (place / ".out.tuning.safetensors").exists()
    assert not list(place.glob(".*"))
    whole, pieces = (moefy.load(place / name) for name in ("whole", "out"))
    assert same(state_of(whole), state_of(pieces))


MISTAKES = {
    "a dense model": (["dense", "out"], "not a model that moefy converted"),
    "nothing to train": (["moe", "out", "--rank", "0"], "nothing to train"),
    "no rate": (["moe", "out", "--rate", "0"], "must be above 0"),
    "a wrong text": (["moe", "out", "--text", "nowhere.txt"], "no text file"),
    "over itself": (["moe", "moe", "--overwrite"], "would be lost"),
    "over the teacher": (["moe", "dense", "--teacher", "dense", "--overwrite"], "would be lost"),
    "a teacher of another kind": (["moe", "out", "--teacher", "nowhere"], "nowhere"),
    "too little text": (["moe", "out", "--text", "short.txt", "--window", "16"], "at least two batches"),
    "no peft": (["moe", "out"], "pip install peft"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_sentence_and_nothing_is_lost(mistake, place, monkeypatch, capsys):
    (place / "short.txt").write_text("the value of the " * 5)
    if mistake == "no peft":
        monkeypatch.setitem(sys.modules, "peft", None)
    before = sorted(place.rglob("*"))
    args, message = MISTAKES[mistake]
    assert run(monkeypatch, "tune", *args) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert sorted(place.rglob("*")) == before
