"""FFNs of architectures that no row of FAMILIES names: laid out as some row says, and tried before they are believed.

A module is one if its linears are those of a row, and if what it computes is what an FFN of these weights does. So
nothing between the linears goes unseen: a norm, a multiplier, a clamp, another activation than the config's.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moefy.sites.experts import Expert, ExpertList, ExpertSite, expert_names
from moefy.sites.families import FAMILIES, LEFT_OUT, Family
from moefy.sites.linears import child, is_linear, rows
from moefy.sites.parts import base_model_type
from moefy.sites.site import Site, fits, size_attributes

# Spreads of what the activation is given: where it bends, as usual, and beyond any clamp (gpt-oss has one at 7).
_SPREADS = (0.5, 2.0, 32.0)
# That code calls as functions, or as classes of torch's own.
_FUNCTIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu")
# Of an output's norm. In float32 another order of sums is 1e-6 and gelu for its tanh 2e-4.
_CLOSE = {torch.float64: 1e-8, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def tried(model: nn.Module, parts: Mapping[str, Any], wanted: Callable[[Any], bool]) -> tuple[list[Site], list[str]]:
    """The FFNs in the layers of a model that belong to a config that is `wanted`, and the modules that failed.

    `parts` are the configs of the parts that modules belong to, by the modules' names. The modules that failed are
    laid out like FFNs and compute something else.
    """
    sites: list[Site] = []
    failed: list[str] = []
    if base_model_type(model.config) not in CONFIG_MAPPING:
        return [], []  # only a checkpoint's own code has it, and what is saved could not be loaded
    for name, module in model.named_modules():
        config = parts[name]
        if not wanted(config) or base_model_type(config) in LEFT_OUT or not re.search(r"\.\d+(\.|$)", name):
            continue  # beside layers are heads and projectors
        if "norm" in name.rpartition(".")[2]:
            continue  # made from another input than the tokens (Voxtral's, from the time)
        if isinstance(module, Expert):
            continue
        rows_like = list(_rows_like(name, module, config))
        for row in rows_like:
            found = _sites(model, name, module, row, config)
            if all(_computes(module, site) for site in (found[0], found[-1])):
                sites += found
                break
        else:
            failed += [name] if rows_like else []
    return ([], failed) if _leave_experts(model, sites) else (sites, failed)


def _leave_experts(model: nn.Module, sites: list[Site]) -> bool:
    """Whether experts in another layout would stay as they are, and only what runs beside them be converted."""
    experts = [site for site in sites if isinstance(site, ExpertSite)]
    if any(re.search(r"experts?\.\w*\d+$", site.name) for site in sites if site not in experts):
        return True  # modules of their own, which only some tokens come by
    found = {site.name for site in sites}
    holding = {name for site in sites for name in _above(site.name)}
    return not experts and any(
        "expert" in name.rpartition(".")[2] and name not in holding and not found & {name, *_above(name)}
        for name, module in model.named_modules()
        if any(True for _ in module.parameters()) and not is_linear(module)
    )


def _above(name: str) -> list[str]:
    """The names of the modules that hold a module."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _sites(model: nn.Module, name: str, module: nn.Module, row: Family, config: Any) -> list[Site]:
    experts: list[Site] = [ExpertSite(model, expert, row, config) for expert in expert_names(name, module, row)]
    return experts or [Site(model, name, row, config)]


def _rows_like(name: str, module: nn.Module, config: Any) -> Iterator[Family]:
    """A module's layout, if it is that of some row, with each activation that it may have."""
    if isinstance(module, ExpertList):  # which have been tried as a whole
        yield from dict.fromkeys(expert.family for expert in module if isinstance(expert, Expert))
        return
    linears = {path for path, part in module.named_modules() if is_linear(part)}
    for row in FAMILIES:
        paths = {row.up, row.down, *([row.gate] if row.gate else [])}
        if row.mount or row.activate_up or not (paths == linears or any(expert_names(name, module, row))):
            continue
        plain = replace(row, model_types=(base_model_type(config),), sizes=size_attributes(config), stays_dense=None)
        if linears:
            up, down = (rows(child(module, path))[0] for path in (row.up, row.down))  # type: ignore[arg-type]
            plain = replace(plain, fused=not row.gate and up.shape[0] == 2 * down.shape[1], up_first=False)
        if not linears or fits(name, module, plain):
            yield from _activations(plain, module, config)
            return


def _activations(row: Family, module: nn.Module, config: Any) -> Iterator[Family]:
    for attribute in dict.fromkeys(family.activation for family in FAMILIES):
        if getattr(config, attribute, None) in ACT2FN:
            yield replace(row, activation=attribute, fixed_activation=None)
    for part in module.modules():
        for name in ACT2FN:
            if type(part) is type(ACT2FN[name]):
                yield replace(row, fixed_activation=name)
    for name in _FUNCTIONS:
        yield replace(row, fixed_activation=name)


@torch.no_grad()
def _computes(module: nn.Module, site: Site) -> bool:
    """Whether a module computes the FFN of a site's weights; taken for granted where these are on meta.

    There the record of a conversion names the FFNs, which have been tried before it.
    """
    ffn = site.read()
    if ffn.up.dtype not in _CLOSE:
        return False
    if ffn.up.is_meta or not all(p.isfinite().all() for p in (ffn.up, ffn.down)):
        return True  # and whoever needs the values says what is wrong with them
    x = torch.randn(len(_SPREADS), ffn.width, generator=torch.Generator().manual_seed(0)).to(ffn.up.device)
    given = x @ (ffn.up if ffn.gate is None else ffn.gate).float().t()
    spread = given.norm(dim=1, keepdim=True).clamp_min(1e-12) / ffn.neurons**0.5
    x = (x * x.new_tensor(_SPREADS)[:, None] / spread).to(ffn.up.dtype)
    expected = ffn.forward(x)
    try:
        with _evaluating(module):
            out = module(*_arguments(module, site, x))
    except Exception:  # it takes something else
        return False
    if not isinstance(out, Tensor) or out.numel() != expected.numel():
        return False
    away = (out.view_as(expected) - expected).float().norm(dim=1)
    return bool((away <= _CLOSE[ffn.up.dtype] * expected.float().norm(dim=1)).all())


def _arguments(module: nn.Module, site: Site, x: Tensor) -> tuple[Tensor, ...]:
    """What a layer gives a module that may be an FFN, or the experts of which the site is one; it may take no more."""
    given: tuple[Tensor, ...] = (x[None],)
    if isinstance(site, ExpertSite):
        number = int(site.name.rpartition(".")[2])
        given = (x, torch.full((len(x), 1), number, device=x.device), x.new_ones(len(x), 1))
    if len(inspect.signature(module.forward).parameters) != len(given):
        raise TypeError("It takes more than an FFN does.")
    return given


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode for the length of a with block: without dropout."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
