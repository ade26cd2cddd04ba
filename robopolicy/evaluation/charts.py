"""The drawings of a report, as inline SVG that takes its text colour from the page (light, dark, print)."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

BLUE, ORANGE, GREY = "#3b82f6", "#f59e0b", "#8a8f98"
INK = "#010203"
"""Stands for the page's text colour until the drawing is finished."""
MOST_POINTS = 500
Curve = tuple[Sequence[float], Sequence[float]]
"""Steps and values."""


def loss_chart(train: Curve, val: Curve | None) -> str:
    """Draw the losses over steps with a logarithmic axis; the training loss smoothed, with its raw points behind."""
    figure, axes = _figure()
    steps, loss = (np.asarray(side, float) for side in train)
    keep = np.isfinite(loss) & (loss > 0)
    steps, loss = _thinned(steps[keep], loss[keep])
    raw = len(loss) > 100
    if raw:
        axes.plot(steps, loss, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smoothed(loss) if raw else loss, color=BLUE, linewidth=1.6, label="training")
    if val is not None:
        axes.plot(*val, color=ORANGE, linewidth=1.6, marker="o", markersize=3, label="held-out episodes")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"))
    low, high = axes.get_ylim()
    if high / low < 30:  # less than a decade or so: minor ticks are the only ones, so they need names
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda y, _: f"{y:.2g}" if str(f"{y:.0e}")[0] in "125" else ""))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.2g}"))
    else:
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, labelcolor=INK, loc="upper right")
    return _svg(figure, "loss")


def histogram(values: Sequence[float], *, xlabel: str, ylabel: str, marks: Sequence[tuple[str, float]] = ()) -> str:
    """Draw how often which value came; `marks` are named vertical lines, such as the median."""
    figure, axes = _figure()
    data = np.asarray(values, float)
    top = max([np.percentile(data, 99) * 1.05, *(value for _, value in marks)])
    shown = np.minimum(data, top)  # the last bar holds the rare long ones
    bins = int(np.clip(np.sqrt(len(data)) * 1.5, 5, 40))
    if np.all(data == data.round()):  # bars of equally many whole numbers, or some would look empty
        width = max(1, round(float(np.ptp(data)) / bins))
        edges = np.arange(data.min() - 0.5, data.max() + 0.5 + width, width)
        axes.hist(data, bins=edges.tolist(), color=BLUE, alpha=0.85, rwidth=0.92)
    else:
        axes.hist(shown, bins=bins, color=BLUE, alpha=0.85, rwidth=0.92)
    for i, (name, value) in enumerate(marks):
        axes.axvline(value, color=ORANGE, linewidth=1.5, linestyle=("-", "--", ":")[i % 3], label=f"{name} {value:.3g}")
    if marks:
        axes.legend(frameon=False, labelcolor=INK, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderpad=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    return _svg(figure, re.sub(r"\W+", "-", f"{xlabel}-{ylabel}"))


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(which="both", color=GREY, labelcolor=INK, labelsize=9)
    axes.grid(axis="y", color=GREY, alpha=0.2, linewidth=0.8)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(INK)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    options: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": name, "text.color": INK, "font.size": 9}
    with matplotlib.rc_context(options):
        for axes in figure.axes:
            for text in axes.texts:
                text.set_color(INK)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="(figure|axes|patch|line2d|text|matplotlib|xtick|ytick|legend|PolyCollection)[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 var(--font)", svg)
    return svg.replace(INK, "currentColor")


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average groups of neighbours until at most MOST_POINTS are left."""
    group = -(-len(x) // MOST_POINTS) if len(x) else 1
    if group <= 1:
        return x, y
    cuts = np.arange(0, len(x), group)
    size = np.diff([*cuts, len(x)])
    return np.add.reduceat(x, cuts) / size, np.add.reduceat(y, cuts) / size


def _smoothed(y: np.ndarray, *, share: float = 0.02) -> np.ndarray:
    """Return the exponential moving average of log(y) over `share` of the points, unbiased at the start."""
    keep = np.exp(-1 / max(1.0, share * len(y)))
    level, weight, out = 0.0, 0.0, np.empty_like(y)
    for i, value in enumerate(np.log(y)):
        level, weight = keep * level + (1 - keep) * value, keep * weight + (1 - keep)
        out[i] = level / weight
    return np.exp(out)
