"""The data that crosses module walls, and the shape letters used everywhere.

T tokens, D model width, F neurons of a dense FFN, S shared neurons, E routed experts, M neurons per
routed expert, K experts chosen per token. Weights are neuron-major: row n of every matrix belongs to
neuron n, so taking neurons is taking rows (`down` is the transpose of the usual `Linear` weight).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from transformers.activations import ACT2FN

# Rows from which oneDNN's kernel is worth its call: below, products read weights and MKL is as good.
_MANY_ROWS = 64


def has_tangents() -> bool:
    """Whether tensors may have tangents (forward-mode differentiation), which our kernels and oneDNN do not know."""
    return getattr(forward_ad, "_current_level", -1) >= 0  # private to torch: without it, nothing is said


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: x (T, K) by weight (N, K) to (T, N); through oneDNN where that is likely to be faster.

    torch gives fp32 products to MKL, which reached 90 GFLOP/s on a core of an AMD Zen 5 where oneDNN reached 198.
    The operator is private to torch: without it, or with gradients, autocast or other types, this is `F.linear`.
    """
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.ndim == 2
    graded = has_tangents() or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    rounded = torch.is_autocast_enabled("cpu")  # which knows torch's own operators alone
    if not plain or graded or rounded or len(x) < _MANY_ROWS or not weight.numel():
        return F.linear(x, weight, bias)
    try:
        onednn = torch.ops.mkldnn._linear_pointwise
    except (AttributeError, RuntimeError):
        return F.linear(x, weight, bias)
    return onednn(x.contiguous(), weight.contiguous(), bias, "none", [], "")


def products(a: Tensor, b: Tensor) -> Tensor:
    """Sums over tokens aᵀb (M, N) of a (T, M) and b (T, N)."""
    return linear(a.t().contiguous(), b.t().contiguous())


@dataclass(frozen=True)
class FFNWeights:
    """One dense FFN: (act(x·gateᵀ + b_g) * (x·upᵀ + b_u)) · down + b_d; ungated: act(x·upᵀ + b_u) · down + b_d.

    up (F, D), down (F, D), gate (F, D) or None, gate_bias/up_bias (F,) or None, down_bias (D,) or None.
    `activation` is a name of transformers' ACT2FN and `activation_state` the learned parameters of the few
    that have any (prelu, xielu); with `activate_up` the up branch of a gated FFN is activated too
    (Bamboo's dReLU: relu(gate) * relu(up)).
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "silu"
    activate_up: bool = False
    activation_state: Mapping[str, Tensor] | None = None

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.shape != self.up.shape:
            raise ValueError(f"up and down must be (F, D): {tuple(self.up.shape)}, {tuple(self.down.shape)}")
        if self.gate is not None and self.gate.shape != self.up.shape:
            raise ValueError(f"gate must be like up: {tuple(self.gate.shape)}, {tuple(self.up.shape)}")
        neurons, width = self.up.shape
        for name, size in (("up_bias", neurons), ("gate_bias", neurons), ("down_bias", width)):
            bias = getattr(self, name)
            if bias is not None and bias.shape != (size,):
                raise ValueError(f"{name} must be ({size},): {tuple(bias.shape)}")
        if self.gate is None and (self.gate_bias is not None or self.activate_up):
            raise ValueError("gate_bias and activate_up need a gate")

    @property
    def neurons(self) -> int:
        return self.up.shape[0]

    @property
    def width(self) -> int:
        return self.up.shape[1]

    @property
    def matrices(self) -> int:
        return 2 if self.gate is None else 3

    @property
    def multiply_adds(self) -> int:
        """Of one token."""
        return self.neurons * self.width * self.matrices

    def act(self) -> nn.Module:
        """The activation as a module, with its learned parameters, if it has any, in their own type."""
        module = ACT2FN[self.activation]
        if self.activation_state:
            module.load_state_dict({name: t.clone() for name, t in self.activation_state.items()}, assign=True)
        return module.to(self.up.device).requires_grad_(False)

    def hidden(self, x: Tensor) -> Tensor:
        """Neuron activations (T, F) of inputs (T, D): what the down-projection is applied to."""
        act = self.act()
        up = linear(x, self.up, self.up_bias)
        if self.gate is None:
            return act(up)
        return act(linear(x, self.gate, self.gate_bias)) * (act(up) if self.activate_up else up)

    def forward(self, x: Tensor) -> Tensor:
        """The dense FFN's output (T, D)."""
        return self.forward_hidden(self.hidden(x))

    def forward_hidden(self, h: Tensor) -> Tensor:
        """The output (T, D) of given neuron activations (T, F)."""
        y = linear(h, self.down.t())
        return y if self.down_bias is None else y + self.down_bias

    def take(self, rows: Tensor) -> FFNWeights:
        """The same FFN restricted to some neurons; the output bias is left out."""
        return self._map(lambda name, t: None if name == "down_bias" else t[rows])

    def slice(self, start: int, stop: int) -> FFNWeights:
        """Neurons `start` to `stop` as views, without the output bias."""
        return self._map(lambda name, t: None if name == "down_bias" else t[start:stop])

    def to(self, *args: object, **kwargs: object) -> FFNWeights:
        return self._map(lambda name, t: t.to(*args, **kwargs))

    def _map(self, change) -> FFNWeights:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: change(n, t) for n, t in tensors.items() if isinstance(t, Tensor)})


