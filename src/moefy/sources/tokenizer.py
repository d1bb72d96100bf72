"""A model's tokenizer: there, not there, or in a sentence what is wrong with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from moefy.errors import MoefyError

# Files without any of which transformers makes up a tokenizer of a handful of words, to which all else is unknown.
_ANY = ("*token*", "*vocab*", "*merges*", "*.model", "*.spm", "*.codes", "*.tiktoken")
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_SENTENCEPIECE = ("tokenizer.model", "spiece.model")


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer of a model, or None if it has none; MoefyError if its directory holds one that is damaged."""
    folder = Path(name)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _ANY):
        return None
    try:
        return _tried(name, **options)
    except Exception as error:  # a model without text shows in as many ways as a damaged file
        files = [file for file in _TOKENIZERS if (Path(name) / file).is_file()]
        if not files:
            return None
        pieces = [file for file in files if file in _SENTENCEPIECE]
        if pieces and "tokenizer.json" not in files and importlib.util.find_spec("sentencepiece") is None:
            raise MoefyError(
                f"The tokenizer of {name} is a SentencePiece file ({pieces[0]}), which takes a package to read: "
                f"pip install sentencepiece protobuf."
            ) from None
        if "trust_remote_code" in str(error):
            raise MoefyError(
                f"The tokenizer of {name} has code of its own; --trust-remote-code runs it, if you trust its source."
            ) from None
        if files == ["tokenizer_config.json"]:
            raise MoefyError(
                f"The tokenizer of {name} cannot be loaded: beside tokenizer_config.json is no tokenizer.json or other "
                f"vocabulary; copy or download that too."
            ) from None
        raise MoefyError(
            f"The tokenizer of {name} cannot be loaded ({_said(error)}); copy or download {' and '.join(files)} again."
        ) from None


def gguf_tokenizer(folder: Path, path: Path, **options: Any) -> Any:
    """The tokenizer in the GGUF file at `path`, which transformers sees in `folder`; MoefyError if it is damaged."""
    try:
        return _tried(folder, **options)
    except Exception as error:  # of the tokenizers library they are of no kind of their own
        raise MoefyError(
            f"The tokenizer in the GGUF file {path} cannot be loaded ({_said(error)}); copy or download it again, or "
            f"start from the model in safetensors."
        ) from None


def _tried(name: str | Path, **options: Any) -> Any:
    """A tokenizer that can encode; else whatever error that shows in."""
    # False is to be said: else transformers asks at the terminal whether it may run a tokenizer's own code.
    made = AutoTokenizer.from_pretrained(name, **{"trust_remote_code": False, **options})
    if hasattr(made, "tokenize"):
        made.tokenize("a \u2603")  # what no vocabulary has, too: some cannot without an unknown token
    if not isinstance(getattr(made, "model_max_length", 0), (int, float)):
        raise ValueError("model_max_length is no number")
    return made


def _said(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "").rstrip(" .:")
    return f"{type(error).__name__}: {first}"
