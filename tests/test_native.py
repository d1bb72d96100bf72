"""The native kernel against a float64 loop over experts, on every instruction set of the machine."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moefy.kernels import native

if not native.available() and os.environ.get("CI") and os.environ.get("MOEFY_NATIVE") != "0":
    pytest.fail(f"CI must have the native kernel: {native.why_not()}", pytrace=False)
pytestmark = pytest.mark.skipif(not native.available(), reason=f"no native kernel: {native.why_not()}")

ISAS = native.instruction_sets() or ["generic"]
ODD = [(1, 1, 0), (1, 17, 1), (3, 5, 2), (8, 16, 8), (9, 31, 33), (17, 130, 300), (300, 601, 0)]  # M, D, S
BATCHES = [0, 1, 2, 3, 5, 17, 64, 257]
REFERENCE = {
    "linear": lambda a: a,
    "relu": F.relu,
    "relu2": lambda a: F.relu(a) ** 2,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda a: a * torch.sigmoid(1.702 * a),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@dataclass
class Problem:
    """Random weights of one shape, and what the FFN of x must be, with the rounding error it may have."""

    E: int = 5
    M: int = 20
    D: int = 36
    S: int = 19
    activation: str = "silu"
    gated: bool = True
    bias: bool = True
    activate_up: bool = False
    precision: str = "fp32"
    isa: str = ISAS[-1]
    seed: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)
        self.generator = g

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g) / math.sqrt(max(1, shape[-1]))

        E, M, D, S = self.E, self.M, self.D, self.S
        for part, shape in (("experts_", (E, M, D)), ("shared_", (S, D))):
            for name in ("gate", "up", "down") if self.gated else ("up", "down"):
                self.weights[part + name] = random(*shape)
                if self.bias and name != "down":
                    self.weights[f"{part}{name}_bias"] = random(*shape[:-1])
        if self.bias:
            self.weights["down_bias"] = random(D)
        self.router = torch.randn(E, D, generator=g)
        self.packed = native.PackedFFN(
            **self.weights,
            activation=self.activation,
            activate_up=self.activate_up,
            precision=self.precision,
            isa=self.isa,
        )

    def x(self, T: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(T, self.D, generator=self.generator).to(dtype)

    def part(self, x: Tensor, weights: dict[str, Tensor], rounded: float) -> tuple[Tensor, Tensor]:
        """act(x·gate) * (x·up) · down of some neurons in float64, and a bound of the kernel's error."""
        eps = torch.finfo(torch.float32).eps

        def length(n: int) -> float:  # of a chain of n roundings: they partly cancel, 4 sigma
            return (4 * math.sqrt(n) + 16) * eps

        act = REFERENCE[self.activation]

        def branch(name: str, activated: bool) -> tuple[Tensor, Tensor]:
            w, b = weights[name], weights.get(name + "_bias", torch.zeros(1, dtype=torch.float64))
            a, error = x @ w.T + b, length(self.D) * (x.abs() @ w.T.abs() + b.abs())
            if not activated:
                return a, error
            slope = 2 * a.abs() + 1 if self.activation == "relu2" else 1.8
            return act(a), slope * error + 8 * eps * (act(a).abs() + error + eps)

        h, error = branch("up", not self.gated or self.activate_up)
        if self.gated:
            g, gate_error = branch("gate", True)
            error = error * g.abs() + gate_error * h.abs() + error * gate_error
            h = h * g
        error = error + (rounded + 4 * eps) * h.abs()
        down = weights["down"]
        return h @ down, error @ down.abs() + length(len(down)) * (h.abs() @ down.abs())

    def reference(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight (T, E): 0 where an expert is not chosen."""
        w = {k: v.double() for k, v in self.packed.unpack().items()}
        dot = self.isa == "avx512bf16" and self.precision == "bf16" and x.dtype == torch.bfloat16
        rounded = 2**-8 if dot else 0.0
        y = torch.zeros(len(x), self.D, dtype=torch.float64) + w.get("down_bias", 0)
        error = torch.zeros_like(y) + 1e-37  # the smallest normal numbers may be flushed
        for e in range(-1 if self.S else 0, self.E):
            part = "shared_" if e < 0 else "experts_"
            mine = {k.removeprefix(part): v if e < 0 else v[e] for k, v in w.items() if k.startswith(part)}
            more, uncertain = self.part(x.double(), mine, rounded)
            scale = 1 if e < 0 else weight[:, e : e + 1]
            y, error = y + scale * more, error + abs(scale) * uncertain
        length = (4 * math.sqrt(self.E * self.M + self.S) + 16) * torch.finfo(torch.float32).eps
        error = error * (1 + length) + length * y.abs()
        if x.dtype == torch.bfloat16:
            error = error + 2**-8 * y.abs()
        return y, error

    def check(self, x: Tensor, weight: Tensor, **routing: object) -> Tensor:
        y = self.packed.forward(x, **routing)
        expected, error = self.reference(x, weight)
        assert y.dtype == x.dtype
        assert y.shape == x.shape
        excess = ((y.double() - expected).abs() - error).amax() if y.numel() else 0
        assert excess <= 0, f"{excess} over the bound, largest value {expected.abs().amax()}"
        return y

    def choose(self, T: int, K: int) -> tuple[Tensor, Tensor]:
        """Random experts (T, K) and their weights (T, E)."""
        chosen = torch.rand(T, self.E, generator=self.generator).topk(K).indices
        return chosen, torch.zeros(T, self.E, dtype=torch.float64).scatter(1, chosen, 1.0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("gated", [True, False])
def test_batches(isa: str, precision: str, gated: bool) -> None:
    problem = Problem(E=7, M=24, D=68, S=40, gated=gated, precision=precision, isa=isa)
    for T in BATCHES:
        for dtype in (torch.float32, torch.bfloat16):
            chosen, weight = problem.choose(T, 3)
            problem.check(problem.x(T, dtype), weight, chosen=chosen)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("M", "D", "S"), ODD)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
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
    for name in native._ACTIVATIONS:
        ffn = native.PackedFFN(experts_up=one[None], experts_down=one[None], activation=name)
        y = ffn.forward(a[:, None], chosen=torch.zeros(len(a), 1))[:, 0]
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
    assert problem.packed.forward(torch.empty(4, 0), chosen=torch.zeros(4, 1)).shape == (4, 0)


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
    assert chosen[3].tolist() == [0, 4, 5, 6, 7]
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
def test_denormals(isa: str) -> None:
    for scale in (1e-39, 1e-30):
        problem = Problem(activation="relu", bias=False, isa=isa)
        chosen, weight = problem.choose(20, 2)
        problem.check(problem.x(20) * scale, weight, chosen=chosen)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_infinity_stay_in_their_token(isa: str) -> None:
    problem = Problem(E=8, isa=isa)
    x = problem.x(60)
    chosen, _ = problem.choose(60, 2)
    clean = problem.packed.forward(x, chosen=chosen)
    x[11, 3], x[40, 0] = math.nan, math.inf
    y = problem.packed.forward(x, chosen=chosen)
    others = [t for t in range(60) if t not in (11, 40)]
    assert torch.equal(y[others], clean[others])
    assert y[11].isnan().all()
    assert not y[40].isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_bits_do_not_depend_on_threads_or_batch(isa: str, precision: str) -> None:
    problem = Problem(E=12, M=20, D=200, S=300, precision=precision, isa=isa)
    routing = {"router": native.PackedRouter.linear(problem.router), "top_k": 5}
    before = torch.get_num_threads()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            x = problem.x(257, dtype)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(problem.packed.forward(x, **routing))
                parts = [problem.packed.forward(part, **routing) for part in x.split((1, 2, 5, 40, 209))]
                found.append(torch.cat(parts))
            assert all(torch.equal(y, found[0]) for y in found)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_more_tokens_than_a_tile(isa: str) -> None:
    problem = Problem(E=4, M=8, D=20, S=5, isa=isa)
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
        run = lambda: ffn.forward(x, chosen=torch.ones(99, 2))
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
        precision=one_of(native._WEIGHTS),
        isa=one_of(ISAS),
        seed=draw(0, 99),
    )
    T, K = draw(0, 70), draw(0, E)
    chosen, weight = problem.choose(T, K)
    problem.check(problem.x(T, one_of([torch.float32, torch.bfloat16])), weight, chosen=chosen)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_unpack(precision: str, source: torch.dtype) -> None:
    weights = {k: v.to(source) for k, v in Problem(E=3, M=11, D=37, S=10).weights.items()}
    found = native.PackedFFN(**weights, activation="silu", precision=precision).unpack()
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        if "bias" in name or precision == "fp32":
            assert torch.equal(found[name], tensor.float())
        elif precision == "bf16":
            assert torch.equal(found[name], tensor.bfloat16())
        else:
            step = tensor.float().abs().amax(-1, keepdim=True) / 127
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
        ({"chosen": torch.zeros(3, 1)}, "chosen must be"),
        ({"scores": torch.zeros(2, 4), "top_k": 1}, "scores"),
        ({"router": "wrong", "top_k": 1}, "router must be"),
        ({"scores": torch.zeros(2, 5), "top_k": 1, "gate_weights": torch.zeros(2, 1)}, "gate_weights"),
        ({"chosen": torch.zeros(2, 1), "expert_scale": torch.zeros(5)}, "expert_scale"),
        ({"scores": torch.zeros(2, 5), "top_k": 1, "counts": torch.zeros(5)}, "counts"),
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


def test_isa_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFY_ISA", "generic")
    assert native.default_isa() == "generic"
    monkeypatch.setenv("MOEFY_ISA", "mmx")
    with pytest.raises(ValueError, match="MOEFY_ISA=mmx"):
        native.default_isa()
