"""What a router is: a small module that scores the experts of each token."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from moefy.kernels.native import PackedRouter
from moefy.stats import NeuronStats
from moefy.types import LayerSpec, MoEWeights, Partition


class Router(nn.Module, abc.ABC):
    """Scores (T, E) in float32 for inputs (T, D); the experts with the highest scores run.

    `__init__(spec)` makes the router empty, ready to be loaded; `build` fills it from the calibration.
    Where the layer selects by threshold, `threshold` () float32 holds it; `moefy.selection` sets it. `scale` (E,) is
    the gate scale u and `balance` (E,) the load-balancing bias, both float32, where the spec has them (`moefy.tune`).
    """

    #: False for a router that looks at the experts' outputs: an upper bound, with nothing saved.
    ships = True
    threshold: Tensor | None

    def __init__(self, spec: LayerSpec):
        super().__init__()
        self.spec = spec
        # A buffer: what shards parameters (FSDP2) takes none without dimensions.
        self.register_buffer("threshold", torch.empty((), dtype=torch.float32) if spec.most else None)
        self.scale = self._weight(spec.experts) if spec.gate_scale else None
        self.balance = self._weight(spec.experts) if spec.balance else None

    @classmethod
    @abc.abstractmethod
    def build(cls, spec: LayerSpec, partition: Partition, stats: NeuronStats, seed: int) -> Router:
        """A router for `partition`, made from the calibration."""

    @classmethod
    def build_without(
        cls, spec: LayerSpec, partition: Partition, stats: NeuronStats, parts: Sequence[int], seed: int
    ) -> dict[int, Router]:
        """Routers by the part of the calibration (see `NeuronStats.split_inputs`) that each is made without."""
        return {part: cls.build(spec, partition, stats.without(part), seed) for part in parts}

    @abc.abstractmethod
    def forward(self, x: Tensor, weights: MoEWeights | None) -> Tensor:
        """Scores (T, E), float32. Routers that ship do not look at `weights`."""

    def settings(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """`threshold`, `scale` and `balance`, also where accelerate brings a module's tensors for its own call only."""
        hook = getattr(self, "_hf_hook", None)
        if hook is None:
            return self.threshold, self.scale, self.balance
        hook.pre_forward(self)
        found = self.threshold, self.scale, self.balance
        hook.post_forward(self, None)
        return found

    def freeze(self) -> None:
        """Let no training change what decides: a hard choice gives it no gradient. A gate scale weighs and gets one."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name == "scale" and parameter.requires_grad)

    def packed(self) -> PackedRouter | None:
        """The router in the native kernel's form; None runs it in torch and hands its scores over."""
        return None

    def multiply_adds(self) -> int:
        """Multiply-adds a token: what the router costs. Those of its matrices, as in `planned_multiply_adds`."""
        if not self.ships:
            return self.planned_multiply_adds(self.spec)
        return sum(p.numel() for p in self.parameters() if p.ndim > 1)

    @classmethod
    def planned_multiply_adds(cls, spec: LayerSpec) -> int:
        """Multiply-adds a token of the matrices that a router of this kind will have in a layer of this shape.

        One that does not ship stands for one that would: it counts as a row of width D an expert.
        """
        if not cls.ships:
            return spec.experts * spec.width
        return sum(p.numel() for p in cls(spec).parameters() if p.ndim > 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """As every module's, but that `model.to(torch.bfloat16)` or `half()` leaves a router in float32."""

        def keep_float32(t: Tensor) -> Tensor:
            new = fn(t)
            narrows = new.is_floating_point() and new.dtype.itemsize < t.dtype.itemsize
            return t.to(new.device) if narrows else new

        return super()._apply(keep_float32, recurse)

    def _weight(self, *shape: int) -> nn.Parameter:
        # Always float32: half precision flips near ties between experts.
        return nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Routers decide in float32, as the native kernel does: bf16 changes the experts of some 1 % of the tokens."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
