"""Extractive question answering: SQuAD, by exact match and F1 of the answer's words.

Both figures are as in SQuAD 2.0's own script: lower case, punctuation and articles dropped, the best of the given
answers, and two empty ones agree (arXiv 1606.05250, section 6). A model with a span head points into overlapping
windows of the context; a language model writes the answer after T5's prompt.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moefy.errors import MoefyError
from moefy.heads import head_of
from moefy.sources.models import check_finite
from moefy.tasks.base import Progress, Task, longest_input, refuse_head
from moefy.tasks.pairs import encode_pairs
from moefy.tasks.rows import PlacedRow, Row, column, place_of, text_of
from moefy.tasks.text_to_text import generate

WINDOW, STRIDE, LONGEST_ANSWER = 384, 128, 30


@dataclass(frozen=True)
class Question:
    question: str
    context: str
    answers: tuple[str, ...]
    start: int


@dataclass(frozen=True)
class ExtractiveQA(Task):
    name: str = "squad"

    def examples(self, rows: Sequence[Row]) -> list[Question]:
        flat = (
            [q for i, row in enumerate(rows) for q in _flatten(row, place_of(row, i))]
            if "paragraphs" in rows[0]
            else list(rows)
        )
        for names in (("question",), ("context",), ("answers",)):
            column(flat, names, self.name)
        return [self._question(row, place_of(row, i)) for i, row in enumerate(flat)]

    def _question(self, row: Row, place: str) -> Question:
        context, answers = text_of(row, "context", place), row["answers"]
        if isinstance(answers, dict):  # the hub's layout, lists of texts and starts
            texts, starts = _listed(answers.get("text")), _listed(answers.get("answer_start"))
        else:
            found = [a if isinstance(a, dict) else {"text": a} for a in _listed(answers)]
            texts, starts = [a.get("text") for a in found], [a.get("answer_start") for a in found]
        written_out = isinstance(answers, str) and answers not in context  # a table's rendering of a list, say
        if written_out or not texts or not all(isinstance(text, str) and text for text in texts):
            raise MoefyError(f"{place} has no answers with a text, which the task {self.name} needs.")
        if starts and len(starts) != len(texts):
            raise MoefyError(f"{place} has {len(texts)} answers and {len(starts)} starts of answers.")
        if not all(start is None or isinstance(start, int) for start in starts):
            raise MoefyError(f"{place} has an answer_start that is no whole number.")
        # Data may lack the place or count it otherwise (in bytes).
        start = starts[0] if starts and starts[0] is not None else -1
        start = start if start >= 0 and context.startswith(texts[0], start) else context.find(texts[0])
        return Question(text_of(row, "question", place), context, tuple(texts), start)

    def check(self, model: Any) -> None:
        if head_of(model) not in ("qa", "seq2seq", "causal"):
            raise refuse_head(self.name, model, "a model with a question-answering head or one that generates text")

    def encode(self, model: Any, tokenizer: Any, examples: Sequence[Question]) -> list[dict[str, Any]]:
        if head_of(model) != "qa":
            return encode_pairs(model, tokenizer, [(_prompt(e), e.answers[0]) for e in examples])
        return [feature for e in examples for feature in _span_features(model, tokenizer, e)]

    @torch.no_grad()
    def evaluate(
        self, model: Any, tokenizer: Any, examples: Sequence[Question], progress: Progress | None = None
    ) -> dict[str, float]:
        self.check(model)
        model.eval()
        if head_of(model) == "qa":
            written = []
            for i, e in enumerate(examples):
                written.append(_span(model, tokenizer, e))
                if progress:
                    progress(i + 1, len(examples))
        else:
            written = generate(model, tokenizer, [_prompt(e) for e in examples], LONGEST_ANSWER, progress)
            written = [w.strip().split("\n")[0] for w in written]
        both = list(zip(written, examples, strict=True))
        return {
            "exact_match": sum(max(normal(w) == normal(a) for a in e.answers) for w, e in both) / len(both),
            "f1": sum(max(word_f1(w, a) for a in e.answers) for w, e in both) / len(both),
        }

    def model_class(self, config: Any) -> Any:
        from transformers import AutoModelForQuestionAnswering

        return super().model_class(config) if config.is_encoder_decoder else AutoModelForQuestionAnswering


def normal(text: str) -> str:
    """Lower case, without punctuation, articles and extra blanks."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_f1(ours: str, truth: str) -> float:
    """F1 of the words of two answers, each word as often as it occurs."""
    a, b = normal(ours).split(), normal(truth).split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else float(not a and not b)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _flatten(article: Row, place: str) -> list[Row]:
    """The questions of one article of SQuAD's own JSON."""
    try:
        return [PlacedRow({**q, "context": p["context"]}, place) for p in article["paragraphs"] for q in p["qas"]]
    except (KeyError, TypeError):
        raise MoefyError("A SQuAD file needs paragraphs with a context and qas in each article.") from None


def _prompt(e: Question) -> str:
    return f"question: {e.question} context: {e.context}"


def _windows(model: Any, tokenizer: Any, e: Question) -> Any:
    """The question with each window of the context; of a question that would fill half a window its start."""
    longest = min(WINDOW, longest_input(model, tokenizer))
    asked = tokenizer(e.question, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    most = longest // 2 - tokenizer.num_special_tokens_to_add(pair=True)
    question = e.question if len(asked) <= most else e.question[: asked[most - 1][1]]
    return tokenizer(
        question,
        e.context,
        truncation="only_second",
        max_length=longest,
        stride=min(STRIDE, longest // 3),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def _span_features(model: Any, tokenizer: Any, e: Question) -> list[dict[str, Any]]:
    """One feature a window; a window without the answer points at its first token, as BERT's recipe does."""
    found, features = _windows(model, tokenizer, e), []
    end = e.start + len(e.answers[0])
    for i, offsets in enumerate(found["offset_mapping"]):
        inside = [t for t, (a, b) in enumerate(offsets) if found.sequence_ids(i)[t] == 1 and a < end and b > e.start]
        whole = bool(inside) and offsets[inside[0]][0] <= e.start and offsets[inside[-1]][1] >= end
        first, last = (inside[0], inside[-1]) if whole else (0, 0)
        feature = {k: found[k][i] for k in ("input_ids", "token_type_ids") if k in found}
        features.append({**feature, "start_positions": first, "end_positions": last})
    return features


def _span(model: Any, tokenizer: Any, e: Question) -> str:
    """The best-scored span of at most LONGEST_ANSWER tokens over all windows."""
    found = _windows(model, tokenizer, e)
    best, answer = -float("inf"), ""
    for i, offsets in enumerate(found["offset_mapping"]):
        feed = {k: torch.tensor([found[k][i]]) for k in ("input_ids", "token_type_ids", "attention_mask") if k in found}
        out = model(**feed)
        check_finite(model, torch.stack([out.start_logits, out.end_logits]))
        context = torch.tensor([s == 1 for s in found.sequence_ids(i)])
        start = out.start_logits[0].masked_fill(~context, -1e9)
        end = out.end_logits[0].masked_fill(~context, -1e9)
        scores = start[:, None] + end[None, :]
        allowed = torch.ones_like(scores).triu().tril(LONGEST_ANSWER - 1).bool()
        value, place = scores.masked_fill(~allowed, -2e9).flatten().max(0)
        if value.item() > best:
            first, last = divmod(int(place), len(offsets))
            best, answer = value.item(), e.context[offsets[first][0] : offsets[last][1]]
    return answer


SQUAD = ExtractiveQA()
