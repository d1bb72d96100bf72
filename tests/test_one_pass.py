"""One pass: the inputs a site is given are those it sees in the converted model, held or spilled."""

import sys
from functools import partial

import pytest
import torch

import moefy
import tiny
from moefy.calibrate import real_tokens, without_cache
from moefy.conversion.one_pass import OnePass
from moefy.conversion.residuals import find_residuals
from moefy.conversion.sensitivity import output_metrics
from moefy.moe import moe_layers
from moefy.sites import find_sites

RECIPE = moefy.Recipe(experts=6, shared=1, active=2, top_activated=4)


def seen_inputs(model, names, batches):
    """What each module receives in a plain forward pass, real tokens only."""
    seen = {name: [] for name in names}

    def watch(name):
        def hook(module, args):
            rows = args[0].reshape(-1, args[0].shape[-1])
            keep = real_tokens(model, name, batch)
            seen[name].append(rows if keep is None or keep.numel() != len(rows) else rows[keep.flatten().bool()])

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


@pytest.mark.parametrize("family", ["llama", "bert", "opt", "t5-v1.1", "whisper", "gpt2"])
@pytest.mark.parametrize("hold_bytes", [1 << 30, 0])
def test_layers_are_converted_on_what_they_see_in_the_converted_model(family, hold_bytes, monkeypatch):
    monkeypatch.setattr("moefy.conversion.one_pass.SMALLEST_SPILLED", 64)
    given = {}

    def record(site, specs, recipe, arrival, seed, metric):
        given[site.entry_name] = torch.cat([rows.clone() for rows in arrival.inputs()])
        assert torch.equal(given[site.entry_name], torch.cat(list(arrival.inputs())))
        return convert_site(site, specs, recipe, arrival, seed, metric)

    module = sys.modules["moefy.convert"]  # the name moefy.convert is the function's
    convert_site = module.convert_layer
    monkeypatch.setattr(module, "convert_layer", record)
    model = tiny.tiny(family)
    batches = [tiny.inputs(family, seed=s, length=8 + s) for s in range(3)]
    moefy.convert(model, RECIPE, batches, hold_bytes=hold_bytes)
    seen = seen_inputs(model, list(moe_layers(model)), batches)
    assert list(given) == list(seen)
    for name, rows in seen.items():
        torch.testing.assert_close(given[name], rows)


@pytest.mark.parametrize("repair", [0.0, 0.5])
def test_spilling_changes_nothing(repair, monkeypatch):
    monkeypatch.setattr("moefy.conversion.one_pass.SMALLEST_SPILLED", 64)
    states, recipe = [], moefy.Recipe.of(RECIPE, refit=True, repair=repair)
    for hold_bytes in (1 << 30, 4096, 0):
        model = tiny.tiny("llama")
        moefy.convert(model, recipe, [tiny.inputs("llama", seed=s) for s in range(4)], hold_bytes=hold_bytes)
        states.append(model.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[k], v) for k, v in states[0].items())


def test_which_tokens_an_expert_sees_outlives_spilling(monkeypatch):
    """The numbers of its rows are the batch's own tensor, and were gone when it was written to disk."""
    monkeypatch.setattr("moefy.conversion.one_pass.SMALLEST_SPILLED", 64)
    feeds = [tiny.inputs("mixtral", seed=seed, batch=16, length=24) for seed in range(3)]
    assert all((feed["attention_mask"] == 0).any() for feed in feeds)
    states = []
    for hold_bytes in (1 << 30, 0):
        model = tiny.tiny("mixtral")
        report = moefy.convert(model, RECIPE, feeds, hold_bytes=hold_bytes)
        states.append((model.state_dict(), [layer.work for layer in report.layers]))
    assert states[0][1] == states[1][1]
    assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())


@pytest.mark.parametrize("hold_bytes", [1 << 30, 0])
def test_what_may_not_be_spilled_is_looked_for_when_something_must_be(hold_bytes, monkeypatch):
    calls, real = [], OnePass._common_addresses
    monkeypatch.setattr(OnePass, "_common_addresses", lambda self: (calls.append(1), real(self))[1])
    monkeypatch.setattr("moefy.conversion.one_pass.SMALLEST_SPILLED", 64)
    moefy.convert(tiny.tiny("llama"), RECIPE, [tiny.inputs("llama", seed=s) for s in range(3)], hold_bytes=hold_bytes)
    assert bool(calls) == (hold_bytes == 0)


@pytest.mark.parametrize("hold_bytes", [1 << 30, 0])
def test_what_twins_add_is_kept_within_the_bound(hold_bytes, monkeypatch):
    kept, real = [], OnePass._targets

    def targets(self, batches, twins, name):
        for number, rows in enumerate(real(self, batches, twins, name), 1):
            kept.append(sum(twin.output is not None for twin in twins) / number)
            yield rows

    monkeypatch.setattr(OnePass, "_targets", targets)
    recipe = moefy.Recipe.of(RECIPE, refit=True, repair=0.5)
    moefy.convert(tiny.tiny("llama"), recipe, [tiny.inputs("llama", seed=s) for s in range(3)], hold_bytes=hold_bytes)
    assert kept
    assert min(kept) >= 1 if hold_bytes else not any(kept)


