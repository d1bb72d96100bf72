"""The command line as a user meets it: the job on a small model with a tokenizer, and every mistake as a sentence."""

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers as tf

import moefy as moefy_package
import tiny
from command import moefy
from moefy.calibrate import token_windows
from moefy.cli.app import main
from moefy.kernels import native
from moefy.measure.evaluate import perplexity
from moefy.sources.texts import builtin_text, halves
from words import pydoc_tokenizer


def moefy_process(*args, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "moefy", *map(str, args)], capture_output=True, text=True, cwd=cwd, timeout=300
    )


@pytest.fixture(scope="module")
def converted(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    done = moefy_process(
        "convert", dense, out, "--experts", 6, "--shared", 2, "--active", 2, "--window", 32, "--windows", 4
    )
    assert done.returncode == 0, done.stderr
    assert "calibration tokens" in done.stdout
    assert "128" in done.stdout
    assert "Converting layers" in done.stderr
    return out


def test_eval_prints_every_figure(dense, converted):
    done = moefy("eval", converted, "--against", dense, "--window", 32, "--windows", 3, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert {"perplexity", "dense_perplexity", "ratio", "top1_agreement", "router_recall", "active_fraction"} <= set(
        figures
    )
    assert "3 windows of 32 tokens" in figures["protocol"]
    model, tokenizer = moefy_package.load(converted), tf.AutoTokenizer.from_pretrained(converted)
    # What it is calibrated on by default is measured on by nobody who names no text.
    expected = perplexity(model, token_windows(tokenizer, halves(builtin_text())[1], 32, 3))
    assert figures["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
    table = moefy("eval", converted, "--window", 32, "--windows", 3).stdout
    assert "perplexity" in table
    assert "3 windows of 32 tokens" in table


@pytest.mark.parametrize(
    ("neurons", "options", "sentence"),
    [
        (100, ["--active", "0.5"], "Experts of 8 neurons do not divide this model's FFNs: they are of 10."),
        (
            48,
            ["--expert-size", "1", "--router", "mlp", "--shared", "0", "--active", "40"],
            "more work than the dense one",
        ),
        (48, ["--recipe", "cmoe", "--experts", "2", "--active", "0.3"], "multiply-adds, and 30.0% were asked for"),
    ],
)
def test_what_nobody_asked_for_is_said(neurons, options, sentence, tmp_path):
    tiny._decoder(tf.LlamaConfig, tf.LlamaForCausalLM, intermediate_size=neurons).save_pretrained(tmp_path / "dense")
    pydoc_tokenizer().save_pretrained(tmp_path / "dense")
    done = moefy("convert", tmp_path / "dense", tmp_path / "out", *options, "--window", 32, "--windows", 4)
    assert done.returncode == 0, done.stderr
    assert sentence in " ".join(done.stderr.split())


def test_generate_continues_the_prompt(converted):
    done = moefy_process("generate", converted, "the value of", "--tokens", 5)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_bench_times_both_models_in_every_case(dense, converted):
    int8 = ["--int8"] if native.available() else []
    done = moefy("bench", converted, "--against", dense, "--rounds", 1, *int8, "--json")
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    figures = json.loads(done.stdout)
    assert "decode" in figures["cases"]
    for case in figures["cases"].values():
        assert set(case) == {"dense", "model", *(["model int8"] if int8 else [])}
        assert all(result["tokens_per_second"] > 0 for result in case.values())
        assert case["dense"]["active"] is None
        assert 0 < case["model"]["active"] < 1  # what ran on the text, the router included
    assert figures["machine"]["threads"] >= 1


def test_a_model_beside_a_converted_one_is_not_called_dense(converted):
    done = moefy("bench", converted, "--against", converted, "--rounds", 1, "--json")
    assert set(json.loads(done.stdout)["cases"]["decode"]) == {"against", "model"}


def test_bench_runs_on_the_text_it_is_given_repeated_as_far_as_needed(dense):
    from moefy.measure import bench
    from moefy.sources.models import load_source

    model, tokens = load_source(str(dense))[0], torch.tensor([11, 12, 13, 14, 15])
    model.config.max_position_embeddings, seen = 256, []  # so that there is a prefill, which nothing computes here
    case = next(case for case in bench.cases(model, text=tokens) if case.name.startswith("prefill"))
    case.run(lambda **feed: seen.append(feed["input_ids"].flatten()))
    assert len(seen[0]) == case.tokens
    assert torch.equal(seen[0], tokens.repeat(-(-case.tokens // len(tokens)))[: case.tokens])
    done = moefy("bench", dense, "--rounds", 1, "--text", "no-such-file.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no-such-file.txt" in done.stderr


def test_recipe_files_and_gzip_text(dense, tmp_path):
    (tmp_path / "r.yaml").write_text("construction: weights\nrouter: similarity\nexperts: 6\nshared: 0\nactive: 3\n")
    with gzip.open(tmp_path / "text.txt.gz", "wt") as file:
        file.write(builtin_text()[:5000])
    done = moefy(
        "convert", dense, tmp_path / "out", "--recipe", tmp_path / "r.yaml", "--calibration", tmp_path / "text.txt.gz",
        "--window", 16, "--windows", 3,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "router: similarity" in (tmp_path / "out" / "recipe.yaml").read_text()


def _truncate(path, share=0.5):
    os.truncate(path, int(path.stat().st_size * share))


@pytest.fixture
def sources(dense, tmp_path):
    """Broken sources and texts beside a good one."""
    shutil.copytree(dense, tmp_path / "good")
    shutil.copytree(dense, tmp_path / "cut")
    _truncate(tmp_path / "cut" / "model.safetensors")
    shutil.copytree(dense, tmp_path / "noweights")
    (tmp_path / "noweights" / "model.safetensors").unlink()
    shutil.copytree(tmp_path / "noweights", tmp_path / "pickle")
    torch.save({}, tmp_path / "pickle" / "pytorch_model.bin")
    broken = tiny.tiny("llama")
    broken.model.layers[0].mlp.up_proj.weight.data[1, 1] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    pydoc_tokenizer().save_pretrained(tmp_path / "nan")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(200))
    (tmp_path / "plain.gguf").write_text("not a gguf")
    (tmp_path / "binary.txt").write_bytes(random.Random(0).randbytes(4096))
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "bad.yaml").write_text("experts: many\nflavour: sweet\n")
    (tmp_path / "half.jsonl").write_text('{"text": "whole"}\n\n{"text": "half \\ud800"}\n')
    (tmp_path / "digits.jsonl").write_text('{"text": ' + "9" * 6000 + "}\n")
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(builtin_text().encode())[:1000])
    (tmp_path / "exists").mkdir()
    (tmp_path / "exists" / "config.json").write_text("{}")
    return tmp_path


MISTAKES = {
    "missing path": (["convert", "no/such/model", "out"], "no model at no/such/model"),
    "mistyped name": (["convert", "no-such-model", "out"], "no directory or file 'no-such-model'"),
    "name that no hub takes": (["convert", "my model", "out"], "no directory or file 'my model'"),
    "name with an odd character": (["eval", "bad name!"], "no directory or file 'bad name!'"),
    "demo over a model": (["demo", "--output", "exists"], "exists already"),
    "no config": (["convert", "empty", "out"], "no config.json"),
    "no weights": (["convert", "noweights", "out"], "no weights"),
    "truncated safetensors": (["convert", "cut", "out"], "truncated or corrupt"),
    "pickle": (["convert", "pickle", "out"], "can run code"),
    "cut gguf": (["convert", "cut.gguf", "out"], "cut short or corrupt"),
    "not a gguf": (["convert", "plain.gguf", "out"], "neither a model directory nor a GGUF"),
    "nan weights": (["convert", "nan", "out"], "NaN or infinite"),
    "binary text": (["convert", "good", "out", "--calibration", "binary.txt"], "not a text file"),
    "empty text": (["convert", "good", "out", "--calibration", "empty.txt"], "is empty"),
    "cut gzip": (["convert", "good", "out", "--calibration", "cut.txt.gz"], "cannot be read"),
    "half a character": (["convert", "good", "out", "--calibration", "half.jsonl"], "Line 3 of half.jsonl holds half"),
    "endless number": (["convert", "good", "out", "--calibration", "digits.jsonl"], "mend or remove line 1."),
    "endless nesting": (["convert", "good", "out", "--calibration", "deep.jsonl"], "mend or remove line 1."),
    "short text": (["convert", "good", "out", "--calibration", "short.txt"], "shorter than a window"),
    "missing text": (["convert", "good", "out", "--calibration", "nowhere.txt"], "no text file 'nowhere.txt'"),
    "share above one": (["convert", "good", "out", "--active", "1.5"], "neither a share"),
    "share of the demo": (["demo", "--active", "half"], "--active takes a share such as 0.5"),
    "share of a comparison": (
        ["compare", "good", "out", "--active", "75%,half"],
        "numbers with commas, such as 0.75,0.5",
    ),
    "share that is no number": (["convert", "good", "out", "--active", "half%"], "takes a share such as 0.5"),
    "shared that is no number": (["convert", "good", "out", "--shared", "x"], "--shared takes a share such as 0.5"),
    "memory that is no size": (["convert", "good", "out", "--memory", "nan"], "--memory takes GiB"),
    "no windows": (["convert", "good", "out", "--task", "t2t", "--windows", "0"], "--windows"),
    "eval of no windows": (["eval", "good", "--windows", "0"], "--windows"),
    "study of windows of nothing": (["inspect", "good", "out", "--window", "0"], "--window"),
    "target below nothing": (["convert", "good", "out", "--target-loss", "-1", "--window", "32"], "above 0"),
    "too little to hold out": (
        ["convert", "good", "out", "--target-loss", "0.1", "--windows", "3", "--window", "32"],
        "too few",
    ),
    "target of a task": (
        ["convert", "good", "out", "--target-loss", "0.1", "--task", "t2t", "--calibration", "t2t.txt"],
        "no --task",
    ),
    "target that is no number": (["convert", "good", "out", "--target-loss", "nan"], "above 0"),
    "target and share": (["convert", "good", "out", "--target-loss", "0.1", "--active", "0.5"], "leave out --active"),
    "active too large": (["convert", "good", "out", "--active", "9"], "9 active experts"),
    "indivisible": (["convert", "good", "out", "--experts", "7", "--window", "32"], "7 experts do not divide"),
    "no such recipe": (["convert", "good", "out", "--recipe", "dish"], "no recipe 'dish'"),
    "bad recipe": (["convert", "good", "out", "--recipe", "bad.yaml"], "flavour"),
    "no such router": (["convert", "good", "out", "--router", "dice"], "no router 'dice'"),
    "no such dtype": (["convert", "good", "out", "--dtype", "float7"], "no dtype 'float7'"),
    "output exists": (["convert", "good", "exists"], "exists already"),
    "zero window": (["convert", "good", "out", "--window", "0"], "window"),
    "unknown option": (["convert", "good", "out", "--banana"], "No such option"),
    "eval of nothing": (["eval", "no/such/model"], "no model at"),
    "generate of nothing": (["generate", "no/such/model", "hello"], "no model at"),
    "prompt that is not UTF-8": (["generate", "good", "caf\udce9"], "The prompt is no valid text"),
    "text that is not UTF-8": (["eval", "good", "--text", "caf\udce9 " * 99], "is no valid text"),
    "empty prompt": (["generate", "good", ""], "prompt is empty"),
}


def _tree(folder: Path):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_a_sentence_and_leave_nothing(mistake, sources, monkeypatch, capsys):
    args, message = MISTAKES[mistake]
    before = _tree(sources)
    monkeypatch.chdir(sources)
    monkeypatch.setattr(sys, "argv", ["moefy", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown
    assert _tree(sources) == before


def test_a_mistake_in_a_process_of_its_own(tmp_path):
    done = moefy_process("convert", "no/such/model", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "moefy: There is no model at no/such/model; give a directory, a .gguf file or a hub name.\n"
    assert not _tree(tmp_path)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_conversion_that_is_stopped_leaves_what_is_done_and_nothing_else(stop, dense, tmp_path):
    scratch, out = tmp_path / "tmp", tmp_path / "out"
    scratch.mkdir()
    args = ["convert", dense, out, "--recipe", "reconstructed", "--window", 256, "--windows", 400]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    running = subprocess.Popen(
        [sys.executable, "-m", "moefy", *map(str, args)], stderr=subprocess.PIPE, env=environment, text=True
    )
    while not list(scratch.glob("moefy-*")):  # for activations that wait for their turn
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.01)
    time.sleep(0.5)  # it is there a moment before anything knows that it has to be cleared away
    running.send_signal(stop)
    shown = running.communicate(timeout=120)[1]
    assert running.returncode == 130, shown
    assert shown.endswith("Interrupted; nothing was left half written.\n")
    assert not _tree(scratch)
    assert not out.exists()
    assert all(name.startswith((".out.converting", "tmp")) for name in _tree(tmp_path))
    assert not [name for name in _tree(tmp_path) if "partial" in name]
