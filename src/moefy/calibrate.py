"""Calibration inputs: text to batches of token windows, which tokens count, and their fingerprint."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moefy.errors import MoefyError
from moefy.sites import token_rows

T = TypeVar("T")


def token_windows(tokenizer: Any, texts: str | Iterable[str], window: int, windows: int | None = None) -> Tensor:
    """Consecutive, non-overlapping token windows (N, window) of the texts joined by blank lines.

    Each window starts with the tokenizer's BOS (or CLS) token if the tokenizer starts texts with one.
    At most `windows` are returned. Raises MoefyError if the text is shorter than one window.
    """
    text = texts if isinstance(texts, str) else "\n\n".join(texts)
    prefix = special_prefix(tokenizer)
    body = window - len(prefix)
    if body < 1:
        raise MoefyError(f"A window of {window} tokens leaves no room for text; make it larger.")
    ids = _first_ids(tokenizer, text, None if windows is None else windows * body)
    count = len(ids) // body
    if count == 0:
        raise MoefyError(
            f"The text is shorter than a window: {len(ids)} tokens, and a window takes {body}; "
            f"give more text or smaller windows."
        )
    count = min(count, windows or count)
    rows = torch.tensor(ids[: count * body], dtype=torch.long).view(count, body)
    return torch.cat([torch.tensor(prefix, dtype=torch.long).expand(count, -1), rows], dim=1)


def special_prefix(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text, as ids (often none, or one BOS)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []


def _first_ids(tokenizer: Any, text: str, wanted: int | None) -> list[int]:
    """At least `wanted` ids if the text has so many: tokenising a whole corpus to use its first windows takes minutes.

    Texts average under 12 characters a token, but a rule of 80 dashes may be one token.
    """
    length = len(text) if wanted is None else wanted * 12
    while True:
        ids = tokenizer(text[:length], add_special_tokens=False, verbose=False)["input_ids"]
        if length >= len(text) or len(ids) >= (wanted or 0):
            return ids
        length *= 4


def positions(model: Any) -> int | None:
    """Tokens that the model has positions for, None if it does not say."""
    config = model.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    # RoBERTa and its kin count positions from their padding token's id on, so some rows are never used.
    embeddings = getattr(getattr(model, "base_model", None), "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    unused = getattr(table, "padding_idx", None)
    if found is not None and found < 1:
        return None
    return found if table is None or unused is None else table.num_embeddings - unused - 1


def text_calibration(
    tokenizer: Any,
    texts: str | Iterable[str],
    *,
    window: int = 1024,
    windows: int = 16,
    batch_size: int = 1,
    decoder_start: int | None = None,
) -> list[dict[str, Tensor]]:
    """Batches of model inputs from text: `input_ids` and `attention_mask`, each (batch_size, window).

    With `decoder_start` (an encoder-decoder's start token) each window is cut in two: the first half
    is the encoder's input, the second the decoder's, shifted right by the start token. Fewer than `windows` where the
    text ends; MoefyError where there is none, see `token_windows`.
    """
    if decoder_start is not None and window < 2:
        raise MoefyError("A window of 1 token cannot be cut in two, as an encoder-decoder needs; make it larger.")
    rows = token_windows(tokenizer, texts, window, windows)
    batches = []
    for ids in rows.split(batch_size):
        if decoder_start is None:
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            continue
        source, target = ids[:, : window // 2], ids[:, window // 2 :]
        start = torch.full((len(ids), 1), decoder_start, dtype=torch.long)
        batches.append(
            {
                "input_ids": source,
                "attention_mask": torch.ones_like(source),
                "decoder_input_ids": torch.cat([start, target[:, :-1]], dim=1),
            }
        )
    return batches


@dataclass(frozen=True)
class CalibrationInfo:
    """What a conversion was calibrated on: stored with the checkpoint."""

    tokens: int
    batches: int
    fingerprint: str

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, Any]]) -> CalibrationInfo:
        digest, tokens = hashlib.sha256(), 0
        for batch in batches:
            for key in sorted(batch):
                value = batch[key]
                if isinstance(value, Tensor):
                    add_tensor(digest, key, value)
            tokens += tokens_of(batch)
        return cls(tokens=tokens, batches=len(batches), fingerprint=digest.hexdigest()[:16])


def add_tensor(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    """Let a hash follow from a tensor's name, shape, type and values as well."""
    digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def check_batches(batches: Iterable[Mapping[str, Any]], what: str = "calibration") -> list[Mapping[str, Any]]:
    """The calibration as a list of model inputs, or a MoefyError that says what is wrong with it."""
    checked = list(batches)
    if not checked:
        raise MoefyError(f"The {what} is empty; give at least one batch of model inputs.")
    for i, batch in enumerate(checked):
        if not isinstance(batch, Mapping):
            raise MoefyError(
                f"{what.capitalize()} batch {i} is a {type(batch).__name__}; each must be a dict of model inputs, "
                f"such as moefy.text_calibration(tokenizer, text) gives."
            )
        for key, value in batch.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
                raise MoefyError(f"{what.capitalize()} batch {i} has NaN or infinite values in {key!r}.")
        ids = batch.get("input_ids")
        if ids is not None and (not isinstance(ids, Tensor) or not ids.numel()):
            raise MoefyError(f"{what.capitalize()} batch {i} has no tokens: its input_ids must be a tensor with some.")
        if ids is not None and (ids.is_floating_point() or ids.dtype == torch.bool):
            raise MoefyError(f"The input_ids of {what} batch {i} are {ids.dtype}; token ids are integers.")
    tokens = sum(map(tokens_of, checked))
    if tokens in (0, 1) and all("input_ids" in batch for batch in checked):  # masks that are added sum up to less
        raise MoefyError(f"The {what} has {tokens} real tokens, the rest is padding; give more text.")
    return checked


@contextmanager
def lookups_told(what: str) -> Iterator[None]:
    """MoefyError where torch finds an index beyond a table: of token ids, or of positions."""
    try:
        yield
    except IndexError as error:
        if "index out of range" not in str(error):
            raise
        raise MoefyError(
            f"The {what} has token ids that the model's vocabulary does not have, or more tokens in a row than the "
            f"model has positions for; use the model's own tokenizer, or shorter windows."
        ) from error


def check_ids(model: Any, ids: Tensor | Sequence[int]) -> None:
    """Raise MoefyError if token ids (of any shape) are beyond the rows of the model's embedding."""
    embedding, found = _embedding(model), torch.as_tensor(ids)
    if embedding is not None and found.numel() and int(found.max()) >= embedding.num_embeddings:
        raise MoefyError(
            f"The tokenizer gives the token {int(found.max())}, and the model's vocabulary has "
            f"{embedding.num_embeddings}; use the tokenizer that belongs to the model, or enlarge the embedding "
            f"(resize_token_embeddings)."
        )


@contextmanager
def ids_checked(model: Any) -> Iterator[None]:
    """`check_ids` for every batch that a model runs within a with block."""
    embedding = _embedding(model)
    if embedding is None:
        yield
        return
    hook = embedding.register_forward_pre_hook(
        lambda _, args, kwargs: check_ids(model, input_of(args, kwargs)), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


def _embedding(model: Any) -> nn.Embedding | None:
    """The embedding of a model's tokens; None if it has no tokens."""
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:  # how transformers says that a model has none
        return None
    return found if isinstance(found, nn.Embedding) else None


def without_cache(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch, for a pass that names its outputs and keeps no keys and values for later tokens: there are none.

    They would be 47 MB a window of 1,024 tokens of SmolLM2.
    """
    known = "use_cache" in inspect.signature(model.forward).parameters
    named = {name: value for name, value in batch.items() if name != "return_dict"}
    return {"use_cache": False, **named} if known else named


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spread over them."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def output_mask(model: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """The mask (N, L) of real tokens among the rows that a model gives out, None if every one counts.

    Of an encoder-decoder they are its decoder's, whose inputs are made of the labels if they are not given.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        labels, mask = batch.get("labels"), batch.get("decoder_attention_mask")
        if "decoder_input_ids" in batch or mask is not None:
            return mask
        if isinstance(labels, Tensor) and labels.ndim == 2:
            return labels.ne(-100)
    return batch.get("attention_mask")


def real_tokens(model: Any, site: str, batch: Mapping[str, Any]) -> Tensor | None:
    """The mask of real tokens among a site's inputs, None if every one counts.

    Sites of an encoder-decoder's decoder see the decoder's tokens, all others those of attention_mask.
    """
    if ".decoder." in f".{site}" and getattr(model.config, "is_encoder_decoder", False):
        return output_mask(model, batch)
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    dims = ids.ndim if isinstance(ids, Tensor) else 2  # 3 for a multiple-choice head, (N, answers, L)
    return mask if isinstance(mask, Tensor) and mask.ndim == dims else None


def token_mask(keep: Tensor | None, count: int) -> Tensor | None:
    """A mask of `count` tokens, flat; None if every one counts.

    None too where the mask is of other tokens, as in the vision tower of a model that sees.
    """
    return None if keep is None or keep.numel() != count else keep.reshape(-1).bool()


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor (..., D) that a module such as an FFN is called with, under whatever name."""
    return args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))


def rows_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The same as rows (T, D)."""
    x = input_of(args, kwargs)
    return x.reshape(-1, x.shape[-1])


def row_mask(model: nn.Module, site: str, batch: Mapping[str, Any], count: int) -> Tensor | None:
    """The mask (count,) of real tokens among the rows that an FFN is given at this moment, None if every one counts."""
    rows = token_rows(model, site)
    keep = token_mask(real_tokens(model, site, batch), count if rows is None else rows[1])
    return keep if keep is None or rows is None else keep[rows[0]]


def tokens_of(batch: Mapping[str, Any]) -> int:
    """How many real tokens a batch of model inputs has, 0 if it has no tokens."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    return int(mask.sum()) if isinstance(mask, Tensor) else ids.numel() if isinstance(ids, Tensor) else 0
