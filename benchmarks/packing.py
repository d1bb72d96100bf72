"""Nanoseconds a weight that packing a GLU FFN for the native kernel takes, and unpacking it; prints a JSON line.

    python benchmarks/packing.py --width 2048 --neurons 8192

An eighth of the neurons are shared, the others are experts; for every type that weights come in and are packed as,
the median of runs in turns. Beside it the floor: what copying the same tensors takes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from limits import machine
from torch import Tensor

from moefy.kernels import native

CASES = [("float32", "fp32"), ("float32", "bf16"), ("float32", "fp16"), ("float32", "int8"), ("bfloat16", "bf16")]
CASES += [("bfloat16", "int8"), ("float16", "fp16")]


def weights(width: int, neurons: int, experts: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shared = neurons // 8
    shapes = {"experts": (experts, (neurons - shared) // experts, width), "shared": (shared, width)}
    return {
        f"{group}_{part}": torch.randn(shape, generator=generator).to(dtype)
        for group, shape in shapes.items()
        for part in ("up", "gate", "down")
    }


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _pack(tensors: dict[str, Any], precision: str, out: list[native.PackedFFN]) -> None:
    out.append(native.PackedFFN(**tensors, activation="silu", precision=precision))


def _copy(tensors: dict[str, Tensor]) -> list[Tensor]:
    return [m.clone() for m in tensors.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("width", 2048), ("neurons", 8192), ("experts", 32), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    given = {kind: weights(a.width, a.neurons, a.experts, getattr(torch, kind)) for kind in dict(CASES)}
    count = sum(map(Tensor.numel, given["float32"].values()))
    took: dict[str, list[float]] = {}
    for _ in range(a.rounds):
        for kind, precision in CASES:
            tensors, case = given[kind], f"{kind} as {precision}"
            packed: list[native.PackedFFN] = []

            took.setdefault(f"{case}: pack", []).append(seconds(partial(_pack, tensors, precision, packed)))
            took.setdefault(f"{case}: unpack", []).append(seconds(packed[0].unpack))
            took.setdefault(f"{kind}: copy", []).append(seconds(partial(_copy, tensors)))
    print(
        json.dumps(
            {
                "ns_a_weight": {case: round(median(times) / count * 1e9, 2) for case, times in took.items()},
                "weights": count,
                "isa": native.default_isa(),
                **machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
