"""Models that are mixtures of experts already: each expert is an FFN (CMoE's hierarchical use)."""

import pytest
import torch
import transformers as tf
from torch.nn import functional as F

import moefy
import tiny
from moefy import kernels
from moefy.conversion.budgets import measure
from moefy.measure.evaluate import routing
from moefy.moe import MoEFFN, moe_layers
from moefy.sites import ExpertList, ExpertSite, find_sites, join_experts
from moefy.sources.models import load_source
from moefy.study.collect import collect
from moefy.usage import realised_fraction, usage
from native_problem import needs_native
from test_families import HALF, close
from tiny_base import NEURONS, VOCAB, WIDTH, decoder
from tiny_mixtures import EXPERTS, MIXTURES, WHOLE


def lists(model):
    return [module for module in model.modules() if isinstance(module, ExpertList)]


def test_every_layout_is_found_read_and_run():
    for family, mixture in MIXTURES.items():
        model, feed = tiny.tiny(family), tiny.inputs(family)
        sites, whole = find_sites(model), tiny.output(model, feed)
        assert len(sites) == mixture.sites == len({site.entry_name for site in sites}), family
        keys, slices = list(model.state_dict()), [site.read() for site in sites]
        apart = [site.entry for site in sites if isinstance(site, ExpertSite)]
        assert len(apart) >= EXPERTS
        assert lists(model)
        assert [site.name for site in find_sites(model)] == [site.name for site in sites]
        for one, other in zip(slices, (site.read() for site in sites), strict=True):
            assert one.up.data_ptr() == other.up.data_ptr()
            assert torch.equal(one.down, other.down)
        assert close(tiny.output(model, feed), whole), family
        join_experts(model)
        assert list(model.state_dict()) == keys
        assert not lists(model)


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize("choice", ["any", "one for all", "beyond the last"])
def test_a_list_of_experts_against_the_formula(tokens, choice):
    torch.manual_seed(0)
    model = tiny.tiny("mixtral")
    site = find_sites(model)[0]
    weights, _ = [other.read() for other in find_sites(model)][:EXPERTS], site.entry
    x, scale = torch.randn(tokens, WIDTH), torch.rand(tokens, 2)
    index = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)]) if tokens else torch.empty(0, 2).long()
    if choice == "one for all":
        index[:] = torch.tensor([2, 0])
    elif choice == "beyond the last":
        index[:, 1] = EXPERTS  # what transformers writes for an expert on another device
    expected = torch.zeros(tokens, WIDTH, dtype=torch.float64)
    for t in range(tokens):
        for k in range(2):
            if index[t, k] < EXPERTS:
                ffn = weights[index[t, k]].to(torch.float64)
                expected[t] += scale[t, k] * ffn.forward(x[t : t + 1].double())[0]
    for visit_all in (False, True):
        module = lists(model)[0]
        module.visit_all = visit_all
        y = module(x, index, scale)
        assert y.shape == x.shape
        assert (y - expected).norm() <= 1e-6 * NEURONS**0.5 * expected.norm() + 1e-12
        assert module.rows is None


FEW = {
    "cmoe": moefy.Recipe.of("cmoe", expert_size=8),
    "linear": moefy.Recipe.of("cmoe", router="linear", expert_size=8),
    "moefication": moefy.Recipe.of("moefication", expert_size=8),
    "reconstructed": moefy.Recipe.of("reconstructed", allocation="uniform", expert_size=8, budget=0.6),
    "control": moefy.Recipe.of("reconstructed", allocation="uniform", expert_size=8, budget=0.6).control(),
}


@pytest.mark.parametrize("recipe", FEW)
def test_batches_of_which_no_token_comes_to_an_expert(recipe):
    model, ids = tiny.tiny("mixtral"), torch.randint(3, VOCAB, (60, 1, 8), generator=torch.Generator().manual_seed(0))
    report = moefy.convert(model, FEW[recipe], [{"input_ids": x} for x in ids])
    assert len(report.layers) == 2 * EXPERTS
    assert any(layer.experts for layer in report.layers)
    assert all(layer.error < 1 for layer in report.layers)


def test_padding_is_no_calibration():
    """The same tokens, padded in one batch or bare in two, convert to the same experts."""
    ids = torch.randint(3, VOCAB, (60, 12), generator=torch.Generator().manual_seed(1))
    short, mask = ids[30:].clone(), torch.ones_like(ids)
    mask[30:, 7:] = 0
    found = []
    for batches in (
        [{"input_ids": ids, "attention_mask": mask}],
        [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in (ids[:30], short[:, :7])],
    ):
        model = tiny.tiny("mixtral")
        report = moefy.convert(model, HALF, batches)
        found.append((report, moe_layers(model)))
    (one, padded), (other, bare) = found
    spec = next(iter(padded.values())).spec
    assert sum(layer.work for layer in one.layers) == 2 * 2 * mask.sum() * spec.multiply_adds  # two experts a token
    for a, b in zip(one.layers, other.layers, strict=True):
        assert a.work == b.work
        assert a.error == pytest.approx(b.error, rel=1e-4)
    assert all(torch.equal(padded[name].neurons, bare[name].neurons) for name in padded)


