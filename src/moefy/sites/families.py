"""The dense families whose FFNs moefy can read and mount: one row a structure. Add a family by adding a row.

A family without a row is tried where a module of its own is the FFN (`trial.py`).

Paths are relative to the module that owns the FFN (the owner). With `mount == ""` the owner itself is
the FFN and is replaced; otherwise the FFN is spread over the owner's children, the MoE is mounted on
the child that first sees the input and every child in `bypass` becomes an identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How one family of architectures lays out its FFN.

    `model_types` are those of the innermost config around the FFN: the text part of a model that also sees images
    has its own. A model of towers is in their row by its own type too; else its text part alone is converted.
    `activation` names the config attribute that holds the ACT2FN name; `fixed_activation` is that name
    where the code and not the config says it. `sizes` names the attribute that holds the count of neurons (an
    encoder-decoder may have two, the encoder's and the decoder's; none if the config has no such count); `fused`
    means that `up` holds the gate's rows and then the up rows in one matrix, `up_first` that it holds them the other
    way round; `activate_up` is Bamboo's
    relu(gate) * relu(up); `multipliers` names the attribute that holds two numbers, by which the model multiplies what
    the gate's rows give and what the FFN gives. Modules below a child that `stays_dense` names are left alone.
    Where a module has parameters (E, ...) and no children by these paths, they are E experts (`experts.py`).
    """

    model_types: tuple[str, ...]
    up: str
    down: str
    gate: str | None = None
    activation: str = "hidden_act"
    fixed_activation: str | None = None
    fused: bool = False
    up_first: bool = False
    activate_up: bool = False
    multipliers: str | None = None
    mount: str = ""
    bypass: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ("intermediate_size",)
    stays_dense: str | None = None


# What the families of mixtures of experts call their number of experts.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

_GATED: dict[str, Any] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_TWO: dict[str, Any] = {"up": "fc1", "down": "fc2"}
# The layout of BERT and of BART: the FFN is spread over the layer.
_SPLIT_IN_TWO: dict[str, Any] = {
    "up": "intermediate.dense",
    "down": "output.dense",
    "mount": "intermediate",
    "bypass": ("output.dense",),
}
_TWO_IN_THE_LAYER: dict[str, Any] = {**_TWO, "mount": "fc1", "bypass": ("activation_fn", "fc2")}

