"""Observing, planning and handing over: times, executors, faults of a policy, and what fits which robot."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from deploy_peers import until
from ideal_arm import PANDA, PATIENT, REST, IdealArm, Memory, panda
from made_up_time import Stage
from scripted_planner import ScriptedPlanner, joint_spec, pick_cube_spec, stay
from torch import Tensor

from robopolicy.deploy.contract import Floats, RobotState
from robopolicy.deploy.kinematics import CHAINS
from robopolicy.deploy.observations import Built, ObservationBuilder, RobotClock, joints_at, resize, tool_pose
from robopolicy.deploy.playback import Ensemble, Playlist, TimedPlan
from robopolicy.deploy.robot import RobotFile
from robopolicy.deploy.semantics import ActionConverter, GripperLogic, euler_quaternion, require_fit
from robopolicy.deploy.session import Session
from robopolicy.errors import RobopolicyError, SpecMismatchError, UnknownNameError
from robopolicy.types import ModalitySpec, Observation, TaskSpec

CHAIN = CHAINS["panda"]
PICK = pick_cube_spec()
STREAMS = {"obj_pose": np.array([0.05, 0.01, 0.02, 0.8, 0.0, 0.0, 0.6]), "goal_pos": np.array([0.1, 0.0, 0.2])}


# ---- time ------------------------------------------------------------------------------------------------------------
def test_actions_are_due_at_their_place_after_the_observation() -> None:
    plan = TimedPlan(1, 10.0, 10.0, 0.05, np.arange(8.0)[:, None])
    assert [plan.index(t) for t in (9.9, 10.0, 10.049, 10.05, 10.15, 11.0)] == [0, 0, 0, 1, 3, 20]
    playlist = Playlist()
    assert playlist.slot(10.0) is None
    assert playlist.stood_still_since(5.0)
    playlist.publish(plan)
    slot = playlist.slot(10.12)
    assert slot is not None
    assert (slot.action[0], slot.due_s) == (2.0, pytest.approx(10.1))
    assert not playlist.stood_still_since(10.0)
    assert playlist.slot(10.41) is None
    assert playlist.slot(10.42) is None
    assert (playlist.underruns, playlist.standing_since_s) == (1, 10.41)
    assert playlist.remaining_s(10.3) == pytest.approx(0.1)


def test_an_ensemble_averages_what_plans_say_of_the_same_moment() -> None:
    mean = Ensemble((False, True), decay=0.5)
    first = mean(np.array([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]), 0.0, 0.05)
    np.testing.assert_allclose(first[:, 0], [1, 2, 3])
    second = mean(np.array([[4.0, -1.0], [5.0, -1.0], [6.0, -1.0]]), 0.05, 0.05)
    w = math.exp(-0.5)
    np.testing.assert_allclose(second[:, 0], [(2 + 4 * w) / (1 + w), (3 + 5 * w) / (1 + w), 6])
    np.testing.assert_allclose(second[:, 1], -1.0)  # a gripper is the newest plan's
    mean.reset()
    np.testing.assert_allclose(mean(np.array([[7.0, 1.0]]), 9.0, 0.05), [[7, 1]])


def test_the_robots_clock_is_put_on_ours_by_the_fastest_message() -> None:
    clock = RobotClock()
    rng = np.random.default_rng(0)
    for step in range(200):
        stamp_s = 500.0 + 0.01 * step
        clock.note(stamp_s, stamp_s - 400.0 + 0.002 + rng.exponential(0.005))
    state = RobotState(stamp_s=600.0, arrival_s=200.5, position=REST, velocity=None)
    assert clock.time(state) == pytest.approx(200.002, abs=2e-3)
    assert not clock.jumped
    assert RobotClock().time(state) == 200.5
    assert clock.time(dataclasses.replace(state, stamp_s=None)) == 200.5


# ---- observations ----------------------------------------------------------------------------------------------------
def builder(spec: TaskSpec = PICK, **settings: Any) -> ObservationBuilder:
    return ObservationBuilder(spec, panda(), CHAIN, **{"n_obs_steps": 2, "period_s": 0.05, **settings})


def moving_arm(make: ObservationBuilder, until: int = 30) -> IdealArm:
    """An arm whose joints move by 1 rad/s, measured every 10 ms until 100 + 0.01 * until."""
    arm = IdealArm(streams=STREAMS)
    for step in range(until + 1):
        now_s = 100.0 + 0.01 * step
        arm.position, arm.velocity = REST + 0.01 * step, np.ones(7)
        arm.streams["obj_pose"] = STREAMS["obj_pose"] + step
        arm.publish(now_s)
        state = arm.state()
        assert state is not None
        make.clock.note(state.stamp_s, state.arrival_s)
    return arm


def test_a_window_is_picked_by_time_and_holds_what_training_held() -> None:
    make = builder()
    built = make(moving_arm(make))
    assert isinstance(built, Built)
    assert built.time_s == pytest.approx(100.3)
    proprio = built.arrays["proprio"]
    np.testing.assert_allclose(proprio[1, :7], REST + 0.3, atol=1e-6)
    np.testing.assert_allclose(proprio[0, :7], REST + 0.25, atol=1e-6)  # one training period before, not one message
    np.testing.assert_allclose(proprio[1, 7:9], 0.04)
    np.testing.assert_allclose(proprio[1, 9:16], 1.0)
    pose = tool_pose(panda(), CHAIN, REST + 0.3)
    np.testing.assert_allclose(proprio[1, 18:25], pose, atol=1e-6)
    objects, goal = built.arrays["objects"], built.arrays["goal"]
    cube = STREAMS["obj_pose"] + 30
    np.testing.assert_allclose(
        objects[1], [0.0, *cube, *(cube[:3] - pose[:3]), *(STREAMS["goal_pos"] - cube[:3])], 1e-5
    )
    np.testing.assert_allclose(goal, [STREAMS["goal_pos"]] * 2, atol=1e-7)
    assert {k: tuple(v.shape) for k, v in built.observation.modalities.items()} == {
        "proprio": (1, 2, 25),
        "objects": (1, 2, 14),
        "goal": (1, 2, 3),
    }


def test_a_slower_speed_stretches_the_history_and_tells_velocities_as_the_policy_knows_them() -> None:
    make = builder(period_s=0.1, speed=0.5)
    built = make(moving_arm(make))
    assert isinstance(built, Built)
    np.testing.assert_allclose(built.arrays["proprio"][0, :7], REST + 0.2, atol=1e-6)
    np.testing.assert_allclose(built.arrays["proprio"][1, 9:16], 2.0)


def test_joints_are_interpolated_to_the_moment_of_the_slowest_stream() -> None:
    make = builder()
    arm = moving_arm(make)
    kept = list(arm._samples["obj_pose"])[:-3]
    arm._samples["obj_pose"].clear()
    arm._samples["obj_pose"].extend(dataclasses.replace(s, stamp_s=(s.stamp_s or 0.0) + 0.005) for s in kept)
    built = make(arm)
    assert isinstance(built, Built)
    assert built.time_s == pytest.approx(100.27, abs=0.0051)
    assert built.spread_s == pytest.approx(100.3 - built.time_s, abs=1e-9)
    np.testing.assert_allclose(built.arrays["proprio"][1, :7], REST + built.time_s - 100.0, atol=1e-6)


def test_an_episode_begins_with_its_first_frame_repeated() -> None:
    make = builder()
    arm = moving_arm(make)
    make.start(100.295)
    built = make(arm)
    assert isinstance(built, Built)
    np.testing.assert_allclose(built.arrays["proprio"][0], built.arrays["proprio"][1])


def test_what_is_missing_is_named() -> None:
    make = builder()
    assert make(IdealArm(streams=STREAMS)) == "no joint states"
    arm = IdealArm(streams=STREAMS)
    arm.publish(1.0)
    arm._samples["obj_pose"].clear()
    assert "'obj_pose' (/objects/obj_pose)" in str(make(arm))


def test_velocities_that_the_robot_does_not_tell_are_differences() -> None:
    states = [RobotState(stamp_s=None, arrival_s=t, position=REST + t, velocity=None) for t in (0.0, 0.1, 0.2)]
    position, velocity, width, _ = joints_at(0.15, states, [0.0, 0.1, 0.2])
    np.testing.assert_allclose(position, REST + 0.15)
    np.testing.assert_allclose(velocity, 1.0)
    assert width is None
    np.testing.assert_allclose(joints_at(9.0, states, [0.0, 0.1, 0.2])[1], 1.0)


def test_pictures_are_cut_to_shape_and_averaged() -> None:
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 20:60] = 200
    assert (resize(picture, 20, 20) == 200).all()
    assert resize(picture, 40, 80) is picture


def test_a_policy_that_sees_gets_its_pictures_in_the_shape_of_training() -> None:
    picture = ModalitySpec(shape=(3, 24, 32), fields={"sensor_data/base_camera/rgb": 3}, dtype="uint8")
    observation = {"proprio": PICK.observation["proprio"], "rgb.base_camera": picture}
    spec = dataclasses.replace(PICK, observation=observation)
    require_fit(spec, panda())
    make = builder(spec)
    assert make.streams == ["base_camera"]
    arm = IdealArm(streams={"base_camera": np.zeros((48, 80, 3))})
    for step in range(11):
        arm.publish(100.0 + 0.01 * step)
    kept = [
        dataclasses.replace(s, value=np.full((48, 80, 3), 10 * i, np.uint8))
        for i, s in enumerate(arm._samples["base_camera"])
    ]
    arm._samples["base_camera"].clear()
    arm._samples["base_camera"].extend(kept)
    built = make(arm)
    assert isinstance(built, Built)
    seen = built.observation.modalities["rgb.base_camera"]
    assert (seen.dtype, tuple(seen.shape)) == (torch.uint8, (1, 2, 3, 24, 32))
    assert [int(seen[0, i].max()) for i in range(2)] == [50, 100]
    data = yaml.safe_load(PANDA.read_text())
    data["observations"]["sensor_data/base_camera/rgb"] = "camera"
    with pytest.raises(SpecMismatchError, match="'camera' is not a stream"):
        require_fit(spec, RobotFile.from_dict(data))


# ---- executors -------------------------------------------------------------------------------------------------------
def increments(think_s: float = 0.0) -> ScriptedPlanner:
    """A planner of increments that stays where it is."""
    spec = joint_spec("pd_joint_delta_pos")
    return ScriptedPlanner(spec, stay(spec), think_s=think_s)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Stage]:
    """Return a function that begins a session on an ideal arm in made-up time."""

    def begin(planner: ScriptedPlanner, **settings: Any) -> Stage:
        on = Stage(monkeypatch, planner, streams=STREAMS, **settings)
        on.begin()
        return on

    return begin


def test_rti_plans_at_every_period_and_says_how_many_have_passed(stage: Callable[..., Stage]) -> None:
    planner = increments(think_s=0.02)
    on = stage(planner, executor="rti")
    on.run(lambda: len(planner.calls) >= 12)
    np.testing.assert_allclose(np.diff([t for t, _ in planner.calls]), 0.05, atol=0.0101)
    assert [shift for _, shift in planner.calls] == [0, *[1] * 11]
    assert on.session.playlist.underruns == 0
    assert on.session.runner.missed_periods == 0


def test_a_slow_policy_leaves_periods_out_and_skips_what_has_passed(stage: Callable[..., Stage]) -> None:
    planner = increments(think_s=0.12)
    on = stage(planner, executor="rti")
    on.run(lambda: on.session.runner.plans >= 5)
    assert on.session.runner.missed_periods in (5, 6, 7)  # 4 plans in 10 or 11 periods
    assert {shift for _, shift in planner.calls[1:]} <= {2, 3}
    assert on.session.runner.skipped[0] == 0  # the arm stood still: nothing is late
    assert set(list(on.session.runner.skipped)[1:]) == {2}


def test_sync_stands_still_while_it_thinks(stage: Callable[..., Stage]) -> None:
    planner = increments(think_s=0.1)
    on = stage(planner, executor="sync", n_action_steps=4)
    on.run(lambda: on.session.runner.plans >= 4)
    np.testing.assert_allclose(np.diff([t for t, _ in planner.calls]), 0.3, atol=0.0201)  # 4 actions and one plan
    assert set(on.session.runner.skipped) == {0}
    assert 25 <= on.session.loop.stats.holds <= 35


def test_async_has_the_next_plan_ready_in_time(stage: Callable[..., Stage]) -> None:
    planner = increments(think_s=0.1)
    on = stage(planner, executor="async", n_action_steps=6)
    on.run(lambda: on.session.runner.plans >= 6)
    assert on.session.playlist.underruns == 0
    periods = np.diff([t for t, _ in planner.calls[1:]])
    assert (abs(periods - 0.2) < 0.0201).all()  # observed 0.1 s before the 6 actions are over


def test_ensemble_plays_the_mean(stage: Callable[..., Stage]) -> None:
    def alternate(obs: Observation, call: int) -> Tensor:
        return torch.full((16, 7), 0.02 * (-1) ** call)

    on = stage(ScriptedPlanner(joint_spec("pd_joint_delta_pos"), alternate), executor="ensemble")
    on.run(lambda: on.session.runner.plans >= 12)
    plan = on.session.playlist.plan
    assert plan is not None
    assert abs(plan.actions[0]).max() < 0.01


def test_step_mode_asks_before_each_chunk(stage: Callable[..., Stage]) -> None:
    asked: list[int] = []

    def confirm(plan: object) -> bool:
        asked.append(1)
        return len(asked) < 3

    on = stage(increments(), mode="step", n_action_steps=2, confirm=confirm)
    on.run(on.session.stopped.is_set)
    assert len(asked) == 3
    assert "did not confirm" in on.session.stop_reason


# ---- in threads of their own -----------------------------------------------------------------------------------------
@pytest.fixture
def open_session() -> Iterator[Callable[..., Session]]:
    """Return a function that opens a session on an ideal arm in real time; no deadline of its is short."""
    opened: list[Session] = []

    def build(planner: ScriptedPlanner, **settings: Any) -> Session:
        arm = IdealArm(streams=STREAMS)
        arm.run()
        session = Session(arm, panda(**PATIENT), planner, **settings)
        session.open()
        opened.append(session)
        assert session.begin_within(30.0) == ""
        return session

    yield build
    for session in opened:
        session.close()
        session._robot.close()


def arm_of(session: Session) -> IdealArm:
    assert isinstance(session._robot, IdealArm)
    return session._robot


def test_the_policy_plans_in_a_thread_of_its_own_after_warming_up(open_session: Callable[..., Session]) -> None:
    planner = increments()
    session = open_session(planner, executor="rti")
    until(lambda: len(planner.calls) >= 5 and len(arm_of(session).sent) > 5)
    assert planner.calls[0][1] == 0
    assert all(shift >= 1 for _, shift in planner.calls[1:])
    assert planner.resets == 2  # after warming up, and at the start


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda chunk: torch.where(torch.arange(16)[:, None] == 9, torch.nan, chunk), "not finite"),
        (lambda chunk: chunk[:, :6], "shape (1, 16, 6)"),
        (lambda chunk: chunk[:10], "shape (1, 10, 7)"),
        (lambda chunk: chunk + 2.0, "rejected: jump"),
        (lambda chunk: chunk / chunk.missing, "AttributeError"),
    ],
)
def test_nothing_of_a_faulty_plan_leaves_and_the_stop_is_latched(
    open_session: Callable[..., Session], fault: Callable[[Tensor], Tensor], reason: str
) -> None:
    spec = joint_spec()
    good, memory = stay(spec), Memory()

    def say(obs: Observation, call: int) -> Tensor:
        return fault(good(obs, call)) if call >= 5 else good(obs, call)

    session = open_session(ScriptedPlanner(spec, say), recorders=[memory])
    arm = arm_of(session)
    assert session.stopped.wait(30.0)
    assert reason in session.stop_reason
    until(lambda: ("stop", session.stop_reason) in memory.events)
    assert arm.stops
    assert not arm.armed
    for _, position, velocity in arm.sent:  # finite: the arm itself checks
        np.testing.assert_allclose(position, REST, atol=1e-3)
        assert abs(velocity).max() < 0.05
    count, turns = len(arm.sent), session.loop.stats.turns
    until(lambda: session.loop.stats.turns > turns + 10)
    assert len(arm.sent) == count


def test_the_emergency_stop_acts_at_once_and_only_a_person_arms_again(stage: Callable[..., Stage]) -> None:
    planner = increments()
    on = stage(planner)
    arm, session = on.arm, on.session
    on.run(lambda: len(arm.sent) > 10)
    arm.press_estop()
    assert [reason for _, reason in arm.stops] == ["emergency stop from ROS: pressed"]
    assert "emergency stop" in session.stop_reason
    count, resets = len(arm.sent), planner.resets
    on.run_for(0.3)
    assert len(arm.sent) == count
    arm.silent = True
    on.run_for(0.3)
    assert "old" in session.rearm()  # not without fresh states
    arm.silent = False
    on.run_for(0.02)
    assert session.rearm() == ""
    on.run(lambda: len(arm.sent) > count + 5)
    assert planner.resets > resets
    assert session.rearm() == "the robot is not stopped"
    np.testing.assert_allclose(arm.sent[count][1], arm.position, atol=1e-3)


def test_a_stop_that_comes_while_arming_has_the_last_word(
    open_session: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(increments())
    arm = arm_of(session)
    session.end()

    def rearm() -> None:
        arm.press_estop()
        arm._armed = True

    monkeypatch.setattr(arm, "rearm", rearm)
    assert "emergency stop" in session.begin()
    assert not arm.armed
    assert session.loop.phase == "stopped"


def test_a_lost_link_stops_and_its_return_changes_nothing(stage: Callable[..., Stage]) -> None:
    on = stage(increments())
    on.run(lambda: len(on.arm.sent) > 5)
    on.arm.connected = False
    assert on.run(on.session.stopped.is_set) <= 0.0101  # at the next turn
    on.arm.connected, on.arm.generation = True, 2
    count = len(on.arm.sent)
    on.run_for(0.5)
    assert len(on.arm.sent) == count


def test_a_policy_that_thinks_too_long_stops_the_arm(stage: Callable[..., Stage]) -> None:
    on = stage(increments(think_s=0.4), file=panda(watchdogs__inference_s=0.2))
    on.run(on.session.stopped.is_set)
    assert "thinking for 0.2" in on.session.stop_reason


def test_work_on_every_plan_ages_no_state_and_delays_no_command(stage: Callable[..., Stage]) -> None:
    """Planning takes half of every period; what the loop sees and when it turns does not change."""
    on = stage(increments(think_s=0.03))
    on.run(lambda: on.session.runner.plans >= 15)
    moving = [tick for tick in on.memory.ticks if tick.phase == "moving"]
    assert max(tick.state_age_s for tick in moving) < 0.05
    np.testing.assert_allclose(np.diff([at for at, _, _ in on.arm.sent]), 0.01, atol=1e-6)


def test_the_loop_turns_and_sees_new_states_while_the_policy_keeps_python_busy(
    open_session: Callable[..., Session],
) -> None:
    """30 ms of Python per plan, in the policy's thread, however long that takes on this machine."""
    spec = joint_spec("pd_joint_delta_pos")
    quiet, turns_meanwhile = stay(spec), []

    def busy(obs: Observation, call: int) -> Tensor:
        before, until_s = session.loop.stats.turns if call else 0, time.thread_time() + 0.03
        while time.thread_time() < until_s:
            pass
        turns_meanwhile.append(session.loop.stats.turns - before if call else 1)
        return quiet(obs, call)

    memory = Memory()
    planner = ScriptedPlanner(spec, quiet)
    session = open_session(planner, recorders=[memory])
    planner.say = busy
    until(lambda: session.runner.plans >= 15)
    assert np.mean(np.array(turns_meanwhile) >= 1) > 0.5  # a loop that waited for the policy would never turn
    moving = [tick for tick in memory.ticks if tick.phase == "moving"]
    ages = [tick.state_age_s for tick in moving]
    assert min(ages[len(ages) // 2 :]) < 0.05  # states that queued up would be older from turn to turn


# ---- what fits -------------------------------------------------------------------------------------------------------
def test_the_published_policy_fits_the_shipped_robot_file() -> None:
    require_fit(PICK, panda())
    for mode in ("pd_joint_pos", "pd_joint_delta_pos", "pd_joint_target_delta_pos"):
        require_fit(joint_spec(mode), panda())


@pytest.mark.parametrize(
    ("action", "difference"),
    [
        ({"control_mode": "pd_joint_vel"}, "control mode: 'pd_joint_vel'"),
        ({"delta_from": "target"}, "delta_from: the checkpoint says 'target'"),
        ({"frame": "tool"}, "frame: increments in the frame 'tool'"),
        ({"names": ("ee_dy", "ee_dx", "ee_dz", "gripper")}, "order of action dimensions: ee_dy, ee_dx"),
        ({"high": (1.0, math.inf, 1.0, 1.0)}, "scale"),
        ({"control_dt_s": 0.01}, "rate: actions every 0.01 s"),
        ({"discrete": (True, False, False, True)}, "gripper: only one"),
    ],
)
def test_other_action_semantics_are_refused_with_the_difference(action: dict[str, Any], difference: str) -> None:
    with pytest.raises(SpecMismatchError, match="does not fit robot file 'panda'") as error:
        require_fit(pick_cube_spec(**action), panda())
    assert difference in str(error.value)


def test_other_robots_and_observations_are_refused() -> None:
    data = yaml.safe_load(PANDA.read_text())
    del data["observations"]["extra/obj_pose"]
    data["observations"]["extra/goal_pos"] = "goal_poss"
    data["observations"]["extra/tcp_to_obj_pos"] = "obj_pose - tcp_pose.position"
    data["gripper"] = None
    with pytest.raises(SpecMismatchError) as error:
        require_fit(dataclasses.replace(PICK, robot="xarm6_robotiq"), RobotFile.from_dict(data))
    for words in (
        "trained on 'xarm6_robotiq', the file stands for 'panda'",
        "extra/obj_pose has no source",
        "'goal_poss' is neither a stream nor one of",
        "gives 3 and 7 numbers, the policy wants 3",
        "gripper: the policy has one, the robot file none",
        "agent/qpos: 'joints.position' gives 7 numbers, the policy wants 9",
    ):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(jonts=[]), "robot has no key 'jonts'. Did you mean 'joints'?"),
        (lambda d: d["limits"].update(velocity=[1.0]), "limits.velocity must have one entry per joint (7); got 1"),
        (lambda d: d["command"].update(interface="twist"), "robot.command.interface must be one of"),
        (lambda d: d["safety"].update(jump_rad="far"), "robot.safety.jump_rad must be of type float; got 'far'"),
        (lambda d: d["frames"].update(base_position_m=[0, 0]), "base_position_m must have 3 entries; got 2"),
        (lambda d: d["streams"].update(x={"topic": "/x"}), "robot.streams.x lacks type, rate_hz"),
        (lambda d: d["command"].update(joints=["a"]), "command.joints must be the joints"),
        (lambda d: d.pop("safety"), "robot lacks safety"),
    ],
)
def test_a_robot_file_with_a_mistake_is_an_error_that_says_where(change: Callable[[Any], Any], words: str) -> None:
    data = copy.deepcopy(yaml.safe_load(PANDA.read_text()))
    change(data)
    with pytest.raises(RobopolicyError) as error:
        RobotFile.from_dict(data)
    assert words in str(error.value)


