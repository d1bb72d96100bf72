"""The less common families: how many FFNs they have, slim copies, the default recipe, and what is left out."""

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moefy
import tiny
from moefy.conversion.sensitivity import output_metrics
from moefy.moe import moe_layers
from moefy.sites import FAMILIES, find_sites
from moefy.tuning.relufy import with_relu
from test_families import close
from tiny_base import bert_like
from tiny_mixtures import MIXTURES
from tiny_more import MORE, SEEING

SLIM = moefy.Recipe.of("slim", budget=0.5)
# Whose configs have no attribute for the count of neurons, or one for FFNs of several widths, or of those that stay.
NO_SLIM = {
    *("bloom", "mpt", "recurrent_gemma", "dinov2", "dinov2-swiglu", "dinov2_with_registers", "swin", "swinv2"),
    *("siglip", "lilt", "convnext", "bridgetower", "moshi"),
}
# One of each way to say the width: with None for a default, two attributes, a part's own config, a copied config.
SLIMMED = (
    *(
        "starcoder2",
        "falcon_h1",
        "gptj",
        "xglm",
        "lfm2",
        "apertus",
        "modernbert",
        "esm",
        "roberta-prelayernorm",
        "funnel",
        "led",
    ),
    *("prophetnet", "longt5", "vit_mae", "clip", "wav2vec2", "reformer", "ctrl", "cpmant", "patchtst", "videomae"),
    *("musicgen_decoder", "altclip", "t5gemma2", "dia", *SEEING),
)


@pytest.mark.parametrize("family", MORE)
def test_every_ffn_is_found_and_nothing_else(family):
    sites = find_sites(MORE[family].make())
    assert len(sites) == MORE[family].sites == len({site.entry_name for site in sites})
    # GroupViT has an FFN in a layer of that name.
    assert not [site.name for site in sites if "att" in site.name.replace("pre_assign_attn", "")]


def test_every_row_has_a_tiny_model():
    models = [make() for make in (*tiny.ALL.values(), *(mixture.make for mixture in MIXTURES.values()))]
    types = {model.config.model_type for model in models}
    types |= {site.config.model_type for model in models for site in find_sites(model)}
    named = {name for family in FAMILIES for name in family.model_types}
    assert {name for name in named if name in CONFIG_MAPPING} <= types


@pytest.mark.parametrize("family", [*SLIMMED, *sorted(NO_SLIM)])
def test_slim(family, tmp_path):
    model, feed = tiny.tiny(family), tiny.inputs(family)
    dense_class, before = type(model), [site.read().neurons for site in find_sites(model)]
    if family in NO_SLIM:
        with pytest.raises(moefy.MoefyError, match=r"does not give the width of .* use the recipe shared-only"):
            moefy.convert(model, SLIM, [feed])
        assert not moe_layers(model)
        return
    moefy.convert(model, SLIM, [tiny.inputs(family, batch=8)])
    moefy.save(model, tmp_path / "out")
    again = dense_class.from_pretrained(tmp_path / "out").eval()
    assert [site.read().neurons for site in find_sites(again)] == [24 if n == 48 else 32 for n in before]
    assert close(tiny.output(again, feed), tiny.output(model, feed))


# One of each structure: residuals that are passed through, fused, both towers, the text part, several widths, audio.
@pytest.mark.parametrize(
    "family", ["bloom", "modernbert", "clip", "llava", "swin", "wav2vec2", "pegasus_x", "apertus", "dinov2-swiglu"]
)
def test_the_default_recipe(family, tmp_path):
    model, feed = tiny.tiny(family), tiny.inputs(family)
    report = moefy.convert(
        model, moefy.Recipe.of("reconstructed", budget=0.7, expert_size=8), [tiny.inputs(family, batch=8)]
    )
    assert all(layer.error < 0.6 for layer in report.layers)
    moefy.save(model, tmp_path / "out")
    assert torch.equal(tiny.output(moefy.load(tmp_path / "out"), feed), tiny.output(model, feed))


@pytest.mark.parametrize("family", ["gptj", "modernbert", "deit", "wav2vec2", "bloom", "clip"])
def test_relu_or_a_sentence(family):
    model, feed = tiny.tiny(family), tiny.inputs(family)
    if family in ("bloom", "clip"):  # its activation is in the code; its two towers have one each
        with pytest.raises(moefy.MoefyError, match="cannot be set to relu"):
            with_relu(model)
        return
    assert not close(tiny.output(with_relu(model), feed), tiny.output(model, feed))


