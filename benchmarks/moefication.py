"""MoEfication's table: every construction with every selection at 10, 20 and 30 % of the neurons, on one task.

    python benchmarks/moefication.py minilm-sst2 --out s.jsonl --task sst2 --train train.tsv.gz --data dev.tsv.gz
    python benchmarks/moefication.py minilm-sst2 --out s.jsonl --table

Each cell is a line of JSON, appended when it is done; the same command goes on where it was cut off, and with
--seconds it stops by itself. The models are what examples/ trains. With --speed the first command only times the
dense model and one cell of each selection that ships, at 20 %, in turns, and appends a line each. --table prints
what is there as Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import moefy
from moefy.measure.evaluate import routing
from moefy.routers import ROUTERS
from moefy.sources.models import load_source
from moefy.tasks import evaluate_task, task_calibration

CONSTRUCTIONS = ("random", "weights", "coactivation")
# The paper's four; the linear one is moefy's own and runs only if --routers names it.
SELECTIONS = {"mass": "ground truth", "random": "random", "similarity": "similarity", "mlp": "MLP", "linear": "linear"}
CONTROL = "shared_only"
SHARES = (0.1, 0.2, 0.3)
TIMED = 0.2
Batches = list[dict[str, torch.Tensor]]


def cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells in the order they run: the paper's table, then the same selections after the refit."""
    size = args.expert_size
    found: list[dict[str, Any]] = [dense_cell()]
    if args.control:
        control = {"construction": CONTROL, "router": "", "refit": True, "expert_size": size}
        return found + [{**control, "active": active} for active in (0.2, 0.1, 0.3)]
    for again in (False,) if args.paper_only else (True,) if args.refit_only else (False, True):
        for active in (0.2, 0.1, 0.3):
            for construction in args.constructions:
                for router in args.routers:
                    if not (again and router == "random"):
                        cell = {"construction": construction, "router": router, "active": active, "refit": again}
                        found.append({**cell, "expert_size": size})
    return found


def dense_cell() -> dict[str, Any]:
    return {"construction": "dense", "router": "", "active": 1.0, "refit": False, "expert_size": 0}


def converted(cell: dict[str, Any], dense: Any, batches: Batches) -> tuple[Any, dict[str, Any]]:
    """The cell's model, and what its conversion took."""
    model = copy.deepcopy(dense)
    if cell["construction"] == "dense":
        return model, {}
    changes = {name: value for name, value in cell.items() if value != ""}
    report = moefy.convert(model, moefy.Recipe.of("moefication", **changes), batches)
    return model, {
        "seconds": round(report.seconds, 1),
        "seconds_layer": round(statistics.mean(x.seconds for x in report.layers), 2),
        "fraction": report.active_fraction,
        "error": statistics.mean(x.error for x in report.layers),
    }


def run(
    cell: dict[str, Any], args: argparse.Namespace, dense: Any, tokenizer: Any, batches: Batches, held: Batches
) -> dict[str, Any]:
    """Convert, measure on the task, and look at what the experts hold on held-out inputs."""
    started = time.perf_counter()
    model, made = converted(cell, dense, batches)
    result: dict[str, Any] = {**cell, "model": Path(args.model).name, "tokens": args.tokens, **made}
    result.update(evaluate_task(model, tokenizer, args.task, args.data, args.limit))
    routed = routing(model, held)
    if routed:
        for what in ("mass", "overlap", "recall"):
            result[what] = statistics.mean(getattr(r, what) for r in routed.values())
    result["whole_seconds"] = round(time.perf_counter() - started, 1)
    return result


