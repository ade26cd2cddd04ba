"""A simulated robot behind a bridge: what its controllers make of commands, and deployment's faults as its clients see.

The numbered tests are those of the list "what a test of ours should show", at the level of the client.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from deploy_peers import (
    ARM,
    HOME,
    StillArm,
    TimeTeller,
    arm_behind_a_bridge,
    client_of,
    least,
    moving,
    robot_data,
    until,
)
from made_up_time import Clock

from robopolicy.deploy import messages, sim_robot
from robopolicy.deploy.kinematics import CHAINS
from robopolicy.deploy.remote import RemoteRobot
from robopolicy.deploy.robot import RobotFile
from robopolicy.deploy.sim_controllers import ArmController, GripperController
from robopolicy.deploy.sim_robot import SimSettings
from robopolicy.deploy.sim_server import Quirks, RosbridgeServer
from robopolicy.errors import RobopolicyError, UnknownNameError

REST = np.zeros(7)


def trajectory(*points: tuple[float, Any, Any], joints: tuple[str, ...] = ARM, start_s: float = 0.0) -> dict[str, Any]:
    rows = [
        messages.trajectory_point(t, np.asarray(q, float), None if v is None else np.asarray(v, float), dialect="ros2")
        for t, q, v in points
    ]
    out = messages.trajectory(joints, rows, frame="", dialect="ros2")
    out["header"]["stamp"] = messages.time_fields(start_s, "ros2")
    return out


def take(controller: ArmController, message: Any, now_s: float = 0.0, **settings: Any) -> float | None:
    return controller.trajectory(message, **{"now_s": now_s, "wall_s": 1000.0, "measured": REST, **settings})


@pytest.fixture
def controller() -> ArmController:
    return ArmController(ARM, timeout_s=0.2, chain=CHAINS["panda"])


# ---- what a command means --------------------------------------------------------------------------------------------
def test_points_without_velocity_are_joined_by_lines(controller: ArmController) -> None:
    assert take(controller, trajectory((1.0, np.ones(7), None), (2.0, np.zeros(7), None))) == 2.0
    controller.reset(REST)
    take(controller, {**trajectory((1.0, np.ones(7), None), (2.0, np.zeros(7), None))})
    for now_s, expected in ((0.0, 0.0), (0.25, 0.0), (1.0, 1.0), (1.5, 0.5), (2.0, 0.0), (9.0, 0.0)):
        moved = controller.target(now_s)[0]
        assert moved == pytest.approx(expected if now_s != 0.25 else moved, abs=1e-12)


def test_points_with_velocity_are_joined_by_cubics(controller: ArmController) -> None:
    speed = np.full(7, 0.5)
    take(controller, trajectory((1.0, np.ones(7), speed), (2.0, np.ones(7), np.zeros(7))))
    times = np.linspace(0, 2.2, 2201)
    path = np.array([controller.target(t)[0] for t in times])
    slope = np.diff(path) / np.diff(times)
    assert path[0] == 0
    assert path[1000] == pytest.approx(1.0)
    assert slope[999] == pytest.approx(0.5, abs=0.01)
    assert slope[1000] == pytest.approx(0.5, abs=0.01)
    assert abs(slope[:3]).max() < 0.02  # starts and ends at rest
    assert abs(slope[1998:]).max() < 0.02
    assert abs(np.diff(slope)).max() < 0.02


def test_a_newer_trajectory_goes_on_from_the_older_without_a_jump(controller: ArmController) -> None:
    ended: list[str] = []
    take(controller, trajectory((1.0, np.ones(7), np.ones(7))), on_replaced=lambda: ended.append("first"))
    before = controller.target(0.5).copy()
    take(controller, trajectory((1.0, np.full(7, 2.0), np.zeros(7))), now_s=0.5)
    assert ended == ["first"]
    np.testing.assert_allclose(controller.target(0.5), before)
    steps = np.diff([controller.target(t)[0] for t in np.linspace(0.5, 1.5, 101)])
    assert abs(np.diff(steps)).max() < 2e-3
    np.testing.assert_allclose(controller.target(1.5), 2.0)


def test_some_controllers_begin_at_the_measured_position() -> None:
    controller = ArmController(ARM, start_from="measured")
    controller.reset(np.ones(7))
    take(controller, trajectory((1.0, np.ones(7), None)), measured=np.full(7, 0.5))
    np.testing.assert_allclose(controller.target(0.0), 0.5)


def test_joints_are_matched_by_name(controller: ArmController) -> None:
    order = [6, 0, 5, 1, 4, 2, 3]
    goal = np.arange(7.0)
    take(controller, trajectory((1.0, goal[order], None), joints=tuple(ARM[i] for i in order)))
    np.testing.assert_allclose(controller.target(2.0), goal)


def test_a_stamp_in_the_past_eats_the_motions_time(controller: ArmController) -> None:
    assert take(controller, trajectory((1.0, np.ones(7), None), start_s=999.4)) == pytest.approx(0.4)
    assert take(controller, trajectory((0.5, np.ones(7), None), start_s=999.4)) is None
    assert "past" in controller.why_refused


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda m: m.update(joint_names=list(ARM[:6])), "are not"),
        (lambda m: m["joint_names"].append("elbow"), "are not"),
        (lambda m: m["points"][0]["positions"].append(0.0), "number of joints"),
        (lambda m: m["points"][0]["positions"].__setitem__(2, float("nan")), "not finite"),
        (lambda m: m["points"][0]["positions"].__setitem__(2, "1"), "Expected `float`"),
        (lambda m: m["points"][0]["positions"].__setitem__(2, None), "Expected `float`"),
        (lambda m: m["points"].append(m["points"][0]), "do not increase"),
        (lambda m: m.update(extra=1), "unknown field"),
        (lambda m: m.pop("joint_names"), "missing required field"),
    ],
)
def test_what_a_controller_refuses_moves_nothing(controller: ArmController, spoil: Any, why: str) -> None:
    message = trajectory((1.0, np.ones(7), None))
    spoil(message)
    assert take(controller, message) is None
    assert why in controller.why_refused
    np.testing.assert_array_equal(controller.target(5.0), REST)
    assert (controller.refused, len(controller.accepted)) == (1, 0)


def test_an_empty_trajectory_holds_where_the_arm_is(controller: ArmController) -> None:
    take(controller, trajectory((1.0, np.ones(7), None)))
    take(controller, trajectory(), now_s=0.5, measured=np.full(7, 0.3))
    np.testing.assert_allclose(controller.target(3.0), 0.3)


def test_bare_positions_hold_for_ever(controller: ArmController) -> None:
    assert controller.positions({"data": [0.1] * 7}, now_s=0.0)
    np.testing.assert_allclose(controller.target(1e6), 0.1)
    for bad in ({"data": [0.1] * 6}, {"data": [float("inf")] * 7}, {}, {"data": "no"}):
        assert not controller.positions(bad, now_s=0.0)


def test_a_twist_moves_the_tool_and_stops_when_it_grows_old(controller: ArmController) -> None:
    controller.reset(HOME)
    chain = CHAINS["panda"]
    before = chain.forward(HOME)
    twist = messages.twist_stamped(np.array([0.1, 0, 0, 0, 0, 0.5]), time_s=1000.0, frame="base", dialect="ros2")
    assert controller.twist(twist, now_s=0.0)
    for step in range(100):
        controller.target(0.01 * step)
    after = chain.forward(controller.target(1.0))
    np.testing.assert_allclose(after[:3] - before[:3], [0.02, 0, 0], atol=2e-3)  # 0.1 m/s until 0.2 s have passed
    assert 2 * np.arccos(min(1.0, abs(after[3:] @ before[3:]))) == pytest.approx(0.1, abs=0.01)
    unstamped = messages.twist_stamped(np.ones(6), time_s=0.0, frame="base", dialect="ros2")
    assert not controller.twist(unstamped, now_s=0.0)


def test_a_gripper_goal_ends_there_or_on_something() -> None:
    ended: list[tuple[bool, bool]] = []
    gripper = GripperController(0.04, message_per_m=0.5)
    for position, stands_m, expected in (
        (0.0, 0.0, (True, False)),
        (0.0, 0.02, (False, True)),
        (0.03, 0.03, (True, False)),
    ):
        gripper.command({"command": {"position": position, "max_effort": 1.0}}, 0.0, lambda *r: ended.append(r))
        for step in range(40):
            moving_m = 0.04 - 0.001 * step
            trembling_m = 1e-4 * (-1) ** step
            gripper.watch(max(stands_m, moving_m) + trembling_m, 0.01 * step)
            assert ended == [] or moving_m <= stands_m + 1.2e-3
        gripper.watch(stands_m, 1.0)
        assert ended.pop() == expected
    gripper.command({"command": {"position": 0.0, "max_effort": 1.0}}, 2.0, lambda *r: ended.append(r))
    gripper.command({"command": {"position": 0.04, "max_effort": 1.0}}, 2.1, lambda *r: None)
    assert ended == [(False, False)]  # replaced
    with pytest.raises(RobopolicyError, match=r"command\.position"):
        gripper.command({"command": {"position": None}}, 0.0, lambda *r: None)


# ---- 1-3: the link ---------------------------------------------------------------------------------------------------
def test_1_a_killed_bridge_brings_no_old_command_and_no_motion_until_rearmed() -> None:
    with arm_behind_a_bridge(state_age_s=0.2) as robot, client_of(robot) as client, TimeTeller(client) as teller:
        moving(client, robot)
        robot.server.close()
        until(lambda: not client.armed)
        down_at = teller.sent
        until(lambda: teller.sent > down_at + 50)  # which others would send when the bridge is back
        robot.server.start()
        until(lambda: client.link().connected and client.data_age_s() < 0.2)
        before, back_at = len(robot.arm.accepted), teller.sent
        until(lambda: teller.sent > back_at + 10)
        assert (len(robot.arm.accepted), client.armed) == (before, False)
        rearmed_s = time.monotonic()
        moving(client, robot)
        assert min(teller.made_s(list(robot.arm.accepted)[before:])) > rearmed_s


def test_2_a_frozen_bridge_disarms_within_half_a_second_and_lets_one_old_command_through_at_most() -> None:
    stale: list[int] = []
    with arm_behind_a_bridge(state_age_s=0.2) as robot, client_of(robot) as client, TimeTeller(client) as teller:

        def disarmed_after_s() -> float:
            moving(client, robot)
            before, frozen_s = len(robot.arm.accepted), time.monotonic()
            robot.server.freeze(1.0)
            took_s = until(lambda: not client.armed)
            until(lambda: client.link().connected and client.data_age_s() < 0.2)
            made_s = teller.made_s(list(robot.arm.accepted)[before:])
            stale.append(sum(frozen_s < at for at in made_s))
            return took_s

        least(disarmed_after_s, below=0.5)
        assert min(stale) <= 1


def test_3_a_half_dead_bridge_disarms_within_the_age_limit_and_is_connected_again() -> None:
    with arm_behind_a_bridge(state_age_s=0.2) as robot, client_of(robot) as client:

        def disarmed_after_s() -> float:
            until(lambda: client.rearm() or client.armed)
            robot.server.faults.set("half_dead", True)
            took_s = until(lambda: not client.armed)
            assert client._sockets["state"].connected  # nothing but the age of the data shows it
            robot.server.faults.set("half_dead", False)
            return took_s

        least(disarmed_after_s, below=0.3)
        generation = client.link().generation
        robot.server.faults.set("half_dead", True)
        until(lambda: client.link().generation > generation)
        robot.server.faults.set("half_dead", False)
        until(lambda: client.data_age_s() < 0.2)
        assert not client.armed


@pytest.mark.parametrize(
    ("fault", "value"), [("silent", True), ("nan_joint", ARM[3]), ("missing_joint", ARM[0]), ("delay_s", 0.3)]
)
def test_data_that_cannot_be_used_disarm_as_missing_data_do(fault: str, value: Any) -> None:
    with arm_behind_a_bridge(state_age_s=0.2) as robot, client_of(robot) as client:
        until(lambda: (client.rearm() or client.armed) and client._clock._asked is not None)
        robot.server.faults.set(fault, value)
        until(lambda: not client.armed)
        time.sleep(0.2)
        client.rearm()
        assert not client.armed
        robot.server.faults.set(fault, type(value)())
        until(lambda: client.rearm() or client.armed)


def test_lost_messages_do_no_harm() -> None:
    with arm_behind_a_bridge() as robot, client_of(robot) as client:
        client.rearm()
        robot.server.faults.set("drop", 0.3)
        with TimeTeller(client, rate_hz=50) as teller:
            until(lambda: len(robot.arm.accepted) > 30)
        assert client.armed
        assert len(robot.arm.accepted) < teller.sent


# ---- 5-6: time -------------------------------------------------------------------------------------------------------
def test_5_slow_work_per_state_ages_no_state_and_delays_no_command() -> None:
    with arm_behind_a_bridge() as robot, client_of(robot) as client:
        client.rearm()

        def age_s() -> float:
            busy_s = time.monotonic() + 0.03
            while time.monotonic() < busy_s:  # work that keeps Python busy, not a sleep
                sum(range(200))
            return client.data_age_s()

        with TimeTeller(client):
            count = len(robot.arm.accepted)
            for _ in range(40):  # states that queue up would be two seconds old by now
                age_s()
            least(age_s, below=0.05, tries=100)
            assert len(robot.arm.accepted) > count + 5


@pytest.mark.parametrize("dialect", ["ros1", "ros2"])
def test_6_a_slow_service_and_a_running_goal_hold_up_no_stop(dialect: Any) -> None:
    command = {"interface": "follow_joint_trajectory", "topic": "/panda_arm_controller/follow_joint_trajectory"}
    quirks, done = Quirks(blocking=dialect == "ros2"), threading.Event()
    with arm_behind_a_bridge(command=command, dialect=dialect, quirks=quirks) as robot, client_of(robot) as client:
        robot.server.offer_service("/slow", "a/B", lambda args: {"over": done.wait(60)})
        slow = threading.Thread(target=lambda: client.call("/slow", {}, timeout_s=60))
        slow.start()
        client.listen(on_stop=client.stop)

        def stopped_after_s(ask: Any) -> float:
            until(lambda: client.rearm() or client.armed)
            count = len(robot.arm.accepted)
            until(lambda: client.send(HOME + 0.2, np.zeros(7), 0.0) or len(robot.arm.accepted) > count)
            count, began_s = stops(robot), time.monotonic()
            ask()
            until(lambda: stops(robot) > count)
            return time.monotonic() - began_s

        ways = {
            "service": lambda: robot.server.call_client("/robopolicy/stop", {}, timeout_s=30),
            "topic": lambda: robot.server.publish("/robopolicy/estop", messages.BOOL, {"data": True}),
        }
        for ask in ways.values():
            least(lambda ask=ask: stopped_after_s(ask), below=0.3)  # type: ignore[misc]
        assert slow.is_alive()
        done.set()
        slow.join()


def stops(robot: Any) -> int:
    """Return how many stops (trajectories of one point, at rest) the arm was told."""
    return sum(c.points == 1 for c in list(robot.arm.accepted))


# ---- 7-8: names and spellings ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dialect", ["ros1", "ros2"])
@pytest.mark.parametrize("faults", [(), ("reorder_joints", "extra_joint", "null_effort")])
def test_7_and_8_joints_go_by_name_and_spelling_by_what_the_server_shows(dialect: Any, faults: tuple[str, ...]) -> None:
    with arm_behind_a_bridge(dialect=dialect) as robot:
        for fault in faults:
            robot.server.faults.set(fault, True)
        with client_of(robot, streams=["obj_pose", "goal_pos"]) as client:
            assert client.dialect == dialect
            np.testing.assert_array_equal(client.state().position, HOME)
            assert client.state().gripper_width_m == pytest.approx(0.08)
            assert abs(client.state().stamp_s - time.time()) < 60
            until(lambda: client.samples("obj_pose") and client.samples("goal_pos"))
            np.testing.assert_allclose(client.samples("obj_pose")[-1].value, [0.0, 0.1, 0.02, 1, 0, 0, 0])
            np.testing.assert_allclose(client.samples("goal_pos")[-1].value, [0.1, 0.2, 0.3])
            client.rearm()
            goal = HOME + 0.01 * np.arange(7)
            until(lambda: client.send(goal, np.zeros(7), None) or np.abs(client.state().position - goal).max() < 1e-6)
            until(lambda: client.send(goal, np.zeros(7), 0.02) or client.state().gripper_width_m < 0.03)
            until(lambda: client.state().gripper_width_m == pytest.approx(0.02))
            assert not robot.arm.refused
            assert client.reports()[0].problem == ""


def test_7_a_missing_joint_is_named() -> None:
    with arm_behind_a_bridge() as robot:
        robot.server.faults.set("missing_joint", ARM[2])
        client = RemoteRobot(robot.robot, url=robot.server.url)
        client.connect(30)
        try:
            until(lambda: client.reports()[0].problem == f"the joint states lack {ARM[2]}")
            assert client.state() is None
            client.rearm()
            assert not client.armed
        finally:
            client.close()


def test_topics_that_do_not_exist_are_named_with_what_there_is() -> None:
    data = robot_data(topic="/other_arm/joint_trajectory")
    data["joint_states"] = {"topics": ["/robot/joint_states"], "rate_hz": 100.0}
    data["streams"]["obj_pose"]["topic"] = "/tracker/cube"
    with arm_behind_a_bridge() as robot:
        until(lambda: "/joint_states" in robot.server._topics and "/objects/obj_pose" in robot.server._topics)
        client = RemoteRobot(RobotFile.from_dict(data), url=robot.server.url, streams=["obj_pose"])
        client.connect(30)
        problems = lambda: {report.name: report.problem for report in client.reports()}  # noqa: E731
        try:
            # what a client subscribes to exists from then on, as with real servers; so nothing comes, and that is said
            until(lambda: "/robot/joint_states" in problems()["joints"])
            until(lambda: "/tracker/cube" in problems()["obj_pose"])
            until(lambda: "/panda_arm_controller/joint_trajectory" in problems()["command"])
        finally:
            client.close()
    with pytest.raises(UnknownNameError, match="Did you mean 'obj_pose'"):
        RemoteRobot(RobotFile.from_dict(data), url="ws://127.0.0.1:1", streams=["obj_poze"])


# ---- stops -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "command",
    [
        {},
        {"interface": "follow_joint_trajectory", "topic": "/panda_arm_controller/follow_joint_trajectory"},
        {"interface": "forward_position", "topic": "/panda_arm_controller/commands"},
        {"interface": "servo_twist", "topic": "/servo_node/delta_twist_cmds", "frame": "panda_link0"},
    ],
    ids=["trajectory", "action", "forward", "servo"],
)
@pytest.mark.parametrize("dialect", ["ros1", "ros2"])
def test_a_stop_is_seen_within_100_ms_and_ends_the_motion(command: dict[str, Any], dialect: Any) -> None:
    speed = np.full(7, 0.2)
    with arm_behind_a_bridge(command=command, dialect=dialect) as robot, client_of(robot) as client:

        def seen_after_s() -> float:
            until(lambda: client.rearm() or client.armed)
            start, count, step = client.state().position, len(robot.arm.accepted), 0
            while len(robot.arm.accepted) < count + 10 or (client.state().position - start).max() < 0.01:
                step += 1
                client.send(start + 0.01 * step * speed, speed, None)
                time.sleep(0.01)
                assert step < 3000, robot.arm.why_refused
            began_s = time.monotonic()
            client.stop("test")
            until(lambda: any(c.arrival_s >= began_s for c in list(robot.arm.accepted)))
            return time.monotonic() - began_s

        least(seen_after_s, below=0.1)
        assert not client.armed
        client.send(client.state().position + 1.0, speed, None)
        rests = lambda: np.ptp([s.position for s in client.states()[-10:]], axis=0).max() < 1e-9  # noqa: E731
        until(rests)
        steps = robot.sim.physics_steps
        until(lambda: robot.sim.physics_steps > steps + 20)
        assert rests()


def test_a_client_that_goes_stops_the_arm_and_silence_does_too() -> None:
    with arm_behind_a_bridge() as robot:
        with client_of(robot) as client:
            client.rearm()
            fast = np.full(7, 0.3)
            until(lambda: client.send(HOME + 0.1, fast, None) or len(robot.arm.accepted) > 0)
            # and no more: the message itself ends at rest
            moved = lambda: (client.state().position - HOME).max()  # noqa: E731
            until(lambda: moved() > 0.09 and np.abs(client.state().velocity).max() < 1e-9)
            assert moved() < 0.13
            count = len(robot.arm.accepted)
        assert len(robot.arm.accepted) > count


@pytest.mark.parametrize("by", ["topic", "service"])
def test_an_e_stop_from_ros_stops_the_arm_though_nobody_listens(by: str) -> None:
    with arm_behind_a_bridge() as robot, client_of(robot) as client:

        def seen_after_s() -> float:
            until(lambda: client.rearm() or client.armed)
            count, began_s = stops(robot), time.monotonic()
            if by == "service":
                assert robot.server.call_client("/robopolicy/stop", {}, timeout_s=30)["success"]
            else:
                robot.server.publish("/robopolicy/estop", messages.BOOL, {"data": True})
            until(lambda: stops(robot) > count)
            return time.monotonic() - began_s

        least(seen_after_s, below=0.3)
        assert not client.armed


def test_a_robot_that_shows_no_spelling_is_not_commanded_and_that_is_said() -> None:
    with arm_behind_a_bridge() as robot:
        robot.server.publish = lambda topic, kind, message, real=robot.server.publish, **settings: real(
            topic, kind, {key: value for key, value in message.items() if key != "header"}, **settings
        )
        client = RemoteRobot(robot.robot, url=robot.server.url)
        client.connect(30)
        try:
            until(lambda: client.state() is not None)
            assert client.state().stamp_s is None
            client.rearm()
            assert not client.armed
            assert "set bridge.dialect" in client.reports()[-1].problem
        finally:
            client.close()
        with client_of(robot, dialect="ros2") as client:
            client.rearm()
            assert client.armed


def test_without_commands_nothing_is_advertised_or_published() -> None:
    with arm_behind_a_bridge() as robot, client_of(robot, commands=False) as client:
        client.rearm()
        client.send(HOME + 0.1, np.zeros(7), 0.0)
        client.stop("no")
        client.publish_status({"phase": "shadow"})
        time.sleep(0.1)
        assert set(robot.server.received) <= {"/robopolicy/status"}
        assert not client.armed


def test_what_is_not_finite_stops_the_arm_and_never_leaves() -> None:
    with arm_behind_a_bridge() as robot, client_of(robot) as client:
        client.rearm()
        client.send(np.full(7, np.nan), np.zeros(7), None)
        assert not client.armed
        until(lambda: len(robot.arm.accepted) > 0)
        assert all(np.isfinite(c.positions).all() and c.points == 1 for c in robot.arm.accepted)
        assert robot.arm.refused == 0


# ---- the simulation --------------------------------------------------------------------------------------------------
def test_services_of_the_simulated_robot() -> None:
    with arm_behind_a_bridge(settings=SimSettings(seed=4)) as robot, client_of(robot, streams=["obj_pose"]) as client:
        call = lambda service, **request: client.call(f"/simrobot/{service}", request, timeout_s=30)  # noqa: E731
        robot.sim.success_after = 1 << 60
        assert call("episode")["seed"] == 4
        client.rearm()
        until(lambda: client.send(HOME + 0.1, np.zeros(7), None) or client.state().position[0] > 0.09)
        client.stop("enough")
        assert call("reset", seed=7)["success"]
        episode = call("episode")
        assert (episode["seed"], episode["success_once"]) == (7, False)
        # the stop is told three times; one that comes after the reset takes the arm to where it was
        until(lambda: np.array_equal(client.state().position, HOME) or not call("reset", seed=7))
        until(lambda: client.samples("obj_pose")[-1].value[0] == pytest.approx(0.07))
        robot.sim.success_after = 0
        until(lambda: call("episode")["success_once"])
        assert not call("reset", seed="x")["success"]
        with pytest.raises(RobopolicyError, match="Did you mean 'delay_s'"):
            call("fault", name="delay", value=1.0)
        with pytest.raises(RobopolicyError, match=r"takes a value like 0\.0"):
            call("fault", name="drop", value="much")
        call("fault", name="freeze_s", value=2.0)
        until(lambda: client.data_age_s() > 0.3)
        until(lambda: client.data_age_s() < 0.2)


def test_it_keeps_real_time_and_says_what_it_could_not_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(sim_robot, "time", clock)
    robot = sim_robot.SimRobot(StillArm(), RobotFile.from_dict(robot_data()), RosbridgeServer())
    robot._restart(0)
    robot._running = True
    turns: list[float] = []

    def step() -> None:
        turns.append(clock.now_s)
        clock.work(0.5 if len(turns) == 50 else 0.003)  # one step takes long
        robot._running = len(turns) < 200

    monkeypatch.setattr(robot.sim, "step", step)
    monkeypatch.setattr(clock, "sleep", clock.work)
    robot._run()
    assert 200 * robot.sim.dt_s + robot.slipped_s == pytest.approx(clock.now_s - 1000.0, abs=0.011)
    assert robot.slipped_s == pytest.approx(0.49, abs=0.011)
    assert np.median(np.diff(turns)) == pytest.approx(robot.sim.dt_s)


def test_a_robot_file_of_another_arm_is_refused() -> None:
    data = robot_data()
    data["joints"] = [f"joint_{i}" for i in range(7)]
    with pytest.raises(RobopolicyError, match="Choose the robot file of this task's robot"):
        sim_robot.SimRobot(StillArm(), RobotFile.from_dict(data), RosbridgeServer())


def test_a_taken_port_is_said() -> None:
    with arm_behind_a_bridge() as robot, pytest.raises(RobopolicyError, match="Does another bridge run"):
        RosbridgeServer(port=robot.server.port).start()


@pytest.fixture(scope="module")
def pick_cube() -> Iterator[Any]:
    """PickCube in real time behind a bridge, in this process."""
    from robopolicy.app import composing
    from robopolicy.app.simrobot import serving

    with serving(composing.compose("simrobot", ["port=0", "seed=3"])) as robot:
        yield robot


@pytest.mark.sim
def test_the_observation_rebuilt_from_topics_is_the_environments_own(pick_cube: Any) -> None:
    robot, sim = pick_cube, pick_cube.sim
    with client_of(robot, streams=["obj_pose", "goal_pos"]) as client:
        client.rearm()
        goal = client.state().position + np.array([0.2, 0.1, 0, 0, 0, 0, 0.1])
        count = len(robot.arm.accepted)
        until(lambda: client.send(goal, np.zeros(7), None) or len(robot.arm.accepted) > count + 10)
        client.send(goal, np.zeros(7), 0.0)
        until(lambda: client.samples("goal_pos"))
        now: dict[str, Any] = {}
        robot._in_the_loop(lambda: now.update(sim.observation(), qpos=sim.position()))  # between two messages
        measured = now.pop("qpos")
        same = lambda: [s for s in client.states() if np.array_equal(s.position, measured[:7])]  # noqa: E731
        poses = lambda: [s.value for s in client.samples("obj_pose") if s.stamp_s == same()[-1].stamp_s]  # noqa: E731
        until(lambda: same() and poses())
        state, pose = same()[-1], poses()[0]
    tool = CHAINS["panda"].forward(state.position)
    tool[:3] += client.robot.frames.base_position_m
    place, width = client.samples("goal_pos")[-1].value, state.gripper_width_m
    assert state.velocity is not None
    rebuilt = {
        "proprio": [*state.position, width / 2, width / 2, *state.velocity, *now["proprio"][0, 16:18].tolist(), *tool],
        "objects": [*now["objects"][0, :1].tolist(), *pose, *(pose[:3] - tool[:3]), *(place - pose[:3])],
        "goal": place,
    }
    for modality, value in rebuilt.items():
        np.testing.assert_allclose(value, now[modality][0].numpy(), atol=1e-4, err_msg=modality)


@pytest.mark.sim
def test_an_episode_begins_as_its_seed_says(pick_cube: Any) -> None:
    from robopolicy import envs

    frame, _ = envs.make("pick_cube", backend="single", control_mode="pd_joint_pos").reset(seed=11)
    with client_of(pick_cube, streams=["obj_pose", "goal_pos"]) as client:
        assert client.call("/simrobot/reset", {"seed": 11}, timeout_s=30)["success"]
        until(
            lambda: (
                client.samples("goal_pos")
                and np.allclose(client.samples("goal_pos")[-1].value, frame["goal"][0], atol=1e-6)
            )
        )
        time.sleep(0.1)
        np.testing.assert_allclose(client.state().position, frame["proprio"][0, :7], atol=5e-3)
        np.testing.assert_allclose(client.samples("obj_pose")[-1].value, frame["objects"][0, 1:8], atol=2e-3)


@pytest.mark.sim
def test_a_closed_gripper_presses_as_in_training(pick_cube: Any) -> None:
    with client_of(pick_cube) as client:
        client.rearm()
        here = client.state().position
        until(lambda: client.send(here, np.zeros(7), None) or len(pick_cube.arm.accepted) > 0)
        client.send(here, np.zeros(7), 0.0)
        until(lambda: client.state().gripper_width_m < 0.002)
        drives = [joint.drive_target[0, 0].item() for joint in pick_cube.sim._base.agent.robot.active_joints[-2:]]
        np.testing.assert_allclose(drives, -0.01, atol=1e-6)


@pytest.mark.sim
@pytest.mark.slow
def test_the_command_serves_until_whoever_started_it_ends() -> None:
    script = """
import sys, time
from robopolicy.app.simrobot import spawn
with spawn(["seed=5", "sim.clock_offset_s=3.0"]) as url:
    print(url, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        client = RemoteRobot(RobotFile.from_dict(robot_data()), url=parent.stdout.readline().strip())
        client.connect(30)
        assert client.call("/simrobot/episode", {}, timeout_s=30)["seed"] == 5
        until(lambda: client.robot_time_s() - time.time() == pytest.approx(3.0, abs=0.5))
        parent.kill()
        until(lambda: "nothing listens" in client.link().detail)
        client.close()


def test_a_robot_that_does_not_start_says_why() -> None:
    from robopolicy.app.simrobot import spawn

    with pytest.raises(RobopolicyError, match=r"Did you mean 'faults\.delay_s'"), spawn(["faults.delay=1"]):
        pass