def test_padding_does_not_count():
    model, padded = tiny.tiny("llama"), tiny.inputs("llama", batch=2, length=12)
    longer = {
        "input_ids": torch.cat([padded["input_ids"], torch.full((2, 6), 5)], 1),
        "attention_mask": torch.cat([padded["attention_mask"], torch.zeros(2, 6, dtype=torch.long)], 1),
    }
    other = tiny.tiny("llama")
    moefy.convert(model, RECIPE, [padded])
    moefy.convert(other, RECIPE, [longer])
    for a, b in zip(moe_layers(model).values(), moe_layers(other).values(), strict=True):
        assert torch.equal(a.neurons, b.neurons)


def test_model_is_itself_again_after_an_abandoned_pass():
    model, feed = tiny.tiny("llama"), tiny.inputs("llama")
    before = tiny.output(model, feed)
    sites = {site.entry_name: site for site in find_sites(model)}
    for _ in OnePass(
        model, sites, [feed, feed], partial(real_tokens, model), residuals=find_residuals(model, sites, feed)
    ):
        break
    assert torch.equal(tiny.output(model, feed), before)
    assert all("forward" not in vars(site.entry) for site in sites.values())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_sites_that_calibration_never_reaches_are_named():
    model = tiny.tiny("t5-v1.0")
    feed = {k: v for k, v in tiny.inputs("t5-v1.0").items() if k != "decoder_input_ids"}
    model.forward = lambda **inputs: model.get_encoder()(**inputs)  # leaves half of its FFNs out
    with pytest.raises(moefy.MoefyError, match="decoder_input_ids"):
        moefy.convert(model, RECIPE, [feed])


def test_ffns_that_run_in_chunks_arrive_whole():
    whole, chunked = tiny.tiny("bert"), tiny.tiny("bert")
    layers = [m for m in chunked.modules() if hasattr(m, "chunk_size_feed_forward")]
    assert layers
    for layer in layers:
        layer.chunk_size_feed_forward = 2
    expected, got = (moefy.convert(model, RECIPE, [tiny.inputs("bert")]) for model in (whole, chunked))
    assert [layer.error for layer in got.layers] == [layer.error for layer in expected.layers]
    assert {layer.chunk_size_feed_forward for layer in layers} == {2}


def test_padding_of_ffns_that_run_in_chunks_does_not_count_in_what_an_error_costs():
    found = []
    for size in (0, 2):
        model = tiny.tiny("bert")
        for module in model.modules():
            if hasattr(module, "chunk_size_feed_forward"):
                module.chunk_size_feed_forward = size
        sites = {site.name: site for site in find_sites(model)}
        found.append(output_metrics(model, sites, [tiny.inputs("bert")]))
    for name, matrix in found[0].items():
        torch.testing.assert_close(found[1][name], matrix)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration is empty"),
        ([[1, 2]], "must be a dict of model inputs"),
        ([{"inputs_embeds": torch.full((1, 4, 32), float("nan"))}], "NaN or infinite"),
    ],
)
def test_wrong_calibration_is_a_sentence(batches, message):
    with pytest.raises(moefy.MoefyError, match=message):
        moefy.convert(tiny.tiny("llama"), RECIPE, batches)


def test_nan_weights_and_second_conversions_are_refused():
    model = tiny.tiny("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(moefy.MoefyError, match=r"layers\.1\.mlp"):
        moefy.convert(model, RECIPE, [tiny.inputs("llama")])
    model = tiny.tiny("llama")
    moefy.convert(model, RECIPE, [tiny.inputs("llama")])
    with pytest.raises(moefy.MoefyError, match="converted already"):
        moefy.convert(model, RECIPE, [tiny.inputs("llama")])


@pytest.mark.parametrize("recipe", [RECIPE, "slim", moefy.Recipe.of("reconstructed", expert_size=2)])
@pytest.mark.parametrize("part", ["up_proj", "down_proj"])
def test_weights_whose_products_overflow_are_a_sentence_with_the_layer(recipe, part):
    model = tiny.tiny("llama")
    getattr(model.model.layers[1].mlp, part).weight.data *= 1e36
    with pytest.raises(moefy.MoefyError, match=r"What model\.layers\.1\.mlp computes .* too large for float32"):
        moefy.convert(model, recipe, [tiny.inputs("llama")])


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5-v1.0", "bert", "vit"])
def test_no_keys_and_values_are_kept_for_later_tokens(family, monkeypatch):
    model, feed = tiny.tiny(family), tiny.inputs(family)
    plain = model(**feed)
    bare = model(**without_cache(model, feed))
    assert bare.get("past_key_values") is None
    assert torch.equal(bare.logits, plain.logits)
    assert (plain.get("past_key_values") is not None) == (family in ("llama", "gpt2", "t5-v1.0"))


def test_no_temporary_directory_is_a_sentence(monkeypatch):
    def none(**_):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("moefy.conversion.one_pass.tempfile.TemporaryDirectory", none)
    model, recipe = tiny.tiny("llama"), moefy.Recipe.of(RECIPE, refit=True, repair=0.5)
    with pytest.raises(moefy.MoefyError, match="set TMPDIR"):
        moefy.convert(model, recipe, [tiny.inputs("llama")])
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())
