"""The pipeline, in the order it runs. Read this first.

One forward pass over the calibration converts the model: at each FFN the batches wait, the FFN is read,
measured, cut, given a router and mounted, and the pass goes on through the converted layer.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy import kernels, slim
from moefy.budgets import Sensitivity, allocate, measure, measure_work
from moefy.calibrate import CalibrationInfo, check_batches, real_tokens
from moefy.construct import construct
from moefy.construct.sharing import SHARING
from moefy.hf import mark_converted
from moefy.moe import MoEFFN, moe_layers
from moefy.one_pass import Arrival, OnePass
from moefy.quality import Routing, RoutingTally, routes
from moefy.recipe import Recipe
from moefy.reconstruct import refit
from moefy.residuals import find_residuals
from moefy.routers import ROUTERS
from moefy.selection import held_out_parts, set_threshold
from moefy.sites import ExpertSite, Site, find_sites, join_experts
from moefy.stats import NeuronStats, overflow
from moefy.types import FFNWeights, LayerSpec, MoefyError, Partition

Progress = Callable[[int, int, str], None]
# Work of converting a layer, a batch, over that of measuring it: 5 with SmolLM2's widths and 12 windows of 512 tokens,
# 7 to 18 with narrower layers, and less with wider ones, where the elimination is most of both.
LAYER_WORK = 4
# Tokens on which a layer's error is measured: the mean over 2,048 is within 1 % of that over 16k.
ERROR_TOKENS = 2048


@dataclass(frozen=True)
class LayerReport:
    """One converted FFN. `error` is ‖dense - converted‖² / ‖dense‖² on calibration tokens, its own inputs.

    `share` of its layer's tokens came by: 1, but for the experts of a model that is a mixture already. `mass` is the
    share of the activation mass that the chosen experts hold there and `overlap` the share of MoEfication's ground
    truth that is chosen (both None if nothing is routed); `seconds` is what it all took.
    """

    name: str
    neurons: int
    shared: int
    experts: int
    expert_size: int
    top_k: int
    active_fraction: float
    error: float
    share: float = 1.0
    mass: float | None = None
    overlap: float | None = None
    seconds: float = 0.0


@dataclass
class Report:
    """What a conversion did. Seconds and memory are of this run and are not stored with the checkpoint.

    `predicted_loss` is the rise of the loss, in nats a token, that the budgets were chosen by (None if they
    were not): that of the model without routing.
    """

    recipe: Recipe
    calibration: CalibrationInfo
    layers: list[LayerReport] = field(default_factory=list)
    predicted_loss: float | None = None
    seconds: float = 0.0
    peak_bytes: int = 0

    @property
    def active_fraction(self) -> float:
        """Multiply-adds of the FFNs over the dense ones, routers included, over the whole model."""
        total = sum(layer.neurons * layer.share for layer in self.layers)
        return sum(layer.active_fraction * layer.neurons * layer.share for layer in self.layers) / total

    def stored(self) -> dict[str, Any]:
        """The part that a given recipe, source and calibration determine."""
        return {
            "recipe": self.recipe.model_dump(),
            "calibration": asdict(self.calibration),
            "active_fraction": self.active_fraction,
            "predicted_loss": self.predicted_loss,
            "active": {layer.name: layer.active_fraction for layer in self.layers},
            "errors": {layer.name: layer.error for layer in self.layers},
        }


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """Statistics, routers and refits are made in float32, whatever the caller makes models in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@_float32_by_default()
@torch.inference_mode(False)  # parameters made in that mode could not be trained, and sensitivities need gradients
@torch.no_grad()
def convert(
    model: nn.Module,
    recipe: Recipe | str | Path | dict[str, Any],
    calibration: Iterable[Mapping[str, Any]],
    *,
    hold_bytes: int = 1 << 30,
    progress: Progress | None = None,
    sensitivity: Sensitivity | None = None,
) -> Report:
    """Convert every FFN of a transformers model to a mixture of experts, in place.

    `calibration` iterates over model inputs (dicts of tensors). `hold_bytes` bounds the memory for
    activations between layers; what is beyond goes to a temporary directory. `progress(done, total,
    name)` is called after each FFN; it counts work, of which a layer is LAYER_WORK a batch. `sensitivity` saves
    measuring again what a recipe that allocates its budget needs (`moefy.budgets.measure`). Raises MoefyError,
    before anything is changed where that can be known, if the model, the recipe and the calibration do not fit. If
    it ends early, the layers that were done stay converted: load the model again.
    """
    start = time.perf_counter()
    recipe, batches = Recipe.of(recipe), check_batches(calibration)
    check_dense(model)
    sites = {site.entry_name: site for site in find_sites(model)}
    recipe = recipe.fitting(site.read().neurons for site in sites.values())
    specs = {name: _checked_specs(site, recipe) for name, site in sites.items()}
    if recipe.slim:
        slim.config_sizes(model, {name: spec for name, (spec,) in specs.items()})  # refused now, not when it is saved
    report = Report(recipe, CalibrationInfo.of(batches))
    planned = recipe.allocation == "sensitivity"
    before = measure_work(sites, batches) if planned and sensitivity is None else 0
    work = LAYER_WORK * len(batches)
    was_training = model.training
    model.eval()
    try:
        if planned:
            step = (lambda i, of, name: progress(i, of + work * len(sites), f"measuring {name}")) if progress else None
            sensitivity = sensitivity or measure(model, sites, batches, hold_bytes, recipe.chunk_tokens, step)
            shares = planned_shares(sites, recipe, sensitivity)
            specs = planned_specs(sites, recipe, shares)
            report.predicted_loss = sensitivity.predicted_loss(shares)
        metrics = sensitivity.metrics if planned and sensitivity else {}
        # Experts are weighted before their sum is added to the stream.
        alone = {name: site for name, site in sites.items() if not isinstance(site, ExpertSite)}
        residuals = find_residuals(model, alone, batches[0]) if recipe.repair else {}
        for arrival in OnePass(model, sites, batches, real_tokens, hold_bytes, residuals):
            name, seed = arrival.name, recipe.seed + len(report.layers)
            report.layers.append(_convert_site(sites[name], specs[name], recipe, arrival, seed, metrics.get(name)))
            if progress:
                progress(before + work * len(report.layers), before + work * len(sites), name)
    except BaseException:
        for name, site in sites.items():  # no names of half a layer: transformers may take them for its own
            if isinstance(site, ExpertSite) and site.left_over:
                _mount_whole(site, site.read(), specs[name][0])
        # A model of which some FFNs are converted says so: it cannot be converted once more, and it can be saved.
        if moe_layers(model) and isinstance(model, PreTrainedModel):
            _mark(model, report)
        raise
    finally:
        join_experts(model)  # of layers that it did not come to
        for moe in moe_layers(model).values():
            moe.unpack()  # parameters are there for whoever counts, averages or wraps them
        model.train(was_training)
    _mark(model, report)
    report.seconds, report.peak_bytes = time.perf_counter() - start, peak_memory()
    return report


