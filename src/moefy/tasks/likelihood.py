"""How likely a language model finds a target after an input: causal models and encoder-decoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from moefy.heads import head_of
from moefy.sources.models import check_finite
from moefy.tasks.base import Progress, by_length, pad_id, padded
from moefy.tasks.pairs import encode_pair


@torch.no_grad()
def log_likelihoods(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], progress: Progress | None = None
) -> list[float]:
    """log p(target | input), summed over the target's tokens, for each (input, target)."""
    encoded = [encode_pair(model, tokenizer, *pair) for pair in pairs]
    found = [0.0] * len(pairs)
    done = 0
    for batch in by_length([len(source) + len(target) for source, target in encoded]):
        rows = [encoded[i] for i in batch]
        logits, targets = _forward(model, pad_id(tokenizer), rows)
        loss = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
        check_finite(model, loss)
        for i, value in zip(batch, (-loss.sum(1)).tolist(), strict=True):
            found[i] = value
        done += len(batch)
        if progress:
            progress(done, len(pairs))
    return found


def _forward(model: Any, pad: int, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    if head_of(model) == "seq2seq":
        ids = padded([source for source, _ in rows], pad)
        mask = padded([[1] * len(source) for source, _ in rows], 0)
        labels = padded([target for _, target in rows], -100)
        return model(input_ids=ids, attention_mask=mask, labels=labels).logits, labels
    ids = padded([source + target for source, target in rows], pad)
    mask = padded([[1] * (len(source) + len(target)) for source, target in rows], 0)
    targets = padded([[-100] * (len(source) - 1) + target + [-100] for source, target in rows], -100)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits, targets
