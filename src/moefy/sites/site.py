"""One dense FFN inside a model: read its weights, mount what replaces it, write weights back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from moefy.errors import MoefyError
from moefy.sites.families import EXPERT_COUNTS, FAMILIES, Family
from moefy.sites.linears import assign, child, is_linear, rows
from moefy.sites.parts import base_model_type
from moefy.types import FFNWeights


@dataclass(frozen=True)
class Site:
    """One dense FFN inside a model; `name` is the dotted path of the module that owns it.

    `config` is that of the innermost model around it.
    """

    model: nn.Module
    name: str
    family: Family
    config: Any

    @property
    def owner(self) -> nn.Module:
        return self.model.get_submodule(self.name)

    @property
    def entry_name(self) -> str:
        """Dotted path of the module that receives the FFN's input; the MoE is mounted there."""
        return ".".join(part for part in (self.name, self.family.mount) if part)

    @property
    def entry(self) -> nn.Module:
        return self.model.get_submodule(self.entry_name)

    @property
    def trains(self) -> bool:
        """Whether training would change the FFN."""
        return any(p.requires_grad for p in self.entry.parameters())

    @property
    def owner_dtype(self) -> torch.dtype:
        return child(self.owner, self.family.up).weight.dtype  # type: ignore[union-attr,return-value]

    @property
    def multipliers(self) -> tuple[float, float]:
        """What the model multiplies the gate's rows and the output by; `read` has it in the weights."""
        name = self.family.multipliers
        gate, down = getattr(self.config, name) if name else (1.0, 1.0)
        return gate, down

    def read(self) -> FFNWeights:
        """The FFN's weights, neuron-major; views of the model's memory where the layout allows it."""
        family, owner = self.family, self.owner
        up, up_bias = rows(owner.get_submodule(family.up))
        down = owner.get_submodule(family.down)
        gate = gate_bias = None
        if family.fused:
            (gate, up), (gate_bias, up_bias) = (
                up.chunk(2),
                up_bias.chunk(2) if up_bias is not None else (None, None),
            )
            if family.up_first:
                gate, up, gate_bias, up_bias = up, gate, up_bias, gate_bias
        elif family.gate:
            gate, gate_bias = rows(owner.get_submodule(family.gate))
        down_rows, down_bias = rows(down)
        self._check_types(up, down_rows)
        found = FFNWeights(
            up=up,
            down=down_rows.t(),
            gate=gate,
            up_bias=up_bias,
            gate_bias=gate_bias,
            down_bias=down_bias,
            activation=self.activation,
            activate_up=family.activate_up,
            activation_state=self._activation_state(),
        )
        return _multiplied(found, *self.multipliers)

    def _check_types(self, up: Tensor, down: Tensor) -> None:
        """MoefyError for a T5 in float16, whose down-projections transformers keeps in float32."""
        if up.dtype != down.dtype:
            kinds = " and ".join(str(t.dtype).removeprefix("torch.") for t in (up, down))
            raise MoefyError(
                f"The weights of {self.name} are of two types, {kinds}; load the model in one: --dtype float32 or "
                f"bfloat16."
            )

    @torch.no_grad()
    def write(self, ffn: FFNWeights) -> None:
        """Put weights back into the dense modules (the inverse of `read`); meta tensors are materialised."""
        family, owner = self.family, self.owner
        ffn = _multiplied(ffn, *(1 / factor for factor in self.multipliers))
        if family.fused:
            assert ffn.gate is not None
            order = slice(None, None, -1 if family.up_first else 1)
            biases: Any = [ffn.gate_bias, ffn.up_bias][order]
            bias = None if ffn.up_bias is None else torch.cat(biases)
            assign(owner.get_submodule(family.up), torch.cat([ffn.gate, ffn.up][order]), bias)
        else:
            assign(owner.get_submodule(family.up), ffn.up, ffn.up_bias)
            if family.gate:
                assert ffn.gate is not None
                assign(owner.get_submodule(family.gate), ffn.gate, ffn.gate_bias)
        assign(owner.get_submodule(family.down), ffn.down.t(), ffn.down_bias)
        if ffn.activation_state:
            state = {name: tensor.detach().clone() for name, tensor in ffn.activation_state.items()}
            self._activation_module().load_state_dict(state, assign=True)

    def _activation_state(self) -> dict[str, Tensor] | None:
        """The learned parameters of the FFN's activation; most activations have none."""
        if not ACT2FN[self.activation].state_dict():
            return None
        return {name: t.detach().clone() for name, t in self._activation_module().state_dict().items()}

    def _activation_module(self) -> nn.Module:
        found = [m for m in self.owner.modules() if type(m) is type(ACT2FN[self.activation])]
        if not found:
            raise MoefyError(f"{self.name} has no {self.activation} module, whose parameters the FFN needs.")
        return found[0]

    def mount(self, module: nn.Module) -> None:
        """Replace the dense FFN by `module`, which maps (..., D) to (..., D)."""
        for path in self.family.bypass:
            # A call that is under way may hold the old module already: `act(self.fc1(x))` looks act up first.
            self.owner.get_submodule(path).forward = _identity
            set_module(self.model, f"{self.name}.{path}", nn.Identity())
        set_module(self.model, self.entry_name, module)

    @property
    def activation(self) -> str:
        if self.family.fixed_activation:
            return self.family.fixed_activation
        attribute = self.family.activation
        name = getattr(self.config, attribute, None) or getattr(self.model.config, attribute, None)
        if not isinstance(name, str) or name not in ACT2FN:
            raise MoefyError(
                f"The activation {name!r} of this model (config.{attribute}) is not one that "
                f"transformers names, so its FFNs cannot be rebuilt; set it to one of ACT2FN's names."
            )
        return name


def fits(name: str, module: nn.Module, family: Family) -> bool:
    """Whether a module has the children of a family's FFN, with widths that chain."""
    if family.stays_dense in name.split("."):
        return False
    needed = [family.up, family.down, *([family.gate] if family.gate else [])]
    if not all(is_linear(child(module, path)) for path in needed):
        return False
    up, down = (rows(child(module, path))[0] for path in (family.up, family.down))  # type: ignore[arg-type]
    if family.gate and rows(child(module, family.gate))[0].shape != up.shape:  # type: ignore[arg-type]
        return False
    # The widths must chain: BERT's attention also has an `output.dense`, whose input is not the FFN's.
    return up.shape[0] == down.shape[1] * (2 if family.fused else 1) and up.shape[1] == down.shape[0]


def size_attributes(config: Any) -> tuple[str, ...]:
    """The attributes of a config that hold the counts of neurons (see `Family.sizes`), none if it has no such."""
    for family in FAMILIES:
        if base_model_type(config) in family.model_types:
            return family.sizes
    several = any(getattr(config, name, None) for name in EXPERT_COUNTS)
    usual = not several and isinstance(getattr(config, "intermediate_size", None), int)
    return ("intermediate_size",) if usual else ()


def _multiplied(ffn: FFNWeights, gate_by: float, down_by: float) -> FFNWeights:
    """An FFN whose gate's rows, before the activation, and whose output are multiplied by numbers."""
    factors = {"gate": gate_by, "gate_bias": gate_by, "down": down_by, "down_bias": down_by}
    changed = {
        name: getattr(ffn, name) * factor
        for name, factor in factors.items()
        if factor != 1 and getattr(ffn, name) is not None
    }
    return replace(ffn, **changed) if changed else ffn


def _identity(x: Tensor) -> Tensor:
    return x


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
