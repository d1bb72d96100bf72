"""What tiny random models have in common."""

from __future__ import annotations

from typing import Any

from torch import nn

WIDTH, NEURONS, VOCAB = 32, 48, 97


def decoder(config: type, model: type, **changes: Any) -> nn.Module:
    common = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": NEURONS,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return model(config(**{**common, **changes}))


def bert_like(config: type, model: type, **changes: Any) -> nn.Module:
    return model(
        config(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=NEURONS,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            **changes,
        )
    )