def test_a_streaming_controller_without_a_timeout_is_refused_unless_forced() -> None:
    spec, arm = joint_spec(), IdealArm()
    file = panda(command__interface="forward_position", command__timeout_s=0.0)
    with pytest.raises(RobopolicyError, match="no command timeout"):
        Session(arm, file, ScriptedPlanner(spec, stay(spec)))
    Session(arm, file, ScriptedPlanner(spec, stay(spec)), force=True)
    Session(arm, panda(command__interface="forward_position"), ScriptedPlanner(spec, stay(spec)))


def test_settings_that_cannot_work_are_refused() -> None:
    spec, arm = joint_spec(), IdealArm()
    for settings, error in (
        ({"speed": 0.0}, "speed must be in"),
        ({"n_action_steps": 16}, r"n_action_steps must be in \[1, 15\]"),
        ({"executor": "asink"}, "Did you mean 'async'"),
    ):
        with pytest.raises((RobopolicyError, UnknownNameError), match=error):
            Session(arm, panda(), ScriptedPlanner(spec, stay(spec)), **settings)  # type: ignore[arg-type]


# ---- actions ---------------------------------------------------------------------------------------------------------
def test_normalised_turns_are_negated_and_shortened_as_in_maniskill() -> None:
    spec = pick_cube_spec(
        control_mode="pd_ee_delta_pose",
        names=("ee_dx", "ee_dy", "ee_dz", "ee_drx", "ee_dry", "ee_drz", "gripper"),
        low=(-1.0,) * 7,
        high=(1.0,) * 7,
        delta=(True,) * 6 + (False,),
        discrete=(False,) * 6 + (True,),
        units=("m",) * 3 + ("rad",) * 3 + ("m",),
        physical_low=(-0.1,) * 3 + (0.1,) * 3 + (-0.01,),
        physical_high=(0.1,) * 3 + (-0.1,) * 3 + (0.04,),
    )
    require_fit(spec, panda())
    convert = ActionConverter(spec.action, panda(), CHAIN)
    physical = convert.physical(np.array([2.0, 0.5, -1.0, 3.0, 0.0, 4.0, 1.0]))
    np.testing.assert_allclose(physical, [0.1, 0.05, -0.1, -0.06, 0.0, -0.08, 0.04])
    found = convert(np.array([0, 0, 0, 0, 0, 1.0, 1.0]), REST, REST)
    before, after = CHAIN.forward(REST), CHAIN.forward(found.position)
    turn = 2 * np.arccos(abs(np.dot(before[3:], after[3:])))
    assert turn == pytest.approx(0.1, abs=1e-3)


