"""The native kernel against a float64 loop over experts, on every instruction set of the machine."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefy.errors import MoefyError
from moefy.kernels import native
from moefy.kernels.bank import WEIGHTS
from native_problem import ISAS, REFERENCE, Problem, needs_native

pytestmark = needs_native

ODD = [(1, 1, 0), (1, 17, 1), (3, 5, 2), (8, 16, 8), (9, 31, 33), (17, 130, 300), (300, 601, 0)]  # M, D, S
BATCHES = [0, 1, 2, 3, 5, 17, 64, 257]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", WEIGHTS)
@pytest.mark.parametrize("gated", [True, False])
def test_batches(isa: str, precision: str, gated: bool) -> None:
    problem = Problem(E=7, M=24, D=68, S=40, gated=gated, precision=precision, isa=isa)
    for T in BATCHES:
        for dtype in (torch.float32, torch.bfloat16):
            chosen, weight = problem.choose(T, 3)
            problem.check(problem.x(T, dtype), weight, chosen=chosen)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("M", "D", "S"), ODD)
@pytest.mark.parametrize("precision", WEIGHTS)
def test_odd_sizes(isa: str, M: int, D: int, S: int, precision: str) -> None:
    for gated in (True, False):
        problem = Problem(E=3, M=M, D=D, S=S, gated=gated, precision=precision, isa=isa)
        for T, dtype in ((1, torch.float32), (50, torch.float32), (13, torch.bfloat16)):
            chosen, weight = problem.choose(T, 2)
            problem.check(problem.x(T, dtype), weight, chosen=chosen)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", REFERENCE)
def test_activations(isa: str, activation: str) -> None:
    for gated, activate_up in ((False, False), (True, False), (True, True)):
        problem = Problem(activation=activation, gated=gated, activate_up=activate_up, isa=isa)
        chosen, weight = problem.choose(9, 2)
        for scale in (1e-3, 1.0, 30.0):
            problem.check(problem.x(9) * scale, weight, chosen=chosen)


def test_the_names_of_transformers() -> None:
    from transformers.activations import ACT2FN

    a = torch.linspace(-8, 8, 1001)
    one = torch.ones(1, 1)
    for name in native.ACTIVATIONS:
        ffn = native.PackedFFN(experts_up=one[None], experts_down=one[None], activation=name)
        y = ffn.forward(a[:, None], chosen=torch.zeros(len(a), 1, dtype=torch.int64))[:, 0]
        torch.testing.assert_close(y, ACT2FN[name](a), rtol=2e-6, atol=2e-6, msg=name)


@pytest.mark.parametrize("isa", ISAS)
def test_no_expert_all_experts_one_expert(isa: str) -> None:
    problem = Problem(E=6, isa=isa)
    T = 70
    x = problem.x(T)
    zeros, ones = torch.zeros(T, 6, dtype=torch.float64), torch.ones(T, 6, dtype=torch.float64)
    problem.check(x, zeros, chosen=torch.full((T, 4), -1))
    problem.check(x, zeros, top_k=0)
    problem.check(x, ones, chosen=torch.arange(6).expand(T, 6))
    problem.check(x, ones, router=native.PackedRouter.linear(problem.router), top_k=6)
    first = zeros.clone()
    first[:, 2] = 1
    problem.check(x, first, chosen=torch.full((T, 1), 2))
    only = zeros.clone()
    only[7] = 1
    chosen = torch.full((T, 6), -1)
    chosen[7] = torch.arange(6).flip(0)
    problem.check(x, only, chosen=chosen)


@pytest.mark.parametrize("isa", ISAS)
def test_shapes_without_experts_or_width(isa: str) -> None:
    Problem(E=0, isa=isa).check(Problem(E=0).x(3), torch.zeros(3, 0), top_k=2)
    Problem(E=0, S=0, isa=isa).check(Problem(E=0).x(3), torch.zeros(3, 0), top_k=2)
    problem = Problem(D=0, isa=isa)
    assert problem.packed.forward(torch.empty(4, 0), chosen=torch.zeros(4, 1, dtype=torch.int64)).shape == (4, 0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_nan_around_x(isa: str, precision: str, dtype: torch.dtype) -> None:
    for D in (32, 33):
        problem = Problem(D=D, precision=precision, isa=isa)
        chosen, weight = problem.choose(6, 2)
        forward = problem.packed.forward
        plain = problem.x(6, dtype)
        routing = {"router": native.PackedRouter.linear(problem.router), "top_k": 2}
        padded = torch.full((8, D + 9), math.nan, dtype=dtype)
        padded[1:-1, 5 : 5 + D] = plain
        spread = torch.full((6, 2 * D), math.nan, dtype=dtype)
        spread[:, ::2] = plain
        for x in (padded[1:-1, 5 : 5 + D], spread[:, ::2], plain.t().contiguous().t()):
            assert torch.equal(forward(x, **routing), forward(plain, **routing))
            assert torch.equal(problem.check(x, weight, chosen=chosen), forward(plain, chosen=chosen))
        row = plain[:1].expand(6, D)
        assert torch.equal(forward(row, **routing), forward(row.clone(), **routing))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_denormals(isa: str, precision: str) -> None:
    for scale in (1e-39, 1e-30):
        problem = Problem(activation="relu", bias=False, precision=precision, isa=isa)
        for T in (1, 20):
            chosen, weight = problem.choose(T, 2)
            problem.check(problem.x(T) * scale, weight, chosen=chosen)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("M", [8, 20])
@pytest.mark.parametrize("activation", ["silu", "relu"])
def test_nan_and_infinity_stay_in_their_token(isa: str, precision: str, M: int, activation: str) -> None:
    problem = Problem(E=8, M=M, activation=activation, precision=precision, isa=isa)
    x = problem.x(60)
    chosen, _ = problem.choose(60, 2)
    clean = problem.packed.forward(x, chosen=chosen)
    x[11, 3], x[40, 0] = math.nan, math.inf
    y = problem.packed.forward(x, chosen=chosen)
    others = [t for t in range(60) if t not in (11, 40)]
    assert torch.equal(y[others], clean[others])
    assert y[11].isnan().all()
    assert not y[40].isfinite().all()
    for t in (11, 40):
        alone = problem.packed.forward(x[t : t + 1], chosen=chosen[t : t + 1])
        assert torch.equal(alone.isfinite(), y[t : t + 1].isfinite())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", WEIGHTS)
def test_a_large_bias_does_not_swallow_small_contributions(isa: str, precision: str) -> None:
    S, D = 4096, 16
    none = torch.zeros(0, 8, D)
    shared = {"shared_up": torch.full((S, D), 1 / 16), "shared_down": torch.ones(S, D), "down_bias": torch.ones(D)}
    packed = native.PackedFFN(
        experts_up=none, experts_down=none, **shared, activation="linear", precision=precision, isa=isa
    )
    for tokens in (1, 40):  # each adds less than half of the last place of 1, all of them 1e-4
        y = packed.forward(torch.full((tokens, D), 2.5e-8))
        assert (y - (1 + S * 2.5e-8)).abs().max() < 1e-6


@pytest.mark.parametrize("isa", ISAS)
def test_large_and_infinite_inputs_of_bf16_weights(isa: str) -> None:
    """Where fp32 inputs become sums of bf16 values, none of them overflows and infinity stays infinity."""
    up = torch.tensor([[1.0, 0.5, 0.0], [1.0, 2.0, 0.0]])
    ffn = native.PackedFFN(experts_up=up[None], experts_down=up[None], activation="relu", precision="bf16", isa=isa)
    x = torch.tensor([[3.4e38, 0, 1], [math.inf, 0, 1], [-math.inf, 0, 1], [1 + 2**-23, 2**-100, 1]])
    want = torch.relu(x[:, :2] @ up[:, :2].T) @ up[:, :2]
    for T in (1, 4):
        y = torch.cat([ffn.forward(part, chosen=torch.zeros(len(part), 1).long()) for part in x.split(T)])
        assert torch.equal(y[:, :2], want)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", WEIGHTS)
@pytest.mark.parametrize("M", [1, 5, 8, 9, 16, 17, 24])
def test_one_token_of_many_small_experts(isa: str, precision: str, M: int) -> None:
    for gated in (True, False):
        problem = Problem(E=75, M=M, D=37, S=3, gated=gated, precision=precision, isa=isa)
        for K in (1, 9, 31, 50, 74, 75):
            chosen, weight = problem.choose(1, K)
            problem.check(problem.x(1), weight, chosen=chosen)
            chosen[0, ::3] = -1  # and places that are empty
            some = torch.zeros(1, 76, dtype=torch.float64).index_fill_(1, chosen[0] % 76, 1.0)[:, :75]
            problem.check(problem.x(1, torch.bfloat16), some, chosen=chosen)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("M", [8, 24])
def test_more_tokens_than_a_tile(isa: str, precision: str, M: int) -> None:
    problem = Problem(E=4, M=M, D=20, S=5, precision=precision, isa=isa)
    chosen, weight = problem.choose(2500, 2)
    problem.check(problem.x(2500), weight, chosen=chosen)


def test_two_python_threads_at_once() -> None:
    problems = [Problem(E=9, M=16, D=96, S=20, seed=s) for s in range(4)]
    inputs = [p.x(T) for p, T in zip(problems, (1, 40, 300, 7), strict=True)]
    routing = [{"router": native.PackedRouter.linear(p.router), "top_k": 3} for p in problems]
    expected = [p.packed.forward(x, **r) for p, x, r in zip(problems, inputs, routing, strict=True)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(problems[i].packed.forward(inputs[i], **routing[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_fork_after_use() -> None:
    script = """
        import os, sys, torch
        from moefy.kernels import native
        torch.set_num_threads(2)
        up, down, x = torch.randn(4, 16, 64), torch.randn(4, 16, 64), torch.randn(99, 64)
        ffn = native.PackedFFN(experts_up=up, experts_down=down, activation="relu")
        run = lambda: ffn.forward(x, chosen=torch.tensor([[1, 3]]).expand(99, 2))
        expected = run()
        child = os.fork()
        if child == 0:
            same = torch.equal(run(), expected)
            native.PackedFFN(experts_up=up, experts_down=down, activation="relu")
            os._exit(0 if same else 3)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.exit(status or not torch.equal(run(), expected))
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], check=True, timeout=60)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_drawn_shapes(data: st.DataObject) -> None:
    def draw(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    def one_of(values: object) -> object:
        return data.draw(st.sampled_from(list(values)))

    E = draw(0, 9)
    problem = Problem(
        E=E,
        M=draw(1, 40),
        D=draw(1, 70),
        S=draw(0, 40),
        gated=one_of([False, True]),
        bias=one_of([False, True]),
        activation=one_of(REFERENCE),
        precision=one_of(WEIGHTS),
        isa=one_of(ISAS),
        seed=draw(0, 99),
    )
    T, K = draw(0, 70), draw(0, E)
    chosen, weight = problem.choose(T, K)
    problem.check(problem.x(T, one_of([torch.float32, torch.bfloat16])), weight, chosen=chosen)


@pytest.mark.parametrize("precision", WEIGHTS)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_unpack(precision: str, source: torch.dtype) -> None:
    weights = {k: v.to(source) for k, v in Problem(E=3, M=11, D=37, S=10).weights.items()}
    found = native.PackedFFN(**weights, activation="silu", precision=precision).unpack()
    assert found.keys() == weights.keys()
    columns = (
        torch.cat([weights["experts_down"].flatten(0, 1), weights["shared_down"]]).double().pow(4).mean(0).pow(0.25)
    )
    for name, tensor in weights.items():
        if "bias" in name or precision == "fp32":
            assert torch.equal(found[name], tensor.float())
        elif precision in ("bf16", "fp16"):
            assert torch.equal(found[name], tensor.to({"bf16": torch.bfloat16, "fp16": torch.float16}[precision]))
        else:
            column = columns if "down" in name else 1
            step = (tensor.float().abs() / column).amax(-1, keepdim=True) * column / 127
            assert ((found[name] - tensor.float()).abs() <= step / 2 * 1.001).all()


def test_memory() -> None:
    problem = Problem(E=8, M=32, D=256, S=64)
    dense = 3 * (8 * 32 + 64) * 256 * 4
    assert dense <= problem.packed.nbytes <= 1.02 * dense
    assert Problem(E=8, M=32, D=256, S=64, precision="bf16").packed.nbytes <= 0.52 * dense


def test_half_precision_goes_through_fp32() -> None:
    problem = Problem()
    chosen, _ = problem.choose(5, 2)
    x = problem.x(5, torch.float16)
    y = problem.packed.forward(x, chosen=chosen)
    assert torch.equal(y, problem.packed.forward(x.float(), chosen=chosen).half())


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ({}, "experts come from"),
        ({"chosen": torch.full((2, 1), 5)}, "does not exist"),
        ({"chosen": torch.full((2, 1), 1.7)}, "integers"),
        ({"chosen": torch.ones(2, 5, dtype=torch.bool)}, "integers"),
        ({"chosen": torch.full((2, 1), 1), "top_k": 1}, "one of chosen, top_k and threshold"),
        ({"scores": torch.zeros(2, 5), "top_k": 1, "threshold": 0.0}, "one of chosen, top_k and threshold"),
        ({"scores": torch.zeros(2, 5), "top_k": None}, "none is given"),
        ({"scores": torch.zeros(2, 5), "top_k": -3}, "top_k must not be negative"),
        ({"scores": torch.zeros(2, 5), "top_k": None, "threshold": 0.0, "least": 3, "most": 2}, "least is more"),
        ({"chosen": torch.tensor([[1, -1, 2], [1, 2, 1]])}, "twice"),
        ({"chosen": torch.tensor([[1, -1, 2], [0, 2**32 + 1, 2]])}, "does not exist"),
        ({"chosen": torch.zeros(3, 1, dtype=torch.int64)}, "chosen must be"),
        ({"scores": torch.zeros(2, 4), "top_k": 1}, "scores"),
        ({"router": "wrong", "top_k": 1}, "router must be"),
        ({"scores": torch.zeros(2, 5), "top_k": 1, "gate_weights": torch.zeros(2, 1)}, "gate_weights"),
        ({"chosen": torch.zeros(2, 1, dtype=torch.int64), "expert_scale": torch.zeros(5)}, "expert_scale"),
        ({"scores": torch.zeros(2, 5), "top_k": 1, "counts": torch.zeros(5)}, "counts"),
        ({"scores": torch.zeros(2, 5), "top_k": 1, "phases": torch.zeros(5, dtype=torch.int64)}, "phases must be"),
    ],
)
def test_mistakes_are_told(routing: dict, message: str) -> None:
    problem = Problem()
    if routing.get("router") == "wrong":
        routing = routing | {"router": native.PackedRouter.linear(torch.zeros(5, 7))}
    if not routing or "chosen" not in routing:
        routing = {"top_k": 1} | routing
    with pytest.raises(ValueError, match=message):
        problem.packed.forward(torch.zeros(2, 36), **routing)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64])
