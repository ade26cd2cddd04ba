"""The parts of a report that compare: evaluations paired on the same seeds, robustness to shifts, episodes' columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from robopolicy.errors import RobopolicyError
from robopolicy.evaluation.comparison import compare_evaluations, differences, what_differs
from robopolicy.evaluation.results import Evaluation
from robopolicy.evaluation.statistics import holm

ROBUSTNESS = "robopolicy-robustness/1"
ALPHA = 0.05

COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("min_distance_m", "nearest, cm", lambda v: f"{100 * v:.1f}"),
    ("action_jerk", "jerk", lambda v: f"{v:.3g}"),
    ("num_replans", "plans", lambda v: f"{v:.0f}"),
    ("num_hold_steps", "held", lambda v: f"{v:.0f}"),
    ("inference_ms_mean", "waited, ms", lambda v: f"{v:.1f}"),
)
"""What is known of an episode beside its outcome: key in episodes.jsonl, heading, how to write it."""

USUAL: dict[str, Any] = {"latency": "frozen", "executor": "async", "shift": None, "engine": "eager", "noise_seed": 0}
"""Settings that a note names where they are otherwise."""


def notes(settings: Mapping[str, Any], timing: Mapping[str, Any]) -> list[str]:
    """Return `key=value` for the settings of an evaluation that are not the usual ones.

    Args:
        timing: of the policy as trained.
    """
    usual = {**USUAL, "n_action_steps": timing.get("n_action_steps")}
    found = [f"{key}={settings[key]}" for key, value in usual.items() if settings.get(key) not in (None, value)]
    planner = settings.get("planner")
    if isinstance(planner, Mapping) and not str(planner.get("_target_", "")).endswith("FreshPlanner"):
        found.append(f"planner={str(planner.get('name') or planner.get('_target_')).rpartition('.')[2]}")
    return found + [f"{key}={value}" for key, value in (settings.get("policy_overrides") or {}).items()]


def paired_table(main: Evaluation | None, evaluations: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """Compare with `main` every evaluation of the same episodes; the p-values corrected together (Holm)."""
    if main is None:
        return []
    others = [one for one in evaluations if one.name != main.name and not differences(main, one)]
    if not others:
        return []
    named = {main.name: main, **{one.name: one for one in others}}
    try:
        pairs = compare_evaluations(named, baseline=main.name, alpha=ALPHA)
    except RobopolicyError:  # an evaluation whose rows are not whole
        return []
    rows = []
    half = max(abs(side) for pair in pairs for side in pair.paired.interval)  # of the axis of differences
    for pair in pairs:
        low, high = pair.paired.interval
        rows.append(
            {
                "name": pair.b,
                "changed": "; ".join(what_differs(main, named[pair.b])),
                "pc_success": 100 * pair.paired.rate_b,
                "difference": 100 * pair.paired.difference,
                "interval": (100 * low, 100 * high),
                "marks": [50 + 50 * value / half for value in (low, pair.paired.difference, high)],
                "won": pair.paired.only_b,
                "lost": pair.paired.only_a,
                "seeds_won": pair.seeds_only_b,
                "seeds_lost": pair.seeds_only_a,
                "p": pair.p_holm,
                "verdict": {"a": "worse", "b": "better", "identical": "identical"}.get(pair.verdict, "undecided"),
                "detectable_gap": None if pair.detectable_gap is None else 100 * pair.detectable_gap,
                "episodes_needed": pair.episodes_needed,
            }
        )
    return rows


def robustness(run_dir: Path) -> dict[str, Any] | None:
    """Return the newest robustness.json of the run, laid out shift by level; None if there is none to read.

    A cell counts as changed where its McNemar test against the clean evaluation is significant, all cells together.
    """
    files = sorted(run_dir.glob("eval/*/robustness.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        return None
    try:
        table = json.loads(files[-1].read_text())
        if table["format"] != ROBUSTNESS:
            return None
        cells = table["cells"]
        corrected = holm([cell["mcnemar_p"] for cell in cells])
        levels = sorted({cell["level"] for cell in cells})
        rows: dict[str, dict[str, Any]] = {}
        for cell, p in zip(cells, corrected, strict=True):
            row = rows.setdefault(cell["shift"], {"shift": cell["shift"], "family": cell["family"], "cells": {}})
            row["cells"][cell["level"]] = {**cell, "changed": p <= ALPHA, "p": p}
        return {**table, "levels": levels, "rows": list(rows.values()), "worst": _worst(rows.values())}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _worst(rows: Any) -> dict[str, Any] | None:
    """Return the cell that lost most against clean, if one is significantly worse."""
    changed = [cell for row in rows for cell in row["cells"].values() if cell["changed"] and cell["difference"] < 0]
    return min(changed, key=lambda cell: cell["difference"], default=None)


def episode_columns(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the columns beside the outcome that some episode of `rows` has: heading, and a text and number per row."""
    columns = []
    for key, heading, write in COLUMNS:
        values = [row.get(key) for row in rows]
        known = [value for value in values if value is not None]
        if known and (any(known) or key == "min_distance_m"):
            columns.append({"heading": heading, "values": [(v, "–" if v is None else write(v)) for v in values]})
    return columns
