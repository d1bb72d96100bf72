"""The dense families whose FFNs moefy can read and mount: one row a structure. Add a family by adding a row.

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

    `activation` names the config attribute that holds the ACT2FN name, `sizes` the one that holds the count of
    neurons (an encoder-decoder may have two, the encoder's and the decoder's); `fused` means that `up` holds the
    gate's rows and then the up rows in one matrix; `activate_up` is Bamboo's relu(gate) * relu(up).
    """

    model_types: tuple[str, ...]
    up: str
    down: str
    gate: str | None = None
    activation: str = "hidden_act"
    fused: bool = False
    activate_up: bool = False
    mount: str = ""
    bypass: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ("intermediate_size",)


_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "olmo", "olmo3", "smollm3", "granite", "helium")
_BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2", "ernie")
_SPLIT_IN_TWO: dict[str, Any] = {
    "up": "intermediate.dense",
    "down": "output.dense",
    "mount": "intermediate",
    "bypass": ("output.dense",),
}

FAMILIES: tuple[Family, ...] = (
    Family(_LLAMA_LIKE, gate="gate_proj", up="up_proj", down="down_proj"),
    Family(("bamboo",), gate="gate_proj", up="up_proj", down="down_proj", activate_up=True),
    Family(
        ("gemma2", "gemma3", "gemma3_text"),
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        activation="hidden_activation",
    ),
    Family(("gemma",), gate="gate_proj", up="up_proj", down="down_proj"),
    Family(("phi3",), up="gate_up_proj", down="down_proj", fused=True),
    Family(
        ("falcon",),
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        activation="activation",
        sizes=("ffn_hidden_size",),
    ),
    Family(("gpt_neox",), up="dense_h_to_4h", down="dense_4h_to_h"),
    Family(("gpt2",), up="c_fc", down="c_proj", activation="activation_function", sizes=("n_inner",)),
    Family(("phi",), up="fc1", down="fc2"),
    Family(
        ("opt",),
        up="fc1",
        down="fc2",
        activation="activation_function",
        mount="fc1",
        bypass=("activation_fn", "fc2"),
        sizes=("ffn_dim",),
    ),
    Family(
        ("whisper", "bart", "mbart", "m2m_100", "marian", "pegasus"),
        up="fc1",
        down="fc2",
        activation="activation_function",
        mount="fc1",
        bypass=("activation_fn", "fc2"),
        sizes=("encoder_ffn_dim", "decoder_ffn_dim"),
    ),
    Family(("t5", "mt5", "umt5"), up="wi", down="wo", activation="dense_act_fn", sizes=("d_ff",)),
    Family(("t5", "mt5", "umt5"), gate="wi_0", up="wi_1", down="wo", activation="dense_act_fn", sizes=("d_ff",)),
    Family(_BERT_LIKE, **_SPLIT_IN_TWO),
    Family(("distilbert",), up="lin1", down="lin2", activation="activation", sizes=("hidden_dim",)),
    Family(("vit",), up="fc1", down="fc2"),
    # transformers before 5.4 kept ViT's FFN in the layout of BERT.
    Family(("vit",), **_SPLIT_IN_TWO),
)
