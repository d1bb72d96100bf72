"""A converted model as an ordinary Glm4MoeForCausalLM, which stock transformers, vLLM and SGLang run.

Of the mixtures that engines know it is the one that says what moefy's models do: shared experts without a gate, a
router's bias that only chooses (`e_score_correction_bias`), leading dense layers, and attention as in Llama, Qwen2
(biases) and Qwen3 (normalised queries and keys).

Its experts are weighted, moefy's are not. The weights are sigmoid(z) of the chosen, divided by their sum, times K:
with the router's weights scaled down to s, so that logits z = s·w·x are near 0, sigmoid(z) is 1/2 + z/4 and all K
weights are 1 up to z/2. The choice is the same: sigmoid(z) + s·b/4 orders as w·x + b does. s is a power of two, so
that scaling rounds nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedModel

from moefy.errors import MoefyError
from moefy.moe import MoEFFN, moe_layers
from moefy.routers.linear import LinearRouter
from moefy.sites import base_model_type
from moefy.types import FFNWeights, LayerSpec

#: Architectures whose attention and norms Glm4Moe has too.
SOURCES = ("llama", "mistral", "qwen2", "qwen3")
# The spread of the scaled logits. Experts' weights are then within 0.2 % of 1 for four of five of them, and float32
# holds the scores, near 1/2, in steps of a 4,000th of their spread.
LOGIT_SPREAD = 2.0**-10
_LAYER = "model.layers.{}.mlp"
_COPIED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "rms_norm_eps", "initializer_range", "attention_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def check(model: PreTrainedModel) -> None:
    """MoefyError, in one sentence, for a converted model that Glm4Moe cannot express."""
    config, kind = model.config, base_model_type(model.config)
    if kind not in SOURCES or not type(model).__name__.endswith("ForCausalLM"):
        raise _refused(
            f"it is a {type(model).__name__.removeprefix('Moefy')}, and they have such mixtures of the language models "
            f"{', '.join(SOURCES)} alone",
            "--recipe slim makes an ordinary model of a dense one instead",
        )
    layers = _layers(model)
    if config.hidden_act not in ("silu", "swish"):
        raise _refused(f"its activation is {config.hidden_act}, and theirs silu", "use --recipe slim")
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings:
        raise _refused(f"its attention looks {window} tokens back (sliding_window)", "use --recipe slim")
    routed = [moe for moe in layers if moe.spec.experts]
    if not any(moe.routes for moe in routed):
        raise _refused("nothing is routed")
    if any(moe.spec.experts == 0 for moe in layers[-len(routed) :]):
        raise _refused("layers that route are not followed by such layers only")
    for moe in routed:
        _check_layer(moe, routed[0].spec)


def _layers(model: PreTrainedModel) -> list[MoEFFN]:
    """The converted FFNs, one a layer."""
    found = moe_layers(model)
    if not found:
        raise _refused("it has no experts", "they run a slim or a dense one as it is")
    names = [_LAYER.format(i) for i in range(model.config.num_hidden_layers)]
    if list(found) != names:
        raise _refused("not every layer is converted")
    return [found[name] for name in names]


def _refused(why: str, instead: str = "convert with --recipe engine") -> MoefyError:
    return MoefyError(f"This model cannot be written for other engines: {why}; {instead}.")


def _check_layer(moe: MoEFFN, first: LayerSpec) -> None:
    spec = moe.spec
    if spec.most:
        raise _refused("how many experts run differs from token to token (a threshold)")
    if not moe.routes:
        raise _refused("not all of its layers with experts route")
    if not isinstance(moe.router, LinearRouter):
        raise _refused(f"its router is {spec.router}, and theirs are linear ones (linear, logistic)")
    if not spec.gated or spec.up_bias or spec.gate_bias or spec.down_bias or spec.activate_up:
        raise _refused("its experts have biases, which theirs have not")
    if spec.gate_scale or spec.balance:
        raise _refused("its experts have a gate scale or a load-balancing bias", "tune without them")
    if spec.shared == 0 or spec.shared % spec.expert_size:
        raise _refused(
            f"its {spec.shared} shared neurons are not one or more experts of {spec.expert_size}",
            "convert with --recipe engine, and where that was so with more --active or a smaller --expert-size",
        )
    if any(getattr(spec, size) != getattr(first, size) for size in ("shared", "experts", "expert_size", "top_k")):
        raise _refused("its layers differ in their experts (allocation: uniform makes them the same)")


@torch.no_grad()
def stock(model: PreTrainedModel, spreads: Mapping[str, float]) -> Glm4MoeForCausalLM:
    """The model as Glm4MoeForCausalLM, of the same type; weights are shared with `model` where nothing changes.

    `spreads` has the standard deviation of each layer's router logits, by the layer's name. MoefyError as `check`.
    """
    check(model)
    state = {k: v for k, v in model.state_dict().items() if ".mlp." not in k}
    for name, moe in moe_layers(model).items():
        state |= {f"{name}.{key}": tensor for key, tensor in _layer_state(moe, spreads[name]).items()}
    with torch.device("meta"):
        made = Glm4MoeForCausalLM(_config(model))
    # Written out even where it is tied, as vLLM's loader asks: a copy, since what shares memory is written once.
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    differ = [*state.keys() ^ made.state_dict().keys()]
    if differ:
        raise _refused(f"it has other weights than their model ({min(differ)})", "use --recipe slim")
    made.load_state_dict(state, assign=True)
    made.model.rotary_emb = type(made.model.rotary_emb)(made.config)  # its frequencies are no weights
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()


def _layer_state(moe: MoEFFN, spread: float) -> dict[str, Tensor]:
    weights = moe.weights()
    shared = weights.shared
    if not moe.spec.experts:
        return _mlp("", shared)
    E, M = moe.spec.experts, moe.spec.expert_size
    gate, up, down = (_present(getattr(weights.routed, part)).unflatten(0, (E, M)) for part in ("gate", "up", "down"))
    router = moe.router
    assert isinstance(router, LinearRouter)
    scale = 2.0 ** round(math.log2(LOGIT_SPREAD / spread))
    bias = router.bias.float() * (scale / 4)
    return {
        **_mlp("shared_experts.", shared),
        "experts.gate_up_proj": torch.cat([gate, up], dim=1),
        "experts.down_proj": down.transpose(1, 2).contiguous(),
        "gate.weight": router.weight.float() * scale,
        "gate.e_score_correction_bias": bias - bias.mean(),  # the same order, and small numbers
    }


def _mlp(prefix: str, ffn: FFNWeights) -> dict[str, Tensor]:
    parts = {"gate_proj": ffn.gate, "up_proj": ffn.up, "down_proj": ffn.down.t().contiguous()}
    return {f"{prefix}{name}.weight": _present(tensor) for name, tensor in parts.items()}


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.detach()


def _config(model: PreTrainedModel) -> Glm4MoeConfig:
    source: Any = model.config
    layers = _layers(model)
    spec, dense = layers[-1].spec, sum(1 for moe in layers if not moe.spec.experts)
    head = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    options: dict[str, Any] = {
        **{name: getattr(source, name, None) for name in _COPIED},
        "hidden_act": "silu",  # "swish" is the same, and vLLM does not know it
        "head_dim": head,
        "rope_parameters": {**source.rope_parameters, "partial_rotary_factor": 1.0},
        "partial_rotary_factor": 1.0,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in model.state_dict(),
        "use_qk_norm": base_model_type(source) == "qwen3",
        "tie_word_embeddings": False,
        "intermediate_size": layers[0].spec.neurons,
        "first_k_dense_replace": dense,
        "moe_intermediate_size": spec.expert_size,
        "n_routed_experts": spec.experts,
        "num_experts_per_tok": spec.top_k,
        "n_shared_experts": spec.shared // spec.expert_size,
        "routed_scaling_factor": float(spec.top_k),
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "num_mtp_layers": 0,
        "dtype": source.dtype,
    }
    return Glm4MoeConfig(**options)
