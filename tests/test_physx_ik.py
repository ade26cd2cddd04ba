"""Inverse kinematics of the batched simulation: as Pinocchio's, row by row, and the arithmetic it is made of."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.transform import Rotation

from robopolicy.envs.batched_cpu import make_batched
from robopolicy.envs.physx_controllers import ChainSolver, Follow, end_effector_at_base
from robopolicy.envs.physx_lanes import LANES, any_below, arc_cosine, choose_below, lanes, load, sine_cosine, store

sim = pytest.mark.sim


@numba.njit
def compute(x: Any, out: Any) -> bool:  # pragma: no cover (compiled)
    for i in range(len(x) // LANES):
        sine, cosine = sine_cosine(load(x, i))
        store(out, 3 * i, sine)
        store(out, 3 * i + 1, cosine)
        store(out, 3 * i + 2, arc_cosine(choose_below(load(x, i), lanes(1.0), load(x, i), 2.0 - load(x, i))))
    return any_below(load(x, 0), load(x, 1))


def test_lanes_compute_what_numpy_does() -> None:
    small = np.array([0.0, 1e-9, -1e-4, 0.5, -0.5, 0.7071067811865476, -0.99, 1.0])
    large = np.array([1.0 - 1e-15, 1.0 + 1e-12, 1.5, 2.0, 2.9, np.nan, np.pi / 2, 3.0])
    x = np.stack([small, large])
    out = np.empty((2, 3, LANES))
    assert compute(x.reshape(-1), out.reshape(-1))
    assert not compute(x[::-1].reshape(-1), out[::-1].copy().reshape(-1))
    expected = np.stack([np.sin(x), np.cos(x), np.arccos(np.where(x < 1.0, x, 2.0 - x))], axis=1)
    assert_allclose(out, expected, rtol=4e-16, atol=2e-16)
    turns = np.linspace(-30.0, 30.0, 4000)
    out = np.empty((len(turns) // LANES, 3, LANES))
    compute(turns, out.reshape(-1))
    assert_allclose(out[:, 0].reshape(-1), np.sin(turns), atol=3e-16)
    assert_allclose(out[:, 1].reshape(-1), np.cos(turns), atol=3e-16)


@sim
def test_it_finds_what_pinocchio_finds_whatever_the_rows_beside() -> None:
    import sapien

    rng, count = np.random.default_rng(0), 2 * LANES + 3
    env = make_batched("PickCube-v1", count, obs_mode="state", control_mode="pd_ee_delta_pose")
    env.reset(seed=list(range(count)))
    arm = env.agent.controller.controllers["arm"]
    qpos = env.agent.robot.get_qpos().numpy().copy()
    qpos[:, :7] += rng.uniform(-0.3, 0.3, (count, 7)).astype(np.float32)
    start = end_effector_at_base(arm).raw_pose.numpy()
    shift = start[:, :3] + rng.uniform(-0.1, 0.1, (count, 3)).astype(np.float32)
    angle = np.r_[np.zeros(3), np.full(6, 0.2), np.full(5, 1.0), np.full(count - 14, 3.1)]  # the last near half a turn
    axis = rng.normal(size=(count, 3))
    turned = Rotation.from_rotvec(axis / np.linalg.norm(axis, axis=1)[:, None] * angle[:, None])
    turn = (turned * Rotation.from_quat(start[:, 3:], scalar_first=True)).as_quat(scalar_first=True).astype(np.float32)
    solver, follow = ChainSolver(arm), Follow(delta=False, body_shift=False, body_turn=False)
    target, mine = solver.solve(follow, shift, turn, start, qpos)
    assert_array_equal(target, np.c_[shift, turn])

    model, found = arm.kinematics, []
    for i in range(count):
        pose = sapien.Pose(shift[i], turn[i])
        mask = model.qmask.numpy()
        result, success, _ = model.pmodel.compute_inverse_kinematics(model.end_link_idx, pose, qpos[i], mask, 1e-4, 100)
        assert_allclose(mine[i], result[:7] if success else qpos[i, :7], rtol=0, atol=1e-6)
        found.append(success)
        alone = [x[i : i + 1] for x in (shift, turn, start, qpos)]
        assert_array_equal(solver.solve(follow, *alone)[1][0], mine[i])
    env.close()
    assert all(found[:3])
    assert not all(found), "rows that Pinocchio gives up should be among them"
    assert any(found[14:]), "and rows that turn by nearly half a turn and arrive"
