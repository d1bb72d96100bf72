"""The data that crosses module walls, and the shape letters used everywhere.

T tokens, D model width, F neurons of a dense FFN, S shared neurons, E routed experts, M neurons per
routed expert, K experts chosen per token. Weights are neuron-major: row n of every matrix belongs to
neuron n, so taking neurons is taking rows (`down` is the transpose of the usual `Linear` weight).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


class MoefyError(Exception):
    """A mistake of input, told in one sentence that says what is wrong and what to do."""


@dataclass(frozen=True)
class FFNWeights:
    """One dense FFN: `act(x·gateᵀ + b_g) * (x·upᵀ + b_u) · down + b_d`, or without the gate `act(x·upᵀ + b_u) · down + b_d`.

    up (F, D), down (F, D), gate (F, D) or None, gate_bias/up_bias (F,) or None, down_bias (D,) or None.
    `activation` is a name of transformers' ACT2FN; with `activate_up` the up branch of a gated FFN is
    activated too (Bamboo's dReLU: relu(gate) * relu(up)).
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "silu"
    activate_up: bool = False

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.shape != self.up.shape:
            raise ValueError(f"up and down must both be (F, D): {tuple(self.up.shape)}, {tuple(self.down.shape)}")
        if self.gate is not None and self.gate.shape != self.up.shape:
            raise ValueError(f"gate must be (F, D) like up: {tuple(self.gate.shape)}, {tuple(self.up.shape)}")
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

    def take(self, rows: Tensor) -> FFNWeights:
        """The same FFN restricted to some neurons; the output bias is left out."""
        return self._map(lambda name, t: None if name == "down_bias" else t[rows])

    def to(self, *args: object, **kwargs: object) -> FFNWeights:
        return self._map(lambda name, t: t.to(*args, **kwargs))

    def _map(self, change) -> FFNWeights:
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: change(n, t) for n, t in tensors.items() if isinstance(t, Tensor)})


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
