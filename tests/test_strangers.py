"""What lies beside a model or in its files and is not the model's: other tokenizers, code, folders, settings."""

import io
import json
import shutil
import sys

import pytest
import torch

import moefy
import tiny
from command import moefy as command
from moefy.calibrate import token_windows
from moefy.errors import MoefyWarning
from moefy.sources.models import load_source
from moefy.sources.texts import read_text
from test_sources import with_config, with_weights, write_gguf
from words import pydoc_tokenizer

HALF = moefy.Recipe(experts=6, shared=1, active=2, top_activated=4)
CODE = "from transformers import PreTrainedTokenizerFast\nraise SystemExit('ran')\n"


@pytest.fixture
def converted(dense, tmp_path):
    model, tokenizer = load_source(dense)
    moefy.convert(model, HALF, [tiny.inputs("llama")])
    return moefy.save(model, tmp_path / "converted", tokenizer)


def test_a_gguf_has_its_own_tokenizer_and_no_adapter(tmp_path, dense):
    (tmp_path / "alone").mkdir()
    (tmp_path / "beside").mkdir()
    expected = load_source(write_gguf(tmp_path / "alone" / "m.gguf"))
    file = write_gguf(tmp_path / "beside" / "m.gguf")
    shutil.copy(dense / "tokenizer.json", file.parent)
    (file.parent / "adapter_config.json").write_text("{}")
    (file.parent / "tok.py").write_text(CODE)
    (file.parent / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [None, "tok.T"]}}))
    model, tokenizer = load_source(file)
    assert tokenizer.get_vocab() == expected[1].get_vocab()
    assert model.name_or_path == str(file.parent)
    feed = {"input_ids": torch.arange(3)[None]}
    assert torch.equal(tiny.output(model, feed), tiny.output(expected[0], feed))


def test_integers_are_no_weights(dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "model")

    def to_integers(weights):
        name = "model.layers.1.mlp.up_proj.weight"
        weights[name] = (weights[name] * 100).to(torch.int8)

    with_weights(folder, to_integers)
    with pytest.raises(moefy.MoefyError, match=r"quantised \(as model.layers.1.mlp.up_proj.weight is, by what config"):
        load_source(folder)


def test_a_padding_token_beyond_the_vocabulary(dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "model")
    with_config(folder, pad_token_id=tiny.VOCAB)
    with pytest.raises(moefy.MoefyError, match="cannot be loaded"):
        load_source(folder)


