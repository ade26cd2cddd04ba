"""Measure the engines on the published PickCube policy and put the table into docs/latency_engines.md.

    python scripts/bench_latency.py                  # about ten minutes, most of them for building graphs
    python scripts/bench_latency.py real_time=true   # undisturbed by other work; needs the right to (root has it)
    python scripts/bench_latency.py --networks       # other networks, untrained: does the overhead vanish in them?
    python scripts/bench_latency.py --plot           # only draw success against latency anew

Further words are settings of `robopolicy bench latency`. The times are those of the published policy's network, which
is that of every policy in docs/rti.json; so the picture, docs/images/success_latency.png, sets that file's success
rates of several tasks against them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from robopolicy.app.build import build_policy
from robopolicy.app.composing import compose
from robopolicy.evaluation.statistics import wilson_interval
from robopolicy.training import checkpoint

DOCS = Path(__file__).parents[1] / "docs"
STEM = DOCS / "latency_engines"
PICTURE = DOCS / "images" / "success_latency.png"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
SAMPLERS = "ddpm_100,ddpm_25,ddim_10,ddim_4,ddim_2,ddim_1,rti,rti_3,rti_2,rti_1,rti_adaptive"
DEFAULTS = ("rounds=20", "ticks=15", f"samplers=[{SAMPLERS}]")
NETWORKS = ("diffusion", "diffusion_wide", "diffusion_unet", "diffusion_dit")
ARMS = {  # arm of docs/rti.json: sampler whose tick it takes, marker
    "DDPM-100, chunk 8": ("ddpm_100", "s"),
    "DDPM-100, chunk 1": ("ddpm_100", "o"),
    "DDIM-4, chunk 8": ("ddim_4", "D"),
    "DDIM-4, chunk 1": ("ddim_4", "^"),
    "DDIM-1, chunk 1": ("ddim_1", "v"),
    "rti_paper": ("rti_3", "P"),
    "rti": ("rti", "*"),
    "rti [0], 1 call": ("rti_1", "X"),
}


def table(result: dict[str, Any]) -> str:
    """Return the rows of a result as markdown."""
    machine = result["machine"]
    lines = [
        f"{machine['cpu']}, {result['threads']} of {machine['num_cpus']} cores used, torch "
        f"{result['versions']['torch']}; {result['rounds']} rounds of {result['ticks_per_round']} ticks"
        f"{', real-time scheduling' if result.get('real_time') else ''}.",
        "",
        "| engine | sampler | calls | median ms | p95 | p99 | first tick | tick / bare | policy / bare | x eager | "
        "x DDPM-100 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ratios = [row["over_bare_calls"], row["policy_over_bare_calls"], row["faster_than_eager"]]
        numbers = [row["median_ms"], row["p95_ms"], row["p99_ms"], row["first_tick_ms"], *ratios]
        cells = [f"{row['network_calls']:.3g}", *("" if n is None else f"{n:.2f}" for n in numbers)]
        faster = row["faster_than_ddpm_100"]
        cells.append("" if faster is None else f"{faster:.1f}")
        lines.append(f"| {row['engine']} | {row['sampler']} | {' | '.join(cells)} |")
    bare = "; ".join(f"{row['engine']} {row['sampler']} {row['median_ms']:.2f} ms" for row in result["floors"])
    return "\n".join([*lines, "", f"Bare network calls: {bare}.", ""])


def networks(settings: list[str]) -> None:
    """Print how long a warm-started tick takes with other networks, over as many bare calls."""
    loaded = checkpoint.load("pick_cube-diffusion", build_policy)
    print("| policy | million weights | sampler | tick, median ms | tick / bare |\n|---|---|---|---|---|")
    for name in NETWORKS:
        config = OmegaConf.to_container(compose("train", [f"policy={name}", "task=pick_cube"]).policy, resolve=True)
        policy = build_policy(config, loaded.spec)  # type: ignore[arg-type]
        policy.norm.load_state_dict(loaded.policy.norm.state_dict())
        weights = sum(one.numel() for one in policy.parameters()) / 1e6
        with tempfile.TemporaryDirectory() as folder:
            saved = {"policy": config, "data": {}, "train": {}}
            step = checkpoint.save(Path(folder) / "run", step=0, policy=policy, config=saved)
            words = [f"checkpoint={step}", "engines=[onnx]", "samplers=[rti,rti_3]", f"out={folder}/out", *settings]
            subprocess.run([sys.executable, "-m", "robopolicy", "bench", "latency", *words], check=True)
            rows = json.loads(Path(f"{folder}/out.json").read_text())["rows"]
        for row in rows:
            numbers = f"{row['median_ms']:.2f} | {row['over_bare_calls']:.2f}"
            print(f"| {name} | {weights:.1f} | {row['sampler']} | {numbers} |", flush=True)


def draw(latency: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the picture: success of the arms of every task against the median tick of each engine."""
    rows = [row for row in rows if row["group"] == "main" and row["arm"] in ARMS and row["disturbance"] is None]
    runs = list(dict.fromkeys(row["run"] for row in rows))
    figure = Figure(figsize=(3.1 * len(runs) + 1.9, 3.6), layout="constrained")
    panels = figure.subplots(1, len(runs), sharex=True, squeeze=False)[0]
    ms = {(row["engine"], row["sampler"]): row["median_ms"] for row in latency["rows"]}
    engines = {engine: f"C{i}" for i, engine in enumerate(dict.fromkeys(engine for engine, _ in ms))}
    for axes, run in zip(panels, runs, strict=True):
        for row in (row for row in rows if row["run"] == run):
            for engine, colour in engines.items():
                _point(axes, ms.get((engine, ARMS[row["arm"]][0])), row, colour)
        axes.axvline(latency["control_period_ms"], color="grey", linestyle=":")
        axes.set(xscale="log", title=run, xlabel="one tick, median ms")
        axes.title.set_fontsize("small")
    panels[0].set_ylabel("success, %, and 95 % interval")
    for arm, (_, marker) in ARMS.items():
        panels[-1].plot([], [], marker=marker, color="grey", linestyle="none", label=arm)
    for engine, colour in engines.items():
        panels[-1].plot([], [], color=colour, label=engine)
    panels[-1].plot([], [], color="grey", linestyle=":", label="control period")
    panels[-1].legend(fontsize="x-small", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=130)
    print(f"wrote {PICTURE}")


