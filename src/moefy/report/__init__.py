"""The study as one HTML page: pictures inside it, nothing loaded, everything that is text escaped."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from moefy.checkpoint import why_not_written
from moefy.errors import MoefyError
from moefy.report import plots
from moefy.report.html import document, image, table, write_together
from moefy.study.preferences import SIGNIFICANT

# Rows of the tables of preferences, the strongest first.
TOKENS_SHOWN, EXPERTS_SHOWN = 5, 6


def check(folder: Path) -> None:
    """MoefyError, before a study is run, if `write` could not write its page into `folder`."""
    plots.check()
    made: list[Path] = []
    try:
        if folder.exists() and not folder.is_dir():
            raise MoefyError(f"{folder} is a file; choose a directory for study.json and study.html.")
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise MoefyError(why_not_written(error, folder)) from None
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


def write(result: dict[str, Any], folder: Path, title: str) -> tuple[Path, Path]:
    """Write study.json and study.html into `folder`, each beside its place first and then both renamed."""
    figures, drawn = folder / "study.json", folder / "study.html"
    texts = {figures: json.dumps(result, indent=1) + "\n", drawn: page(result, title)}
    folder.mkdir(parents=True, exist_ok=True)
    write_together(texts)
    return figures, drawn


def page(result: dict[str, Any], title: str) -> str:
    """The page of a study (see `moefy.study.study`)."""
    names, layers = list(result["layers"]), list(result["layers"].values())
    parts = [
        f"<h1>{escape(title)}</h1>",
        _facts(result),
        *_neurons(names, layers),
        *_experts(result, names, layers),
    ]
    return document(title, parts)


def _facts(result: dict[str, Any]) -> str:
    seen = ", ".join(
        f"{count:,} {escape(name) + ' ' if name != 'tokens' else ''}tokens in {result['sequences'][name]:,} sequences"
        for name, count in result["tokens"].items()
    )
    return f"<p>{escape(result['model'])}, {len(result['layers'])} FFNs, studied on {seen}.</p>"


def _neurons(names: list[str], layers: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            str(i + 1),
            f"<code>{escape(name)}</code>",
            f"{layer['neurons']:,}",
            f"{layer['sparsity']['mean']:.1%}",
            f"{layer['sparsity']['tokens_under_5_percent']:.1%}",
            f"{layer['activation_rates']['never']:.1%}",
            f"{layer['activation_rates']['bimodality']:.2f}",
            f"{layer['marker_rates']['bimodality']:.2f}",
        ]
        for i, (name, layer) in enumerate(zip(names, layers, strict=True))
    ]
    head = ["", "FFN", "neurons", "active, mean", "tokens under 5 %", "never fire", "bimodality", "of the top 10"]
    return [
        "<h2>Neurons</h2>",
        table(head, rows, "named"),
        "<p>A neuron is active where its activation is positive (in a gated FFN the gate's). Bimodality is Sarle's "
        "coefficient of the neurons' activation rates, and of how often they are among a token's ten strongest "
        "(CMoE's marker); above 0.56 a distribution has two humps or a long tail.</p>",
        image(plots.bands(layers), "How many neurons a token activates."),
        image(plots.cumulative(layers), "Share of tokens that activate at most a share of the neurons."),
        image(plots.rates(layers, "activation_rates", "activation rate of a neuron"), "Activation rates."),
        image(plots.rates(layers, "marker_rates", "rate among a token's ten strongest"), "Marker rates."),
    ]


def _experts(result: dict[str, Any], names: list[str], layers: list[dict[str, Any]]) -> list[str]:
    routed = [(i, n, x) for i, (n, x) in enumerate(zip(names, layers, strict=True)) if "load" in x]
    if not routed:
        none = "<h2>Experts</h2><p>Every FFN runs all of its experts or none, so nothing is chosen.</p>"
        return [none] if result["converted"] else []
    only = [x for _, _, x in routed]
    kinds = {k: title for k, title in _KINDS.items() if any(k in x["preferences"] for x in only)}
    rows = [
        [
            str(i + 1),
            f"{x['top_k']} of {x['experts']}",
            f"{x['load']['imbalance']:.2f}",
            f"{x['load']['gini']:.2f}",
            f"{x['load']['evenness']:.2f}",
            str(x["load"]["never_chosen"]),
            *(f"{x['preferences'][k]['significant']:.0%}" if k in x["preferences"] else "" for k in kinds),
        ]
        for i, _, x in routed
    ]
    head = ["", "active", "busiest / mean", "Gini", "evenness", "never chosen", *kinds.values()]
    found = [
        "<h2>Experts</h2>",
        table(head, rows),
        f"<p>The last columns: of all pairs of an expert and a class of tokens, the share whose count differs from "
        f"chance (permutation test, false discovery rate {SIGNIFICANT:.0%} over the pairs of a layer). "
        f"{' '.join(_NULLS[k] for k in kinds if k in _NULLS)}</p>",
        image(plots.loads(only), "Load of the experts."),
        image(plots.overlaps(only), "Experts that two tokens have in common."),
        "<h2>From layer to layer</h2>",
    ]
    for pair in result["between_layers"]:
        caption = f"{pair['first']} (down) and {pair['second']} (across); strongest correlation {pair['strongest']:.2f}"
        picture = image(plots.matrix(pair["lift"], "expert of the next layer", "expert"), "Joint choices over chance.")
        found.append(f"<details><summary>{escape(caption)}</summary>{picture}</details>")
    found.append(
        "<h2>What experts prefer</h2><p>How much oftener than over all tokens the experts with the strongest "
        "preferences run for a class of tokens. Bold: more or less than chance, as above.</p>"
    )
    for i, name, layer in routed:
        found.append(
            f"<details{' open' if i == routed[0][0] else ''}><summary>{escape(f'Layer {i + 1}: {name}')}</summary>"
        )
        found += [_kind(layer["preferences"][k], title) for k, title in _KINDS.items() if k in layer["preferences"]]
        found.append("</details>")
    return found


_KINDS = {"part": "part of the sequence", "frequency": "frequency", "label": "label", "token": "token"}
# What chance is taken to be; the sentence on frequencies is on tokens too.
_NULLS = {
    "part": "Parts of a sequence are turned round within it, so chance is a choice that does not depend on the "
    "place, however alike neighbours choose.",
    "frequency": "For frequencies and tokens chance is that every token chooses for itself. Equal and neighbouring "
    "tokens choose alike, so these shares are upper bounds.",
    "label": "Labels go from sequence to sequence, so chance is that sequences do not choose by their label.",
}


def _kind(found: dict[str, Any], title: str) -> str:
    strongest, heading = _strongest(found, EXPERTS_SHOWN), f"<h3>{escape(title.capitalize())}</h3>"
    if not strongest:
        return f"{heading}<p>Nothing beyond chance.</p>"
    if len(found["classes"]) <= 8:
        rows = [[f"{e}", *(_lift(v, q) for v, q in zip(lifts, qs, strict=True))] for e, lifts, qs in strongest]
        return heading + table(["expert", *map(escape, found["classes"])], rows)
    rows = []
    for e, lifts, qs in strongest:
        preferred = [c for c in range(len(lifts)) if lifts[c] > 1 and qs[c] < SIGNIFICANT]
        order = sorted(preferred, key=lambda c: -lifts[c])[:TOKENS_SHOWN]
        shown = " ".join(f"<code>{escape(found['classes'][c])}</code> {lifts[c]:.1f}x" for c in order)
        rows.append([str(e), shown])
    return heading + table(["expert", "preferred, over its mean"], rows, "text")


def _strongest(found: dict[str, Any], count: int) -> list[tuple[int, list[float], list[float]]]:
    """The experts that prefer anything beyond chance, the highest lift first: number, lifts, q-values."""
    rows = [(e, lift, q) for e, (lift, q) in enumerate(zip(found["lift"], found["q"], strict=True))]

    def strength(row: tuple[int, list[float], list[float]]) -> float:
        return max((v for v, q in zip(row[1], row[2], strict=True) if q < SIGNIFICANT), default=0.0)

    return sorted((row for row in rows if strength(row) > 1), key=lambda row: -strength(row))[:count]


def _lift(value: float, q: float) -> str:
    return f"<b>{value:.2f}</b>" if q < SIGNIFICANT else f"{value:.2f}"
