"""The examples as they are run: mistakes before the training, and what they say that they measured."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCAN = "IN: jump twice OUT: I_JUMP I_JUMP\nIN: walk OUT: I_WALK\n"


def run(example, *arguments):
    return subprocess.run([sys.executable, EXAMPLES / example, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("example", ["relu_minilm_sst2.py", "relu_t5_scan.py"])
def test_a_mistake_is_status_2_before_the_training(example, tmp_path):
    (tmp_path / "train.txt").write_text(SCAN)
    done = run(example, "--train", tmp_path / "train.txt", "--dev", tmp_path / "none.txt", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "none.txt" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["train.txt"]


def test_scan_counts_the_lines_that_it_measured(tmp_path):
    (tmp_path / "train.txt").write_text(SCAN * 40)
    (tmp_path / "dev.txt").write_text(SCAN)
    files = ["--train", tmp_path / "train.txt", "--dev", tmp_path / "dev.txt", "--output", tmp_path / "out"]
    refused = run("relu_t5_scan.py", *files, "--epochs", "nan")
    assert refused.returncode == 2
    assert "epochs must be above 0" in refused.stderr
    done = run("relu_t5_scan.py", *files, "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert "exact match on 2 lines" in done.stdout
    assert (tmp_path / "out" / "config.json").exists()
