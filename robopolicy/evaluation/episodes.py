"""What is kept of an episode, and of the wave of episodes that run beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robopolicy.evaluation.failures import action_jerk
from robopolicy.policies.actors import Planned
from robopolicy.types import ActionSpec


@dataclass(frozen=True, kw_only=True)
class Episode:
    """The outcome of one seed."""

    seed: int
    success_once: bool
    """Success was reported after at least one step."""
    success_at_end: bool | None
    """Success was reported after the last step; None where the episode was stopped at its first success."""
    first_success_step: int | None
    """Control steps until success was first reported, counted from 1."""
    num_steps: int
    sum_reward: float
    max_reward: float
    actions: Tensor
    """[num_steps, A] as sent to the environment: enough to replay the episode."""
    min_distance_m: float | None
    """Smallest distance to success after any step, where the task measures one."""
    action_jerk: float
    """See `failures.action_jerk`."""
    num_replans: int
    """Plans made for this episode."""
    num_hold_steps: int
    """Control steps at which there was nothing to play."""
    inference_ms: tuple[float, ...]
    """What each plan made this robot wait; empty where the simulation waited instead."""
    diagnostics: Mapping[str, float | None]
    """What the planner said of its plans, mean over the episode."""

    def to_row(self, index: int) -> dict[str, Any]:
        """Return JSON types with LeRobot's key names where they exist."""
        waits = self.inference_ms or (0.0,)
        return {
            "episode_ix": index,
            "seed": self.seed,
            "success": self.success_once,
            "success_at_end": self.success_at_end,
            "first_success_step": self.first_success_step,
            "num_steps": self.num_steps,
            "sum_reward": self.sum_reward,
            "max_reward": self.max_reward,
            "min_distance_m": self.min_distance_m,
            "action_jerk": self.action_jerk,
            "num_replans": self.num_replans,
            "num_hold_steps": self.num_hold_steps,
            "inference_ms_mean": float(np.mean(waits)),
            "inference_ms_p95": float(np.percentile(waits, 95)),
            "diagnostics": dict(self.diagnostics),
        }


@dataclass
class _Plans:
    """What was planned for one episode: control step, waiting time and diagnostics of each plan."""

    steps: list[int] = field(default_factory=list)
    inference_ms: list[float] = field(default_factory=list)
    diagnostics: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Wave:
    """What happened in one wave: reward, success, held, distance [T, N], actions [T, N, A]; the plans of each row."""

    num_envs: int
    rewards: list[Tensor] = field(default_factory=list)
    success: list[Tensor] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    distance: list[Tensor] = field(default_factory=list)
    actions: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plans = [_Plans() for _ in range(self.num_envs)]

    def note_plans(self, planned: Planned | None, step: int) -> None:
        """Keep what was planned at `step`; None: by an actor that does not tell, for all rows at once."""
        rows = range(self.num_envs) if planned is None else planned.rows.tolist()
        said = {} if planned is None else {name: value.tolist() for name, value in planned.diagnostics.items()}
        for k, row in enumerate(rows):
            plans = self.plans[row]
            plans.steps.append(step)
            if planned is not None and planned.inference_s is not None:
                plans.inference_ms.append(1e3 * planned.inference_s[k])
            for name, values in said.items():
                plans.diagnostics.setdefault(name, []).append(float(values[k]))

    def note_step(self, action: Tensor, held: Tensor, reward: Tensor, success: Tensor, info: dict[str, Any]) -> None:
        """Keep what one step brought."""
        self.rewards.append(reward.float().cpu())
        self.success.append(success)
        self.held.append(held.clone())
        self.actions.append(action.float().cpu())
        if "distance" in info:
            self.distance.append(torch.as_tensor(info["distance"]).float().cpu().clone())

    def episodes(self, seeds: Sequence[int], stop_on_success: bool, spec: ActionSpec) -> list[Episode]:
        """Return the outcomes of the first rows, one per seed."""
        reward, success, held = torch.stack(self.rewards), torch.stack(self.success), torch.stack(self.held)
        action = torch.stack(self.actions)
        distance = torch.stack(self.distance) if self.distance else None
        rows = []
        for i, seed in enumerate(seeds):
            hits = success[:, i].nonzero()
            first = int(hits[0]) + 1 if len(hits) else None
            length = first if stop_on_success and first is not None else len(reward)
            plans, done = self.plans[i], action[:length, i].clone()
            made = sum(step < length for step in plans.steps)
            rows.append(
                Episode(
                    seed=seed,
                    success_once=first is not None,
                    success_at_end=None if stop_on_success else bool(success[-1, i]),
                    first_success_step=first,
                    num_steps=length,
                    sum_reward=math.fsum(reward[:length, i].tolist()),  # a float32 sum would depend on N
                    max_reward=float(reward[:length, i].max()),
                    actions=done,
                    min_distance_m=None if distance is None else float(distance[:length, i].min()),
                    action_jerk=action_jerk(done, spec),
                    num_replans=made,
                    num_hold_steps=int(held[:length, i].sum()),
                    inference_ms=tuple(plans.inference_ms[:made]),
                    diagnostics={name: _mean(values[:made]) for name, values in plans.diagnostics.items()},
                )
            )
        return rows


def _mean(values: Sequence[float]) -> float | None:
    """Return the mean of the finite `values`; None of none."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None
