"""Writes the rows of study_fdp.py as tables and pictures: docs/fdp_tables.md, fdp_low_data.png, fdp_shifts.png.

    python scripts/study_fdp_tables.py

A difference is paired by episode. Its first interval (Newcombe, 95 %) is over episodes alone, for policies as they were
trained; the second is Student's over the differences of cells (task, demonstrations, training seed), and covers the
training seeds too.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import ttest_1samp

from robopolicy import atomic
from robopolicy.evaluation.comparison import compare_outcomes
from robopolicy.evaluation.statistics import wilson_interval

DOCS = Path(__file__).parents[1] / "docs"
Row = Mapping[str, Any]
ARMS = (
    "fdp",
    "fdp_output",
    "fdp_block",
    "fdp_goal_short",
    "fdp_goal_output",
    "fdp_goal",
    "fdp_no_base",
    "diffusion_noise",
    "diffusion_wide",
    "diffusion_half",
    "diffusion",
    "diffusion_dropout_10",
    "diffusion_dropout_30",
    "diffusion_guided",
    "fdp_sum",
    "diffusion_base",
)
NETWORKS = ("unet", "dit")
FIRST_SEED = 10_000
JOINT = "diffusion_noise"
STACKS = {"objects": ("fdp", "fdp_goal"), "proprio": ("fdp_objects",)}
"""Arms whose second set has the failing sensor."""
SHOWN = ("fdp_goal_short", "fdp", "fdp_block", "diffusion_noise", "diffusion_wide", "diffusion_dropout_10")
SHOWN_SHIFTS = {
    "objects": (
        ("fdp", ""),
        ("fdp", "doubt"),
        ("diffusion_noise", ""),
        ("diffusion_dropout_30", "doubt"),
        ("fdp_goal", "doubt"),
    ),
    "proprio": (
        ("fdp_objects", ""),
        ("fdp_objects", "doubt"),
        ("diffusion_noise", ""),
        ("dropout_objects_30", "doubt"),
        ("diffusion_objects", ""),
    ),
}
KINDS = ("freeze", "noise", "dropout")
SMALL, LARGE = (10, 25), (50, 100)


# ---- numbers ---------------------------------------------------------------------------------------------------------
def called(row: Row) -> str:
    return f"{row['arm']} {row.get('variant', '')}".strip()


def place(row: Row) -> tuple[Any, ...]:
    return row.get("place") or tuple(row[key] for key in ("task", "demos", "seed", "shift", "steps", "n_episodes"))


def outcomes(row: Row) -> list[bool]:
    """Return the success of each episode; one without `outcomes` names the seeds that failed."""
    if "outcomes" in row:
        return [outcome == "1" for outcome in row["outcomes"]]
    failed = set(row["failed_seeds"])
    return [seed not in failed for seed in range(FIRST_SEED, FIRST_SEED + row["n_episodes"])]


def rate(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Return success over all episodes of the rows and Wilson's interval, in percent."""
    all_outcomes = [outcome for row in rows for outcome in outcomes(row)]
    hits, n = sum(all_outcomes), len(all_outcomes)
    low, high = wilson_interval(hits, n)
    return 100 * hits / n, 100 * low, 100 * high


def difference(mine: Iterable[Row], theirs: Iterable[Row]) -> str:
    """Return mine less theirs in points with both intervals, as in the head of this file; empty without a cell."""
    controls = {place(row): row for row in theirs}
    cells = [(outcomes(controls[place(row)]), outcomes(row)) for row in mine if place(row) in controls]
    if not cells:
        return ""
    paired = compare_outcomes(*(list(itertools.chain(*side)) for side in zip(*cells, strict=True)))
    low, high = paired.interval
    text = f"{100 * paired.difference:+.1f} ({100 * low:+.0f} to {100 * high:+.0f}"
    gaps = [100 * compare_outcomes(*cell).difference for cell in cells]
    if len(gaps) > 2 and len(set(gaps)) > 1:
        interval = ttest_1samp(gaps, 0.0).confidence_interval()
        text += f"; {interval.low:+.0f} to {interval.high:+.0f}"
    return f"{text}; {len(gaps)})"


