"""FFNs of architectures without a row: believed where they compute what their weights say, and only there."""

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.models.voxtral_realtime import modeling_voxtral_realtime as voxtral

import moefy
import tiny
from moefy.moe import moe_layers
from moefy.sites import FAMILIES, find_sites
from tiny_base import NEURONS, TEXT, VOCAB, WIDTH, decoder
from tiny_mixtures import MIXTURES
from tiny_more import TRIED


class OddConfig(tf.PretrainedConfig):
    model_type = "moefy-test-odd"

    def __init__(self, hidden_act="silu", **more):
        self.hidden_act = hidden_act
        super().__init__(**more)


AutoConfig.register("moefy-test-odd", OddConfig, exist_ok=True)


class MLP(nn.Module):
    """A gated FFN by the usual names."""

    def __init__(self, act="silu"):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, NEURONS, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(NEURONS, WIDTH, bias=False)
        self.act_fn = ACT2FN[act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Scaled(MLP):
    def forward(self, x):
        return super().forward(x) * 0.9


class Clamped(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))


class Normed(MLP):
    def forward(self, x):
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(nn.functional.rms_norm(h, (NEURONS,)))


class NarrowGate(MLP):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, 1, bias=False)


class WithMore(MLP):
    def forward(self, x, residual=None):
        return super().forward(x)


class GivesTwo(MLP):
    def forward(self, x):
        return super().forward(x), None


class Fused(nn.Module):
    def __init__(self, gate_first=True):
        super().__init__()
        self.gate_first = gate_first
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * NEURONS), nn.Linear(NEURONS, WIDTH)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        first, second = self.fc1(x).chunk(2, dim=-1)
        gate, up = (first, second) if self.gate_first else (second, first)
        return self.drop(self.fc2(nn.functional.silu(gate) * up))


class Odd(tf.PreTrainedModel):
    config_class = OddConfig

    def __init__(self, make, layers=2, shared=False, **config):
        super().__init__(OddConfig(**config))
        self.embed = nn.Embedding(99, WIDTH)
        one = make()
        self.layers = nn.ModuleList(nn.ModuleDict({"ffn": one if shared else make()}) for _ in range(layers))
        self.head = make()
        self.post_init()

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer["ffn"](x)
        return (x,)


def found(model):
    return [site.name for site in find_sites(model)]


BOTH = ["layers.0.ffn", "layers.1.ffn"]


def test_families_that_are_tried_have_no_row():
    for family, more in {**TRIED, "mistral4": MIXTURES["mistral4"]}.items():
        sites = find_sites(more.make())
        assert len(sites) == more.sites, family
        assert not any(site.family in FAMILIES for site in sites), family


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("make", "believed"),
    [
        (MLP, True),
        (Fused, True),
        (lambda: Fused(gate_first=False), False),
        (Scaled, False),
        (Clamped, False),
        (Normed, False),
        (WithMore, False),
        (GivesTwo, False),
    ],
)
def test_what_a_module_computes_decides(make, believed, dtype):
    torch.manual_seed(0)
    model = Odd(make).to(dtype)
    if believed:
        assert found(model) == BOTH
        return
    with pytest.raises(
        moefy.MoefyError, match=r"'moefy-test-odd': layers.0.ffn has the matrices of an FFN and does not"
    ):
        find_sites(model)


def test_a_gate_of_another_width_is_none():
    with pytest.raises(moefy.MoefyError, match="'moefy-test-odd' is not in moefy's table of families"):
        find_sites(Odd(NarrowGate))


def test_the_activation_is_the_one_that_it_computes():
    for act in ("relu", "gelu", "gelu_new", "quick_gelu"):
        sites = find_sites(Odd(lambda act=act: MLP(act), hidden_act="silu"))  # the config says another one
        y = sites[0].owner(torch.ones(1, WIDTH))
        assert torch.allclose(sites[0].read().forward(torch.ones(1, WIDTH)), y, atol=1e-6)
        assert sites[0].activation in (act, *(["gelu_pytorch_tanh"] if act == "gelu_new" else []))


def test_a_trial_leaves_a_model_and_random_numbers_as_they_were():
    model = Odd(Fused)
    model.train()
    model.layers[0]["ffn"].drop.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert found(model) == BOTH
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())


