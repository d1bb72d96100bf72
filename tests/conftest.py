import pytest
import torch

import tiny
from words import pydoc_tokenizer

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "dense"
    tiny.tiny("llama").save_pretrained(folder)
    pydoc_tokenizer().save_pretrained(folder)
    return folder