_LLAMA_LIKE = (
    *("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "olmo", "olmo2", "olmo3", "smollm3", "granite"),
    *("helium", "stablelm", "cohere", "cohere2", "ernie4_5", "seed_oss", "exaone4", "hunyuan_v1_dense", "diffllama"),
    *("cwm", "minicpm3", "hyperclovax", "gemma", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_5_text"),
    *("eurobert", "nomic_bert", "aimv2", "aimv2_text_model", "aimv2_vision_model"),
)
# Mixtures of experts whose layers hold their experts in one module. Some have layers with one FFN, or an FFN beside the
# experts that every token runs, in the layout of Llama.
_MIXTURES = (
    *(
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
        "olmoe",
        "flex_olmo",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe",
    ),
    *("glm4_moe_lite", "granitemoe", "granitemoeshared", "granitemoehybrid", "phimoe", "jamba", "hunyuan_v1_moe"),
    *("ernie4_5_moe", "dots1", "minimax", "minimax_m2", "afmoe", "exaone_moe", "solar_open", "mimo_v2_flash", "mellum"),
    *("cohere2_moe", "laguna", "hy_v3"),
)
_BERT_LIKE = (
    *("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta", "deberta-v2", "ernie", "mpnet", "rembert"),
    *("data2vec-text", "xlm-roberta-xl", "xmod", "longformer", "big_bird", "nystromformer", "layoutlm", "layoutlmv3"),
    *("megatron-bert", "roformer", "luke", "tapas", "markuplm", "splinter", "canine", "fnet", "bert-generation"),
    *("dpr", "yolos", "convbert", "roc_bert", "mra", "yoso", "visual_bert", "bros", "lilt", "git", "vilt", "dpt"),
    *("timesformer", "sew-d", "lxmert", "align_text_model", "altclip", "altclip_text_model", "blip_text_model"),
    *("bridgetower", "bridgetower_text_model", "chinese_clip", "chinese_clip_text_model", "clap", "clap_text_model"),
    *("flava", "flava_text_model", "flava_image_model", "flava_multimodal_model", "mobilebert"),
)
_BART_LIKE = (
    *("whisper", "bart", "mbart", "m2m_100", "marian", "pegasus", "pegasus_x", "bigbird_pegasus", "blenderbot"),
    *("blenderbot-small", "led", "plbart", "mvp", "fsmt", "speech_to_text", "trocr", "pp_formulanet_text"),
    *("time_series_transformer", "informer", "autoformer", "table-transformer", "dab-detr"),
    *("qwen2_audio_encoder", "voxtral_encoder", "audioflamingo3_encoder", "qwen3_asr_encoder"),
    "moss_transcribe_diarize_audio",
)
_VIT_LIKE = ("vit", "deit", "beit", "vit_mae", "vit_msn", "ijepa", "audio-spectrogram-transformer")
_T5_LIKE = ("t5", "mt5", "umt5", "longt5")
_WAV2VEC2_LIKE = (
    *("wav2vec2", "wav2vec2-conformer", "wav2vec2-bert", "hubert", "wavlm", "data2vec-audio", "unispeech"),
    *("unispeech-sat", "sew"),
)
# Both towers of a model that compares texts with images.
_CLIP_LIKE = (
    *("clip", "clip_text_model", "clip_vision_model", "metaclip_2", "metaclip_2_text_model"),
    *("metaclip_2_vision_model", "altclip", "altclip_vision_model", "chinese_clip", "chinese_clip_vision_model"),
    *("clipseg", "clipseg_text_model", "clipseg_vision_model", "owlvit", "owlvit_text_model", "owlvit_vision_model"),
    *("owlv2", "owlv2_text_model", "owlv2_vision_model", "xclip", "xclip_text_model", "xclip_vision_model"),
)
_SIGLIP_LIKE = (
    *("siglip", "siglip_text_model", "siglip_vision_model", "siglip2", "siglip2_text_model", "siglip2_vision_model"),
)

FAMILIES: tuple[Family, ...] = (
    Family(_LLAMA_LIKE, **_GATED),
    Family(_MIXTURES, up="gate_up_proj", down="down_proj", fused=True, sizes=()),
    Family(_MIXTURES, **_GATED, sizes=()),
    Family(("granitemoeshared", "granitemoehybrid"), up="input_linear", down="output_linear", fused=True, sizes=()),
    Family(("lfm2_moe",), up="gate_up_proj", down="down_proj", fused=True, fixed_activation="silu", sizes=()),
    Family(("lfm2_moe",), gate="w1", up="w3", down="w2", fixed_activation="silu", sizes=()),
    Family(("nemotron_h",), up="up_proj", down="down_proj", activation="mlp_hidden_act", sizes=()),
    Family(("bamboo",), **_GATED, activate_up=True),
    Family(("falcon_h1",), **_GATED, multipliers="mlp_multipliers"),
    Family(
        ("gemma2", "gemma3_text", "gemma4_text", "vaultgemma", "t5gemma2", "t5gemma2_text", "t5gemma2_decoder"),
        **_GATED,
        activation="hidden_activation",
    ),
    # Gemma 4's larger models have experts beside that FFN.
    Family(("gemma4_text",), up="gate_up_proj", down="down_proj", fused=True, activation="hidden_activation"),
    # Its config counts the gate's and the up rows together.
    Family(("recurrent_gemma",), **_GATED, activation="hidden_activation", sizes=()),
    Family(("lfm2",), gate="w1", up="w3", down="w2", fixed_activation="silu"),
    Family(
        ("phi3", "glm", "glm4", "dia", "dia_encoder", "dia_decoder"), up="gate_up_proj", down="down_proj", fused=True
    ),
    # Its config counts the gate's and the up rows together.
    Family(("moshi",), **_TWO, fused=True, sizes=()),
    Family(("moonshine",), **_TWO, activation="encoder_hidden_act"),
    Family(("moonshine_streaming", "moonshine_streaming_encoder"), **_TWO),
    Family(("moonshine", "moonshine_streaming"), **_TWO, fused=True, up_first=True),
    Family(("cpmant",), gate="w_in.w_0", up="w_in.w_1", down="w_out", fixed_activation="gelu", sizes=("dim_ff",)),
    Family(("nemotron", "arcee", "apertus", "jais2"), up="up_proj", down="down_proj"),
    Family(
        ("falcon",),
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="activation",
        sizes=("ffn_hidden_size",),
    ),
    Family(("gpt_neox", "persimmon"), up="dense_h_to_4h", down="dense_4h_to_h"),
    # The FFN itself adds the residual, which it is given beside its input; so the linear is replaced and not the FFN.
    Family(
        ("bloom",),
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        mount="dense_h_to_4h",
        bypass=("gelu_impl", "dense_4h_to_h"),
        fixed_activation="gelu_pytorch_tanh",
        sizes=(),
    ),
    Family(
        ("mpt",),
        up="up_proj",
        down="down_proj",
        mount="up_proj",
        bypass=("act", "down_proj"),
        fixed_activation="gelu",
        sizes=(),
    ),
    Family(("gpt2", "gpt_bigcode"), up="c_fc", down="c_proj", activation="activation_function", sizes=("n_inner",)),
    Family(("gpt_neo",), up="c_fc", down="c_proj", activation="activation_function"),
    Family(("starcoder2",), up="c_fc", down="c_proj"),
    Family(("gptj", "codegen"), up="fc_in", down="fc_out", activation="activation_function", sizes=("n_inner",)),
    Family(("phi", "nanochat", "canary", "canary_decoder", "cohere_asr"), **_TWO),
    Family(
        ("opt", "xglm", "musicgen_decoder", "musicgen_melody_decoder"),
        **_TWO_IN_THE_LAYER,
        activation="activation_function",
        sizes=("ffn_dim",),
    ),
    Family(("biogpt",), **_TWO_IN_THE_LAYER),
    Family(
        _BART_LIKE,
        **_TWO_IN_THE_LAYER,
        activation="activation_function",
        sizes=("encoder_ffn_dim", "decoder_ffn_dim"),
    ),
    Family(
        ("prophetnet",),
        up="intermediate",
        down="output",
        activation="activation_function",
        sizes=("encoder_ffn_dim", "decoder_ffn_dim"),
    ),
    Family(_T5_LIKE, up="wi", down="wo", activation="dense_act_fn", sizes=("d_ff",)),
    Family(_T5_LIKE, gate="wi_0", up="wi_1", down="wo", activation="dense_act_fn", sizes=("d_ff",)),
    Family(_BERT_LIKE, **_SPLIT_IN_TWO),
    Family(
        ("funnel",),
        up="linear_1",
        down="linear_2",
        mount="linear_1",
        bypass=("activation_function", "linear_2"),
        sizes=("d_inner",),
    ),
    # All its layers, or those of a group, share one.
    Family(("albert",), up="ffn", down="ffn_output", mount="ffn", bypass=("activation", "ffn_output")),
    # The FFN on the layout, narrower by a ratio that the config has.
    Family(
        ("lilt",),
        up="layout_intermediate.dense",
        down="layout_output.dense",
        mount="layout_intermediate",
        bypass=("layout_output.dense",),
    ),
    Family(
        ("lxmert",), up="lang_inter.dense", down="lang_output.dense", mount="lang_inter", bypass=("lang_output.dense",)
    ),
    Family(
        ("lxmert",), up="visn_inter.dense", down="visn_output.dense", mount="visn_inter", bypass=("visn_output.dense",)
    ),
    Family(
        ("reformer",),
        up="dense.dense",
        down="output.dense",
        mount="dense",
        bypass=("output.dense",),
        sizes=("feed_forward_size",),
    ),
    Family(("ctrl",), up="0", down="2", mount="0", bypass=("1", "2"), fixed_activation="relu", sizes=("dff",)),
    Family(
        ("patchtst",),
        up="0",
        down="3",
        mount="0",
        bypass=("1", "3"),
        activation="activation_function",
        sizes=("ffn_dim",),
    ),
    Family(("xclip",), up="0", down="3", mount="0", bypass=("1", "3"), activation="prompt_hidden_act", sizes=()),
    Family(
        ("bridgetower", "bridgetower_vision_model"),
        up="c_fc",
        down="c_proj",
        mount="c_fc",
        bypass=("gelu", "c_proj"),
        fixed_activation="quick_gelu",
        sizes=(),
    ),
    Family(("esm",), **_SPLIT_IN_TWO, fixed_activation="gelu"),
    Family(("cvt",), **_SPLIT_IN_TWO, fixed_activation="gelu", sizes=()),
    Family(("convnext",), up="pwconv1", down="pwconv2", mount="pwconv1", bypass=("act", "pwconv2"), sizes=()),
    Family(
        ("dinov3_convnext",),
        up="pointwise_conv1",
        down="pointwise_conv2",
        mount="pointwise_conv1",
        bypass=("activation_fn", "pointwise_conv2"),
        sizes=(),
    ),
    # Its `intermediate` begins with the norm.
    Family(
        ("roberta-prelayernorm",),
        up="intermediate.dense",
        down="output.dense",
        mount="intermediate.dense",
        bypass=("intermediate.intermediate_act_fn", "output.dense"),
    ),
    Family(("modernbert", "modernbert-decoder"), up="Wi", down="Wo", fused=True, activation="hidden_activation"),
    Family(("distilbert",), up="lin1", down="lin2", activation="activation", sizes=("hidden_dim",)),
    Family(_VIT_LIKE, **_TWO, sizes=("intermediate_size", "decoder_intermediate_size")),
    Family(("data2vec-vision", "videomae"), **_SPLIT_IN_TWO, sizes=("intermediate_size", "decoder_intermediate_size")),
    Family(("dinov2", "dinov2_with_registers", "swin"), **_TWO, sizes=()),
    Family(("dinov2", "dinov2_with_registers"), **_GATED, fixed_activation="silu", sizes=()),
    Family(
        ("swin", "swinv2", "swin2sr", "donut-swin", "maskformer-swin", "clap", "clap_audio_model", "mobilevit"),
        **_SPLIT_IN_TWO,
        sizes=(),
    ),
    Family(("pvt",), up="dense1", down="dense2", sizes=()),
    Family(("tipsv2", "tipsv2_text_model", "tipsv2_vision_model"), **_TWO, sizes=()),
    # The width of its FFNs is that of the pooling head's attention too.
    Family(("videoprism", "videoprism_text_model", "videoprism_vision_model"), **_TWO, sizes=()),
    # A mixer works on the tokens, which it has in the place of the width.
    Family(("groupvit", "groupvit_text_model", "groupvit_vision_model"), **_TWO, stays_dense="mlp_inter", sizes=()),
    Family(("qwen3_vl_vision",), up="linear_fc1", down="linear_fc2"),
    Family(("sam2_hiera_det_model",), up="proj_in", down="proj_out", sizes=()),
    Family(_CLIP_LIKE, **_TWO),
    # The pooling head of SigLIP sees one token an image, too few to calibrate on; its width is the other FFNs'.
    Family(_SIGLIP_LIKE, **_TWO, stays_dense="head", sizes=()),
    Family(_WAV2VEC2_LIKE, up="intermediate_dense", down="output_dense"),
    Family(("parakeet_ctc", "parakeet_encoder", "canary", "cohere_asr"), up="linear1", down="linear2"),
)

# Why architectures have no row that look as if they could have one.
LEFT_OUT: dict[str, str] = {
    "bitnet": "it has a norm between the neurons and the down-projection, and weights of three values",
    "dbrx": "its experts keep their matrices the other way round in one long table",
    "gpt_oss": "its experts have biases, and clamp and scale what their gates and up rows give",
    "llama4_text": "its experts keep their matrices the other way round",
    "mllama_text_model": "the layers that look at images do not run on text",
    "xlnet": "it keeps its tokens in another order than its masks",
}
