"""Quality of a converted model: perplexity, agreement with the dense model, and how well it routes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moefy import kernels
from moefy.calibrate import output_mask, row_mask, rows_of, special_prefix
from moefy.conversion.one_pass import in_one_piece
from moefy.conversion.quality import Routing, RoutingTally
from moefy.errors import MoefyError
from moefy.heads import head_of
from moefy.moe import MoEFFN, moe_layers
from moefy.usage import realised_fraction, usage

Progress = Callable[[int, int], None]
NO_TARGET = -100


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log-likelihood) over `tokens` predicted tokens, and the protocol behind it.

    Consecutive windows of `window` tokens, of which the first `prefix` are special ones and the other `stride` text,
    without overlap; each is scored on its own, and its first token, which has no context, is not counted.
    """

    perplexity: float
    tokens: int
    windows: int
    window: int
    stride: int
    prefix: int

    def protocol(self) -> str:
        return (
            f"{self.windows} windows of {self.window} tokens, stride {self.stride}, {self.tokens} tokens predicted, "
            f"{self.prefix} special tokens before each window"
        )


# Rows of logits that are worked on at a time: of a vocabulary of 250,000 all of a window of 2,048 are 2 GB, and copies.
_ROWS = 256


class _Loss:
    """Adds up the negative log-likelihood of windows, (N, window) in all, by one model's logits."""

    def __init__(self, model: nn.Module, windows: Tensor, prefix: int):
        self.model, self.windows, self.prefix, self.first = model, windows, prefix, max(prefix, 1)
        self.loss, self.count = 0.0, 0
        if windows.shape[1] <= self.first:
            raise MoefyError(f"A window of {windows.shape[1]} tokens has nothing to predict; make it larger.")

    def add(self, ids: Tensor, real: Tensor) -> Tensor:
        """The model's logits (1, window, vocabulary) of one window (window,); `real`, of its shape, is 0 at padding."""
        logits = _causal_logits(self.model, ids[None], None if real.all() else real[None])
        counted = (real.bool() & (real.cumsum(0) > self.first))[1:]
        targets = ids[1:].masked_fill(~counted, NO_TARGET).to(logits.device)
        for rows, aims in zip(logits[0, :-1].split(_ROWS), targets.split(_ROWS), strict=True):
            self.loss += F.cross_entropy(rows.float(), aims, ignore_index=NO_TARGET, reduction="sum").item()
        self.count += int(counted.sum())
        return logits

    def result(self) -> Perplexity:
        if self.count == 0:
            raise MoefyError("There is nothing to predict, or only padding; give some text.")
        mean, (count, window) = self.loss / self.count, self.windows.shape
        if not math.isfinite(mean):
            raise MoefyError(
                f"The loss of this {type(self.model).__name__} is {mean}: its weights are broken, or its type "
                f"overflows (load it with --dtype float32)."
            )
        exact = math.exp(min(mean, 700.0))
        return Perplexity(exact, self.count, count, window, window - self.prefix, self.prefix)


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, prefix: int = 0, progress: Progress | None = None) -> Perplexity:
    """Perplexity of a causal language model over token windows (N, window), see `calibrate.token_windows`.

    `prefix` is the number of special tokens at the start of every window; they are context, not predicted.
    MoefyError if a window holds nothing to predict, or the loss is not finite.
    """
    model.eval()
    loss = _Loss(model, windows, prefix)
    for i, ids in enumerate(windows):
        loss.add(ids, torch.ones_like(ids))
        if progress:
            progress(i + 1, len(windows))
    return loss.result()


