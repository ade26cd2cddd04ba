"""The batched CPU simulation: equal to ManiSkill's own, independent of size and history, plain about mistakes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robopolicy.envs import physx_native
from robopolicy.envs.batched_cpu import make_batched
from robopolicy.envs.physx_native import SYSTEM, addresses, advance_without_lock
from robopolicy.envs.physx_threads import WorkerPool, thread_count
from robopolicy.envs.rendering import inert_materials, load_maniskill, render_backend
from robopolicy.errors import MissingRequirementError, RobopolicyError, ShapeError, UnknownNameError

sim = pytest.mark.sim
STATE = {"obs_mode": "state"}


@contextmanager
def batch(env_id: str, num_envs: int, **settings: Any) -> Iterator[Any]:
    env = make_batched(env_id, num_envs, **{**STATE, **settings})
    try:
        yield env
    finally:
        env.close()


def actions(env: Any, steps: int, seed: int = 0) -> Tensor:
    """Random actions [T, N, A]; row i of a batch is the same for every N."""
    rows = [
        torch.rand(steps, env.single_action_space.shape[0], generator=torch.Generator().manual_seed(seed + i)) * 2 - 1
        for i in range(env.num_envs)
    ]
    return torch.stack(rows, dim=1)


def rollout(env: Any, seeds: list[int], acts: Tensor) -> Tensor:
    """Return observation, reward and success of every step, [T + 1, N, S + 2]."""
    obs, _ = env.reset(seed=seeds)
    out = [torch.cat([obs, torch.zeros(len(obs), 2)], dim=1)]
    for act in acts:
        obs, reward, _, _, info = env.step(act)
        out.append(torch.cat([obs, reward[:, None].float(), info["success"][:, None].float()], dim=1))
    return torch.stack(out)


@sim
@pytest.mark.parametrize(
    ("env_id", "mode"),
    [
        ("PickCube-v1", "pd_joint_delta_pos"),
        ("PickCube-v1", "pd_ee_delta_pos"),
        ("RollBall-v1", "pd_ee_delta_pose"),
        ("PushT-v1", "pd_ee_target_delta_pose"),
        ("StackCube-v1", "pd_joint_vel"),
        ("TwoGoalReach-v1", "pd_ee_delta_pos"),
        ("PegInsertionSide-v1", "pd_ee_delta_pose"),
    ],
)
def test_an_episode_equals_maniskills_own_cpu_simulation(env_id: str, mode: str) -> None:
    load_maniskill()
    import gymnasium

    seeds = [11, 12]
    with batch(env_id, 2, control_mode=mode) as env:
        acts = actions(env, 25)
        mine = rollout(env, seeds, acts)
    with inert_materials():
        stock = gymnasium.make(env_id, sim_backend="physx_cpu", render_backend="none", control_mode=mode, **STATE)
        for i, seed in enumerate(seeds):
            theirs = rollout(stock.unwrapped, seed, acts[:, i])  # type: ignore[arg-type]
            torch.testing.assert_close(mine[:, i], theirs[:, 0], atol=1e-4, rtol=0)
        stock.close()


@sim
@pytest.mark.parametrize(
    ("env_id", "mode"), [("PickCube-v1", "pd_ee_delta_pose"), ("PlugCharger-v1", "pd_joint_delta_pos")]
)
def test_a_row_does_not_depend_on_size_neighbours_threads_or_history(
    env_id: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = list(range(40, 56))
    with batch(env_id, 16, control_mode=mode) as env:
        acts = actions(env, 20)
        many = rollout(env, seeds, acts)
    monkeypatch.setenv("ROBOPOLICY_SIM_THREADS", "1")
    with batch(env_id, 1, control_mode=mode) as env:
        for i in (9, 2):  # one scene after the other: what came before must not matter either
            torch.testing.assert_close(rollout(env, [seeds[i]], acts[:, i : i + 1])[:, 0], many[:, i], atol=0, rtol=0)


@sim
def test_stepping_leaves_pythons_lock_to_other_threads() -> None:
    advance = advance_without_lock()
    assert advance is not None, "the SAPIEN of this test run exports what it takes"
    with batch("PushCube-v1", 2, control_mode="pd_joint_delta_pos") as env:
        env.reset(seed=[0, 1])
        where = addresses(env.scene.px.systems, SYSTEM)
        advance(where, 1)  # compiled here
        stepping = threading.Thread(target=advance, args=(where, 20_000))  # long: about half a second
        stepping.start()
        assert stepping.is_alive(), "this thread had to wait until all steps were done"
        stepping.join()


@sim
@pytest.mark.parametrize("mode", ["pd_ee_delta_pos", "pd_joint_vel"])
def test_without_the_library_steps_are_the_same(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = (physx_native.advance_without_lock, physx_native.drive_setter, physx_native._pose_reader)
    states = []
    for library in (physx_native._library, lambda: None):
        monkeypatch.setattr(physx_native, "_library", library)
        for function in found:
            function.cache_clear()
        with batch("PickCube-v1", 2, control_mode=mode) as env:
            assert (env.scene.px._advance is None) == (library() is None)
            states.append(rollout(env, [3, 4], actions(env, 10)))
    for function in found:
        function.cache_clear()
    assert torch.equal(*states)


@sim
def test_a_partial_reset_leaves_the_others_alone_and_starts_as_a_full_one_does() -> None:
    with batch("PickCube-v1", 4, control_mode="pd_ee_target_delta_pos") as env:
        acts = actions(env, 12)
        undisturbed = rollout(env, [1, 2, 3, 4], acts)
        fresh = rollout(env, [1, 2, 77, 4], acts)
        env.reset(seed=[1, 2, 3, 4])
        for act in acts[:6]:
            env.step(act)
        obs, _ = env.reset(seed=[77], options={"env_idx": torch.tensor([2])})
        assert torch.equal(obs[2], fresh[0, 2, :-2])
        assert env.elapsed_steps.tolist() == [6, 6, 0, 6]
        for t in range(6):
            act = acts[6 + t].clone()
            act[2] = acts[t, 2]
            obs = env.step(act)[0]
            others = [0, 1, 3]
            assert torch.equal(obs[others], undisturbed[7 + t, others, :-2])
            assert torch.equal(obs[2], fresh[t + 1, 2, :-2])


@sim
def test_states_can_be_read_and_set_again() -> None:
    with batch("StackCube-v1", 3, control_mode="pd_joint_delta_pos") as env:
        env.reset(seed=[5, 6, 7])
        acts = actions(env, 10)
        for act in acts[:5]:
            env.step(act)
        state, flat = env.get_state_dict(), env.get_state()
        moved = [env.step(act)[0] for act in acts[5:]]
        env.set_state_dict(state)
        torch.testing.assert_close(env.get_state(), flat, atol=1e-6, rtol=0)
        again = [env.step(act)[0] for act in acts[5:]]
        torch.testing.assert_close(torch.stack(again), torch.stack(moved), atol=1e-4, rtol=0)
        only = flat[1:2].clone()
        only[:, :2] += 0.05
        before = env.get_state()
        env.set_state(only, torch.tensor([1]))
        after = env.get_state()
        assert torch.equal(after[[0, 2]], before[[0, 2]])
        torch.testing.assert_close(after[1:2], only, atol=1e-6, rtol=0)


@sim
def test_shapes_follow_the_seed() -> None:
    with batch("PegInsertionSide-v1", 2, obs_mode="state_dict") as env:
        sizes = [env.reset(seed=seeds)[0]["extra"]["peg_half_size"] for seeds in ([3, 4], [5, 3], [3, 4])]
    assert torch.equal(sizes[0], sizes[2])
    assert torch.equal(sizes[0][0], sizes[1][1])
    assert not torch.equal(sizes[0][0], sizes[0][1])


@sim
def test_link_velocities_and_contacts_match_sapiens() -> None:
    with batch("PickCube-v1", 2, control_mode="pd_joint_delta_pos") as env:
        env.reset(seed=[1, 2])
        for act in actions(env, 5):
            env.step(act)
        for link in env.agent.robot.links:
            velocities = [np.r_[body.linear_velocity, body.angular_velocity] for body in link._objs]
            mine = torch.cat([link.linear_velocity, link.angular_velocity], dim=1)
            np.testing.assert_allclose(mine.numpy(), np.array(velocities), atol=2e-5)
        weight = env.cube.get_net_contact_forces()[:, 2]
        expected = env.cube.mass * 9.81
        torch.testing.assert_close(weight, expected, rtol=0.05, atol=0)
        table = env.scene.get_pairwise_contact_forces(env.cube, env.table_scene.table)
        torch.testing.assert_close(table[:, 2], weight)
        env.reset(seed=[1, 2])
        assert not env.cube.get_net_contact_forces().any()


@sim
def test_mistakes_are_named_and_harm_no_other_environment() -> None:
    with batch("PushCube-v1", 2) as other, batch("PushCube-v1", 2) as env:
        other.reset(seed=[1, 2])
        env.reset(seed=[1, 2])
        good = actions(env, 1)[0]
        bad = good.clone()
        bad[1, 3] = torch.nan
        with pytest.raises(RobopolicyError, match=r"environments \[1\] are not finite"):
            env.step(bad)
        with pytest.raises(ShapeError, match=r"\[N=2, A=8\], got \(2, 5\)"):
            env.step(good[:, :5])
        with pytest.raises(ShapeError, match="seed must be one int or one per environment"):
            env.reset(seed=[1, 2, 3])
        expected = env.step(good)[0]
        env.close()
        env.close()
        for call in (lambda: env.step(good), env.reset, env.render):
            with pytest.raises(RobopolicyError, match="closed"):
                call()
        assert torch.equal(other.step(good)[0], expected)


@sim
def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="PickCube-v1"):
        make_batched("PickCub-v1", 2)
    with pytest.raises(ValueError, match="at least 1"):
        make_batched("PickCube-v1", 0)
    with pytest.raises(MissingRequirementError, match="download_asset"):
        make_batched("PickSingleYCB-v1", 2)


@sim
def test_versions_outside_the_tested_range_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    load_maniskill()
    from robopolicy.envs import physx_patches

    physx_patches.require_versions()
    monkeypatch.setattr(physx_patches, "version", lambda package: "4.0.0")
    with pytest.raises(MissingRequirementError, match=r"fits 3\.0\.1 <= version < 3\.1; 4\.0\.0 is installed"):
        physx_patches.require_versions()


@sim
def test_pictures_equal_those_of_the_single_environment() -> None:
    backend = render_backend()
    if backend is None:
        pytest.skip("no Vulkan device")
    import gymnasium

    settings = {"obs_mode": "rgb", "render_backend": backend, "sensor_configs": {"width": 32, "height": 24}}
    with batch("PickCube-v1", 2, **settings) as env:
        env.reset(seed=[8, 9])
        obs, _ = env.reset(seed=[3, 4])
        mine = obs["sensor_data"]["base_camera"]["rgb"].clone()
    assert mine.shape == (2, 24, 32, 3)
    assert mine.dtype == torch.uint8
    stock = gymnasium.make("PickCube-v1", sim_backend="physx_cpu", **settings)
    theirs = stock.unwrapped.reset(seed=4)[0]["sensor_data"]["base_camera"]["rgb"]  # type: ignore[attr-defined]
    assert (mine[1].int() - theirs[0].int()).abs().max() <= 1
    stock.close()


def test_the_pool_shares_out_items_and_raises_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, seen, names = WorkerPool(3), [], set()
    gate = threading.Barrier(3)

    def work(item: int) -> None:
        if item < 3:
            gate.wait(timeout=10)  # passes only if three threads work at once
        seen.append(item)
        names.add(threading.current_thread().name)

    pool.map(work, list(range(50)))
    assert sorted(seen) == list(range(50))
    assert len(names) == 3
    with pytest.raises(ZeroDivisionError):
        pool.map(lambda item: 1 // item, [1, 0, 1, 1])
    pool.map(work, [7])
    monkeypatch.setenv("ROBOPOLICY_SIM_THREADS", "many")
    with pytest.raises(ValueError, match="ROBOPOLICY_SIM_THREADS"):
        thread_count()
