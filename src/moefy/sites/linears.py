"""Linears of either kind: torch's Linear, and GPT-2's Conv1D, which stores its weight the other way round."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def rows(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias of a linear."""
    weight = linear.weight.detach()  # type: ignore[operator]
    bias = getattr(linear, "bias", None)
    return (weight.t() if isinstance(linear, Conv1D) else weight), (None if bias is None else bias.detach())


def assign(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear a weight (out, in) and, if it is not None, a bias."""
    weight = weight.t() if isinstance(linear, Conv1D) else weight
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=False)


def child(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, None if there is none."""
    for part in path.split("."):
        module = module._modules.get(part)  # type: ignore[assignment]
        if module is None:
            return None
    return module