def _causal_logits(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    if head_of(model) != "causal":
        raise MoefyError(f"Perplexity needs a causal language model; this is a {type(model).__name__}.")
    device = next(model.parameters()).device
    feed = {"input_ids": ids.to(device)} | ({} if mask is None else {"attention_mask": mask.to(device)})
    return model(**feed, use_cache=False).logits


def check_comparable(model: Any, other: Any) -> None:
    """MoefyError if the two models do not take the same token ids in the same way."""
    ours, theirs = (_kind_of_input(m) for m in (model, other))
    if ours != theirs:
        raise MoefyError(
            f"A {ours[0]} of {ours[1]} token ids and a {theirs[0]} of {theirs[1]} cannot run on the same input; "
            f"compare with the dense model that this one came from."
        )


def _kind_of_input(model: Any) -> tuple[str, int | None]:
    kind = "causal language model" if head_of(model) == "causal" else "model"
    kind = "encoder-decoder" if getattr(model.config, "is_encoder_decoder", False) else kind
    return kind, getattr(model.config.get_text_config(), "vocab_size", None)


@dataclass(frozen=True)
class Agreement:
    """How near a converted model's outputs are to the dense model's, over `rows` output vectors.

    `error` is ‖dense - converted‖² / ‖dense‖² of the outputs; for models with logits `top1` is the share
    of rows with the same highest logit and `kl` the mean divergence from the dense distribution in nats.
    """

    rows: int
    error: float
    top1: float | None = None
    kl: float | None = None


# Logits below this are of tokens that a model rules out, by the lowest number of its type or by infinity, as Chameleon
# does those of images: exp of them is 0, and they are no outputs to compare.
_NEVER = -1e4


class _Near:
    """Adds up how near the outputs of two models are."""

    def __init__(self) -> None:
        self.lost = self.total = self.top1 = self.kl = 0.0
        self.rows = 0
        self.has_logits = False

    def add(self, ours: Tensor, theirs: Tensor, mask: Tensor | None, are_logits: bool) -> None:
        """Two outputs of one shape (..., V), without the rows that `mask` (...) leaves out, if there is one."""
        if ours.shape != theirs.shape:
            raise MoefyError(
                f"The outputs of the two models differ in shape, {tuple(ours.shape)} and {tuple(theirs.shape)}; "
                f"compare with the dense model that this one came from."
            )
        if isinstance(mask, Tensor) and mask.shape == ours.shape[:-1]:
            ours, theirs = ours[mask.bool()], theirs[mask.bool()]
        ours, theirs = ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, theirs.shape[-1])
        for a, b in zip(ours.split(_ROWS), theirs.split(_ROWS), strict=True):
            never = (a < _NEVER) & (b < _NEVER) if are_logits else torch.zeros((), dtype=torch.bool, device=a.device)
            if never.any():
                a, b = a.masked_fill(never, _NEVER), b.masked_fill(never, _NEVER)
            self.lost += (a - b).square().sum().item()
            self.total += b.masked_fill(never, 0).square().sum().item()
            self.top1 += (a.argmax(-1) == b.argmax(-1)).sum().item()
            self.kl += F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum").item()
        self.rows += len(ours)
        self.has_logits = are_logits

    def result(self) -> Agreement:
        if self.rows == 0:
            raise MoefyError("There is nothing to compare the models on; give some text.")
        error = self.lost / self.total if self.total else 0.0
        if not self.has_logits:
            return Agreement(self.rows, error)
        return Agreement(self.rows, error, self.top1 / self.rows, self.kl / self.rows)


@torch.no_grad()
def agreement(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    step: Callable[[], None] = lambda: None,
) -> Agreement:
    """Compare two models on model inputs; padding is left out where the output has a row a token.

    `step()` is called after each of the models' passes. MoefyError if their outputs differ in shape.
    """
    model.eval(), dense.eval()
    near = _Near()
    for batch in batches:
        outputs = []
        for each in (model, dense):
            outputs.append(_output(each, batch))
            step()
        (ours, _), (theirs, are_logits) = outputs
        near.add(ours, theirs, output_mask(model, batch), are_logits)
    return near.result()


def _output(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """A model's logits, or its first output if it has none, and whether they are logits.

    Of a question-answering head those of both ends, beside each other.
    """
    out = model(**batch)
    if "start_logits" in out and "end_logits" in out:
        return torch.stack([out["start_logits"], out["end_logits"]], dim=-1).float(), False
    return (out["logits"] if "logits" in out else out[0]).float(), "logits" in out


@torch.no_grad()
def routing(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], step: Callable[[], None] = lambda: None
) -> dict[str, Routing]:
    """What every routed layer chooses, beside the ground truths, over the real tokens of model inputs.

    Layers in int8 are left out: the ground truths look at the weights, which are no longer there. `step()` is called
    after each batch.
    """
    layers = _routed(model)
    tallies = {name: RoutingTally(moe) for name, moe in layers.items()}
    batch: Mapping[str, Any] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], out: Tensor) -> None:
            rows = rows_of(args, kwargs)
            keep = row_mask(model, name, batch, len(rows))
            tallies[name].add(rows if keep is None else rows[keep])

        return hook

    handles = [moe.register_forward_hook(watch(name), with_kwargs=True) for name, moe in layers.items()]
    try:
        # The ground truths look at the weights, which the native kernel keeps packed.
        with in_one_piece(model), kernels.using("torch"):
            for batch in batches:
                model(**batch)
                step()
    finally:
        for handle in handles:
            handle.remove()
    return {name: tally.result() for name, tally in tallies.items() if tally.tokens}


