import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin would keep other workers waiting

import pytest
import torch

import tiny
from task_data import DATA, write
from words import pydoc_tokenizer

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(autouse=True, scope="session")
def _heeds_signals():
    """What runs the tests in the background has them, and what they start, ignore Ctrl-C, and nohup a closed terminal.

    What is ignored is inherited and a handler is not: with one that does nothing the tests go on under nohup, and the
    commands that they start can be stopped.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "dense"
    tiny.tiny("llama").save_pretrained(folder)
    pydoc_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    """A file of each task, by its name."""
    return {task: write(tmp_path / f"{task}-{name}", text) for task, (name, text) in DATA.items()}
