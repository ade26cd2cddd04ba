"""The action that keeps a robot where it is, at any moment: what it does before its first plan is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robopolicy.errors import RobopolicyError


def hold_action(env: Any) -> Tensor:
    """Return the action [N, A] with which the robots of `env` (a `SimVectorEnv`, or a wrapper of one) stay.

    Increments and velocities are zero; a joint that is commanded absolutely is sent its measured position.

    Raises:
        RobopolicyError: a controller whose present value is not read off its joints (absolute poses of the tool).
    """
    from mani_skill.agents.controllers.pd_joint_pos import PDJointPosController

    base = env.base_env
    controller = base.agent.controller
    parts = getattr(controller, "controllers", {"": controller})
    columns = []
    for part in parts.values():
        width = part.single_action_space.shape[0]
        if width == 0:  # passive joints
            continue
        absolute = hasattr(part.config, "use_delta") and not part.config.use_delta
        if not absolute:
            columns.append(torch.zeros(base.num_envs, width, device=base.device))
            continue
        led = getattr(part, "control_joint_indices", None)
        position = part.qpos if led is None else part.qpos[:, led]
        if not isinstance(part, PDJointPosController) or position.shape[1] != width:
            raise RobopolicyError(
                f"What keeps the robot in its place is not known for {type(part).__name__} of control mode "
                f"{base.control_mode!r}; latency other than frozen needs an incremental or a joint position controller."
            )
        columns.append(_as_action(part, position))
    return torch.cat(columns, dim=1)


def _as_action(part: Any, position: Tensor) -> Tensor:
    """Return joint positions [N, J] in the units and bounds of the action."""
    if not part._normalize_action:
        return position
    low, high = part.action_space_low, part.action_space_high
    return ((position - (low + high) / 2) / ((high - low) / 2)).clamp(-1, 1)