def _mark(model: Any, report: Report) -> None:
    mark_converted(model, {name: moe.spec for name, moe in moe_layers(model).items()}, report.stored())


def check_dense(model: nn.Module) -> None:
    """MoefyError if moefy has converted the model already, or if it has adapters."""
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise MoefyError("This model has adapters of peft; merge them into its weights first: merge_and_unload().")
    if getattr(model.config, "moefy", None):
        raise MoefyError("This model is converted already, if only in part; start from the dense model it came from.")


def planned_shares(sites: Mapping[str, Site], recipe: Recipe, found: Sensitivity) -> dict[str, float]:
    """The recipe's budget divided over the FFNs, by name."""
    assert recipe.budget is not None
    least = {name: recipe.least_share(site.read().neurons) for name, site in sites.items()}
    return allocate(found.curves, recipe.budget, least)


def planned_specs(
    sites: Mapping[str, Site], recipe: Recipe, shares: Mapping[str, float] | None = None
) -> dict[str, list[LayerSpec]]:
    """The shapes that each FFN may get, by name, at its own share of the budget if `shares` gives one.

    MoefyError if the recipe fits one of them not.
    """
    shares = shares or {}
    return {name: recipe.layer_specs(site.read(), name, shares.get(name)) for name, site in sites.items()}


def _checked_specs(site: Site, recipe: Recipe) -> list[LayerSpec]:
    ffn = site.read()
    for part in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
        tensor = getattr(ffn, part)
        if tensor is not None and not tensor.isfinite().all():
            raise MoefyError(f"The weights of {site.name} ({part}) hold NaN or infinite values; the model is broken.")
    return recipe.layer_specs(ffn, site.name)


