"""What a conversion holds in memory that the system cannot drop, beside the weights of the model.

    python benchmarks/memory.py                                  # 100 layers of random weights in bf16, default recipe
    python benchmarks/memory.py --layers 200 --make DIR          # write such a model, 1.7 GB, and nothing else
    systemd-run --user --scope -p MemoryMax=1200M -p MemorySwapMax=0 \\
        python benchmarks/memory.py --source DIR --recipe cmoe   # and convert it in less memory

The model is written to a temporary directory (or read from --source), loaded as `moefy convert` does, and converted
with a state folder, so that weights and finished layers are mapped from files. `anonymous` is the peak of what is not
(Linux).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from limits import machine
from transformers import LlamaConfig, LlamaForCausalLM

import moefy
from moefy.measure.bench import weight_bytes
from moefy.sources.models import load_source
from moefy.wanted import chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--neurons", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--recipe")
    parser.add_argument("--active", type=float, default=0.5)
    parser.add_argument("--memory", type=float, default=0.1, help="GiB of activations to hold")
    parser.add_argument("--json", help="append the line to this file")
    parser.add_argument("--make", help="write the model there and stop")
    parser.add_argument("--source", help="convert the model there")
    args = parser.parse_args()
    if args.make:
        make(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(args.source or Path(folder) / "source")
        if not args.source:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make", str(source)], check=True)
        line = json.dumps({**vars(args), **measure(args, source, Path(folder) / "state"), **machine()})
    print(line)
    if args.json:
        with open(args.json, "a") as file:
            file.write(line + "\n")


def make(args: argparse.Namespace) -> None:
    """Write the model; in a process of its own, so that its memory is not counted."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=args.width, intermediate_size=args.neurons, num_hidden_layers=args.layers, dtype="bfloat16",
        num_attention_heads=args.width // 64, vocab_size=args.vocabulary,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(args.make)


def measure(args: argparse.Namespace, source: Path, state: Path) -> dict[str, float]:
    """Bytes of the weights, of anonymous memory before the conversion and at its peak; and its seconds."""
    model, _ = load_source(source)
    weights, idle = weight_bytes(model), anonymous()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (args.windows, args.window), generator=generator)
    batches = [{"input_ids": row[None]} for row in ids]
    peak = [idle]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], anonymous())

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    recipe = chosen(args.recipe, active=args.active)
    moefy.convert(model, recipe, batches, hold_bytes=int(args.memory * 2**30), state=state)
    stop.set()
    return {"weights": weights, "idle": idle, "anonymous": peak[0], "seconds": round(time.perf_counter() - start, 1)}


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
