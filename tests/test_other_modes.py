"""What torch, transformers and peft may do with a converted model: trace, fake, autocast, adapt, subclass."""

import json
import pickle

import peft
import pytest
import torch
import transformers as tf
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import moefy
import tiny
from moefy import kernels
from moefy.moe import moe_layers
from moefy.sources.models import load_source
from moefy.tuning import adapters
from native_problem import needs_native
from test_bound import build
from test_packed import close
from test_surroundings import COUNTED, converted


def with_packed_layer():
    moe, x = build()
    with torch.no_grad():
        moe(x)
    assert moe.packed_bytes()
    return moe, x


@needs_native
def test_tracing_is_refused_packed_or_not():
    for moe, x in (build(), with_packed_layer()):
        with torch.no_grad(), pytest.raises(moefy.MoefyError, match=r"torch.jit.trace cannot record routing"):
            torch.jit.trace(moe, (x,))
        with torch.no_grad(), pytest.raises(moefy.MoefyError, match=r"torch.export cannot record routing"):
            torch.export.export(moe, (x,), strict=False)
        with torch.no_grad(), pytest.raises(moefy.MoefyError, match="make_fx cannot record routing"):
            make_fx(moe)(x)  # it would record a result that nothing has written


@needs_native
@torch.no_grad()
def test_tensors_without_memory_of_their_own_are_not_read():
    """Once segmentation faults."""
    moe, x = build()
    with kernels.using("reference"):
        want, zeros = moe(x), moe(torch.zeros_like(x))
    close(torch.func.functionalize(moe)(x), want)
    moe(x)
    close(moe(torch._efficientzerotensor(x.shape)), zeros)
    moe(x)
    assert moe.packed_bytes()
    close(torch.func.functionalize(moe)(x), want)  # it is unpacked outside of the transform
    moe(x)
    with pytest.raises(ValueError, match="plain tensor on the CPU"):
        moe._packed.ffn.forward(torch.empty(x.shape, device="meta"), chosen=torch.zeros(len(x), 1, dtype=torch.long))


@needs_native
def test_a_tangent_is_not_dropped():
    moe, x = build()
    moe.requires_grad_(False)
    moe(x)
    assert moe.packed_bytes()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(moe(dual)).tangent
    step, near = 1e-3, x.double()
    moe.double()
    ahead, behind = moe(near + step), moe(near - step)
    same = (moe.route(near + step) == moe.route(near - step)).all(1)  # else the choice jumps between the two
    assert same.sum() > 100
    torch.testing.assert_close(tangent[same].double(), ((ahead - behind) / (2 * step))[same], rtol=1e-3, atol=1e-4)


@needs_native
@torch.no_grad()
def test_the_native_kernel_reads_no_tensor_whose_memory_is_not_its_values():
    from torch._subclasses import FakeTensorMode

    moe, x = with_packed_layer()
    with kernels.using("reference"):
        negative = moe(-x)
    moe(x)
    close(moe(torch._neg_view(x)), negative)
    with pytest.raises(RuntimeError, match="vmap"):  # torch's kernels look at values
        torch.vmap(moe)(x[None])
    moe(x)
    with FakeTensorMode(allow_non_fake_inputs=True):  # once segmentation faults
        for given in (x, torch.ones(3, x.shape[1])):
            with pytest.raises(moefy.MoefyError, match="cannot write fake tensors"):
                moe(given)
    assert moe.packed_bytes()


@needs_native
def test_weights_stay_while_a_backward_pass_may_come():
    moe, x = build()
    x.requires_grad_()
    for trained in (True, False):
        moe.experts_up.requires_grad_(trained)
        for mode in (True, False):
            y = moe.train(mode)(x).sum()
            with torch.no_grad():
                moe.eval()(x)  # a metric in the middle of a step
            assert not moe.packed_bytes()
            y.backward()
            assert x.grad is not None
            x.grad = moe.experts_up.grad = None
            with torch.no_grad():
                moe(x)
            assert moe.packed_bytes()
    y = moe(x)
    assert moe._graphs.alive()
    assert not pickle.loads(pickle.dumps(moe))._graphs.alive()
    del y  # nobody will go back through it
    with torch.no_grad():
        moe(x)
    assert moe.packed_bytes()


@needs_native
@torch.no_grad()
def test_a_pruned_matrix_runs():
    from torch.nn.utils import prune

    moe, x = build()
    prune.random_unstructured(moe, "experts_up", 0.5)
    with kernels.using("reference"):
        expected = moe(x)
    close(moe(x), expected)


