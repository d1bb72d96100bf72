"""The figures, drawn by matplotlib as PNG. Text of the model's never becomes part of a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from moefy.errors import MoefyError

WIDTH, DPI = 8.0, 110
_BLUE, _ORANGE = "#2f5d8a", "#d9822b"
_COLORS = (_BLUE, _ORANGE, "#3c8d5a", "#a94442", "#7a5ca8", "#555555", "#17a2b8", "#c2b000")
_MARKERS = "os^DvPX"


def check() -> None:
    """MoefyError if there is nothing to draw with: now, rather than after hours of work."""
    try:
        import matplotlib  # noqa: F401 - whether it is there
    except ImportError:
        raise MoefyError("Plots need matplotlib, an extra (report): pip install matplotlib.") from None


def _figure(height: float, **options: Any) -> tuple[Any, Any]:
    check()
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(**options)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _tick_layers(axes: Any, layers: range) -> None:
    """A tick a layer, unless they are too many to read."""
    if len(layers) < 25:
        axes.set_xticks(layers)


def bands(layers: Sequence[dict[str, Any]]) -> bytes:
    """The share of neurons that a token activates, layer by layer: median, the middle half, 5 to 95 %."""
    figure, axes = _figure(3.2)
    x = range(1, len(layers) + 1)
    q = [layer["sparsity"]["quantiles"] for layer in layers]
    axes.fill_between(x, [v["0.05"] for v in q], [v["0.95"] for v in q], color=_BLUE, alpha=0.15, label="5 to 95 %")
    axes.fill_between(x, [v["0.25"] for v in q], [v["0.75"] for v in q], color=_BLUE, alpha=0.35, label="middle half")
    axes.plot(x, [v["0.5"] for v in q], color=_BLUE, marker="o", markersize=3, label="median")
    axes.set(xlabel="layer", ylabel="share of neurons a token activates")
    _tick_layers(axes, x)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _png(figure)


def cumulative(layers: Sequence[dict[str, Any]]) -> bytes:
    """Share of tokens that activate at most so many neurons, a line a layer (MoEfication, figure 1)."""
    import numpy as np

    figure, axes = _figure(3.2)
    right = 0.1
    for i, layer in enumerate(layers):
        total = np.cumsum(layer["sparsity"]["histogram"])
        edges = np.linspace(0, 1, len(total) + 1)
        axes.plot(edges, [0, *total], color=_shade(i, len(layers)), linewidth=1.2)
        right = max(right, float(np.max(edges[1:][total < 0.9999], initial=0)) + 2 / len(total))
    axes.axvline(0.05, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="share of neurons (dotted: 5 %)", ylabel="share of tokens", xlim=(0, min(1, right)))
    _layer_scale(figure, axes, len(layers))
    return _png(figure)


def rates(layers: Sequence[dict[str, Any]], key: str, what: str) -> bytes:
    """How many neurons have each activation rate, a line a layer, on a logarithmic scale."""
    import numpy as np

    figure, axes = _figure(3.0)
    for i, layer in enumerate(layers):
        values = np.asarray(layer[key]["histogram"])
        centres = (np.arange(len(values)) + 0.5) / len(values)
        # The points are for bins that stand alone, which have no line.
        shown = np.where(values > 0, values, np.nan)
        axes.plot(centres, shown, color=_shade(i, len(layers)), linewidth=1.2, marker=".", markersize=4)
    axes.set_yscale("log")
    axes.set(xlabel=what, ylabel="share of neurons")
    _layer_scale(figure, axes, len(layers))
    return _png(figure)


def loads(layers: Sequence[dict[str, Any]]) -> bytes:
    """Each layer's experts by load, the busiest first, over the mean load."""
    figure, axes = _figure(3.0)
    for i, layer in enumerate(layers):
        share = sorted(layer["load"]["share"], reverse=True)
        axes.plot(
            range(1, len(share) + 1), [s * len(share) for s in share], color=_shade(i, len(layers)), linewidth=1.2
        )
    axes.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="expert, the busiest first", ylabel="load over the mean")
    _layer_scale(figure, axes, len(layers))
    return _png(figure)


