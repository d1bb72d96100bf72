"""Checkpoints: whole or nothing, the same bytes for the same recipe, loaded by the Auto classes, refused elsewhere."""

import copy
import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
)

import moefy
import tiny
from moefy import checkpoint
from moefy.cli.common import load_any
from moefy.moe import moe_layers

RECIPE = moefy.Recipe(experts=6, shared=1, active=2, top_activated=4)


@contextmanager
def nan_where_nothing_is_written():
    """`torch.empty` gives NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def converted(family="llama", recipe=RECIPE):
    model = tiny.tiny(family)
    moefy.convert(model, recipe, [tiny.inputs(family)])
    return model


def test_the_directory_holds_what_it_should(tmp_path):
    model = converted()
    moefy.save(model, tmp_path / "out", source="acme/tiny-llama", figures={"perplexity": 12.5})
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "recipe.yaml", "report.json", "README.md"} <= names
    assert moefy.Recipe.from_yaml((out / "recipe.yaml").read_text()) == RECIPE
    report = json.loads((out / "report.json").read_text())
    assert report["recipe"] == RECIPE.model_dump()
    assert set(report["versions"]) == {"moefy", "torch", "transformers"}
    assert report["calibration"]["tokens"] == 21
    assert len(report["calibration"]["fingerprint"]) == 16
    card = (out / "README.md").read_text()
    for part in (
        "base_model: acme/tiny-llama",
        "AutoModelForCausalLM",
        "perplexity | 12.5",
        "construction: activation",
    ):
        assert part in card
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_same_recipe_and_source_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        moefy.save(converted(recipe=moefy.Recipe(**{**RECIPE.model_dump(), "router": "linear"})), tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("family", "auto"),
    [
        ("llama", AutoModelForCausalLM),
        ("bamboo", AutoModelForCausalLM),
        ("t5-v1.1", AutoModelForSeq2SeqLM),
        ("bert", AutoModelForSequenceClassification),
        ("bert-mlm", AutoModelForMaskedLM),
        ("vit", AutoModelForImageClassification),
        ("whisper", AutoModelForSpeechSeq2Seq),
    ],
)
def test_auto_classes_load_it(family, auto, tmp_path):
    model, feed = converted(family), tiny.inputs(family)
    moefy.save(model, tmp_path / "out")
    again = auto.from_pretrained(tmp_path / "out")
    assert torch.equal(tiny.output(again, feed), tiny.output(model, feed))


def test_a_bare_model_finds_its_layers_too(tmp_path):
    from transformers import AutoModel

    model, feed = converted("llama"), tiny.inputs("llama")
    moefy.save(model, tmp_path / "out")
    bare = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = model.model(**feed).last_hidden_state
        assert torch.equal(bare(**feed).last_hidden_state, expected)


def test_loads_in_a_new_process_to_the_same_bits(tmp_path):
    model, feed = converted(), tiny.inputs("llama")
    moefy.save(model, tmp_path / "out")
    torch.save(feed, tmp_path / "feed.pt")
    program = (
        "import sys, torch, moefy; feed = torch.load(sys.argv[2]); torch.set_grad_enabled(False);"
        "m = moefy.load(sys.argv[1]); torch.save(m(**feed).logits, sys.argv[3])"
    )
    paths = [str(tmp_path / name) for name in ("out", "feed.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(**feed).logits)


def test_transformers_without_moefy_refuses_it(tmp_path):
    moefy.save(converted(), tmp_path / "out")
    program = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode != 0
    assert "`moefy`" in done.stderr
    assert "does not recognize this architecture" in done.stderr


def test_other_dtype_keeps_the_router_in_float32(tmp_path):
    model = converted()
    moefy.save(model, tmp_path / "out")
    again = moefy.load(tmp_path / "out", dtype=torch.bfloat16)
    layer = again.model.layers[0].mlp
    assert layer.experts_up.dtype == torch.bfloat16
    assert layer.router.up.dtype == torch.float32
    assert torch.equal(layer.router.up, model.model.layers[0].mlp.router.up)


@pytest.mark.parametrize("router", ["representative", "mlp", "random"])
def test_a_model_moved_to_another_dtype_keeps_its_router_in_float32(router):
    model = converted(recipe=moefy.Recipe.of(RECIPE, router=router))
    layer = model.model.layers[0].mlp
    before = {name: value.clone() for name, value in layer.router.state_dict().items()}
    model.to(torch.bfloat16)
    assert layer.experts_up.dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in layer.router.state_dict().items())
    assert tiny.output(model, tiny.inputs("llama")).isfinite().all()
    model.to("meta")
    assert all(value.is_meta for value in layer.router.state_dict().values())


@pytest.mark.parametrize("family", ["llama", "bert-mlm", "t5-v1.1", "apertus", "mixtral"])
def test_a_new_model_of_a_converted_config_has_random_weights(family):
    recipe = moefy.Recipe.of("reconstructed", budget=0.6, expert_size=2)
    model = tiny.tiny(family)
    moefy.convert(model, recipe, [tiny.inputs(family, seed=seed) for seed in range(8)])
    assert any(moe.spec.experts for moe in moe_layers(model).values())
    config = copy.deepcopy(model.config)
    with nan_where_nothing_is_written():
        new = type(model)(config)
    for moe in moe_layers(new).values():
        assert all(value.isfinite().all() for value in moe.state_dict().values())
        assert torch.equal(moe.neurons, torch.arange(moe.spec.neurons, dtype=torch.int32))
        assert 0.5 * 0.02 < moe.experts_up.std() < 2 * 0.02 or not moe.spec.experts
    assert tiny.output(new.eval(), tiny.inputs(family)).isfinite().all()


def test_a_weight_that_a_checkpoint_lacks_is_random_and_the_rest_is_loaded(tmp_path):
    model = converted()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lacking = {"model.layers.0.mlp.experts_up", "model.layers.0.mlp.neurons"}
    save_file({n: t for n, t in state.items() if n not in lacking}, tmp_path / "model.safetensors", {"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in state.items() if name not in lacking)
    assert 0.01 < again["model.layers.0.mlp.experts_up"].std() < 0.04
    assert torch.equal(again["model.layers.0.mlp.neurons"], torch.arange(tiny.NEURONS, dtype=torch.int32))


def test_existing_output_needs_overwrite(tmp_path):
    model = converted()
    moefy.save(model, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(moefy.MoefyError, match="exists already"):
        moefy.save(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    moefy.save(model, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("not a model")
    with pytest.raises(moefy.MoefyError, match="not a model directory"):
        moefy.save(model, tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "diary.txt").exists()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    model = converted()
    moefy.save(model, tmp_path / "out")
    kept = (tmp_path / "out" / "config.json").read_bytes()

    def full(folder, *args, **kwargs):
        (folder / "half.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(model), "save_pretrained", lambda self, folder: full(folder))
    for name, left in (("out", "what was there before is unchanged"), ("new", "nothing is left of it")):
        with pytest.raises(moefy.MoefyError, match=f"disk is full: .* and {left}"):
            moefy.save(model, tmp_path / name, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "config.json").read_bytes() == kept


@pytest.mark.parametrize("step", ["_sync", "_rename"])
def test_killed_while_saving_leaves_nothing_or_the_old(tmp_path, step):
    """SIGKILL just before a step: the output is absent or the old one, and the next save cleans up."""
    program = f"""
