"""The picture beside a calibration: errors by lag, what remains by noise, and network calls."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def plot(found: Mapping[str, Any]) -> bytes:
    """Return the evidence that `calibration.calibrate` found, with the rules under `rules`, as a PNG."""
    figure = Figure(figsize=(12.5, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 1.3, 0.8))
    _errors(left, found)
    _levels(middle, found)
    _calls(right, found)
    figure.suptitle(f"{found['checkpoint']['path']}: {_chosen(found['warm_start'])}", fontsize="medium")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _errors(axes: Axes, found: Mapping[str, Any]) -> None:
    lags = found["lags"]
    for i, dimension in enumerate(found["dimensions"]):
        steps = [row["lag"] for row in lags]
        (line,) = axes.plot(steps, [row["error"][i] for row in lags], marker="o", markersize=3, label=dimension["name"])
        axes.plot(steps, [row["median_error"][i] for row in lags], color=line.get_color(), linewidth=0.7)
        axes.plot(steps, [row["spread"][i] for row in lags], color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(
        xlabel="lag, control steps",
        ylabel="network units",
        title=f"guess beyond fresh chunks: {found['rules']['quantile']:.0%} quantile,\nmedian (thin), spread (dotted)",
    )
    axes.title.set_fontsize("small")
    axes.legend(fontsize="x-small", frameon=False)


def _levels(axes: Axes, found: Mapping[str, Any]) -> None:
    levels = found["levels"]
    noise = [row["noise_over_signal"] for row in levels]
    axes.plot(noise, [row["law"] for row in levels], label="stays, closed form")
    axes.plot(noise, [row["measured"] for row in levels], marker="o", markersize=3, label="stays, measured after one")
    if any(row["switches"] for row in levels):
        axes.plot(noise, [row["switches"] for row in levels], linestyle="--", label="changes mode, probability")
    axes.axvline(found["noise_over_signal"], color="grey", label="chosen")
    axes.axhline(found["rules"]["tolerance"], color="grey", linestyle=":", label="tolerance")
    axes.set(xscale="log", xlabel="noise over signal where it restarts", title=f"error that stays, lag {found['lag']}")
    axes.title.set_fontsize("small")
    axes.legend(fontsize="x-small", frameon=False)


def _calls(axes: Axes, found: Mapping[str, Any]) -> None:
    lists = found["lists"]
    axes.bar([str(row["network_calls"]) for row in lists], [row["measured"] for row in lists], color="C1", width=0.5)
    axes.axhline(found["rules"]["tolerance"], color="grey", linestyle=":")
    axes.set(xlabel="network calls", title="error that stays, measured")
    axes.title.set_fontsize("small")


def _chosen(warm_start: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in warm_start.items())
