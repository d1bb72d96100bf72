"""Files with a bit turned over, hostile ones and names that no file should have: a sentence, or the work done anew."""

import json
from types import SimpleNamespace

import psutil
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

import moefy
import tiny
from moefy.conversion.resume import Store
from moefy.measure.compare import Journal
from moefy.moe import moe_layers
from moefy.recipe import Recipe
from moefy.sources.models import load_source
from moefy.tuning.finetune import _Run
from test_sources import saved, with_config, write_gguf
from words import pydoc_tokenizer

DEEP = "[" * 100_000
SETTINGS = '{"settings": {"texts": {"wiki": {}}}}\n'


def refused(call, *args, **kwargs):
    """The sentence of a call's MoefyError."""
    with pytest.raises(moefy.MoefyError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "output_norm.weight", "token_embd.weight"])
@pytest.mark.parametrize("bit", [3, 5, 6])
def test_a_gguf_whose_tensors_are_elsewhere_is_corrupt(name, bit, tmp_path):
    file = write_gguf(tmp_path / "model.gguf")
    field = next(t.field for t in GGUFReader(file).tensors if t.name == name)
    place = field.offset + sum(part.nbytes for part in field.parts) - 8  # the offset is the last of a tensor's entry
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)
    assert "is cut short or corrupt; copy or download it again" in refused(load_source, file)


def test_a_gguf_with_names_that_are_no_text_is_corrupt(tmp_path):
    file = write_gguf(tmp_path / "model.gguf")
    content = file.read_bytes()
    start = content.index(b"general.architecture") + len("general.architecture") + 4 + 8
    file.write_bytes(content[:start] + b"\xff" + content[start + 1 :])
    assert "is cut short or corrupt; copy or download it again" in refused(load_source, file)


def test_a_layer_with_a_bit_turned_over_is_made_anew(tmp_path):
    Store(tmp_path).put("layer", {"weight": torch.ones(4)}, {"seconds": 1.0})
    file = tmp_path / "layer.safetensors"
    whole = file.read_bytes()
    assert Store(tmp_path).get("layer")
    for at in (-1, whole.index(b"seconds"), whole.index(b"digest") + 12):
        content = bytearray(whole)
        content[at] ^= 1
        file.unlink()  # what was read is mapped
        file.write_bytes(content)
        assert Store(tmp_path).get("layer") is None
    file.unlink()
    file.write_bytes(whole.replace(b'{\\"seconds\\": 1.0}', b"null              ".ljust(18)))
    assert Store(tmp_path).get("layer") is None


@pytest.mark.parametrize("known", ["null", "[", "[1]", '{"step": null}', DEEP])
def test_a_training_state_of_something_else_is_a_sentence(known, tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "state", metadata={"moefy": known})
    state = _Run.__new__(_Run)
    state.state, state.identity, state.trained = tmp_path / "state", {}, {}
    assert "remove" in refused(state.restore)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_json_nested_without_end_is_damaged(name, tmp_path):
    folder = saved(tmp_path / "source")
    pydoc_tokenizer().save_pretrained(folder)
    (folder / name).write_text(DEEP)
    if "index" in name:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    assert "copy or download" in refused(load_source, folder)


