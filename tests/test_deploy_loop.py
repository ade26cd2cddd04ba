"""The controller loop, turn by turn in made-up time: what it plays, how it holds, and what makes it stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ideal_arm import REST, IdealArm, Memory, panda
from made_up_time import Clock
from scripted_planner import ScriptedPlanner, joint_spec, pick_cube_spec, stay

from robopolicy.deploy import loop as loop_module
from robopolicy.deploy.contract import Floats, LinkStatus
from robopolicy.deploy.playback import TimedPlan
from robopolicy.deploy.robot import RobotFile, Watchdogs
from robopolicy.deploy.session import Session
from robopolicy.deploy.watchdog import Vitals, why_stop
from robopolicy.types import TaskSpec

DT = 0.01
POSE = np.array([0.05, 0.0, 0.02, 1.0, 0.0, 0.0, 0.0])


class Rig:
    """A session that is turned by hand: no threads, made-up time from `self.now_s` on."""

    def __init__(self, spec: TaskSpec, file: RobotFile | None = None, **settings: Any) -> None:
        self.memory = Memory()
        self.arm = IdealArm(streams={"obj_pose": POSE, "goal_pos": np.array([0.1, 0.0, 0.2])})
        self.session = Session(
            self.arm,
            file or panda(),
            ScriptedPlanner(spec, stay(spec)),
            recorders=[self.memory],
            **settings,
        )
        self.loop, self.playlist = self.session.loop, self.session.playlist
        self.now_s = time.monotonic()
        self.arm.publish(self.now_s)
        if self.session.mode != "shadow":
            self.arm.rearm()
        self.loop.arm(REST)

    def plan(self, actions: Floats, *, start_s: float | None = None, number: int = 1) -> TimedPlan:
        start_s = self.now_s if start_s is None else start_s
        plan = TimedPlan(number, start_s, start_s, 0.05, np.asarray(actions, float))
        self.playlist.publish(plan)
        return plan

    def turn(self, count: int = 1, each: Callable[[int], None] | None = None) -> None:
        for index in range(count):
            self.arm.publish(self.now_s)
            self.loop.turn(self.now_s)
            self.now_s += DT
            if each is not None:
                each(index)

    @property
    def sent(self) -> Floats:
        return np.array([position for _, position, _ in self.arm.sent])


def test_before_a_plan_the_arm_is_told_to_stay() -> None:
    rig = Rig(joint_spec())
    rig.turn(20)
    np.testing.assert_allclose(rig.sent, np.tile(REST, (20, 1)))
    assert rig.loop.phase == "waiting"


def test_absolute_targets_are_reached_by_the_end_of_their_period() -> None:
    rig = Rig(joint_spec(), panda(trained_lag_s=0.0, arm_lag_s=0.0, safety__ramp_in_s=0.0))
    way = REST + np.linspace(0.01, 0.08, 8)[:, None] * np.ones(7)
    rig.plan(way)
    rig.turn(40)
    assert rig.loop.phase == "moving"
    for step in range(2, 8):  # by then it moves steadily
        np.testing.assert_allclose(rig.sent[5 * step + 4], way[step], atol=4e-3)


def test_the_lag_of_maniskills_drives_is_put_in_front() -> None:
    rig = Rig(joint_spec(), panda(trained_lag_s=0.1, arm_lag_s=0.0, safety__ramp_in_s=0.0))
    rig.plan(np.tile(REST + 0.02, (8, 1)))
    rig.turn(30)
    expected = 0.02 * (1.0 - np.exp(-DT * np.arange(1, 31) / 0.1))
    gaps = rig.sent[:, 3] - REST[3]
    assert abs(gaps - expected).max() < 2.5e-3  # less the time to accelerate
    assert 0.6 < gaps[12] / 0.02 < 0.8


def test_measured_increments_start_from_where_the_arm_was_when_they_were_due() -> None:
    rig = Rig(joint_spec("pd_joint_delta_pos"), panda(trained_lag_s=0.0, arm_lag_s=0.0, safety__ramp_in_s=0.0))
    rig.plan(np.tile(np.eye(7)[0], (10, 1)))  # 0.1 rad each
    measured = []
    rig.turn(50, each=lambda i: measured.append(rig.arm.position[0]))
    targets = [t[0] for _, t in rig.loop._targets]
    assert len(targets) == 10
    for step in range(1, 10):
        assert targets[step] == pytest.approx(measured[5 * step - 1] + 0.1, abs=1e-6)


@pytest.mark.parametrize("late", [0, 3])
def test_target_increments_add_up_though_the_plan_came_late(late: int) -> None:
    rig = Rig(joint_spec("pd_joint_target_delta_pos"), panda(trained_lag_s=0.0, arm_lag_s=0.0, safety__ramp_in_s=0.0))
    rig.plan(0.1 * np.tile(np.eye(7)[0], (10, 1)), start_s=rig.now_s - late * 0.05)
    rig.turn(50 - 5 * late)
    rig.turn(20)
    assert rig.sent[-1, 0] == pytest.approx(REST[0] + 10 * 0.01, abs=2e-3)


def test_a_new_plan_of_target_increments_starts_from_the_target_at_its_observation() -> None:
    rig = Rig(joint_spec("pd_joint_target_delta_pos"), panda(trained_lag_s=0.0, arm_lag_s=0.0, safety__ramp_in_s=0.0))
    start_s = rig.now_s
    step = 0.1 * np.tile(np.eye(7)[0], (10, 1))
    rig.plan(step, start_s=start_s)
    rig.turn(22)  # slots 0 to 4
    rig.plan(step, start_s=start_s + 0.15, number=2)  # from before slot 3: targets 0.04, 0.05, ... as the first plan
    rig.turn(1)
    assert rig.loop._target[0] == pytest.approx(REST[0] + 0.05, abs=1e-9)


def test_without_a_next_plan_the_arm_holds_and_repeats_nothing() -> None:
    rig = Rig(joint_spec("pd_joint_delta_pos"))
    rig.plan(np.tile(np.eye(7)[0], (4, 1)))
    rig.turn(20)
    rig.turn(40)
    assert rig.loop.phase == "holding"
    assert rig.playlist.underruns == 1
    speed = np.diff(rig.sent[:, 0]) / DT
    assert speed[:19].max() > 0.05
    assert abs(speed[-15:]).max() < 1e-9
    rig.plan(np.zeros((4, 7)), number=2)
    rig.turn(5)
    assert rig.loop.phase == "moving"


def test_the_seam_between_plans_is_measured_and_faded() -> None:
    def way(blend_s: float) -> tuple[Floats, float]:
        rig = Rig(joint_spec(), panda(trained_lag_s=0.03, arm_lag_s=0.0, safety__ramp_in_s=0.0), seam_blend_s=blend_s)
        rig.plan(np.tile(REST, (10, 1)))
        rig.turn(10)
        rig.plan(np.tile(REST + 0.05, (10, 1)), start_s=rig.now_s - 0.02, number=2)
        rig.turn(38)
        assert list(rig.loop.stats.seams_rad) == pytest.approx([0.05])
        return rig.sent[9:], float(np.abs(np.diff(rig.sent[:, 0], 2)).max())

    (hard, sharp), (soft, smooth) = way(0.0), way(0.2)
    np.testing.assert_allclose(hard[-1], soft[-1], atol=2e-3)
    assert smooth < 0.6 * sharp


def test_a_goal_outside_the_workspace_is_moved_to_its_edge() -> None:
    file = panda(safety__workspace_low_m=[-0.7, -0.5, 0.15], safety__ramp_in_s=0.0)
    rig = Rig(pick_cube_spec(), file)
    down = np.tile([0.0, 0.0, -1.0, 1.0], (15, 1))
    for number in range(1, 4):
        rig.plan(down, number=number)
        rig.turn(70)
    assert rig.loop.stats.boxed > 10
    heights = [rig.loop._builder._chain.forward(q)[2] for q in rig.sent]
    assert min(heights) > 0.14
    assert heights[-1] < 0.155


def test_gripper_commands_are_few_and_reach_the_observation() -> None:
    rig = Rig(pick_cube_spec())
    actions = np.zeros((10, 4))
    actions[:, 3] = [1.0, 0.9, 0.05, -0.05, -1.0, -1.0, -0.9, 0.08, -0.08, -1.0]
    rig.plan(actions)
    rig.turn(50)
    assert rig.arm.grips == [0.08, 0.0]  # the band around the middle changes nothing
    rig.arm.width_m = 0.04
    rig.turn(8)
    built = rig.session.builder(rig.arm)
    assert not isinstance(built, str)
    assert built.arrays["objects"][:, 0].tolist() == [0.0, 1.0] or built.arrays["objects"][-1, 0] == 1.0


def test_the_lag_of_the_arm_is_found() -> None:
    rig = Rig(joint_spec(), panda(trained_lag_s=0.03, arm_lag_s=0.0))
    assert rig.loop.stats.following_turns() is None
    slow: list[Floats] = [REST] * 8

    def lag(index: int) -> None:
        slow.append(rig.arm.sent[-1][1])
        rig.arm.position = slow[-8]

    for number in range(1, 6):
        rig.plan(np.tile(REST + 0.1 * (-1) ** number, (10, 1)), number=number)
        rig.turn(40, each=lag)
    assert rig.loop.stats.following_turns() == 8


def test_shadow_sends_nothing_and_compares() -> None:
    rig = Rig(joint_spec(), mode="shadow")
    rig.plan(np.tile(REST + 0.1, (10, 1)))
    rig.turn(40)
    assert rig.arm.sent == []
    assert rig.arm.stops == []
    assert max(rig.loop.stats.shadow_rad) > 0.005
    assert rig.memory.ticks[-1].wanted is not None
    assert rig.memory.ticks[-1].sent is None


def test_every_turn_is_recorded_with_what_it_saw_and_did() -> None:
    rig = Rig(joint_spec())
    rig.plan(np.tile(REST + 0.5, (2, 1)))
    rig.turn(3)
    tick = rig.memory.ticks[-1]
    assert tick.index == 2
    assert tick.phase == "moving"
    np.testing.assert_allclose(tick.action, REST + 0.5)
    assert tick.sent is not None
    assert tick.clamped
    assert rig.arm.statuses == 1


# ---- stops -----------------------------------------------------------------------------------------------------------
def test_silent_joint_states_stop_the_arm_within_their_limit() -> None:
    rig = Rig(joint_spec())
    rig.plan(np.tile(REST, (100, 1)))
    rig.turn(5)
    rig.arm.silent = True
    begun_s = rig.now_s
    while not rig.session.stopped.is_set():
        rig.turn()
        assert rig.now_s - begun_s < 0.25
    assert "joint state" in rig.session.stop_reason
    assert ("stop", rig.session.stop_reason) in rig.memory.events
    count = len(rig.arm.sent)
    rig.arm.silent = False
    rig.turn(50)
    assert len(rig.arm.sent) == count  # latched, though all is well again
    assert rig.loop.phase == "stopped"


def test_old_states_that_arrive_regularly_are_recognised() -> None:
    """A slow reader gets every state, in order, later and later."""
    rig = Rig(joint_spec())
    rig.plan(np.tile(REST, (1000, 1)))
    rig.turn(100)
    for _ in range(30):
        rig.arm.stamp_offset_s += 0.009  # stamps advance by 1 ms per 10 ms
        rig.turn()
        if rig.session.stopped.is_set():
            break
    assert "joint state is 0.2" in rig.session.stop_reason


def test_a_clock_that_leaps_ahead_stops_the_arm() -> None:
    rig = Rig(joint_spec())
    rig.plan(np.tile(REST, (1000, 1)))
    rig.turn(250)
    rig.arm.stamp_offset_s -= 5.0
    rig.turn(2)
    assert "clock jumped" in rig.session.stop_reason


def test_a_rejected_wish_stops_the_arm_and_none_of_it_leaves() -> None:
    rig = Rig(joint_spec())
    rig.plan(np.tile(REST + 2.0, (10, 1)))
    rig.turn(5)
    assert "3 commands in a row were rejected: jump" in rig.session.stop_reason
    np.testing.assert_allclose(rig.sent, np.tile(REST, (len(rig.sent), 1)))
    assert rig.memory.ticks[0].rejected == "jump"
    assert rig.arm.stops


def test_a_stop_is_kept_with_its_first_reason() -> None:
    rig = Rig(joint_spec())
    rig.session.stop("first")
    rig.session.stop("second")
    assert rig.session.stop_reason == "first"
    assert [reason for _, reason in rig.arm.stops] == ["first", "second"]  # the robot is told each time


def test_a_loop_that_fails_stops_the_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(joint_spec())

    def fail(now_s: float) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(rig.playlist, "slot", fail)
    with pytest.raises(ZeroDivisionError):
        rig.loop.run()
    assert "control loop failed: ZeroDivisionError: planted" in rig.session.stop_reason
    assert rig.arm.stops


@pytest.mark.parametrize("busy", [False, True])
def test_missed_deadlines_say_whether_the_processor_was_elsewhere(monkeypatch: pytest.MonkeyPatch, busy: bool) -> None:
    clock = Clock()
    monkeypatch.setattr(loop_module, "time", clock)
    rig = Rig(joint_spec(), panda(watchdogs__loop_overrun_s=9.0, watchdogs__state_age_s=9.0))
    monkeypatch.setattr(clock, "sleep", lambda seconds: clock.work(seconds, cpu=0.0))

    def delay(now_s: float) -> None:
        rig.arm.publish(now_s)
        clock.work(0.0351, cpu=1.0 if busy else 0.1)
        if rig.loop.stats.turns == 9:
            rig.loop.close()

    monkeypatch.setattr(rig.playlist, "slot", delay)
    rig.loop.run()
    stats = rig.loop.stats
    assert (stats.turns, stats.missed) == (10, 22)  # the second begins 25.1 ms late, the third 30.2 ms, and so on
    assert stats.missed_without_cpu == (0 if busy else 22)
    assert stats.jitter_ms()["max"] == pytest.approx(30.8)


UP = LinkStatus(connected=True, data_age_s=0.0, ping_s=0.01, generation=1)


@pytest.mark.parametrize(
    ("vitals", "reason"),
    [
        ({}, ""),
        ({"link": LinkStatus(connected=False, data_age_s=0, ping_s=None, generation=1, detail="cut")}, "lost: cut"),
        ({"link": LinkStatus(connected=True, data_age_s=0, ping_s=None, generation=2)}, "lost and came back"),
        ({"link": LinkStatus(connected=True, data_age_s=0, ping_s=2.0, generation=1)}, "ping after 2.00 s"),
        ({"state_age_s": 0.21}, "joint state is 0.210 s old"),
        ({"state_age_s": math.inf}, "joint state is missing"),
        ({"observation_age_s": 0.31, "stream": "obj_pose"}, "'obj_pose' is 0.310 s old"),
        ({"spread_s": 0.11}, "0.110 s apart"),
        ({"inferring_s": 1.01}, "thinking for 1.01 s"),
        ({"late_s": 0.051}, "51 ms late"),
        ({"clock_jumped": True}, "clock jumped"),
    ],
)
def test_each_watchdog_has_its_deadline(vitals: dict[str, Any], reason: str) -> None:
    found = why_stop(Vitals(**{"state_age_s": 0.01, "link": UP, **vitals}), Watchdogs(), generation=1)
    assert reason in found
    assert bool(found) == bool(reason)
