"""`eval shift=suite`: the frozen perturbations in all their levels, each paired with clean on the same seeds.

Every cell is an ordinary evaluation in its own folder, so that a suite that was interrupted goes on where it was, and a
cell can be compared, filmed and looked at like any other evaluation.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from robopolicy.envs.shifts import Shift
    from robopolicy.evaluation.results import Evaluation

FORMAT = "robopolicy-robustness/1"


def run_suite(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate `cfg.checkpoint` clean and under every shift that means something for it; write robustness.json and .md.

    Raises:
        RobopolicyError: a name in `cfg.shifts` is no shift, or is one that means nothing for the task.
    """
    from rich.console import Console

    from robopolicy import atomic
    from robopolicy.evaluation.results import read_evaluation
    from robopolicy.types import TaskSpec

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    began_s = time.monotonic()
    clean = read_evaluation(_cell(cfg, None))
    shifts, skipped = chosen(cfg.shifts, TaskSpec.from_dict(clean.info["task_spec"]))
    cells = []
    with _bar(len(shifts), console) as show:
        try:
            for shift in shifts:
                cells.append(describe(shift, clean, read_evaluation(_cell(cfg, shift))))
                show(cells[-1])
        except KeyboardInterrupt:
            console.print("Stopped; finished shifts are kept. The same command goes on from here.")
            raise
    table = {
        **_head(cfg, clean),
        "cells": cells,
        "skipped": [{"shift": name, "why": why} for name, why in skipped.items()],
    }
    folder = clean.folder.with_name(cfg.name or f"{clean.folder.name}-suite")
    with atomic.new_folder(folder) as staged:
        (staged / "robustness.json").write_text(json.dumps(table, indent=1, allow_nan=False) + "\n")
        (staged / "robustness.md").write_text(to_markdown(table))
    _say(table, folder, time.monotonic() - began_s, console)
    return {"folder": str(folder), **table}


def chosen(wanted: Any, spec: Any) -> tuple[list[Shift], dict[str, str]]:
    """Return the shifts to run, all levels, in the order of the table, and why others mean nothing for the task `spec`.

    Args:
        wanted: names, or None for all of the table.

    Raises:
        RobopolicyError: a wanted shift is unknown or means nothing here.
    """
    from robopolicy.envs.shifts import LEVELS, SHIFTS, Shift, why_not
    from robopolicy.errors import RobopolicyError

    names = list(SHIFTS) if wanted is None else [Shift(str(name)).name for name in wanted]
    if not names:
        raise RobopolicyError("shifts=[] leaves nothing to run; null means all.")
    skipped = {name: why for name in SHIFTS if (why := why_not(name, spec)) is not None}
    if wanted is not None and (wrong := [name for name in names if name in skipped]):
        raise RobopolicyError(f"shifts: {wrong[0]} means nothing for task {spec.name!r}: {skipped[wrong[0]]}.")
    return [Shift(name, level) for name in SHIFTS if name in names and name not in skipped for level in LEVELS], skipped


def describe(shift: Shift, clean: Evaluation, shifted: Evaluation) -> dict[str, Any]:
    """Return one cell: success with its interval, and its difference from clean on the same seeds."""
    from robopolicy.envs.shifts import SHIFTS
    from robopolicy.evaluation.comparison import compare_outcomes

    row = SHIFTS[shift.name]
    before, after = ({r["seed"]: r["success"] for r in e.rows} for e in (clean, shifted))
    paired = compare_outcomes([before[seed] for seed in after], list(after.values()))
    return {
        "shift": shift.name,
        "family": row.family,
        "level": shift.level,
        "strength": row.strength(shift.level),
        "unit": row.unit,
        **_rate(shifted),
        "difference": paired.difference,
        "difference_ci95": list(paired.interval),
        "lost": paired.only_a,
        "gained": paired.only_b,
        "mcnemar_p": paired.p_value,
        "folder": f"eval/{shifted.folder.name}",
    }


