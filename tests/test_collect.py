"""Demonstrations by motion planning: playback laws, ManiSkill's own tools as readers, interruption, replay."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robopolicy.data.maniskill import load_demonstrations
from robopolicy.envs.demo_files import Attempt, Episode, Journal, Tally
from robopolicy.envs.demonstrations import collect, summary
from robopolicy.envs.playback import ActionOutOfRange, PlanPlayer, Shortening, split
from robopolicy.envs.solvers import Plan
from robopolicy.errors import DataError, RobopolicyError, UnknownNameError


class PointArm:
    """A made-up arm of one joint that moves at once: its action is the way to the target, at most 1."""

    mode = "pd_ee_delta_pos"

    def __init__(self) -> None:
        self.at = np.zeros(1)

    def __call__(self, qpos: np.ndarray) -> np.ndarray:
        return qpos - self.at

    def within(self, action: np.ndarray, limit: float) -> bool:
        return bool(np.abs(action).max() <= limit + 1e-9)

    def pose(self, qpos: np.ndarray) -> tuple[np.ndarray, None]:
        return np.array([qpos[0], 0.0, 0.0]), None

    def now(self) -> np.ndarray:
        return self.at

    def fingers(self) -> np.ndarray:
        return np.zeros(2)


def a_plan(steps: list[float], grips: list[float]) -> Plan:
    return Plan(qpos=np.cumsum(steps)[:, None], gripper=np.array(grips)[:, None], success=True)


def play(plan: Plan, options: Shortening) -> tuple[list[float], list[float]]:
    """Return the places and gripper commands of every step until the plan is finished."""
    arm = PointArm()
    player = PlanPlayer(plan, arm, options)  # type: ignore[arg-type]
    places, grips = [], []
    while not player.finished:
        action = player.action()
        arm.at = arm.at + action[:1]
        places.append(float(arm.at[0]))
        grips.append(float(action[1]))
        assert len(places) < 1000
    return places, grips


GRASP = a_plan([0.1] * 10 + [0.0] * 6 + [-0.1] * 10, [1.0] * 11 + [-1.0] * 15)


def test_the_solvers_own_timing_is_played_as_it_is() -> None:
    places, grips = play(GRASP, Shortening(speed=1, max_action=1, skip_idle=False))
    np.testing.assert_allclose(places, GRASP.qpos[:, 0], atol=1e-6)
    assert grips == GRASP.gripper[:, 0].tolist()


def test_a_plan_is_split_where_the_arm_waits_and_the_gripper_changes() -> None:
    found = [(s.first, s.last, s.waits) for s in split(GRASP)]
    assert found == [(0, 8, False), (9, 10, True), (11, 15, True), (16, 25, False)]


def test_shortened_play_passes_the_grasp_and_ends_at_the_end() -> None:
    places, grips = play(GRASP, Shortening(speed=10, max_action=0.5))
    assert len(places) < len(GRASP) / 2
    assert places[-1] == pytest.approx(GRASP.qpos[-1, 0])
    closed = grips.index(-1.0)
    assert places[closed] == pytest.approx(1.0)
    assert grips == [1.0] * closed + [-1.0] * (len(grips) - closed)


@settings(deadline=None, max_examples=50)
@given(
    steps=st.lists(st.floats(-0.15, 0.15), min_size=2, max_size=40),
    speed=st.floats(1, 12),
    max_action=st.floats(0.2, 1.0),
)
def test_no_step_uses_more_than_allowed_and_none_is_longer_than_the_plan(
    steps: list[float], speed: float, max_action: float
) -> None:
    plan = a_plan(steps, [1.0] * len(steps))
    places, _ = play(plan, Shortening(speed=speed, max_action=max_action))
    assert np.abs(np.diff([0.0, *places])).max() <= max_action + 1e-6
    assert places[-1] == pytest.approx(plan.qpos[-1, 0], abs=1e-6)


def test_what_the_controller_cannot_reach_is_refused() -> None:
    waits_elsewhere = a_plan([0.1, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0])
    with pytest.raises(ActionOutOfRange, match="pd_ee_delta_pos"):
        play(waits_elsewhere, Shortening())


def test_a_jump_of_the_plan_is_made_in_admissible_steps() -> None:
    places, _ = play(a_plan([2.0, 0.1], [1.0, 1.0]), Shortening(max_action=0.5))
    assert np.diff([0.0, *places]).max() <= 0.5
    assert places[-1] == pytest.approx(2.1)


@pytest.mark.parametrize("wrong", [{"speed": 0.5}, {"max_action": 0}, {"max_action": 1.5}, {"hold_steps": -1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Shortening(**wrong)  # type: ignore[arg-type]


def an_episode(length: int = 3) -> Episode:
    return Episode(
        seed=5,
        reset_kwargs={"seed": 5, "options": {}},
        obs={"agent": {"qpos": np.zeros((length + 1, 9), np.float32)}},
        env_states={"actors": {"cube": np.zeros((length + 1, 13), np.float32)}},
        actions=np.zeros((length, 4), np.float32),
        outcomes={"success": np.ones(length, bool)},
        plan_steps=10,
    )


def test_a_journal_remembers_and_refuses_other_settings(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    assert journal.open({"seed": 0}, overwrite=False) == {}
    kept = journal.keep(5, an_episode())
    journal.reject(Attempt(key=4, reason="no motion found"))
    (tmp_path / "j" / "0000000006.h5.tmp").write_bytes(b"half")
    (tmp_path / "j" / "0000000007.h5").write_bytes(b"")
    again = Journal(tmp_path / "j").open({"seed": 0}, overwrite=False)
    assert again == {4: Attempt(key=4, reason="no motion found"), 5: kept}
    assert Tally.of(list(again.values())).to_dict()["rejected"] == {"no motion found": 1}
    with pytest.raises(DataError, match=r"other settings \(seed\)"):
        journal.open({"seed": 1}, overwrite=False)
    assert journal.open({"seed": 1}, overwrite=True) == {}


def test_a_task_without_a_solver_lists_those_that_have_one(cli: Callable[..., object], empty_cwd: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'push_t'.*pick_cube.*stack_cube"):
        collect("push_t", out_dir=empty_cwd)
    done = cli("collect", "task=push_t")
    assert done.code == 2  # type: ignore[attr-defined]
    assert "pick_cube" in done.err  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrong", [{"num_demos": 0}, {"num_workers": 0}, {"control_mode": "pd_joint_vel"}])
def test_wrong_arguments_are_refused_before_any_work(wrong: dict[str, Any], empty_cwd: Path) -> None:
    with pytest.raises(RobopolicyError, match=next(iter(wrong)).replace("_", ".")):
        collect("push_cube", **wrong)
    assert not list(empty_cwd.rglob("*.partial"))


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two demonstrations of PushCube made by one worker."""
    return collect("push_cube", num_demos=2, out_dir=tmp_path_factory.mktemp("demos"), num_workers=1)


