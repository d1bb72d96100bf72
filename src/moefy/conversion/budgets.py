"""One budget for the whole model, divided over its layers by what they lose.

For each FFN `eliminate` gives the error that is left when a share of its neurons run and are refitted, and
`sensitivity` what that error costs the model. The sum of these predicted losses is minimised at a given mean
share; the shares of equal slope are found by bisection. The curve is that of the model without routing:
routing multiplies the errors by a factor that hardly depends on the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moefy.calibrate import real_tokens, spread
from moefy.construct.elimination import check_room, eliminate
from moefy.conversion.one_pass import Arrival, OnePass
from moefy.conversion.resume import Store, digest
from moefy.conversion.sensitivity import Metrics, output_metrics
from moefy.conversion.work import CURVE_BATCHES, METRIC_BATCHES, curve_work, measure_work, metric_work, tokens_in
from moefy.sites import Site, join_experts
from moefy.stats import NeuronStats
from moefy.types import FFNWeights

# Shares that a layer may get. Below a twelfth the predictions, which are of second order, mean nothing.
GRID = 401
LOWEST = 1 / 12
# A layer that would get more than this stays dense: what it saves is less than what its router costs.
DENSE = 0.97


@dataclass(frozen=True)
class Curve:
    """Predicted rise of the loss `loss` (GRID,) when 0 ... 1 of a layer's neurons run; its multiply-adds `size`.

    Both are for a token of the layers that most come by. A layer that fewer come by counts the less: an expert of a
    mixture, the decoder where answers are short, the last stages of a Swin.
    """

    loss: Tensor
    size: float

    def weighted(self, weight: float) -> Curve:
        """The curve of a layer that `weight` times as many tokens come by."""
        return Curve(self.loss.where(self.loss.isinf(), weight * self.loss), weight * self.size)


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of a dense model's FFNs, by name: the metric of an error, and the curve of the loss."""

    metrics: Metrics
    curves: dict[str, Curve]

    def predicted_loss(self, shares: Mapping[str, float]) -> float:
        """The sum of the layers' predicted losses at these shares and without routing: nats a token that most see."""
        return sum(float(curve.loss[round(shares[name] * (GRID - 1))]) for name, curve in self.curves.items())

    def fingerprint(self) -> str:
        """16 hexadecimal digits that follow from all of it."""
        curves = {f"curve.{n}.{curve.size!r}": curve.loss for n, curve in self.curves.items()}
        scales = {f"scale.{n}.{matrix}.{scale!r}": torch.empty(0) for n, (matrix, scale) in self.metrics.scales.items()}
        return digest({**self.metrics.matrices, **scales, **curves})


