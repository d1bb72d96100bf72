"""SmolLM2-135M on WikiText-2: the published method, its cost, and what a saved model gives back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moefy
from moefy.calibrate import token_windows
from moefy.measure.evaluate import perplexity
from moefy.moe import moe_layers
from moefy.sources.models import load_source, smollm2_gguf
from moefy.sources.texts import read_text

pytestmark = pytest.mark.real


def command(*args, **options):
    return subprocess.run(
        [sys.executable, "-m", "moefy", *map(str, args)], capture_output=True, text=True, timeout=1200, **options
    )


@pytest.fixture(scope="module")
def windows(data):
    _, tokenizer = load_source(smollm2_gguf())
    return token_windows(tokenizer, read_text(data / "wikitext-2-raw" / "test.txt.gz"), 1024, 6)


def peak_of(log, *args):
    """Run a command to its end; what it printed (to `log`) and the most memory it held, in bytes."""
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "moefy", *map(str, args)], stdout=out, stderr=out)
        _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, log.read_text()
    return log.read_text(), used.ru_maxrss * 1024


@pytest.fixture(scope="module")
def converted(data, tmp_path_factory):
    """`moefy convert` as a user runs it, 16k tokens; its peak memory is measured from outside."""
    folder = tmp_path_factory.mktemp("smollm2")
    out, train = folder / "cmoe", data / "wikitext-2" / "train.txt.gz"
    text, peak = peak_of(folder / "log", "convert", smollm2_gguf(), out, "--recipe", "cmoe", "--calibration", train)
    print(text, f"{peak / 2**30:.2f} GiB")
    assert 0.5 * 2**30 < peak < 4 * 2**30
    return out


def test_cmoe_perplexity_is_that_of_the_published_method(converted, windows):
    """Dense 27, CMoE S3A3E8 about 1.75x that: far off means a wrong method, in either direction."""
    dense = perplexity(load_source(smollm2_gguf())[0], windows).perplexity
    ours = perplexity(moefy.load(converted), windows).perplexity
    print(f"dense {dense:.2f}, CMoE S3A3E8 {ours:.2f}")
    assert 20 < dense < 32
    assert 1.3 < ours / dense < 2.2


def test_same_bits_in_a_new_process(converted, windows, tmp_path):
    program = (
        "import sys, torch, moefy; m = moefy.load(sys.argv[1]); torch.set_grad_enabled(False);"
        "torch.save(m(torch.load(sys.argv[2])).logits, sys.argv[3])"
    )
    torch.save(windows[:1, :256].clone(), tmp_path / "ids.pt")
    for name in ("a.pt", "b.pt"):
        paths = [converted, tmp_path / "ids.pt", tmp_path / name]
        subprocess.run([sys.executable, "-c", program, *map(str, paths)], check=True)
    assert torch.equal(torch.load(tmp_path / "a.pt"), torch.load(tmp_path / "b.pt"))


def test_all_experts_active_equals_dense(converted, windows):
    dense, _ = load_source(smollm2_gguf())
    model = moefy.load(converted)
    for layer in moe_layers(model).values():
        layer.top_k = layer.spec.experts
    with torch.no_grad():
        expected, ours = dense(windows[:1, :256]).logits, model(windows[:1, :256]).logits
    assert (ours - expected).norm() <= 1e-5 * expected.norm()
    back = moefy.to_dense(model).state_dict()
    assert all(torch.equal(back[name], weight) for name, weight in dense.state_dict().items())


def test_eval_and_generate_on_the_saved_model(converted, data):
    text = data / "wikitext-2-raw" / "test.txt.gz"
    done = command("eval", converted, "--text", text, "--windows", 2, "--window", 512, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert 0.4 < figures["router_recall"] < 1
    done = command("generate", converted, "The history of the Roman Empire", "--tokens", 8)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > len("The history of the Roman Empire")


def test_a_loaded_model_holds_little_more_than_its_weights(converted):
    """Peak of load, packing and one token, over an idle process: at most 1.1 times the weights."""
    program = (
        "import sys, torch, moefy; from moefy.measure.bench import weight_bytes\n"
        "def peak(): return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if 'VmHWM' in l)\n"
        "torch.zeros(8, 8) @ torch.zeros(8, 8); torch.set_grad_enabled(False); import transformers.models.llama\n"
        "idle = peak(); model = moefy.load(sys.argv[1]); model(torch.ones(1, 1, dtype=torch.long))\n"
        "print((peak() - idle) / weight_bytes(model))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(converted)], capture_output=True, text=True, check=True)
    print(done.stdout)
    assert float(done.stdout.split()[-1]) <= 1.1


OLD = '{"model_type": "llama"}'  # what makes a folder a model's


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing_or_the_old(converted, overwrite, tmp_path):
    """A real full disk: a small tmpfs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=True)
    try:
        if overwrite:
            (disk / "out").mkdir()
            (disk / "out" / "config.json").write_text(OLD)
        program = (
            "import sys, moefy\nfrom pathlib import Path\n"
            "model = moefy.load(sys.argv[1])\n"
            "try: moefy.save(model, sys.argv[2], overwrite=True)\n"
            "except moefy.MoefyError as error: print(error); sys.exit(2)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(converted), str(disk / "out")], capture_output=True, text=True
        )
        assert done.returncode == 2, done.stderr
        assert "disk is full" in done.stdout
        assert os.listdir(disk) == (["out"] if overwrite else [])
        if overwrite:
            assert Path(disk / "out" / "config.json").read_text() == OLD
    finally:
        subprocess.run(["umount", str(disk)], check=True)