def of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Return the rows with these values; a tuple stands for any of its members."""
    return [
        row
        for row in rows
        if all(row[key] in value if isinstance(value, tuple) else row[key] == value for key, value in wanted.items())
    ]


def telling(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of tasks and demonstrations where joint conditioning has 10 to 95 %; others decide nothing."""
    joint = {(row["task"], row["demos"]): of(rows, task=row["task"], demos=row["demos"], arm=JOINT) for row in rows}
    return [row for row in rows if 10 <= rate(joint[row["task"], row["demos"]])[0] <= 95]


# ---- tables ----------------------------------------------------------------------------------------------------------
def grid(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *lines)] + [""]


def success_table(rows: Sequence[Row]) -> list[str]:
    """A line for each task and number of demonstrations, a column for each arm."""
    lines = []
    for task, demos in sorted({(row["task"], row["demos"]) for row in rows}):
        same = of(rows, task=task, demos=demos)
        line = [task, str(demos)]
        for arm in ARMS:
            mine = sorted(of(same, arm=arm), key=lambda row: row["seed"])
            line.append(" / ".join(f"{100 * row['success']:.1f}" for row in mine))
        lines.append(line)
    return grid(["task", "demonstrations", *(f"`{arm}`" for arm in ARMS)], lines)


def difference_table(rows: Sequence[Row], arm: str, groups: Mapping[str, Sequence[Row]]) -> list[str]:
    """A line for each control, a column for each group of rows."""
    lines = []
    for control in dict.fromkeys(called(row) for row in rows if called(row) != arm):
        cells = [difference(*([row for row in some if called(row) == name] for name in (arm, control)))
                 for some in groups.values()]  # fmt: skip
        if any(cells):
            lines.append([f"`{control}`", *cells])
    return grid([f"`{arm}` less", *groups], lines) if lines else []


def clean_table(rows: Sequence[Row], shifts: Sequence[str], *, clean: str, keys: Sequence[str]) -> list[str]:
    """A line for each arm: its success under each shift less its own without any, `clean`, in the same episodes.

    Args:
        keys: of a row, all but `shift` that its clean row shares.
    """
    own = [{**row, "place": tuple(row[key] for key in keys)} for row in rows]
    lines = []
    for name in dict.fromkeys(called(row) for row in own if row["shift"] in shifts):
        mine = [row for row in own if called(row) == name]
        lines.append([f"`{name}`", *(difference(of(mine, shift=shift), of(mine, shift=clean)) for shift in shifts)])
    return grid(["less clean", *(f"`{shift}`" for shift in shifts)], lines)


def limit_table(rows: Sequence[Row]) -> list[str]:
    """Success by how near the goal's centre the cube must come: the task's 10 cm, and a little more."""
    lines = []
    for demos in sorted({row["demos"] for row in rows}):
        for limit_m in (0.1, 0.105, 0.11, 0.12):
            same = [within(row, limit_m) for row in of(rows, demos=demos)]
            cells = [of(same, arm=arm) for arm in ARMS]
            line = [str(demos), f"{100 * limit_m:g} cm", *(f"{rate(cell)[0]:.1f}" if cell else "" for cell in cells)]
            lines.append([*line, difference(of(same, arm="fdp"), of(same, arm=JOINT))])
    return grid(["demonstrations", "within", *(f"`{arm}`" for arm in ARMS), f"`fdp` less `{JOINT}`"], lines)


def within(row: Row, limit_m: float) -> Row:
    """Return the row with the episodes as successes whose cube came so near the goal's centre."""
    pairs = zip(row["failed_seeds"], row["failed_min_distance_m"], strict=True)
    return {**row, "failed_seeds": [seed for seed, distance_m in pairs if distance_m >= limit_m]}


def network_tables(rows: Sequence[Row]) -> list[str]:
    """Joint conditioning and all compositions of each network, and what each composition gains."""
    lines = []
    for network in NETWORKS:
        arms = (network, f"fdp_{network}", f"fdp_{network}_output", f"fdp_{network}_block")
        same = of(rows, arm=arms)
        body = []
        for task, demos in sorted({(row["task"], row["demos"]) for row in same}):
            cells = [sorted(of(same, task=task, demos=demos, arm=arm), key=lambda row: row["seed"]) for arm in arms]
            rates = (" / ".join(f"{100 * row['success']:.1f}" for row in cell) for cell in cells)
            body.append([task, str(demos), *rates])
        if body:
            lines += grid(["task", "demonstrations", *(f"`{arm}`" for arm in arms)], body)
            for arm in arms[1:]:
                lines += difference_table(same, arm, {"points": same})
    return lines


