"""A planner that says what a test wants; stands for a policy trained on PickCube or a joint-space task."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ideal_arm import PANDA, panda
from torch import Tensor

from robopolicy.rng import Rng
from robopolicy.timing import ChunkTiming
from robopolicy.types import ActionSpec, ModalitySpec, Observation, TaskSpec

ZOO = Path(__file__).parents[1] / "checkpoints" / "zoo" / "pick_cube-diffusion" / "policy.json"
TIMING = ChunkTiming(n_obs_steps=2, horizon=16, n_action_steps=8)


def pick_cube_spec(**action: Any) -> TaskSpec:
    """What the published PickCube policy was trained for, its action changed by `action`."""
    spec = TaskSpec.from_dict(json.loads(ZOO.read_text())["task_spec"])
    return dataclasses.replace(spec, action=dataclasses.replace(spec.action, **action))


def joint_spec(control_mode: str = "pd_joint_pos", dt_s: float = 0.05) -> TaskSpec:
    """A task of the arm alone, observed by its joints: absolute positions, or increments of at most 0.1 rad."""
    joints = panda().joints
    delta = control_mode != "pd_joint_pos"
    bound = (1.0,) * 7 if delta else (4.0,) * 7
    return TaskSpec(
        name="joints",
        env_id="Joints-v0",
        robot="panda",
        instruction="Move.",
        max_episode_steps=100,
        observation={"proprio": ModalitySpec(shape=(9,), fields={"agent/qpos": 9})},
        action=ActionSpec(
            names=joints,
            low=tuple(-b for b in bound),
            high=bound,
            delta=(delta,) * 7,
            discrete=(False,) * 7,
            units=("rad",) * 7,
            physical_low=(-0.1,) * 7 if delta else tuple(-b for b in bound),
            physical_high=(0.1,) * 7 if delta else bound,
            control_mode=control_mode,
            control_dt_s=dt_s,
            delta_from={"pd_joint_pos": "none", "pd_joint_delta_pos": "measured"}.get(control_mode, "target"),  # type: ignore[arg-type]
        ),
    )


class ScriptedPlanner:
    """Implements `Planner`: `say(obs, call)` gives the chunk [H, A]; `think_s` is slept first."""

    def __init__(
        self,
        spec: TaskSpec,
        say: Callable[[Observation, int], Tensor],
        *,
        think_s: float = 0.0,
        timing: ChunkTiming = TIMING,
    ) -> None:
        self.spec, self.timing = spec, timing
        self.hysteresis = 0.0
        self.diagnostics: Mapping[str, Tensor] = {}
        self.think_s = think_s
        self.calls: list[tuple[float, int]] = []
        self.resets = 0
        self.say = say

    def __call__(self, obs: Observation, rows: Tensor, *, shift: Tensor, generator: Rng = None) -> Tensor:
        warming_up = threading.current_thread().name == "policy" and self.resets == 0
        if not warming_up:
            self.calls.append((time.monotonic(), int(shift[0])))
            if self.think_s:
                time.sleep(self.think_s)
        return self.say(obs, len(self.calls) - 1)[None]

    def reset(self, rows: Tensor | None = None) -> None:
        self.resets += 1


def stay(spec: TaskSpec, *, timing: ChunkTiming = TIMING) -> Callable[[Observation, int], Tensor]:
    """Say: do not move (increments), or hold the joints (absolute), gripper open."""

    def say(obs: Observation, call: int) -> Tensor:
        if spec.action.delta[0]:
            chunk = torch.zeros(timing.horizon, spec.action.dim)
        else:
            chunk = obs.modalities["proprio"][0, -1, : spec.action.dim].expand(timing.horizon, -1).clone()
        if spec.action.discrete[-1]:
            chunk[:, -1] = 1.0
        return chunk

    return say


__all__ = ["PANDA", "TIMING", "ScriptedPlanner", "joint_spec", "pick_cube_spec", "stay"]
