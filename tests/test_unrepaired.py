"""What losing neurons or an expert costs after repair, and the router that decides by it."""

from dataclasses import replace

import pytest
import torch

import moefy
from moefy.construct import construct
from moefy.construct.elimination import eliminate
from moefy.routers import ROUTERS
from moefy.stats import NeuronStats, contributions, unrepaired
from moefy.types import linear, products
from test_construct import make_stats, spec_of


@pytest.mark.parametrize("metric", [False, True])
def test_what_is_left_of_a_contribution_is_that_of_a_regression(metric):
    stats, x = make_stats(activation="gelu", tokens=900)
    root = torch.randn(stats.ffn.width, stats.ffn.width)
    if metric:
        stats = NeuronStats(stats.ffn, stats.batches, metric=root @ root.t())
    partition = construct("weights", spec_of(stats, 6, 3), stats, 0)
    found = unrepaired(stats, partition)(stats.ffn.hidden(x))
    h, weight = stats.ffn.hidden(x).double(), stats.token_weight(stats.ffn.forward(x)).double().sqrt()[:, None]
    known = torch.cat([h[:, partition.shared], torch.ones(len(x), 1)], dim=1)
    for e, rows in enumerate(partition.experts):
        fit = torch.linalg.lstsq(known * weight, h[:, rows] * weight).solution
        out = (h[:, rows] - known @ fit) @ stats.ffn.down[rows].double()
        cost = ((out @ stats.metric.double()) * out).sum(1) if metric else out.square().sum(1)
        # A ridge of 1e-3 keeps the projection solvable.
        torch.testing.assert_close(found[:, e].double().mean(), cost.mean(), rtol=0.02, atol=0)


def test_neurons_that_the_shared_ones_predict_cost_nothing():
    stats, x = make_stats(activation="gelu", tokens=600)
    ffn, half = stats.ffn, stats.ffn.neurons // 2
    twins = moefy.FFNWeights(up=ffn.up[:half].repeat(2, 1), gate=ffn.gate[:half].repeat(2, 1), down=ffn.down)
    stats = NeuronStats(twins, stats.batches)
    partition = moefy.Partition(torch.arange(half), torch.arange(half, 2 * half).view(4, -1))
    cost = unrepaired(stats, partition)(twins.hidden(x)).mean()
    assert cost < 1e-4 * contributions(twins.take(partition.experts.flatten()), 4, x).mean()


def test_the_logistic_router_loses_far_less_than_chance():
    """What is lost by its choice, on tokens it was not fitted to; ridge is as good on such random FFNs."""
    stats, x = make_stats(activation="relu", tokens=6000, neurons=64, width=16)
    spec = spec_of(stats, 16, 4, active=4, router=None)
    partition = construct("weights", spec, stats, 0)
    cost = unrepaired(stats, partition)(stats.ffn.hidden(x))
    held = torch.cat([mask for _, mask in stats.split_inputs()])
    lost = {}
    for name in ("random", "linear", "logistic"):
        scores = ROUTERS[name].build(spec, partition, stats, 0)(x, None)
        skipped = cost.scatter(1, scores.topk(spec.top_k, dim=1).indices, 0.0)
        lost[name] = float(skipped[held].sum() / cost[held].sum())
    assert lost["logistic"] < 0.6 * lost["random"]
    assert lost["logistic"] < 1.1 * lost["linear"]


SIZES = [(64, 3, 5), (65, 17, 1), (300, 48, 33), (5, 7, 9), (0, 4, 4), (80, 0, 3), (80, 4, 0)]


@pytest.mark.parametrize(("tokens", "k", "n"), SIZES)
def test_products_are_those_of_torch(tokens, k, n):
    x, w, b = torch.randn(tokens, k), torch.randn(n, k), torch.randn(n)
    torch.testing.assert_close(linear(x, w, b), torch.nn.functional.linear(x, w, b))
    torch.testing.assert_close(linear(x[:, ::2], w[:, ::2]), x[:, ::2] @ w[:, ::2].t())
    torch.testing.assert_close(linear(x.double(), w.double()), x.double() @ w.double().t())
    if tokens:
        torch.testing.assert_close(products(x, x), x.t() @ x, rtol=1e-4, atol=1e-4)
    grad = w.clone().requires_grad_()
    linear(x, grad).sum().backward()
    torch.testing.assert_close(grad.grad, x.sum(0).expand(n, -1))


@pytest.mark.parametrize("held", [1 << 30, 0])
def test_activations_are_the_same_whether_they_are_held_or_computed_again(held, monkeypatch):
    monkeypatch.setattr("moefy.stats.KEPT_BYTES", held)
    stats, x = make_stats(activation="gelu", tokens=900)
    first = stats.activations()
    next(first)  # another loop is under way
    assert sum(len(x) for x, _, _ in stats.activations()) == 900
    assert sum(len(x) for x, _, _ in first) + 64 == 900
    for _ in range(2):
        found = [torch.cat(parts) for parts in zip(*stats.activations(), strict=True)]
        for tensor, wanted in zip(found, (x, stats.ffn.hidden(x), stats.ffn.forward(x)), strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=1e-4, atol=1e-4)
    held_out = torch.cat([held for _, held in stats.split_inputs()])
    assert torch.equal(held_out, torch.cat([held for *_, held in stats.split_activations()]))
    assert bool(stats._kept) == (held > 0)


def test_the_order_and_the_costs_do_not_depend_on_the_units_of_activations():
    stats, x = make_stats(activation="relu")
    size = 10 ** (torch.rand(stats.ffn.neurons, generator=torch.Generator().manual_seed(0)) * 8 - 4)
    other = replace(stats.ffn, up=stats.ffn.up * size[:, None], down=stats.ffn.down / size[:, None])
    expected, found = eliminate(stats), eliminate(NeuronStats(other, lambda: iter([x])))
    assert torch.equal(found.order, expected.order)
    torch.testing.assert_close(found.cost, expected.cost, rtol=0.02, atol=0)
