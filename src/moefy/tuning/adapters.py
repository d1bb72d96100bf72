"""Low-rank adapters (LoRA, arXiv 2106.09685) on a converted model, merged into its weights at the end.

peft adapts the linear layers outside the FFNs. It could adapt a MoEFFN's parameters too (`target_parameters`), with
an adapter for each expert: at rank 8 that is more numbers than experts of 8 neurons hold themselves. `LowRank` is one
adapter over the rows of all experts, as LoRA of the dense FFN would be.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moefy.errors import MoefyError
from moefy.moe import moe_layers

# What an adapter's product is multiplied by, whatever its rank: CMoE's alpha of 32 at rank 8.
SCALING = 4.0
#: The matrices of a MoEFFN, each with an adapter of its own.
MATRICES = tuple(f"{group}_{part}" for group in ("shared", "experts") for part in ("gate", "up", "down"))


class LowRank(nn.Module):
    """A weight (..., D) plus SCALING · B A: B (R, rank), A (rank, D), over its R rows of all experts.

    A starts random and B at 0, so the sum starts at the weight. Both are float32 and the sum is rounded to the
    weight's type once: what is trained is what is merged.
    """

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, width = weight.flatten(0, -2).shape
        self.a = nn.Parameter(torch.empty(rank, width, dtype=torch.float32, device=weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, dtype=torch.float32, device=weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))  # as peft's

    def forward(self, weight: Tensor) -> Tensor:
        delta = (self.b @ self.a).view(weight.shape) * SCALING
        return (weight.float() + delta).to(weight.dtype)


class Adapters:
    """The adapters of one model, whose other parameters are frozen until `merge` or `discard`.

    `rank` of 0 makes none. Raises MoefyError if peft is not installed and linear layers are to be adapted.
    """

    def __init__(self, model: Any, rank: int, attention: bool):
        self._frozen = [(p, p.requires_grad) for p in model.parameters()]
        self._tuner: Any = None
        self._layers = moe_layers(model) if rank else {}
        if rank and attention:
            check_peft()
        for moe in self._layers.values():
            moe.unpack()
        try:
            model.requires_grad_(False)
            if rank and attention:
                self._tuner = _linear_adapters(model, rank)
            self._adapt_experts(rank)
        except BaseException:  # Ctrl-C too: a model that nothing trains would be left
            self.discard()
            raise

    def _adapt_experts(self, rank: int) -> None:
        for moe in self._layers.values():
            for name in MATRICES:
                weight = getattr(moe, name)
                if weight is not None and weight.numel():
                    parametrize.register_parametrization(moe, name, LowRank(weight, rank))

    def merge(self) -> None:
        """Add the adapters to the weights and take them off."""
        self._end(merge=True)

    def discard(self) -> None:
        """Take the adapters off; the weights are what they were."""
        self._end(merge=False)

    @torch.no_grad()
    def _end(self, merge: bool) -> None:
        for moe in self._layers.values():
            for name in [name for name in MATRICES if parametrize.is_parametrized(moe, name)]:
                parametrize.remove_parametrizations(moe, name, leave_parametrized=merge)
        if self._tuner is not None:
            self._tuner.merge_and_unload() if merge else self._tuner.unload()
            self._tuner = None
        for parameter, trained in self._frozen:
            parameter.requires_grad_(trained)


def check_peft() -> None:
    """MoefyError if peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise MoefyError("Adapters on attention need the peft package: pip install peft.") from None


def _linear_adapters(model: Any, rank: int) -> Any:
    """peft's adapters on the linear layers but a language model's head: a converted model's FFNs have none of these."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=round(SCALING * rank), target_modules="all-linear")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # GPT-2's Conv1D, which it then handles
        tuner = peft.LoraModel(model, config, "default")
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft makes them of the model's type, and AdamW's epsilon is 0 in float16
            parameter.data = parameter.data.float()
    return tuner
