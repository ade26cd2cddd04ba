"""A simulated robot that runs in real time behind a rosbridge server, as a robot's own computer would.

It takes what the controllers of ros2_control (ROS 1: ros_control) take, under the names of the robot file:

    <controller>/joint_trajectory   JointTrajectory (also `/command` in ROS 1)
    <controller>/follow_joint_trajectory   the action
    <controller>/commands           Float64MultiArray, positions
    /servo_node/delta_twist_cmds    TwistStamped in the frame of the base
    the gripper's action            GripperCommand

and publishes joint states, the task's other observations and its cameras as the streams of the robot file, plus
`/simrobot/success`. Services: `/simrobot/reset` {seed}, `/simrobot/episode`, `/simrobot/fault` {name, value}.
"""

from __future__ import annotations

import collections
import concurrent.futures
import io
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from robopolicy.errors import RobopolicyError

from . import messages
from .contract import Floats
from .kinematics import CHAINS, find_chain
from .robot import RobotFile
from .sim_controllers import ArmController, GripperController
from .sim_server import ABORTED, CANCELED, SUCCEEDED, GoalHandle, RosbridgeServer

log = logging.getLogger(__name__)

SUCCESS_TOPIC, TWIST_TOPIC = "/simrobot/success", "/servo_node/delta_twist_cmds"
CONSTANT_EVERY = 50
"""Physics steps between two messages of a stream that does not change."""
DRAWING_STEPS = 3
"""Physics steps from a camera's look to its message, if there are so many: a picture takes 22 ms to draw without a GPU,
and who asks for it earlier waits, and the physics with it."""
FARTHEST_BEHIND_S = 0.1
"""A simulation that is later than this gives up catching up: its time slips against the clock's."""


class Steppable(Protocol):
    """The simulation as this module needs it; `robopolicy.envs.stepping.SteppedRobot` is one."""

    joint_names: tuple[str, ...]
    arm_dof: int
    dt_s: float
    control_steps_every: int
    physics_steps: int

    def reset(self, seed: int) -> None: ...
    def drive(self, arm_rad: NDArray[np.float64], finger_m: float) -> None: ...
    def step(self) -> None: ...
    def position(self) -> NDArray[np.float64]: ...
    def velocity(self) -> NDArray[np.float64]: ...
    def extras(self) -> dict[str, NDArray[np.float64]]: ...
    @property
    def success(self) -> bool: ...
    @property
    def cameras(self) -> tuple[str, ...]: ...
    def take_picture(self, camera: str) -> Callable[[], NDArray[np.uint8]]: ...


@dataclass(frozen=True, kw_only=True)
class SimSettings:
    """How the simulated robot behaves."""

    seed: int = 0
    """Of the first episode."""
    stream_every: int = 1
    """Physics steps between two messages of a stream."""
    camera_every: int = 5
    """Physics steps between two pictures of a camera."""
    start_from: Literal["desired", "measured"] = "desired"
    """Where the controller lets a new trajectory begin."""
    clock_offset_s: float = 0.0
    """Of the robot's clock against this machine's."""


