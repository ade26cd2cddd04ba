"""How far the scene is from success, in metres, for the tasks in which one length says it: `info["distance"]`.

Read from the true state, whatever is observed. Other conditions of success (at rest, let go, upright) are not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _between(thing: str, goal: str, *, axes: int = 3) -> Callable[[Any], Tensor]:
    """Return a function of ManiSkill's environment: from the centre of `thing` to that of `goal`, [N]."""

    def measure(env: Any) -> Tensor:
        offset = getattr(env, thing).pose.p[:, :axes] - getattr(env, goal).pose.p[:, :axes]
        return torch.linalg.norm(offset, dim=1)

    return measure


def _stacked(env: Any) -> Tensor:
    """From the centre of cube A to where it would rest on cube B."""
    height = torch.zeros(3, device=env.device)
    height[2] = 2 * env.cube_half_size[2]
    return torch.linalg.norm(env.cubeA.pose.p - env.cubeB.pose.p - height, dim=1)


DISTANCES: dict[str, Callable[[Any], Tensor]] = {
    "push_cube": _between("obj", "goal_region", axes=2),
    "pull_cube": _between("obj", "goal_region", axes=2),
    "pick_cube": _between("cube", "goal_site"),
    "stack_cube": _stacked,
    "poke_cube": _between("cube", "goal_region", axes=2),
    "roll_ball": _between("ball", "goal_region", axes=2),
    "plug_charger": lambda env: env._compute_distance()[0],
    "two_goal": lambda env: env.goal_distances().amin(dim=1),
}
"""By the name of the task; open to additions."""