def _routed(model: nn.Module) -> dict[str, MoEFFN]:
    return {n: m for n, m in moe_layers(model).items() if m.routes and not m.is_int8}


#: Batches, a few thousand tokens, that settle shares to a percent.
FEW = 4


@torch.no_grad()
def evaluate_model(
    model: nn.Module,
    dense: nn.Module | None,
    batches: list[dict[str, Tensor]],
    tokenizer: Any,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Every figure that fits the model, on batches like those of `text_calibration`, as one flat dictionary.

    Rows may be padded where an `attention_mask` says so. `progress(done, total)` counts the passes of both models.
    MoefyError if the models do not take the same input, if nothing can be measured, or as of `perplexity` and
    `agreement`.
    """
    if dense is not None:
        check_comparable(model, dense)
    if dense is None and head_of(model) != "causal" and not moe_layers(model):
        raise MoefyError(f"A {type(model).__name__} has no perplexity; compare it with --against another model.")
    few, models = batches[:FEW], 1 if dense is None else 2
    whole = sum(len(batch["input_ids"]) for batch in batches) * models if head_of(model) == "causal" else 0
    compared = whole or (len(few) * 2 if dense is not None else 0)
    watched = few if _routed(model) or not compared else []
    done, total = itertools.count(1), compared + len(watched)
    step = (lambda: progress(next(done), total)) if progress else lambda: None
    figures: dict[str, Any] = {}
    near: Agreement | None = None
    with usage(model) as counted:
        if head_of(model) == "causal":
            figures, near = _language_figures(model, dense, batches, tokenizer, step)
        elif dense is not None:
            near = agreement(model, dense, few, step)
    if near is not None:
        figures.update(output_error=near.error)
        if near.top1 is not None:
            figures.update(top1_agreement=near.top1, kl_nats=near.kl)
    with usage(model) as seen:
        routed = routing(model, watched, step)
    counted = counted if compared else seen
    if counted:
        figures["active_fraction"] = realised_fraction(model, counted)
    if routed:
        figures.update(_routing_figures(routed))
    return figures


def _language_figures(
    model: nn.Module,
    dense: nn.Module | None,
    batches: list[dict[str, Tensor]],
    tokenizer: Any,
    step: Callable[[], None],
) -> tuple[dict[str, Any], Agreement | None]:
    """Perplexities and, on the first windows, the agreement with the dense model, in one pass of each."""
    widths = {batch["input_ids"].shape[1] for batch in batches}
    if len(widths) != 1:
        raise MoefyError(f"Perplexity is over windows of one width, and these are {sorted(widths)}; pad them to one.")
    windows, prefix = torch.cat([b["input_ids"] for b in batches]), len(special_prefix(tokenizer))
    real = torch.cat([b.get("attention_mask", torch.ones_like(b["input_ids"])) for b in batches])
    losses, near = [_Loss(m.eval(), windows, prefix) for m in (model, dense) if m is not None], _Near()
    for i, ids in enumerate(windows):
        outputs = []
        for loss in losses:
            outputs.append(loss.add(ids, real[i]))
            step()
        if dense is not None and i < FEW:
            near.add(outputs[0].float(), outputs[1].float(), real[i : i + 1], are_logits=True)
    ours, *theirs = (loss.result() for loss in losses)
    figures: dict[str, Any] = {"perplexity": ours.perplexity, "protocol": ours.protocol()}
    if not theirs:
        return figures, None
    ratio = ours.perplexity / theirs[0].perplexity
    return figures | {"dense_perplexity": theirs[0].perplexity, "ratio": ratio}, near.result()


def _routing_figures(routed: Mapping[str, Routing]) -> dict[str, Any]:
    def mean(of: Callable[[Routing], float]) -> float:
        return sum(map(of, routed.values())) / len(routed)

    return {
        "router_recall": mean(lambda r: r.recall),
        "overlap_with_ground_truth": mean(lambda r: r.overlap),
        "captured_mass": mean(lambda r: r.mass),
        "captured_mass_of_ground_truth": mean(lambda r: r.best_mass),
        "expert_imbalance": mean(lambda r: r.imbalance),
        "layers": {
            n: {"experts": r.experts, "recall": r.recall, "overlap": r.overlap, "mass": r.mass, "load": r.load.tolist()}
            for n, r in routed.items()
        },
    }
