"""How well one converted FFN routes: what its choice captures, and its overlap with the ground truths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moefy.moe import MoEFFN
from moefy.stats import activation_mass, as_mask, captured, contributions


@dataclass(frozen=True)
class Routing:
    """How one layer routes, over `tokens` tokens.

    `recall`: share of the oracle's experts (largest squared norm of the output, as many as were picked) that the
    router picks too; `experts`: how many a token runs on average.
    `overlap`: the same against MoEfication's ground truth (largest positive activation mass).
    `mass`: share of a token's activation mass in the chosen experts; `best_mass`: in the ground truth's.
    `load` (E,) is the share of all choices that went to each expert (uniform: 1/E); `imbalance` is the
    busiest expert's load over the mean.
    """

    recall: float
    overlap: float
    mass: float
    best_mass: float
    load: Tensor
    tokens: int
    experts: float

    @property
    def imbalance(self) -> float:
        return float(self.load.max() * len(self.load)) if len(self.load) else 1.0


class RoutingTally:
    """Adds up how a routed layer chooses, inputs (T, D) at a time."""

    def __init__(self, moe: MoEFFN):
        self.moe = moe
        self.tokens = self.with_mass = 0
        self.hits = self.overlaps = 0
        self.mass = self.best_mass = 0.0
        self.counts = torch.zeros(moe.spec.experts, dtype=torch.long)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        weights = self.moe.weights()
        chosen = self.moe.route(x)
        routed, experts = weights.routed.to(torch.float32), weights.experts
        picked = as_mask(chosen, experts)
        many = picked.sum(1, keepdim=True)
        oracle = _highest(contributions(routed, experts, x.float()), many)
        mass = activation_mass(routed, experts, x.float())
        truth = _highest(mass, many)
        shares = captured(mass, picked)
        self.tokens, self.with_mass = self.tokens + len(x), self.with_mass + len(shares)
        self.hits += int((picked & oracle).sum())
        self.overlaps += int((picked & truth).sum())
        self.mass += float(shares.sum())
        self.best_mass += float(captured(mass, truth).sum())
        self.counts += picked.sum(0).cpu()

    def result(self) -> Routing:
        choices, with_mass = max(1, int(self.counts.sum())), max(1, self.with_mass)
        return Routing(
            recall=self.hits / choices,
            overlap=self.overlaps / choices,
            mass=self.mass / with_mass,
            best_mass=self.best_mass / with_mass,
            load=self.counts / choices,
            tokens=self.tokens,
            experts=float(self.counts.sum()) / max(1, self.tokens),
        )


def _highest(values: Tensor, many: Tensor) -> Tensor:
    """A mask (T, E) of each row's highest values (T, E), `many` (T, 1) of them."""
    order = values.argsort(dim=1, descending=True)
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.zeros_like(values, dtype=torch.bool).scatter_(1, order, places < many)