def singles(batches: Batches, count: int = 16) -> Batches:
    """Single sentences from all over the batches, without padding."""
    rows = [(b, i) for b in batches for i in range(len(b["input_ids"]))]
    found = []
    for batch, i in rows[:: max(1, len(rows) // count)][:count]:
        long = {"": int(batch["attention_mask"][i].sum())}
        if "decoder_attention_mask" in batch:
            long["decoder_"] = int(batch["decoder_attention_mask"][i].sum())
        found.append(
            {k: v[i : i + 1, : long["decoder_" if k.startswith("decoder_") else ""]] for k, v in batch.items()}
        )
    return found


@torch.no_grad()
def seconds_of(model: Any, batches: Batches) -> float:
    start = time.perf_counter()
    for batch in batches:
        model(**batch)
    return time.perf_counter() - start


def speeds(args: argparse.Namespace, dense: Any, batches: Batches, held: Batches) -> list[dict[str, Any]]:
    """Seconds of the dense model and of one cell of each selection that ships: medians of rounds taken in turns."""
    wanted = [dense_cell()]
    for router in args.routers:
        if ROUTERS[router].ships:
            cell = {"construction": "weights", "router": router, "active": TIMED, "refit": False}
            wanted.append({**cell, "expert_size": args.expert_size})
    models = [converted(cell, dense, batches)[0] for cell in wanted]
    feeds = {"batch_seconds": held, "single_seconds": singles(held)}
    taken: list[dict[str, list[float]]] = [{what: [] for what in feeds} for _ in models]
    for turn in range(args.rounds + 1):
        for model, times in zip(models, taken, strict=True):
            for what, feed in feeds.items():
                seconds = seconds_of(model, feed)
                if turn:  # the first round packs the weights
                    times[what].append(seconds)
    common = {"speed": True, "model": Path(args.model).name, "rounds": args.rounds, "threads": torch.get_num_threads()}
    return [
        {**cell, **common, **{what: statistics.median(s) for what, s in times.items()}}
        for cell, times in zip(wanted, taken, strict=True)
    ]


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return cell["construction"], cell["router"], cell["active"], cell["refit"], cell["expert_size"]


def table(lines: list[dict[str, Any]]) -> str:
    """The Markdown table: a row a construction and selection, three columns of the main figure, then mass."""
    cells_done = [line for line in lines if not line.get("speed")]
    main = next(k for k in cells_done[0] if k in ("accuracy", "exact_match"))
    by_key = {key(line): line for line in cells_done}
    dense = by_key[key(dense_cell())]
    out = [
        f"Dense: {main.replace('_', ' ')} {dense[main]:.4f}.",
        "",
        "| experts of | construction | selection | refit | 10 % | 20 % | 30 % | mass 10 % | 20 % | 30 % "
        "| overlap 20 % | speed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    sizes = sorted({line["expert_size"] for line in cells_done if line["expert_size"]}, reverse=True)
    rows = [(s, c, r, a) for s in sizes for c in CONSTRUCTIONS for r in SELECTIONS for a in (False, True)]
    rows += [(s, CONTROL, "", True) for s in sizes]
    for size, construction, router, again in rows:
        row = [by_key.get((construction, router, active, again, size)) for active in SHARES]
        if not any(row):
            continue
        figures = [f"{r[main]:.4f} ({r[main] / dense[main]:.1%})" if r else "" for r in row]
        masses = [f"{r['mass']:.3f}" if r and router else "" for r in row]
        overlap = f"{row[1]['overlap']:.2f}" if row[1] and router else ""
        names = [construction, SELECTIONS[router]] if router else ["none: the same neurons for all tokens", ""]
        shown = [str(size), *names, "yes" if again else "", *figures, *masses, overlap]
        out.append(f"| {' | '.join([*shown, speed(lines, router, size)])} |")
    return "\n".join(out)


def speed(lines: list[dict[str, Any]], router: str, size: int) -> str:
    """How often faster than dense, batches / one sentence, by the last speed lines of this selection."""
    timed = {(line["router"], line["expert_size"]): line for line in lines if line.get("speed")}
    if not router or (router, size) not in timed or ("", 0) not in timed:
        return ""
    dense, ours = timed["", 0], timed[router, size]
    return " / ".join(f"{dense[k] / ours[k]:.2f}x" for k in ("batch_seconds", "single_seconds"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a dense ReLU checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the JSON lines")
    parser.add_argument("--table", action="store_true", help="print what --out holds and stop")
    parser.add_argument("--speed", action="store_true", help="only time: dense, and one cell a selection at 20 %%")
    parser.add_argument("--rounds", type=int, default=15, help="with --speed: rounds, of which the median is taken")
    parser.add_argument("--task")
    parser.add_argument("--train", help="the task's training data, to calibrate on")
    parser.add_argument("--data", help="the task's data to measure on")
    parser.add_argument("--limit", type=int, help="examples to measure on at most")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--expert-size", type=int, default=32)
    parser.add_argument("--constructions", nargs="+", choices=CONSTRUCTIONS, default=CONSTRUCTIONS)
    parser.add_argument("--routers", nargs="+", choices=list(SELECTIONS), default=list(SELECTIONS)[:4])
    parser.add_argument("--paper-only", action="store_true", help="leave out the refitted cells")
    parser.add_argument("--refit-only", action="store_true", help="only the refitted cells")
    parser.add_argument("--control", action="store_true", help="only the control: no routing, the refit")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no cell after so long")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    lines = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.table:
        print(table(lines))
        return
    done, start = {key(line) for line in lines if not line.get("speed")}, time.perf_counter()
    dense, tokenizer = load_source(args.model)
    batches = task_calibration(dense, tokenizer, args.task, args.train, tokens=args.tokens)
    held = task_calibration(dense, tokenizer, args.task, args.data, tokens=4096)
    if args.speed:
        append(args.out, speeds(args, dense, batches, held))
        return
    for cell in cells(args):
        if key(cell) not in done and time.perf_counter() - start < args.seconds:
            append(args.out, [run(cell, args, dense, tokenizer, batches, held)])


def append(out: Path, lines: list[dict[str, Any]]) -> None:
    with out.open("a") as file:
        for line in lines:
            print(json.dumps(line), file=file)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
