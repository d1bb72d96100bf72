"""End-to-end speed of models, side by side: interleaved runs, medians, JSON with what they were measured on."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moefy.calibrate import positions
from moefy.errors import MoefyError
from moefy.heads import head_of
from moefy.kernels import native
from moefy.moe import MoEFFN
from moefy.usage import realised_fraction, usage
from moefy.version import __version__

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Case:
    """One thing to time; `tokens` are processed in one run of `run(model)`."""

    name: str
    tokens: int
    run: Callable[[Any], object]


def cases(model: Any, new_tokens: int = 32, text: torch.Tensor | None = None) -> list[Case]:
    """Decode and prefill for causal language models, plain forward passes for others.

    `text` (N,) int64 are the tokens to run on, repeated as far as needed; without any they are random, and a
    threshold, which is set on text, may run more or fewer experts on them than on text.
    """
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
    if vocabulary is None:
        raise MoefyError(f"bench feeds token ids, and {type(model).__name__} takes none.")
    longest = positions(model) or 1024
    generator = torch.Generator().manual_seed(0)

    def ids(batch: int, length: int) -> torch.Tensor:
        if text is None:
            return torch.randint(10, vocabulary - 1, (batch, length), generator=generator)
        return text.repeat(-(-batch * length // len(text)))[: batch * length].view(batch, length)

    def forward(batch: int, length: int) -> Case:
        feed: dict[str, Any] = {"input_ids": ids(batch, length)}
        if model.config.is_encoder_decoder:
            feed["decoder_input_ids"] = feed["input_ids"]
        elif head_of(model) == "causal":
            feed |= {"use_cache": True, "logits_to_keep": 1}
        what = "prefill" if head_of(model) == "causal" else "forward"
        return Case(f"{what} {batch} x {length}", batch * length, lambda m: m(**feed))

    shapes = [(1, 256), (1, 1024), (8, 128)] if head_of(model) == "causal" else [(1, 16), (1, 128), (8, 128)]
    found = [forward(b, n) for b, n in shapes if n <= longest]
    if head_of(model) == "causal":
        found.insert(0, _decode(ids(1, 32), new_tokens))
    return found


def _decode(prompt: torch.Tensor, new_tokens: int) -> Case:
    """Tokens one at a time through the KV cache, without `generate`'s own bookkeeping."""

    def run(model: Any) -> None:
        out = model(input_ids=prompt, use_cache=True)
        name = "cache" if "cache" in out else "past_key_values"  # which transformers renamed to the former
        token = out.logits[:, -1:].argmax(-1)
        for _ in range(new_tokens):
            out = model(input_ids=token, use_cache=True, **{name: out[name]})
            token = out.logits[:, -1:].argmax(-1)

    return Case("decode", new_tokens, run)


@torch.no_grad()
def compare(
    models: dict[str, Any], rounds: int = 5, progress: Progress | None = None, todo: Sequence[Case] | None = None
) -> dict[str, Any]:
    """Time every case (`todo`, or all) on every model, one after the other in each round; medians in tokens a second.

    The first model is the one that speedups are relative to; `active` is the share of the FFNs' multiply-adds that
    ran (None: the model is not converted). Weights are the bytes each model holds.
    """
    for model in models.values():
        model.eval()
    first = next(iter(models.values()))
    todo, results = cases(first) if todo is None else todo, {}
    done = 0
    for case in todo:
        seconds: dict[str, list[float]] = {name: [] for name in models}
        # The first run of each packs its weights and warms caches.
        active = {name: _active(model, case) for name, model in models.items()}
        for _ in range(rounds):
            for name, model in models.items():
                start = time.perf_counter()
                case.run(model)
                seconds[name].append(time.perf_counter() - start)
            done += 1
            if progress:
                progress(done, rounds * len(todo))
        medians = {name: statistics.median(s) for name, s in seconds.items()}
        base = next(iter(medians.values()))
        results[case.name] = {
            name: {"tokens_per_second": case.tokens / median, "speedup": base / median, "active": active[name]}
            for name, median in medians.items()
        }
    return {
        "cases": results,
        "weight_bytes": {name: weight_bytes(model) for name, model in models.items()},
        "machine": machine(),
        "rounds": rounds,
    }


def _active(model: nn.Module, case: Case) -> float | None:
    """The share of the FFNs' multiply-adds that run in a case; None if the model is not converted."""
    with usage(model) as counted:
        case.run(model)
    return realised_fraction(model, counted) if counted else None


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a model holds, packed ones included, tied ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers()) if t.numel()}
    packed = sum(m.packed_bytes() for m in model.modules() if isinstance(m, MoEFFN))
    return sum(tensors.values()) + packed


def machine() -> dict[str, Any]:
    """What decides a speed: processor, threads, instruction set, versions."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": native.default_isa() if native.available() else None,
        "moefy": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
