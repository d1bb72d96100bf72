"""What torch, transformers and accelerate do to a model around its FFNs: offload, train, compile, move, wrap."""

import os
import subprocess
import sys
import threading

import accelerate
import pytest
import torch
import transformers as tf
from torch import nn

import moefy
import tiny
from moefy import hf
from moefy.calibrate import positions
from moefy.moe import moe_layers
from moefy.routers import Router
from moefy.sources.models import load_source
from moefy.sources.texts import read_text
from moefy.tuning.relufy import with_relu
from moefy.usage import usage

COUNTED = moefy.Recipe(experts=6, shared=1, active=2, top_activated=4)
DEFAULT = moefy.Recipe.of("reconstructed", budget=0.6, expert_size=2)


def batches(family, count=8):
    return [tiny.inputs(family, seed=seed) for seed in range(count)]


def converted(recipe=DEFAULT, family="llama"):
    model = tiny.tiny(family)
    moefy.convert(model, recipe, batches(family))
    return model


def routers(model):
    return [module for module in model.modules() if isinstance(module, Router)]


@pytest.mark.parametrize("recipe", [COUNTED, DEFAULT], ids=["top-k", "threshold"])
@pytest.mark.parametrize("scaled", [False, True])
def test_offloaded_layers_run_as_they_do_in_memory(recipe, scaled):
    model, feed = converted(recipe), tiny.inputs("llama")
    if scaled:
        for moe in moe_layers(model).values():
            if moe.router is not None:
                moe.set_gate(torch.linspace(0, 1, moe.spec.experts), torch.zeros(moe.spec.experts))
    with moefy.kernels.using("torch"):
        expected = tiny.output(model, feed)
        accelerate.cpu_offload(model, execution_device="cpu")
        assert all(p.is_meta for p in model.parameters())
        assert torch.equal(tiny.output(model, feed), expected)


def test_layers_on_disk_run_as_they_do_in_memory(tmp_path):
    model, feed = converted(), tiny.inputs("llama")
    moefy.save(model, tmp_path / "out")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    again = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    torch.testing.assert_close(tiny.output(again, feed), tiny.output(model, feed), rtol=1e-4, atol=1e-5)


def test_training_reaches_every_weight_but_what_the_router_decides_by(tmp_path):
    model = converted()
    moefy.save(model, tmp_path / "out")
    feed = tiny.inputs("llama")
    for trained in (model, moefy.load(tmp_path / "out")):
        trained.train()
        trained(**feed, labels=feed["input_ids"]).loss.backward()
        wanted = {name for name, p in trained.named_parameters() if ".router." not in name and p.numel()}
        assert {name for name, p in trained.named_parameters() if p.requires_grad and p.numel()} == wanted
        assert {name for name, p in trained.named_parameters() if p.grad is not None} == wanted
        assert all(p.ndim for p in trained.parameters())  # FSDP2 takes none without dimensions


def test_a_frozen_model_stays_frozen():
    model = tiny.tiny("llama").requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    moefy.convert(model, COUNTED, batches("llama"))
    assert not any(p.requires_grad for p in model.model.layers[0].parameters())
    assert model.model.layers[1].mlp.experts_up.requires_grad


@pytest.mark.parametrize("part", ["experts_down", "shared_up", "down_bias"])
def test_one_trained_matrix_is_enough_to_need_gradients(part):
    model, feed = converted(), tiny.inputs("llama")
    wanted = [p for name, p in model.requires_grad_(False).named_parameters() if name.endswith(part) and p.numel()]
    for parameter in wanted:
        parameter.requires_grad_(True)
    tiny.output(model, feed)  # packs the weights
    model(**feed, labels=feed["input_ids"]).loss.backward()  # in eval()
    assert wanted
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in wanted)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_experts_of_a_mixture_can_be_trained_after_it(family):
    model = tiny.tiny(family)
    moefy.convert(model, COUNTED, [tiny.inputs(family)])
    assert all(moe.experts_up.requires_grad for moe in moe_layers(model).values())


