"""Seconds and memory of the co-activation construction on one synthetic layer; prints a JSON line.

    python benchmarks/coactivation.py --neurons 4096 --width 1024 --tokens 100000

The layer has the structure that the method looks for: neurons in groups that share a direction, ReLU, and a
bias that leaves about a tenth of them firing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator

import torch

from moefy.construct import coactivation
from moefy.convert import peak_memory
from moefy.stats import NeuronStats
from moefy.types import FFNWeights


def layer(neurons: int, width: int, size: int, generator: torch.Generator) -> FFNWeights:
    directions = torch.randn(neurons // size, width, generator=generator).repeat_interleave(size, dim=0)
    up = (directions + torch.randn(neurons, width, generator=generator)) / (2 * width) ** 0.5
    bias = torch.full((neurons,), -1.3)
    return FFNWeights(up=up, down=up.clone(), up_bias=bias, activation="relu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("neurons", 4096), ("width", 1024), ("tokens", 100_000), ("size", 32), ("chunk", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    ffn = layer(a.neurons, a.width, a.size, generator)
    order = torch.randperm(a.neurons, generator=generator)
    ffn = ffn.take(order)

    def batches() -> Iterator[torch.Tensor]:
        source = torch.Generator().manual_seed(1)
        for start in range(0, a.tokens, 8192):
            yield torch.randn(min(8192, a.tokens - start), a.width, generator=source)

    stats = NeuronStats(ffn, batches, a.chunk)
    members, experts = torch.arange(a.neurons), a.neurons // a.size
    start = time.perf_counter()
    weights = coactivation.coactivation(stats, members)
    graph = time.perf_counter() - start
    parts = coactivation._metis(weights, experts, 0)
    metis = time.perf_counter() - start - graph
    evened = coactivation.equalised(weights, parts, experts)
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "neurons": a.neurons,
                "width": a.width,
                "tokens": a.tokens,
                "experts": experts,
                "threads": torch.get_num_threads(),
                "seconds": round(seconds, 1),
                "seconds_graph": round(graph, 1),
                "seconds_metis": round(metis, 1),
                "peak_gib": round(peak_memory() / 2**30, 2),
                "inside_metis": round(coactivation.inside_weight(weights, parts), 4),
                "inside_equal": round(coactivation.inside_weight(weights, evened), 4),
                "inside_planted": round(coactivation.inside_weight(weights, order // a.size), 4),
                "inside_random": round(coactivation.inside_weight(weights, torch.randperm(a.neurons) // a.size), 4),
                "largest_metis_part": int(torch.bincount(parts).max()),
            }
        )
    )


if __name__ == "__main__":
    main()
