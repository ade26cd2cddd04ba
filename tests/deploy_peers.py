"""Robots without physics and other peers of a bridge, for the tests of deployment.

Run as a program it is a peer that knows nothing of this project, see `PEERS`; it then needs numpy and what it is named
after.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIGS = Path(__file__).parents[1] / "configs"
ARM = tuple(f"panda_joint{i}" for i in range(1, 8))
FINGERS = ("panda_finger_joint1", "panda_finger_joint2")
HOME = np.array([0.0, 0.4, 0.0, -1.9, 0.0, 2.3, 0.8])


def robot_data(**command: Any) -> dict[str, Any]:
    """Return the Panda's robot file as a mapping, with changes to its `command` and deadlines for a busy machine."""
    import yaml
    from ideal_arm import DEADLINES

    data = yaml.safe_load((CONFIGS / "robot" / "panda.yaml").read_text())
    return {**data, "command": {**data["command"], **command}, "watchdogs": dict.fromkeys(DEADLINES, 30.0)}


PATIENT_WORDS = ["real_time=false"] + [
    f"robot.watchdogs.{name}_s=30"
    for name in ("state_age", "observation_age", "inference", "loop_overrun", "link", "spread")
]
"""For the command line: deadlines for a busy machine, and no priority over the other tests."""


class StillArm:
    """A `Steppable` arm that is at once where it is told to be; an object and a goal lie about."""

    joint_names = (*ARM, *FINGERS)
    arm_dof = 7
    dt_s = 0.01
    control_steps_every = 5
    cameras: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.physics_steps = 0
        self.success_after = 100
        """Steps after which the task is done."""
        self._position = np.zeros(9)
        self._velocity = np.zeros(9)

    def reset(self, seed: int) -> None:
        self.physics_steps = 0
        self._position, self._velocity = np.array([*HOME, 0.04, 0.04]), np.zeros(9)
        self._object = np.array([0.01 * seed, 0.1, 0.02, 1.0, 0.0, 0.0, 0.0])

    def drive(self, arm_rad: NDArray[np.float64], finger_m: float) -> None:
        before = self._position
        self._position = np.array([*arm_rad, max(finger_m, 0.0), max(finger_m, 0.0)])
        self._velocity = (self._position - before) / self.dt_s

    def step(self) -> None:
        self.physics_steps += 1

    def position(self) -> NDArray[np.float64]:
        return self._position.copy()

    def velocity(self) -> NDArray[np.float64]:
        return self._velocity.copy()

    def extras(self) -> dict[str, NDArray[np.float64]]:
        return {"obj_pose": self._object, "goal_pos": np.array([0.1, 0.2, 0.3])}

    @property
    def success(self) -> bool:
        return self.physics_steps > self.success_after

    def take_picture(self, camera: str) -> Callable[[], NDArray[np.uint8]]:
        raise AssertionError(camera)


@contextlib.contextmanager
def arm_behind_a_bridge(
    *, command: dict[str, Any] | None = None, state_age_s: float = 30.0, settings: Any = None, **server: Any
) -> Iterator[Any]:
    """Run a `SimRobot` with a `StillArm`; yields it.

    Args:
        state_age_s: of the robot file's watchdogs; the robot has the others from `robot_data`.
        server: settings of its RosbridgeServer.
    """
    from robopolicy.deploy.robot import RobotFile
    from robopolicy.deploy.sim_robot import SimRobot
    from robopolicy.deploy.sim_server import RosbridgeServer

    bridge = RosbridgeServer(**server)
    data = robot_data(**(command or {}))
    data["watchdogs"]["state_age_s"] = state_age_s
    robot = SimRobot(StillArm(), RobotFile.from_dict(data), bridge, settings)
    bridge.start()
    robot.start()
    try:
        yield robot
    finally:
        robot.close()
        bridge.close()


@contextlib.contextmanager
def client_of(robot: Any, **settings: Any) -> Iterator[Any]:
    """Yield a connected `RemoteRobot` of the simulated `robot`."""
    from robopolicy.deploy.remote import RemoteRobot

    client = RemoteRobot(robot.robot, url=robot.server.url, **settings)
    try:
        client.connect(30.0)
        if not robot.server.faults.silent:
            until(lambda: client.state() is not None)
        yield client
    finally:
        client.close()


class TimeTeller:
    """Sends commands at a fixed rate whose first joint says when each was sent, so that old ones show.

    The joint is `time - start` in units of 100 s.
    """

    UNIT_S = 100.0

    def __init__(self, client: Any, *, rate_hz: float = 50.0) -> None:
        self._client, self._period_s = client, 1.0 / rate_hz
        self.start_s = time.monotonic()
        self.sent = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            position = HOME.copy()
            position[0] = (time.monotonic() - self.start_s) / self.UNIT_S
            self._client.send(position, np.zeros(7), None)
            self.sent += 1

    def made_s(self, accepted: Any) -> list[float]:
        """Return when each accepted command was made (monotonic); stops, which tell no time, are left out."""
        return [self.start_s + c.positions[0] * self.UNIT_S for c in accepted if c.points == 2]

    def __enter__(self) -> TimeTeller:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        self._thread.join()