def measure(
    model: nn.Module,
    sites: Mapping[str, Site],
    batches: Sequence[Mapping[str, Any]],
    hold_bytes: int,
    chunk: int,
    progress: Callable[[int, int, str], None] | None = None,
    store: Store | None = None,
) -> Sensitivity:
    """Measure a dense model, which stays as it is, on a few of the calibration batches.

    `chunk` tokens are worked on at a time; `progress(done, total, name)` counts as `moefy.conversion.work` does. What
    is in `store`, of the same model and batches, is not measured again.
    """
    check_room(max(site.read().neurons for site in sites.values()))
    store = (store or Store(None)).below({"chunk": chunk})
    some, total = spread(batches, METRIC_BATCHES), measure_work(sites, batches)
    step = (lambda done: progress(metric_work(sites, some[:done]), total, "the loss")) if progress else None
    done, seen = metric_work(sites, some), tokens_in(spread(batches, CURVE_BATCHES))
    was_training = model.training
    model.eval()
    try:
        known = store.get("metrics")
        if known is None:
            found = output_metrics(model, sites, some, progress=step, hold_bytes=hold_bytes)
            known = store.put("metrics", found.matrices, {"scales": found.scales, "of_loss": found.of_loss})
        scales = {name: (matrix, scale) for name, (matrix, scale) in known[1]["scales"].items()}
        metrics = Metrics(known[0], scales, known[1]["of_loss"])
        curves: dict[str, Curve] = {}
        tokens: dict[str, int] = {}
        most = 1
        for arrival in OnePass(model, sites, spread(batches, CURVE_BATCHES), partial(real_tokens, model), hold_bytes):
            name = arrival.name
            if (known := store.get(f"curve.{name}")) is None:
                curve, count = _curve(sites[name].read().to(torch.float32), arrival, chunk, metrics.get(name))
                known = store.put(f"curve.{name}", {"loss": curve.loss}, {"size": curve.size, "tokens": count})
            curves[name], tokens[name] = Curve(known[0]["loss"], known[1]["size"]), known[1]["tokens"]
            most = max(most, tokens[name] // arrival.runs, arrival.layer_tokens)
            done += curve_work(sites[name], seen)
            if progress:
                progress(done, total, name)
    finally:
        join_experts(model)
        model.train(was_training)
    return Sensitivity(metrics, {name: curve.weighted(tokens[name] / most) for name, curve in curves.items()})


def _curve(ffn: FFNWeights, arrival: Arrival, chunk: int, metric: Tensor | None) -> tuple[Curve, int]:
    """The curve of one FFN, for a token of its own, and how many come by."""
    if not arrival.suffices:
        return _whole(ffn), arrival.tokens
    stats = NeuronStats(ffn, arrival.inputs, chunk, name=arrival.name, metric=metric)
    return _whole(ffn) if metric is None else loss_curve(stats), stats.tokens


def _whole(ffn: FFNWeights) -> Curve:
    """The curve of an FFN that cannot be measured, as of an expert that too few tokens choose: it stays as it is."""
    return Curve(torch.tensor([torch.inf] * (GRID - 1) + [0.0], dtype=torch.float64), ffn.multiply_adds)


def loss_curve(stats: NeuronStats) -> Curve:
    """The curve of one FFN from its dense inputs; nats a token if `stats.metric` is the Fisher information."""
    found, neurons = eliminate(stats), stats.ffn.neurons
    # With `kept` neurons the first F - kept are gone.
    cost = torch.cat([torch.zeros(1, dtype=torch.float64), found.cost]).flip(0)
    kept = torch.linspace(0, neurons, GRID, dtype=torch.float64)
    low = kept.floor().long().clamp_max(neurons - 1)
    loss = torch.lerp(cost[low], cost[low + 1], kept - low) / (2 * stats.gram[-1, -1])
    return Curve(loss, stats.ffn.multiply_adds)


def _filled(shares: Tensor, weights: Tensor, budget: float) -> Tensor:
    """Shares of `budget` on average, of which the smallest are raised to one level."""
    low, high = 0.0, 1.0
    for _ in range(60):
        level = (low + high) / 2
        low, high = (low, level) if float(weights @ shares.clamp_min(level)) > budget else (level, high)
    return shares.clamp_min(low)


def allocate(curves: Mapping[str, Curve], budget: float, least: Mapping[str, float] | None = None) -> dict[str, float]:
    """A share for each layer, `budget` on average over multiply-adds, at the least sum of predicted losses.

    No layer gets less than LOWEST and than its `least` (0 if not given), or than the budget if that is lower.
    """
    grid = torch.linspace(0, 1, GRID, dtype=torch.float64)
    floor = int(budget * (GRID - 1) + 1e-9) / (GRID - 1)  # the next share above would be more than the budget
    losses = torch.stack([curve.loss for curve in curves.values()])
    sizes = torch.tensor([curve.size for curve in curves.values()], dtype=torch.float64)
    weights = sizes / sizes.sum()
    lowest = [min(floor, max(LOWEST, (least or {}).get(name, 0.0))) for name in curves]
    losses = losses.masked_fill(grid < torch.tensor(lowest, dtype=torch.float64)[:, None], torch.inf)

    def shares(price: float) -> Tensor:
        found = grid[(losses + price * weights[:, None] * grid).argmin(1)]
        return found.where(found <= DENSE, 1.0)

    scale = float(losses[losses.isfinite()].max().clamp_min(1e-30))  # of what a share more can save
    low, high = 1e-15 * scale, 1e6 * scale
    needed = shares(low)
    if float(weights @ needed) <= budget:  # the rest saves nothing without routing, but routing can use it
        return dict(zip(curves, _filled(needed, weights, budget).tolist(), strict=True))
    for _ in range(100):
        price = (low * high) ** 0.5
        low, high = (price, high) if float(weights @ shares(price)) > budget else (low, price)
    return dict(zip(curves, shares(high).tolist(), strict=True))
