"""A slim model in an engine that knows nothing of moefy: CTranslate2, through its own converter."""

import ctranslate2
import numpy as np
import pytest
import torch
from ctranslate2.converters import TransformersConverter

import moefy
import tiny
from test_slim import converted
from words import pydoc_tokenizer


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_ctranslate2_computes_the_same_logits(family, tmp_path):
    model = converted(family)
    tokenizer = pydoc_tokenizer()
    tokenizer.eos_token = tokenizer.unk_token  # its Llama loader wants the name of one
    moefy.save(model, tmp_path / "slim", tokenizer)
    TransformersConverter(str(tmp_path / "slim")).convert(str(tmp_path / "engine"))
    engine = ctranslate2.Generator(str(tmp_path / "engine"), "cpu", intra_threads=1)
    ids = tiny.inputs(family)["input_ids"]
    logits = np.array(engine.forward_batch([tokenizer.convert_ids_to_tokens(row) for row in ids]))
    with torch.no_grad():
        expected = model(input_ids=ids).logits.numpy()
        dense = tiny.tiny(family)(input_ids=ids).logits.numpy()
    tolerance = 64 * np.finfo(np.float32).eps * np.abs(expected).max()  # two layers of sums in another order
    assert np.abs(logits - expected).max() < tolerance
    assert np.abs(logits - dense).max() > 100 * tolerance
