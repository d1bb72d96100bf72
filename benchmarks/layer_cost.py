"""What converting one FFN of a large model costs: seconds and peak memory, on random weights of its shape.

    python benchmarks/layer_cost.py                                    # the shape of Llama-7B, 16k tokens
    python benchmarks/layer_cost.py --width 4096 --neurons 14336 --tokens 8192 --recipe slim

The model is one Llama layer with a small vocabulary, so the rest of the work hardly counts. Prints one JSON line;
`seconds_layer` is the FFN alone, `seconds` with the measurement of its sensitivity, a forward and a backward pass.
"""

from __future__ import annotations

import argparse
import json

import torch
from limits import machine
from transformers import LlamaConfig, LlamaForCausalLM

import moefy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--recipe", default="reconstructed")
    parser.add_argument("--active", type=float, default=0.5)
    parser.add_argument("--json", help="append the line to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=args.width, intermediate_size=args.neurons, num_hidden_layers=1,
        num_attention_heads=args.width // 128, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(0, 1024, (1, 1024))} for _ in range(args.tokens // 1024)]
    report = moefy.convert(model, moefy.Recipe.of(args.recipe, budget=args.active), batches)
    (layer,) = report.layers
    line = json.dumps({
        "width": args.width, "neurons": args.neurons, "tokens": args.tokens, "recipe": args.recipe,
        "seconds_layer": round(layer.seconds, 1), "seconds": round(report.seconds, 1),
        "peak_gib": round(report.peak_bytes / 2**30, 2), "active": round(report.active_fraction, 4), **machine(),
    })  # fmt: skip
    print(line)
    if args.json:
        with open(args.json, "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
