"""The study's figures, drawn by matplotlib as PNG. Text of the model's never becomes part of a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from moefy.types import MoefyError

WIDTH, DPI = 8.0, 110
_BLUE, _ORANGE = "#2f5d8a", "#d9822b"


def _figure(height: float, **options: Any) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ImportError:
        raise MoefyError("Plots need matplotlib: pip install 'moefy[report]'.") from None
    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(**options)


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def bands(layers: Sequence[dict[str, Any]]) -> bytes:
    """The share of neurons that a token activates, layer by layer: median, the middle half, 5 to 95 %."""
    figure, axes = _figure(3.2)
    x = range(1, len(layers) + 1)
    q = [layer["sparsity"]["quantiles"] for layer in layers]
    axes.fill_between(x, [v["0.05"] for v in q], [v["0.95"] for v in q], color=_BLUE, alpha=0.15, label="5 to 95 %")
    axes.fill_between(x, [v["0.25"] for v in q], [v["0.75"] for v in q], color=_BLUE, alpha=0.35, label="middle half")
    axes.plot(x, [v["0.5"] for v in q], color=_BLUE, marker="o", markersize=3, label="median")
    axes.set(xlabel="layer", ylabel="share of neurons a token activates", xticks=list(x) if len(layers) < 25 else None)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _png(figure)


def cumulative(layers: Sequence[dict[str, Any]]) -> bytes:
    """Share of tokens that activate at most so many neurons, a line a layer (MoEfication, figure 1)."""
    import numpy as np

    figure, axes = _figure(3.2)
    for i, layer in enumerate(layers):
        total = np.cumsum(layer["sparsity"]["histogram"])
        edges = np.linspace(0, 1, len(total) + 1)
        axes.plot(edges, [0, *total], color=_shade(i, len(layers)), linewidth=1.2)
    axes.axvline(0.05, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="share of neurons (dotted: 5 %)", ylabel="share of tokens that activate at most so many")
    _layer_scale(figure, axes, len(layers))
    return _png(figure)


def rates(layers: Sequence[dict[str, Any]], key: str, what: str) -> bytes:
    """How many neurons have each activation rate, a line a layer, on a logarithmic scale."""
    import numpy as np

    figure, axes = _figure(3.0)
    for i, layer in enumerate(layers):
        values = np.asarray(layer[key]["histogram"])
        centres = (np.arange(len(values)) + 0.5) / len(values)
        axes.plot(centres, np.where(values > 0, values, np.nan), color=_shade(i, len(layers)), linewidth=1.2)
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
    axes.set(xlabel="layer", ylabel="share of experts in common", xticks=list(x) if len(layers) < 25 else None)
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
    figure.colorbar(ScalarMappable(Normalize(0.5, count + 0.5), shades), ax=axes, label="layer")
