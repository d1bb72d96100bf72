"""The refit: never worse than before on its calibration, exact where the kept neurons can express the rest."""

import sys

import pytest
import torch

import moefy
import tiny
from moefy.moe import moe_layers
from moefy.reconstruct import NEARLY, RIDGES, Fit, _held_out_error, _largest_good, refit, runs
from test_construct import make_stats
from test_moe import build


def weighted_error(moe, stats, x):
    return (moe(x) - stats.ffn.forward(x)).square().sum().item()


@pytest.mark.parametrize("method", ["activation", "shared_only"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_refit_lowers_the_error(method, gated, bias):
    stats, x = make_stats(gated, activation="silu" if gated else "gelu", bias=bias, tokens=600)
    moe = build(stats, method)
    before = weighted_error(moe, stats, x)
    refit(moe, stats.ffn, stats)
    assert weighted_error(moe, stats, x) < 0.95 * before
    assert moe.down_bias is None or not torch.equal(moe.down_bias, stats.ffn.down_bias)


def test_neurons_that_repeat_others_are_folded_into_them():
    """Each dropped neuron is a copy of a kept one: least squares must find the dense output again."""
    stats, _ = make_stats(activation="gelu", tokens=600)
    g = torch.Generator().manual_seed(1)
    ffn = stats.ffn
    half = ffn.neurons // 2
    twins = moefy.FFNWeights(
        up=ffn.up[:half].repeat(2, 1), gate=ffn.gate[:half].repeat(2, 1), down=ffn.down, activation="gelu"
    )
    x = torch.randn(600, ffn.width, generator=g)
    twin_stats = type(stats)(twins, lambda: iter([x]))
    partition = moefy.Partition(torch.arange(half), torch.arange(half, 2 * half).view(4, -1))
    spec = moefy.Recipe(construction="shared_only", experts=8, shared=4, active=0).layer_spec(twins, "ffn")
    moe = moefy.MoEFFN.from_dense(twins, partition, spec, None).requires_grad_(False)
    before = (moe(x) - twins.forward(x)).norm() / twins.forward(x).norm()
    assert before > 0.3
    ridge = refit(moe, twins, twin_stats).ridge
    # The ridge pulls towards the old weights: a fraction of it remains of the distance.
    assert (moe(x) - twins.forward(x)).norm() < 2 * ridge * twins.forward(x).norm()


def test_dead_neurons_keep_their_weights_and_everything_active_stays_dense():
    stats, x = make_stats(activation="relu", tokens=300)
    moe = build(stats, experts=6, shared=2, active=4)
    refit(moe, stats.ffn, stats)
    torch.testing.assert_close(moe(x), stats.ffn.forward(x), rtol=1e-4, atol=1e-3)
    h = stats.ffn.hidden(x) * runs(build(stats), x)
    assert h.shape == (300, 48)
    assert ((h == 0) | (h == stats.ffn.hidden(x))).all()


@pytest.mark.parametrize("family", ["llama", "bert", "t5-v1.0", "opt"])
def test_a_whole_model_comes_nearer_with_it(family):
    feed = [tiny.inputs(family, batch=4, length=24, seed=s) for s in range(6)]
    errors = []
    for refitted in (False, True):
        model = tiny.tiny(family)
        recipe = moefy.Recipe(
            experts=12, shared=3, active=3, router="linear", sharing="reconstruction", refit=refitted, top_activated=4
        )
        report = moefy.convert(model, recipe, feed)
        errors.append(sum(layer.error for layer in report.layers))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("shares", [[0.8, 0.2], [0.2, 0.8]])
def test_of_several_shared_budgets_each_layer_takes_the_one_with_the_least_held_out_error(shares, monkeypatch):
    """In whatever order they are given, and every layer for itself."""
    module, fits = sys.modules["moefy.conversion.convert_layer"], []

    def record(moe, *args):
        fits.append((refit(moe, *args).held_out_error, moe.spec.shared))
        return Fit(1.0, fits[-1][0])

    monkeypatch.setattr(module, "refit", record)
    recipe = moefy.Recipe.of("reconstructed", budget=0.5, expert_size=4, allocation="uniform", shared_budget=shares)
    model = tiny.tiny("llama")
    moefy.convert(model, recipe, [tiny.inputs("llama", batch=8, length=40, seed=s) for s in range(6)])
    best = [min(fits[i : i + 2])[1] for i in range(0, len(fits), 2)]
    assert [moe.spec.shared for moe in moe_layers(model).values()] == best
    assert len(fits) == 4
    assert len({shared for _, shared in fits}) == 2


def test_several_shared_budgets_need_a_refit_and_must_be_shares():
    with pytest.raises(moefy.MoefyError, match="refit"):
        moefy.Recipe.of("cmoe", budget=0.5, shared_budget=[0.3, 0.6])
    for wrong in ([], [0.5, 1.2], -0.1):
        with pytest.raises(moefy.MoefyError, match="share"):
            moefy.Recipe.of("reconstructed", shared_budget=wrong)


@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0, 30.0])
def test_the_search_for_a_ridge_finds_what_trying_all_finds(noise):
    g = torch.Generator().manual_seed(int(noise * 10))
    h = torch.randn(2, 90, 40, generator=g, dtype=torch.float64)
    rest = h @ torch.randn(40, 12, generator=g, dtype=torch.float64)
    rest += noise * torch.randn(rest.shape, generator=g, dtype=torch.float64)
    gram, cross, before = h.transpose(1, 2) @ h, h.transpose(1, 2) @ rest, rest[1].square().sum(0)
    left = {ridge: max(0.0, float(before.sum()) + _held_out_error(gram, cross, ridge)) for ridge in RIDGES}
    fit = _largest_good(gram, cross, before)
    assert fit.ridge == max(ridge for ridge, error in left.items() if error <= NEARLY * min(left.values()))
    assert fit.held_out_error == left[fit.ridge]


def test_a_refit_without_output_biases_can_be_dense_again():
    recipe = moefy.Recipe(experts=6, shared=2, active=2, refit=True)
    feed = tiny.inputs("llama")
    model = tiny.tiny("llama")
    moefy.convert(model, recipe, [feed])
    with pytest.raises(moefy.MoefyError, match="output_bias: false"):
        moefy.to_dense(model)
    other = tiny.tiny("llama")
    moefy.convert(other, moefy.Recipe.of(recipe, output_bias=False), [feed])
    before = tiny.tiny("llama").state_dict()
    for name, tensor in moefy.to_dense(other).state_dict().items():
        assert torch.equal(tensor, before[name]) == ("down_proj" not in name)
