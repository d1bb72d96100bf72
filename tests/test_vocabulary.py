"""A tokenizer with more tokens than the model: every command says so, in a sentence."""

import shutil
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import moefy
import tiny
from moefy.calibrate import check_ids, ids_checked
from moefy.cli.app import main

WORDS = "the value of an object is what the documentation of a class says it is "
COMMANDS = {
    "convert": ["convert", "small", "out", "--calibration", "text.txt", "--window", "16", "--windows", "2"],
    "eval": ["eval", "small", "--text", "text.txt", "--window", "16"],
    "eval a task": ["eval", "small", "--task", "t2t", "--data", "t2t.tsv"],
    "eval choices": ["eval", "small", "--task", "piqa", "--data", "piqa.jsonl"],
    "convert for a task": ["convert", "small", "out", "--task", "t2t", "--calibration", "t2t.tsv"],
    "relufy": ["relufy", "small", "out", "--task", "t2t", "--data", "t2t.tsv"],
    "generate": ["generate", "small", WORDS],
    "bench": ["bench", "small", "--text", "text.txt", "--rounds", "1"],
}


@pytest.fixture
def models(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "good")
    shutil.copytree(dense, tmp_path / "small")
    config = LlamaConfig.from_pretrained(dense)
    config.vocab_size = 5
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    (tmp_path / "text.txt").write_text(WORDS * 100)
    (tmp_path / "t2t.tsv").write_text("input\ttarget\n" + f"{WORDS}\tan object\n" * 4)
    (tmp_path / "piqa.jsonl").write_text(f'{{"goal": "{WORDS}", "sol1": "is a", "sol2": "of the", "label": 1}}\n')
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_tokens_that_the_model_has_not_are_told(command, models, monkeypatch, capsys):
    monkeypatch.chdir(models)
    monkeypatch.setattr(sys, "argv", ["moefy", *COMMANDS[command]])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("moefy: The tokenizer gives the token ")
    assert "the model's vocabulary has 5; use the tokenizer that belongs to the model" in said
    assert not (models / "out").exists()


def test_models_without_tokens_and_fitting_ids_pass():
    check_ids(tiny.tiny("vit"), [10**6])
    model = tiny.tiny("llama")
    check_ids(model, [tiny.VOCAB - 1])
    check_ids(model, [])
    with ids_checked(model):
        model(**tiny.inputs("llama"))
        with pytest.raises(moefy.MoefyError, match="vocabulary has 97"):
            model(input_ids=tiny.inputs("llama")["input_ids"] + tiny.VOCAB)
    assert not model.get_input_embeddings()._forward_pre_hooks
    with ids_checked(tiny.tiny("vit")):
        pass
