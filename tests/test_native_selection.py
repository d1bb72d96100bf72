"""What the native kernel chooses: top-k, thresholds, ties, NaN, and its routers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from moefy.kernels import native
from native_problem import ISAS, Problem, needs_native

pytestmark = needs_native


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("E", [1, 8, 15, 33, 128])
def test_top_k_is_that_of_torch(isa: str, E: int) -> None:
    problem = Problem(E=E, M=4, D=24, S=0, isa=isa)
    for T in (1, 65):
        x = problem.x(T)
        for K in {1, E // 3, E - 1, E, E + 2} - {0}:
            scores = x @ problem.router.T
            kept = min(K, E)
            counts = torch.zeros(E, dtype=torch.int64)
            y, chosen = problem.packed.forward_with_chosen(
                x, router=native.PackedRouter.linear(problem.router), top_k=K, counts=counts
            )
            assert torch.equal(chosen.long(), scores.topk(kept).indices.sort().values)
            assert torch.equal(counts, torch.bincount(chosen.flatten().long(), minlength=E))
            assert torch.equal(y, problem.packed.forward(x, scores=scores, top_k=K))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("T", [1, 17, 1100])  # the last is more than one tile of tokens
def test_phases_are_timed_and_change_nothing(isa: str, T: int) -> None:
    problem = Problem(isa=isa)
    x, router = problem.x(T), native.PackedRouter.linear(problem.router)
    phases = torch.zeros(len(native.PHASES), dtype=torch.int64)
    want = problem.packed.forward(x, router=router, top_k=2)
    assert torch.equal(problem.packed.forward(x, router=router, top_k=2, phases=phases), want)
    spent = dict(zip(native.PHASES, phases.tolist(), strict=True))
    assert all(spent[phase] > 0 for phase in ("score", "select", "sort", "up", "down")), spent
    before = phases.clone()
    problem.packed.forward(x, scores=x @ problem.router.T, top_k=2, phases=phases)
    assert phases[native.PHASES.index("score")] == before[native.PHASES.index("score")]
    assert phases[-1] > before[-1]  # added to, not set


@pytest.mark.parametrize("isa", ISAS)
def test_ties_and_values_without_order(isa: str) -> None:
    problem = Problem(E=40, M=2, D=8, isa=isa)
    x = problem.x(4)
    nan, inf = math.nan, math.inf
    scores = torch.zeros(4, 40)
    scores[1] = nan
    scores[2, ::2], scores[2, 1::2] = nan, torch.arange(20.0)
    scores[3, :4] = torch.tensor([inf, -inf, -0.0, nan])
    _, chosen = problem.packed.forward_with_chosen(x, scores=scores, top_k=5)
    assert chosen[0].tolist() == [0, 1, 2, 3, 4]
    assert chosen[1].tolist() == [0, 1, 2, 3, 4]
    assert chosen[2].tolist() == [31, 33, 35, 37, 39]
    assert chosen[3].tolist() == [0, 2, 4, 5, 6]  # -0 is 0
    _, chosen = problem.packed.forward_with_chosen(x, scores=scores, threshold=0.0, most=7)
    assert (chosen[:2] == -1).all()
    assert chosen[2].tolist() == [27, 29, 31, 33, 35, 37, 39]
    assert chosen[3].tolist() == [0, -1, -1, -1, -1, -1, -1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("least", "most"), [(0, None), (2, 5), (4, 4), (0, 0)])
def test_threshold(isa: str, least: int, most: int | None) -> None:
    problem = Problem(E=12, M=4, isa=isa)
    x = problem.x(90)
    scores = x.double() @ problem.router.double().T
    rank = scores.argsort(1, descending=True).argsort(1)
    wanted = ((scores > 1.5) | (rank < least)) & (rank < (12 if most is None else most))
    router = native.PackedRouter.linear(problem.router)
    routing = {"router": router, "threshold": 1.5, "least": least, "most": most}
    problem.check(x, wanted.double(), **routing)
    _, chosen = problem.packed.forward_with_chosen(x, **routing)
    found = torch.zeros(90, 13, dtype=torch.bool).scatter(1, chosen.long() % 13, True)[:, :12]  # -1 % 13 = 12
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gated", [True, False])
def test_representative_router_and_gate_scale(isa: str, gated: bool) -> None:
    problem = Problem(E=21, M=4, gated=gated, isa=isa)
    up = problem.weights["experts_up"][:, 0]
    gate = problem.weights["experts_gate"][:, 0] if gated else up
    router = native.PackedRouter.representative(up, gate if gated else None, activation="silu")
    scale = torch.randn(21, generator=problem.generator)
    for T in (1, 80):
        x = problem.x(T)
        a = x.double() @ up.double().T
        scores = (F.silu(x.double() @ gate.double().T) * a if gated else F.silu(a)).abs()
        chosen = torch.zeros(T, 21, dtype=torch.float64).scatter(1, scores.topk(4).indices, 1.0)
        problem.check(x, chosen, router=router, top_k=4)
        weight = chosen * (1 + scores.softmax(1) * scale)
        problem.check(x, weight, router=router, top_k=4, expert_scale=scale)


@pytest.mark.parametrize("isa", ISAS)
def test_linear_router_with_bias_and_gate_weights(isa: str) -> None:
    problem = Problem(E=10, isa=isa)
    x, bias = problem.x(33), torch.arange(10.0)
    router = native.PackedRouter.linear(problem.router, bias)
    _, chosen = problem.packed.forward_with_chosen(x, router=router, top_k=3)
    best = (x.double() @ problem.router.double().T + bias).topk(3).indices
    assert torch.equal(chosen.long(), best.sort().values)
    chosen = best.clone()
    chosen[3, 1] = -5
    weights = torch.rand(33, 3, generator=problem.generator)
    dense = torch.zeros(33, 11, dtype=torch.float64).scatter(1, chosen.clamp(min=-1) % 11, weights.double())
    problem.check(x, dense[:, :10], chosen=chosen, gate_weights=weights)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("E", "D"), [(1, 3), (9, 37), (20, 66), (130, 200), (8, 1)])
def test_scores_of_bf16_inputs_are_as_exact_as_fp32(isa: str, gated: bool, E: int, D: int) -> None:
    """Routers are fp32 whatever the experts are: the chosen ones are the best but for rounding errors of fp32."""
    problem = Problem(E=E, M=8, D=D, S=0, precision="bf16", isa=isa)
    gate, up = torch.randn(2, E, D, generator=problem.generator) / D**0.5
    if gated:
        router = native.PackedRouter.representative(up, gate, activation="silu")
    else:
        bias = torch.randn(E, generator=problem.generator)
        router = native.PackedRouter.linear(up, bias)
    K = (E + 1) // 2
    for T in (1, 2, 17, 129):
        x = problem.x(T, torch.bfloat16)
        a, g = x.double() @ up.double().T, x.double() @ gate.double().T
        scores = (F.silu(g) * a).abs() if gated else a + bias
        _, chosen = problem.packed.forward_with_chosen(x, router=router, top_k=K)
        taken = torch.zeros(T, E, dtype=torch.bool).scatter(1, chosen.long(), True)
        assert (taken.sum(1) == K).all()
        worst = scores.masked_fill(~taken, math.inf).amin(1)
        best_left = scores.masked_fill(taken, -math.inf).amax(1)
        assert (best_left <= worst + 1e-5).all()


@pytest.mark.parametrize("isa", ISAS)
def test_infinite_router_weights_and_bf16_inputs(isa: str) -> None:
    problem = Problem(E=3, M=8, D=4, S=0, precision="bf16", isa=isa)
    router = native.PackedRouter.linear(torch.tensor([[1.0, 0, 0, 0], [math.inf, 0, 0, 0], [-math.inf, 0, 0, 0]]))
    x = torch.tensor([[1.0, 0, 0, 1], [-1.0, 0, 0, 1]], dtype=torch.bfloat16)
    for part in (x, x[:1], x[1:]):
        _, chosen = problem.packed.forward_with_chosen(part, router=router, top_k=1)
        assert chosen[:, 0].tolist() == [1 if row[0] > 0 else 2 for row in part]