def overlaps(layers: Sequence[dict[str, Any]]) -> bytes:
    """Experts that two tokens have in common: neighbours, tokens of other sequences, chance."""
    figure, axes = _figure(3.0)
    x = range(1, len(layers) + 1)
    for key, label, style in (
        ("neighbours", "neighbouring tokens", {"color": _BLUE, "marker": "o"}),
        ("other_sequences", "tokens of different sequences", {"color": _ORANGE, "marker": "s"}),
        ("chance", "chance", {"color": "grey", "linestyle": ":"}),
    ):
        axes.plot(x, [layer["between_inputs"][key] for layer in layers], label=label, markersize=3, **style)
    axes.set(xlabel="layer", ylabel="share of experts in common")
    _tick_layers(axes, x)
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    return _png(figure)


def matrix(rows: Sequence[Sequence[float]], x: str, y: str) -> bytes:
    """A lift matrix: blue below what independence gives, red above, white at 1."""
    import numpy as np

    values = np.log2(np.clip(np.asarray(rows, dtype=float), 0.125, 8))
    figure, axes = _figure(min(6.0, max(2.2, 0.08 * len(rows) + 1.2)))
    image = axes.imshow(values, cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, ticks=[-3, -2, -1, 0, 1, 2, 3])
    bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axes.set(xlabel=x, ylabel=y)
    return _png(figure)


def _shade(i: int, count: int) -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"](i / max(1, count - 1) * 0.9)


def _layer_scale(figure: Any, axes: Any, count: int) -> None:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    shades = matplotlib.colors.ListedColormap([_shade(i, count) for i in range(count)])
    ticks = range(1, count + 1, -(-count // 12))
    figure.colorbar(ScalarMappable(Normalize(0.5, count + 0.5), shades), ax=axes, label="layer", ticks=list(ticks))


def ratios(groups: Sequence[dict[str, Any]], text: str, dense_speed: float | None) -> bytes:
    """Perplexity over the dense model's on one text, a line a recipe: by active fraction, and by decoding speed.

    `groups` as `compare_page.summarise` makes them.
    """
    figure, axes = _figure(4.2, ncols=2, sharey=True)
    from matplotlib.ticker import LogFormatter

    for i, recipe in enumerate(dict.fromkeys(group["recipe"] for group in groups)):
        style: dict[str, Any] = {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i % len(_MARKERS)]}
        style |= {"markersize": 4, "linewidth": 1.2, "capsize": 2}
        mine = [group for group in groups if group["recipe"] == recipe]
        timed = [group for group in mine if group["decode"]]
        for panel, chosen, x in (
            (axes[0], mine, [group["realised"][text][0] for group in mine]),
            (axes[1], timed, [group["decode"]["tokens_per_second"][0] for group in timed]),
        ):
            y = [group["ratio"][text] for group in chosen]
            bars = [deviation or 0.0 for _, deviation in y]
            if chosen:
                panel.errorbar(x, [mean for mean, _ in y], yerr=bars, label=_short(recipe), **style)
    axes[0].plot([1], [1], color="black", marker="*", markersize=9, linestyle="")
    if dense_speed:
        axes[1].plot([dense_speed], [1], color="black", marker="*", markersize=9, linestyle="")
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter(LogFormatter())
    axes[0].yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes[0].set(xlabel="share of FFN multiply-adds active", ylabel="perplexity over dense (star)")
    axes[1].set_xlabel("decode, tokens a second")
    for panel in axes:
        panel.grid(alpha=0.3, which="both")
    if groups:
        # A name with dollar signs is a name and no formula.
        for label in axes[0].legend(frameon=False, fontsize="small").get_texts():
            label.set_parse_math(False)
    return _png(figure)


def _short(name: str) -> str:
    return name if len(name) <= 32 else f"…{name[-31:]}"
