"""Tasks by name: what a model is measured on, calibrated on and fine-tuned on.

A kind of task is a class in a file of its own; a task is one line here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.calibrate import check_ids, ids_checked, spread
from moefy.errors import MoefyError
from moefy.heads import head_of
from moefy.tasks.base import (
    Progress,
    Task,
    by_answers,
    by_length,
    collate,
    longest_of,
    pad_id,
    padding,
    sequences_of,
)
from moefy.tasks.choice import ARC, PIQA, RACE
from moefy.tasks.classification import MNLI, MRPC, RTE, SST2
from moefy.tasks.qa import SQUAD
from moefy.tasks.rows import read_rows
from moefy.tasks.text_to_text import TEXT_TO_TEXT

__all__ = [
    "TASKS",
    "Task",
    "evaluate_examples",
    "evaluate_task",
    "example_batches",
    "named",
    "task_batches",
    "task_calibration",
    "task_examples",
]

TASKS: dict[str, Task] = {t.name: t for t in (SST2, MNLI, MRPC, RTE, PIQA, ARC, RACE, SQUAD, TEXT_TO_TEXT)}


def named(task: str | Task) -> Task:
    """The task of that name, or MoefyError."""
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise MoefyError(f"There is no task {task!r}; choose one of {', '.join(TASKS)}.")
    return TASKS[task]


def task_examples(task: str | Task, data: str | Path | Sequence[str | Path], limit: int | None = None) -> list[Any]:
    """The checked examples of data files or hub data sets; with `limit`, that many spread evenly over them."""
    found = named(task).examples(read_rows(data))
    if not found:
        listed = [data] if isinstance(data, (str, Path)) else data
        raise MoefyError(f"There are no questions in {', '.join(map(str, listed))}; give data with some.")
    return found if limit is None else spread(found, limit)


def evaluate_task(
    model: Any,
    tokenizer: Any,
    task: str | Task,
    data: str | Path | Sequence[str | Path],
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """A model's figures on a task, each between 0 and 1, the main one first.

    `task` is a name or a Task, `data` a file, a hub data set (`hf:NAME`) or several, of which the first `limit`
    examples count. MoefyError without a tokenizer, for a task or data that are not known or cannot be read, and for ids
    beyond the model's vocabulary.
    """
    _needs_tokenizer(tokenizer)
    return evaluate_examples(model, tokenizer, task, task_examples(task, data, limit), progress)


def evaluate_examples(
    model: Any, tokenizer: Any, task: str | Task, examples: Sequence[Any], progress: Progress | None = None
) -> dict[str, float]:
    """`evaluate_task` on examples that `task_examples` has read."""
    _needs_tokenizer(tokenizer)
    with ids_checked(model):
        return named(task).evaluate(model, tokenizer, examples, progress)


def task_calibration(
    model: Any,
    tokenizer: Any,
    task: str | Task,
    data: str | Path | Sequence[str | Path],
    *,
    tokens: int = 16384,
    batch_tokens: int = 2048,
) -> list[dict[str, Tensor]]:
    """Model inputs from a task's (training) data, about `tokens` real ones, for `convert`.

    Padded batches of inputs of like length with their masks, in a shuffled order that is the same each time;
    an encoder-decoder also gets the decoder's inputs and mask, as in training. Raises MoefyError if the data
    or the model's head does not fit the task.
    """
    _needs_tokenizer(tokenizer)
    found = named(task)
    found.check(model)
    return _batches(model, tokenizer, found, task_examples(task, data), tokens, batch_tokens)[0]


def task_batches(
    model: Any,
    tokenizer: Any,
    task: str | Task,
    data: str | Path | Sequence[str | Path],
    *,
    tokens: int = 16384,
    batch_tokens: int = 2048,
) -> tuple[list[dict[str, Tensor]], list[Tensor] | None, tuple[str, ...]]:
    """What `task_calibration` gives, and the class of each batch's sequences (N,) with names where the task has any.

    A multiple-choice head sees as many sequences of an example as it has answers.
    """
    return example_batches(model, tokenizer, task, task_examples(task, data), tokens=tokens, batch_tokens=batch_tokens)


def example_batches(
    model: Any,
    tokenizer: Any,
    task: str | Task,
    examples: Sequence[Any],
    *,
    tokens: int = 16384,
    batch_tokens: int = 2048,
) -> tuple[list[dict[str, Tensor]], list[Tensor] | None, tuple[str, ...]]:
    """`task_batches` of examples that `task_examples` has read."""
    _needs_tokenizer(tokenizer)
    found = named(task)
    found.check(model)
    batches, marks = _batches(model, tokenizer, found, examples, tokens, batch_tokens)
    names = found.class_names(model)
    return (batches, marks, names) if names else (batches, None, ())


def _batches(
    model: Any,
    tokenizer: Any,
    task: Task,
    examples: Sequence[Any],
    tokens: int,
    batch_tokens: int,
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Batches of training features of examples spread over the data, and the classes of their sequences."""
    # Spread over the data, which may be sorted; a first look at some examples tells how many it takes.
    first = spread(examples, 64)
    mean = max(1.0, sum(_tokens(f) for f in task.encode(model, tokenizer, first)) / len(first))
    chosen = spread(examples, max(2, round(tokens / mean)))
    features = task.encode(model, tokenizer, chosen)
    check_ids(model, [i for f in features for row in sequences_of(f) for i in row])
    pad = padding(model, tokenizer) if head_of(model) == "classification" else pad_id(tokenizer)
    batches, marks = [], []
    groups = [
        [alike[i] for i in group]
        for alike in by_answers(features)
        for group in by_length([len(sequences_of(features[i])) * longest_of(features[i]) for i in alike], batch_tokens)
    ]
    classed = bool(task.class_names(model))  # then a feature an example; a long context has several for an answer in it
    random.Random(0).shuffle(groups)  # else the first tokens, and the last, would be those of inputs of one length
    for indices in groups:
        batch = collate([features[i] for i in indices], pad)
        labels = batch.pop("labels", None)
        batch = {k: v for k, v in batch.items() if not k.endswith("_positions")}
        if head_of(model) == "seq2seq":
            assert labels is not None
            batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
            batch["decoder_attention_mask"] = (labels != -100).long()
        batches.append(batch)
        if classed:
            marks.append(torch.tensor([mark for i in indices for mark in task.classes(model, chosen[i])]))
    return batches, marks


def _tokens(feature: dict[str, Any]) -> int:
    return sum(map(len, sequences_of(feature)))


def _needs_tokenizer(tokenizer: Any) -> None:
    if tokenizer is None:
        raise MoefyError("This model has no tokenizer, so a task's text cannot be fed to it.")
