"""What the calibration tokens do to one FFN, computed from its inputs and weights in chunks of tokens."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from moefy.errors import MoefyError
from moefy.types import FFNWeights, Partition, linear, products

# One token in eight is held out where something is chosen by what it does on tokens it was not fitted to, in blocks:
# a budget of 50 % whose thresholds were set on blocks of 256, 1,024 and 2,048 ran 53, 50 and 49 % of another document.
HELD_OUT, HELD_BLOCK = 8, 1024
# The median length of outputs is that of the first chunks with tokens, so many and with so many tokens together.
MEDIAN_CHUNKS, MEDIAN_TOKENS = 8, 1024
# Inputs, activations and outputs of a layer up to this size are computed once and held: 99,000 tokens of SmolLM2.
KEPT_BYTES = 1 << 30


@dataclass(frozen=True)
class NeuronStats:
    """The inputs of one FFN and what follows from them; of what is of size (T, F) at most KEPT_BYTES is held.

    `ffn` is in float32; `batches()` iterates over the real tokens' inputs, each (tokens, D), as often as
    needed; `chunk` tokens are worked on at a time; `top` is CMoE's K_a, the neurons marked per token.
    `metric` (D, D), positive semidefinite, says what an error e of the output costs: eᵀ·metric·e; None: ‖e‖².
    `targets()`, beside `batches()`, are the outputs that would undo what the layers before have lost, if known.
    """

    ffn: FFNWeights
    batches: Callable[[], Iterator[Tensor]]
    chunk: int = 1024
    top: int = 10
    name: str = field(default="this FFN")
    metric: Tensor | None = None
    targets: Callable[[], Iterator[Tensor]] | None = None
    _kept: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list, repr=False, compare=False)

    def inputs(self) -> Iterator[Tensor]:
        """The inputs in float32, at most `chunk` tokens (t, D) at a time."""
        for rows in self.batches():
            for x in rows.split(self.chunk):
                x = x.float()
                yield self._finite(x)

    def target_chunks(self) -> Iterator[Tensor | None]:
        """`targets` in the chunks of `inputs`, (t, D) float32; None again and again if they are not known."""
        if self.targets is None:
            return itertools.repeat(None)
        return (self._finite(y.float()) for rows in self.targets() for y in rows.split(self.chunk))

    def _finite(self, rows: Tensor) -> Tensor:
        if not rows.isfinite().all():
            raise MoefyError(
                f"The calibration gives NaN or infinite inputs to {self.name}; check the calibration data, "
                f"and load the model in bfloat16 or float32 if it is in float16, which may overflow."
            )
        return rows

    @cached_property
    def tokens(self) -> int:
        return sum(len(rows) for rows in self.batches())

    def activations(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Inputs (t, D), activations (t, F) and outputs (t, D), in the chunks of `inputs`."""
        if self._kept:
            yield from self._kept
            return
        found = []
        for x in self.inputs():
            h = self.ffn.hidden(x)
            chunk = x, h, self.ffn.forward_hidden(h)
            if self._fits:
                found.append(chunk)
            yield chunk
        self._kept[:] = found  # and not extend: two of these loops may be under way at once

    @property
    def _fits(self) -> bool:
        return self.tokens * 4 * (self.ffn.neurons + 2 * self.ffn.width) <= KEPT_BYTES

    def split_inputs(self, part: int = HELD_OUT - 1) -> Iterator[tuple[Tensor, Tensor]]:
        """The inputs (t, D) and which tokens (t,) bool are held out: every eighth block of up to 1,024 tokens.

        Blocks, because neighbours in a text are alike; `part` is the place of the block in its eight. With fewer
        than 16 tokens every one counts as held out.
        """
        start = 0
        for x in self.inputs():
            yield x, self._held_out(start, len(x), part)
            start += len(x)

    def held_out_tokens(self, part: int) -> int:
        """How many tokens `split_inputs(part)` holds out."""
        return int(self._held_out(0, self.tokens, part).sum())

    def split_activations(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """`activations`, and with each chunk which of its tokens are held out, as `split_inputs`."""
        start = 0
        for x, h, y in self.activations():
            yield x, h, y, self._held_out(start, len(x), HELD_OUT - 1)
            start += len(x)

    def without(self, part: int) -> NeuronStats:
        """The statistics of the tokens that `split_inputs(part)` does not hold out (of all, if it holds out all).

        What was computed over all tokens and is no list of them, as the Gram matrix, is taken over.
        """
        if self.tokens < 2 * HELD_OUT:
            return self
        kept = [tuple(_rows(each, keep) for each in chunk) for chunk, keep in self._kept_without(part)]
        view = copy.copy(self)
        for lists_tokens in ("tokens", "markers", "rates"):
            view.__dict__.pop(lists_tokens, None)
        view.__dict__.update(
            batches=lambda: (x[~held] for x, held in self.split_inputs(part)), targets=None, _kept=kept
        )
        return view

    def _kept_without(self, part: int) -> Iterator[tuple[tuple[Tensor, Tensor, Tensor], Tensor]]:
        start = 0
        for chunk in self._kept:
            keep = ~self._held_out(start, len(chunk[0]), part)
            start += len(chunk[0])
            if keep.any():
                yield chunk, keep

    def _held_out(self, start: int, count: int, part: int) -> Tensor:
        return (self.parts(start, count) == part) | (self.tokens < 2 * HELD_OUT)

    def parts(self, start: int, count: int) -> Tensor:
        """Which of the eight parts each of `count` tokens from `start` on is held out with (count,); -1: none."""
        if self.tokens < 2 * HELD_OUT:
            return torch.full((count,), -1)
        block = max(1, min(HELD_BLOCK, self.tokens // HELD_OUT))
        return torch.arange(start, start + count) // block % HELD_OUT

    @cached_property
    def token_weight(self) -> Callable[[Tensor], Tensor]:
        """Weights (t,) of tokens by their output (t, D): 1, and less for outputs longer than the median.

        A few tokens of a language model have outputs a thousand times as long as the others (its attention
        sinks); unweighted, least squares fits them alone.
        """
        if self._fits:
            deque(self.activations(), maxlen=0)  # all of them, or what is computed here would not be kept
        norms: list[Tensor] = []
        for _, _, y in self.activations():
            if len(y):  # batches may have nothing for an expert of a mixture
                norms.append(y.norm(dim=1))
            if len(norms) >= MEDIAN_CHUNKS and sum(map(len, norms)) >= MEDIAN_TOKENS:
                break
        median = torch.cat(norms).median().clamp_min(1e-12)
        return lambda y: (median / y.norm(dim=1).clamp_min(1e-12)).clamp_max(1.0).square()

    @cached_property
    def gram(self) -> Tensor:
        """Gram matrix (F + 1, F + 1) float64 of the activations and, last, a constant 1; token-weighted.

        MoefyError if activations or outputs are too large for float32, squared.
        """
        gram = torch.zeros(self.ffn.neurons + 1, self.ffn.neurons + 1, dtype=torch.float64)
        weigh = self.token_weight
        for _, h, y in self.activations():
            weight = weigh(y).sqrt()[:, None]
            h = torch.cat([h * weight, weight], dim=1)
            gram += products(h, h)
        if not gram.diagonal().isfinite().all():
            raise MoefyError(overflow(self.name))
        return gram

    def forget_gram(self) -> None:
        """Free the Gram matrix, 8·F² bytes; it is computed again if it is asked for."""
        self.__dict__.pop("gram", None)

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


def thinned(start: int, step: int) -> slice:
    """Every `step`-th of all tokens, among those from number `start` on: not the first of each chunk, which may be the
    one that begins a text."""
    return slice(-start % step, None, step)


def overflow(name: str) -> str:
    """The sentence about an FFN whose numbers are finite one by one and no longer when they are squared."""
    return f"What {name} computes on the calibration is too large for float32; its weights are broken, or the text is."


def _rows(tensor: Tensor, keep: Tensor) -> Tensor:
    return tensor if keep.all() else tensor[keep]


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
    return _squared_norms(routed, experts, routed.hidden(x))


def left_unpredicted(stats: NeuronStats, shared: Tensor, rest: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from activations (T, F) to those of the neurons `rest` less their regression on the neurons `shared`.

    The regression has a constant and the token weights of the refit, which can put it in their stead.
    """
    known = torch.cat([shared, torch.tensor([stats.ffn.neurons])])  # the Gram's constant
    within = stats.gram[known][:, known]
    within.diagonal().add_(1e-3 * within.diagonal().mean() + 1e-30)
    projection = torch.cholesky_solve(stats.gram[known][:, rest], torch.linalg.cholesky(within)).float()
    across = projection[:-1].t().contiguous()
    return lambda h: h[:, rest] - linear(h[:, shared], across) - projection[-1]


def unrepaired(stats: NeuronStats, partition: Partition) -> Callable[[Tensor], Tensor]:
    """A function from activations (T, F) to what losing each expert costs (T, E) after the shared neurons repair it.

    Of an activation counts what they do not predict; the cost is in `stats.metric`.
    """
    rest = partition.experts.flatten()
    left, routed = left_unpredicted(stats, partition.shared, rest), stats.ffn.take(rest)
    return lambda h: _squared_norms(routed, len(partition.experts), left(h), stats.metric)


def _squared_norms(routed: FFNWeights, experts: int, h: Tensor, metric: Tensor | None = None) -> Tensor:
    """Squared norm (T, E) of the outputs of experts with activations (T, E·M)."""
    tokens, (neurons, width) = len(h), routed.up.shape
    h = h.view(tokens, experts, neurons // experts).transpose(0, 1)
    down = routed.down.view(experts, neurons // experts, width)
    if neurons // experts < width or metric is not None:
        gram = (down if metric is None else down @ metric) @ down.transpose(1, 2)
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
    return firing(routed, x).float().unflatten(1, (experts, -1)).sum(-1)


def as_mask(chosen: Tensor, experts: int) -> Tensor:
    """The chosen experts (T, K), entries below 0 choosing nothing, as a mask (T, E)."""
    mask = torch.zeros(len(chosen), experts + 1, dtype=torch.bool, device=chosen.device)
    return mask.scatter_(1, chosen.long().where(chosen >= 0, experts), True)[:, :experts]


def captured(mass: Tensor, picked: Tensor) -> Tensor:
    """The share of each token's mass (T, E) in the experts picked (T, E), for the tokens that have any mass."""
    total = mass.sum(1)
    some = total > 0
    return (mass * picked).sum(1)[some] / total[some]
