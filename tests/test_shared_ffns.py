"""FFNs that several layers share: calibrated on what each of them gives, and weighed by how often they run."""

import sys

import pytest
import torch
import transformers as tf

import moefy
import tiny
from moefy.calibrate import without_cache
from moefy.conversion.budgets import measure
from moefy.moe import moe_layers
from moefy.sites import find_sites
from moefy.study import study
from moefy.study.collect import collect
from test_one_pass import seen_inputs
from test_trial import MLP, Odd

RECIPE = moefy.Recipe(experts=6, shared=1, active=2, top_activated=4)
DEFAULT = moefy.Recipe.of("reconstructed", budget=0.5, expert_size=2)


def funnel():
    torch.manual_seed(0)
    sizes = {"block_sizes": [1, 1], "block_repeats": [1, 3], "num_decoder_layers": 1}
    config = tf.FunnelConfig(vocab_size=97, d_model=32, n_head=4, d_head=8, d_inner=64, **sizes)
    return tf.FunnelForMaskedLM(config).eval()


@pytest.mark.parametrize("hold_bytes", [1 << 30, 0])
@pytest.mark.parametrize("family", ["albert", "albert-groups"])
def test_they_are_calibrated_on_every_layer_s_tokens_without_padding(family, hold_bytes, monkeypatch):
    monkeypatch.setattr("moefy.conversion.one_pass.SMALLEST_SPILLED", 64)
    given, module = {}, sys.modules["moefy.convert"]  # the name moefy.convert is the function's

    def record(site, specs, recipe, arrival, seed, metric):
        given[site.entry_name] = torch.cat([rows.clone() for rows in arrival.inputs()])
        return convert_layer(site, specs, recipe, arrival, seed, metric)

    convert_layer = module.convert_layer
    monkeypatch.setattr(module, "convert_layer", record)
    model = tiny.tiny(family)
    batches = [tiny.inputs(family, seed=s, length=8 + s) for s in range(3)]
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    names = [site.entry_name for site in find_sites(model)]
    seen = seen_inputs(model, names, batches)
    moefy.convert(model, RECIPE, batches, hold_bytes=hold_bytes)
    assert list(given) == names
    # For the first one nothing is converted yet. Later ones see the last run of those before them converted.
    torch.testing.assert_close(given[names[0]], seen[names[0]])
    assert all(given[name].shape == rows.shape for name, rows in seen.items())


def test_a_conversion_in_which_everything_runs_is_the_dense_model():
    for model, feed in (
        (tiny.tiny("albert"), tiny.inputs("albert")),
        (funnel(), {"input_ids": torch.arange(64)[None]}),
    ):
        before = tiny.output(model, feed)
        moefy.convert(model, moefy.Recipe.of("shared-only", budget=1.0), [feed])
        assert moe_layers(model)
        torch.testing.assert_close(tiny.output(model, feed), before, atol=1e-5, rtol=1e-5)


def test_work_is_counted_for_every_run(tmp_path):
    model = funnel()
    report = moefy.convert(model, DEFAULT, [{"input_ids": torch.randint(97, (4, 64))}])
    first, repeated, _ = report.layers
    assert repeated.work * 2 == first.work * 3  # three runs over half of the tokens, which are pooled before
    moefy.save(model, tmp_path / "out")
    again, feed = moefy.load(tmp_path / "out"), {"input_ids": torch.arange(64)[None]}
    assert torch.equal(tiny.output(again, feed), tiny.output(model, feed))


def test_the_predicted_loss_is_that_of_all_runs():
    """Of the same weights once shared by the layers and once copied to each: what an error costs is the same sum."""
    model, feeds = tiny.tiny("albert"), [tiny.inputs("albert", seed=s, batch=16) for s in range(4)]
    sites = {site.entry_name: site for site in find_sites(model)}
    (name,) = sites
    found = measure(model, sites, feeds, 1 << 30, 1024)
    apart = tf.AlbertForMaskedLM(type(model.config)(**{**model.config.to_dict(), "num_hidden_groups": 2})).eval()
    state = model.state_dict()
    apart.load_state_dict({key: state[key.replace("groups.1", "groups.0")] for key in apart.state_dict()})
    assert torch.equal(tiny.output(apart, feeds[0]), tiny.output(model, feeds[0]))
    both = {site.entry_name: site for site in find_sites(apart)}
    copied = measure(apart, both, feeds, 1 << 30, 1024)
    assert len(both) == model.config.num_hidden_layers == 2
    ratio = found.predicted_loss({name: 0.5}) / copied.predicted_loss(dict.fromkeys(both, 0.5))
    # Layers with neurons of their own lose less by choosing them for themselves.
    assert 0.9 < ratio < 2


def test_they_are_studied_on_the_tokens_of_every_run():
    model, feed = tiny.tiny("albert"), tiny.inputs("albert", batch=24, length=16)
    moefy.convert(model, {"construction": "weights", "router": "similarity", "expert_size": 8, "active": 2}, [feed])
    (layer,) = collect(model, [feed, feed])[0].values()
    tokens = int(feed["attention_mask"].sum())
    assert layer.tokens == 4 * tokens
    one = torch.arange(tokens)
    assert torch.equal(torch.cat(layer.places), torch.cat([one, one, one + tokens, one + tokens]))
    assert study(model, None, [feed])


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_layers_that_hold_the_same_module_are_refused(family):
    model = tiny.tiny(family)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    with pytest.raises(
        moefy.MoefyError, match=r"layers.0.mlp(.experts)? runs? 2 times in a pass, for layers that hold"
    ):
        moefy.convert(model, "cmoe", [tiny.inputs(family)])
    assert not moe_layers(model)
    model(**without_cache(model, tiny.inputs(family)))


def test_so_they_are_in_a_family_that_is_tried():
    model = Odd(MLP, layers=3, shared=True)
    with pytest.raises(moefy.MoefyError, match=r"layers.0.ffn runs 3 times in a pass, for layers that hold the same"):
        moefy.convert(model, RECIPE, [{"input_ids": torch.randint(0, 99, (8, 12))}])
    assert not moe_layers(model)
