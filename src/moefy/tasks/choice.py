"""Multiple choice: PIQA, ARC and OpenBookQA, RACE.

A language model picks the likeliest answer after "Question: ... Answer:" (lm-evaluation-harness' prompts);
`accuracy` takes the whole log-likelihood, `accuracy_per_byte` divides it by the answer's length in bytes.
A model with a multiple-choice head is scored by its logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moefy.errors import MoefyError
from moefy.heads import head_of
from moefy.sources.models import check_finite
from moefy.tasks.base import Progress, Task, collate, longest_input, pad_id, refuse_head
from moefy.tasks.likelihood import log_likelihoods
from moefy.tasks.pairs import encode_pairs
from moefy.tasks.rows import PlacedRow, Row, column, label_text, place_of, text_of


@dataclass(frozen=True)
class Choices:
    prompt: str
    answers: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class MultipleChoice(Task):
    """`answers` are either one column of lists or, as in PIQA, one column for each answer."""

    name: str
    question: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    right: tuple[str, ...]
    passage: tuple[str, ...] = ()

    def examples(self, rows: Sequence[Row]) -> list[Choices]:
        rows = [flat for i, row in enumerate(rows) for flat in _flattened(row, place_of(row, i))]
        question, right = column(rows, self.question, self.name), column(rows, self.right, self.name)
        answers = [column(rows, names, self.name) for names in self.answers]
        passage = column(rows, self.passage, self.name) if self.passage else None
        found = []
        for i, row in enumerate(rows):
            place = place_of(row, i)
            texts, keys = self._answers(row, answers, place)
            prompt = f"Question: {text_of(row, question, place)}\nAnswer:"
            if passage:
                prompt = f"Article: {text_of(row, passage, place)}\n\n{prompt}"
            found.append(Choices(prompt, texts, self._right(row[right], keys, place)))
        return found

    def _answers(self, row: Row, columns: list[str], place: str) -> tuple[tuple[str, ...], list[str]]:
        """The answers and what names them: 0, 1, ... or the keys that the data gives."""
        value: Any = row[columns[0]] if len(columns) == 1 else [row[c] for c in columns]
        keys: Any = []
        if isinstance(value, dict):  # the hub's ARC: {"text": [...], "label": ["A", ...]}
            keys, value = value.get("label") or [], value.get("text")
        elif isinstance(value, list) and value and all(isinstance(v, dict) for v in value):  # ARC's own
            keys, value = [v.get("label") for v in value], [v.get("text") for v in value]
        if not isinstance(value, (list, tuple)) or len(value) < 2 or not isinstance(keys, (list, tuple)):
            raise MoefyError(f"{place} has no list of answers in {columns[0]!r}, which {self.name} needs.")
        if keys and len(keys) != len(value):
            raise MoefyError(f"{place} has {len(value)} answers and {len(keys)} labels for them.")
        texts = tuple(text_of({columns[0]: v}, columns[0], place) for v in value)
        if not all(text.strip() for text in texts):
            raise MoefyError(f"{place} has an empty answer in {columns[0]!r}; mend or remove it.")
        return texts, [label_text(k) for k in keys] or [str(i) for i in range(len(value))]

    def _right(self, value: Any, keys: list[str], place: str) -> int:
        text = label_text(value)
        letters = [chr(ord("A") + i) for i in range(len(keys))]
        for names in (keys, letters):
            if text in names:
                return names.index(text)
        raise MoefyError(f"{place} says that {text!r} is right; its answers are {', '.join(keys)}.")

    def check(self, model: Any) -> None:
        if head_of(model) not in ("choice", "causal", "seq2seq"):
            raise refuse_head(self.name, model, "a language model or a model with a multiple-choice head")

    def encode(self, model: Any, tokenizer: Any, examples: Sequence[Choices]) -> list[dict[str, Any]]:
        if head_of(model) == "choice":
            return [{**_answers_to_head(model, tokenizer, e), "labels": e.right} for e in examples]
        return encode_pairs(model, tokenizer, [(e.prompt, e.answers[e.right]) for e in examples])

    def classes(self, model: Any, example: Choices) -> list[int]:
        return [int(i == example.right) for i in range(len(example.answers))] if head_of(model) == "choice" else []

    def class_names(self, model: Any) -> tuple[str, ...]:
        return ("wrong answer", "right answer") if head_of(model) == "choice" else ()

    def model_class(self, config: Any) -> Any:
        from transformers import MODEL_FOR_MULTIPLE_CHOICE_MAPPING, AutoModelForMultipleChoice

        return (
            AutoModelForMultipleChoice
            if type(config) in MODEL_FOR_MULTIPLE_CHOICE_MAPPING
            else super().model_class(config)
        )

    @torch.no_grad()
    def evaluate(
        self, model: Any, tokenizer: Any, examples: Sequence[Choices], progress: Progress | None = None
    ) -> dict[str, float]:
        self.check(model)
        model.eval()
        if head_of(model) == "choice":
            right = 0
            for i, e in enumerate(examples):
                feed = collate([_answers_to_head(model, tokenizer, e)], pad_id(tokenizer))
                logits = model(**feed).logits
                check_finite(model, logits)
                right += int(logits.argmax()) == e.right
                if progress:
                    progress(i + 1, len(examples))
            return {"accuracy": right / len(examples)}
        pairs = [(e.prompt, a) for e in examples for a in e.answers]
        scores, start = log_likelihoods(model, tokenizer, pairs, progress), 0
        whole = per_byte = 0
        for e in examples:
            mine = scores[start : start + len(e.answers)]
            start += len(e.answers)
            lengths = [max(1, len(a.encode())) for a in e.answers]
            whole += _best(mine) == e.right
            per_byte += _best([s / n for s, n in zip(mine, lengths, strict=True)]) == e.right
        return {"accuracy": whole / len(examples), "accuracy_per_byte": per_byte / len(examples)}


def _flattened(row: Row, place: str) -> list[Row]:
    """A row's questions: RACE's own files list a passage's, and ARC's keep a question's parts inside it."""
    question, lists = row.get("question"), [row.get(name) for name in ("questions", "options", "answers")]
    if isinstance(question, dict) and "stem" in question:
        return [PlacedRow({**row, **question, "question": question["stem"]}, place)]
    if "questions" not in row:
        return [PlacedRow(row, place)]
    if not all(isinstance(x, list) for x in lists) or len({len(x) for x in lists if x is not None}) != 1:
        raise MoefyError(f"{place} needs lists of one length in 'questions', 'options' and 'answers'.")
    together = zip(*(x for x in lists if x is not None), strict=True)
    return [PlacedRow({**row, "question": q, "options": o, "answer": a}, place) for q, o, a in together]


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _answers_to_head(model: Any, tokenizer: Any, example: Choices) -> dict[str, list[list[int]]]:
    """Ids, and token types if the tokenizer has them, of each answer with the question before it.

    What does not fit is cut from the start, so that of a long passage the question stays.
    """
    side, tokenizer.truncation_side = tokenizer.truncation_side, "left"
    try:
        asked = [example.prompt] * len(example.answers)
        longest = longest_input(model, tokenizer)
        found = tokenizer(asked, list(example.answers), truncation=True, max_length=longest)
    finally:
        tokenizer.truncation_side = side
    return {k: found[k] for k in ("input_ids", "token_type_ids") if k in found}


_LISTED = (("choices", "options"),)
_RIGHT = ("answer", "answerKey", "label")
PIQA = MultipleChoice("piqa", ("goal",), (("sol1",), ("sol2",)), ("label",))
ARC = MultipleChoice("arc", ("question", "question_stem"), _LISTED, _RIGHT)
RACE = MultipleChoice("race", ("question",), _LISTED, _RIGHT, passage=("article", "passage"))