def _vision(model):
    return {name: type(module) for name, module in model.named_modules() if "vis" in name}


@pytest.mark.parametrize("family", SEEING)
def test_a_vision_tower_stays_as_it_is(family):
    model = tiny.tiny(family)
    before = _vision(model)
    moefy.convert(model, moefy.Recipe(experts=6, shared=2, active=4, top_activated=4), [tiny.inputs(family)])
    assert before == _vision(model) != {}
    assert len(moe_layers(model)) == 2


def test_one_tower_of_two_and_a_model_of_two_models():
    clip = tiny.tiny("clip")
    assert [site.name for site in find_sites(tf.CLIPVisionModel(clip.config.vision_config))] == [
        "encoder.layers.0.mlp",
        "encoder.layers.1.mlp",
    ]
    vit, gpt2 = tiny.tiny("vit"), tiny.tiny("gpt2")
    config = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit.config, gpt2.config)
    names = [site.name for site in find_sites(tf.VisionEncoderDecoderModel(config))]
    assert names == ["decoder.transformer.h.0.mlp", "decoder.transformer.h.1.mlp"]


def _left_out(name, head, **changes):
    return bert_like(getattr(tf, f"{name}Config"), getattr(tf, name + head), pad_token_id=0, **changes)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: _left_out("BitNet", "ForCausalLM"), "'bitnet': it has a norm between"),
        (lambda: _left_out("SqueezeBert", "Model", embedding_size=32), "'squeezebert' has no FFNs of two or three"),
        (
            lambda: _left_out("Blip2QFormer", "Model", encoder_hidden_size=32),
            r"'blip_2_qformer' is not in .* encoder.layer.\* \(intermediate_query.dense -> output_query.dense\) x2",
        ),
    ],
)
def test_what_is_left_out_says_so(make, sentence):
    with pytest.raises(moefy.MoefyError, match=sentence):
        find_sites(make())


def test_what_the_model_multiplies_by_is_in_the_weights():
    """Falcon-H1 with numbers beside its gate and output, and the same model with these in its matrices."""
    model, feed = tiny.tiny("falcon_h1"), tiny.inputs("falcon_h1")
    folded = tiny.tiny("falcon_h1")
    for layer, other in zip(model.model.layers, folded.model.layers, strict=True):
        other.feed_forward.gate_multiplier, other.feed_forward.down_multiplier = 1.0, 1.0
        other.feed_forward.gate_proj.weight.data = layer.feed_forward.gate_proj.weight * 0.5
        other.feed_forward.down_proj.weight.data = layer.feed_forward.down_proj.weight * 4.0
    folded.config.mlp_multipliers = [1.0, 1.0]
    assert model.config.mlp_multipliers == [0.5, 4.0]
    assert close(tiny.output(folded, feed), tiny.output(model, feed))
    found = []
    for one in (model, folded):
        sites = {site.entry_name: site for site in find_sites(one)}
        found.append(output_metrics(one, sites, [feed]))
    for name, metric in found[0].items():
        torch.testing.assert_close(metric, found[1][name], rtol=1e-3, atol=1e-5 * float(metric.abs().max()))
    before = tiny.output(model, feed)
    moefy.convert(model, moefy.Recipe.of("shared-only", budget=1.0), [feed])
    assert close(tiny.output(model, feed), before)
    dense = moefy.to_dense(model)
    torch.testing.assert_close(
        dense.model.layers[0].feed_forward.down_proj.weight * 4, folded.model.layers[0].feed_forward.down_proj.weight
    )
    assert close(tiny.output(dense, feed), before)


def test_fused_and_gated_ffns_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"model_type": "odd"})()
            self.fused = nn.ModuleDict({"both": nn.Linear(8, 64), "narrow": nn.Linear(32, 8)})
            self.gated = nn.ModuleDict({"gate": nn.Linear(8, 32), "up": nn.Linear(8, 32), "narrow": nn.Linear(32, 8)})
            self.attention = nn.ModuleDict({"q": nn.Linear(8, 16), "o": nn.Linear(16, 8)})

    with pytest.raises(moefy.MoefyError) as error:
        find_sites(Odd())
    assert "fused (both -> narrow) x1; gated (gate, up -> narrow) x1." in str(error.value)
