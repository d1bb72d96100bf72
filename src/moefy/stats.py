"""What the calibration tokens do to one FFN, computed from its inputs and weights in chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from moefy.types import FFNWeights, MoefyError


@dataclass(frozen=True)
class NeuronStats:
    """The inputs of one FFN and what follows from them; nothing of size (T, F) is ever held.

    `ffn` is in float32; `batches()` iterates over the real tokens' inputs, each (tokens, D), as often as
    needed; `chunk` tokens are worked on at a time; `top` is CMoE's K_a, the neurons marked per token.
    """

    ffn: FFNWeights
    batches: Callable[[], Iterator[Tensor]]
    chunk: int = 1024
    top: int = 10
    name: str = field(default="this FFN")

    def inputs(self) -> Iterator[Tensor]:
        """The inputs in float32, at most `chunk` tokens (t, D) at a time."""
        for rows in self.batches():
            for x in rows.split(self.chunk):
                x = x.float()
                if not x.isfinite().all():
                    raise MoefyError(
                        f"The calibration gives NaN or infinite inputs to {self.name}; check the calibration data, "
                        f"and load the model in bfloat16 or float32 if it is in float16, which may overflow."
                    )
                yield x

    @cached_property
    def tokens(self) -> int:
        return sum(len(rows) for rows in self.batches())

    @cached_property
    def markers(self) -> Tensor:
        """The neurons each token activates most: (T, K_a) int32 indices of the highest |h| (CMoE, section 4.1).

        As in the paper's code, h is computed from L2-normalised inputs and L2-normalised weight rows, so
        that a neuron's norm does not decide; a bias is scaled along. Held for all tokens: 4·K_a bytes each.
        """
        normalised = normalised_rows(self.ffn)
        found = [
            normalised.hidden_of_unit(x).abs().topk(min(self.top, self.ffn.neurons), dim=1).indices.int()
            for x in self.inputs()
        ]
        return torch.cat(found)

    @cached_property
    def rates(self) -> Tensor:
        """Activation rate (F,): the share of tokens that mark the neuron."""
        counts = torch.bincount(self.markers.flatten().long(), minlength=self.ffn.neurons)
        return counts.float() / len(self.markers)

    def marker_chunks(self) -> Iterator[Tensor]:
        """The markers as 0/1 matrices (t, F) float32, `chunk` tokens at a time."""
        for rows in self.markers.split(self.chunk):
            yield torch.zeros(len(rows), self.ffn.neurons).scatter_(1, rows.long(), 1.0)


@dataclass(frozen=True)
class _NormalisedRows:
    ffn: FFNWeights
    up_norm: Tensor
    gate_norm: Tensor | None

    def hidden_of_unit(self, x: Tensor) -> Tensor:
        """Activations (t, F) of x with x and every weight row at unit length."""
        norm = x.norm(dim=1, keepdim=True).clamp_min(1e-12)
        ffn, act = self.ffn, self.ffn.act()
        up = F.linear(x, ffn.up, ffn.up_bias) / (norm * self.up_norm)
        if ffn.gate is None:
            return act(up)
        gate = F.linear(x, ffn.gate, ffn.gate_bias) / (norm * self.gate_norm)
        return act(gate) * (act(up) if ffn.activate_up else up)


def normalised_rows(ffn: FFNWeights) -> _NormalisedRows:
    def norms(rows: Tensor) -> Tensor:
        return rows.norm(dim=1).clamp_min(1e-12)

    return _NormalisedRows(ffn, norms(ffn.up), None if ffn.gate is None else norms(ffn.gate))


def contributions(routed: FFNWeights, experts: int, x: Tensor) -> Tensor:
    """Squared norm (T, E) of what each expert adds to the output, for `routed` neurons expert after expert.

    ‖Σ h_n w_n‖² = hᵀ(W Wᵀ)h costs F·M multiply-adds a token instead of F·D when experts are narrower than D.
    """
    tokens, (neurons, width) = len(x), routed.up.shape
    h = routed.hidden(x).view(tokens, experts, neurons // experts).transpose(0, 1)
    down = routed.down.view(experts, neurons // experts, width)
    if neurons // experts < width:
        gram = down @ down.transpose(1, 2)
        return ((h @ gram) * h).sum(-1).clamp_min(0).t()
    return torch.stack([(h[e] @ down[e]).square().sum(-1) for e in range(experts)], dim=1)


def firing(ffn: FFNWeights, x: Tensor) -> Tensor:
    """How strongly each neuron fires (T, F): |h| where the activation is positive, 0 elsewhere.

    In a gated FFN the gate's activation decides. For ReLU this is |h| itself; for GELU and SiLU it leaves
    out the small negative values, as a ReLU in their place would.
    """
    act, up = ffn.act(), F.linear(x, ffn.up, ffn.up_bias)
    if ffn.gate is None:
        return act(up).clamp_min(0)
    gate = act(F.linear(x, ffn.gate, ffn.gate_bias)).clamp_min(0)
    return gate * (act(up) if ffn.activate_up else up).abs()


def activation_mass(routed: FFNWeights, experts: int, x: Tensor) -> Tensor:
    """Each expert's positive activation mass (T, E), float32: MoEfication's ground truth (section 3.2)."""
    return firing(routed, x).float().view(len(x), experts, -1).sum(-1)


def captured(mass: Tensor, chosen: Tensor) -> Tensor:
    """The share of each token's mass (T, E) in its chosen experts (T, K), for the tokens that have any mass."""
    total = mass.sum(1)
    some = total > 0
    return mass.gather(1, chosen).sum(1)[some] / total[some]


def token_weight(ffn: FFNWeights, stats: NeuronStats) -> Callable[[Tensor], Tensor]:
    """Weights (t,) of tokens by their output (t, D): 1, and less for outputs longer than the median.

    A few tokens of a language model have outputs a thousand times as long as the others (its attention
    sinks); unweighted, least squares fits them alone.
    """
    norms = torch.cat([ffn.forward(x).norm(dim=1) for x in _first(stats.inputs(), 8)])
    median = norms.median().clamp_min(1e-12)
    return lambda y: (median / y.norm(dim=1).clamp_min(1e-12)).clamp_max(1.0).square()


def _first(chunks: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    for _, x in zip(range(count), chunks, strict=False):
        yield x
