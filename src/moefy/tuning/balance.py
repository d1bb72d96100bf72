"""CMoE's gate scale and load-balancing bias while they are trained (arXiv 2502.04416).

An expert weighs 1 + softmax(scores)·u, with u from 0 by the loss's gradient. A bias b is added to the scores where
experts are chosen: after each step that of an expert that ran less often than the layer's mean rises by γ and that of
one that ran more often falls. The published γ of 0.001 counts in shares of a softmax over few experts; scores differ
in scale from layer to layer, so here γ counts in their standard deviations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from moefy import kernels
from moefy.moe import MoEFFN, moe_layers
from moefy.routers.linear import LinearRouter
from moefy.usage import usage


class Gates:
    """The gate scales and balances of one model's routers, from `set_gate` at 0 to `keep` or `discard`.

    `probes` are batches of model inputs to measure scores on, as many as it takes until every layer has had a token;
    `balance` is γ, 0 for no bias.
    """

    def __init__(self, model: Any, probes: Iterable[Mapping[str, Any]], gate_scale: bool, balance: float):
        self._layers = self._routed(model) if gate_scale or balance else {}
        self._before = {name: (moe.router.scale, moe.router.balance) for name, moe in self._layers.items()}  # type: ignore[union-attr]
        self._steps = {n: balance * s for n, s in _spreads(model, self._layers, probes).items()} if balance else {}
        for name, moe in self._layers.items():
            scale, bias = self._before[name]
            zeros = torch.zeros(moe.spec.experts, dtype=torch.float32, device=moe.weights().routed.up.device)
            moe.set_gate(zeros if gate_scale and scale is None else scale, zeros if balance and bias is None else bias)
            if gate_scale:
                moe.router.scale.requires_grad_()  # type: ignore[union-attr]
        self._counting = ExitStack()
        self._counted = self._counting.enter_context(usage(model)) if balance else {}

    @staticmethod
    def _routed(model: Any) -> dict[str, MoEFFN]:
        found = moe_layers(model).items()
        return {n: moe for n, moe in found if moe.router is not None and moe.routes}

    @classmethod
    def possible(cls, model: Any) -> bool:
        """Whether a layer routes."""
        return bool(cls._routed(model))

    @property
    def kept(self) -> dict[str, Tensor]:
        """The biases, which steps change and optimizers do not know."""
        return {name: self._layers[name].router.balance for name in self._steps}  # type: ignore[union-attr,misc]

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the biases by what ran since the last step."""
        for name, step in self._steps.items():
            counts = self._counted[name].counts
            self._layers[name].router.balance.add_(direction(counts) * step)  # type: ignore[union-attr]
            counts.zero_()

    @torch.no_grad()
    def keep(self) -> None:
        """End the training. A linear router takes the bias into its own, unless a gate scale needs the scores as they
        were."""
        self._counting.close()
        for moe in self._layers.values():
            router = moe.router
            assert router is not None
            if router.balance is not None and router.scale is None and isinstance(router, LinearRouter):
                router.bias.add_(router.balance)
                moe.set_gate(None, None)
            if router.scale is not None:
                router.scale.requires_grad_(False)

    def discard(self) -> None:
        """Put back what was there before."""
        self._counting.close()
        for name, moe in self._layers.items():
            moe.set_gate(*self._before[name])


def direction(counts: Tensor) -> Tensor:
    """1 where an expert ran less often than the mean of counts (E,), -1 where more often, 0 where as often."""
    return (counts.double().mean() - counts).sign().float()


@torch.no_grad()
def _spreads(model: Any, layers: Mapping[str, MoEFFN], probes: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The standard deviation of each layer's scores on the first batch of which it gets a token.

    In a mixture's experts that few tokens choose, that is not the first of all. Without any token a layer has no entry.
    """
    spreads: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, __: Any, scores: Tensor) -> None:
            if scores.numel():
                spreads.setdefault(name, float(scores.std()))

        return hook

    hooks = [moe.router.register_forward_hook(watch(name)) for name, moe in layers.items()]  # type: ignore[union-attr]
    try:
        with kernels.using("torch"):  # the native kernel scores by itself
            for probe in probes:
                model(**probe)
                if len(spreads) == len(layers):
                    break
    finally:
        for hook in hooks:
            hook.remove()
    return spreads
