"""Tiny random models whose FFNs are spread over their layers, or all in parts: of texts, sound and series."""

from __future__ import annotations

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tiny_base import (
    BOTH_HALVES,
    IMAGE,
    LAYERS,
    NEURONS,
    TEXT,
    TOWER,
    VOCAB,
    WIDTH,
    Feed,
    More,
    by_class,
    shaped,
    with_more,
)
from tiny_sights import IMAGES, TOWERS

_SEQ2SEQ = {
    **BOTH_HALVES,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_DECODER = {**_SEQ2SEQ, "max_position_embeddings": 64}
_SERIES = {
    **BOTH_HALVES,
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "num_time_features": 1,
}
_PARAKEET = {
    **LAYERS,
    "model_type": "parakeet_encoder",
    "num_key_value_heads": 4,
    "subsampling_conv_channels": 8,
    "num_mel_bins": 16,
}
_GEMMA = {**TOWER, "num_key_value_heads": 2, "head_dim": 8}
_AUDIO = {**BOTH_HALVES, "num_mel_bins": 8, "max_source_positions": 20}
_MEL = shaped(input_features=(8, 40))
_HEARD = shaped({"decoder_input_ids": (7,)}, input_features=(80, 16))
_NOTES = shaped({"input_ids": (12,)})


def _series(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {
        "past_values": (10,),
        "past_time_features": (10, 1),
        "future_values": (4,),
        "future_time_features": (4, 1),
    }
    return {**shaped(**shapes)(batch, generator), "past_observed_mask": torch.ones(batch, 10)}  # type: ignore[arg-type]


def _boxes(batch: int) -> dict[str, torch.Tensor]:
    return {"bbox": torch.arange(12).view(1, 12, 1).expand(batch, 12, 4)}


def _masked(length: int) -> Feed:
    return with_more(
        shaped(input_features=(8, length)),
        lambda batch: {"input_features_mask": torch.ones(batch, length, dtype=torch.long)},
    )


TEXTS = {
    "align_text_model": by_class("AlignTextModel", **TEXT),
    "blip_text_model": by_class("BlipTextModel", **TOWER),
    "git": by_class("GitForCausalLM", **TOWER, vision_config=IMAGE),
    "bros": by_class(
        "BrosModel", with_more(_NOTES, lambda batch: {"bbox": torch.ones(batch, 12, 8)}), **{**TEXT, "hidden_size": 64}
    ),
    "lilt": by_class(
        "LiltModel",
        with_more(_NOTES, _boxes),
        4,
        **{**TEXT, "hidden_size": 48, "intermediate_size": 96},
        max_2d_position_embeddings=64,
        channel_shrink_ratio=2,
    ),
    "lxmert": by_class(
        "LxmertModel",
        shaped({"input_ids": (12,)}, visual_feats=(5, 8), visual_pos=(5, 4)),
        6,
        **TEXT,
        l_layers=1,
        x_layers=2,
        r_layers=1,
        visual_feat_dim=8,
    ),
    "trocr": by_class("TrOCRForCausalLM", **_DECODER),
    "pp_formulanet_text": by_class("PPFormulaNetTextModel", **_DECODER),
    "musicgen_decoder": by_class(
        "MusicgenForCausalLM", _NOTES, **{**TEXT, "ffn_dim": NEURONS, "num_codebooks": 2, "pad_token_id": VOCAB}
    ),
    "musicgen_melody_decoder": by_class(
        "MusicgenMelodyForCausalLM", _NOTES, **{**TEXT, "ffn_dim": NEURONS, "num_codebooks": 2, "pad_token_id": VOCAB}
    ),
    "reformer": by_class(
        "ReformerModelWithLMHead",
        **{**TEXT, "is_decoder": True},
        feed_forward_size=NEURONS,
        axial_pos_embds=False,
        attn_layers=["local", "local"],
        attention_head_size=8,
        local_attn_chunk_length=4,
    ),
    "ctrl": by_class(
        "CTRLLMHeadModel", vocab_size=VOCAB, n_positions=64, n_embd=WIDTH, dff=NEURONS, n_layer=2, n_head=4
    ),
    "cpmant": by_class(
        "CpmAntForCausalLM",
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_attention_heads=4,
        dim_head=8,
        dim_ff=NEURONS,
        num_hidden_layers=2,
        prompt_length=4,
        segment_types=8,
    ),
    "moshi": by_class(
        "MoshiForCausalLM",
        **TOWER,
        ffn_dim=2 * NEURONS,
        num_key_value_heads=2,
        audio_vocab_size=VOCAB,
        num_codebooks=2,
    ),
    "dia": by_class(
        "DiaForConditionalGeneration",
        shaped({"input_ids": (12,), "decoder_input_ids": (7, 2)}),
        4,
        encoder_config={**TOWER, "num_key_value_heads": 2, "head_dim": 8},
        decoder_config={
            **TOWER,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_channels": 2,
            "cross_num_attention_heads": 4,
            "cross_head_dim": 8,
            "cross_num_key_value_heads": 2,
            "cross_hidden_size": WIDTH,
        },
        delay_pattern=[0, 1],
    ),
    "t5gemma2": by_class(
        "T5Gemma2ForConditionalGeneration",
        "seq2seq",
        4,
        encoder={"text_config": _GEMMA, "vision_config": {**IMAGE, "model_type": "siglip_vision_model"}},
        decoder=_GEMMA,
    ),
    # Whose FFNs are all in parts, none of which is the text's.
    "musicgen": by_class(
        "MusicgenForConditionalGeneration",
        lambda batch, generator: {
            **_NOTES(batch, generator),
            "decoder_input_ids": torch.randint(3, VOCAB, (2 * batch, 7), generator=generator),
        },
        4,
        text_encoder={
            "model_type": "t5",
            "d_model": WIDTH,
            "d_ff": NEURONS,
            "d_kv": 8,
            "num_heads": 4,
            "num_layers": 2,
        },
        audio_encoder={"model_type": "encodec", "num_filters": 4, "hidden_size": 8, "codebook_size": 16},
        decoder={**TEXT, "model_type": "musicgen_decoder", "ffn_dim": NEURONS, "num_codebooks": 2},
    ),
}
SOUND_AND_SERIES = {
    "sew-d": by_class(
        "SEWDForCTC",
        "audio",
        **{**LAYERS, "vocab_size": VOCAB, "pad_token_id": 0, "mask_time_prob": 0.0, "squeeze_factor": 2},
        conv_dim=(8, 8),
        conv_kernel=(4, 4),
        conv_stride=(4, 4),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    ),
    "speech_to_text": by_class(
        "Speech2TextForConditionalGeneration",
        shaped({"decoder_input_ids": (7,)}, input_features=(40, 8)),
        4,
        **_SEQ2SEQ,
        input_feat_per_channel=8,
        conv_channels=16,
        max_source_positions=64,
        max_target_positions=64,
    ),
    "qwen2_audio_encoder": by_class("Qwen2AudioEncoder", _MEL, **_AUDIO),
    "voxtral_encoder": by_class("VoxtralEncoder", _MEL, **LAYERS, num_mel_bins=8, max_source_positions=20),
    "audioflamingo3_encoder": by_class("AudioFlamingo3Encoder", _masked(40), **_AUDIO),
    "qwen3_asr_encoder": by_class(
        "Qwen3ASREncoder",
        _masked(100),
        **_AUDIO,
        output_dim=WIDTH,
        downsample_hidden_size=8,
    ),
    "moss_transcribe_diarize_audio": by_class(
        "MossTranscribeDiarizeAudioModel", shaped(input_features=(8, 40)), **_AUDIO
    ),
    "parakeet_ctc": by_class(
        "ParakeetForCTC", shaped(input_features=(80, 16)), 4, vocab_size=VOCAB, pad_token_id=0, encoder_config=_PARAKEET
    ),
    "canary": by_class(
        "CanaryForConditionalGeneration",
        _HEARD,
        6,
        vocab_size=VOCAB,
        encoder_config=_PARAKEET,
        decoder_config={**TOWER, "num_key_value_heads": 4, "head_dim": 8},
    ),
    "cohere_asr": by_class(
        "CohereAsrForConditionalGeneration",
        _HEARD,
        6,
        encoder_config=_PARAKEET,
        **{**TOWER, "num_key_value_heads": 4, "head_dim": 8},
    ),
    "moonshine": by_class(
        "MoonshineForConditionalGeneration",
        shaped({"decoder_input_ids": (7,)}, input_values=(2000,)),
        4,
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "moonshine_streaming": by_class(
        "MoonshineStreamingForConditionalGeneration",
        shaped({"decoder_input_ids": (7,)}, input_values=(1600,)),
        4,
        **{**TOWER, "num_key_value_heads": 4},
        encoder_config={**LAYERS, "num_key_value_heads": 4, "sliding_windows": [[16, 4], [16, 4]]},
    ),
    "time_series_transformer": by_class("TimeSeriesTransformerForPrediction", _series, 4, **_SERIES),
    "informer": by_class("InformerForPrediction", _series, 4, **_SERIES),
    "autoformer": by_class("AutoformerForPrediction", _series, 4, **_SERIES, moving_average=3, label_length=2),
    "patchtst": by_class(
        "PatchTSTForPrediction",
        shaped(past_values=(16, 2)),
        d_model=WIDTH,
        ffn_dim=NEURONS,
        num_hidden_layers=2,
        num_attention_heads=4,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        prediction_length=4,
        num_input_channels=2,
    ),
}
# The older transformers that moefy runs with lack some.
SPREAD: dict[str, More] = {
    name: more for name, more in {**TEXTS, **TOWERS, **IMAGES, **SOUND_AND_SERIES}.items() if name in CONFIG_MAPPING
}
