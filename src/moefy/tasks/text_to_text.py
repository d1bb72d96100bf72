"""Text to text: the model writes the target; scored by exact match (T5's way of doing every task).

Rows have an input and a target column, or are lines `IN: ... OUT: ...` as SCAN has them (arXiv 1711.00350).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moefy.errors import MoefyError
from moefy.heads import head_of
from moefy.tasks.base import Progress, Task, by_length, greedy, longest_input, pad_id, padded, refuse_head
from moefy.tasks.pairs import encode_pair, encode_pairs, prompt_ids
from moefy.tasks.rows import Row, column, place_of, text_of

INPUTS, TARGETS = ("input", "source", "inputs", "text", "question"), ("target", "output", "targets", "label", "answer")


@dataclass(frozen=True)
class TextToText(Task):
    name: str = "t2t"

    def examples(self, rows: Sequence[Row]) -> list[tuple[str, str]]:
        if all(set(row) == {"line"} for row in rows):
            return [self._line(row["line"], place_of(row, i)) for i, row in enumerate(rows)]
        source, target = column(rows, INPUTS, self.name), column(rows, TARGETS, self.name)
        return [
            (text_of(row, source, place_of(row, i)), text_of(row, target, place_of(row, i)))
            for i, row in enumerate(rows)
        ]

    def _line(self, line: str, place: str) -> tuple[str, str]:
        source, mark, target = line.strip().removeprefix("IN: ").partition(" OUT: ")
        if not mark or not line.startswith("IN: "):
            raise MoefyError(f'{place} is not of the form "IN: ... OUT: ...", which a .txt file needs.')
        return source, target

    def check(self, model: Any) -> None:
        if head_of(model) not in ("seq2seq", "causal"):
            raise refuse_head(self.name, model, "a model that generates text")

    def encode(self, model: Any, tokenizer: Any, examples: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        return encode_pairs(model, tokenizer, examples)

    def evaluate(
        self, model: Any, tokenizer: Any, examples: Sequence[tuple[str, str]], progress: Progress | None = None
    ) -> dict[str, float]:
        self.check(model)
        longest = max(len(encode_pair(model, tokenizer, *example)[1]) for example in examples)
        written = generate(model, tokenizer, [source for source, _ in examples], longest + 1, progress)
        right = sum(_plain(w) == _plain(t) for w, (_, t) in zip(written, examples, strict=True))
        return {"exact_match": right / len(examples)}


@torch.no_grad()
def generate(
    model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, progress: Progress | None = None
) -> list[str]:
    """The model's greedy continuation of each prompt, of at most `new_tokens` tokens.

    Fewer where the model has no room for so many. A causal model needs that room in the same positions: its
    prompts are cut at their start to make it, but not below half of what the model holds.
    """
    model.eval()
    seq2seq, pad = head_of(model) == "seq2seq", pad_id(tokenizer)
    longest = longest_input(model, tokenizer)
    if seq2seq:
        ids = [tokenizer(p, truncation=True, max_length=longest)["input_ids"] for p in prompts]
    else:
        room = max(longest - new_tokens, longest // 2)
        ids = [prompt_ids(tokenizer, p)[-room:] for p in prompts]
    written, done = [""] * len(prompts), 0
    for batch in by_length([len(i) + new_tokens for i in ids], tokens=8192):
        rows = [ids[i] for i in batch]
        feed = padded(rows, pad, left=not seq2seq)
        mask = padded([[1] * len(r) for r in rows], 0, left=not seq2seq)
        out = greedy(
            model,
            input_ids=feed,
            attention_mask=mask,
            max_new_tokens=min(new_tokens, longest - (1 if seq2seq else feed.shape[1])),
            pad_token_id=pad,
        )
        for i, row in zip(batch, out if seq2seq else out[:, feed.shape[1] :], strict=True):
            written[i] = tokenizer.decode(row, skip_special_tokens=True)
        done += len(batch)
        if progress:
            progress(done, len(prompts))
    return written


def _plain(text: str) -> str:
    return " ".join(text.split())


TEXT_TO_TEXT = TextToText()
