"""The ids of an input and its target: one way for training, calibration, scoring and writing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moefy.calibrate import special_prefix
from moefy.heads import head_of
from moefy.tasks.base import longest_input, pad_id


def encode_pair(model: Any, tokenizer: Any, source: str, target: str) -> tuple[list[int], list[int]]:
    """The ids of an input and of its target, which fit the model together.

    An encoder-decoder gets each by itself, cut at its end, with the tokenizer's special tokens. A causal model
    reads them as one text with a blank between; the blank belongs to the target, as in lm-evaluation-harness
    (to byte-level tokenizers " film" is one token). What does not fit is cut from the input's start, and from
    the target's end where the target alone fills the model. At least one id of the input is left.
    """
    longest = longest_input(model, tokenizer)
    if head_of(model) == "seq2seq":
        ids = tokenizer(source, truncation=True, max_length=longest)["input_ids"]
        return ids, tokenizer(text_target=target, truncation=True, max_length=longest)["input_ids"]
    context = source.rstrip()
    blank = source[len(context) :] or ("" if target[:1].isspace() else " ")
    prefix = special_prefix(tokenizer)
    whole = prefix + _plain_ids(tokenizer, context + blank + target)
    # Tokens of the whole less those of the input: one that spans both is the input's, unless it is the last.
    cut = min(len(prefix) + len(_plain_ids(tokenizer, context)), len(whole) - 1) if target.strip() else len(whole)
    left, right = whole[: max(0, cut)] or _start(tokenizer), whole[max(0, cut) :][: longest - 1]
    return left[-(longest - len(right)) :], right


def encode_pairs(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Training features of (input, target) pairs; a causal model reads both and learns the target and its end."""
    longest, end, features = longest_input(model, tokenizer), _end(tokenizer), []
    for source, target in pairs:
        left, right = encode_pair(model, tokenizer, source, target)
        if head_of(model) == "seq2seq":
            features.append({"input_ids": left, "labels": right})
            continue
        ids, labels = [*left, *right, end], [-100] * len(left) + [*right, end]
        features.append({"input_ids": ids[-longest:], "labels": labels[-longest:]})
    return features


def prompt_ids(tokenizer: Any, source: str) -> list[int]:
    """An input alone as a causal model reads it: without blanks at its end, and never empty."""
    return special_prefix(tokenizer) + _plain_ids(tokenizer, source.rstrip()) or _start(tokenizer)


def _start(tokenizer: Any) -> list[int]:
    """What stands for an empty input where the tokenizer starts texts with nothing: the end of the text before."""
    return [_end(tokenizer)]


def _end(tokenizer: Any) -> int:
    return int(tokenizer.eos_token_id) if tokenizer.eos_token_id is not None else pad_id(tokenizer)


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    # What some tokenizers put after a text (BERT's [SEP]) has no place between an input and its target.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