def shift_tables(rows: Sequence[Row], sensor: str) -> list[str]:
    shifts = [f"{kind}_{sensor}:{level}" for kind in KINDS for level in (1, 2, 3)]
    lines = []
    for task in sorted({row["task"] for row in of(rows, shift=tuple(shifts))}):
        lines += [f"**{task}**, 50 demonstrations; success, all training seeds", ""]
        same = of(rows, task=task)
        names = dict.fromkeys(called(row) for row in of(same, shift=tuple(shifts)))
        body = []
        for name in names:
            mine = [row for row in same if called(row) == name]
            seeds = {row["seed"] for row in mine}
            cells = [of(mine, shift=shift) for shift in ("clean", *shifts)]
            body.append([f"`{name}`", str(len(seeds)), *(f"{rate(cell)[0]:.0f}" if cell else "" for cell in cells)])
        lines += grid(["arm", "seeds", "clean", *(shift.replace(f"_{sensor}:", " ") for shift in shifts)], body)
        lines += clean_table(same, shifts, clean="clean", keys=("seed", "n_episodes"))
    hard = {f"{kind} 3": of(rows, shift=f"{kind}_{sensor}:3") for kind in KINDS}
    third = [row for some in hard.values() for row in some]
    for arm in STACKS[sensor]:
        tasks = {row["task"] for row in third if row["arm"] == arm}
        groups = {label: of(some, task=tuple(tasks)) for label, some in (hard | {"all three": third}).items()}
        for name in (arm, f"{arm} doubt"):
            lines += difference_table(third, name, groups)
    return lines


def tables(found: Mapping[str, Any]) -> str:
    rows = found["rows"]
    clean = of(rows, study="low_data", variant="", shift="clean", n_episodes=200, arm=ARMS)
    lines = ["# Factorised policies: all rows", ""]
    lines += [
        "Written by `scripts/study_fdp_tables.py` from `fdp.json`; what the arms are is in `scripts/study_fdp.py`.",
        "",
    ]
    lines += ["## Few demonstrations", "", "Success in percent of 200 episodes, training seed 1 / 2.", ""]
    lines += success_table(clean)
    chose = {("pick_cube", 25, 1), ("push_cube", 10, 1)}
    told = telling(clean)
    others = [row for row in told if (row["task"], row["demos"], row["seed"]) not in chose]
    groups = {"10 and 25": of(told, demos=SMALL), "50 and 100": of(told, demos=LARGE)}
    lines += ["Differences in points (95 % over episodes; 95 % over cells; number of cells), first of all cells where"]
    lines += ["joint conditioning has 10 to 95 %.", ""]
    for arm in ("fdp", "fdp_goal_short", "fdp_no_base", "fdp_block", "fdp_output"):
        more = {"10 and 25, without the cells that chose it": of(others, demos=SMALL)} if arm == "fdp" else {}
        lines += difference_table(clean, arm, groups | more)
    for demos in (*SMALL, *LARGE):
        by_task = {f"{task}, {demos}": of(clean, task=task, demos=demos) for task in sorted({r["task"] for r in clean})}
        lines += difference_table(clean, "fdp", by_task)
    lines += ["## PushCube by the distance that counts", ""]
    lines += [
        "Failed episodes count as successes where the cube came within so much of the goal's centre, both seeds.",
        "",
    ]
    lines += limit_table(of(clean, task="push_cube"))
    if networks := of(rows, study="backbones"):
        lines += ["## UNet and DiT", "", "Success in percent of 200 episodes, training seed 1 / 2.", ""]
        lines += network_tables(networks)
    shifted = of(rows, study="shifts", demos=50)
    for sensor in STACKS:
        lines += [f"## Failing `{sensor}`", "", *shift_tables(shifted, sensor)]
    if weights := of(rows, study="weights"):
        lines += ["## Residual weight", ""]
        lines += grid(["task", "demonstrations", "seed", "arm", "w", "success"], (
            [r["task"], str(r["demos"]), str(r["seed"]), f"`{r['arm']}`", r["variant"][2:], f"{100 * r['success']:.1f}"]
            for r in weights
        ))  # fmt: skip
    if order := of(rows, study="orders"):
        lines += ["## Order", "", "Held-out loss of the first modality alone after a quarter of the updates.", ""]
        body = []
        for row in order:
            first = row["variant"].split()[0]
            loss = found["order_losses"].get(f"{row['task']} {row['demos']} s{row['seed']} {first}", math.nan)
            body.append(
                [row["task"], str(row["demos"]), str(row["seed"]), first, f"{loss:.4f}", f"{100 * row['success']:.1f}"]
            )
        lines += grid(["task", "demonstrations", "seed", "first", "loss", "success"], body)
    return "\n".join(lines)


