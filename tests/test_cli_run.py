"""Models that run: what does not fit together is one sentence, and what was asked for is what runs."""

import json

import pytest
import torch
import transformers as tf

import command
import moefy
import tiny
from moefy import calibrate
from moefy.errors import MoefyError
from moefy.kernels import native
from moefy.measure import evaluate
from moefy.sources import texts
from moefy.sources.texts import read_text
from native_problem import needs_native
from words import pydoc_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "gpt2", "bert", "whisper"):
        tiny.tiny(family).save_pretrained(folder / family)
        pydoc_tokenizer().save_pretrained(folder / family)
    other = tiny.tiny("llama")
    other.resize_token_embeddings(other.config.vocab_size + 8)
    other.save_pretrained(folder / "wider")
    pydoc_tokenizer().save_pretrained(folder / "wider")
    (folder / "one.txt").write_text("the")
    (folder / "lines.jsonl").write_text(
        json.dumps({"text": "the value\u2028of the value"}, ensure_ascii=False) + "\r\n"
    )
    return folder


def run(models, monkeypatch, *args):
    monkeypatch.chdir(models)
    return command.run(monkeypatch, *args)


MISTAKES = {
    "a model of sounds": (["convert", "whisper", "out", "--window", "16"], "takes input_features and no text"),
    "a task without data": (["convert", "bert", "out", "--task", "sst2"], "name it with --calibration"),
    "no room": (["generate", "gpt2", "the " * 200], "and this model has positions for"),
    "no head to generate": (["generate", "bert", "the"], "does not generate text"),
    "no tokens": (["generate", "gpt2", "the", "--tokens", "0"], "--tokens"),
    "another vocabulary": (["eval", "llama", "--against", "wider", "--window", "16"], "cannot run on the same input"),
    "another kind": (["bench", "llama", "--against", "bert"], "cannot run on the same input"),
    "nothing to make int8": (["bench", "llama", "--int8"], "no experts to make int8"),
    "nothing to measure in int8": (["eval", "llama", "--int8"], "no experts to make int8"),
    "nothing to predict": (["eval", "llama", "--window", "1"], "nothing to predict"),
    "no name of a data set": (["eval", "llama", "--text", "hf:"], "needs the name of a data set"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_sentence(mistake, models, monkeypatch, capsys):
    args, message = MISTAKES[mistake]
    assert run(models, monkeypatch, *args) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_generation_ends_where_the_positions_do(models, monkeypatch, capsys):
    assert run(models, monkeypatch, "generate", "gpt2", "the value of", "--tokens", "5000") == 0
    assert capsys.readouterr().out.strip()


def test_a_model_that_computes_nan_generates_nothing(models, monkeypatch, capsys):
    overflowing = tiny.tiny("gpt2")
    with torch.no_grad():
        overflowing.transformer.ln_f.weight.fill_(3e38)
        overflowing.transformer.ln_f.bias.fill_(3e38)
    overflowing.save_pretrained(models / "overflowing")
    pydoc_tokenizer().save_pretrained(models / "overflowing")
    assert run(models, monkeypatch, "generate", "overflowing", "the value of") == 2
    assert "computes NaN or infinite values" in capsys.readouterr().err


def test_bench_runs_on_a_text_of_one_word(models, monkeypatch, capsys):
    assert run(models, monkeypatch, "bench", "llama", "--text", "one.txt", "--rounds", "1", "--json") == 0
    assert "decode" in json.loads(capsys.readouterr().out)["cases"]


def test_json_lines_are_cut_at_line_feeds_alone(models):
    assert read_text(models / "lines.jsonl") == "the value\u2028of the value"


@pytest.mark.parametrize("rows", [[], [{"text": " "}], [{"text": None}]])
def test_a_data_set_without_text_is_a_sentence(rows, monkeypatch):
    monkeypatch.setattr(texts, "hub_rows", lambda _, **__: rows)
    with pytest.raises(MoefyError, match="has no text in it"):
        read_text("hf:empty")


def test_what_ran_is_said_of_a_model_without_perplexity(models, monkeypatch, capsys):
    made = ["convert", "bert", "converted", "--experts", "4", "--shared", "1", "--active", "1"]
    assert run(models, monkeypatch, *made, "--window", "16", "--windows", "4") == 0
    capsys.readouterr()
    assert run(models, monkeypatch, "eval", "converted", "--window", "16", "--windows", "2", "--json") == 0
    assert 0.4 < json.loads(capsys.readouterr().out)["active_fraction"] < 0.7


def test_a_task_is_measured_with_what_ran(models, monkeypatch, capsys):
    (models / "t2t.tsv").write_text("input\ttarget\n" + "the value\tof the\n" * 4)
    made = ["convert", "llama", "routed", "--experts", "4", "--shared", "1", "--active", "1"]
    assert run(models, monkeypatch, *made, "--window", "16", "--windows", "4") == 0
    capsys.readouterr()
    task = ["--task", "t2t", "--data", "t2t.tsv", "--against", "llama", "--json"]
    assert run(models, monkeypatch, "eval", "routed", *task) == 0
    ours, dense = json.loads(capsys.readouterr().out)["figures"].values()
    assert 0.4 < ours["active_fraction"] < 0.7
    assert dense["active_fraction"] == 1.0
    if native.available():  # int8 beside the same model as it is
        assert run(models, monkeypatch, "eval", "routed", *task[:4], "--against", "routed", "--int8", "--json") == 0
        assert list(json.loads(capsys.readouterr().out)["figures"]) == ["routed int8", "routed"]


@pytest.mark.parametrize(
    "ignored",
    [["eval", "--text", "pydoc"], ["eval", "--window", "8", "--windows", "2"], ["inspect", "--text", "pydoc"]],
)
def test_options_that_a_task_has_no_use_for_are_refused(ignored, models, monkeypatch, capsys):
    (models / "t2t.tsv").write_text("input\ttarget\nthe value\tof the\n")
    place = ["out"] if ignored[0] == "inspect" else []
    task = ["--task", "t2t", "--data", "t2t.tsv"]
    assert run(models, monkeypatch, ignored[0], "llama", *place, *task, *ignored[1:]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert f"{' and '.join(ignored[1::2])} {'is' if len(ignored) == 3 else 'are'} not for a --task" in shown


def test_a_loss_that_is_not_finite_is_refused():
    model, windows = tiny.tiny("llama"), torch.randint(0, 50, (2, 8))
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(MoefyError, match="loss of this"):
        evaluate.perplexity(model, windows)


def test_outputs_of_another_shape_cannot_be_compared():
    llama, bert = tiny.tiny("llama"), tiny.tiny("bert")
    batch = {k: v for k, v in tiny.inputs("llama").items() if k == "input_ids"}
    with pytest.raises(MoefyError, match="differ in shape"):
        evaluate.agreement(llama, bert, [batch])


def test_what_moefy_does_not_know_is_one_line_too(models, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("a surprise\nof two lines")

    monkeypatch.setattr(calibrate, "text_calibration", fails)
    monkeypatch.delenv("MOEFY_TRACEBACK", raising=False)
    assert run(models, monkeypatch, "eval", "llama") == 1
    shown = capsys.readouterr().err
    assert "RuntimeError: a surprise)" in shown
    assert "Traceback" not in shown
    monkeypatch.setenv("MOEFY_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        run(models, monkeypatch, "eval", "llama")


@pytest.fixture(scope="module")
def converted(models):
    """All neurons of `llama`, so that int8 is all that differs."""
    model, recipe = tiny.tiny("llama"), moefy.Recipe.of("shared-only", budget=1.0)
    moefy.convert(model, recipe, [{"input_ids": torch.arange(2, 66)[None]}])
    moefy.save(model, models / "whole", pydoc_tokenizer())
    return "whole"


@needs_native
def test_int8_is_measured_and_generates(converted, models, monkeypatch, capsys):
    shown = []
    for options in ([], ["--int8"]):
        args = ["eval", converted, "--against", "llama", "--window", "32", "--windows", "2", "--json", *options]
        assert run(models, monkeypatch, *args) == 0
        shown.append(json.loads(capsys.readouterr().out))
    exact, rounded = (figures["output_error"] for figures in shown)
    assert exact < 1e-9 < rounded < 1e-2
    assert shown[1]["active_fraction"] == shown[0]["active_fraction"] == 1.0
    assert run(models, monkeypatch, "eval", converted, "--int8", "--window", "32", "--windows", "2") == 0
    assert "active fraction" in capsys.readouterr().out
    assert run(models, monkeypatch, "generate", converted, "the value of", "--tokens", "3", "--int8") == 0
    assert capsys.readouterr().out.strip()


def test_int8_without_the_native_kernel_is_a_sentence(converted, models, monkeypatch, capsys):
    monkeypatch.setattr("moefy.kernels.native.available", lambda: False)
    monkeypatch.setattr("moefy.kernels.native.why_not", lambda: "there is no compiler")
    assert run(models, monkeypatch, "generate", converted, "the value of", "--int8") == 2
    assert "Only the native kernel packs weights, and there is no compiler. Leave out --int8." in " ".join(
        capsys.readouterr().err.split()
    )


@needs_native
def test_int8_of_an_encoder_alone_says_what_ran(models, monkeypatch, capsys):
    model = tiny.tiny("bert")
    moefy.convert(
        model, moefy.Recipe.of("cmoe", experts=4, shared=1, active=1), [{"input_ids": torch.arange(2, 66)[None]}]
    )
    moefy.save(model, models / "encoder", pydoc_tokenizer())
    assert run(models, monkeypatch, "eval", "encoder", "--int8", "--window", "32", "--windows", "2", "--json") == 0
    assert 0 < json.loads(capsys.readouterr().out)["active_fraction"] < 1


@needs_native
def test_int8_of_an_activation_without_a_kernel_is_a_sentence(models, monkeypatch, capsys):
    model = tiny._decoder(tf.LlamaConfig, tf.LlamaForCausalLM, hidden_act="mish")
    moefy.convert(model, moefy.Recipe.of("shared-only", budget=1.0), [{"input_ids": torch.arange(2, 66)[None]}])
    moefy.save(model, models / "mish", pydoc_tokenizer())
    for command_line in (["bench", "mish"], ["generate", "mish", "the"], ["eval", "mish"]):
        assert run(models, monkeypatch, *command_line, "--int8") == 2
        assert "it has no activation mish. Leave out --int8." in " ".join(capsys.readouterr().err.split())