@pytest.mark.parametrize("router", ["representative", "linear", "logistic", "similarity"])
@torch.no_grad()
def test_routers_decide_in_float32_under_autocast(router):
    moe, _ = build(router=router)
    x = torch.randn(2000, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(moe.route(x), (alike := moe.route(x)))
    assert torch.equal(moe.route(x), alike)


@pytest.mark.parametrize("recipe", [COUNTED, moefy.Recipe.of("reconstructed", budget=0.6, expert_size=2)])
def test_conversion_is_the_same_under_autocast(recipe):
    plain = converted(recipe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = converted(recipe)
    weights = under.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in plain.state_dict().items())


@needs_native
def test_int8_models_may_do_what_changes_nothing():
    model = converted(COUNTED)
    feed = tiny.inputs("llama")
    moefy.pack(model, "int8")
    with torch.no_grad():
        before = model(**feed).logits
        after = model.to("cpu").float().train().eval()(**feed).logits
    assert torch.equal(before, after)
    assert not model.requires_grad_(False).training
    assert torch.equal(model(**feed).logits, before)
    for change in (model.double, model.state_dict):
        with pytest.raises(moefy.MoefyError, match="int8"):
            change()
    model.requires_grad_(True).train()
    assert all(module.training for module in model.modules())
    with pytest.raises(moefy.MoefyError, match="int8 experts have no gradients"):
        model(**feed)
    layer = next(iter(moe_layers(model).values()))
    with torch.no_grad(), pytest.raises(moefy.MoefyError, match="plain tensors on the CPU only"):
        torch.vmap(layer)(torch.randn(2, 3, layer.spec.width))
    with torch.no_grad(), pytest.raises(moefy.MoefyError, match="plain tensors on the CPU only"):
        layer(torch.empty(3, layer.spec.width, device="meta"))  # once a segmentation fault


@needs_native
def test_what_is_offloaded_cannot_be_packed():
    moe, _ = build()
    with pytest.raises(moefy.MoefyError, match="offloaded cannot be packed"):
        moe.to("meta").pack("int8")


def test_adapters_and_wrappers_are_not_saved(tmp_path):
    model = converted(COUNTED)
    with pytest.raises(moefy.MoefyError, match="DataParallel is no model of transformers"):
        moefy.save(nn.DataParallel(model), tmp_path / "out")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for part in (adapted, adapted.get_base_model()):
        with pytest.raises(moefy.MoefyError, match=r"merge_and_unload\(\)"):
            moefy.save(part, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    moefy.save(adapted.merge_and_unload(), tmp_path / "out")
    moefy.load(tmp_path / "out")


def test_options_of_load_may_be_the_config_s(tmp_path):
    moefy.save(converted(COUNTED), tmp_path / "out")
    model = moefy.load(tmp_path / "out", use_cache=False, pad_token_id=7, dtype=torch.bfloat16)
    assert (model.config.use_cache, model.config.pad_token_id, model.dtype) == (False, 7, torch.bfloat16)
    config = tf.AutoConfig.from_pretrained(tmp_path / "out", rms_norm_eps=0.5)
    assert moefy.load(tmp_path / "out", config=config).config.rms_norm_eps == 0.5


class OwnLlama(tf.LlamaForCausalLM):
    pass


def test_a_user_s_subclass_is_saved_as_what_transformers_has(tmp_path):
    model = tiny.tiny("llama")
    model.__class__ = OwnLlama
    feed = tiny.inputs("llama")
    moefy.convert(model, COUNTED, [feed])
    assert isinstance(model, OwnLlama)
    moefy.save(model, tmp_path / "out")
    for loaded in (moefy.load(tmp_path / "out"), tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert torch.equal(tiny.output(loaded, feed), tiny.output(model, feed))


def test_a_converted_bamboo_pickles():
    from moefy.sites.bamboo import BambooConfig, BambooForCausalLM

    config = BambooConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model, feed = BambooForCausalLM(config).eval(), {"input_ids": torch.arange(24).view(2, 12)}
    moefy.convert(model, COUNTED, [feed])
    assert torch.equal(pickle.loads(pickle.dumps(model))(**feed).logits, model(**feed).logits)


def test_processors_are_those_of_the_dense_model(tmp_path):
    """Older checkpoints do not name theirs, so that the Auto classes go by the config."""
    tiny.tiny("vit").save_pretrained(tmp_path / "dense")
    tf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense/preprocessor_config.json"
    named = ("image_processor_type", "feature_extractor_type", "processor_class")
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in named}))
    model = tiny.tiny("vit")
    moefy.convert(model, COUNTED, [tiny.inputs("vit")])
    moefy.save(model, tmp_path / "out", source=str(tmp_path / "dense"))
    expected = type(tf.AutoImageProcessor.from_pretrained(tmp_path / "dense"))
    assert type(tf.AutoImageProcessor.from_pretrained(tmp_path / "out")) is expected


def test_a_config_without_sizes_is_a_sentence(tmp_path):
    """It is that of a 7B model to transformers, which made random weights for all of it until memory ended."""
    tiny.tiny("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(moefy.MoefyError, match=r"describes [\d,]{13} weights and its files hold"):
        load_source(tmp_path)


def test_adapters_that_cannot_be_made_leave_the_model_to_be_trained(monkeypatch):
    model = tiny.tiny("llama")
    moefy.convert(model, moefy.Recipe(experts=6, shared=2, active=2), [tiny.inputs("llama")])
    before = [p.requires_grad for p in model.parameters()]
    monkeypatch.setattr(adapters, "_linear_adapters", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapters.Adapters(model, 4, attention=True)
    assert [p.requires_grad for p in model.parameters()] == before
    assert any(before)