# ---- pictures --------------------------------------------------------------------------------------------------------
def bars(axes: Any, lines: Mapping[str, Sequence[Sequence[Row]]], ticks: Sequence[str]) -> None:
    """Draw a line per name, a point per list of rows with its Wilson interval."""
    for number, (name, points) in enumerate(lines.items()):
        shift = 0.07 * (number - (len(lines) - 1) / 2)
        there = [(spot + shift, *rate(point)) for spot, point in enumerate(points) if point]
        if there:
            x, y, low, high = zip(*there, strict=True)
            errors = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
            axes.errorbar(x, y, errors, fmt="o-", ms=4, lw=1, color=f"C{number}", label=name)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set(xlim=(-0.5, len(ticks) - 0.5), ylim=(-3, 103))


def save(figure: Any, path: Path) -> None:
    found = dict(pair[::-1] for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True))
    figure.legend(
        found.values(), found, loc="outside lower center", ncols=min(len(found), 5), frameon=False, fontsize=8
    )
    figure.savefig(path, dpi=110)


def draw_low_data(rows: Sequence[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    tasks = sorted({row["task"] for row in rows})
    figure = Figure(figsize=(4 * len(tasks), 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), sharey=True), tasks, strict=True):
        lines = {arm: [of(rows, task=task, arm=arm, demos=demos) for demos in (*SMALL, *LARGE)] for arm in SHOWN}
        bars(axes, lines, [str(demos) for demos in (*SMALL, *LARGE)])
        axes.set(title=task, xlabel="demonstrations")
    figure.axes[0].set_ylabel("success, %")
    save(figure, path)


def draw_shifts(rows: Sequence[Row], sensor: str, path: Path) -> None:
    from matplotlib.figure import Figure

    tasks = sorted({row["task"] for row in rows if f"_{sensor}:" in row["shift"]})
    figure = Figure(figsize=(10, 2.6 * len(tasks) + 0.8), layout="constrained")
    panels = figure.subplots(len(tasks), len(KINDS), sharey=True, squeeze=False)
    for line, task in zip(panels, tasks, strict=True):
        for axes, kind in zip(line, KINDS, strict=True):
            shifts = ["clean", *(f"{kind}_{sensor}:{level}" for level in (1, 2, 3))]
            same = of(rows, task=task)
            lines = {
                f"{arm} {variant}".strip(): [of(same, arm=arm, variant=variant, shift=shift) for shift in shifts]
                for arm, variant in SHOWN_SHIFTS[sensor]
            }
            bars(axes, lines, ["clean", "1", "2", "3"])
            axes.set(title=f"{task}: {kind} {sensor}")
        line[0].set_ylabel("success, %")
    save(figure, path)


def main() -> None:
    found = json.loads((DOCS / "fdp.json").read_text())
    atomic.write_file(DOCS / "fdp_tables.md", (tables(found).rstrip() + "\n").encode())
    draw_low_data(of(found["rows"], study="low_data", variant="", n_episodes=200), DOCS / "fdp_low_data.png")
    shifted = of(found["rows"], study="shifts", demos=50)
    for sensor, name in (("objects", "fdp_shifts.png"), ("proprio", "fdp_shifts_proprio.png")):
        if any(f"_{sensor}:" in row["shift"] for row in shifted):
            draw_shifts(shifted, sensor, DOCS / name)


if __name__ == "__main__":
    main()
