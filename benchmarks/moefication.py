"""MoEfication's table: every construction with every selection at 10, 20 and 30 % of the neurons, on one task.

    python benchmarks/moefication.py minilm-sst2 --task sst2 --train train.tsv.gz --data dev.tsv.gz --out sst2.jsonl
    python benchmarks/moefication.py minilm-sst2 --out sst2.jsonl --table

Each cell is a line of JSON, appended when it is done; the same command goes on where it was cut off, and with
--seconds it stops by itself. The models are what examples/ trains. --table prints what is there as Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch

import moefy
from moefy.evaluate import routing
from moefy.sources import load_source
from moefy.tasks import evaluate_task, task_calibration

CONSTRUCTIONS = ("random", "weights", "coactivation")
SELECTIONS = {"mass": "ground truth", "random": "random", "similarity": "similarity", "mlp": "MLP"}
SHARES = (0.1, 0.2, 0.3)


def cells(refitted: bool) -> list[dict[str, Any]]:
    """The cells in the order they run: the paper's table, then the same selections after the refit."""
    found: list[dict[str, Any]] = [{"construction": "dense", "router": "", "active": 1.0, "refit": False}]
    for again in (False, True) if refitted else (False,):
        for active in (0.2, 0.1, 0.3):
            for construction in CONSTRUCTIONS:
                for router in SELECTIONS:
                    if not (again and router in ("random",)):
                        found.append({"construction": construction, "router": router, "active": active, "refit": again})
    return found


@torch.no_grad()
def seconds_of(model: Any, batches: list[dict[str, torch.Tensor]], repeats: int = 5) -> float:
    """Seconds of the forward passes over the batches, the fastest of some rounds."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for batch in batches:
            model(**batch)
        best = min(best, time.perf_counter() - start)
    return best


def run(cell: dict[str, Any], args: argparse.Namespace, dense: Any, tokenizer: Any) -> dict[str, Any]:
    model, started = copy.deepcopy(dense), time.perf_counter()
    batches = task_calibration(model, tokenizer, args.task, args.train, tokens=args.tokens)
    result: dict[str, Any] = {**cell, "model": Path(args.model).name, "expert_size": args.expert_size}
    if cell["construction"] != "dense":
        recipe = moefy.Recipe.of("moefication", expert_size=args.expert_size, **cell)
        report = moefy.convert(model, recipe, batches)
        result["seconds"] = round(report.seconds, 1)
        result["seconds_layer"] = round(max(x.seconds for x in report.layers), 1)
        result["fraction"] = report.active_fraction
    held = task_calibration(model, tokenizer, args.task, args.data, tokens=4096)
    result.update(evaluate_task(model, tokenizer, args.task, args.data, args.limit))
    routed = routing(model, held)
    if routed:
        result["mass"] = sum(r.mass for r in routed.values()) / len(routed)
        result["overlap"] = sum(r.overlap for r in routed.values()) / len(routed)
        result["recall"] = sum(r.recall for r in routed.values()) / len(routed)
    single = [{k: v[:1] for k, v in b.items()} for b in held][:8]
    result["batch_seconds"], result["single_seconds"] = seconds_of(model, held), seconds_of(model, single)
    result["whole_seconds"] = round(time.perf_counter() - started, 1)
    return result


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return cell["construction"], cell["router"], cell["active"], cell["refit"]


def table(lines: list[dict[str, Any]]) -> str:
    """The Markdown table: a row a construction and selection, three columns of the main figure, then mass."""
    main = next(k for k in lines[0] if k in ("accuracy", "exact_match"))
    by_key = {key(line): line for line in lines}
    dense = by_key["dense", "", 1.0, False]
    out = [
        f"Dense: {main} {dense[main]:.4f}.",
        "",
        "| construction | selection | refit | 10 % | 20 % | 30 % | mass 10 % | 20 % | 30 % | overlap 20 % | speed |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for construction in CONSTRUCTIONS:
        for router, name in SELECTIONS.items():
            for again in (False, True):
                row = [by_key.get((construction, router, active, again)) for active in SHARES]
                if not any(row):
                    continue
                figures = [f"{r[main]:.4f} ({r[main] / dense[main]:.1%})" if r else "" for r in row]
                masses = [f"{r['mass']:.3f}" if r else "" for r in row]
                mid = row[1]
                last = [f"{mid['overlap']:.2f}", speed(dense, mid)] if mid else ["", ""]
                shown = [construction, name, "yes" if again else "", *figures, *masses, *last]
                out.append(f"| {' | '.join(shown)} |")
    return "\n".join(out)


def speed(dense: dict[str, Any], cell: dict[str, Any]) -> str:
    if cell["router"] == "mass":
        return "-"
    ratios = [dense[k] / cell[k] for k in ("batch_seconds", "single_seconds")]
    return f"{ratios[0]:.2f}x / {ratios[1]:.2f}x"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a dense ReLU checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the JSON lines")
    parser.add_argument("--table", action="store_true", help="print what --out holds and stop")
    parser.add_argument("--task")
    parser.add_argument("--train", help="the task's training data, to calibrate on")
    parser.add_argument("--data", help="the task's data to measure on")
    parser.add_argument("--limit", type=int, help="examples to measure on at most")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--expert-size", type=int, default=32)
    parser.add_argument("--paper-only", action="store_true", help="leave out the refitted cells")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no cell after so long")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.table:
        print(table(lines))
        return
    done, start = {key(line) for line in lines}, time.perf_counter()
    dense, tokenizer = load_source(args.model)
    for cell in cells(not args.paper_only):
        if key(cell) in done or time.perf_counter() - start > args.seconds:
            continue
        line = json.dumps(run(cell, args, dense, tokenizer))
        with args.out.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main()
