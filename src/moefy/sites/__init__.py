"""Find the FFNs of a model, read their weights, mount what replaces them, write weights back."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from moefy.sites.families import FAMILIES, Family
from moefy.types import FFNWeights, MoefyError

__all__ = ["FAMILIES", "Family", "Site", "find_sites"]


def find_sites(model: nn.Module) -> list[Site]:
    """Every dense FFN of a transformers model, in the order of its modules.

    Raises MoefyError for an architecture that no row of FAMILIES describes.
    """
    model_type = base_model_type(model.config)
    sites = [
        Site(model, name, family)
        for name, module in model.named_modules()
        for family in FAMILIES
        if model_type in family.model_types and _fits(module, family)
    ]
    if not sites:
        raise MoefyError(_explain_unknown(model, model_type))
    return sites


def base_model_type(config: object) -> str:
    """The architecture's name: of the source model, for a model that moefy converted."""
    return getattr(config, "base_model_type", None) or config.model_type  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Site:
    """One dense FFN inside a model; `name` is the dotted path of the module that owns it."""

    model: nn.Module
    name: str
    family: Family

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
    def owner_dtype(self) -> torch.dtype:
        return _child(self.owner, self.family.up).weight.dtype  # type: ignore[union-attr,return-value]

    def read(self) -> FFNWeights:
        """The FFN's weights, neuron-major; views of the model's memory where the layout allows it."""
        family, owner = self.family, self.owner
        up, up_bias = _rows(owner.get_submodule(family.up))
        down = owner.get_submodule(family.down)
        gate = gate_bias = None
        if family.fused:
            (gate, up), (gate_bias, up_bias) = (
                up.chunk(2),
                up_bias.chunk(2) if up_bias is not None else (None, None),
            )
        elif family.gate:
            gate, gate_bias = _rows(owner.get_submodule(family.gate))
        return FFNWeights(
            up=up,
            down=_rows(down)[0].t(),
            gate=gate,
            up_bias=up_bias,
            gate_bias=gate_bias,
            down_bias=_rows(down)[1],
            activation=self.activation,
            activate_up=family.activate_up,
            activation_state=self._activation_state(),
        )

    @torch.no_grad()
    def write(self, ffn: FFNWeights) -> None:
        """Put weights back into the dense modules (the inverse of `read`); meta tensors are materialised."""
        family, owner = self.family, self.owner
        if family.fused:
            assert ffn.gate is not None
            bias = None if ffn.up_bias is None else torch.cat([ffn.gate_bias, ffn.up_bias])  # type: ignore[list-item]
            _assign(owner.get_submodule(family.up), torch.cat([ffn.gate, ffn.up]), bias)
        else:
            _assign(owner.get_submodule(family.up), ffn.up, ffn.up_bias)
            if family.gate:
                assert ffn.gate is not None
                _assign(owner.get_submodule(family.gate), ffn.gate, ffn.gate_bias)
        _assign(owner.get_submodule(family.down), ffn.down.t(), ffn.down_bias)
        if ffn.activation_state:
            self._activation_module().load_state_dict(dict(ffn.activation_state))

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
            _set_module(self.model, f"{self.name}.{path}", nn.Identity())
        _set_module(self.model, self.entry_name, module)

    @property
    def activation(self) -> str:
        config = self.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[operator]
        name = getattr(text, self.family.activation, None) or getattr(config, self.family.activation, None)
        if not isinstance(name, str) or name not in ACT2FN:
            raise MoefyError(
                f"The activation {name!r} of this model (config.{self.family.activation}) is not one that "
                f"transformers names, so its FFNs cannot be rebuilt; set it to one of ACT2FN's names."
            )
        return name


# What the families of mixtures of experts call their number of experts.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def _rows(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(out, in) weight and bias of a Linear or of GPT-2's Conv1D, which stores (in, out)."""
    weight = linear.weight.detach()  # type: ignore[operator]
    bias = getattr(linear, "bias", None)
    return (weight.t() if isinstance(linear, Conv1D) else weight), (None if bias is None else bias.detach())


def _assign(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    weight = weight.t() if isinstance(linear, Conv1D) else weight
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=False)


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _fits(module: nn.Module, family: Family) -> bool:
    needed = [family.up, family.down, *([family.gate] if family.gate else [])]
    if not all(_is_linear(_child(module, path)) for path in needed):
        return False
    up, down = (_rows(_child(module, path))[0] for path in (family.up, family.down))  # type: ignore[arg-type]
    # The widths must chain: BERT's attention also has an `output.dense`, whose input is not the FFN's.
    return up.shape[0] == down.shape[1] * (2 if family.fused else 1) and up.shape[1] == down.shape[0]


def _child(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        module = module._modules.get(part)  # type: ignore[assignment]
        if module is None:
            return None
    return module


def _identity(x: Tensor) -> Tensor:
    return x


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _explain_unknown(model: nn.Module, model_type: str) -> str:
    """What looks like an FFN here: modules below which one linear widens and another narrows again."""
    if any(getattr(model.config, name, None) for name in _EXPERT_COUNTS):
        return f"This {type(model).__name__} is a mixture of experts already; moefy converts dense models."
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        linears = {n: m for n, m in module.named_modules() if _is_linear(m) and n.count(".") <= 1}
        shapes = {n: tuple(_rows(m)[0].shape) for n, m in linears.items()}
        for up, (out, width) in shapes.items():
            for down, shape in shapes.items():
                if up != down and shape == (width, out) and out > width and "." not in up + down:
                    found[f"{re.sub(r'[0-9]+', '*', name) or '(top)'} ({up} -> {down})"] += 1
    listed = "; ".join(f"{what} x{n}" for what, n in found.most_common(6))
    if not listed:
        return f"The architecture {model_type!r} has no FFNs that moefy could find, so there is nothing to convert."
    where = f"FFN-like modules here: {listed}"
    return (
        f"The architecture {model_type!r} is not in moefy's table of families; {where}. "
        f"Add a row for it to FAMILIES in moefy/sites/families.py (CONTRIBUTING.md shows how)."
    )
