"""Seconds that gradients take through one conditional FFN, by kernel and by the size of experts.

    python benchmarks/training.py                                      # a layer like SmolLM2's, 1,024 tokens
    python benchmarks/training.py --width 2048 --shared 2048 --routed 6144 --threads 2 --json out.jsonl

Forward and backward, of the inputs and of every weight; kernels take turns in every round, medians. A third of the
experts is chosen for each token, at random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from limits import machine

from moefy.kernels import KERNELS
from moefy.types import FFNWeights, MoEWeights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--shared", type=int, default=384, help="neurons that always run")
    parser.add_argument("--routed", type=int, default=1152, help="neurons in experts")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 32], help="neurons of an expert")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="append one line a size to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for size in args.sizes:
        seconds = measure(args, size)
        print(f"experts of {size:3}: " + ", ".join(f"{name} {s:.3f} s" for name, s in seconds.items()), flush=True)
        if args.json:
            with open(args.json, "a") as file:
                record = {**vars(args), "expert_size": size, "seconds": seconds, **machine()}
                file.write(json.dumps(record) + "\n")


def measure(args: argparse.Namespace, size: int) -> dict[str, float]:
    """The median seconds of each kernel with experts of `size` neurons."""
    torch.manual_seed(0)
    experts = args.routed // size
    shared, routed = weights(args.shared, args.width), weights(experts * size, args.width)
    layer = MoEWeights(shared, routed, experts, None)
    x = torch.randn(args.tokens, args.width, requires_grad=True)
    chosen = torch.rand(args.tokens, experts).topk(max(1, experts // 3), dim=1).indices
    taken: dict[str, list[float]] = {name: [] for name in KERNELS}
    for turn in range(args.rounds + 1):
        for name, kernel in KERNELS.items():
            start = time.perf_counter()
            kernel(x, layer, chosen, None).sum().backward()
            if turn:  # the first warms up
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def weights(neurons: int, width: int) -> FFNWeights:
    gate, up, down = (torch.randn(neurons, width).mul_(width**-0.5).requires_grad_() for _ in range(3))
    return FFNWeights(up=up, down=down, gate=gate, activation="silu")


if __name__ == "__main__":
    main()