def test_euler_angles_turn_about_x_then_the_new_y_then_the_new_z() -> None:
    from scipy.spatial.transform import Rotation

    for angles in np.random.default_rng(0).uniform(-3, 3, (20, 3)):
        x, y, z, w = Rotation.from_euler("XYZ", angles).as_quat(canonical=True)
        np.testing.assert_allclose(euler_quaternion(angles), [w, x, y, z], atol=1e-12)


def test_a_gripper_is_told_seldom() -> None:
    gripper = panda().gripper
    assert gripper is not None
    logic = GripperLogic(PICK.action, gripper)
    told = [logic(value, now_s) for now_s, value in ((0.0, 1.0), (0.05, 1.0), (0.1, -1.0), (0.3, -1.0), (0.6, 0.05))]
    assert told == [0.08, None, None, 0.0, None]
    flipped = dataclasses.replace(PICK.action, physical_low=(0.04,) * 4, physical_high=(-0.01,) * 4)
    assert GripperLogic(flipped, gripper)(1.0, 0.0) == 0.0


def test_joint_targets_of_every_joint_mode() -> None:
    measured, before, action = REST + 0.01, REST - 0.02, np.full(7, 0.5)

    def target(mode: str) -> Floats:
        return ActionConverter(joint_spec(mode).action, panda(), CHAIN)(action, measured, before).position

    np.testing.assert_allclose(target("pd_joint_pos"), 0.5)
    np.testing.assert_allclose(target("pd_joint_delta_pos"), measured + 0.05)
    np.testing.assert_allclose(target("pd_joint_target_delta_pos"), before + 0.05)
