"""Bamboo (PowerInfer's 7B with dReLU), which transformers does not ship: Mistral with relu(gate) * relu(up).

Source: the model's own modelling file, `down(act(gate(x)) * act(up(x)))`; everything else is Mistral's.
Defining it here lets a Bamboo checkpoint load without running code from the checkpoint.
"""

from __future__ import annotations

from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralMLP, MistralModel


class BambooConfig(MistralConfig):
    model_type = "bamboo"


class BambooMLP(MistralMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.act_fn(self.up_proj(x)))


class BambooModel(MistralModel):
    config_class = BambooConfig

    def __init__(self, config: BambooConfig):
        super().__init__(config)
        for layer in self.layers:
            layer.mlp = BambooMLP(config)
        self.post_init()


class BambooForCausalLM(MistralForCausalLM):
    config_class = BambooConfig

    def __init__(self, config: BambooConfig):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = BambooMLP(config)
        self.post_init()


def register() -> None:
    """Make the Auto classes know Bamboo; called once by `import moefy`."""
    AutoConfig.register("bamboo", BambooConfig, exist_ok=True)
    AutoModel.register(BambooConfig, BambooModel, exist_ok=True)
    AutoModelForCausalLM.register(BambooConfig, BambooForCausalLM, exist_ok=True)
