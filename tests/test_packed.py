"""When a layer packs its weights, and what it does about parameters that are looked at or changed afterwards."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch

import moefy
from moefy import kernels
from moefy.moe import MoEFFN, moe_layers
from native_problem import needs_native
from test_bound import build

pytestmark = needs_native


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@torch.no_grad()
def test_threads_may_make_the_first_call_together():
    for _ in range(20):
        moe, x = build()
        with kernels.using("reference"):
            expected = moe(x)
        outputs, together = [], threading.Barrier(4)

        def call(moe=moe, x=x, outputs=outputs, together=together):
            together.wait()
            outputs.append(moe(x))

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outputs) == 4
        for y in (*outputs, moe(x)):
            close(y, expected)
            assert torch.equal(y, outputs[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_unpacks_the_same_bits_whatever_the_default_dtype(dtype):
    moe, x = build()
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    torch.set_default_dtype(dtype)
    try:
        moe(x)
        after = moe.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_call_without_gradients_amid_training_leaves_parameters_alone():
    moe, x = build()
    moe.requires_grad_(True).train()
    loss = moe(x).sum()
    with torch.no_grad():
        moe(x)
    loss.backward()
    moe.eval()
    with torch.no_grad():
        moe(x)  # gradients are there: an optimizer has not stepped yet
    torch.optim.SGD(moe.parameters(), lr=0.1).step()


@torch.no_grad()
def test_a_functional_call_runs_what_it_is_given_and_leaves_the_layer_as_it_was():
    moe, x = build()
    before = moe(x)
    given = {name: tensor * 2 for name, tensor in moe.state_dict().items() if name == "experts_down"}
    with kernels.using("reference"):
        expected = torch.func.functional_call(moe, given, (x,))
    moe(x)
    close(torch.func.functional_call(moe, given, (x,)), expected)
    assert given["experts_down"].numel()
    assert torch.equal(moe(x), before)


@torch.no_grad()
def test_another_parameter_runs_and_a_change_to_no_effect_is_refused():
    moe, x = build()
    before = moe(x)
    moe.experts_down = torch.nn.Parameter(torch.zeros(4, 8, 16), requires_grad=False)
    after = moe(x)
    assert not torch.equal(after, before)
    with kernels.using("reference"):
        close(after, moe(x))
    moe(x)
    moe.experts_up.mul_(2)
    with pytest.raises(moefy.MoefyError, match=r"call its unpack\(\)"):
        moe(x)
    moe.unpack()
    assert torch.equal(moe(x), after)


def test_unpacked_in_inference_mode_it_can_still_be_trained():
    moe, x = build()
    moe.requires_grad_(True)
    with torch.inference_mode():
        moe(x)
        moe.state_dict()
    moe(x).sum().backward()
    assert moe.experts_down.grad is not None


@torch.no_grad()
def test_equal_scores_go_to_the_lower_expert_on_every_kernel():
    moe, x = build()
    moe.router.weight.zero_()
    moe.router.bias.zero_()
    assert moe.route(x).tolist() == [[0, 1]] * len(x)
    with kernels.using("reference"):
        expected = moe(x)
    close(moe(x), expected)


def test_what_convert_returns_has_its_parameters(dense_model):
    model, batches = dense_model
    moefy.convert(model, "cmoe", batches)
    assert all(p.numel() for moe in moe_layers(model).values() for p in moe.parameters())


@pytest.mark.parametrize("recipe", ["reconstructed", "cmoe", "moefication", "slim"])
def test_converts_to_the_same_whatever_the_default_dtype(dense_model, recipe):
    model, batches = dense_model
    other = copy.deepcopy(model)
    torch.set_default_dtype(torch.bfloat16)
    try:
        moefy.convert(other, moefy.Recipe.of(recipe, experts=8), batches)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    moefy.convert(model, moefy.Recipe.of(recipe, experts=8), batches)
    there = other.state_dict()
    assert all(torch.equal(there[name], tensor) for name, tensor in model.state_dict().items())


def test_adapters_are_to_be_merged_first(dense_model):
    model, batches = dense_model

    class Adapter(torch.nn.Linear):
        __module__ = "peft.tuners.lora.layer"

    model.model.layers[0].mlp.up_proj = Adapter(32, 64, bias=False)
    with pytest.raises(moefy.MoefyError, match="merge_and_unload"):
        moefy.convert(model, "cmoe", batches)
    assert not moe_layers(model)


def test_a_conversion_that_ends_early_is_known_by_the_next(dense_model, tmp_path):
    model, batches = dense_model

    def stop(done, total, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        moefy.convert(model, "cmoe", batches, progress=stop)
    assert len(moe_layers(model)) == 1
    with pytest.raises(moefy.MoefyError, match="only in part"):
        moefy.convert(model, "cmoe", batches)
    moefy.save(model, tmp_path / "part")
    with torch.no_grad():
        assert torch.equal(moefy.load(tmp_path / "part")(**batches[0]).logits, model(**batches[0]).logits)


def test_a_converted_model_pickles_and_a_new_process_reads_it(dense_model, tmp_path):
    model, batches = dense_model
    moefy.convert(model, "cmoe", batches)
    with torch.no_grad():
        logits = model(**batches[0]).logits
    (tmp_path / "own.pickle").write_bytes(pickle.dumps((model, batches[0], logits)))
    code = (
        "import pickle, sys, torch; model, batch, logits = pickle.load(open(sys.argv[1], 'rb'))\n"
        "with torch.no_grad(): assert torch.equal(model(**batch).logits, logits)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "own.pickle"], check=True)


@pytest.fixture
def dense_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)).eval()
    return model, [{"input_ids": torch.randint(0, 99, (1, 64))} for _ in range(2)]


def test_starts_in_eval_mode():
    moe, _ = build()
    assert isinstance(moe, MoEFFN)
    assert not moe.training
