"""ReLU checkpoints that need no ReLU-fication: ReluLLaMA, ReluFalcon and Bamboo, by their shapes.

The configs here are those of the dense models that these were tuned from (Llama 2 7B, Falcon 40B, Mistral 7B),
with ReLU under the key that transformers reads; the released config.json files were not at hand. For the
conversion they shrink in width and depth and get random weights, written and read as a checkpoint is. Full-sized
they are looked at without memory, on the meta device.
"""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import moefy
from moefy.moe import moe_layers
from moefy.sites import find_sites
from moefy.sources.models import load_source

# SparseLLM/ReluLLaMA-7B: Llama 2 with ReLU for SiLU.
RELU_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "relu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# SparseLLM/ReluFalcon-40B: Falcon 40B with ReLU for GELU. It is older than Falcon's `activation` in transformers:
# if its config.json lacks the key, the model runs GELU until the key is added.
RELU_FALCON = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "activation": "relu",
    "alibi": False,
    "bias": False,
    "hidden_size": 8192,
    "layer_norm_epsilon": 1e-05,
    "multi_query": True,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_kv_heads": 8,
    "parallel_attn": True,
    "vocab_size": 65024,
    "bos_token_id": 11,
    "eos_token_id": 11,
}
# PowerInfer/Bamboo-base-v0_1: Mistral 7B whose gate and up branch both pass through ReLU.
BAMBOO = {
    "architectures": ["BambooForCausalLM"],
    "model_type": "bamboo",
    "hidden_act": "relu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {"ReluLLaMA-7B": (RELU_LLAMA, 11008), "ReluFalcon-40B": (RELU_FALCON, 32768), "Bamboo-7B": (BAMBOO, 14336)}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 300}


@pytest.mark.parametrize("name", MODELS)
def test_shrunk_checkpoints_load_and_convert(name, tmp_path):
    config = {**MODELS[name][0], **SMALL}
    config.update({"num_kv_heads": 2} if "num_kv_heads" in config else {"num_key_value_heads": 4})
    if "intermediate_size" in config:
        config["intermediate_size"] = 128
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    made.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    model, _ = load_source(str(tmp_path / "dense"))
    feed = {"input_ids": torch.randint(12, 300, (4, 40))}
    dense = model(**feed).logits
    sites = find_sites(model)
    hidden = sites[0].read().hidden(torch.randn(200, 64))
    # One ReLU stops half of the neurons, two stop three quarters.
    assert float((hidden == 0).float().mean()) == pytest.approx(0.75 if name.startswith("Bamboo") else 0.5, abs=0.06)
    report = moefy.convert(model, "moefication", [feed])
    assert [layer.expert_size for layer in report.layers] == [32, 32]
    for moe in moe_layers(model).values():
        moe.top_k = moe.spec.experts
    torch.testing.assert_close(model(**feed).logits, dense, rtol=1e-3, atol=1e-4)
    moefy.save(model, tmp_path / "out")
    assert moefy.load(tmp_path / "out").config.moefy["recipe"]["name"] == "moefication"


@pytest.mark.parametrize("name", MODELS)
def test_full_sized_shapes_fit_experts_of_32(name, tmp_path):
    config, neurons = MODELS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    sites = find_sites(model)
    assert len(sites) == config["num_hidden_layers"]
    spec = moefy.RECIPES["moefication"].layer_spec(sites[0].read(), sites[0].name)
    assert (spec.neurons, spec.expert_size, spec.activation) == (neurons, 32, "relu")
    assert spec.top_k == round(0.2 * neurons / 32)
    assert spec.activate_up == name.startswith("Bamboo")


def test_a_falcon_without_the_key_is_a_gelu_model(tmp_path):
    config = {k: v for k, v in RELU_FALCON.items() if k != "activation"} | SMALL | {"num_kv_heads": 2}
    for added, expected in ({}, "gelu"), ({"activation": "relu"}, "relu"):
        (tmp_path / "config.json").write_text(json.dumps({**config, **added}))
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        assert {site.activation for site in find_sites(model)} == {expected}
