"""ManiSkill's test whether a Panda holds an object, for all environments at once."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TINY = 1e-6
"""Vectors shorter than this have no direction: ManiSkill leaves them as they are."""


@numba.njit(cache=True, nogil=True)
def _presses(
    force: NDArray[np.float32], pose: NDArray[np.float32], side: float, min_force: float, max_angle: float
) -> NDArray[np.bool_]:
    """Return [N] bool: `force` [N, 3] is strong, and within `max_angle` of the finger's opening direction.

    `pose` [N, 7] of the finger, whose y axis times `side` is that direction; newtons and degrees.
    """
    out = np.empty(force.shape[0], np.bool_)
    for n in range(force.shape[0]):
        w, x, y, z = pose[n, 3], pose[n, 4], pose[n, 5], pose[n, 6]
        scale = 2.0 / (w * w + x * x + y * y + z * z)
        a, b, c = scale * (x * y - z * w), 1.0 - scale * (x * x + z * z), scale * (y * z + x * w)
        length, size = math.sqrt(a * a + b * b + c * c), 0.0
        for k in range(3):
            size += force[n, k] * force[n, k]
        size = math.sqrt(size)
        dot = side * (a * force[n, 0] + b * force[n, 1] + c * force[n, 2])
        dot /= (length if length >= _TINY else 1.0) * (size if size >= _TINY else 1.0)
        out[n] = size >= min_force and math.degrees(math.acos(min(max(dot, -1.0), 1.0))) <= max_angle
    return out


def is_grasping(self: Any, object: Any, min_force: float = 0.5, max_angle: float = 85) -> Tensor:
    """Return [N] bool as `Panda.is_grasping` does: both fingers press on `object`, roughly towards each other."""
    holds = []
    for finger, side in ((self.finger1_link, 1.0), (self.finger2_link, -1.0)):
        force = self.scene.get_pairwise_contact_forces(finger, object).numpy()
        holds.append(_presses(force, finger.pose.raw_pose.numpy(), side, min_force, max_angle))
    return torch.from_numpy(holds[0] & holds[1])
