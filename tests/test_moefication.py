"""MoEfication's constructions and selections (arXiv 2110.01786), on layers whose answer is known."""

from dataclasses import replace

import pytest
import torch

import moefy
import tiny
from moefy.construct import CONSTRUCTIONS, coactivation
from moefy.construct.balanced import balanced_assignment
from moefy.measure.evaluate import routing
from moefy.moe import moe_layers
from moefy.routers import ROUTERS
from moefy.stats import NeuronStats, activation_mass, as_mask, captured, firing
from moefy.types import FFNWeights, LayerSpec, MoEWeights, Partition

TOKENS, WIDTH, GROUPS, SIZE = 600, 24, 6, 8
NEURONS = GROUPS * SIZE


def planted(gated: bool = False, seed: int = 0) -> tuple[FFNWeights, torch.Tensor]:
    """An FFN whose neurons fire in groups of SIZE, shuffled, and the group (F,) of each neuron."""
    g = torch.Generator().manual_seed(seed)
    group = torch.arange(NEURONS).remainder(GROUPS)[torch.randperm(NEURONS, generator=g)]
    rows = torch.randn(GROUPS, WIDTH, generator=g)[group] + 0.2 * torch.randn(NEURONS, WIDTH, generator=g)
    bias = torch.full((NEURONS,), -3.0)
    other = torch.randn(NEURONS, WIDTH, generator=g)
    if gated:
        return FFNWeights(up=other, down=other.flip(0), gate=rows, gate_bias=bias, activation="relu"), group
    return FFNWeights(up=rows, down=other, up_bias=bias, activation="relu"), group


def stats_of(ffn: FFNWeights, tokens: int = TOKENS, seed: int = 1) -> NeuronStats:
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    return NeuronStats(ffn, lambda: iter(x.split(100)), chunk=64)


def spec_of(ffn: FFNWeights, top_k: int, router: str | None = None) -> LayerSpec:
    return LayerSpec(WIDTH, 0, GROUPS, SIZE, top_k, router, "relu", ffn.gate is not None, ffn.up_bias is not None)


@pytest.mark.parametrize("gated", [False, True])
def test_coactivation_finds_what_fires_together(gated):
    ffn, truth = planted(gated)
    experts = coactivation.group(stats_of(ffn), torch.arange(NEURONS), GROUPS, seed=3)
    assert all(len(set(truth[row].tolist())) == 1 for row in experts)
    assert torch.equal(experts, coactivation.group(stats_of(ffn), torch.arange(NEURONS), GROUPS, seed=3))


@pytest.mark.parametrize("neurons", [30, 257, 1100])
def test_coactivation_weights_are_sums_of_products(neurons):
    g = torch.Generator().manual_seed(0)
    up = torch.randn(neurons, WIDTH, generator=g)
    ffn = FFNWeights(up=up, down=up, activation="relu")
    stats, members = stats_of(ffn), torch.randperm(neurons, generator=g)[: neurons - 1]
    h = torch.cat([x @ up.t() for x in stats.inputs()]).relu().double()[:, members]
    torch.testing.assert_close(coactivation.coactivation(stats, members).double(), h.t() @ h, rtol=1e-5, atol=1e-3)


def test_evening_out_loses_less_than_moving_at_random():
    g = torch.Generator().manual_seed(0)
    ffn, truth = planted()
    weights = coactivation.coactivation(stats_of(ffn), torch.arange(NEURONS))
    uneven = truth.clone()
    uneven[torch.randperm(NEURONS, generator=g)[:6]] = 0
    evened = coactivation.equalised(weights, uneven, GROUPS)
    assert torch.bincount(evened).tolist() == [SIZE] * GROUPS
    assert coactivation.inside_weight(weights, evened) > 0.999 * coactivation.inside_weight(weights, truth)
    anywhere = balanced_assignment(torch.rand(NEURONS, GROUPS, generator=g))
    assert coactivation.inside_weight(weights, anywhere) < coactivation.inside_weight(weights, evened)


