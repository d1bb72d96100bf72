"""The pipeline, in the order it runs. Read this first.

One forward pass over the calibration converts the model: at each FFN the batches wait, the FFN is read,
measured, cut, given a router and mounted, and the pass goes on through the converted layer.
"""

from __future__ import annotations

import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy import slim
from moefy.calibrate import CalibrationInfo, check_batches, lookups_told, real_tokens
from moefy.construct.elimination import check_room
from moefy.conversion.budgets import Sensitivity, allocate, measure
from moefy.conversion.convert_layer import LayerReport, as_it_is, convert_layer, whole_layer
from moefy.conversion.one_pass import Arrival, OnePass
from moefy.conversion.residuals import find_residuals
from moefy.conversion.resume import Store
from moefy.conversion.work import layer_work, measure_work, tokens_in
from moefy.errors import MoefyError, MoefyWarning
from moefy.hf import mark_converted
from moefy.moe import MoEFFN, moe_layers
from moefy.recipe import Recipe
from moefy.sites import ExpertSite, Site, find_sites, join_experts
from moefy.types import LayerSpec

Progress = Callable[[int, int, str], None]


@dataclass
class Report:
    """What a conversion did. Seconds and memory are of this run and are not stored with the checkpoint.

    `predicted_loss` is the rise of the loss, in nats a token, that the budgets were chosen by (None if they
    were not, or if the model has no logits): that of the model without routing. `resumed` of the layers were done
    before, by a run that was cut off.
    """

    recipe: Recipe
    calibration: CalibrationInfo
    layers: list[LayerReport] = field(default_factory=list)
    predicted_loss: float | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    resumed: int = 0

    @property
    def active_fraction(self) -> float:
        """Multiply-adds of the FFNs on the calibration over the dense ones', routers included, in the whole model."""
        done = sum(layer.active_fraction * layer.work for layer in self.layers)
        return done / max(1, sum(layer.work for layer in self.layers))  # no work in experts that no token has chosen

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


@contextmanager
def _without_autocast() -> Iterator[None]:
    """Models are converted on the CPU, in the type they have."""
    with torch.autocast("cpu", enabled=False):
        yield


@dataclass(frozen=True)
class Plan:
    """What a conversion works on: the FFNs by name, the shapes each may get, and what an error in each costs."""

    model: Any
    sites: dict[str, Site]
    specs: dict[str, list[LayerSpec]]
    recipe: Recipe
    batches: list[Mapping[str, Any]]
    hold_bytes: int
    metrics: Mapping[str, Tensor]


@lookups_told("calibration")
@_float32_by_default()
@_without_autocast()
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
    state: str | os.PathLike[str] | None = None,
) -> Report:
    """Convert every FFN of a transformers model to a mixture of experts, in place.

    `calibration` iterates over model inputs (dicts of tensors). `hold_bytes` bounds the memory for
    activations between layers; what is beyond goes to a temporary directory. `progress(done, total,
    name)` is called after each FFN; it counts work as `moefy.conversion.work` does. `sensitivity` saves
    measuring again what a recipe that allocates its budget needs (`moefy.conversion.budgets.measure`).

    `state` is a folder where each FFN is kept as soon as it is done: a conversion of the same model by the same recipe
    and calibration goes on from there. The converted FFNs are mapped from its files, so that they do not add up in
    memory; remove the folder when the model is saved, or not used any more.

    Raises MoefyError, before anything is changed where that can be known, if the model, the recipe and the
    calibration do not fit. If it ends early, the layers that were done stay converted: load the model again.
    """
    start = time.perf_counter()
    recipe, batches = Recipe.of(recipe), check_batches(calibration)
    check_dense(model)
    sites = {site.entry_name: site for site in find_sites(model)}
    recipe = recipe.fitting(site.read().neurons for site in sites.values())
    specs = {name: _checked_specs(site, recipe) for name, site in sites.items()}
    if recipe.sharing == "reconstruction" and any(spec.shared for shapes in specs.values() for spec in shapes):
        check_room(max(shapes[0].neurons for shapes in specs.values()))
    if recipe.slim:
        slim.config_sizes(model, {name: spec for name, (spec,) in specs.items()})  # refused now, not when it is saved
    _warn_of_hooks(model, sites.values())
    batches = _needed(batches, recipe, specs)
    report, store = Report(recipe, CalibrationInfo.of(batches)), Store.of(state, model, batches)
    was_training = model.training
    model.eval()
    try:
        plan = Plan(model, sites, specs, recipe, batches, hold_bytes, {})
        before = 0
        if recipe.allocation == "sensitivity":
            before = measure_work(sites, batches) if sensitivity is None else 0
            plan, sensitivity = _allocated(plan, report, store, progress, sensitivity)
        found = sensitivity.fingerprint() if sensitivity else None
        store = store.below({"recipe": recipe.model_dump(), "sensitivity": found})
        _convert_layers(plan, store, report, progress, before)
    except BaseException:
        _end_early(model, sites, specs, report)
        raise
    finally:
        join_experts(model)  # of layers that it did not come to
        for name, moe in moe_layers(model).items():
            _unpack(name, moe, store)  # parameters are there for whoever counts, averages or wraps them
        model.train(was_training)
    _mark(model, report)
    report.seconds, report.peak_bytes = time.perf_counter() - start, peak_memory()
    return report


