"""Every family: read, convert with all experts active, same outputs, save, load, write back the same weights."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

import moefy
import tiny
from moefy.moe import moe_layers
from moefy.sites import find_sites
from moefy.sources.models import load_source

ALL_ACTIVE = moefy.Recipe(experts=6, shared=2, active=4, top_activated=4)
HALF = moefy.Recipe(experts=6, shared=1, active=2, top_activated=4)


def close(ours: torch.Tensor, dense: torch.Tensor, length: int = tiny.NEURONS) -> bool:
    """Equal up to rounding: a few units in the last place of the type for each addend of a sum, over 4 FFNs."""
    tolerance = 4 * torch.finfo(dense.dtype).eps * length**0.5 * 8
    return bool(((ours - dense).norm() <= tolerance * dense.norm()).item())


@pytest.mark.parametrize("family", tiny.ALL)
def test_all_experts_active_equals_dense_and_comes_back(family, tmp_path):
    model, feed = tiny.tiny(family), tiny.inputs(family)
    dense_out = tiny.output(model, feed)
    dense_state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = len(find_sites(model))
    report = moefy.convert(model, ALL_ACTIVE, [feed])
    assert len(report.layers) == expected == len(moe_layers(model))
    assert close(tiny.output(model, feed), dense_out)

    moefy.save(model, tmp_path / "out")
    again = moefy.load(tmp_path / "out")
    assert torch.equal(tiny.output(again, feed), tiny.output(model, feed))

    back = moefy.to_dense(again).state_dict()
    assert back.keys() == dense_state.keys()
    assert all(torch.equal(back[k], v) for k, v in dense_state.items())


@pytest.mark.parametrize("family", tiny.ALL)
def test_partly_active_runs_and_differs(family):
    model, feed = tiny.tiny(family), tiny.inputs(family)
    dense_out = tiny.output(model, feed)
    report = moefy.convert(model, HALF, [feed])
    out = tiny.output(model, feed)
    assert out.isfinite().all()
    assert not close(out, dense_out)
    assert all(0 < layer.error < 2 for layer in report.layers)


def test_a_t5_in_float16_is_refused_for_its_two_types(tmp_path):
    tiny.tiny("t5-v1.1").save_pretrained(tmp_path)
    model, _ = load_source(tmp_path, dtype="float16")
    with pytest.raises(moefy.MoefyError, match="of two types, float16 and float32; load the model in one"):
        moefy.convert(model, HALF, [tiny.inputs("t5-v1.1")])
    assert not moe_layers(model)


@pytest.mark.parametrize("activation", ACT2FN.keys())
@pytest.mark.parametrize("family", ["llama", "bert-mlm"])
def test_every_activation_of_transformers(family, activation, tmp_path):
    torch.manual_seed(0)
    model = tiny.FAMILIES[family]()
    model = type(model)(type(model.config)(**{**model.config.to_dict(), "hidden_act": activation})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "act" in name:  # learned activations: not at their initial value, and different a layer
                parameter.add_(torch.rand_like(parameter))
    feed = tiny.inputs(family)
    dense_out = tiny.output(model, feed)
    dense_state = {k: v.clone() for k, v in model.state_dict().items()}
    moefy.convert(model, ALL_ACTIVE, [feed])
    assert close(tiny.output(model, feed), dense_out)
    moefy.save(model, tmp_path / "out")
    again = moefy.load(tmp_path / "out")
    assert torch.equal(tiny.output(again, feed), tiny.output(model, feed))
    back = moefy.to_dense(again).state_dict()
    assert all(torch.equal(back[k], v) for k, v in dense_state.items())


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "bert", "t5-v1.1", "opt"])
def test_bfloat16(family, tmp_path):
    tiny.tiny(family).save_pretrained(tmp_path / "dense")
    model, _ = load_source(tmp_path / "dense", dtype="bfloat16")
    feed = tiny.inputs(family)
    dense_out = tiny.output(model, feed)
    moefy.convert(model, ALL_ACTIVE, [feed])
    assert next(iter(moe_layers(model).values())).experts_up.dtype == torch.bfloat16
    assert close(tiny.output(model, feed), dense_out)
    moefy.save(model, tmp_path / "out")
    again = moefy.load(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert torch.equal(tiny.output(again, feed), tiny.output(model, feed))


def test_unknown_architecture_is_named_with_its_ffns():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = type("Config", (), {"model_type": "odd"})()
            self.blocks = nn.ModuleList(
                nn.ModuleDict({"ffn": nn.ModuleDict({"widen": nn.Linear(8, 32), "narrow": nn.Linear(32, 8)})})
                for _ in range(3)
            )

    with pytest.raises(moefy.MoefyError) as error:
        find_sites(Odd())
    for part in ("'odd'", "blocks.*.ffn (widen -> narrow) x3", "FAMILIES", "CONTRIBUTING.md"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"), [({"num_local_experts": 8}, "a mixture of experts whose layout"), ({}, "has no FFNs")]
)
def test_what_has_nothing_to_convert_says_so(config, message):
    model = nn.Sequential(nn.Linear(8, 8))
    model.config = type("Config", (), {"model_type": "odd", **config})()
    with pytest.raises(moefy.MoefyError, match=message):
        find_sites(model)


def test_sites_do_not_match_attention():
    names = [site.name for site in find_sites(tiny.tiny("bert"))]
    assert names == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