def test_a_checkpoint_in_the_hub_s_cache_is_read_once(tmp_path):
    """There safetensors files are links to files without that name, which stayed mapped beside the copy."""
    model = converted(COUNTED)
    moefy.save(model, tmp_path / "out")
    (tmp_path / "blob").write_bytes((tmp_path / "out" / "model.safetensors").read_bytes())
    (tmp_path / "out" / "model.safetensors").unlink()
    (tmp_path / "out" / "model.safetensors").symlink_to(tmp_path / "blob")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    mapped = hf._mapped_files()
    assert not any(low <= p.data_ptr() < high for p in again.parameters() for low, high in mapped)
    assert torch.equal(tiny.output(again, tiny.inputs("llama")), tiny.output(model, tiny.inputs("llama")))
    held = torch.from_file(str(tmp_path / "blob"), size=16, dtype=torch.uint8)
    assert any(low <= held.data_ptr() < high for low, high in hf._mapped_files())


def test_the_dense_model_keeps_how_it_generates(tmp_path):
    model = tiny.tiny("llama")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [2, 5, 7], 0
    swapped = with_relu(model)
    moefy.convert(model, COUNTED, batches("llama"))
    dense = moefy.to_dense(model)
    for made in (swapped, dense):
        assert made.generation_config.eos_token_id == [2, 5, 7]
        assert made.generation_config.pad_token_id == 0
    assert not {p.data_ptr() for p in dense.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_counting_within_counting_counts_for_both():
    model, feed = converted(COUNTED), tiny.inputs("llama")
    with usage(model) as outer:
        tiny.output(model, feed)
        with usage(model) as inner:
            tiny.output(model, feed)
        tiny.output(model, feed)
    for name in outer:
        assert outer[name].tokens == 3 * inner[name].tokens > 0
        assert torch.equal(outer[name].counts, 3 * inner[name].counts)


@pytest.mark.parametrize("family", ["afmoe", "granitemoe", "phimoe", "jamba"])
def test_a_router_of_the_model_s_own_stays_in_the_model_s_type(family, tmp_path):
    tiny.tiny(family).save_pretrained(tmp_path / "dense")
    model, feed = load_source(tmp_path / "dense", dtype="bfloat16")[0], tiny.inputs(family, batch=8, length=60)
    own = {name: p.dtype for name, p in model.named_parameters()}
    moefy.convert(model, COUNTED, [feed])
    moefy.save(model, tmp_path / "out")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert {name: p.dtype for name, p in again.named_parameters() if name in own}.items() <= own.items()
    assert {p.dtype for router in routers(again) for p in router.parameters()} == {torch.float32}
    assert torch.equal(tiny.output(again, feed), tiny.output(model, feed))


def compiled_inside(model):
    model.model.layers[0].compile(backend="eager")
    return model


def attends_by(name):
    def change(model):
        model.set_attn_implementation(name)
        return model

    return change


def sliced(model):
    model.config.slow_but_exact, model.config.pretraining_tp = True, 2
    return model


REFUSED = {
    "compiled": (lambda model: torch.compile(model, backend="eager"), "is compiled; convert it first"),
    "a part compiled": (compiled_inside, "is compiled; convert it first"),
    "wrapped": (nn.DataParallel, "This DataParallel is no model of transformers"),
    "on meta": (lambda model: model.to("meta"), "are not in memory"),
    "BLOOM's slices": (sliced, "set slow_but_exact to false"),
    "flex_attention": (attends_by("flex_attention"), 'load it with "sdpa"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_a_sentence_and_leaves_the_process_as_it_was(case):
    change, sentence = REFUSED[case]
    with pytest.raises(moefy.MoefyError, match=sentence):
        moefy.convert(change(tiny.tiny("llama")), COUNTED, batches("llama"))
    converted(COUNTED)


@pytest.mark.parametrize("ids", [[[1, 2, 3]], torch.empty(0, 12, dtype=torch.long)])
def test_a_batch_without_tokens_is_a_sentence(ids):
    with pytest.raises(moefy.MoefyError, match="Calibration batch 1 has no tokens: its input_ids must be a tensor"):
        moefy.convert(tiny.tiny("llama"), COUNTED, [tiny.inputs("llama"), {"input_ids": ids}])


def test_a_terminal_that_knows_ascii_alone_gets_question_marks(dense):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "moefy", "inspect", "nö where", "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "n? where" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_text_may_come_through_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text("words of a pipe"))
    writer.start()
    assert read_text(tmp_path / "pipe") == "words of a pipe"
    writer.join()


def test_a_config_that_counts_no_positions_bounds_no_window():
    model = tiny.tiny("llama")
    assert positions(model) == model.config.max_position_embeddings
    model.config.max_position_embeddings = -1
    assert positions(model) is None
