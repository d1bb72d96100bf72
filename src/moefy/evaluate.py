"""Quality of a converted model: perplexity, agreement with the dense model, and how well it routes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moefy import kernels
from moefy.calibrate import row_mask
from moefy.moe import Usage, moe_layers
from moefy.quality import Routing, RoutingTally, routes
from moefy.types import MoefyError
from moefy.usage import realised_fraction, usage

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log-likelihood) over `tokens` predicted tokens, and the protocol behind it.

    Consecutive windows of `window` tokens, `stride` apart (equal: no overlap), each scored on its own;
    the first token of a window has no context and is not counted. `prefix` special tokens open each window.
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


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, prefix: int = 0, progress: Progress | None = None) -> Perplexity:
    """Perplexity of a causal language model over token windows (N, window), see `calibrate.token_windows`.

    `prefix` is the number of special tokens at the start of every window; they are context, not predicted.
    MoefyError if a window holds nothing to predict, or the loss is not finite.
    """
    model.eval()
    loss, count = 0.0, 0
    first = max(prefix, 1)
    if windows.shape[1] <= first:
        raise MoefyError(f"A window of {windows.shape[1]} tokens has nothing to predict; make it larger.")
    for i, ids in enumerate(windows):
        logits = _causal_logits(model, ids[None])[0, first - 1 : -1].float()
        loss += F.cross_entropy(logits, ids[first:].to(logits.device), reduction="sum").item()
        count += len(ids) - first
        if progress:
            progress(i + 1, len(windows))
    mean = loss / count
    if not math.isfinite(mean):
        raise MoefyError(
            f"The loss of this {type(model).__name__} is {mean}: its weights are broken, or its type overflows "
            f"(load it with --dtype float32)."
        )
    return Perplexity(
        math.exp(min(mean, 700.0)), count, len(windows), windows.shape[1], windows.shape[1] - prefix, prefix
    )


def _causal_logits(model: nn.Module, ids: Tensor) -> Tensor:
    if not is_causal_lm(model):
        raise MoefyError(f"Perplexity needs a causal language model; this is a {type(model).__name__}.")
    return model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits


def is_causal_lm(model: Any) -> bool:
    """Whether the model predicts each next token of its input."""
    names = {c.__name__.removeprefix("Moefy") for c in type(model).__mro__}
    ends = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # the last: Gemma 3 with its eyes
    return any(name.endswith(ends) for name in names) and not getattr(model.config, "is_encoder_decoder", False)


def check_comparable(model: Any, other: Any) -> None:
    """MoefyError if the two models do not take the same token ids in the same way."""
    ours, theirs = (_kind_of_input(m) for m in (model, other))
    if ours != theirs:
        raise MoefyError(
            f"A {ours[0]} of {ours[1]} token ids and a {theirs[0]} of {theirs[1]} cannot run on the same input; "
            f"compare with the dense model that this one came from."
        )


def _kind_of_input(model: Any) -> tuple[str, int | None]:
    kind = "causal language model" if is_causal_lm(model) else "model"
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


@torch.no_grad()
def agreement(model: nn.Module, dense: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Agreement:
    """Compare two models on model inputs; padding is left out where the output has a row a token.

    MoefyError if their outputs differ in shape.
    """
    model.eval(), dense.eval()
    lost = total = top1 = kl = 0.0
    rows = 0
    has_logits = False
    for batch in batches:
        (ours, _), (theirs, has_logits) = _output(model, batch), _output(dense, batch)
        if ours.shape != theirs.shape:
            raise MoefyError(
                f"The outputs of the two models differ in shape, {tuple(ours.shape)} and {tuple(theirs.shape)}; "
                f"compare with the dense model that this one came from."
            )
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.shape == ours.shape[:-1]:
            ours, theirs = ours[mask.bool()], theirs[mask.bool()]
        ours, theirs = ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, theirs.shape[-1])
        lost += (ours - theirs).square().sum().item()
        total += theirs.square().sum().item()
        top1 += (ours.argmax(-1) == theirs.argmax(-1)).sum().item()
        kl += F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum").item()
        rows += len(ours)
    if rows == 0:
        raise MoefyError("There is nothing to compare the models on; give some text.")
    error = lost / total if total else 0.0
    return Agreement(rows, error, top1 / rows, kl / rows) if has_logits else Agreement(rows, error)


def _output(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """A model's logits, or its first output if it has none, and whether they are logits."""
    out = model(**batch)
    return (out["logits"] if "logits" in out else out[0]).float(), "logits" in out


@torch.no_grad()
def routing(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Routing]:
    """What every routed layer chooses, beside the ground truths, over the real tokens of model inputs.

    Layers in int8 are left out: the ground truths look at the weights, which are no longer there.
    """
    layers = {n: m for n, m in moe_layers(model).items() if routes(m) and not m.is_int8}
    tallies = {name: RoutingTally(moe) for name, moe in layers.items()}
    batch: Mapping[str, Any] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            keep = row_mask(model, name, batch, len(rows))
            tallies[name].add(rows if keep is None else rows[keep])

        return hook

    handles = [moe.register_forward_hook(watch(name)) for name, moe in layers.items()]
    try:
        with kernels.using("torch"):  # the ground truths look at the weights, which the native kernel keeps packed
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: tally.result() for name, tally in tallies.items() if tally.tokens}


def evaluate_model(
    model: nn.Module,
    dense: nn.Module | None,
    batches: list[dict[str, Tensor]],
    tokenizer: Any,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Every figure that fits the model, on batches from `text_calibration`, as one flat dictionary."""
    from moefy.calibrate import special_prefix

    if dense is not None:
        check_comparable(model, dense)
    figures: dict[str, Any] = {}
    counted: dict[str, Usage] = {}
    if is_causal_lm(model):
        windows, prefix = torch.cat([b["input_ids"] for b in batches]), len(special_prefix(tokenizer))
        with usage(model) as counted:
            ours = perplexity(model, windows, prefix, progress)
        figures.update(perplexity=ours.perplexity, protocol=ours.protocol())
        if dense is not None:
            theirs = perplexity(dense, windows, prefix, progress)
            figures.update(dense_perplexity=theirs.perplexity, ratio=ours.perplexity / theirs.perplexity)
    elif dense is None and not moe_layers(model):
        raise MoefyError(f"A {type(model).__name__} has no perplexity; compare it with --against another model.")
    few = batches[:4]  # a few thousand tokens settle shares to a percent
    if dense is not None:
        with usage(model) as seen:
            near = agreement(model, dense, few)
        counted = counted or seen
        figures.update(output_error=near.error)
        if near.top1 is not None:
            figures.update(top1_agreement=near.top1, kl_nats=near.kl)
    with usage(model) as seen:
        routed = routing(model, few)
    counted = counted or seen
    if counted:
        figures["active_fraction"] = realised_fraction(model, counted)
    if routed:
        figures["router_recall"] = sum(r.recall for r in routed.values()) / len(routed)
        figures["overlap_with_ground_truth"] = sum(r.overlap for r in routed.values()) / len(routed)
        figures["captured_mass"] = sum(r.mass for r in routed.values()) / len(routed)
        figures["captured_mass_of_ground_truth"] = sum(r.best_mass for r in routed.values()) / len(routed)
        figures["expert_imbalance"] = sum(r.imbalance for r in routed.values()) / len(routed)
        figures["layers"] = {
            n: {"experts": r.experts, "recall": r.recall, "overlap": r.overlap, "mass": r.mass, "load": r.load.tolist()}
            for n, r in routed.items()
        }
    return figures
