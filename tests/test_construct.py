"""Constructions: every one a permutation, CMoE's as published, balanced assignment at its optimum."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

import moefy
from moefy.construct import CONSTRUCTIONS, construct
from moefy.construct.activation import marker_distances
from moefy.construct.balanced import balanced_assignment
from moefy.routers.representative import representatives
from moefy.stats import NeuronStats, contributions


def make_stats(gated=True, tokens=200, neurons=48, width=16, activation="silu", bias=False, chunk=64, top=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    ffn = moefy.FFNWeights(
        up=torch.randn(neurons, width, generator=g),
        down=torch.randn(neurons, width, generator=g),
        gate=torch.randn(neurons, width, generator=g) if gated else None,
        up_bias=torch.randn(neurons, generator=g) if bias else None,
        down_bias=torch.randn(width, generator=g) if bias else None,
        activation=activation,
    )
    x = torch.randn(tokens, width, generator=g)
    return NeuronStats(ffn, lambda: iter(x.split(70)), chunk=chunk, top=top), x


def spec_of(stats, experts, shared, active=1, router=None):
    recipe = moefy.Recipe(experts=experts, shared=shared, active=active)
    return recipe.layer_spec(stats.ffn, "ffn")


@pytest.mark.parametrize("method", CONSTRUCTIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("experts", "shared"), [(6, 0), (6, 2), (48, 8), (1, 0), (4, 3)])
def test_every_construction_is_a_permutation_and_repeats(method, gated, experts, shared):
    stats, _ = make_stats(gated)
    spec = spec_of(stats, experts, shared)
    partition = construct(method, spec, stats, seed=3)
    assert partition.shared.shape == (spec.shared,)
    assert partition.experts.shape == (spec.experts, spec.expert_size)
    again = construct(method, spec, make_stats(gated)[0], seed=3)
    assert torch.equal(partition.experts, again.experts)
    assert torch.equal(partition.shared, again.shared)


def published_cmoe(x, ffn, experts, shared, top):
    """The algorithm of CMoE section 4.1 and its code, written plainly over dense (T, F) matrices."""

    def unit(rows):
        return rows / rows.norm(dim=1, keepdim=True)

    h = torch.nn.functional.silu(unit(x) @ unit(ffn.gate).t()) * (unit(x) @ unit(ffn.up).t())
    markers = torch.zeros_like(h)
    for t in range(len(h)):
        markers[t, h[t].abs().topk(top).indices] = 1
    rates = markers.sum(0) / len(h)
    size = len(rates) // experts
    shared_set = rates.topk(shared * size).indices
    rest = [n for n in range(len(rates)) if n not in set(shared_set.tolist())]
    routed = experts - shared
    seeds = [rest[i] for i in rates[rest].topk(routed).indices]
    cost = torch.cdist(markers[:, rest].t(), markers[:, seeds].t(), p=1)
    repeated = cost.repeat_interleave(size, dim=1).numpy()
    row, column = linear_sum_assignment(repeated)
    return shared_set, markers, rates, cost, float(repeated[row, column].sum())


@pytest.mark.parametrize(("experts", "shared"), [(6, 2), (8, 3), (12, 3)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cmoe_is_the_published_algorithm(experts, shared, seed):
    stats, x = make_stats(seed=seed)
    shared_set, markers, rates, cost, optimum = published_cmoe(x, stats.ffn, experts, shared, top=5)
    assert torch.equal(torch.cat(list(stats.marker_chunks())), markers)
    assert torch.equal(stats.rates, rates)
    partition = construct("activation", spec_of(stats, experts, shared), stats, seed=0)
    assert set(partition.shared.tolist()) == set(shared_set.tolist())

    members = partition.experts.flatten().sort().values
    seeds = members[rates[members].topk(experts - shared).indices]
    distances = marker_distances(stats, members, seeds)
    assert torch.equal(distances, cost)
    expert_of = {int(n): e for e, row in enumerate(partition.experts) for n in row}
    assert sum(distances[i, expert_of[int(n)]].item() for i, n in enumerate(members)) == optimum


def test_representative_is_the_nearest_to_the_mean_markers():
    stats, _ = make_stats()
    partition = construct("activation", spec_of(stats, 6, 2), stats, seed=0)
    markers = torch.cat(list(stats.marker_chunks())).double()
    for row, chosen in zip(partition.experts, representatives(partition, stats), strict=True):
        columns = markers[:, row]
        distance = (columns - columns.mean(1, keepdim=True)).abs().sum(0)
        assert distance[row.tolist().index(int(chosen))] <= distance.min() + 1e-9


@settings(max_examples=40, deadline=None)
@given(groups=st.integers(1, 6), size=st.integers(1, 8), seed=st.integers(0, 999), integral=st.booleans())
def test_balanced_assignment_is_optimal(groups, size, seed, integral):
    rng = np.random.default_rng(seed)
    items = groups * size
    cost = rng.integers(0, 5, (items, groups)).astype(float) if integral else rng.normal(size=(items, groups))
    assignment = balanced_assignment(torch.from_numpy(cost))
    assert torch.bincount(assignment, minlength=groups).tolist() == [size] * groups
    repeated = np.repeat(cost, size, axis=1)
    row, column = linear_sum_assignment(repeated)
    ours = cost[np.arange(items), assignment.numpy()].sum()
    assert abs(ours - repeated[row, column].sum()) <= 1e-9 * max(1.0, abs(ours))


def test_balanced_assignment_scales_to_real_layers():
    # No clock decides here: a method of cubic cost would not come back within the suite's patience.
    cost = torch.randint(0, 400, (8944, 13), generator=torch.Generator().manual_seed(0)).float()
    assert torch.bincount(balanced_assignment(cost)).tolist() == [688] * 13


def test_counts_that_do_not_divide_name_their_neighbours():
    stats, _ = make_stats()
    with pytest.raises(moefy.MoefyError, match=r"7 experts do not divide the 48 neurons of ffn; .* 4, 6, 8, 12"):
        spec_of(stats, 7, 2)


def test_statistics_do_not_depend_on_the_chunk():
    one, _ = make_stats(chunk=1000)
    many, _ = make_stats(chunk=7)
    assert torch.equal(one.markers, many.markers)
    assert one.tokens == many.tokens == 200


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("size", [4, 24])
def test_contributions_are_squared_norms_of_expert_outputs(gated, size):
    stats, x = make_stats(gated, activation="relu", bias=not gated)
    ffn, experts = stats.ffn, stats.ffn.neurons // size
    expected = torch.stack(
        [ffn.slice(e * size, (e + 1) * size).forward(x).square().sum(1) for e in range(experts)], dim=1
    )
    torch.testing.assert_close(contributions(ffn, experts, x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("budget", [0.25, 0.5, 0.75, 1.0])
def test_a_budget_counts_the_router(gated, budget):
    width, neurons = 64, 1536
    rows = torch.zeros(neurons, width)
    ffn = moefy.FFNWeights(up=rows, down=rows, gate=rows if gated else None)
    recipe = moefy.Recipe.of("reconstructed", budget=budget)
    spec, control = recipe.layer_spec(ffn, "ffn"), recipe.control().layer_spec(ffn, "ffn")
    cost = 3 if gated else 2
    routing = spec.experts / cost if spec.router and spec.top_k < spec.experts else 0
    active = spec.shared + spec.top_k * spec.expert_size + routing
    assert budget * neurons - 8 < active <= budget * neurons
    assert control.shared == budget * neurons
    assert control.top_k == 0


def test_a_budget_too_small_for_its_router_is_a_sentence():
    ffn = moefy.FFNWeights(up=torch.zeros(64, 8), down=torch.zeros(64, 8))
    with pytest.raises(moefy.MoefyError, match="leaves nothing for experts of 8 neurons"):
        moefy.Recipe.of("reconstructed", budget=0.13, allocation="uniform").layer_spec(ffn, "ffn")