@pytest.mark.parametrize("recipe", [HALF, moefy.Recipe.of("reconstructed", budget=0.7, expert_size=8)])
def test_an_expert_that_hardly_a_token_chooses_stays_whole(recipe, tmp_path):
    model, feed, name = tiny.tiny("deepseek_v3"), tiny.inputs("deepseek_v3"), "model.layers.1.mlp.experts.3"
    model.model.layers[1].mlp.gate.e_score_correction_bias[3] = -2  # scores are between 0 and 1
    before = next(site for site in find_sites(model) if site.name == name).read()
    report = moefy.convert(model, recipe, [feed])
    kept = next(layer for layer in report.layers if layer.name == name)
    assert kept.work == 0
    assert kept.shared == kept.neurons
    assert kept.experts == kept.top_k == 0
    assert torch.equal(moe_layers(model)[name].to_dense().up, before.up)
    assert all(layer.error > 0 for layer in report.layers if layer.experts)
    moefy.save(model, tmp_path / "out")
    assert torch.equal(tiny.output(moefy.load(tmp_path / "out"), feed), tiny.output(model, feed))


def test_the_budget_counts_experts_that_stay_whole():
    """Three quarters of the calibration's tokens are in the batches that are not measured."""
    model = tiny.tiny("mixtral")
    ids = torch.randint(3, VOCAB, (48, 1, 14), generator=torch.Generator().manual_seed(0))
    recipe = moefy.Recipe.of("reconstructed", budget=0.6, expert_size=8)
    report = moefy.convert(model, recipe, [{"input_ids": x} for x in ids])
    most = max(layer.work for layer in report.layers)
    assert any(layer.experts == 0 and layer.work > 0.2 * most for layer in report.layers)
    assert report.active_fraction <= 0.6 + 1e-6


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_budget_counts_an_expert_by_its_tokens(family):
    model, feed = tiny.tiny(family), tiny.inputs(family, batch=160)
    report = moefy.convert(model, moefy.Recipe.of("reconstructed", budget=0.6, expert_size=8), [feed])
    weights = [layer.work for layer in report.layers]
    mean = sum(w * layer.active_fraction for w, layer in zip(weights, report.layers, strict=True)) / sum(weights)
    assert report.active_fraction == pytest.approx(mean)
    assert 0.4 < report.active_fraction <= 0.6 + 1e-6
    assert report.predicted_loss is not None
    assert 0 < report.predicted_loss < 1
    with usage(model) as counted:
        tiny.output(model, feed)
    assert realised_fraction(model, counted) == pytest.approx(report.active_fraction, abs=0.05)