@pytest.mark.parametrize("kind", ["dense", "converted"])
def test_a_tokenizer_s_own_code_does_not_run_unasked(kind, dense, converted, tmp_path, monkeypatch):
    folder = shutil.copytree(dense, tmp_path / "dense") if kind == "dense" else converted
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "tok.T"]}
    settings.pop("tokenizer_class", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tok.py").write_text(CODE)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))  # to a question whether it may
    done = command("eval", folder, "--window", 32, "--windows", 1, "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--trust-remote-code runs it" in " ".join(done.stderr.split())


def test_other_programs_folders_are_not_replaced(dense, converted, tmp_path):
    editor = tmp_path / "editor"
    editor.mkdir()
    (editor / "config.json").write_text('{"editor": "vim"}')
    (editor / "thesis.tex").write_text("all")
    kept = tmp_path / ".converted.old"
    kept.mkdir()
    (kept / "thesis.tex").write_text("all")
    with pytest.raises(moefy.MoefyError, match="not a model directory, so it will not be overwritten"):
        moefy.save(moefy.load(converted), editor, overwrite=True)
    with pytest.raises(moefy.MoefyError, match=r"\.converted\.old is in the way, and moefy has not made it"):
        moefy.save(moefy.load(converted), converted, overwrite=True)
    assert (editor / "thesis.tex").read_text() == (kept / "thesis.tex").read_text() == "all"


def test_weights_that_are_no_numbers_are_not_saved(converted, tmp_path):
    model = moefy.load(converted)
    model.lm_head.weight.data[0, 0] = float("inf")
    with pytest.raises(moefy.MoefyError, match=r"lm_head.weight holds NaN or infinite values"):
        moefy.save(model, converted, overwrite=True)
    assert moefy.load(converted).lm_head.weight.isfinite().all()


@pytest.mark.parametrize("change", [{"gated": False}, {"router": None}])
def test_weights_that_an_edited_config_leaves_out(change, converted):
    config = json.loads((converted / "config.json").read_text())
    for spec in config["moefy"]["layers"].values():
        spec |= change
    with_config(converted, moefy=config["moefy"])
    with pytest.raises(moefy.MoefyError, match=r"for which its config.json leaves no room"):
        moefy.load(converted)


@pytest.mark.parametrize(("name", "read"), [("a.ndjson", True), ("a.JSONL", True), ("a.json", False)])
def test_endings_of_json(name, read, tmp_path):
    (tmp_path / name).write_text('{"text": "one"}\n{"text": "two"}\n')
    if read:
        assert read_text(tmp_path / name) == "one\n\ntwo"
        return
    with pytest.raises(moefy.MoefyError, match="is JSON and no text; give JSON lines"):
        read_text(tmp_path / name)


def test_a_mount_point_is_no_output(converted):
    with pytest.raises(moefy.MoefyError, match="/proc is a mount point"):
        moefy.save(moefy.load(converted), "/proc", overwrite=True)


def test_a_window_of_one_token_is_not_cut_in_two():
    with pytest.raises(moefy.MoefyError, match="cannot be cut in two"):
        moefy.text_calibration(pydoc_tokenizer(), "the list of names", window=1, decoder_start=0)


def test_a_text_that_begins_with_long_tokens():
    tokenizer = pydoc_tokenizer()
    tokenizer.add_tokens(["=" * 80])
    text = "\n".join(["=" * 80] * 60) + "\n" + "The function returns the list of names. " * 200
    assert token_windows(tokenizer, text, 32, 4).shape == (4, 32)


@pytest.mark.parametrize("settings", [{"num_beams": 4}, {"repetition_penalty": 0.0}, {"stop_strings": ["a"]}])
def test_settings_of_generation(settings, dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **settings}))
    done = command("generate", folder, "the list", "--tokens", 3)
    if "num_beams" in settings:
        assert done.returncode == 0
    else:
        assert done.returncode == 2
        assert "generation_config.json" in done.stderr


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}"])
def test_a_chat_template_that_fails(template, dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    done = command("generate", folder, "the list", "--chat")
    assert done.returncode == 2
    assert "The chat template" in done.stderr


@pytest.mark.parametrize(
    "args", [("eval", "--against"), ("tune", "--teacher"), ("convert", "--recipe"), ("bench", "--against")]
)
def test_an_empty_option_is_not_one_left_out(args, converted, dense, tmp_path):
    name, option = args
    places = [dense, tmp_path / "out"] if name == "convert" else [converted, tmp_path / "out"][: 1 + (name == "tune")]
    small = ["--rounds", 1] if name == "bench" else ["--window", 32]
    assert command(name, *places, option, "", *small).returncode == 2


def test_a_comparison_of_another_config(dense, tmp_path):
    folder = shutil.copytree(dense, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The function returns the list of names. " * 100)
    call = ["compare", folder, tmp_path / "out", "--text", text, "--recipes", "cmoe", "--active", "0.5", "--seeds", 1]
    call += ["--rounds", 0, "--window", 32, "--windows", 2, "--calibration-windows", 2]
    assert command(*call).returncode == 0
    with_config(folder, rms_norm_eps=0.5)
    done = command(*call)
    assert done.returncode == 2
    assert "other settings (config)" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("family", "path"), [("llama", "model.layers.0.mlp"), ("bert", "bert.encoder.layer.1.output.dense")]
)
def test_hooks_on_modules_that_are_replaced_are_not_lost_without_a_word(family, path):
    model = tiny.tiny(family)
    model.get_submodule(path).register_forward_hook(lambda module, args, out: out)
    with pytest.warns(MoefyWarning, match=f"Hooks on {path} are lost"):
        moefy.convert(model, "cmoe", [tiny.inputs(family)])


def test_hooks_elsewhere_stay_and_nothing_is_said(recwarn):
    model, seen = tiny.tiny("llama"), []
    model.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(1))
    moefy.convert(model, "cmoe", [tiny.inputs("llama")])
    assert not [w for w in recwarn if "Hooks" in str(w.message)]
    seen.clear()
    tiny.output(model, tiny.inputs("llama"))
    assert seen == [1]