def _end_early(
    model: nn.Module, sites: Mapping[str, Site], specs: Mapping[str, list[LayerSpec]], report: Report
) -> None:
    """Leave a model of which some FFNs are converted as one that says so, and can be saved."""
    for name, site in sites.items():  # no names of half a layer: transformers may take them for its own
        if isinstance(site, ExpertSite) and site.left_over:
            site.mount(whole_layer(site.read(), specs[name][0]))
    if moe_layers(model) and isinstance(model, PreTrainedModel):
        _mark(model, report)


def _allocated(
    plan: Plan, report: Report, store: Store, progress: Progress | None, found: Sensitivity | None
) -> tuple[Plan, Sensitivity]:
    """The plan with the budget divided over its layers by their sensitivity, which is measured unless it is given."""
    sites, batches, chunk = plan.sites, plan.batches, plan.recipe.chunk_tokens
    tokens = tokens_in(batches)
    after = sum(layer_work(site, tokens) for site in sites.values())
    step = (lambda done, of, name: progress(done, of + after, f"measuring {name}")) if progress else None
    found = found or measure(plan.model, sites, batches, plan.hold_bytes, chunk, step, store)
    shares = planned_shares(sites, plan.recipe, found)
    report.predicted_loss = found.predicted_loss(shares) if found.metrics.of_loss else None
    return replace(plan, specs=planned_specs(sites, plan.recipe, shares), metrics=found.metrics), found


def _convert_layers(plan: Plan, store: Store, report: Report, progress: Progress | None, done: int) -> None:
    """Convert one FFN after the other, but for those in the store. For the progress: `done` is the work before."""
    kept = {name for name in plan.sites if store.holds(name)}
    tokens = tokens_in(plan.batches)
    work = {name: layer_work(site, tokens, name in kept) for name, site in plan.sites.items()}
    report.resumed = len(kept)
    total, last = done + sum(work.values()), None
    # Experts are weighted before their sum is added to the stream.
    alone = {name: site for name, site in plan.sites.items() if not isinstance(site, ExpertSite)}
    residuals = find_residuals(plan.model, alone, plan.batches[0]) if plan.recipe.repair else {}
    for arrival in OnePass(
        plan.model, plan.sites, plan.batches, partial(real_tokens, plan.model), plan.hold_bytes, residuals
    ):
        if last and store.folder:
            _unpack(*last, store)  # all batches are through it
        moe, layer = _converted(plan, store, arrival, plan.recipe.seed + len(report.layers))
        # One token now, outside every batch: what packing the weights keeps must not count as a batch's own to spill.
        moe(next(arrival.inputs())[:1])
        site = plan.sites[arrival.name]
        moe.trainable(site.trains)
        site.mount(moe)
        report.layers.append(layer)
        last, done = (arrival.name, moe), done + work[arrival.name]
        if progress:
            progress(done, total, arrival.name)


def _converted(plan: Plan, store: Store, arrival: Arrival, seed: int) -> tuple[MoEFFN, LayerReport]:
    """The layer that takes an FFN's place: from the store, and if it is not there, made and put there."""
    name = arrival.name
    kept = store.get(name)
    if kept is None:
        site, metric = plan.sites[name], plan.metrics.get(name)
        moe, layer = convert_layer(site, plan.specs[name], plan.recipe, arrival, seed, metric)
        if store.folder is None:
            return moe, layer
        kept = store.put(name, moe.state_dict(), {"spec": asdict(moe.spec), "layer": asdict(layer)})
    tensors, about = kept
    moe = MoEFFN(LayerSpec(**about["spec"])).requires_grad_(False).eval()
    moe.load_state_dict(tensors, assign=True)
    return moe, LayerReport(**about["layer"])


