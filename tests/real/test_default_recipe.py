"""The default recipe on a real model: far nearer to the dense one than the same model without routing can be."""

import json

import pytest
from test_smollm2 import command

from moefy.sources.models import smollm2_gguf

pytestmark = pytest.mark.real


def test_half_of_the_ffn_costs_less_than_half_of_what_the_published_method_does(data, tmp_path):
    """3,072 tokens of calibration: about 1.6x the dense perplexity (48 windows: 1.4x; CMoE with 16: 7x)."""
    out, train = tmp_path / "half", data / "wikitext-2-raw" / "train_first1MB.nonblank.txt.gz"
    how = ["--active", "0.5", "--calibration", train, "--window", "512", "--windows", "6"]
    done = command("convert", smollm2_gguf(), out, *how)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    text = data / "wikitext-2-raw" / "test.txt.gz"
    done = command(
        "eval", out, "--text", text, "--against", smollm2_gguf(), "--windows", "6", "--window", "512", "--json"
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    print({name: value for name, value in figures.items() if name != "layers"})
    assert 1.1 < figures["ratio"] < 2.2
    assert 0.42 < figures["active_fraction"] < 0.58