def test_what_fails_before_it_begins_changes_nothing():
    model, feed = tiny.tiny("qwen2_moe"), tiny.inputs("qwen2_moe")
    keys, kind = list(model.state_dict()), type(model)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(moefy.MoefyError, match="NaN"):
        moefy.convert(model, moefy.Recipe.of("reconstructed", budget=0.7, expert_size=8), [feed])
    assert list(model.state_dict()) == keys
    assert type(model) is kind
    assert not lists(model)
    with pytest.raises(moefy.MoefyError, match="NaN"):
        measure(model, {site.entry_name: site for site in find_sites(model)}, [feed], 1 << 30, 1024)
    assert not lists(model)
    with pytest.raises(moefy.MoefyError, match="does not give the width of"):
        moefy.convert(model, "slim", [feed])
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("family", WHOLE)
def test_a_conversion_that_ends_early_can_be_saved(family, tmp_path):
    model, feed = tiny.tiny(family), tiny.inputs(family)

    def stop(done, of, name):
        if name.endswith("experts.1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moefy.convert(model, HALF, [feed], progress=stop)
    assert len(lists(model)) == 1  # the other layer, if it has experts, is as it was
    assert all(isinstance(expert, MoEFFN) for expert in lists(model)[0])
    moefy.save(model, tmp_path / "out")
    again = moefy.load(tmp_path / "out")
    assert torch.equal(tiny.output(again, feed), tiny.output(model, feed))


def test_a_conversion_that_ends_before_any_expert_had_a_token_has_a_report():
    model = tiny.tiny("mixtral")

    def stop(done, of, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # one token, of few experts
        moefy.convert(model, HALF, [{"input_ids": torch.full((1, 8), 3)}], progress=stop)


@needs_native
def test_the_native_kernel_runs_the_experts():
    model, feed = tiny.tiny("qwen3_moe"), tiny.inputs("qwen3_moe")
    moefy.convert(model, HALF, [feed])
    with kernels.using("torch"):
        expected = tiny.output(model, feed)
    with kernels.using("native"):
        out = tiny.output(model, feed)
    assert all(moe.packed_bytes() for moe in moe_layers(model).values())
    assert close(out, expected)
    new = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert model.generate(feed["input_ids"][:1, :4], **new).shape == (1, 9)


def test_bfloat16_and_gradients(tmp_path):
    tiny.tiny("mixtral").save_pretrained(tmp_path / "dense")
    (model, _), feed = load_source(tmp_path / "dense", dtype="bfloat16"), tiny.inputs("mixtral")
    moefy.convert(model, HALF, [feed])
    moefy.save(model, tmp_path / "out")
    again = moefy.load(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert torch.equal(tiny.output(again, feed), tiny.output(model, feed))
    again.train().requires_grad_(True)
    logits = again(**feed).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), feed["input_ids"][:, 1:].flatten()).backward()
    assert all(moe.experts_up.grad.abs().sum() > 0 for moe in moe_layers(again).values())


@pytest.mark.parametrize("converted", [False, True])
def test_the_study_knows_which_tokens_an_expert_sees(converted):
    model, feed = tiny.tiny("mixtral"), tiny.inputs("mixtral")
    batches = [{k: v[i : i + 20] for k, v in feed.items()} for i in (0, 20)]
    if converted:
        moefy.convert(model, HALF, batches)
    seen = []
    hook = model.model.layers[0].mlp.gate.register_forward_hook(lambda module, args, out: seen.append(out[2]))
    layers, streams = collect(model, batches)
    hook.remove()
    mask = feed["attention_mask"].bool()
    chosen = torch.cat(seen)[mask.flatten()]
    assert len(streams["tokens"].joined()["ids"]) == mask.sum()
    for expert in range(EXPERTS):
        layer = layers[f"model.layers.0.mlp.experts.{expert}"]
        expected = (chosen == expert).any(1).nonzero()[:, 0]
        assert torch.equal(torch.cat(layer.places), expected)
        assert layer.tokens == len(expected)
        assert sum(len(rows) for rows in layer.chosen) == (len(expected) if converted else 0)
    assert bool(lists(model)) == converted
    result = moefy.study.study(model, None, batches)
    assert len(result["layers"]) == 2 * EXPERTS
    assert result["between_layers"] == []


def test_routing_counts_real_tokens_only():
    model, feed = tiny.tiny("mixtral"), tiny.inputs("mixtral")
    moefy.convert(model, HALF, [feed])
    spoiled = {**feed, "input_ids": feed["input_ids"].where(feed["attention_mask"].bool(), 7)}
    found, other = routing(model, [feed]), routing(model, [spoiled])
    assert (
        sum(found[f"model.layers.0.mlp.experts.{e}"].tokens for e in range(EXPERTS)) == 2 * feed["attention_mask"].sum()
    )
    assert found.keys() == other.keys()
    assert all(found[name].mass == other[name].mass for name in found)


def test_a_training_that_was_cut_off_ends_the_same(tmp_path):
    """Experts that no token of a step chose have no gradient there, and AdamW counts steps for each parameter."""
    batches = [
        {"input_ids": x} for x in torch.randint(3, VOCAB, (16, 1, 3), generator=torch.Generator().manual_seed(0))
    ]
    whole, pieces = tiny.tiny("mixtral"), tiny.tiny("mixtral")
    for model in (whole, pieces):
        moefy.convert(model, HALF, [tiny.inputs("mixtral")])
    moefy.tune(whole, batches, rate=5e-3)
    while not moefy.tune(pieces, batches, rate=5e-3, state=tmp_path / "state", seconds=1e-3).done:
        pass
    one, other = whole.state_dict(), pieces.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_tuning_a_mixture_that_was_converted_again(tmp_path):
    model, feed = tiny.tiny("qwen2_moe"), tiny.inputs("qwen2_moe")
    feed["input_ids"] = feed["input_ids"] % 5 + 3  # what there is to learn: few words
    moefy.convert(model, HALF, [feed])
    batches = [{k: v[i : i + 10] for k, v in feed.items()} for i in range(0, 40, 10)]
    done = moefy.tune(model, batches, epochs=4)
    assert done.loss_after < done.loss_before
    moefy.save(model, tmp_path / "out")
    assert torch.equal(tiny.output(moefy.load(tmp_path / "out"), feed), tiny.output(model, feed))


def test_other_mixtures_are_named():
    model = decoder(tf.GptOssConfig, tf.GptOssForCausalLM, num_local_experts=4, head_dim=8)
    with pytest.raises(moefy.MoefyError, match="'gpt_oss': its experts have biases"):
        find_sites(model)


@pytest.mark.parametrize("allocation", ["uniform", "sensitivity"])
def test_an_expert_without_tokens_in_the_first_batches_is_converted(allocation):
    torch.manual_seed(0)
    model = tiny.tiny("mixtral")
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    ids, logits = torch.arange(3, VOCAB)[:, None], []
    hook = gates[0].register_forward_hook(lambda _, __, out: logits.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    wants_first = logits[0].flatten(0, -2).topk(2).indices.eq(0).any(1)
    some, every = ids[~wants_first], ids
    batches = [{"input_ids": some.repeat(8, 1)} for _ in range(9)] + [
        {"input_ids": every.repeat(8, 1)} for _ in range(4)
    ]
    recipe = moefy.Recipe.of("reconstructed", budget=0.75, allocation=allocation)
    report = moefy.convert(model, recipe, batches)
    assert all(layer.error < 1 for layer in report.layers)
