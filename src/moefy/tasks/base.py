"""What a task is: rows to examples, examples to model inputs, and a model's figures on them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moefy.calibrate import positions
from moefy.errors import MoefyError
from moefy.sources.models import LOAD_ERRORS, check_finite, reason
from moefy.tasks.rows import Row

Progress = Callable[[int, int], None]
Inputs = dict[str, Tensor]
# Tokens of an input at most, whatever the model holds: memory grows with their square in the older models.
LONGEST = 2048
# Tokens of a batch, padding included.
BATCH_TOKENS = 2048


class Task(abc.ABC):
    """One way to use a model. Examples are plain objects of the task's own; everything else is shared."""

    name: str

    @abc.abstractmethod
    def examples(self, rows: Sequence[Row]) -> list[Any]:
        """Checked examples; MoefyError names the column or label that does not fit."""

    @abc.abstractmethod
    def check(self, model: Any) -> None:
        """MoefyError if this model cannot do the task."""

    @abc.abstractmethod
    def encode(self, model: Any, tokenizer: Any, examples: Sequence[Any]) -> list[dict[str, Any]]:
        """Each example as training features: lists of ids `input_ids` and, by the head, the kind of labels.

        For a multiple-choice head they are lists of such lists, one for each answer.
        """

    def classes(self, model: Any, example: Any) -> list[int]:
        """The class of each sequence that the model sees of an example, by its place in `class_names`.

        Of a task that has class names, `encode` makes one feature an example.
        """
        return []

    def class_names(self, model: Any) -> tuple[str, ...]:
        """What `classes` tells apart."""
        return ()

    @abc.abstractmethod
    def evaluate(
        self, model: Any, tokenizer: Any, examples: Sequence[Any], progress: Progress | None = None
    ) -> dict[str, float]:
        """Figures between 0 and 1, the main one first."""

    def model_class(self, config: Any) -> Any:
        """The Auto class whose head the task wants when a model without one is made ready for it."""
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM

    def head_options(self) -> dict[str, Any]:
        """Config values of a fresh head."""
        return {}


def longest_input(model: Any, tokenizer: Any) -> int:
    """Tokens of an input at most: what the model and its tokenizer hold, and LONGEST."""
    limits = (positions(model), getattr(tokenizer, "model_max_length", None), LONGEST)
    return min(int(limit) for limit in limits if limit)


def collate(features: Sequence[dict[str, Any]], pad: int, left: bool = False) -> Inputs:
    """Features to padded model inputs with an attention mask; labels of sequences are padded with -100.

    (N, L) each, or (N, answers, L) for a multiple-choice head, whose examples then have as many answers each.
    """
    batch: dict[str, Tensor] = {}
    answers = answers_of(features[0])
    for key in features[0]:
        values = [f[key] for f in features]
        if isinstance(values[0], int):
            batch[key] = torch.tensor(values)
            continue
        fill = -100 if key == "labels" else pad if key.endswith("input_ids") else 0
        batch[key] = padded([row for v in values for row in v] if answers else values, fill, left)
    batch["attention_mask"] = padded([[1] * len(row) for f in features for row in sequences_of(f)], 0, left)
    if not answers:
        return batch
    return {k: v.view(len(features), answers, -1) if v.ndim == 2 else v for k, v in batch.items()}


def sequences_of(feature: dict[str, Any]) -> list[list[int]]:
    """The ids of each sequence of a feature: one, or one for each answer."""
    ids = feature["input_ids"]
    return ids if answers_of(feature) else [ids]


def answers_of(feature: dict[str, Any]) -> int:
    """How many answers a feature of a multiple-choice head has; 0 for any other."""
    ids = feature["input_ids"]
    return len(ids) if ids and isinstance(ids[0], list) else 0


def longest_of(feature: dict[str, Any]) -> int:
    """Tokens of a feature's longest sequence."""
    return max(map(len, sequences_of(feature)))


def by_answers(features: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The indices of features that can share a batch, in their order: those with as many answers."""
    groups: dict[int, list[int]] = {}
    for i, feature in enumerate(features):
        groups.setdefault(answers_of(feature), []).append(i)
    return list(groups.values())


def padded(rows: Sequence[Sequence[int]], fill: int, left: bool = False) -> Tensor:
    """Rows of ids of any length as one (N, longest) int64 tensor."""
    width = max(len(r) for r in rows)
    out = torch.full((len(rows), width), fill, dtype=torch.long)
    for i, row in enumerate(rows):
        values = torch.tensor(list(row), dtype=torch.long)
        out[i, width - len(row) :] = values if left else out[i, width - len(row) :]
        if not left:
            out[i, : len(row)] = values
    return out


def by_length(lengths: Sequence[int], tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices in batches of like length, longest first, each of at most `tokens` tokens with its padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, tokens // max(1, lengths[order[0]]))
        yield order[:size]
        order = order[size:]


def refuse_head(task: str, model: Any, wanted: str) -> MoefyError:
    return MoefyError(f"The task {task} needs {wanted}; this is a {type(model).__name__}.")


def padding(model: Any, tokenizer: Any) -> int:
    """The id to pad a classification head's inputs with; a model that names none is told the tokenizer's.

    A head on a decoder reads each row's last token that is not this one, and refuses batches without it.
    """
    config = model.config.get_text_config()
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = pad_id(tokenizer)
    return int(config.pad_token_id)


def checked_steps(model: Any) -> Any:
    """A `logits_processor` for generation: MoefyError at the first step whose scores are not finite."""
    from transformers import LogitsProcessorList

    def check(_: Tensor, scores: Tensor) -> Tensor:
        check_finite(model, scores)
        return scores

    return LogitsProcessorList([check])


def greedy(model: Any, **options: Any) -> Tensor:
    """The ids (N, L) that a model writes, each the likeliest; MoefyError if it cannot, as with what some
    generation_config.json asks for."""
    one: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}
    one |= {"return_dict_in_generate": False, "logits_processor": checked_steps(model)}
    try:
        return model.generate(**one, **options)
    except LOAD_ERRORS as error:
        raise MoefyError(
            f"This {type(model).__name__} cannot write ({type(error).__name__}: {reason(error).rstrip('.')}); "
            f"if its generation_config.json asks for that, correct it."
        ) from None


def pad_id(tokenizer: Any) -> int:
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found or 0)
