"""Where the residual stream is found, and that the refit is given what brings it back."""

import sys

import pytest
import torch

import moefy
import tiny
from moefy.conversion.residuals import find_residuals
from moefy.sites import find_sites

# The last part of the name of the module that gets the stream, by family; None: there is none to mend.
FOUND = {
    "llama": "post_attention_layernorm",
    "phi3": "post_attention_layernorm",
    "qwen3": "post_attention_layernorm",
    "gpt2": "ln_2",
    "opt": "final_layer_norm",
    "whisper": "final_layer_norm",
    "t5-v1.0": "layer_norm",
    "t5-v1.1": "layer_norm",
    "bert": "intermediate",
    "distilbert": "ffn",
    "vit": "layernorm_after",
    "gemma2": None,
    "olmo2": None,
    "falcon": None,
    "gpt_neox": None,
}
RECIPE = moefy.Recipe(experts=6, shared=1, active=2, top_activated=4, refit=True, repair=0.5)


def sites_of(model):
    return {site.entry_name: site for site in find_sites(model)}


@pytest.mark.parametrize("family", FOUND)
def test_the_stream_is_found_where_there_is_one(family):
    model = tiny.tiny(family)
    found = find_residuals(model, sites_of(model), tiny.inputs(family))
    if FOUND[family] is None:
        assert not found
    else:
        assert found.keys() == sites_of(model).keys()
        assert {name.rpartition(".")[2] for name in found.values()} == {FOUND[family]}


def rows_into(model, name, feed):
    """What a module is given in a plain forward pass."""
    seen = []
    hook = lambda module, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).clone())  # noqa: E731
    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    with torch.no_grad():
        model(**feed)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "t5-v1.0", "whisper"])
def test_targets_bring_the_stream_back(family, monkeypatch):
    """The stream of the converted model and a layer's target add up to the dense stream and the dense output."""
    given, module = {}, sys.modules["moefy.convert"]
    convert_site = module.convert_layer

    def record(site, specs, recipe, arrival, seed, metric):
        given[site.entry_name] = torch.cat(list(arrival.targets()))
        return convert_site(site, specs, recipe, arrival, seed, metric)

    monkeypatch.setattr(module, "convert_layer", record)
    model, dense, feed = tiny.tiny(family), tiny.tiny(family), tiny.inputs(family)
    feed.pop("attention_mask", None)
    sites = sites_of(dense)
    streams = find_residuals(dense, sites, feed)
    moefy.convert(model, RECIPE, [feed])
    assert given.keys() == sites.keys()
    for name, site in sites.items():
        added = site.read().forward(rows_into(dense, name, feed))
        wanted = rows_into(dense, streams[name], feed) + added
        torch.testing.assert_close(rows_into(model, streams[name], feed) + given[name], wanted, rtol=1e-4, atol=1e-4)


def test_what_is_repaired_brings_the_last_layer_closer_to_the_dense_model():
    def error(repair):
        model, dense = tiny.tiny("llama"), tiny.tiny("llama")
        feeds = [tiny.inputs("llama", batch=8, length=48, seed=s) for s in range(8)]
        moefy.convert(model, moefy.Recipe.of(RECIPE, repair=repair), feeds)
        return sum((tiny.output(model, feed) - tiny.output(dense, feed)).square().sum() for feed in feeds)

    assert error(1.0) < error(0.0)


def test_models_without_a_known_stream_convert_as_without_repair():
    states, feeds = [], [tiny.inputs("gpt_neox", seed=s) for s in range(3)]
    for repair in (0.0, 0.5):
        model = tiny.tiny("gpt_neox")
        moefy.convert(model, moefy.Recipe.of(RECIPE, repair=repair), feeds)
        states.append(model.state_dict())
    assert all(torch.equal(states[1][k], v) for k, v in states[0].items())


def test_repair_without_a_refit_is_refused():
    with pytest.raises(moefy.MoefyError, match="refit"):
        moefy.Recipe.of("cmoe", repair=0.5)
