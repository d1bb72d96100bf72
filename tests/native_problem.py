"""One random FFN in packed form, and what a float64 loop over its experts gives."""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moefy.kernels import native

# Without a compiler moefy runs on torch, and with one a kernel that was not built is a fault.
can_build = os.environ.get("CI") or shutil.which(os.environ.get("CXX", "c++"))
if not native.available() and "turned off" not in str(native.why_not()) and can_build:
    pytest.fail(f"The native kernel is missing: {native.why_not()}", pytrace=False)
needs_native = pytest.mark.skipif(not native.available(), reason=f"no native kernel: {native.why_not()}")

ISAS = native.instruction_sets() or ["generic"]
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


def middle(scores: Tensor) -> Tensor:
    """A threshold that half of the scores are above, and none is near enough for rounding to decide."""
    low, high = scores.flatten().sort().values[scores.numel() // 2 - 1 :][:2]
    return (low + high) / 2


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
        type_of_model = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.packed = native.PackedFFN(
            **{name: w.to(type_of_model) for name, w in self.weights.items()},
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
        dot = self.isa in ("avx512bf16", "amx") and self.precision == "bf16" and x.dtype == torch.bfloat16
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
