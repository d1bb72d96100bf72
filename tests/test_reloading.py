"""Converted models from disk: every head comes back the same, and a damaged directory is refused in a sentence."""

import json
import shutil
import sys

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import moefy
import tiny
from moefy.cli.app import main
from moefy.sources.models import load_source

RECIPE = moefy.Recipe(experts=6, shared=1, active=2, top_activated=4, router="linear")
# Heads that transformers makes of any decoder, with a body that AutoModel builds.
HEADS = {
    "Llama": ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"],
    "Mistral": ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"],
    "Qwen2": ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"],
    "Qwen3": ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"],
    "Gemma": ["ForSequenceClassification", "ForTokenClassification"],
    "Phi3": ["ForSequenceClassification", "ForTokenClassification"],
}


def outputs(model, feed):
    with torch.no_grad():
        found = model(**feed)
    return [found[key] for key in found if key.endswith("logits")]


@pytest.mark.parametrize(("family", "head"), [(family, head) for family in HEADS for head in HEADS[family]])
def test_heads_on_a_decoder_come_back_the_same(family, head, tmp_path):
    sizes = {"head_dim": 8} if family in ("Qwen3", "Gemma") else {}
    model = tiny._decoder(getattr(tf, f"{family}Config"), getattr(tf, family + head), **sizes).eval()
    feed = tiny.inputs("llama")
    moefy.convert(model, RECIPE, [feed])
    moefy.save(model, tmp_path / "out")
    for again in (moefy.load(tmp_path / "out"), getattr(tf, f"AutoModel{head}").from_pretrained(tmp_path / "out")):
        assert type(again).__name__ == f"Moefy{family}{head}"
        pairs = list(zip(outputs(again, feed), outputs(model, feed), strict=True))
        assert pairs
        assert all(torch.equal(a, b) for a, b in pairs)
    if head == "ForQuestionAnswering":
        return  # transformers itself does not find the body of a decoder's question answering
    with torch.no_grad():
        body = tf.AutoModel.from_pretrained(tmp_path / "out")(**feed).last_hidden_state
        assert torch.equal(body, model.base_model(**feed).last_hidden_state)


@pytest.mark.parametrize(("family", "made"), [("gpt_neox", "GPTNeoXForCausalLM"), ("vit", "ViTModel")])
def test_weights_that_are_stored_by_other_names_come_back(family, made, tmp_path):
    getattr(tf, made)(tiny.tiny(family).config).save_pretrained(tmp_path / "dense")
    model, feed = load_source(tmp_path / "dense")[0], tiny.inputs(family)
    moefy.convert(model, RECIPE, [feed])
    moefy.save(model, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(moefy.load(tmp_path / "out")(**feed)[0], model(**feed)[0])


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    model = tiny.tiny("llama")
    moefy.convert(model, RECIPE, [tiny.inputs("llama")])
    return moefy.save(model, tmp_path_factory.mktemp("converted") / "out")


def weights(change):
    def damage(folder):
        stored = load_file(folder / "model.safetensors")
        change(stored)
        save_file(stored, folder / "model.safetensors", {"format": "pt"})

    return damage


def config(change):
    def damage(folder):
        stored = json.loads((folder / "config.json").read_text())
        change(stored)
        (folder / "config.json").write_text(json.dumps(stored))

    return damage


def text(change):
    return lambda folder: (folder / "config.json").write_bytes(change((folder / "config.json").read_bytes()))


def first(stored):
    return stored["moefy"]["layers"]["model.layers.0.mlp"]


DOWN = "model.layers.0.mlp.experts_down"
DAMAGES = {
    "missing experts": (weights(lambda w: w.pop(DOWN)), f"lacks the weight {DOWN}"),
    "missing router": (
        weights(lambda w: w.pop("model.layers.1.mlp.router.weight")),
        "model.layers.1.mlp.router.weight",
    ),
    "missing order": (weights(lambda w: w.pop("model.layers.1.mlp.neurons")), "model.layers.1.mlp.neurons"),
    "another shape": (weights(lambda w: w.update({DOWN: torch.ones(3, 3)})), f"{DOWN} in .* has the shape \\(3, 3\\)"),
    "nan": (weights(lambda w: w[DOWN].view(-1)[:1].fill_(torch.nan)), f"The weight {DOWN} holds NaN"),
    "cut config": (text(lambda t: t[:-20]), "config.json is damaged"),
    "binary config": (text(lambda t: bytes(range(128, 256))), "config.json is damaged"),
    "no record": (config(lambda c: c.pop("moefy")), "lacks base_model_type or moefy"),
    "no layers": (config(lambda c: c["moefy"].pop("layers")), "does not say how its FFNs were converted"),
    "fewer layers": (
        config(lambda c: c["moefy"]["layers"].popitem()),
        "lacks the weights model.layers.1.mlp.down_proj",
    ),
    "fewer blocks": (config(lambda c: c.update(num_hidden_layers=1)), "holds the weights model.layers.1."),
    "no base": (config(lambda c: c.pop("base_model_type")), "lacks base_model_type"),
    "unknown base": (config(lambda c: c.update(base_model_type="zork")), "has no model type 'zork'"),
    "no class": (config(lambda c: c.pop("architectures")), "names no class"),
    "an empty class": (config(lambda c: c.update(architectures=[""])), "names no class"),
    "unknown class": (config(lambda c: c.update(architectures=["ZorkLM"])), "has no ZorkLM"),
    "no class of a model": (config(lambda c: c.update(architectures=["Trainer"])), "is a Trainer, which is no model"),
    "unknown field": (config(lambda c: first(c).update(zork=1)), "has zork: 1"),
    "missing field": (config(lambda c: first(c).pop("experts")), "has not all that it should"),
    "field of another kind": (config(lambda c: first(c).update(shared="x")), "has shared: 'x'"),
    "unknown router": (config(lambda c: first(c).update(router="zork")), "has the router 'zork'"),
    "other sizes": (config(lambda c: first(c).update(experts=4)), "has the shape"),
    "width that is no number": (config(lambda c: c.update(hidden_size="x")), "Field 'hidden_size' expected int"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_conversion_is_refused_in_a_sentence(damage, converted, tmp_path, monkeypatch, capsys):
    change, message = DAMAGES[damage]
    folder = tmp_path / "damaged"
    shutil.copytree(converted, folder)
    change(folder)
    with pytest.raises(moefy.MoefyError, match=message) as refused:
        moefy.load(folder)
    assert "\n" not in str(refused.value)
    monkeypatch.setattr(sys, "argv", ["moefy", "generate", str(folder), "a word"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code, capsys.readouterr().err.count("moefy: ")) == (2, 1)


def test_a_conversion_is_no_dense_source(converted):
    with pytest.raises(moefy.MoefyError, match="converted already"):
        load_source(converted)


@pytest.mark.parametrize("dtype", ["x", "float64", "int8"])
def test_wrong_types_are_refused_alike(dtype, converted, dense, monkeypatch, capsys):
    said = []
    for model in (converted, dense):
        monkeypatch.setattr(sys, "argv", ["moefy", "generate", str(model), "a word", "--dtype", dtype])
        with pytest.raises(SystemExit):
            main()
        said.append(capsys.readouterr().err.splitlines()[-1])
    assert said == [f"moefy: There is no dtype '{dtype}'; use auto, float32, bfloat16 or float16."] * 2
