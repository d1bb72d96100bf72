"""What a model's head gives, by the name of its class."""

from __future__ import annotations

from typing import Any

_HEADS = {
    "ForSequenceClassification": "classification",
    "ForMultipleChoice": "choice",
    "ForQuestionAnswering": "qa",
    "ForConditionalGeneration": "seq2seq",
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
}


def head_of(model: Any) -> str:
    """The kind of head: "classification", "choice", "qa", "seq2seq", "causal" or "none".

    A model that sees is "causal", whatever its class is called: it goes on from its own input.
    """
    names = {c.__name__ for c in type(model).__mro__}
    kind = next((kind for end, kind in _HEADS.items() if any(n.endswith(end) for n in names)), "none")
    if kind in ("seq2seq", "causal"):
        return "seq2seq" if getattr(model.config, "is_encoder_decoder", False) else "causal"
    return kind