@dataclass(frozen=True)
class MoEWeights:
    """An FFN cut into experts, as the kernels take it.

    `shared` holds the S neurons that every token runs; `routed` the E*M others, expert after expert;
    `bias` (D,) is added to every output once. Neither FFNWeights carries a down_bias of its own.
    """

    shared: FFNWeights
    routed: FFNWeights
    experts: int
    bias: Tensor | None = None

    @property
    def expert_size(self) -> int:
        return self.routed.neurons // self.experts if self.experts else 0


@dataclass(frozen=True)
class LayerSpec:
    """The shape of one converted FFN: enough to build it empty before its weights are loaded.

    Selection: the `top_k` experts with the highest scores; or, where `most` is not 0, those whose score is
    above the router's threshold, `top_k` of them on average and never more than `most`. With `gate_scale` the router
    has a number u for each expert that weights it by 1 + softmax(scores)·u; with `balance` one that is added to its
    score where experts are chosen (`moefy.tune`).
    """

    width: int
    shared: int
    experts: int
    expert_size: int
    top_k: int
    router: str | None
    activation: str
    gated: bool
    up_bias: bool = False
    gate_bias: bool = False
    down_bias: bool = False
    activate_up: bool = False
    most: int = 0
    gate_scale: bool = False
    balance: bool = False

    @property
    def neurons(self) -> int:
        return self.shared + self.experts * self.expert_size

    @property
    def matrices(self) -> int:
        return 3 if self.gated else 2

    @property
    def multiply_adds(self) -> int:
        """Of one token in the dense FFN."""
        return self.neurons * self.width * self.matrices

    def dense(self, down_bias: bool) -> LayerSpec:
        """The shape of the same FFN with nothing routed or left out."""
        return replace(
            self,
            shared=self.neurons,
            experts=0,
            expert_size=0,
            top_k=0,
            most=0,
            router=None,
            down_bias=down_bias,
        )


@dataclass(frozen=True)
class Partition:
    """A permutation of the neurons: `shared` (S,) always runs, `experts` (E, M) are routed; int64 indices."""

    shared: Tensor
    experts: Tensor

    def __post_init__(self) -> None:
        if self.shared.ndim != 1 or self.experts.ndim != 2:
            raise ValueError("shared must be (S,) and experts (E, M)")
        every = torch.cat([self.shared, self.experts.flatten()])
        if not torch.equal(every.sort().values, torch.arange(len(every), device=every.device)):
            raise ValueError("shared and experts together must hold every neuron once")

    @property
    def neurons(self) -> int:
        return len(self.shared) + self.experts.numel()


@dataclass
class Usage:
    """What one layer has run: `tokens`, and how often each expert (E,) int64."""

    counts: Tensor
    tokens: int = 0

    @property
    def experts_per_token(self) -> float:
        return float(self.counts.sum()) / max(1, self.tokens)