def _unpack(name: str, moe: MoEFFN, store: Store) -> None:
    """Give a layer's parameters their values: those mapped from the store, if it has them, rather than a copy."""
    kept = store.get(name) if moe.packed_bytes() else None
    if kept is None:
        moe.unpack()
    else:
        moe.load_state_dict(kept[0], assign=True)


def _mark(model: Any, report: Report) -> None:
    mark_converted(model, {name: moe.spec for name, moe in moe_layers(model).items()}, report.stored())


def check_dense(model: nn.Module) -> None:
    """MoefyError if moefy has converted the model already, or if it is compiled, wrapped, unloaded or has adapters."""
    if any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in model.modules()):
        raise MoefyError("This model is compiled; convert it first and compile what comes of it.")
    if not isinstance(model, PreTrainedModel):
        raise MoefyError(f"This {type(model).__name__} is no model of transformers; give the model that it wraps.")
    if getattr(model.config, "_attn_implementation", None) == "flex_attention":
        raise MoefyError('This model attends by flex_attention, which compiles itself; load it with "sdpa" instead.')
    if getattr(model.config, "slow_but_exact", False) and getattr(model.config, "pretraining_tp", 1) > 1:
        raise MoefyError(
            "This model multiplies in slices of its own matrices; set slow_but_exact to false in its config."
        )
    if any(p.device.type not in ("cpu", "meta") for p in model.parameters()):
        raise MoefyError('moefy converts on the CPU: call model.to("cpu") first, and move what comes of it.')
    if any(p.is_meta for p in model.parameters()):
        raise MoefyError("Weights of this model are not in memory (meta tensors); load it without offloading them.")
    check_no_adapters(model)
    if getattr(model.config, "moefy", None):
        raise MoefyError("This model is converted already, if only in part; start from the dense model it came from.")


def _warn_of_hooks(model: nn.Module, sites: Iterable[Site]) -> None:
    """Say that hooks are lost which are on modules that a conversion replaces."""
    found: list[str] = []
    for site in sites:
        whole = site.layer_name if isinstance(site, ExpertSite) else site.entry_name
        for path in (whole, *(f"{site.name}.{path}" for path in site.family.bypass)):
            for name, module in model.get_submodule(path).named_modules(prefix=path):
                if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
                    found.append(name)
    if found:
        names = list(dict.fromkeys(found))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"Hooks on {names[0]}{more} are lost with the modules that a conversion replaces; register them again on "
            f"what is there then.",
            MoefyWarning,
            stacklevel=3,
        )


def check_no_adapters(model: nn.Module) -> None:
    """MoefyError if the model has adapters of peft."""
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise MoefyError("This model has adapters of peft; merge them into its weights first: merge_and_unload().")


def planned_shares(sites: Mapping[str, Site], recipe: Recipe, found: Sensitivity) -> dict[str, float]:
    """The recipe's budget divided over the FFNs, by name."""
    assert recipe.budget is not None
    least = {name: recipe.least_share(site.read().neurons) for name, site in sites.items()}
    return allocate(found.curves, recipe.budget, least)


def planned_specs(
    sites: Mapping[str, Site], recipe: Recipe, shares: Mapping[str, float] | None = None
) -> dict[str, list[LayerSpec]]:
    """The shapes that each FFN may get, by name, at its own share of the budget if `shares` gives one.

    MoefyError if the recipe does not fit one of them.
    """
    shares = shares or {}
    return {name: recipe.layer_specs(site.read(), name, shares.get(name)) for name, site in sites.items()}


def _needed(
    batches: list[Mapping[str, Any]], recipe: Recipe, specs: dict[str, list[LayerSpec]]
) -> list[Mapping[str, Any]]:
    """The batches that something depends on: one, which shows that nothing overflows, where every neuron is kept."""
    alike = all(batch.keys() == batches[0].keys() for batch in batches)  # and so come by the same FFNs
    whole = recipe.allocation != "sensitivity" and all(as_it_is(shapes, recipe) for shapes in specs.values())
    return batches[:1] if alike and whole else batches


def _checked_specs(site: Site, recipe: Recipe) -> list[LayerSpec]:
    ffn = site.read()
    for part in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
        tensor = getattr(ffn, part)
        if tensor is not None and not tensor.isfinite().all():
            raise MoefyError(f"The weights of {site.name} ({part}) hold NaN or infinite values; the model is broken.")
    return recipe.layer_specs(ffn, site.name)


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
