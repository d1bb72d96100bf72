"""Tiny random models of the families beyond the commonest: what makes each, its inputs, and how many FFNs it has."""

from __future__ import annotations

from typing import Any

import transformers as tf
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tiny_base import BOTH_HALVES, NEURONS, VOCAB, WIDTH, More, bert_like, decoder
from tiny_spread import SPREAD


def _decoder(name: str, config: str = "Config", **changes: Any) -> More:
    """A decoder by the name of its classes, with Llama's config attributes."""
    return More(lambda: decoder(getattr(tf, name + config), getattr(tf, f"{name}ForCausalLM"), **changes))


def _gpt(name: str, head: str = "ForCausalLM", **changes: Any) -> More:
    """A decoder with GPT-2's config attributes."""
    common = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_inner": NEURONS, "n_layer": 2, "n_head": 4, "n_positions": 64}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return More(lambda: getattr(tf, name + head)(getattr(tf, f"{name}Config")(**{**common, **ends, **changes})))


def _encoder(name: str, head: str = "ForMaskedLM", **changes: Any) -> More:
    changes = {"pad_token_id": 0, **changes}
    return More(lambda: bert_like(getattr(tf, f"{name}Config"), getattr(tf, name + head), **changes))


def _seq2seq(name: str, head: str = "ForConditionalGeneration", **changes: Any) -> More:
    common = {
        **BOTH_HALVES,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "forced_eos_token_id": None,
        "decoder_start_token_id": 2,
    }
    return More(lambda: getattr(tf, name + head)(getattr(tf, f"{name}Config")(**{**common, **changes})), "seq2seq", 4)