def test_an_output_whose_config_is_nested_without_end_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text(DEEP)
    model = tiny.tiny("llama")
    moefy.convert(model, "cmoe", [tiny.inputs("llama")])
    assert "is not a model directory" in refused(moefy.save, model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").read_text() == DEEP


def test_a_name_that_is_not_utf8_is_refused_before_the_work(tmp_path):
    from moefy.checkpoint import check_output

    assert "cannot be used as a path" in refused(check_output, f"{tmp_path}/\udcff\udcfe")


@pytest.mark.parametrize("change", [{"model_max_length": "x"}, {"model_max_length": {}}])
def test_a_tokenizer_with_a_limit_that_is_no_number_is_a_sentence(change, tmp_path):
    folder = saved(tmp_path / "source")
    pydoc_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert refused(load_source, folder).startswith(f"The tokenizer of {folder} cannot be loaded (")


def test_a_tokenizer_that_cannot_encode_is_a_sentence(tmp_path):
    folder = saved(tmp_path / "source")
    pydoc_tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    entries = json.loads(file.read_text())
    entries["model"] = {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "[UNK]"}
    file.write_text(json.dumps(entries))
    assert refused(load_source, folder).startswith(f"The tokenizer of {folder} cannot be loaded (")


@pytest.mark.parametrize("change", [{"top_k": True}, {"most": True}, {"top_k": 9}, {"most": 1}, {"most": 9}])
def test_a_converted_layer_that_cannot_be_is_a_sentence(change, tmp_path):
    model = tiny.tiny("llama")
    moefy.convert(model, moefy.Recipe.of("cmoe", experts=8, shared=2, active=2), [tiny.inputs("llama")])
    moefy.save(model, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["moefy"]
    next(iter(about["layers"].values())).update(change)
    with_config(tmp_path / "out", moefy=about)
    assert "is damaged or newer than this moefy" in refused(moefy.load, tmp_path / "out")


BOMB = "a0: &a0 [x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((BOMB + f"{field}: *a11\n", "has an alias") for field in ("name", "shared", "shared_budget")),
        (f"experts: 0x{'f' * 5000}", "a number that YAML cannot read"),
        ("chunk_tokens: 99999999999999999999999", "a number that YAML cannot read"),
        (f"name: reconstructed\nshared_budget: [{'0.5, ' * 100_000}0.5]", "a list of at most 64"),
        ("name: [reconstructed]", "name: Input should be a valid string"),
    ],
)
def test_a_recipe_that_would_take_all_memory_or_time_is_a_sentence(text, message):
    assert message in refused(Recipe.from_yaml, text)


RUN = {"recipe": "cmoe", "active": 0.5, "seed": 0, "fields": None}
FIGURES = {key: {"wiki": 2.0} for key in ("realised", "perplexity", "ratio")}
ONCE = {"layer_error": 0.1, "calibration_tokens": 8, "convert_seconds": 1.0, "speed": None}


@pytest.mark.parametrize(
    "line",
    [
        *({"dense": True}, {"dense": True, "perplexity": {"wiki": "x"}}, {"dense": True, "perplexity": {"other": 1.0}}),
        *(RUN, {**RUN, **FIGURES}, {**RUN, **ONCE}, {**RUN, **FIGURES, **ONCE, "ratio": 3}, {**RUN, "skipped": 3}),
        {"a": 1},
    ],
)
def test_a_line_that_lacks_figures_is_no_comparison_s(line, tmp_path):
    path = tmp_path / "compare.jsonl"
    path.write_text(SETTINGS + json.dumps(line) + "\n")
    assert "not a comparison" in refused(Journal, path, {"texts": {"wiki": {}}})


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("router.threshold", float("nan"), "The threshold of .* is nan; the checkpoint is broken"),
        ("router.threshold", float("inf"), "The threshold of .* is inf; the checkpoint is broken"),
        ("neurons", 0, "The neurons of .* are no order of its neurons; the checkpoint is broken"),
    ],
)
def test_a_converted_layer_with_another_order_or_threshold_is_damaged(part, value, message, tmp_path):
    model = tiny.tiny("llama")
    moefy.convert(model, "reconstructed", [tiny.inputs("llama")])
    moefy.save(model, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith(part))
    save_file({**tensors, name: torch.full_like(tensors[name], value)}, file, {"format": "pt"})
    with pytest.raises(moefy.MoefyError, match=message):
        moefy.load(tmp_path / "out")