def to_markdown(table: Mapping[str, Any]) -> str:
    """Return the table as text: a line for every shift and level."""
    clean = table["clean"]
    low, high = clean["ci95"]
    lines = [
        f"# Robustness of {table['task']}, suite {table['suite']}",
        "",
        f"Clean: {clean['n_success']} of {clean['n']} ({_percent(clean['rate'])} %, 95 % interval {_percent(low)} to "
        f"{_percent(high)} %), seeds {table['seed']} to {table['seed'] + clean['n'] - 1}. Differences are paired on "
        "these seeds, in points, with Newcombe's 95 % interval; p is of the exact McNemar test, not corrected for the "
        "number of cells.",
        "",
        "| shift | level | strength | success | difference | lost / gained | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in table["cells"]:
        (low, high), (least, most) = cell["ci95"], cell["difference_ci95"]
        strength = f"{cell['strength']:g} {cell['unit']}".strip()
        lines.append(
            f"| {cell['shift']} | {cell['level']} | {strength} "
            f"| {_percent(cell['rate'])} % ({_percent(low)} to {_percent(high)}) "
            f"| {100 * cell['difference']:+.0f} ({100 * least:+.0f} to {100 * most:+.0f}) "
            f"| {cell['lost']} / {cell['gained']} | {_p(cell['mcnemar_p'])} |"
        )
    whys = dict.fromkeys(entry["why"] for entry in table["skipped"])
    for why in whys:
        names = ", ".join(entry["shift"] for entry in table["skipped"] if entry["why"] == why)
        lines += ["", f"Not run, because {why}: {names}."]
    return "\n".join(lines) + "\n"


def _cell(cfg: DictConfig, shift: Shift | None) -> Path:
    """Evaluate under `shift`, unless that was done before; return the folder."""
    from robopolicy.app.eval import run_one

    cell = cfg.copy()
    cell.update({"shift": None if shift is None else str(shift), "name": None, "video": False, "failures": False})
    return Path(run_one(cell, quiet=True, keep=not cfg.overwrite)["folder"])


def _head(cfg: DictConfig, clean: Evaluation) -> dict[str, Any]:
    from robopolicy.envs.shifts import SUITE

    return {
        "format": FORMAT,
        "suite": SUITE,
        "task": clean.info["task_spec"]["name"],
        "step": clean.info["checkpoint"]["step"],
        "n_episodes": len(clean.rows),
        "seed": clean.rows[0]["seed"],
        "settings": clean.info["settings"],
        "clean": {**_rate(clean), "folder": f"eval/{clean.folder.name}"},
    }


def _rate(evaluation: Evaluation) -> dict[str, Any]:
    """Return the success of an evaluation as fractions."""
    from robopolicy.evaluation.statistics import wilson_interval

    n, hits = len(evaluation.rows), sum(row["success"] for row in evaluation.rows)
    return {"n_success": hits, "n": n, "rate": hits / n, "ci95": list(wilson_interval(hits, n))}


@contextmanager
def _bar(total: int, console: Console) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show a bar over the cells, and a line for each finished one."""
    from rich import progress

    columns = (
        progress.TextColumn("[bold]shifts"),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    done = 0
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("shifts", total=total)

        def show(cell: Mapping[str, Any]) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done)
            low, high = cell["ci95"]
            console.print(
                f"{done:>3}/{total}  {cell['shift'] + ':' + str(cell['level']):<22}{_percent(cell['rate']):>4} % "
                f"({_percent(low)} to {_percent(high)})  {100 * cell['difference']:+4.0f} points, "
                f"p = {_p(cell['mcnemar_p'])}"
            )

        yield show


def _say(table: Mapping[str, Any], folder: Path, took_s: float, console: Console) -> None:
    """Print what was skipped, what hurt most, and where the table is."""
    from rich.markup import escape

    from robopolicy.evaluation.report import duration

    for why in dict.fromkeys(entry["why"] for entry in table["skipped"]):
        names = ", ".join(entry["shift"] for entry in table["skipped"] if entry["why"] == why)
        console.print(f"skipped, because {why}: {names}")
    worst = min(table["cells"], key=lambda cell: cell["difference"])
    console.print(
        f"clean [bold]{_percent(table['clean']['rate'])} %[/]; worst: {worst['shift']}:{worst['level']} with "
        f"{_percent(worst['rate'])} %; took {duration(took_s)}"
    )
    console.print(f"wrote [bold]{escape(str(folder))}[/]: robustness.json, robustness.md")
    console.print(f"next: robopolicy report run={escape(str(folder.parent.parent))}")


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "<0.001"