def test_too_few_tokens_for_a_graph_is_one_sentence():
    ffn, _ = planted()
    with pytest.raises(moefy.MoefyError, match=r"at least one calibration token for each of its 6 experts.*are 5;"):
        coactivation.group(stats_of(ffn, tokens=5), torch.arange(NEURONS), GROUPS, seed=0)


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
@pytest.mark.parametrize("experts", [1, 2, NEURONS])
def test_constructions_cut_dead_and_degenerate_layers(construction, experts):
    dead = FFNWeights(up=torch.zeros(NEURONS, WIDTH), down=torch.ones(NEURONS, WIDTH), activation="relu")
    rows = CONSTRUCTIONS[construction](stats_of(dead), torch.arange(NEURONS), experts, 0)
    Partition(shared=torch.empty(0).long(), experts=rows)
    assert rows.shape == (experts, NEURONS // experts)


def test_firing_is_decided_by_the_gate():
    ffn, _ = planted(gated=True)
    x = next(stats_of(ffn).inputs())
    fires = x @ ffn.gate.t() + ffn.gate_bias > 0
    assert torch.equal(firing(ffn, x) > 0, fires & (ffn.hidden(x) != 0))
    torch.testing.assert_close(firing(ffn, x), ffn.hidden(x).abs())


@pytest.mark.parametrize("gated", [False, True])
def test_mlp_learns_what_similarity_cannot_see(gated):
    ffn, group = planted(gated)
    # Rows of different length: the cosine to a direction does not show how strongly a group fires.
    name, scale = "gate" if gated else "up", 16.0 ** (group / (GROUPS - 1))
    changed = {name: getattr(ffn, name) * scale[:, None], f"{name}_bias": torch.zeros(NEURONS)}
    ffn, order = replace(ffn, **changed), group.argsort(stable=True).view(GROUPS, SIZE)
    part, x = Partition(torch.empty(0).long(), order), torch.cat(list(stats_of(ffn, seed=9).inputs()))
    routed = ffn.take(order.flatten())
    weights, mass = MoEWeights(ffn.take(part.shared), routed, GROUPS), activation_mass(routed, GROUPS, x)
    share = {}
    for name in ("mass", "mlp", "similarity", "random"):
        router = ROUTERS[name].build(spec_of(ffn, 1, name), part, stats_of(ffn, tokens=4000), seed=0)
        share[name] = float(captured(mass, as_mask(router(x, weights).topk(1, dim=1).indices, mass.shape[1])).mean())
    assert share["mass"] >= share["mlp"] > share["similarity"] + 0.02
    assert share["mlp"] > share["random"] + 0.02


def test_mlp_is_the_same_for_a_seed_and_bounded_in_memory(monkeypatch):
    ffn, _ = planted()
    part = Partition(torch.empty(0).long(), torch.arange(NEURONS).view(GROUPS, SIZE))
    monkeypatch.setattr("moefy.routers.mlp.HOLD_BYTES", 4 * (WIDTH + GROUPS) * 150)
    a, b = (ROUTERS["mlp"].build(spec_of(ffn, 2, "mlp"), part, stats_of(ffn), seed=4) for _ in range(2))
    assert torch.equal(a.first, b.first)
    assert torch.equal(a.second, b.second)
    from moefy.routers.mlp import _examples

    x, mass = _examples(spec_of(ffn, 2), part, stats_of(ffn))
    assert len(x) == len(mass) == 150


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("family", ["t5-v1.0", "bamboo", "bert"])
def test_every_selection_reports_mass_and_overlap(family, router):
    model, feed = tiny.tiny(family), tiny.inputs(family)
    recipe = moefy.Recipe(construction="coactivation", router=router, expert_size=8, shared=0, active=0.34)
    report = moefy.convert(model, recipe, [feed])
    layers = routing(model, [feed])
    assert len(layers) == len(report.layers)
    for reported in report.layers:
        found = layers[reported.name]
        if reported is report.layers[0]:  # later ones see what rounds differently in different kernels
            assert (found.mass, found.overlap) == pytest.approx((reported.mass, reported.overlap))
        assert 0 < found.mass <= found.best_mass <= 1 + 1e-6
        assert found.load.sum() == pytest.approx(1)
        assert reported.seconds > 0
        if router == "mass":
            assert found.mass == pytest.approx(found.best_mass)
            assert found.overlap > 0.99
        if router == "oracle":
            assert found.recall > 0.99


def test_padding_is_left_out_of_the_routing():
    model, feed = tiny.tiny("bert"), tiny.inputs("bert")
    moefy.convert(model, moefy.Recipe(construction="random", router="similarity", shared=0), [feed])
    assert {r.tokens for r in routing(model, [feed]).values()} == {int(feed["attention_mask"].sum())}


@pytest.mark.parametrize(
    ("fields", "neurons", "counts"),
    [
        ({"expert_size": 32, "shared": 0, "active": 0.2}, 1536, (0, 48, 32, 10)),
        ({"expert_size": 32, "shared": 0.25, "active": 0.25}, 4096, (1024, 96, 32, 32)),
        ({"expert_size": 16, "shared": 0, "active": 0.001}, 64, (0, 4, 16, 1)),
        ({"experts": 8, "shared": 0, "active": 0.5}, 48, (0, 8, 6, 4)),
        ({"experts": 8, "shared": 3, "active": 3}, 48, (18, 5, 6, 3)),
    ],
)
def test_recipes_say_size_or_count_and_count_or_share(fields, neurons, counts):
    ffn = FFNWeights(up=torch.zeros(neurons, 4), down=torch.zeros(neurons, 4), activation="relu")
    spec = moefy.Recipe(**fields).layer_spec(ffn, "here")
    assert (spec.shared, spec.experts, spec.expert_size, spec.top_k) == counts
    assert moefy.Recipe.from_yaml(moefy.Recipe(**fields).to_yaml()) == moefy.Recipe(**fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"expert_size": 32, "shared": 0, "active": 0.2}, "32 neurons an expert do not divide the 48 neurons of here"),
        ({"expert_size": 16, "shared": 0, "active": 4}, "does not fit here: 4 active experts, but 3 experts"),
        ({"active": 1.5}, "1.5 is neither a whole number of experts nor a share below 1"),
        ({"active": "many"}, "active"),
    ],
)
def test_recipes_that_do_not_fit_are_one_sentence(fields, sentence):
    ffn = FFNWeights(up=torch.zeros(48, 4), down=torch.zeros(48, 4), activation="relu")
    with pytest.raises(moefy.MoefyError) as error:
        moefy.Recipe.of("cmoe", **fields).layer_spec(ffn, "here")
    assert sentence in str(error.value)


def test_experts_given_later_replace_the_size_of_the_recipe():
    assert moefy.Recipe.of("moefication").expert_size == 32
    assert moefy.Recipe.of("moefication", experts=6, active=2).expert_size is None


def test_layers_without_shared_neurons_come_back_from_the_native_kernel():
    model, feed = tiny.tiny("t5-v1.0"), tiny.inputs("t5-v1.0")
    moefy.convert(model, moefy.Recipe(construction="random", router="similarity", shared=0), [feed])
    before = tiny.output(model, feed)
    for moe in moe_layers(model).values():
        assert moe.weights().shared.up.shape == (0, tiny.WIDTH)
    assert torch.equal(tiny.output(model, feed), before)