@pytest.mark.parametrize("recipe", ["cmoe", "reconstructed"])
@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", lambda ids: {"input_ids": ids + 900}, "token ids that the model's vocabulary does not have"),
        ("llama", lambda ids: {"input_ids": ids - 900}, "token ids that the model's vocabulary does not have"),
        ("llama", lambda ids: {"input_ids": ids.float()}, "are torch.float32; token ids are integers"),
        ("llama", lambda ids: {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}, "0 real tokens"),
        ("llama", lambda ids: {"input_ids": ids[:1, :1]}, "1 real tokens"),
        ("gpt2", lambda ids: {"input_ids": ids.repeat(1, 100)}, "than the model has positions for"),
    ],
)
def test_tokens_that_the_model_cannot_take_are_a_sentence(family, change, message, recipe):
    model = tiny.tiny(family)
    with pytest.raises(moefy.MoefyError, match=message):
        moefy.convert(model, recipe, [change(tiny.inputs(family)["input_ids"])])
    assert not moe_layers(model)


def test_a_model_made_in_inference_mode_is_converted_or_a_sentence():
    with torch.inference_mode():
        model = tiny.tiny("llama")
    with pytest.raises(moefy.MoefyError, match=r"made in torch.inference_mode\(\)"):
        moefy.convert(model, "reconstructed", [tiny.inputs("llama")])
    moefy.convert(model, "cmoe", [tiny.inputs("llama")])


@pytest.mark.parametrize("first", ['{"settings": null}\n', '{"settings": []}\n', DEEP + "\n"])
def test_settings_that_are_none_are_no_comparison_s(first, tmp_path):
    path = tmp_path / "compare.jsonl"
    path.write_text(first)
    assert "not a comparison" in refused(Journal, path, {"texts": {"wiki": {}}})


@pytest.mark.parametrize(
    "line",
    [{"dense": True, "perplexity": {"wiki": 2.0}}, {**RUN, "skipped": "too few"}, {**RUN, **FIGURES, **ONCE}],
)
def test_lines_as_they_are_written_are_read(line, tmp_path):
    path = tmp_path / "compare.jsonl"
    path.write_text(SETTINGS + json.dumps(line) + "\n")
    assert Journal(path, {"texts": {"wiki": {}}}).lines[1] == line


def test_a_tokenizer_without_a_vocabulary_names_what_is_missing(tmp_path):
    folder = saved(tmp_path / "source")
    pydoc_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    said = refused(load_source, folder)
    assert "beside tokenizer_config.json is no tokenizer.json" in said
    assert said.endswith("copy or download that too.")


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model-00001-of-00002.safetensors"])
def test_weights_by_a_name_that_nobody_reads_are_a_sentence(name, tmp_path):
    folder = saved(tmp_path / "source")
    (folder / "model.safetensors").rename(folder / name)
    assert f"holds {name}, and what is read is model.safetensors or the files" in refused(load_source, folder)


def test_directories_of_something_else_say_what_to_give(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    assert f"give the directory of one, such as {tmp_path / 'text_encoder'}." in refused(load_source, tmp_path)
    (tmp_path / "model_index.json").unlink()
    path = write_gguf(tmp_path / "m.gguf")
    for config in (None, "{}"):
        if config:
            (tmp_path / "config.json").write_text(config)
        assert refused(load_source, tmp_path).endswith(f"; give the GGUF file in it, such as {path}.")


def test_a_gguf_whose_merges_make_no_token_is_a_sentence(tmp_path):
    """The tokenizers library raises Exception itself for it."""
    path = write_gguf(tmp_path / "m.gguf", merges=["a q"])
    said = refused(load_source, path)
    assert said.startswith(f"The tokenizer in the GGUF file {path} cannot be loaded (")
    assert said.endswith("start from the model in safetensors.")


def test_ffns_that_are_too_wide_for_the_memory_are_refused_before_the_work(monkeypatch):
    model, feed = tiny.tiny("llama"), tiny.inputs("llama")
    asked = []
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=asked.append(1) or 0))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=4 * 8 * tiny.NEURONS**2 - 1))
    for changes in ({}, {"allocation": "uniform"}):
        recipe = moefy.Recipe.of("reconstructed", budget=0.5, expert_size=2, **changes)
        assert f"FFNs of {tiny.NEURONS} neurons take 0 GiB" in refused(moefy.convert, model, recipe, [feed])
    assert not moe_layers(model)
    assert len(asked) == 2
    moefy.convert(model, "cmoe", [feed])
    assert len(asked) == 2
