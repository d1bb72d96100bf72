"""The experts of models that are mixtures of experts already: each is a dense FFN, and moefy can cut it again.

CMoE's hierarchical use (arXiv 2502.04416). transformers keeps a layer's experts in one module whose parameters are
three-dimensional: up (E, F, D), or (E, 2F, D) with the gates' rows first, and down (E, D, F). As long as nothing runs
or replaces a single expert the sites read and write slices of them; then the module becomes an ExpertList, which
computes the same, and whose members share its memory until they are replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moefy.sites.families import Family
from moefy.sites.site import Site, set_module
from moefy.types import FFNWeights


@dataclass(frozen=True)
class ExpertSite(Site):
    """One expert of a layer; `name` is that of the layer's experts and the expert's number in it."""

    @property
    def layer_name(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def owner(self) -> nn.Module:
        """The expert as a module of its own; the first time, the layer's experts are taken apart for it."""
        self._apart()
        return super().owner

    @property
    def entry(self) -> nn.Module:
        return self.owner

    @property
    def trains(self) -> bool:
        return self._apart().trained

    @property
    def left_over(self) -> bool:
        """Whether other experts of the layer have been replaced and this one has not."""
        experts = self.model.get_submodule(self.layer_name)
        return isinstance(experts, ExpertList) and experts.whole is None and isinstance(super().owner, Expert)

    @property
    def owner_dtype(self) -> torch.dtype:
        return self.read().up.dtype

    def read(self) -> FFNWeights:
        slices = self._slices()
        if slices is None:
            return super().read()
        up, down = slices
        gate, up = up.chunk(2) if self.family.fused else (None, up)
        return FFNWeights(up=up, down=down.t(), gate=gate, activation=self.activation)

    @torch.no_grad()
    def write(self, ffn: FFNWeights) -> None:
        slices = self._slices()
        if slices is None:
            self._apart().whole = None  # another memory now
            super().write(ffn)
            return
        if slices[0].is_meta:
            slices = self._materialised()
        up, down = slices
        up.copy_(ffn.up if ffn.gate is None else torch.cat([ffn.gate, ffn.up]))
        down.copy_(ffn.down.t())

    def mount(self, module: nn.Module) -> None:
        self._apart().whole = None
        super().mount(module)

    def _apart(self) -> ExpertList:
        experts = self.model.get_submodule(self.layer_name)
        if not isinstance(experts, ExpertList):
            experts = ExpertList(experts, self.family)
            set_module(self.model, self.layer_name, experts)
        return experts

    def _materialised(self) -> tuple[Tensor, Tensor]:
        layer = self.model.get_submodule(self.layer_name)
        for path in (self.family.up, self.family.down):
            empty = torch.empty_like(getattr(layer, path), device="cpu")
            setattr(layer, path, nn.Parameter(empty, requires_grad=empty.is_floating_point()))
        found = self._slices()
        assert found is not None
        return found

    def _slices(self) -> tuple[Tensor, Tensor] | None:
        """This expert's part of the layer's parameters; None if they have been taken apart."""
        experts, number = self.model.get_submodule(self.layer_name), int(self.name.rpartition(".")[2])
        if isinstance(experts, ExpertList):
            return None
        return tuple(getattr(experts, path).detach()[number] for path in (self.family.up, self.family.down))


def expert_names(name: str, module: nn.Module, family: Family) -> Iterator[str]:
    """The names of the experts that a module of this name holds, none if it holds none."""
    if isinstance(module, ExpertList):
        for i, expert in enumerate(module):
            if isinstance(expert, Expert) and expert.family == family:
                yield f"{name}.{i}"
        return
    if module._parameters.keys() != {family.up, family.down}:  # with biases, it is another structure
        return
    up, down = (module._parameters[path] for path in (family.up, family.down))
    if up is None or down is None or up.ndim != 3 or down.ndim != 3:
        return
    (count, rows, width), neurons = up.shape, down.shape[2]
    if down.shape[:2] == (count, width) and rows == neurons * (2 if family.fused else 1):
        yield from (f"{name}.{i}" for i in range(count))


def token_rows(model: nn.Module, name: str) -> tuple[Tensor, int] | None:
    """While an FFN runs: the numbers of its tokens among those of its layer, and how many these are.

    None where every token of the layer comes by: it is no expert of a mixture.
    """
    layer = model.get_submodule(name.rpartition(".")[0])
    return layer.rows if isinstance(layer, ExpertList) else None


def join_experts(model: nn.Module) -> None:
    """Undo what sites did to the layers of which no expert has been replaced."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ExpertList) and module.whole is not None:
            set_module(model, name, module.whole[0])


class Expert(nn.Module):
    """One expert, on the memory of its layer's parameters."""

    def __init__(self, up: Tensor, down: Tensor, act: nn.Module, family: Family):
        super().__init__()
        self.family, self.act = family, act
        for path, weight in ((family.up, up), (family.down, down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(path, linear)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(T, D) to (T, D)."""
        up = self.get_submodule(self.family.up)(hidden_states)
        if self.family.fused:
            gate, up = up.chunk(2, dim=-1)
            hidden = self.act(gate) * up
        else:
            hidden = self.act(up)
        return self.get_submodule(self.family.down)(hidden)


class ExpertList(nn.ModuleList):
    """The experts of a layer, each a module (T, D) to (T, D), run one after the other on the tokens that chose them.

    `whole` is the module that they were taken from, while they share its memory. With `visit_all` an expert that
    no token chose is called too, with no rows: so that every batch of a calibration comes by every expert. `rows` are,
    while an expert runs, the numbers of its tokens among the layer's, and how many those are. `trained` says whether
    what they were taken from is, which they are not as long as they share its memory.
    """

    visit_all = False

    def __init__(self, whole: nn.Module, family: Family):
        ups, downs = (getattr(whole, path).detach() for path in (family.up, family.down))
        act: nn.Module = whole.act_fn  # type: ignore[assignment]
        super().__init__(Expert(up, down, act, family) for up, down in zip(ups, downs, strict=True))
        self.whole: tuple[nn.Module] | None = (whole,)  # in a tuple: not a child
        self.trained = any(p.requires_grad for p in whole.parameters())
        self.rows: tuple[Tensor, int] | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens (T, D), the experts (T, K) that each takes and their weights (T, K), to (T, D)."""
        y = torch.zeros_like(hidden_states)
        choices, per_token = top_k_index.flatten(), top_k_index.shape[1]
        order = choices.argsort(stable=True)
        counts = torch.bincount(choices, minlength=len(self))[: len(self)].tolist()
        start = 0
        for expert, count in zip(self, counts, strict=True):
            place, start = order[start : start + count], start + count
            if not count and not self.visit_all:
                continue
            tokens = place // per_token
            self.rows = tokens, len(hidden_states)
            out = expert(hidden_states[tokens]) * top_k_weights[tokens, place % per_token, None]
            y.index_add_(0, tokens, out.to(y.dtype))
        self.rows = None
        return y