def _point(axes: Axes, ms: float | None, row: Mapping[str, Any], colour: str) -> None:
    if ms is None:
        return
    n, hits = row["n"], row["success"].count("1")
    low, high = wilson_interval(hits, n)
    share = hits / n
    error = [[100 * (share - low)], [100 * (high - share)]]
    marker = ARMS[row["arm"]][1]
    axes.errorbar(ms, 100 * share, yerr=error, marker=marker, color=colour, linestyle="none", elinewidth=0.6, ms=5)


def main(words: list[str]) -> None:
    settings = [word for word in words if not word.startswith("--")]
    if "--networks" in words:
        networks(settings)
        return
    if "--plot" not in words:
        given = {word.partition("=")[0] for word in settings}
        defaults = [word for word in DEFAULTS if word.partition("=")[0] not in given]
        subprocess.run(
            [sys.executable, "-m", "robopolicy", "bench", "latency", f"out={STEM}", *defaults, *settings], check=True
        )
        page = STEM.with_suffix(".md")
        before, _, rest = page.read_text().partition(BEGIN)
        result = json.loads(STEM.with_suffix(".json").read_text())
        page.write_text(before + BEGIN + table(result) + END + rest.partition(END)[2])
    draw(json.loads(STEM.with_suffix(".json").read_text()), json.loads((DOCS / "rti.json").read_text())["rows"])


if __name__ == "__main__":
    main(sys.argv[1:])
