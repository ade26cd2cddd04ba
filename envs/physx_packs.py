"""The state of all scenes in a few calls: what `PhysxCpuSystem.pack()` returns, sorted into ManiSkill's buffers."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from .physx_kinematics import ArticulationTable, forward_kinematics

BODY = 13
"""Numbers `pack()` writes per body: quaternion, position, linear velocity, angular velocity."""
_TO_MANISKILL = np.array([4, 5, 6, 0, 1, 2, 3, 7, 8, 9, 10, 11, 12])
"""ManiSkill's order of the same: position, quaternion, velocities."""


class Packs:
    """The joined packs of `systems`: per scene its bodies, then its articulations (root body, then joints)."""

    def __init__(self, systems: list[Any], dof: NDArray[np.int64]) -> None:
        """`systems` may be changed later; `dof` [A]: degrees of freedom of all scenes' articulations."""
        self._systems = systems
        body: list[int] = []
        articulation: list[int] = []
        offset = 0
        for system in systems:
            count = len(system.rigid_dynamic_components)
            body += range(offset, offset + count * BODY, BODY)
            offset += count * BODY
            for link in system.articulation_link_components:
                if link.is_root:
                    articulation.append(offset)
                    offset += BODY + 4 * link.articulation.dof
        self._size = offset
        column = np.arange(int(dof.max(initial=0)))
        inside = column < dof[:, None]
        first = np.array(articulation, np.int64)[:, None]
        self._body = np.array(body, np.int64)[:, None] + _TO_MANISKILL
        self._root = first + _TO_MANISKILL
        # -1: this articulation has fewer joints
        self._qpos = np.where(inside, first + BODY + column, -1)
        self._qvel = np.where(inside, first + BODY + dof[:, None] + column, -1)
        self._target = np.where(inside, first + BODY + 2 * dof[:, None] + 2 * column, -1)

    def _join(self) -> NDArray[np.float32]:
        packs = np.frombuffer(b"".join([system.pack() for system in self._systems]), np.float32)
        if len(packs) != self._size:
            raise RuntimeError(
                f"The scenes hold {len(packs)} numbers where {self._size} were expected: bodies were added or removed "
                "after the simulation was set up, or SAPIEN's pack() has changed."
            )
        return packs

    def read(
        self, table: ArticulationTable, body: NDArray[np.float32], qpos: NDArray[np.float32], qvel: NDArray[np.float32]
    ) -> None:
        """Fill `body` [B, 13] (of links that are not roots the poses alone), `qpos` and `qvel` [A, D]."""
        _unpack(
            self._join(), self._body, self._root, self._qpos, self._qvel, table.first_link, table.parent, table.kind,
            table.q_index, table.in_parent, table.child_inverse, table.sign, table.row, body, qpos, qvel,
        )  # fmt: skip

    def targets(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the joints' drive targets, positions and velocities [A, D]."""
        packs, inside = self._join(), self._target >= 0
        return np.where(inside, packs[self._target], 0), np.where(inside, packs[self._target + 1], 0)


@numba.njit(cache=True, nogil=True)
def _unpack(
    packs: NDArray[np.float32],
    take_body: NDArray[np.int64],
    take_root: NDArray[np.int64],
    take_qpos: NDArray[np.int64],
    take_qvel: NDArray[np.int64],
    first_link: NDArray[np.int64],
    parent: NDArray[np.int64],
    kind: NDArray[np.int64],
    q_index: NDArray[np.int64],
    in_parent: NDArray[np.float64],
    child_inverse: NDArray[np.float64],
    sign: NDArray[np.float64],
    row: NDArray[np.int64],
    body: NDArray[np.float32],
    qpos: NDArray[np.float32],
    qvel: NDArray[np.float32],
) -> None:
    """Sort `packs` into `body`, `qpos` and `qvel`; `take_*` say where each number stands, the rest is `table`'s."""
    for i in range(take_body.shape[0]):
        for k in range(take_body.shape[1]):
            body[i, k] = packs[take_body[i, k]]
    root = np.empty((take_root.shape[0], 7), np.float32)
    for a in range(take_root.shape[0]):
        for k in range(7):
            root[a, k] = packs[take_root[a, k]]
        for k in range(7, take_root.shape[1]):
            body[row[first_link[a]], k] = packs[take_root[a, k]]
        for k in range(qpos.shape[1]):
            qpos[a, k] = packs[take_qpos[a, k]] if take_qpos[a, k] >= 0 else 0
            qvel[a, k] = packs[take_qvel[a, k]] if take_qvel[a, k] >= 0 else 0
    forward_kinematics(
        first_link, parent, kind, q_index, in_parent, child_inverse, sign, root, qpos, row, body
    )  # fmt: skip