@pytest.mark.sim
def test_demonstrations_load_for_training(demos: Path) -> None:
    store = load_demonstrations(demos)
    assert store.seeds.tolist() == [0, 1]
    assert store.success.all()
    assert set(store.modalities) == {"proprio", "objects", "goal"}
    assert store.action.abs().max() <= 1
    counts = summary(demos)
    assert counts["kept"] == 2
    assert counts["median_steps"] < counts["median_plan_steps"] / 2
    with h5py.File(demos) as file:  # success lasts to the end, and does not begin long before
        assert file["traj_0/success"][:].sum() == Shortening().hold_steps + 1


@pytest.mark.sim
def test_maniskills_dataset_reads_them(demos: Path) -> None:
    from robopolicy.envs import load_maniskill

    load_maniskill()
    from mani_skill.trajectory.dataset import ManiSkillTrajectoryDataset

    dataset = ManiSkillTrajectoryDataset(str(demos), success_only=True)
    store = load_demonstrations(demos)
    assert len(dataset) == store.num_frames
    np.testing.assert_array_equal(dataset.obs["agent"]["qpos"], store.modalities["proprio"][:, :9])
    np.testing.assert_array_equal(dataset.actions, store.action)


@pytest.mark.sim
def test_maniskills_replay_succeeds(demos: Path) -> None:
    from robopolicy.envs import load_maniskill
    from robopolicy.envs.rendering import inert_materials

    load_maniskill()
    from mani_skill.trajectory import replay_trajectory as tool

    about = json.loads(demos.with_suffix(".json").read_text())["env_info"]
    kwargs = {**about["env_kwargs"], "render_backend": "none", "num_envs": 1}
    args = tool.Args(traj_path=str(demos), count=2)
    with inert_materials():
        _, result = tool._main(
            args, True, about["env_id"], kwargs, kwargs, {"save_trajectory": False, "save_video": False}
        )
    assert (result.num_replays, result.successful_replays) == (2, 2)


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.sim
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_and_continued_with_other_workers_gives_the_same_file(
    demos: Path, tmp_path: Path, how: signal.Signals
) -> None:
    words = [sys.executable, "-m", "robopolicy", "collect", "task=push_cube", "num_demos=2", f"out_dir={tmp_path}"]
    partial = tmp_path / "push_cube" / f".{demos.stem}.partial"
    running = subprocess.Popen(
        [*words, "num_workers=1"], stderr=subprocess.PIPE, text=True, preexec_fn=_heed_ctrl_c, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(partial.glob("0*.h5")) and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    (os.killpg if how == signal.SIGINT else os.kill)(running.pid, how)  # Ctrl-C reaches the workers, too
    said = running.communicate(timeout=60)[1]
    if running.returncode != 0:  # 0: it was finished by then
        assert running.returncode == (130 if how == signal.SIGINT else -9)
        assert "Traceback" not in said
    path = collect("push_cube", num_demos=2, out_dir=tmp_path, num_workers=2)
    assert path.read_bytes() == demos.read_bytes()
    assert path.with_suffix(".json").read_text() == demos.with_suffix(".json").read_text()
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, path.with_suffix(".json").name])


@pytest.mark.sim
def test_a_file_is_extended_kept_and_protected(demos: Path, tmp_path: Path) -> None:
    path = collect("push_cube", num_demos=1, out_dir=tmp_path, num_workers=1)
    path = collect("push_cube", num_demos=2, out_dir=tmp_path, num_workers=1)
    assert path.read_bytes() == demos.read_bytes()
    written = path.stat().st_mtime_ns
    assert collect("push_cube", num_demos=2, out_dir=tmp_path).stat().st_mtime_ns == written
    with pytest.raises(DataError, match=r"other settings \(seed\)"):
        collect("push_cube", num_demos=2, out_dir=tmp_path, seed=9)


@pytest.mark.sim
def test_a_users_file_is_replayed_into_another_control_mode(demos: Path, tmp_path: Path) -> None:
    path = collect("push_cube", source=demos, control_mode="pd_joint_delta_pos", out_dir=tmp_path, num_workers=1)
    store = load_demonstrations(path)
    assert store.spec.action.control_mode == "pd_joint_delta_pos"
    assert store.seeds.tolist() == [0, 1]
    assert store.success.all()
    with pytest.raises(DataError, match=r"PushCube-v1.*PickCube-v1"):
        collect("pick_cube", source=demos, out_dir=tmp_path)
    with pytest.raises(DataError, match=r"nowhere\.h5 does not exist"):
        collect("push_cube", source=tmp_path / "nowhere.h5", out_dir=tmp_path)
