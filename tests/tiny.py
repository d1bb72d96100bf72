"""Tiny random models of every family, with inputs: the real classes, small enough to convert in a moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

from moefy.sites import bamboo
from tiny_base import NEURONS, VOCAB, WIDTH
from tiny_base import bert_like as _bert_like
from tiny_base import decoder as _decoder
from tiny_mixtures import MIXTURES, WHOLE
from tiny_more import MORE


def _t5(**changes: Any) -> nn.Module:
    config = tf.T5Config(
        vocab_size=VOCAB,
        d_model=WIDTH,
        d_ff=NEURONS,
        d_kv=8,
        num_heads=4,
        num_layers=2,
        decoder_start_token_id=0,
        **changes,
    )
    return tf.T5ForConditionalGeneration(config)


def _whisper() -> nn.Module:
    config = tf.WhisperConfig(
        vocab_size=VOCAB,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=NEURONS,
        decoder_ffn_dim=NEURONS,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        begin_suppress_tokens=None,
        suppress_tokens=None,
    )
    return tf.WhisperForConditionalGeneration(config)


def _vit() -> nn.Module:
    config = tf.ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return tf.ViTForImageClassification(config)


def _gpt2() -> nn.Module:
    config = tf.GPT2Config(
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_inner=NEURONS,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tf.GPT2LMHeadModel(config)


def _falcon() -> nn.Module:
    config = tf.FalconConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        ffn_hidden_size=NEURONS,
        num_hidden_layers=2,
        num_attention_heads=4,
        activation="relu",
        bias=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tf.FalconForCausalLM(config)


def _opt() -> nn.Module:
    config = tf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        ffn_dim=NEURONS,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=WIDTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tf.OPTForCausalLM(config)


def _distilbert() -> nn.Module:
    config = tf.DistilBertConfig(
        vocab_size=VOCAB, dim=WIDTH, hidden_dim=NEURONS, n_layers=2, n_heads=4, max_position_embeddings=64
    )
    return tf.DistilBertForSequenceClassification(config)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _decoder(tf.LlamaConfig, tf.LlamaForCausalLM),
    "llama-mlp-bias": lambda: _decoder(tf.LlamaConfig, tf.LlamaForCausalLM, mlp_bias=True),
    "mistral": lambda: _decoder(tf.MistralConfig, tf.MistralForCausalLM),
    "qwen2": lambda: _decoder(tf.Qwen2Config, tf.Qwen2ForCausalLM),
    "qwen3": lambda: _decoder(tf.Qwen3Config, tf.Qwen3ForCausalLM, head_dim=8),
    "gemma2": lambda: _decoder(tf.Gemma2Config, tf.Gemma2ForCausalLM, head_dim=8),
    "gemma3": lambda: _decoder(tf.Gemma3TextConfig, tf.Gemma3ForCausalLM, head_dim=8),
    "phi3": lambda: _decoder(tf.Phi3Config, tf.Phi3ForCausalLM),
    "olmo2": lambda: _decoder(tf.Olmo2Config, tf.Olmo2ForCausalLM),
    "bamboo": lambda: _decoder(bamboo.BambooConfig, bamboo.BambooForCausalLM, hidden_act="relu"),
    "falcon": _falcon,
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": lambda: _bert_like(tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM, bos_token_id=1, eos_token_id=2),
    "t5-v1.0": lambda: _t5(feed_forward_proj="relu"),
    "t5-v1.1": lambda: _t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bert": lambda: _bert_like(tf.BertConfig, tf.BertForSequenceClassification),
    "bert-mlm": lambda: _bert_like(tf.BertConfig, tf.BertForMaskedLM),
    "roberta": lambda: _bert_like(tf.RobertaConfig, tf.RobertaForMaskedLM, pad_token_id=1),
    "distilbert": _distilbert,
    "vit": _vit,
    "whisper": _whisper,
}


_FEEDS = {"vit": "image", "whisper": "speech", "t5-v1.0": "seq2seq", "t5-v1.1": "seq2seq"}
ALL = {
    **FAMILIES,
    **{family: more.make for family, more in MORE.items()},
    **{family: MIXTURES[family].make for family in WHOLE},
}


def tiny(family: str, seed: int = 0) -> nn.Module:
    """A tiny random model of the family, every parameter random (norms and biases too), in float32."""
    torch.manual_seed(seed)
    model = (MIXTURES[family].make if family in MIXTURES else ALL[family])().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.05
            if name not in (model._keys_to_ignore_on_save or ()):  # Marian's sinusoids are made again when it is loaded
                parameter.add_(noise)
    return model


def inputs(family: str, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Model inputs for the family; the second row ends in padding where the family has padding."""
    generator = torch.Generator().manual_seed(seed)
    if family in MIXTURES:
        batch = max(batch, 40)  # for each expert to see some
    kind = MORE[family].feed if family in MORE else _FEEDS.get(family, "text")
    if callable(kind):
        return kind(batch, generator)
    if kind in ("image", "masked image", "audio", "spectrogram", "features"):
        return _signals(kind, batch, generator)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    if kind == "speech":
        return {"input_features": torch.randn(batch, 8, 40, generator=generator), "decoder_input_ids": ids}
    mask = torch.ones_like(ids)
    mask[1:, length - 3 :] = 0
    feed = {"input_ids": ids, "attention_mask": mask}
    if kind == "seq2seq":
        feed["decoder_input_ids"] = torch.randint(3, VOCAB, (batch, 7), generator=generator)
    if kind == "image-text":
        feed |= _signals("image", batch, generator)
    return feed


def _signals(kind: str, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    if kind == "audio":
        return {"input_values": torch.randn(batch, 320, generator=generator)}
    if kind == "spectrogram":
        return {"input_values": torch.randn(batch, 20, 16, generator=generator)}
    if kind == "features":
        return {"input_features": torch.randn(batch, 20, 8, generator=generator)}
    image = {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    # What decides which patches are masked, which is random otherwise.
    return {**image, "noise": torch.rand(batch, 16, generator=generator)} if kind == "masked image" else image


def output(model: nn.Module, feed: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the real tokens, or what the model gives first if it gives no logits."""
    with torch.no_grad():
        out = model(**feed)
    logits = out.get("logits", out[0])
    mask = feed.get("attention_mask")
    return logits[mask.bool()] if mask is not None and mask.shape == logits.shape[:2] else logits