def _xlm(**changes: Any) -> More:
    common = {"vocab_size": VOCAB, "emb_dim": 24, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
    return More(lambda: tf.XLMWithLMHeadModel(tf.XLMConfig(**common, pad_index=0, pad_token_id=0, **changes)))


_LAYERS = {
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_IMAGES = {**_LAYERS, "image_size": 16, "patch_size": 4}


def _image(
    name: str, head: str = "ForImageClassification", sites: int = 2, feed: str = "image", **changes: Any
) -> More:
    config = {**_IMAGES, "num_labels": 3, **changes}
    return More(lambda: getattr(tf, name + head)(getattr(tf, f"{name}Config")(**config)), feed, sites)


def _swin(name: str) -> More:
    def make() -> nn.Module:
        config = getattr(tf, f"{name}Config")(
            image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, mlp_ratio=1.5
        )
        return getattr(tf, f"{name}ForImageClassification")(config)

    return More(make, "image")


def _funnel() -> nn.Module:
    config = tf.FunnelConfig(vocab_size=VOCAB, d_model=WIDTH, n_head=4, d_head=8, d_inner=NEURONS, block_sizes=[1, 1])
    return tf.FunnelForMaskedLM(config)


def _prophetnet() -> nn.Module:
    config = tf.ProphetNetConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        encoder_ffn_dim=NEURONS,
        decoder_ffn_dim=NEURONS,
        num_encoder_layers=2,
        num_decoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
        max_position_embeddings=64,
        decoder_start_token_id=0,
    )
    return tf.ProphetNetForConditionalGeneration(config)


def _audio(name: str, head: str = "ForCTC", feed: str = "audio", sites: int = 2, **changes: Any) -> More:
    config = {
        **_LAYERS,
        "vocab_size": VOCAB,
        "conv_dim": (8, 8),
        "conv_kernel": (4, 4),
        "conv_stride": (4, 4),
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "mask_time_prob": 0.0,
        "pad_token_id": 0,
        **changes,
    }
    return More(lambda: getattr(tf, name + head)(getattr(tf, f"{name}Config")(**config)), feed, sites)


def _two_towers(name: str, **changes: Any) -> More:
    text = {**_LAYERS, "vocab_size": VOCAB, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    text |= {"pad_token_id": 0, "projection_size": WIDTH, **changes}

    def make() -> nn.Module:
        config = getattr(tf, f"{name}Config")(
            text_config=text,
            vision_config={**_IMAGES, "intermediate_size": 2 * NEURONS, "hidden_act": "quick_gelu"},
            projection_dim=16,
        )
        return getattr(tf, f"{name}Model")(config)

    return More(make, "image-text", 4)


_TEXT = {
    **_LAYERS,
    "vocab_size": VOCAB,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _sees(name: str, text: str, text_changes: Any = None, vision: Any = None, **changes: Any) -> More:
    """A model that sees images and writes text, whose FFNs are those of its text part."""

    def make() -> nn.Module:
        config = getattr(tf, f"{name}Config")(
            text_config={**_TEXT, "model_type": text, **(text_changes or {})},
            vision_config={**_IMAGES, **(vision or {})},
            **changes,
        )
        return getattr(tf, f"{name}ForConditionalGeneration")(config)

    return More(make)


_GEMMA4 = {"global_head_dim": 8, "vocab_size_per_layer_input": VOCAB}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}}

DECODERS = {
    "stablelm": _decoder("StableLm"),
    "cohere": _decoder("Cohere"),
    "cohere2": _decoder("Cohere2", head_dim=8),
    "ernie4_5": _decoder("Ernie4_5", head_dim=8),
    "seed_oss": _decoder("SeedOss", head_dim=8),
    "exaone4": _decoder("Exaone4"),
    "hunyuan_v1_dense": _decoder("HunYuanDenseV1", head_dim=8),
    "diffllama": _decoder("DiffLlama"),
    "ministral": _decoder("Ministral", head_dim=8),
    "ministral3": _decoder("Ministral3", head_dim=8),
    "cwm": _decoder("Cwm", head_dim=8),
    "minicpm3": _decoder(
        "MiniCPM3", num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8
    ),
    "hyperclovax": _decoder("HyperCLOVAX", head_dim=8),
    "olmo": _decoder("Olmo"),
    "olmo3": _decoder("Olmo3"),
    "smollm3": _decoder("SmolLM3"),
    "granite": _decoder("Granite"),
    "helium": _decoder("Helium", head_dim=8),
    "gemma": _decoder("Gemma", head_dim=8),
    "gemma4_text": _decoder("Gemma4", "TextConfig", head_dim=8, **_GEMMA4),
    "vaultgemma": _decoder("VaultGemma", head_dim=8),
    "recurrent_gemma": _decoder(
        "RecurrentGemma", intermediate_size=2 * NEURONS, lru_width=WIDTH, num_hidden_layers=3
    )._replace(sites=3),
    "lfm2": _decoder("Lfm2", block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"]),
    "glm": _decoder("Glm", head_dim=8),
    "glm4": _decoder("Glm4", head_dim=8),
    "nemotron": _decoder("Nemotron"),
    "arcee": _decoder("Arcee"),
    "apertus": _decoder("Apertus"),
    "jais2": _decoder("Jais2"),
    "persimmon": _decoder("Persimmon"),
    "starcoder2": _decoder("Starcoder2"),
    "phi": _decoder("Phi"),
    "nanochat": _decoder("NanoChat"),
    "qwen3_5": _decoder("Qwen3_5", "TextConfig", head_dim=8, layer_types=["full_attention", "linear_attention"]),
    "gptj": _gpt("GPTJ", rotary_dim=4),
    "codegen": _gpt("CodeGen", rotary_dim=4),
    "gpt_bigcode": _gpt("GPTBigCode"),
    "gpt_neo": _gpt(
        "GPTNeo",
        hidden_size=WIDTH,
        intermediate_size=NEURONS,
        num_layers=2,
        num_heads=4,
        max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
    ),
    "bloom": _gpt("Bloom", hidden_size=12),
    "mpt": _gpt("Mpt", d_model=12, n_heads=4, n_layers=2, max_seq_len=64),
    "xglm": _gpt("XGLM", d_model=WIDTH, ffn_dim=NEURONS, num_layers=2, attention_heads=4, max_position_embeddings=64),
    "biogpt": _encoder("BioGpt", "ForCausalLM"),
    "falcon_h1": _decoder(
        "FalconH1",
        head_dim=8,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=16,
        mlp_multipliers=[0.5, 4.0],  # so that they come out of the weights without a rounding
    ),
    "modernbert-decoder": _encoder("ModernBertDecoder", "ForCausalLM"),
    "bert-generation": _encoder("BertGeneration", "Decoder", is_decoder=True),
}
ENCODERS = {
    "deberta": _encoder("Deberta"),
    "deberta-v2": _encoder("DebertaV2"),
    "electra": _encoder("Electra", embedding_size=WIDTH),
    "albert": _encoder("Albert", embedding_size=8)._replace(sites=1),
    "albert-groups": _encoder("Albert", embedding_size=8, num_hidden_groups=2, inner_group_num=2)._replace(sites=4),
    "mobilebert": _encoder(
        "MobileBert",
        embedding_size=8,
        true_hidden_size=16,
        intra_bottleneck_size=16,
        hidden_act="relu",
        num_feedforward_networks=2,
    )._replace(sites=4),
    "camembert": _encoder("Camembert", pad_token_id=1),
    "xlm-roberta": _encoder("XLMRoberta", pad_token_id=1),
    "ernie": _encoder("Ernie"),
    "mpnet": _encoder("MPNet", pad_token_id=1),
    "rembert": _encoder("RemBert", input_embedding_size=16, output_embedding_size=16),
    "data2vec-text": _encoder("Data2VecText", pad_token_id=1),
    "xlm-roberta-xl": _encoder("XLMRobertaXL", pad_token_id=1),
    "xmod": _encoder("Xmod", pad_token_id=1, default_language="en_XX"),
    "roberta-prelayernorm": _encoder("RobertaPreLayerNorm", pad_token_id=1),
    "longformer": _encoder("Longformer", pad_token_id=1, attention_window=4),
    "big_bird": _encoder("BigBird", attention_type="original_full"),
    "nystromformer": _encoder("Nystromformer", segment_means_seq_len=12, num_landmarks=12),
    "layoutlm": _encoder("LayoutLM"),
    "layoutlmv3": _encoder(
        "LayoutLMv3", "ForTokenClassification", visual_embed=False, coordinate_size=4, shape_size=8, pad_token_id=1
    ),
    "megatron-bert": _encoder("MegatronBert"),
    "roformer": _encoder("RoFormer", embedding_size=WIDTH),
    "luke": _encoder("Luke", entity_vocab_size=10, pad_token_id=1),
    "tapas": _encoder("Tapas"),
    "markuplm": _encoder("MarkupLM", "ForTokenClassification"),
    "splinter": _encoder("Splinter", "Model"),
    "canine": _encoder("Canine", "Model")._replace(sites=4),
    "dpr": _encoder("DPR", "ContextEncoder"),
    "funnel": More(_funnel, sites=4),
    "fnet": _encoder("FNet"),
    "esm": _encoder("Esm", pad_token_id=1, mask_token_id=4),
    "modernbert": _encoder("ModernBert"),
    "eurobert": _encoder("EuroBert"),
    "nomic_bert": _encoder("NomicBert"),
    "convbert": _encoder("ConvBert", embedding_size=WIDTH),
    "roc_bert": _encoder("RoCBert", pronunciation_vocab_size=9, shape_vocab_size=9),
    "mra": _encoder("Mra"),
    "yoso": _encoder("Yoso"),
    "visual_bert": _encoder("VisualBert", "ForPreTraining", visual_embedding_dim=8),
}
SEQ2SEQ = {
    "bart": _seq2seq("Bart"),
    "mbart": _seq2seq("MBart"),
    "m2m_100": _seq2seq("M2M100"),
    "marian": _seq2seq("Marian", "MTModel"),
    "pegasus": _seq2seq("Pegasus"),
    "pegasus_x": _seq2seq("PegasusX", block_size=4, num_global_tokens=2),
    "bigbird_pegasus": _seq2seq("BigBirdPegasus", attention_type="original_full"),
    "blenderbot": _seq2seq("Blenderbot"),
    "blenderbot-small": _seq2seq("BlenderbotSmall"),
    "led": _seq2seq("LED", attention_window=4, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64),
    "plbart": _seq2seq("PLBart"),
    "mvp": _seq2seq("Mvp"),
    "fsmt": _seq2seq("FSMT", langs=["a", "b"], src_vocab_size=VOCAB, tgt_vocab_size=VOCAB),
    "prophetnet": More(_prophetnet, "seq2seq", 4),
    "longt5": _seq2seq("LongT5", d_ff=NEURONS, d_kv=8, num_heads=4, num_layers=2, local_radius=4),
    "mt5": _seq2seq("MT5", d_ff=NEURONS, d_kv=8, num_heads=4, num_layers=2),
    "umt5": _seq2seq("UMT5", d_ff=NEURONS, d_kv=8, num_heads=4, num_layers=2),
}
IMAGES_AND_SOUND = {
    "deit": _image("DeiT"),
    "beit": _image("Beit"),
    "yolos": _image("Yolos", "ForObjectDetection", num_detection_tokens=3, image_size=[16, 16]),
    "audio-spectrogram-transformer": _image(
        "AST",
        "ForAudioClassification",
        feed="spectrogram",
        max_length=20,
        num_mel_bins=16,
        time_stride=4,
        frequency_stride=4,
    ),
    "vit_msn": _image("ViTMSN"),
    "ijepa": _image("IJepa"),
    "vit_mae": _image(
        "ViTMAE",
        "ForPreTraining",
        4,
        "masked image",
        decoder_hidden_size=WIDTH,
        decoder_intermediate_size=NEURONS,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
    ),
    "dinov2": _image("Dinov2", hidden_size=24, mlp_ratio=2),
    "dinov2-swiglu": _image("Dinov2", hidden_size=24, mlp_ratio=3, use_swiglu_ffn=True),
    "dinov2_with_registers": _image("Dinov2WithRegisters", hidden_size=24, mlp_ratio=2),
    "data2vec-vision": _image("Data2VecVision"),
    "swin": _swin("Swin"),
    "swinv2": _swin("Swinv2"),
    "clip": _two_towers("CLIP"),
    "metaclip_2": _two_towers("MetaClip2"),
    "siglip": _two_towers("Siglip"),
    "wav2vec2": _audio("Wav2Vec2"),
    "wav2vec2-conformer": _audio("Wav2Vec2Conformer", sites=4),
    "wav2vec2-bert": _audio("Wav2Vec2Bert", feed="features", sites=4, feature_projection_input_dim=8),
    "hubert": _audio("Hubert"),
    "wavlm": _audio("WavLM"),
    "data2vec-audio": _audio("Data2VecAudio", conv_pos_kernel_size=3),
    "unispeech": _audio("UniSpeech"),
    "unispeech-sat": _audio("UniSpeechSat"),
    "sew": _audio("SEW", squeeze_factor=2),
}
SEEING = {
    "llava": _sees("Llava", "llama", vision={"model_type": "clip_vision_model"}),
    "paligemma": _sees("PaliGemma", "gemma", vision={"model_type": "siglip_vision_model"}, projection_dim=WIDTH),
    "mistral3": _sees("Mistral3", "mistral", vision={"model_type": "pixtral"}),
    "gemma3-sees": _sees("Gemma3", "gemma3_text", vision={"model_type": "siglip_vision_model"}, mm_tokens_per_image=16),
    "gemma4-sees": _sees(
        "Gemma4", "gemma4_text", {"global_head_dim": 8, "vocab_size_per_layer_input": VOCAB}, audio_config=None
    ),
    "qwen2_vl": _sees("Qwen2VL", "qwen2_vl_text", _MROPE, vision={"embed_dim": WIDTH, "depth": 1, "num_heads": 4}),
    "qwen2_5_vl": _sees("Qwen2_5_VL", "qwen2_5_vl_text", _MROPE, vision={"depth": 1, "num_heads": 4}),
    "qwen3_vl": _sees("Qwen3VL", "qwen3_vl_text", _MROPE, vision={"depth": 1, "num_heads": 4}),
    "idefics3": _sees("Idefics3", "llama"),
    "internvl": _sees("InternVL", "qwen2", vision={"image_size": [16, 16], "patch_size": [4, 4]}),
}
# Of architectures without a row, whose FFNs are tried (sites/trial.py).
TRIED = {
    "doge": _decoder("Doge", head_dim=8),
    "granite_swa": _decoder("GraniteSWA"),
    "dinov3_vit": _image("DINOv3ViT", "Model"),
    "dinov3_vit-swiglu": _image("DINOv3ViT", "Model", use_gated_mlp=True, hidden_act="silu"),
    "mgp-str": _image("Mgpstr", "Model", image_size=[16, 16], patch_size=[4, 4], mlp_ratio=1.5),
    # Whose activation is a function, and no config names it.
    "xlm": _xlm(),
    "xlm-relu": _xlm(gelu_activation=False),
}
if "exaone" in CONFIG_MAPPING:  # from transformers 5.19 on; its model is Llama's, with a config of its own
    TRIED["exaone"] = More(lambda: decoder(CONFIG_MAPPING["exaone"], tf.LlamaForCausalLM))
MORE: dict[str, More] = {**DECODERS, **ENCODERS, **SEQ2SEQ, **IMAGES_AND_SOUND, **SEEING, **SPREAD, **TRIED}