class SimRobot:
    """Runs `sim` in a thread of its own, in real time, behind `server`."""

    def __init__(
        self, sim: Steppable, robot: RobotFile, server: RosbridgeServer, settings: SimSettings | None = None
    ) -> None:
        """Nothing moves before `start`.

        Raises:
            RobopolicyError: the simulated robot has other joints than the robot file.
        """
        self.sim, self.robot, self.server = sim, robot, server
        self.settings = settings or SimSettings()
        arm = sim.joint_names[: sim.arm_dof]
        if set(arm) != set(robot.joints):
            raise RobopolicyError(
                f"The simulated robot's joints are {', '.join(arm)}; the robot file {robot.name!r} has "
                f"{', '.join(robot.joints)}. Choose the robot file of this task's robot."
            )
        self.arm = ArmController(
            arm,
            timeout_s=robot.command.timeout_s,
            start_from=self.settings.start_from,
            chain=find_chain(robot.kinematics) if robot.kinematics in CHAINS else None,
        )
        self.gripper = GripperController(0.0, message_per_m=robot.gripper.message_per_m if robot.gripper else 0.5)
        self._told: dict[str, NDArray[Any]] = {}
        self._drawing: collections.deque[tuple[int, str, float, Callable[[], NDArray[np.uint8]]]] = collections.deque()
        self.slipped_s = 0.0
        """How much less time passed in the simulation than on the clock."""
        self.work_s: collections.deque[float] = collections.deque(maxlen=1000)
        """How long each of the last turns took, of `sim.dt_s`."""
        self.seed, self.success_once, self._began_s = self.settings.seed, False, 0.0
        self._lock = threading.RLock()
        self._orders: queue.SimpleQueue[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = queue.SimpleQueue()
        self._running = False
        self._thread: threading.Thread | None = None
        self._measured: Floats = np.zeros(sim.arm_dof)
        self._offer()

    def start(self) -> None:
        """Start the first episode and the clock; the server must be started, too."""
        self._restart(self.settings.seed)
        self._running = True
        self._thread = threading.Thread(target=self._run, name="simulated robot", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._running = False
        if self._thread is not None:
            self._thread.join(2.0)

    def now_s(self) -> float:
        """The robot's clock."""
        return time.time() + self.settings.clock_offset_s

    # ---- the loop ----------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        due_s = time.monotonic()
        while self._running:
            began_s = time.monotonic()
            self._turn(began_s)
            self.work_s.append(time.monotonic() - began_s)
            due_s += self.sim.dt_s
            wait_s = due_s - time.monotonic()
            if wait_s > 0:
                time.sleep(wait_s)
            elif wait_s < -FARTHEST_BEHIND_S:
                self.slipped_s -= wait_s
                due_s -= wait_s

    def _turn(self, now_s: float) -> None:
        """Do one physics step and tell what came of it."""
        while True:
            try:
                order, future = self._orders.get_nowait()
            except queue.Empty:
                break
            try:
                future.set_result(order())
            except Exception as error:
                future.set_exception(error)
        with self._lock:
            target, finger_m = self.arm.target(now_s), self.gripper.target_m
        sim = self.sim
        sim.drive(target, finger_m)
        sim.step()
        position, velocity = sim.position(), sim.velocity()
        self._measured = position[: sim.arm_dof]
        if len(position) > sim.arm_dof:
            with self._lock:
                self.gripper.watch(float(position[sim.arm_dof]), now_s)
        if sim.physics_steps % sim.control_steps_every == 0:
            self.success_once |= sim.success
            self.server.publish(SUCCESS_TOPIC, messages.BOOL, {"data": sim.success})
        self._publish(position, velocity)

    def _publish(self, position: Floats, velocity: Floats) -> None:
        server, step, now_s = self.server, self.sim.physics_steps, self.now_s()
        faults, dialect = server.faults, server.dialect
        for topic in self.robot.joint_states.topics if not faults.silent else ():
            names = self.sim.joint_names
            message = messages.joint_state(names, position, velocity, time_s=now_s, dialect=dialect)
            server.publish(topic, messages.JOINT_STATE, faults.spoil(message))
        if step % self.settings.stream_every == 0 and any(
            server.wanted(stream.topic) and name not in self.sim.cameras for name, stream in self.robot.streams.items()
        ):
            self._publish_streams(now_s, every=step % CONSTANT_EVERY == 0)
        if self.sim.cameras and step % self.settings.camera_every == 0:
            self._take_pictures(now_s, step + min(DRAWING_STEPS, self.settings.camera_every - 1))
        while self._drawing and self._drawing[0][0] <= step:
            self._publish_picture(*self._drawing.popleft()[1:])

    def _publish_streams(self, now_s: float, *, every: bool) -> None:
        """Publish the task's observations; those that are constant only when `every`."""
        extras, faults = self.sim.extras(), self.server.faults
        for name, stream in self.robot.streams.items():
            value, kind = extras.get(name), messages.short_type(stream.type)
            if value is None or (stream.constant and not every) or name == faults.silent_stream:
                continue
            value = self._told[name] = self._told.get(name, value) if name == faults.frozen_stream else value
            spelled: dict[str, Any] = {
                "time_s": now_s,
                "frame": self.robot.frames.world,
                "dialect": self.server.dialect,
            }
            if kind == messages.POSE and len(value) == 7:
                message = messages.pose_stamped(value, **spelled)
            elif kind == messages.POINT and len(value) == 3:
                message = messages.point_stamped(value, **spelled)
            else:
                message = messages.float_array(value)
            self.server.publish(stream.topic, kind, message, latch=stream.constant)

    def _take_pictures(self, now_s: float, due: int) -> None:
        """Let the cameras look; what they see is published at the physics step `due`, stamped `now_s`."""
        for name, stream in self.robot.streams.items():
            wanted = name in self.sim.cameras and self.server.wanted(stream.topic)
            if wanted and name != self.server.faults.silent_stream:
                self._drawing.append((due, name, now_s, self.sim.take_picture(name)))

    def _publish_picture(self, name: str, time_s: float, picture: Callable[[], NDArray[np.uint8]]) -> None:
        from PIL import Image

        seen, out = picture(), io.BytesIO()
        seen = self._told[name] = self._told.get(name, seen) if name == self.server.faults.frozen_stream else seen
        Image.fromarray(seen).save(out, "PNG", compress_level=1)  # without loss, as in training
        header = messages.header(time_s, self.server.dialect, name)
        message = {"header": header, "format": "png", "data": out.getvalue()}
        self.server.publish(self.robot.streams[name].topic, messages.COMPRESSED, message)

    # ---- what it offers ----------------------------------------------------------------------------------------------
    def _offer(self) -> None:
        server, command, gripper = self.server, self.robot.command, self.robot.gripper
        controller = command.topic.rpartition("/")[0] or "/arm_controller"
        trajectories = {f"{controller}/joint_trajectory", f"{controller}/command"}
        positions, twists = {f"{controller}/commands"}, {TWIST_TOPIC}
        action = f"{controller}/follow_joint_trajectory"
        for topics, kind in (
            (trajectories, "joint_trajectory"),
            (positions, "forward_position"),
            (twists, "servo_twist"),
        ):
            if command.interface == kind:
                topics.add(command.topic)
        for topic in sorted(trajectories):
            server.listen(topic, messages.JOINT_TRAJECTORY, self._on_trajectory)
        for topic in sorted(positions):
            server.listen(topic, messages.FLOATS, self._on_positions)
        for topic in sorted(twists):
            server.listen(topic, messages.TWIST, self._on_twist)
        server.offer_action(action, "control_msgs/FollowJointTrajectory", self._on_trajectory_goal)
        if gripper is not None and gripper.topic:
            server.offer_action(gripper.topic, "control_msgs/GripperCommand", self._on_gripper_goal)
        server.offer_service("/simrobot/reset", "robopolicy/Reset", self._on_reset)
        server.offer_service("/simrobot/episode", "robopolicy/Episode", self._on_episode)
        server.offer_service("/simrobot/fault", "robopolicy/Fault", self._on_fault)

    def _on_trajectory(self, message: Mapping[str, Any]) -> None:
        self._follow(message, None)

    def _follow(self, message: Any, on_replaced: Callable[[], None] | None) -> float | None:
        with self._lock:
            return self.arm.trajectory(
                message,
                now_s=time.monotonic(),
                wall_s=self.now_s(),
                measured=self._measured,
                on_replaced=on_replaced,
            )

    def _on_positions(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            self.arm.positions(message, now_s=time.monotonic())

    def _on_twist(self, message: Mapping[str, Any]) -> None:
        with self._lock:
            self.arm.twist(message, now_s=time.monotonic())

    def _on_trajectory_goal(self, handle: GoalHandle) -> None:
        state = {"open": True}

        def finish(status: int, code: int, text: str) -> None:
            if state.pop("open", False):
                handle.finish(status, {"error_code": code, "error_string": text})

        end_s = self._follow(handle.goal.get("trajectory"), lambda: finish(ABORTED, 0, "replaced"))
        if end_s is None:
            finish(ABORTED, -1, self.arm.why_refused)  # INVALID_GOAL
            return

        def cancel() -> None:
            with self._lock:
                self.arm.reset(self._measured)
            finish(CANCELED, 0, "canceled")

        handle.on_cancel = cancel
        timer = threading.Timer(max(0.0, end_s - time.monotonic()), finish, (SUCCEEDED, 0, ""))
        timer.daemon = True
        timer.start()

    def _on_gripper_goal(self, handle: GoalHandle) -> None:
        def done(reached: bool, stalled: bool) -> None:
            status = SUCCEEDED if reached or stalled else ABORTED
            width_m = self.gripper.target_m
            result = {"position": width_m, "effort": 0.0, "stalled": stalled, "reached_goal": reached}
            handle.finish(status, result)

        try:
            with self._lock:
                self.gripper.command(handle.goal, time.monotonic(), done)
        except RobopolicyError as error:
            log.warning("%s", error)
            handle.finish(ABORTED, {"position": 0.0, "effort": 0.0, "stalled": False, "reached_goal": False})

    def _on_reset(self, args: Mapping[str, Any]) -> Mapping[str, Any]:
        seed = args.get("seed", self.seed + 1)
        if type(seed) is not int or not 0 <= seed < 2**31:
            return {"success": False, "message": f"seed must be a whole number from 0 to 2**31 - 1; got {seed!r}"}
        self._in_the_loop(lambda: self._restart(seed))
        return {"success": True, "message": f"episode {seed}"}

    def _on_episode(self, args: Mapping[str, Any]) -> Mapping[str, Any]:
        return {
            "seed": self.seed,
            "steps": self.sim.physics_steps // self.sim.control_steps_every,
            "success_once": self.success_once,
            "success": self.sim.success,
            "elapsed_s": self.sim.physics_steps * self.sim.dt_s,
            "slipped_s": self.slipped_s,
            "commands": len(self.arm.accepted),
            "refused": self.arm.refused,
            "why_refused": self.arm.why_refused,
        }

    def _on_fault(self, args: Mapping[str, Any]) -> Mapping[str, Any]:
        self.server.faults.set(str(args.get("name")), args.get("value"))
        if args.get("name") == "freeze_s":
            seconds, self.server.faults.freeze_s = self.server.faults.freeze_s, 0.0
            threading.Timer(0.05, self.server.freeze, (seconds,)).start()  # after the answer has left
        return {"success": True, "message": f"{args.get('name')} = {args.get('value')!r}"}

    def _in_the_loop(self, order: Callable[[], None]) -> None:
        if not self._running:
            order()
            return
        future: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._orders.put((order, future))
        future.result(10.0)

    def _restart(self, seed: int) -> None:
        sim = self.sim
        sim.reset(seed)
        position = sim.position()
        with self._lock:
            self.arm.reset(position[: sim.arm_dof])
            self.gripper.reset(float(position[sim.arm_dof]) if len(position) > sim.arm_dof else 0.0)
        self._measured = position[: sim.arm_dof]
        self.seed, self.success_once = seed, False
        self._drawing.clear()
        self._publish_streams(self.now_s(), every=True)
