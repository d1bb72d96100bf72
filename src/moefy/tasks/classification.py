"""Classification of a sentence or a pair: SST-2, MNLI, MRPC, RTE.

A model with a classification head is scored by its logits; a language model by which label's word it finds
likelier after T5's prompt for the task (arXiv 1910.10683, appendix D).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moefy.errors import MoefyError
from moefy.heads import head_of
from moefy.sources.models import check_finite
from moefy.tasks.base import Progress, Task, by_length, collate, longest_input, padding, refuse_head
from moefy.tasks.likelihood import log_likelihoods
from moefy.tasks.pairs import encode_pairs
from moefy.tasks.rows import Row, column, label_text, place_of, text_of


@dataclass(frozen=True)
class Labelled:
    """One or two texts and the index of their label."""

    texts: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Classification(Task):
    """`fields` names each text (T5's name first, then columns that may hold it); `labels` in GLUE's order."""

    name: str
    fields: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    label: tuple[str, ...] = ("label",)
    f1: bool = False

    def examples(self, rows: Sequence[Row]) -> list[Labelled]:
        columns = [column(rows, names, self.name) for names in self.fields]
        label = column(rows, self.label, self.name)
        return [
            Labelled(
                tuple(text_of(row, c, place_of(row, i)) for c in columns), self._label(row[label], place_of(row, i))
            )
            for i, row in enumerate(rows)
        ]

    def _label(self, value: Any, place: str) -> int:
        text = label_text(value)
        known = [*self.labels, *map(str, range(len(self.labels)))]
        if text.lower() in known:
            return known.index(text.lower()) % len(self.labels)
        raise MoefyError(
            f"{place} has the label {text!r}; the task {self.name} knows {', '.join(self.labels)} "
            f"or 0 to {len(self.labels) - 1}."
        )

    def check(self, model: Any) -> None:
        kind = head_of(model)
        if kind not in ("classification", "seq2seq", "causal"):
            raise refuse_head(self.name, model, "a model with a classification head or a language model")
        if kind == "classification" and model.config.num_labels != len(self.labels):
            raise MoefyError(
                f"The task {self.name} has {len(self.labels)} labels ({', '.join(self.labels)}), "
                f"and the model's head has {model.config.num_labels}."
            )
        if kind == "classification":
            self._head_order(model)

    def encode(self, model: Any, tokenizer: Any, examples: Sequence[Labelled]) -> list[dict[str, Any]]:
        if head_of(model) == "classification":
            to_head = self._head_order(model)
            padding(model, tokenizer)
            return [{**self._ids(model, tokenizer, e), "labels": to_head[e.label]} for e in examples]
        return encode_pairs(model, tokenizer, [(self._prompt(e), self.labels[e.label]) for e in examples])

    def classes(self, model: Any, example: Labelled) -> list[int]:
        return [example.label]

    def class_names(self, model: Any) -> tuple[str, ...]:
        return self.labels

    @torch.no_grad()
    def evaluate(
        self, model: Any, tokenizer: Any, examples: Sequence[Labelled], progress: Progress | None = None
    ) -> dict[str, float]:
        self.check(model)
        model.eval()
        if head_of(model) == "classification":
            predicted = self._by_head(model, tokenizer, examples, progress)
        else:
            pairs = [(self._prompt(e), label) for e in examples for label in self.labels]
            scores = torch.tensor(log_likelihoods(model, tokenizer, pairs, progress))
            predicted = scores.view(len(examples), -1).argmax(1).tolist()
        truth = [e.label for e in examples]
        figures = {"accuracy": sum(p == t for p, t in zip(predicted, truth, strict=True)) / len(truth)}
        if self.f1:
            both = sum(p == t == 1 for p, t in zip(predicted, truth, strict=True))
            figures["f1"] = 2 * both / max(1, sum(p == 1 for p in predicted) + sum(t == 1 for t in truth))
        return figures

    def model_class(self, config: Any) -> Any:
        from transformers import AutoModelForSequenceClassification

        return super().model_class(config) if config.is_encoder_decoder else AutoModelForSequenceClassification

    def head_options(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
        }

    def _by_head(
        self, model: Any, tokenizer: Any, examples: Sequence[Labelled], progress: Progress | None
    ) -> list[int]:
        features = [self._ids(model, tokenizer, e) for e in examples]
        order, pad = self._head_order(model), padding(model, tokenizer)
        predicted, done = [0] * len(examples), 0
        for batch in by_length([len(f["input_ids"]) for f in features]):
            logits = model(**collate([features[i] for i in batch], pad)).logits[:, order]
            check_finite(model, logits)
            for i, label in zip(batch, logits.argmax(1).tolist(), strict=True):
                predicted[i] = label
            done += len(batch)
            if progress:
                progress(done, len(examples))
        return predicted

    def _head_order(self, model: Any) -> list[int]:
        """The head's output for each label, by the head's names; in order if it has none (LABEL_0, LABEL_1).

        A name may be a label's beginning ("POS"), as long as no other label begins so. MoefyError if the names are
        others: any order would then be a guess.
        """
        config = model.config
        named = {str(name): int(i) for name, i in (config.label2id or {}).items()}
        named = named or {str(name): int(i) for i, name in (config.id2label or {}).items()}
        plain = {re.sub(r"[ -]", "_", name.strip().lower()): i for name, i in named.items()}
        if all(re.fullmatch(r"(label_)?[0-9]+", name) for name in plain):
            return [plain[name] for name in sorted(plain, key=lambda n: int(n.removeprefix("label_")))]
        found = []
        for label in self.labels:
            same = [i for name, i in plain.items() if name == label]
            begun = [i for n, i in plain.items() if n and [x for x in self.labels if x.startswith(n)] == [label]]
            found += same or begun[:1]
        if sorted(found) != list(range(len(self.labels))):
            raise MoefyError(
                f"The model's head names its outputs {', '.join(named)}, and the task {self.name} has the labels "
                f"{', '.join(self.labels)}; name them so in id2label and label2id of the model's config.json."
            )
        return found

    def _ids(self, model: Any, tokenizer: Any, example: Labelled) -> dict[str, Any]:
        found = tokenizer(*example.texts, truncation=True, max_length=longest_input(model, tokenizer))
        return {k: v for k, v in found.items() if k in ("input_ids", "token_type_ids")}

    def _prompt(self, example: Labelled) -> str:
        parts = [f"{names[0]}: {text}" for names, text in zip(self.fields, example.texts, strict=True)]
        return f"{self.name} {' '.join(parts)}"


_PAIR = (("sentence1", "#1 String"), ("sentence2", "#2 String"))
SST2 = Classification("sst2", (("sentence", "text"),), ("negative", "positive"))
MNLI = Classification(
    "mnli",
    (("premise", "sentence1"), ("hypothesis", "sentence2")),
    ("entailment", "neutral", "contradiction"),
    ("label", "gold_label"),
)
MRPC = Classification("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("label", "Quality"), f1=True)
RTE = Classification("rte", _PAIR, ("entailment", "not_entailment"))