def moving(client: Any, robot: Any, commands: int = 10) -> None:
    """Arm `client`, and again should a busy machine disarm it, until its commands arrive."""
    wanted = len(robot.arm.accepted) + commands
    until(lambda: len(robot.arm.accepted) > wanted or (not client.armed and client.rearm()))


def until(true: Callable[[], Any], *, within_s: float = 30.0) -> float:
    """Wait until `true()`, for as long as a very busy machine may need; return how long it took.

    Raises:
        AssertionError: it did not become true.
    """
    began_s = time.monotonic()
    while not true():
        assert time.monotonic() - began_s < within_s, f"not within {within_s:g} s"
        time.sleep(0.002)
    return time.monotonic() - began_s


def least(measure: Callable[[], float], *, below: float, tries: int = 8) -> float:
    """Measure until the result is below a limit; return it.

    What a busy machine adds differs from try to try; what the code itself takes, it takes every time.

    Raises:
        AssertionError: it never was.
    """
    found: list[float] = []
    while not found or found[-1] >= below:
        assert len(found) < tries, f"{found} are not below {below:g}"
        found.append(measure())
    return found[-1]


class RoslibpyRobot:
    """A robot in a process of its own, on the bridge by roslibpy: sends joint states, notes what it is sent."""

    def __init__(self, url: str, *, dialect: str = "ros2", seconds: float = 90.0) -> None:
        import subprocess

        command = [sys.executable, __file__, "roslibpy", url, dialect, str(seconds)]
        self._child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.seen: list[dict[str, Any]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith("{"):
                self.seen.append(json.loads(line))

    def close(self) -> None:
        self._child.terminate()
        self._child.wait(30)


def say(value: Any) -> None:
    """Tell the test that started this process."""
    print(json.dumps(value), flush=True)


def roslibpy_robot(url: str, dialect: str, seconds: str) -> None:
    """Be the other process of `RoslibpyRobot`."""
    from urllib.parse import urlsplit

    import roslibpy

    parts = urlsplit(url)
    ros = roslibpy.Ros(parts.hostname, parts.port)
    ros.run(timeout=30)
    states = roslibpy.Topic(ros, "/joint_states", "sensor_msgs/JointState")
    orders = roslibpy.Topic(ros, "/panda_arm_controller/joint_trajectory", "trajectory_msgs/JointTrajectory")
    estop = roslibpy.Topic(ros, "/robopolicy/estop", "std_msgs/Bool")
    stop = roslibpy.Service(ros, "/robopolicy/stop", "std_srvs/Trigger")
    hello = roslibpy.Service(ros, "/hello", "std_srvs/Trigger")

    def tell(kind: str, message: Any) -> None:
        say({"kind": kind, "message": dict(message)})

    def ask_to_stop(message: Any) -> None:
        estop.publish({"data": True})
        stop.call(roslibpy.ServiceRequest({}), lambda answer: tell("answer", answer), lambda error: tell("error", {}))

    def answer(request: Any, response: Any) -> bool:
        response["success"], response["message"] = True, "hello"
        return True

    hello.advertise(answer)
    orders.subscribe(lambda message: tell("trajectory", message))
    roslibpy.Topic(ros, "/please_stop", "std_msgs/Bool").subscribe(ask_to_stop)
    states.advertise()
    estop.advertise()
    until_s = time.monotonic() + float(seconds)
    while time.monotonic() < until_s:
        now_s = time.time()
        parts_of_time = (int(now_s), int(now_s % 1 * 1e9))
        names = ("secs", "nsecs") if dialect == "ros1" else ("sec", "nanosec")
        header = {"stamp": dict(zip(names, parts_of_time, strict=True)), "frame_id": ""}
        body = {"name": list(ARM), "position": HOME.tolist(), "velocity": [0.0] * 7, "effort": []}
        states.publish({"header": header, **body})
        time.sleep(0.01)
    ros.close()


class NativeRos2:
    """A ROS 2 robot (rclpy) and a gateway to it, each a process; what real ROS refuses, the gateway does not deliver.

    The gateway is the part of a bridge that knows ROS: it turns messages into ROS's own types and back, field by field.
    """

    def __init__(self, python: str, server: Any) -> None:
        import os
        import subprocess

        environment = {**os.environ, "ROS_DOMAIN_ID": str(os.getpid() % 100), "FASTDDS_BUILTIN_TRANSPORTS": "SHM"}
        environment.pop("PYTHONPATH", None)
        start = lambda kind: subprocess.Popen(  # noqa: E731
            [python, __file__, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._robot, self._gateway = start("rclpy-robot"), start("rclpy-gateway")
        self.seen: list[dict[str, Any]] = []
        """What the robot's own node received."""
        self.refused: list[str] = []
        """What could not be made a ROS message."""
        assert self._gateway.stdin is not None
        for name, kind in ROS_TOPICS.items():
            server.listen(name, kind, lambda message, name=name: self._send(name, message))
        threading.Thread(target=self._read_robot, daemon=True).start()
        threading.Thread(target=self._read_gateway, args=(server,), daemon=True).start()

    def _send(self, topic: str, message: Any) -> None:
        self._gateway.stdin.write(json.dumps({"topic": topic, "msg": message}) + "\n")  # type: ignore[union-attr]
        self._gateway.stdin.flush()  # type: ignore[union-attr]

    def _read_robot(self) -> None:
        for line in self._robot.stdout or ():
            self.seen.append(json.loads(line))

    def _read_gateway(self, server: Any) -> None:
        for line in self._gateway.stdout or ():
            told = json.loads(line)
            if "refused" in told:
                self.refused.append(told["refused"])
            else:
                server.publish(told["topic"], told["type"], told["msg"])

    def close(self) -> None:
        for child in (self._robot, self._gateway):
            child.kill()
            child.wait(30)


ROS_TOPICS = {
    "/panda_arm_controller/joint_trajectory": "trajectory_msgs/JointTrajectory",
    "/panda_arm_controller/commands": "std_msgs/Float64MultiArray",
    "/servo_node/delta_twist_cmds": "geometry_msgs/TwistStamped",
    "/robopolicy/status": "std_msgs/String",
}


def rclpy_robot() -> None:
    """Be a robot's driver that knows nothing of any bridge."""
    import rclpy
    from sensor_msgs.msg import JointState
    from std_msgs.msg import String
    from trajectory_msgs.msg import JointTrajectory

    rclpy.init()
    node = rclpy.create_node("robot")
    publisher = node.create_publisher(JointState, "/joint_states", 10)

    def publish() -> None:
        message = JointState(name=[*FINGERS, *reversed(ARM)], position=[0.04, 0.04, *HOME[::-1].tolist()])
        message.header.stamp = node.get_clock().now().to_msg()
        message.velocity = [0.0] * 9
        message.effort = [math.nan] * 9
        publisher.publish(message)

    def tell(message: Any) -> None:
        points = [
            [*point.positions, point.time_from_start.sec + 1e-9 * point.time_from_start.nanosec]
            for point in message.points
        ]
        print(json.dumps({"joint_names": list(message.joint_names), "points": points}), flush=True)

    node.create_timer(0.01, publish)
    node.create_subscription(JointTrajectory, "/panda_arm_controller/joint_trajectory", tell, 10)
    node.create_subscription(
        String, "/robopolicy/status", lambda m: print(json.dumps({"status": m.data}), flush=True), 10
    )
    rclpy.spin(node)


def rclpy_gateway() -> None:
    """Be the gateway of `NativeRos2`."""
    import importlib

    import rclpy
    from sensor_msgs.msg import JointState

    def kind_of(name: str) -> Any:
        package, _, kind = name.partition("/")
        return getattr(importlib.import_module(f"{package}.msg"), kind)

    def to_ros(kind: Any, value: Any) -> Any:
        out = kind()
        fields = kind.get_fields_and_field_types()
        for key, item in value.items():
            inner = fields[key]  # an unknown field is an error, as it is to a bridge
            element = inner.removeprefix("sequence<").rstrip(">") if inner.startswith("sequence<") else inner
            if "/" in element:
                element = kind_of(element)
                item = [to_ros(element, v) for v in item] if inner.startswith("sequence<") else to_ros(element, item)
            setattr(out, key, item)
        return out

    def to_json(value: Any) -> Any:
        if hasattr(value, "get_fields_and_field_types"):
            return {key: to_json(getattr(value, key)) for key in value.get_fields_and_field_types()}
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, list | tuple):
            return [to_json(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    rclpy.init()
    node = rclpy.create_node("gateway")
    kinds = {topic: kind_of(name) for topic, name in ROS_TOPICS.items()}
    publishers = {topic: node.create_publisher(kind, topic, 10) for topic, kind in kinds.items()}

    def forward(message: Any) -> None:
        print(
            json.dumps({"topic": "/joint_states", "type": "sensor_msgs/JointState", "msg": to_json(message)}),
            flush=True,
        )

    def read() -> None:
        for line in sys.stdin:
            told = json.loads(line)
            try:
                publishers[told["topic"]].publish(to_ros(kinds[told["topic"]], told["msg"]))
            except (KeyError, AssertionError, TypeError, AttributeError) as error:
                say({"refused": f"{told['topic']}: {error!r}"})

    node.create_subscription(JointState, "/joint_states", forward, 10)
    threading.Thread(target=read, daemon=True).start()
    rclpy.spin(node)


PEERS = {"roslibpy": roslibpy_robot, "rclpy-robot": rclpy_robot, "rclpy-gateway": rclpy_gateway}

if __name__ == "__main__":
    PEERS[sys.argv[1]](*sys.argv[2:])
