"""The bridge's client: nothing sent late, nothing sent half, no message that ends it; and peers that are not ours.

With ROSBRIDGE_URL in the environment the tests of peers run against that bridge, else against a stand-in.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import logging
import math
import os
import random
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pytest
import websockets.sync.client
from deploy_peers import (
    ARM,
    HOME,
    NativeRos2,
    RoslibpyRobot,
    TimeTeller,
    arm_behind_a_bridge,
    client_of,
    robot_data,
    until,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from robopolicy.deploy.remote import RemoteRobot
from robopolicy.deploy.robot import RobotFile
from robopolicy.deploy.rosbridge import MOST_GOALS, Socket
from robopolicy.deploy.sim_server import Quirks, RosbridgeServer
from robopolicy.deploy.wire import BridgeError, BridgeThread, Endpoint, decode, encode, payload
from robopolicy.errors import RobopolicyError

TRAJECTORY_TOPIC = "/panda_arm_controller/joint_trajectory"


@contextlib.contextmanager
def stand_in(**settings: Any) -> Iterator[RosbridgeServer]:
    server = RosbridgeServer(**settings)
    server.start()
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def socket_to(server: RosbridgeServer, **settings: Any) -> Iterator[Socket]:
    thread = BridgeThread()
    socket = Socket(Endpoint(url=server.url, **settings.pop("endpoint", {})), thread, "test", **settings)
    try:
        until(lambda: socket.connected)
        yield socket
    finally:
        socket.close()
        thread.stop()


# ---- what goes over the wire -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["{}", "[{}]", "deep"])
def test_nothing_that_is_not_finite_is_written(bad: float, place: str) -> None:
    value = {"{}": bad, "[{}]": [0.0, bad], "deep": {"points": [{"positions": (1.0, bad)}]}}[place]
    with pytest.raises(BridgeError, match="only finite numbers"):
        encode({"op": "publish", "topic": "/a", "msg": {"x": value}})


@pytest.mark.parametrize("value", [object(), {1j: 2}, np.float32(1.0), {"a": {3, 4j}}])
def test_what_is_no_json_is_an_error_and_not_half_a_message(value: object) -> None:
    with pytest.raises(BridgeError, match="cannot be written"):
        encode({"op": "publish", "topic": "/a", "msg": {"x": value}})


def test_numbers_come_back_as_they_were_also_those_json_forbids() -> None:
    op = decode('{"op": "publish", "x": [NaN, 1e400, -Infinity, null]}')
    assert str(op) == "{'op': 'publish', 'x': [nan, inf, -inf, None]}"


@pytest.mark.parametrize("frame", ["", "{", "[]", "3", '{"op": 3}', '{"no": 1}', b"", b"\xff\xff", b"\x9f" * 3000])
def test_what_is_no_operation_is_nothing(frame: str | bytes) -> None:
    assert decode(frame) is None


@pytest.mark.parametrize(("tag", "kind"), [(86, "<f8"), (82, ">f8"), (85, "<f4"), (69, "<u2"), (78, "<i4"), (64, "u1")])
def test_typed_arrays_of_cbor(tag: int, kind: str) -> None:
    values = np.array([1, 2, 200], kind)
    op = decode(cbor2.dumps({"op": "publish", "msg": {"data": cbor2.CBORTag(tag, values.tobytes())}}))
    assert op is not None
    np.testing.assert_array_equal(op["msg"]["data"], values)


def test_byte_arrays_in_every_form_that_servers_use() -> None:
    assert [payload(v) for v in (b"\x01\x02", "AQI=", [1, 2], np.array([1, 2], np.uint8))] == [b"\x01\x02"] * 4
    for wrong in ("no base64!", [1, 300], ["a"], None, 3.0):
        with pytest.raises((ValueError, TypeError)):
            payload(wrong)


# ---- addresses and secrets -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("url", ["http://127.0.0.1:9090", "127.0.0.1:9090", "ws://", "nonsense", ""])
def test_an_address_that_is_none_says_how_one_looks(url: str) -> None:
    with pytest.raises(RobopolicyError, match=r"must look like ws://127\.0\.0\.1:9090"):
        RemoteRobot(RobotFile.from_dict(robot_data()), url=url)


def test_a_port_where_nothing_listens_says_so() -> None:
    client = RemoteRobot(RobotFile.from_dict(robot_data()), url="ws://127.0.0.1:9")
    with pytest.raises(RobopolicyError, match=r"nothing listens at ws://127\.0\.0\.1:9; is the bridge running"):
        client.connect(0.5)


def test_a_token_is_needed_and_shown_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="robopolicy")
    secret = "3kJ9-secret"
    with stand_in(token=secret) as server:
        with pytest.raises(RobopolicyError, match="HTTP status 401: set a valid token") as error:
            RemoteRobot(RobotFile.from_dict(robot_data()), url=server.url, token="wrong-secret").connect(0.5)
        address = server.url.replace("ws://", f"ws://user:{secret}@") + f"/?key={secret}"
        point = Endpoint(url=address, token=secret, headers={"X-Key": secret})
        with socket_to(server, endpoint={"token": secret}) as socket:
            assert socket.connected
            shown = f"{point} {point!r} {socket.endpoint!r} {socket.problem} {error.value}"
    assert "secret" not in shown + caplog.text


def test_tls_with_an_authority_of_ones_own_and_not_without(tmp_path: Path) -> None:
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files]
    try:
        subprocess.run(make, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with stand_in(tls=tls) as server:
        with socket_to(server, endpoint={"ca_file": str(tmp_path / "cert.pem")}) as socket:
            assert socket.connected
        with pytest.raises(RobopolicyError, match=r"TLS with wss://.* failed"):
            RemoteRobot(RobotFile.from_dict(robot_data()), url=server.url).connect(0.5)
    with pytest.raises(RobopolicyError, match="cannot be read"):
        RemoteRobot(RobotFile.from_dict(robot_data()), url=server.url, ca_file=str(tmp_path / "none.pem"))


# ---- newest or nothing -----------------------------------------------------------------------------------------------
def test_messages_published_while_the_link_is_down_are_never_sent() -> None:
    server = RosbridgeServer()
    server.start()
    got: list[int] = []
    server.listen("/a", "std_msgs/Int32", lambda message: got.append(message["data"]))
    with socket_to(server) as socket:
        socket.advertise("/a", "std_msgs/Int32")
        until(lambda: socket.publish("/a", {"data": 1}) or got)
        server.close()
        until(lambda: not socket.connected)
        for i in range(100, 200):
            socket.publish("/a", {"data": i})
        server.start()
        until(lambda: socket.connected)
        until(lambda: socket.publish("/a", {"data": 2}) or got[-1] == 2)
    server.close()
    assert set(got) == {1, 2}
    assert socket.counts.stale >= 1


def test_a_burst_leaves_as_its_newest_message() -> None:
    with stand_in() as server, socket_to(server) as socket:
        got: list[int] = []
        server.listen("/a", "std_msgs/Int32", lambda message: got.append(message["data"]))
        socket.advertise("/a", "std_msgs/Int32")
        socket.flush(timeout_s=30)
        all_there = threading.Event()
        socket._thread.soon(all_there.wait, 60)
        for i in range(1000):
            socket.publish("/a", {"data": i})
        all_there.set()
        until(lambda: got or socket.publish("/a", {"data": 999}))
        assert set(got) == {999}
        assert socket.counts.replaced >= 999


def test_subscriptions_advertisements_and_services_come_back() -> None:
    server = RosbridgeServer()
    server.start()
    got: list[int] = []
    heard: list[int] = []
    server.listen("/up", "std_msgs/Int32", lambda message: heard.append(message["data"]))
    with socket_to(server) as socket:
        socket.advertise("/up", "std_msgs/Int32")
        socket.subscribe("/both", "std_msgs/Int32", lambda message, arrival_s: got.append(message["data"]))
        socket.advertise("/both", "std_msgs/Int32")
        socket.offer_service("/mine", "std_srvs/Trigger", lambda args: (True, {"success": True, "message": str(args)}))
        for round_ in range(2):
            until(lambda: server.wanted("/both"))
            for topic, came in (("/both", got), ("/up", heard)):  # others lose a topic that they use both ways
                say = lambda topic=topic, r=round_: socket.publish(topic, {"data": r})  # noqa: E731
                until(lambda say=say, came=came, r=round_: say() or came[-1:] == [r])
            assert server.call_client("/mine", {"a": 1}, timeout_s=30)["message"] == "{'a': 1}"
            generation = socket.generation
            server.close()
            server.start()
            until(lambda g=generation: socket.generation > g)
    server.close()


def test_a_connection_that_the_server_no_longer_hears_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robopolicy.deploy.rosbridge.PROBE_EVERY_S", 0.1)
    monkeypatch.setattr("robopolicy.deploy.rosbridge.PROBE_TIMEOUT_S", 0.2)
    with stand_in() as server, socket_to(server) as socket:
        socket._orders.append(b'{"op": "publish", "msg": {"a": {}}')  # what a client that dies while writing leaves
        socket._thread.soon(socket._work.set)
        until(lambda: socket.generation >= 2)
        assert socket.counts.resets >= 1
        monkeypatch.setattr("robopolicy.deploy.rosbridge.PROBE_TIMEOUT_S", 60)
        until(lambda: socket.connected)
        assert socket.call("/rosapi/topics", {}, timeout_s=30)["topics"] == []


@pytest.mark.parametrize("rosapi", [True, False])
def test_a_missing_rosapi_costs_nothing_but_what_it_knows(rosapi: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robopolicy.deploy.rosbridge.PROBE_EVERY_S", 0.05)
    monkeypatch.setattr("robopolicy.deploy.rosbridge.PROBE_TIMEOUT_S", 60)
    with arm_behind_a_bridge(quirks=Quirks(rosapi=rosapi)) as robot, client_of(robot, streams=["obj_pose"]) as client:
        time.sleep(0.3)
        assert client.link().generation == 5
        reports = {report.name: report for report in client.reports()}
        assert (reports["obj_pose"].seen_type == "geometry_msgs/PoseStamped") is rosapi
        assert [report.problem for report in reports.values()] == [""] * 3


def test_services_say_why_they_fail() -> None:
    def no(args: Any) -> dict[str, Any]:
        raise RobopolicyError("the arm is in error")

    over = threading.Event()
    with stand_in() as server, socket_to(server) as socket:
        server.offer_service("/no", "a/B", no)
        server.offer_service("/slow", "a/B", lambda args: {"over": over.wait(60)})
        assert "time" in socket.call("/rosapi/get_time", {}, timeout_s=30)
        for service, why, timeout_s in (
            ("/none", "does not exist", 30.0),
            ("/no", "the arm is in error", 30.0),
            ("/slow", "within 0.1 s", 0.1),
        ):
            with pytest.raises(BridgeError, match=why):
                socket.call(service, {}, timeout_s=timeout_s)
        over.set()
        server.close()
        until(lambda: not socket.connected)
        with pytest.raises(BridgeError, match="cannot be called: "):
            socket.call("/no", {}, timeout_s=0.1)


def test_goals_that_nobody_answers_are_not_waited_for_without_end() -> None:
    with stand_in() as server, socket_to(server) as socket:
        keys = [socket.send_goal("/nobody", "a/B", {}) for _ in range(3 * MOST_GOALS)]
        assert list(socket.goals) == keys[-MOST_GOALS:]


def test_a_goal_ends_with_its_status_whatever_its_result_says() -> None:
    with stand_in() as server, socket_to(server) as socket:
        ended: list[tuple[Any, Any]] = []
        server.offer_action("/aborts", "a/B", lambda handle: handle.finish(6, {"error_code": -4}))
        note = lambda op, arrival_s: ended.append((op["status"], op["values"]["error_code"]))  # noqa: E731
        socket.send_goal("/aborts", "a/B", {}, note)
        until(lambda: ended)
        assert (ended, socket.goals) == ([(6, -4)], {})


def test_pictures_come_by_cbor_and_json_alike() -> None:
    data = bytes(range(256)) * 40
    with stand_in() as server, socket_to(server) as plain, socket_to(server) as packed:
        got: dict[str, bytes] = {}
        for socket, how in ((plain, "none"), (packed, "cbor")):
            receive = lambda m, s, how=how: got.update({how: payload(m["data"])})  # noqa: E731
            socket.subscribe("/picture", "sensor_msgs/CompressedImage", receive, compression=how)
        send = lambda: server.publish("/picture", "sensor_msgs/CompressedImage", {"data": data})  # noqa: E731
        until(lambda: send() or len(got) == 2)
        assert got == {"none": data, "cbor": data}


# ---- whatever arrives ------------------------------------------------------------------------------------------------
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(ARM),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["x", "stamp", "sec"]), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = ("op", "topic", "msg", "id", "service", "result", "values", "action", "status", "name", "position", "velocity")
VALID = {
    "op": "publish",
    "topic": "/joint_states",
    "msg": {
        "header": {"stamp": {"sec": 1, "nanosec": 2}, "frame_id": ""},
        "name": list(ARM),
        "position": HOME.tolist(),
        "velocity": [0.0] * 7,
        "effort": [],
    },
}


@st.composite
def spoilt(draw: st.DrawFn) -> str | bytes:
    """An operation of the bridge with something wrong in it, as text or binary, cut off or not."""
    op: dict[str, Any] = json.loads(json.dumps(VALID))
    op["topic"] = draw(st.sampled_from(["/joint_states", "/objects/obj_pose", "/robopolicy/estop", "/other"]))
    op["op"] = draw(st.sampled_from(["publish", "publish", "service_response", "call_service", "action_result", "png"]))
    target = draw(st.sampled_from([op, op["msg"], op["msg"]["header"]]))
    target[draw(st.sampled_from(FIELDS))] = draw(JSON)
    if draw(st.booleans()):
        return cbor2.dumps(op)[: draw(st.integers(1, 400))]
    text = json.dumps(op)
    return text[: draw(st.integers(0, len(text)))] if draw(st.integers(0, 3)) == 0 else text


@pytest.fixture(scope="module")
def pelted() -> Iterator[tuple[Any, RemoteRobot]]:
    """An arm and an armed client, for as long as all examples last."""
    with arm_behind_a_bridge() as robot, client_of(robot, streams=["obj_pose", "goal_pos"]) as client:
        yield robot, client


EXAMPLES, CUTS = 100, 30
BACKGROUND_RANDOM = pytest.mark.filterwarnings(
    "ignore:Do not use the `random` module"
)  # websockets' pings do, meanwhile
pelted_with: set[str | bytes] = set()


def cut_up(frame: str | bytes, dice: random.Random) -> str | bytes:
    """Return `frame` with a piece of it doubled, lost or replaced by a piece of a valid one."""
    other = json.dumps(VALID) if isinstance(frame, str) else cbor2.dumps(VALID)
    i, j = sorted(dice.randint(0, len(frame)) for _ in range(2))
    k = dice.randint(0, len(other))
    filling: Any = dice.choice([frame[:0], frame[i:j] * 2, other[k : k + dice.randint(0, 20)]])
    return frame[:i] + filling + frame[j:]


@BACKGROUND_RANDOM
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(frames=st.lists(spoilt(), min_size=8, max_size=10), noise=st.text() | st.binary(), seed=st.integers())
def test_no_message_ends_the_client(
    pelted: tuple[Any, RemoteRobot], frames: list[str | bytes], noise: str | bytes, seed: int
) -> None:
    _, client = pelted
    dice = random.Random(f"{seed}{frames}")
    frames = [noise, *frames, *(cut_up(frame, dice) for frame in frames for _ in range(CUTS))]
    pelted_with.update(frames)
    for frame in frames:
        for socket in client._sockets.values():
            client._thread.soon(socket._receive, frame)  # type: ignore[union-attr]
    done = threading.Event()
    client._thread.soon(done.set)  # type: ignore[union-attr]
    assert done.wait(60)
    state = client.state()
    assert state is not None
    assert np.isfinite(state.position).all()
    assert state.velocity is None or np.isfinite(state.velocity).all()
    for sample in client.samples("obj_pose"):
        assert np.isfinite(sample.value).all()


def test_after_all_that_the_client_still_works(pelted: tuple[Any, RemoteRobot]) -> None:
    robot, client = pelted
    assert len(pelted_with) >= 10_000
    limits = client.robot.limits
    until(lambda: client.data_age_s() < 0.1)
    client.rearm()
    until(lambda: client.rearm() or client.armed, within_s=60)  # stamps of nonsense have to leave the clock's window
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(3000):
        for socket in client._sockets.values():
            client._thread.soon(socket._receive, '{"op": "publish", "topic": "/joint_states", "msg": {"name": ["x"]}}')  # type: ignore[union-attr]
    done = threading.Event()
    client._thread.soon(done.set)  # type: ignore[union-attr]
    assert done.wait(60)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 500_000
    client.stop("enough")
    until(lambda: len(robot.arm.accepted) > 0)
    for command in robot.arm.accepted:
        assert (command.positions >= limits.position_low).all()
        assert (command.positions <= limits.position_high).all()


@BACKGROUND_RANDOM
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(frames=st.lists(spoilt() | st.text(max_size=20), min_size=1, max_size=20))
def test_no_message_ends_the_stand_in(frames: list[str | bytes], pelted: tuple[Any, RemoteRobot]) -> None:
    robot, _ = pelted
    dice = random.Random(str(frames))
    topics = ("/servo_node/delta_twist_cmds", TRAJECTORY_TOPIC, "/panda_arm_controller/commands")
    types = ("geometry_msgs/TwistStamped", "trajectory_msgs/JointTrajectory", "std_msgs/Float64MultiArray")
    with websockets.sync.client.connect(robot.server.url) as ws:
        for topic, kind in zip(topics, types, strict=True):
            ws.send(json.dumps({"op": "advertise", "topic": topic, "type": kind}))
        for frame in frames:
            if isinstance(frame, str):
                ws.send(frame)
                ws.send(cut_up(json.dumps({"op": "publish", "topic": dice.choice(topics), "msg": ORDER}), dice))
    with websockets.sync.client.connect(robot.server.url) as ws:
        ws.send('{"op": "call_service", "service": "/simrobot/episode", "id": "1"}')
        assert json.loads(ws.recv(timeout=60))["id"] == "1"


ORDER = {
    "header": {"stamp": {"sec": 0, "nanosec": 0}},
    "joint_names": list(ARM),
    "points": [{"positions": HOME.tolist(), "time_from_start": {"sec": 1, "nanosec": 2}}],
    "twist": {part: {"x": 0.1, "y": 0.0, "z": 0.0} for part in ("linear", "angular")},
    "data": HOME.tolist(),
}


# ---- peers that are not ours -----------------------------------------------------------------------------------------
@pytest.fixture(params=["ros2", "ros1"])
def bridge(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """URL and dialect of the bridge between: the real one where ROSBRIDGE_URL names it."""
    if url := os.environ.get("ROSBRIDGE_URL"):
        wanted = os.environ.get("ROSBRIDGE_DIALECT", "ros2")
        if request.param != wanted:
            pytest.skip(f"the real bridge speaks {wanted}")
        yield url, wanted
        return
    with stand_in(dialect=request.param) as server:
        yield server.url, request.param


def test_a_robot_that_speaks_by_roslibpy(bridge: tuple[str, str]) -> None:
    url, dialect = bridge
    peer = RoslibpyRobot(url, dialect=dialect)
    client = RemoteRobot(RobotFile.from_dict(robot_data()), url=url)
    try:
        client.connect(60)
        until(lambda: client.state() is not None)
        assert client.dialect == dialect
        np.testing.assert_allclose(client.state().position, HOME)  # type: ignore[union-attr]
        assert client.state().gripper_width_m is None  # type: ignore[union-attr]
        stops: list[str] = []
        client.listen(on_stop=stops.append)
        client.rearm()
        with TimeTeller(client):
            until(lambda: len(peer.seen) > 20)
        message = peer.seen[-1]["message"]
        assert message["joint_names"] == list(ARM)
        assert len(message["points"]) == 2
        assert set(message["points"][0]["time_from_start"]) == (
            {"secs", "nsecs"} if dialect == "ros1" else {"sec", "nanosec"}
        )
        until(lambda: client.call("/hello", {}, timeout_s=30)["message"] == "hello")
        service = client._sockets["service"]
        service.advertise("/please_stop", "std_msgs/Bool")
        until(lambda: service.publish("/please_stop", {"data": True}) or len(set(stops)) == 2)  # by topic and service
        until(lambda: any(seen["kind"] == "answer" and seen["message"]["success"] for seen in peer.seen))
        client.stop("asked")
        until(lambda: [len(seen["message"]["points"]) for seen in peer.seen if seen["kind"] == "trajectory"][-1] == 1)
    finally:
        client.close()
        peer.close()


def ros_python() -> str | None:
    """Return a Python that has ROS 2: $ROS_PYTHON, or this one."""
    if named := os.environ.get("ROS_PYTHON"):
        return named
    return sys.executable if importlib.util.find_spec("rclpy") else None


@pytest.mark.slow
@pytest.mark.skipif(ros_python() is None, reason="needs rclpy, here or in the Python that $ROS_PYTHON names")
def test_a_native_ros_2_node_understands_every_message() -> None:
    python = ros_python()
    assert python is not None
    for interface, topic in (
        ("joint_trajectory", TRAJECTORY_TOPIC),
        ("forward_position", "/panda_arm_controller/commands"),
        ("servo_twist", "/servo_node/delta_twist_cmds"),
    ):
        with stand_in() as server:
            peer = NativeRos2(python, server)
            client = RemoteRobot(RobotFile.from_dict(robot_data(interface=interface, topic=topic)), url=server.url)
            try:
                client.connect(60)
                until(lambda client=client: client.state() is not None, within_s=60)
                state = client.state()
                assert state is not None
                np.testing.assert_array_equal(state.position, HOME)
                assert (client.dialect, state.gripper_width_m) == ("ros2", 0.08)
                assert state.stamp_s == pytest.approx(time.time(), abs=60)
                until(lambda client=client: client.rearm() or client.armed)
                with TimeTeller(client):
                    until(lambda server=server, topic=topic: server.received.get(topic, 0) > 20)
                client.publish_status({"phase": "live"})
                client.stop("end")
                until(lambda peer=peer: any("status" in seen for seen in peer.seen))
                if interface == "joint_trajectory":
                    until(
                        lambda peer=peer: len(peer.seen) > 20 and len(peer.seen[-1].get("points", ())) == 1, within_s=5
                    )
                    moving = [seen for seen in peer.seen if len(seen.get("points", ())) == 2]
                    assert moving[-1]["joint_names"] == list(ARM)
                    np.testing.assert_allclose(moving[-1]["points"][0][1:7], HOME[1:])
                    assert moving[-1]["points"][0][7] == pytest.approx(0.01)
                assert peer.refused == []
            finally:
                client.close()
                peer.close()
