"""A comparison of recipes (`moefy.measure.compare`) as a table, in Markdown and as one HTML page with plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moefy.report import plots
from moefy.report.html import document, image, table, write_whole


def write(settings: dict[str, Any], base: dict[str, Any], lines: Sequence[dict[str, Any]], path: Path) -> Path:
    """Write the page; `settings`, the dense model's line and the runs' lines as `moefy.measure.compare` has them."""
    return write_whole(path, page(settings, base, lines))


def page(settings: dict[str, Any], base: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    """The page: table, what was left out, a figure for each text, how it was measured."""
    title = f"Recipes compared: {settings['model']}"
    head, rows = cells(base, lines)
    parts = [
        f"<h1>{escape(title)}</h1>",
        table([escape(h) for h in head], [[escape(c) for c in row] for row in rows]),
        f"<p>{escape(_LEGEND)}</p>",
        *_left_out(lines),
    ]
    groups, speed = summarise(lines), dense_speed(lines, "decode")
    for text in base["perplexity"]:
        drawn = plots.ratios([g for g in groups if math.isfinite(g["ratio"][text][0])], text, speed)
        parts += [f"<h2>{escape(text)}</h2>", image(drawn, "Perplexity over the dense model's; bars: one deviation.")]
    parts += ["<h2>How it was measured</h2>", "<ul>", *(f"<li>{escape(s)}</li>" for s in _protocol(settings)), "</ul>"]
    return document(title, parts)


def markdown(base: dict[str, Any], lines: Sequence[dict[str, Any]]) -> str:
    """The same table for a terminal or a README."""
    head, rows = cells(base, lines)
    wanted = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    shown = "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in wanted)
    skipped = "".join(f"\n- {what}: {why}" for what, why in _skipped(lines).items())
    return f"{shown}\n\n{_LEGEND}" + (f"\n\nLeft out:\n{skipped}" if skipped else "")


_LEGEND = (
    "Texts: perplexity of the dense model, and over it for the others; ± is the sample standard deviation over seeds. "
    "Active: share of FFN multiply-adds asked for, and realised on the texts, routers included."
)


def summarise(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that were measured, seeds put together: one entry for each recipe and active fraction.

    `realised` and `ratio` are by text. Each figure is (mean, sample standard deviation), the latter None for
    one seed; `decode` and `prefill` are tokens a second with their speedup, None where nothing was timed.
    """
    measured = [line for line in lines if "ratio" in line]
    recipes = list(dict.fromkeys(line["recipe"] for line in measured))
    fractions = list(dict.fromkeys(line["active"] for line in measured))
    found = []
    for recipe in recipes:
        for active in fractions:
            group = [line for line in measured if (line["recipe"], line["active"]) == (recipe, active)]
            if group:
                found.append({"recipe": recipe, "active": active, "seeds": len(group), **_figures(group)})
    return found


def _figures(group: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = [line["speed"] for line in group if line["speed"]]
    found: dict[str, Any] = {
        **{
            key: {name: _spread([line[key][name] for line in group]) for name in group[0][key]}
            for key in ("realised", "ratio")
        },
        "weight_bytes": speeds[0]["weight_bytes"]["model"] if speeds else None,
    }
    for case in ("decode", "prefill"):
        timed = [speed[case]["model"] for speed in speeds if case in speed]
        keys = ("tokens_per_second", "speedup")
        found[case] = {key: _spread([t[key] for t in timed]) for key in keys} if timed else None
    return found


def _spread(values: list[float]) -> tuple[float, float | None]:
    finite = all(map(math.isfinite, values))
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 and finite else None


def dense_speed(lines: Iterable[dict[str, Any]], case: str) -> float | None:
    """The dense model's tokens a second: the median over the runs beside which it was timed."""
    found = [line["speed"][case]["dense"]["tokens_per_second"] for line in lines if case in (line.get("speed") or ())]
    return statistics.median(found) if found else None


def cells(base: dict[str, Any], lines: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The table as plain text: its head and its rows, the dense model first."""
    texts = list(base["perplexity"])
    head = ["recipe", "active", "realised", *texts, "decode, tokens/s", "prefill, tokens/s", "weights, MiB", "seeds"]
    dense = [f"{value:.2f}" for value in base["perplexity"].values()]
    speeds = [_plain(dense_speed(lines, case)) for case in ("decode", "prefill")]
    sizes = [line["speed"]["weight_bytes"]["dense"] for line in lines if line.get("speed")]
    rows = [["dense", "", "", *dense, *speeds, _mebibytes(sizes[0] if sizes else None), ""]]
    for group in summarise(lines):
        rows.append(
            [
                group["recipe"],
                f"{group['active']:.0%}",
                " / ".join(dict.fromkeys(f"{group['realised'][text][0]:.1%}" for text in texts)),
                *(_mean(group["ratio"][text], _digits(group["ratio"][text][0])) for text in texts),
                *(_speed(group[case]) for case in ("decode", "prefill")),
                _mebibytes(group["weight_bytes"]),
                str(group["seeds"]),
            ]
        )
    return head, rows


def _mean(value: tuple[float, float | None], digits: int) -> str:
    mean, deviation = value
    return f"{mean:,.{digits}f}" + ("" if deviation is None else f" ± {deviation:,.{digits}f}")


def _digits(ratio: float) -> int:
    """Decimals of a perplexity over dense: 1.234, 12.3, 1,234."""
    return 3 if ratio < 10 else 1 if ratio < 100 else 0


def _speed(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return "–"
    return f"{figures['tokens_per_second'][0]:.1f} ({_mean(figures['speedup'], 2)}x)"


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _mebibytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:.0f}"


def _skipped(lines: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Why runs were left out, by recipe and fraction (the seeds say the same)."""
    return {f"{line['recipe']} at {line['active']:.0%}": line["skipped"] for line in lines if "skipped" in line}


def _left_out(lines: Iterable[dict[str, Any]]) -> list[str]:
    found = _skipped(lines)
    items = [f"<li>{escape(what)}: {escape(why)}</li>" for what, why in found.items()]
    return ["<h2>Left out</h2>", "<ul>", *items, "</ul>"] if found else []


def _protocol(settings: dict[str, Any]) -> list[str]:
    calibration, machine = settings["calibration"], settings["machine"]
    count, window = calibration["pool"]
    taken = min(calibration["taken"], count)
    return [
        f"Calibration: {taken} windows of {window} tokens, drawn by the seed from {count}.",
        *(
            f"{name}: perplexity over {t['windows'][0]} windows of {t['windows'][1]} tokens, each on its own, "
            f"{settings['prefix']} special tokens before each."
            for name, t in settings["texts"].items()
        ),
        "The seed also decides what a recipe leaves to chance.",
        f"Speed: medians of {settings['rounds']} rounds, each model timed in turns with the dense one; "
        f"dense: the median over all runs. Oracles are not timed."
        if settings["rounds"]
        else "Speed was not measured.",
        ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in {**machine, **settings["versions"]}.items())
        + ".",
    ]