def test_chosen_of_any_type(dtype: torch.dtype) -> None:
    problem, chosen = Problem(), torch.tensor([[0, 3], [2, 1]])
    x = torch.randn(2, 36)
    assert torch.equal(problem.packed.forward(x, chosen=chosen.to(dtype)), problem.packed.forward(x, chosen=chosen))
    with pytest.raises(ValueError, match="does not exist"):
        problem.packed.forward(x, chosen=torch.tensor([[0, 3], [2, 100]]).to(dtype))


def test_scores_as_a_negative_view() -> None:
    problem, x, scores = Problem(), torch.randn(2, 36), torch.randn(2, 5)
    expected = problem.packed.forward_with_chosen(x, scores=-scores, top_k=2)
    got = problem.packed.forward_with_chosen(x, scores=torch._neg_view(scores), top_k=2)
    assert all(map(torch.equal, got, expected))


def test_other_mistakes() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match="x must be"):
        problem.packed.forward(torch.zeros(2, 35), top_k=0)
    with pytest.raises(RuntimeError, match="gradients"):
        problem.packed.forward(torch.zeros(2, 36, requires_grad=True), top_k=0)
    with pytest.raises(ValueError, match="instruction set"):
        Problem(isa="mmx")
    with pytest.raises(ValueError, match="no native 'mish'"):
        Problem(activation="mish")
    assert not native.supports("mish")
    assert not native.supports("silu", device="meta")
    assert native.supports("silu", torch.bfloat16)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"experts_down": None}, "experts_down are needed"),  # and no crash in the call
        ({"shared_up": torch.zeros(7, 18)}, "shared_down are needed"),
        ({"shared_down": torch.zeros(7, 18)}, "shared_up and"),
        ({"shared_up_bias": torch.zeros(7)}, "shared_up and"),
        ({"shared_up": torch.zeros(18), "shared_down": torch.zeros(18)}, "shared_up must fit"),
        (
            {"shared_up": torch.zeros(7, 18), "shared_down": torch.zeros(7, 18), "shared_gate": torch.zeros(7, 18)},
            "both",
        ),
        ({"experts_down": torch.zeros(6, 18, 5)}, "experts_down must fit"),
        ({"experts_up_bias": torch.zeros(6, 6)}, "experts_up_bias must fit"),
        ({"experts_gate_bias": torch.zeros(6, 5)}, "needs experts_gate"),
        ({"experts_up": torch.zeros(6, 5, 18, device="meta")}, "with memory"),
        ({"experts_up": torch.zeros(6, 5, 18).to_sparse()}, "a dense tensor"),
        ({"experts_up": torch.zeros(6, 5, 18, dtype=torch.complex64)}, "of real numbers"),
        ({"down_bias": torch.zeros(18, device="meta")}, "with memory"),
    ],
)
def test_weights_that_do_not_belong_together(parts: dict, message: str) -> None:
    whole = {"experts_up": torch.zeros(6, 5, 18), "experts_down": torch.zeros(6, 5, 18)}
    with pytest.raises(ValueError, match=message):
        native.PackedFFN(**(whole | parts), activation="silu")


def test_isa_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFY_ISA", "generic")
    assert native.default_isa() == "generic"
    monkeypatch.setenv("MOEFY_ISA", "mmx")
    with pytest.raises(MoefyError, match="MOEFY_ISA=mmx"):
        native.default_isa()