def test_what_fails_beside_others_is_told():
    model = Odd(MLP)
    model.layers[1]["ffn"] = Scaled()
    with pytest.warns(moefy.errors.MoefyWarning, match=r"computes something else stays as it is: layers.1.ffn\.$"):
        assert found(model) == BOTH[:1]


def test_the_layers_of_gemma_3n_that_are_sparse_already_stay(tmp_path):
    """They keep only the gate's highest values."""
    sparse = {"activation_sparsity_pattern": [0.95, 0.0, 0.0], "intermediate_size": [NEURONS] * 3}
    small = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "altup_num_inputs": 2}
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    config = tf.Gemma3nTextConfig(
        **{**TEXT, **sparse, **small, "num_hidden_layers": 3, "layer_types": kinds},
        num_key_value_heads=2,
        head_dim=8,
        laurel_rank=4,
        num_kv_shared_layers=1,
    )
    torch.manual_seed(0)
    model, ids = tf.Gemma3nForCausalLM(config).eval(), torch.randint(3, VOCAB, (8, 12))
    with pytest.warns(
        moefy.errors.MoefyWarning, match=r"computes something else stays as it is: model.layers.0.mlp\.$"
    ):
        report = moefy.convert(model, moefy.Recipe.of("reconstructed", budget=0.5, expert_size=2), [{"input_ids": ids}])
    assert [layer.name for layer in report.layers] == ["model.layers.1.mlp", "model.layers.2.mlp"]
    moefy.save(model, tmp_path / "out")
    assert torch.equal(moefy.load(tmp_path / "out")(ids).logits, model(ids).logits)


def test_what_a_norm_is_made_from_is_none():
    cls = voxtral.VoxtralRealtimeTextModel  # with the row's matrices in its norms, which the time goes through
    model = cls(cls.config_class(**TEXT, num_key_value_heads=2, head_dim=8)).eval()
    feed = {"input_ids": torch.randint(3, VOCAB, (8, 12)), "t_cond": torch.randn(1, WIDTH)}
    assert found(model) == ["layers.0.mlp", "layers.1.mlp"]
    # transformers names this class to its Auto classes and does not have it.
    moefy.convert(model, moefy.Recipe(experts=6, shared=2, active=2, top_activated=4), [feed])
    assert len(moe_layers(model)) == 2


def test_an_architecture_that_only_a_checkpoint_s_own_code_has():
    class Own(OddConfig):
        model_type = "moefy-test-own"

    model = Odd(MLP)
    model.config.__class__ = Own
    with pytest.raises(moefy.MoefyError, match="'moefy-test-own' is not in moefy's table of families"):
        find_sites(model)


def test_a_class_that_transformers_does_not_name_is_not_saved(tmp_path):
    model = Odd(MLP)
    ids = torch.randint(0, 99, (8, 12))
    moefy.convert(model, moefy.Recipe(experts=6, shared=2, active=2, top_activated=4), [{"input_ids": ids}])
    assert len(moe_layers(model)) == 2
    with pytest.raises(moefy.MoefyError, match="transformers knows no class Odd by its name"):
        moefy.save(model, tmp_path / "out")


def test_experts_in_another_layout_do_not_leave_what_runs_beside_them():
    model = decoder(tf.AriaTextConfig, tf.AriaTextForCausalLM, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    with pytest.raises(moefy.MoefyError, match="a mixture of experts whose layout moefy does not know"):
        find_sites(model)


def test_weights_that_are_no_numbers_have_their_own_sentence():
    model, feed = tiny.tiny("doge"), tiny.inputs("doge")
    find_sites(model)[1].owner.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(moefy.MoefyError, match=r"weights of model.layers.1.mlp \(up\) hold NaN"):
        moefy.convert(model, moefy.Recipe(experts=6, shared=2, active=2, top_activated=4), [feed])


def test_slim_of_an_architecture_without_a_row(tmp_path):
    model = tiny.tiny("granite_swa")
    moefy.convert(model, moefy.Recipe.of("slim", budget=0.7), [tiny.inputs("granite_swa", batch=8)])
    moefy.save(model, tmp_path / "out")
    again = tf.GraniteSWAForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert [site.read().neurons for site in find_sites(again)] == [32, 32]
    feed = tiny.inputs("granite_swa")
    assert torch.allclose(tiny.output(again, feed), tiny.output(model, feed), atol=1e-5)
