"""Why episodes fail: how rough the motion was, and how near the failed ones came."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from robopolicy.types import ActionSpec


def action_jerk(actions: Tensor, spec: ActionSpec) -> float:
    """Return how rough a commanded motion is: the RMS, over steps and dimensions, of the position's third difference.

    Units: half of the action's range per step^3, so that metres and radians, and robots, compare. An increment (or a
    velocity) is a first difference of position already; discrete dimensions are left out. 0 for less than 4 steps.

    Args:
        actions: [T, A] as sent.
    """
    half = (torch.tensor(spec.high) - torch.tensor(spec.low)) / 2
    scaled = actions.cpu().double() / half.double()
    increments, discrete = torch.tensor(spec.delta), torch.tensor(spec.discrete)
    parts = [scaled[:, increments & ~discrete].diff(n=2, dim=0), scaled[:, ~increments & ~discrete].diff(n=3, dim=0)]
    values = torch.cat([part.flatten() for part in parts])
    return float(values.square().mean().sqrt()) if len(values) else 0.0


def nearest_words(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how near the goal failed episodes came: millimetres beside the successful ones are another fault than a miss.

    Args:
        rows: of `episodes.jsonl`.

    Returns:
        A sentence; empty where nothing failed or the task has no distance.
    """
    won, failed = (
        [
            100 * row["min_distance_m"]
            for row in rows
            if row["success"] is success and row.get("min_distance_m") is not None
        ]
        for success in (True, False)
    )
    if not failed:
        return ""
    beside = f", successful ones within {statistics.median(won):.1f} cm" if won else ""
    return f"Failed episodes came within {statistics.median(failed):.1f} cm of the goal in the median{beside}."
