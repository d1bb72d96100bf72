"""What fine-tuning minimises: the text's own loss, or the divergence from a teacher's predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moefy.calibrate import output_mask, without_cache
from moefy.errors import MoefyError
from moefy.heads import head_of

Batch = Mapping[str, Any]


def text_loss(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy in nats to the batch's `labels`; without any a causal language model predicts its next tokens.

    Padding is left out. MoefyError if there is nothing to be compared with.
    """
    inputs = without_cache(model, batch)
    if "labels" not in inputs and head_of(model) == "causal" and isinstance(inputs.get("input_ids"), Tensor):
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        inputs["labels"] = ids if mask is None else ids.masked_fill((mask == 0) | _after_padding(mask), -100)
    loss = getattr(model(**inputs), "loss", None)
    if loss is None:
        raise MoefyError(
            f"A {type(model).__name__} has no loss on inputs without labels: give batches with labels that its head "
            f"takes, or a teacher."
        )
    return loss


def _after_padding(mask: Tensor) -> Tensor:
    """The tokens (N, L) whose predecessor is padding, on the left: it would predict them from nothing."""
    return F.pad(mask[:, :-1] == 0, (1, 0))


def teacher_loss(model: Any, batch: Batch, teacher: Any) -> Tensor:
    """KL(teacher ‖ model) of the predictions in nats, the mean over real tokens (or over whatever has logits).

    Hinton et al., arXiv 1503.02531, at temperature 1. MoefyError if a model gives no logits or theirs differ in shape.
    """
    with torch.no_grad():
        wanted = _logits(teacher, batch)
    ours = _logits(model, batch)
    if ours.shape != wanted.shape:
        raise MoefyError(
            f"The teacher's predictions have the shape {tuple(wanted.shape)} and the model's {tuple(ours.shape)}; use "
            f"the dense model that it came from as the teacher."
        )
    mask = output_mask(model, batch)
    if isinstance(mask, Tensor) and mask.shape == ours.shape[:-1]:
        ours, wanted = ours[mask.bool()], wanted[mask.bool()]
    ours, wanted = (x.flatten(0, -2).float().log_softmax(-1) for x in (ours, wanted))
    return F.kl_div(ours, wanted, reduction="batchmean", log_target=True)


def _logits(model: Any, batch: Batch) -> Tensor:
    found = getattr(model(**without_cache(model, batch)), "logits", None)
    if not isinstance(found, Tensor):
        raise MoefyError(f"A {type(model).__name__} gives no logits, so it cannot be compared with a teacher.")
    return found