def _convert_site(
    site: Site,
    specs: list[LayerSpec],
    recipe: Recipe,
    arrival: Arrival,
    seed: int,
    metric: Tensor | None,
) -> LayerReport:
    start, ffn, inputs = time.perf_counter(), site.read(), arrival.inputs
    if not arrival.suffices:
        return _kept_dense(site, ffn, specs[0], arrival)
    stats = NeuronStats(
        ffn.to(torch.float32), inputs, recipe.chunk_tokens, recipe.top_activated, site.name, metric, arrival.targets
    )
    if stats.tokens < 2:
        raise MoefyError(f"The calibration has {stats.tokens} real tokens at {site.name}; give more text.")
    scores = SHARING[recipe.sharing](stats) if any(spec.shared for spec in specs) else None
    built = [_build(ffn, spec, recipe, stats, scores, seed) for spec in specs]
    stats.forget_gram()  # the refit has two of its own
    moe = min(built, key=lambda moe: _refit(moe, recipe, stats))
    spec = moe.spec
    error, routing = _measure(moe, ffn, inputs)
    if not math.isfinite(error):
        raise MoefyError(overflow(site.name))
    # One token now, outside every batch: what packing the weights keeps must not count as a batch's own to spill.
    moe(next(inputs())[:1])
    site.mount(moe)
    return LayerReport(
        name=site.entry_name,
        neurons=spec.neurons,
        shared=spec.shared,
        experts=spec.experts,
        expert_size=spec.expert_size,
        top_k=spec.top_k,
        active_fraction=moe.active_fraction(),
        error=error,
        share=arrival.share,
        mass=routing.mass if routing else None,
        overlap=routing.overlap if routing else None,
        seconds=time.perf_counter() - start,
    )


def _kept_dense(site: Site, ffn: FFNWeights, spec: LayerSpec, arrival: Arrival) -> LayerReport:
    """An expert of a mixture that too few tokens choose to measure it: all of its neurons always run."""
    _mount_whole(site, ffn, spec)
    return LayerReport(site.entry_name, ffn.neurons, ffn.neurons, 0, 0, 0, 1.0, 0.0, arrival.share)


def _mount_whole(site: Site, ffn: FFNWeights, spec: LayerSpec) -> None:
    every = torch.arange(ffn.neurons)
    partition = Partition(every, every.new_empty(0, 0))
    moe = MoEFFN.from_dense(ffn, partition, spec.dense(ffn.down_bias is not None), None)
    site.mount(moe.requires_grad_(False))


def _build(
    ffn: FFNWeights, spec: LayerSpec, recipe: Recipe, stats: NeuronStats, scores: Tensor | None, seed: int
) -> MoEFFN:
    """An FFN of one shape with its router and threshold, before any refit."""
    partition = construct(recipe.construction, spec, stats, seed, recipe.sharing, scores)
    router, routers = None, {}
    if spec.router and spec.most:
        parts = held_out_parts(stats)
        routers = ROUTERS[spec.router].build_without(spec, partition, stats, parts, seed)
        router = routers[parts[0]]
    elif spec.router:
        router = ROUTERS[spec.router].build(spec, partition, stats, seed)
    moe = MoEFFN.from_dense(ffn, partition, spec, router).requires_grad_(False)
    if routers:
        set_threshold(routers, stats, moe.weights())
    return moe


def _refit(moe: MoEFFN, recipe: Recipe, stats: NeuronStats) -> float:
    """Refit if the recipe does; the error left on held-out tokens (0 without a refit)."""
    if not (recipe.refit and moe.spec.experts):
        return 0.0
    return refit(moe, stats.ffn, stats, recipe.repair).held_out_error


def _measure(moe: MoEFFN, ffn: FFNWeights, inputs: Callable[[], Iterator[Tensor]]) -> tuple[float, Routing | None]:
    """The error of the output and, if the layer routes, how well."""
    lost = total = 0.0
    left, tally = ERROR_TOKENS, RoutingTally(moe) if routes(moe) else None
    with kernels.using("torch"):  # the tally looks at the weights, which the native kernel would keep packed
        for rows in inputs():
            x = rows[:left].to(ffn.up.dtype)
            dense = ffn.forward(x).float()
            lost += (moe(x).float() - dense).square().sum().item()
            total += dense.square().sum().item()
            if tally:
                tally.add(x)
            left -= len(x)
            if left <= 0:
                break
    return lost / total if total else 0.0, tally.result() if tally else None


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
