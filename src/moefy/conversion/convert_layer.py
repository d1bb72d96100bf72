"""One FFN: from its weights and the inputs it gets to the MoEFFN that takes its place."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moefy import kernels
from moefy.construct import construct
from moefy.construct.sharing import SHARING
from moefy.conversion.one_pass import Arrival
from moefy.conversion.quality import Routing, RoutingTally
from moefy.errors import MoefyError
from moefy.moe import MoEFFN
from moefy.recipe import Recipe
from moefy.reconstruct import refit
from moefy.routers import ROUTERS
from moefy.selection import held_out_parts, set_threshold
from moefy.sites import Site
from moefy.stats import NeuronStats, overflow
from moefy.types import FFNWeights, LayerSpec, Partition

# Tokens on which a layer's error is measured: the mean over 2,048 is within 1 % of that over 16k.
ERROR_TOKENS = 2048


@dataclass(frozen=True)
class LayerReport:
    """One converted FFN. `error` is ‖dense - converted‖² / ‖dense‖² on calibration tokens, its own inputs.

    `work` is what the dense FFN takes for the calibration's tokens that come by, in multiply-adds. `mass` is the
    share of the activation mass that the chosen experts hold there and `overlap` the share of MoEfication's ground
    truth that is chosen (both None if nothing is routed); `seconds` is what making it took, in whatever
    run that was.
    """

    name: str
    neurons: int
    shared: int
    experts: int
    expert_size: int
    top_k: int
    active_fraction: float
    error: float
    work: int
    mass: float | None = None
    overlap: float | None = None
    seconds: float = 0.0


def convert_layer(
    site: Site,
    specs: list[LayerSpec],
    recipe: Recipe,
    arrival: Arrival,
    seed: int,
    metric: Tensor | None,
) -> tuple[MoEFFN, LayerReport]:
    """The MoEFFN that takes the place of a site's FFN; the site stays as it is.

    Of several shapes it is the one that leaves the least error on held-out tokens. `metric` (D, D) says what an error
    of the output costs. Raises MoefyError if there are too few tokens, or if they overflow.
    """
    start, ffn, inputs = time.perf_counter(), site.read(), arrival.inputs
    if not arrival.suffices or as_it_is(specs, recipe):
        moe, tokens, error = whole_layer(ffn, specs[0]), arrival.tokens, 0.0
        if arrival.suffices:
            tokens, error = max(1, sum(map(len, inputs()))), _measure(moe, ffn, inputs, site.name)[0]
        work = ffn.multiply_adds * tokens
        return moe, LayerReport(site.entry_name, ffn.neurons, ffn.neurons, 0, 0, 0, 1.0, error, work)
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
    error, routing = _measure(moe, ffn, inputs, site.name)
    return moe, LayerReport(
        name=site.entry_name,
        neurons=spec.neurons,
        shared=spec.shared,
        experts=spec.experts,
        expert_size=spec.expert_size,
        top_k=spec.top_k,
        active_fraction=moe.active_fraction(),
        error=error,
        work=ffn.multiply_adds * stats.tokens,
        mass=routing.mass if routing else None,
        overlap=routing.overlap if routing else None,
        seconds=time.perf_counter() - start,
    )


def as_it_is(specs: list[LayerSpec], recipe: Recipe) -> bool:
    """Whether every neuron of an FFN always runs with its own weights, whatever the calibration."""
    return not recipe.refit and not any(spec.experts for spec in specs)


def whole_layer(ffn: FFNWeights, spec: LayerSpec) -> MoEFFN:
    """All neurons of an FFN, always running: where a recipe keeps them, and an expert that too few tokens choose."""
    every = torch.arange(ffn.neurons)
    partition = Partition(every, every.new_empty(0, 0))
    moe = MoEFFN.from_dense(ffn, partition, spec.dense(ffn.down_bias is not None), None)
    return moe.requires_grad_(False)


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
    error = refit(moe, stats.ffn, stats, recipe.repair).held_out_error
    if moe.router is not None and not moe.router.ships and moe.spec.most:
        # Its scores are of the weights themselves: of an oracle's 7 experts a token 6 would run with the old threshold.
        set_threshold(dict.fromkeys(held_out_parts(stats), moe.router), stats, moe.weights())
    return error


def _measure(
    moe: MoEFFN, ffn: FFNWeights, inputs: Callable[[], Iterator[Tensor]], name: str
) -> tuple[float, Routing | None]:
    """The error of the output and, if the layer routes, how well; MoefyError if the output overflows."""
    lost = total = 0.0
    left, tally = ERROR_TOKENS, RoutingTally(moe) if moe.routes else None
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
    error = lost / total if total else 0.0
    if not math.isfinite(error):
        raise MoefyError(overflow(name))
    return error, tally.result() if tally else None