import os, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import moefy, moefy.checkpoint, test_checkpoint
moefy.checkpoint.{step} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
moefy.save(test_checkpoint.converted(), sys.argv[1], overwrite=True)
"""
    for existing in (False, True):
        out = tmp_path / f"out-{existing}"
        if existing:
            moefy.save(converted(), out)
        done = subprocess.run([sys.executable, "-c", program, str(out)])
        assert done.returncode == -signal.SIGKILL
        assert out.exists() == existing
        if existing:
            moefy.load(out)
        moefy.save(converted(), out, overwrite=True)
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(f".{out.name}.")]


def test_killed_between_the_two_renames_of_an_overwrite_keeps_the_old(tmp_path):
    moefy.save(converted(), tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".out.partial-{ended.pid}").mkdir()
    checkpoint.recover("a/name of the hub")
    checkpoint.recover(tmp_path / "out")  # what commands do before they look whether it is there
    assert (tmp_path / "out").is_dir()
    moefy.load(tmp_path / "out")
    moefy.save(converted(), tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dense", [True, False])
def test_a_cut_off_overwrite_is_undone_where_a_model_is_read(dense, tmp_path):
    def look():
        return load_any(str(tmp_path / "out"), "auto", False)[0]

    def take_as_source():
        return checkpoint.check_output(tmp_path / "new", source=tmp_path / "out")

    if dense:
        tiny.tiny("llama").save_pretrained(tmp_path / "out")
    else:
        moefy.save(converted(), tmp_path / "out")
    for read in (look, take_as_source):
        (tmp_path / "out").rename(tmp_path / ".out.old")
        read()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_converted_models_are_saved_and_loaded(tmp_path):
    with pytest.raises(moefy.MoefyError, match="not converted"):
        moefy.save(tiny.tiny("llama"), tmp_path / "out")
    tiny.tiny("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(moefy.MoefyError, match="model type is llama"):
        moefy.load(tmp_path / "dense")
    with pytest.raises(moefy.MoefyError, match=r"There is nothing at .*, no directory of a converted model"):
        moefy.load(tmp_path / "nowhere")


def test_save_pretrained_alone_is_safe_too(tmp_path):
    model = converted()
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "moefy"
    assert torch.equal(
        tiny.output(moefy.load(tmp_path / "out"), tiny.inputs("llama")), tiny.output(model, tiny.inputs("llama"))
    )


@pytest.mark.parametrize("settings", [{"temperature": 0.6}, {"num_beams": 1, "num_return_sequences": 2}])
def test_generation_settings_that_transformers_refuses_lose_no_conversion(settings, tmp_path):
    model = tiny.tiny("llama")
    moefy.convert(model, moefy.Recipe(experts=6, shared=2, active=2), [tiny.inputs("llama")])
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    moefy.save(model, tmp_path / "out")
    again = moefy.load(tmp_path / "out").generation_config
    assert again.do_sample
    assert all(getattr(again, name) == value for name, value in settings.items())


def test_reading_deletes_nothing_beside_a_model(tmp_path):
    moefy.save(converted(), tmp_path / "out")
    tiny.tiny("llama").save_pretrained(tmp_path / ".out.old")
    (tmp_path / ".out.old" / "mine.txt").write_text("notes")
    moefy.load(tmp_path / "out")
    checkpoint.recover(tmp_path / "out")
    with pytest.raises(moefy.MoefyError, match="exists already"):
        checkpoint.check_output(tmp_path / "out")
    assert (tmp_path / ".out.old" / "mine.txt").read_text() == "notes"
