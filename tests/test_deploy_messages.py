"""ROS messages in both spellings, joint states by name, pictures, and the commands of every interface."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from deploy_peers import ARM, FINGERS, HOME, robot_data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from robopolicy.deploy import commands, messages
from robopolicy.deploy.commands import Goal, Publish, build_interface
from robopolicy.deploy.kinematics import CHAINS
from robopolicy.deploy.messages import MessageError
from robopolicy.deploy.robot import RobotFile
from robopolicy.deploy.state import ClockOffset, JointTable, StreamTable

DIALECTS = ("ros1", "ros2")


def robot(**command: Any) -> RobotFile:
    return RobotFile.from_dict(robot_data(**command))


# ---- spelling --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dialect", DIALECTS)
@given(time_s=st.floats(0, 4e9))
def test_times_come_back_in_both_spellings(dialect: Any, time_s: float) -> None:
    fields = messages.time_fields(time_s, dialect)
    whole, nanos = fields.values()
    assert 0 <= nanos < 1_000_000_000
    message = {"header": messages.header(time_s, dialect)}
    read = messages.stamp_of(message)
    assert (read or 0.0) == pytest.approx(time_s, abs=1e-6)
    assert messages.dialect_of(message) == dialect
    assert isinstance(whole, int)


def test_a_negative_time_has_positive_nanoseconds() -> None:
    assert messages.time_fields(-0.25, "ros2") == {"sec": -1, "nanosec": 750_000_000}


@pytest.mark.parametrize("message", [{}, {"header": {}}, {"header": None}, {"header": {"stamp": "now"}}, {"header": 3}])
def test_no_stamp_and_stamp_zero_are_unknown(message: Mapping[str, Any]) -> None:
    assert messages.stamp_of(message) is None
    assert messages.dialect_of(message) is None
    assert messages.stamp_of({"header": messages.header(0.0, "ros1")}) is None


@pytest.mark.parametrize(
    "stamp", [{"sec": "1", "nanosec": 0}, {"sec": 1}, {"sec": 1e300, "nanosec": 0}, {"secs": None}]
)
def test_a_stamp_that_is_no_time_is_refused(stamp: Any) -> None:
    with pytest.raises(MessageError, match="is no time"):
        messages.stamp_of({"header": {"stamp": stamp}})


def test_types_in_both_spellings() -> None:
    for name in ("sensor_msgs/JointState", "sensor_msgs/msg/JointState"):
        assert messages.short_type(name) == "sensor_msgs/JointState"
        assert messages.long_type(name) == "sensor_msgs/msg/JointState"
    assert messages.long_type("control_msgs/GripperCommand", "action") == "control_msgs/action/GripperCommand"


# ---- joint states ----------------------------------------------------------------------------------------------------
def joint_state(names: Any, position: Any, velocity: Any = (), *, stamp_s: float = 5.0) -> dict[str, Any]:
    body = {"name": list(names), "position": list(map(float, position)), "velocity": list(velocity), "effort": []}
    return {"header": messages.header(stamp_s, "ros2"), **body}


@given(order=st.permutations(range(9)), foreign=st.integers(0, 9))
def test_joints_are_found_by_name_in_any_order_among_others(order: list[int], foreign: int) -> None:
    table = JointTable(robot())
    names, values = [*ARM, *FINGERS], np.arange(9.0)
    shuffled, numbers = [names[i] for i in order], values[order].tolist()
    shuffled.insert(foreign, "wheel")
    numbers.insert(foreign, 99.0)
    state = table.update(joint_state(shuffled, numbers, numbers), 1.0)
    assert state is not None
    np.testing.assert_array_equal(state.position, np.arange(7.0))
    np.testing.assert_array_equal(state.velocity, np.arange(7.0))
    assert state.gripper_width_m == 15.0
    assert (state.stamp_s, state.arrival_s) == (5.0, 1.0)


def test_partial_messages_are_merged_and_as_old_as_their_oldest_part() -> None:
    table = JointTable(robot())
    assert table.update(joint_state(ARM[:4], HOME[:4], stamp_s=1.0), 11.0) is None
    assert table.problem == f"the joint states lack {', '.join(ARM[4:])}"
    assert table.update(joint_state(FINGERS, [0.04, 0.04], stamp_s=1.5), 11.5) is None
    state = table.update(joint_state(ARM[4:], HOME[4:], stamp_s=2.0), 12.0)
    assert state is not None
    np.testing.assert_array_equal(state.position, HOME)
    assert (state.stamp_s, state.arrival_s, state.velocity) == (1.0, 11.0, None)
    assert (state.gripper_width_m, table.problem) == (0.08, "")
    assert table.update(joint_state(FINGERS, [0.0, 0.0]), 12.5) is None  # no news of the arm


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ({"position": [None] * 7}, "panda_joint1"),
        ({"position": [*HOME[:6].tolist(), math.inf]}, "the position of panda_joint7 is not a number"),
        ({"position": []}, "is not a number"),
        ({"position": HOME[:6].tolist()}, "6 numbers for 7 joints"),
        ({"velocity": [0.0] * 3}, "3 numbers for 7 joints"),
        ({"position": ["a"] * 7}, "no list of numbers"),
        ({"position": [True] * 7}, "no list of numbers"),
        ({"position": [10**400] * 7}, "out of range"),
        ({"name": None}, "no list of names"),
        ({"name": [1] * 7}, "no list of names"),
        ({"name": [*ARM[:6], ARM[0]]}, "named twice"),
        ({"header": {"stamp": {"sec": []}}}, "is no time"),
    ],
)
def test_a_joint_state_that_cannot_be_used_changes_nothing_and_says_why(spoil: dict[str, Any], why: str) -> None:
    table = JointTable(robot())
    before = table.update(joint_state(ARM, HOME), 1.0)
    assert table.update(joint_state(ARM, HOME + 1) | spoil, 2.0) is None
    assert table.newest is before
    assert why in table.problem
    assert "1 of 2 messages refused" in table.report({}).problem


def test_velocities_that_are_null_are_unknown_and_efforts_do_not_matter() -> None:
    state = JointTable(robot()).update(joint_state(ARM, HOME, [None] * 7) | {"effort": [None] * 7}, 1.0)
    assert state is not None
    assert state.velocity is None


def test_what_is_kept_does_not_grow() -> None:
    table = JointTable(robot())
    for i in range(10_000):
        table.update(joint_state(ARM, HOME), 0.001 * i)
    assert 1000 < len(table.recent()) < 2000
    assert table.recent()[-1].arrival_s - table.recent()[0].arrival_s < 1.6


# ---- streams ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dialect", DIALECTS)
def test_poses_points_and_vectors_survive_the_wire(dialect: Any) -> None:
    pose = np.array([0.1, -0.2, 0.3, 0.5, -0.5, 0.5, 0.5])
    at: dict[str, Any] = {"time_s": 3.0, "frame": "world", "dialect": dialect}
    sent = messages.pose_stamped(pose, **at)
    assert sent["pose"]["orientation"] == {"x": -0.5, "y": 0.5, "z": 0.5, "w": 0.5}
    np.testing.assert_array_equal(messages.parse_pose(sent), pose)
    np.testing.assert_array_equal(messages.parse_point(messages.point_stamped(pose[:3], **at)), pose[:3])
    np.testing.assert_array_equal(messages.parse_floats(messages.float_array(pose)), pose)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"pose": {"position": {"x": 1, "y": 2, "z": 3}}},
        {"pose": {"position": {"x": 1, "y": 2}, "orientation": {"x": 0, "y": 0, "z": 0, "w": 1}}},
        {"pose": {"position": {"x": 1, "y": 2, "z": None}, "orientation": {"x": 0, "y": 0, "z": 0, "w": 1}}},
        {"pose": {"position": {"x": 1, "y": 2, "z": 3}, "orientation": {"x": 0, "y": 0, "z": 0, "w": 0}}},
        {"pose": {"position": {"x": 1, "y": 2, "z": 3}, "orientation": {"x": 0, "y": 0, "z": 0, "w": "1"}}},
    ],
)
def test_poses_that_are_none_are_refused(message: Any) -> None:
    with pytest.raises(MessageError):
        messages.parse_pose(message)


def picture_stream() -> StreamTable:
    return StreamTable("base_camera", robot())


def png(picture: Any, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, kind)
    return out.getvalue()


def test_pictures_of_every_encoding_become_rgb() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    padded = np.pad(colours.reshape(4, 18), ((0, 0), (0, 2)))
    grey = colours[..., :1]
    for message, expected in (
        ({"format": "png", "data": png(colours)}, colours),
        ({"encoding": "rgb8", "height": 4, "width": 6, "data": colours.tobytes()}, colours),
        ({"encoding": "rgb8", "height": 4, "width": 6, "step": 20, "data": padded.tobytes()}, colours),
        ({"encoding": "bgr8", "height": 4, "width": 6, "data": colours[..., ::-1].tobytes()}, colours),
        ({"encoding": "mono8", "height": 4, "width": 6, "data": grey.tobytes()}, np.repeat(grey, 3, axis=2)),
        ({"encoding": "bgra8", "height": 1, "width": 1, "data": [1, 2, 3, 4]}, np.array([[[3, 2, 1]]], np.uint8)),
    ):
        np.testing.assert_array_equal(messages.parse_picture(message), expected)
    smooth = np.full((16, 16, 3), (200, 30, 60), np.uint8)
    assert abs(messages.parse_picture({"data": png(smooth, "JPEG")}).astype(int) - smooth).max() < 6


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"data": "###"},
        {"data": b"no picture"},
        {"data": png(np.zeros((4, 4, 3), np.uint8))[:40]},
        {"encoding": "rgb8", "height": 4, "width": 6, "data": b"123"},
        {"encoding": "rgb8", "height": 10**9, "width": 10**9, "data": b"123"},
        {"encoding": "rgb8", "height": 1, "width": 1, "step": "x", "data": b"123"},
        {"encoding": "yuv422", "height": 1, "width": 1, "data": b"123"},
        {"encoding": ["rgb8"], "height": 1, "width": 1, "data": b"123"},
    ],
)
def test_pictures_that_are_none_are_refused(message: Any) -> None:
    with pytest.raises(MessageError):
        messages.parse_picture(message)


def test_a_picture_is_decoded_once_and_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    table, calls = picture_stream(), []
    read = messages.PARSERS[messages.COMPRESSED]
    monkeypatch.setitem(messages.PARSERS, messages.COMPRESSED, lambda m: calls.append(1) or read(m))
    for i in range(5):
        header = messages.header(10.0 + i, "ros2")
        table.update({"header": header, "data": png(np.full((2, 2, 3), i, np.uint8)) if i != 3 else b"x"}, 0.1 * i)
    assert calls == []
    for _ in range(3):
        assert [sample.value[0, 0, 0] for sample in table.recent()] == [0, 1, 2, 4]
    assert len(calls) == 5
    assert "1 of 5 messages refused" in table.report({}).problem


def test_a_topic_of_another_type_is_said() -> None:
    table = picture_stream()
    report = table.report({"/base_camera/image/compressed": "sensor_msgs/Image"})
    assert report.problem == (
        "/base_camera/image/compressed is of type sensor_msgs/Image; set streams.base_camera.type or another topic"
    )
    assert "no topic /base_camera/image/compressed" in table.report({"/a": "sensor_msgs/CompressedImage"}).problem
    assert "it has /a" in table.report({"/a": "sensor_msgs/CompressedImage"}).problem


# ---- the robot's clock -----------------------------------------------------------------------------------------------
def test_the_clocks_offset_is_found_under_jitter_and_forgets_slowly() -> None:
    clock, dice = ClockOffset(), np.random.default_rng(0)
    assert clock.offset_s is None
    assert clock.age_s(5.0, 1.0) == 0.0
    for i in range(3000):
        stamp_s, delay_s = 1000.0 + 0.01 * i, 0.002 + dice.exponential(0.01)
        clock.add(stamp_s, 0.01 * i + delay_s)
        if i > 100:
            assert clock.offset_s == pytest.approx(1000.0 - 0.002, abs=1e-3)
    assert clock.age_s(1029.0, 29.5) == pytest.approx(0.5, abs=4e-3)
    assert clock.age_s(None, 29.5) == 0.0
    assert len(clock._seconds) < 12


def test_a_delay_that_all_messages_share_is_seen_by_asking_the_bridges_clock() -> None:
    clock = ClockOffset()
    for i in range(100):
        clock.add(1000.0 + 0.01 * i, 0.01 * i + 0.3)
    assert clock.age_s(1000.99, 0.99 + 0.3) == pytest.approx(0.0)
    clock.asked(1001.0, 0.999, 1.001)
    assert clock.age_s(1000.99, 0.99 + 0.3) == pytest.approx(0.3, abs=2e-3)
    clock.asked(5.0, 1.5, 1.501)  # simulated time, say: another clock
    assert clock.age_s(1000.99, 0.99 + 0.3) == pytest.approx(0.0)


# ---- commands --------------------------------------------------------------------------------------------------------
def seconds(fields: Mapping[str, int]) -> float:
    whole, nanos = fields.values()
    return whole + 1e-9 * nanos


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_trajectory_holds_the_command_and_the_way_to_rest(dialect: Any) -> None:
    order = tuple(reversed(ARM))
    interface = build_interface(robot(joints=list(order)))
    velocity = np.linspace(-0.5, 0.5, 7)
    sent = interface.command(HOME, velocity, dialect)
    assert isinstance(sent, Publish)
    assert dict(interface.topics(dialect)) == {sent.topic: "trajectory_msgs/JointTrajectory"}
    first, last = sent.message["points"]
    assert tuple(sent.message["joint_names"]) == order
    np.testing.assert_array_equal(first["positions"], HOME[::-1])
    np.testing.assert_array_equal(first["velocities"], velocity[::-1])
    assert seconds(first["time_from_start"]) == pytest.approx(0.01)
    brake_s = seconds(last["time_from_start"]) - 0.01
    np.testing.assert_allclose(last["positions"], (HOME + velocity * brake_s / 2)[::-1])
    assert last["velocities"] == [0.0] * 7
    assert (abs(velocity) / brake_s <= robot().limits.acceleration).all()
    assert messages.stamp_of(sent.message) is None  # start when it arrives
    assert messages.dialect_of(sent.message) == dialect


@pytest.mark.parametrize("velocity", [np.zeros(7), np.full(7, 1e6), np.full(7, -1e6)])
def test_the_way_to_rest_stays_inside_the_joints_limits(velocity: Any) -> None:
    file = robot()
    (stop,) = build_interface(file).stop(HOME, velocity, "ros2")
    (rest,) = stop.message["points"]
    assert (np.array(rest["positions"]) >= file.limits.position_low).all()
    assert (np.array(rest["positions"]) <= file.limits.position_high).all()
    assert seconds(rest["time_from_start"]) <= 0.5


def test_a_stop_brakes_from_the_lesser_of_commanded_and_measured_velocity() -> None:
    interface = build_interface(robot())
    interface.command(HOME, np.array([0.1, 0.1, -0.1, 0.0, 0, 0, 0]), "ros2")
    (stop,) = interface.stop(HOME, np.array([2.0, 0.05, 1.0, 1.0, 0, 0, 0]), "ros2")
    (rest,) = stop.message["points"]
    np.testing.assert_allclose(rest["positions"] - HOME, [0.0025, 0.00125, 0, 0, 0, 0, 0], atol=1e-12)
    (stop,) = interface.stop(None, None, "ros2")
    assert stop.message["points"] == []


def test_an_action_in_both_spellings() -> None:
    file = robot(interface="follow_joint_trajectory", topic="/arm/follow_joint_trajectory")
    interface = build_interface(file, lambda: 12.0)
    goal = interface.command(HOME, np.zeros(7), "ros2")
    assert isinstance(goal, Goal)
    assert (goal.action, goal.type_name) == (file.command.topic, "control_msgs/action/FollowJointTrajectory")
    assert len(goal.goal["trajectory"]["points"]) == 2
    assert [order.topic for order in interface.stop(HOME, None, "ros2")] == ["/arm/joint_trajectory"]
    old = interface.command(HOME, np.zeros(7), "ros1")
    assert isinstance(old, Publish)
    assert old.topic == "/arm/follow_joint_trajectory/goal"
    assert len(old.message["goal"]["trajectory"]["points"]) == 2
    assert old.message["goal_id"]["id"]
    cancel, hold = interface.stop(HOME, None, "ros1")
    assert (cancel.topic, cancel.message["id"]) == ("/arm/follow_joint_trajectory/cancel", "")
    assert hold.topic == "/arm/command"
    assert set(interface.topics("ros1")) == {old.topic, cancel.topic, hold.topic}
    assert set(interface.topics("ros2")) == {"/arm/joint_trajectory"}


def test_bare_positions_stop_where_they_were_sent_unless_the_arm_is_elsewhere() -> None:
    interface = build_interface(robot(interface="forward_position", topic="/arm/commands", joints=list(reversed(ARM))))
    assert interface.stop(None, None, "ros2") == ()
    sent = interface.command(HOME, np.zeros(7), "ros2")
    assert isinstance(sent, Publish)
    np.testing.assert_array_equal(sent.message["data"], HOME[::-1])
    for measured, held in ((HOME + 0.1, HOME), (HOME + 0.6, HOME + 0.6), (None, HOME)):
        (stop,) = interface.stop(measured, None, "ros2")
        np.testing.assert_array_equal(stop.message["data"], held[::-1])


def test_a_twist_is_what_the_tool_does() -> None:
    interface = build_interface(robot(interface="servo_twist", topic="/servo", frame="panda_link0"), lambda: 12.0)
    velocity, dt_s = np.linspace(-0.3, 0.4, 7), 1e-6
    sent = interface.command(HOME, velocity, "ros2")
    assert isinstance(sent, Publish)
    chain = CHAINS["panda"]
    before, after = chain.forward(HOME), chain.forward(HOME + velocity * dt_s)
    linear = [sent.message["twist"]["linear"][axis] for axis in "xyz"]
    angular = np.array([sent.message["twist"]["angular"][axis] for axis in "xyz"])
    np.testing.assert_allclose(linear, (after[:3] - before[:3]) / dt_s, atol=1e-3)
    w, vector = before[3], before[4:]
    rate = 0.5 * np.array([-angular @ vector, *(w * angular + np.cross(angular, vector))])  # of a turn in the base
    np.testing.assert_allclose((after[3:] - before[3:]) / dt_s, rate, atol=1e-3)
    assert sent.message["header"]["frame_id"] == "panda_link0"
    assert messages.stamp_of(sent.message) == 12.0
    (stop,) = interface.stop(HOME, velocity, "ros2")
    assert stop.message["twist"]["linear"] == {"x": 0.0, "y": 0.0, "z": 0.0}


def test_a_twist_leads_the_tool_back_to_where_it_should_be() -> None:
    file, chain = robot(interface="servo_twist", topic="/servo", frame="panda_link0"), CHAINS["panda"]
    at = HOME + 0.02
    interface = build_interface(file, lambda: 12.0, lambda: at)
    for _ in range(800):  # an arm that does what it is told, told to stand at HOME
        sent = interface.command(HOME, np.zeros(7), "ros2")
        assert isinstance(sent, Publish)
        linear, angular = (np.array(list(sent.message["twist"][part].values())) for part in ("linear", "angular"))
        assert np.linalg.norm(linear) <= 0.05 + 1e-9
        assert np.linalg.norm(angular) <= 0.25 + 1e-9
        at = chain.moved(at, 0.01 * np.concatenate([linear, angular]))
    far = commands.between(chain.forward(at), chain.forward(HOME))
    assert abs(far).max() < 1e-3
    (fast,) = [interface.command(HOME, np.full(7, 100.0), "ros2")]
    assert isinstance(fast, Publish)
    assert np.linalg.norm(list(fast.message["twist"]["linear"].values())) == pytest.approx(file.safety.tcp_speed_m_s)


def test_the_gripper_is_told_what_its_messages_mean() -> None:
    gripper = robot().gripper
    assert gripper is not None
    goal = commands.gripper_goal(gripper, 0.08, "ros2", 1.0)
    assert isinstance(goal, Goal)
    assert goal.goal == {"command": {"position": 0.04, "max_effort": 40.0}}
    old = commands.gripper_goal(gripper, 0.08, "ros1", 1.0)
    assert isinstance(old, Publish)
    assert (old.topic, old.message["goal"]) == (f"{gripper.topic}/goal", goal.goal)
