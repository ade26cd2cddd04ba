"""What `robopolicy bench latency` says: its table, its files, its picture."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the rows and the floors."""
    from rich.table import Table

    title = f"one tick at batch 1, {result['threads']} thread(s), ms"
    table = Table(title=title, title_justify="left")
    numbers = "network calls,median,p95,p99,first tick,in policy,tick / bare,x eager,x DDPM-100,success"
    for column in ("engine", "sampler", *numbers.split(",")):
        table.add_column(column, justify="left" if column in ("engine", "sampler") else "right")
    for row in result["rows"]:
        ratios = [row[key] for key in ("over_bare_calls", "faster_than_eager", "faster_than_ddpm_100")]
        success = row["success"]
        table.add_row(
            row["engine"],
            row["sampler"],
            f"{row['network_calls']:.3g}",
            *(f"{row[key]:.2f}" for key in ("median_ms", "p95_ms", "p99_ms", "first_tick_ms", "policy_ms")),
            *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            "" if success is None else f"{success['n_success']}/{success['n_episodes']}",
        )
    for floor in result["floors"]:
        table.add_row(
            floor["engine"],
            floor["sampler"],
            f"{floor['network_calls']:.3g}",
            *(f"{floor[key]:.2f}" for key in ("median_ms", "p95_ms", "p99_ms")),
            *[""] * 6,
            style="dim",
        )
    console.print(table)


def write(stem: Path, result: Mapping[str, Any], console: Console) -> None:
    """Write `stem`.json, and `stem`.png where success is known."""
    from robopolicy import atomic

    stem.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_file(stem.with_suffix(".json"), (json.dumps(result, indent=2) + "\n").encode())
    written = [str(stem.with_suffix(".json"))]
    if any(row["success"] for row in result["rows"]):
        atomic.write_file(stem.with_suffix(".png"), plot(result))
        written.append(str(stem.with_suffix(".png")))
    else:
        console.print("no plot of success: success_episodes=100, or evaluations, would give it")
    console.print(f"wrote [bold]{', '.join(written)}[/]")


def plot(result: Mapping[str, Any]) -> bytes:
    """Return a picture (PNG) of success against the median latency, one colour per engine."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    markers = dict(zip(dict.fromkeys(row["sampler"] for row in result["rows"]), "osD^vPX*<>", strict=False))
    colours = dict(zip(dict.fromkeys(row["engine"] for row in result["rows"]), ("C0", "C1", "C2"), strict=False))
    for row in result["rows"]:
        if row["success"] is None:
            continue
        n, (low, high) = row["success"]["n_episodes"], row["success"]["ci95"]
        share = row["success"]["n_success"] / n
        axes.errorbar(
            row["median_ms"],
            100 * share,
            yerr=[[100 * (share - low)], [100 * (high - share)]],
            marker=markers[row["sampler"]],
            color=colours[row["engine"]],
            linestyle="none",
            elinewidth=0.7,
        )
    for name, marker in markers.items():
        axes.plot([], [], marker=marker, color="grey", linestyle="none", label=name)
    for name, colour in colours.items():
        axes.plot([], [], color=colour, label=name)
    axes.axvline(result["control_period_ms"], color="grey", linestyle=":", label="control period")
    axes.set(xscale="log", xlabel=f"one tick at batch 1, median ms, {result['threads']} thread(s)", ylabel="success, %")
    axes.legend(fontsize="small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()
