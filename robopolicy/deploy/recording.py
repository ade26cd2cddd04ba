"""Records a deployment as MCAP with ROS 2 messages, from a thread of its own; opens in Foxglove and rosbag2.

    topic                                        holds
    /robopolicy/measured, wanted, sent           sensor_msgs/JointState: the arm, what the policy wants, what left
    /robopolicy/tick                             lateness, ages, filter counts and reasons of every turn of the loop
    /robopolicy/plan                             observation, chunk, latency, noise of every plan: enough to replay it
    /robopolicy/<camera>                         sensor_msgs/Image: the newest picture of each plan
    /robopolicy/event                            std_msgs/String, JSON: starts, stops, warnings

The loop hands over a record and goes on; if the disk is slower than the robot, records are dropped and counted. Chunks
are closed once a second, so a crash loses a second at most.
"""

from __future__ import annotations

import json
import math
import os
import queue
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zstandard
from mcap.exceptions import McapError
from mcap.reader import NonSeekingReader
from mcap.writer import Writer
from mcap_ros2._dynamic import serialize_dynamic
from mcap_ros2.decoder import DecoderFactory

from robopolicy.deploy.contract import Plan, Tick
from robopolicy.errors import RobopolicyError

FLUSH_S = 1.0
QUEUE_RECORDS = 1000
"""Ten seconds of a loop at 100 Hz."""
MAX_BYTES = 4 << 30

CUT_OFF = (McapError, struct.error, zstandard.ZstdError)
"""What reading raises where a file ends too early."""

_SEPARATOR = "\n" + "=" * 80 + "\n"
_HEADER = f"""{_SEPARATOR}MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id{_SEPARATOR}MSG: builtin_interfaces/Time
int32 sec
uint32 nanosec"""
SCHEMAS = {
    "sensor_msgs/msg/JointState": "std_msgs/Header header\nstring[] name\nfloat64[] position\nfloat64[] velocity\n"
    "float64[] effort" + _HEADER,
    "sensor_msgs/msg/Image": "std_msgs/Header header\nuint32 height\nuint32 width\nstring encoding\n"
    "uint8 is_bigendian\nuint32 step\nuint8[] data" + _HEADER,
    "std_msgs/msg/String": "string data",
    "robopolicy_msgs/msg/Tick": "uint64 index\nfloat64 time_s\nfloat64 late_s\nfloat64 work_s\n"
    "float64 state_age_s\nstring phase\nfloat64 gripper_m\nfloat64[] action\nuint32 clamped\nstring rejected",
    "robopolicy_msgs/msg/Plan": "float64 time_s\nfloat64 observed_s\nfloat64 inference_s\nfloat64 spread_s\n"
    "int32 shift\nuint8[] generator_state\nrobopolicy_msgs/Array chunk\nrobopolicy_msgs/Array[] observation\n"
    "string[] missing\nstring[] diagnostic_names\nfloat64[] diagnostics"
    f"{_SEPARATOR}MSG: robopolicy_msgs/Array\nstring name\nstring dtype\nuint32[] shape\nuint8[] data",
}


class McapRecorder:
    """Writes what it is told to `path`; implements `contract.Recorder`.

    Args:
        path: file to write; its folder is made.
        joints: names of the arm's joints, in order.
        about: what the recording is of (checkpoint, its hash, robot file, versions): kept as the file's metadata.
        max_bytes: nothing is written beyond this size.
    """

    def __init__(
        self, path: Path, *, joints: Sequence[str], about: Mapping[str, Any], max_bytes: int = MAX_BYTES
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = path.open("xb")
        except FileExistsError as error:
            raise RobopolicyError(
                f"{path} exists; a recording never overwrites another. Choose another name."
            ) from error
        self.path = path
        self.dropped = 0
        """Records that were not written: the queue or the disk quota was full."""
        self._joints = list(joints)
        self._max_bytes = max_bytes
        self._wall_ns = time.time_ns() - time.monotonic_ns()
        self._writer = Writer(self._file, chunk_size=256 << 10)
        self._writer.start(profile="ros2", library="robopolicy")
        self._writer.add_metadata("robopolicy", {key: json.dumps(value) for key, value in about.items()})
        self._writer.flush()
        self._schema_ids = {
            name: self._writer.register_schema(name, "ros2msg", t.encode()) for name, t in SCHEMAS.items()
        }
        self._encoders = {name: serialize_dynamic(name, text)[name] for name, text in SCHEMAS.items()}
        self._channel_ids: dict[str, int] = {}
        self._records: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE_RECORDS)
        self._thread = threading.Thread(target=self._run, name="robopolicy-recorder", daemon=True)
        self._thread.start()

    def tick(self, tick: Tick) -> None:
        self._put(lambda: self._write_tick(tick))

    def plan(self, plan: Plan) -> None:
        self._put(lambda: self._write_plan(plan))

    def event(self, kind: str, text: str, **data: Any) -> None:
        now = time.monotonic()
        message = {"data": json.dumps({"kind": kind, "text": text, "time_s": now, **data}, default=str)}
        self._put(lambda: self._write("event", "std_msgs/msg/String", message, now))

    def close(self) -> None:
        """Write what is left and the file's index."""
        if self._thread.is_alive():
            self._records.put(None)
            self._thread.join()

    def __enter__(self) -> McapRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _put(self, write: Callable[[], None]) -> None:
        try:
            self._records.put_nowait(write)
        except queue.Full:
            self.dropped += 1

    def _run(self) -> None:
        due = time.monotonic() + FLUSH_S
        while True:
            try:
                write = self._records.get(timeout=max(0.0, due - time.monotonic()))
                if write is None:
                    break
                if self._file.tell() < self._max_bytes:
                    write()
                else:
                    self.dropped += 1
            except queue.Empty:
                pass
            if time.monotonic() >= due:
                self._writer.flush()
                self._file.flush()
                os.fsync(self._file.fileno())
                due = time.monotonic() + FLUSH_S
        self._writer.finish()
        self._file.close()

    def _write_tick(self, tick: Tick) -> None:
        for name, position, velocity in (
            ("measured", tick.measured, None),
            ("wanted", tick.wanted, None),
            ("sent", tick.sent, tick.sent_velocity),
        ):
            if position is not None:
                message = {
                    "header": self._header(tick.time_s),
                    "name": self._joints,
                    "position": position.tolist(),
                    "velocity": [] if velocity is None else velocity.tolist(),
                    "effort": [],
                }
                self._write(name, "sensor_msgs/msg/JointState", message, tick.time_s)
        fields = ("index", "time_s", "late_s", "work_s", "state_age_s", "phase", "clamped", "rejected")
        message = {name: getattr(tick, name) for name in fields}
        message["gripper_m"] = math.nan if tick.gripper is None else tick.gripper
        message["action"] = [] if tick.action is None else tick.action.tolist()
        self._write("tick", "robopolicy_msgs/msg/Tick", message, tick.time_s)

    def _write_plan(self, plan: Plan) -> None:
        message = {name: getattr(plan, name) for name in ("time_s", "observed_s", "inference_s", "spread_s", "shift")}
        message["generator_state"] = plan.generator_state
        message["chunk"] = _array("chunk", plan.chunk)
        message["observation"] = [_array(name, value) for name, value in plan.observation.items()]
        message["missing"], said = list(plan.missing), plan.diagnostics
        message["diagnostic_names"], message["diagnostics"] = list(said), list(said.values())
        self._write("plan", "robopolicy_msgs/msg/Plan", message, plan.time_s)
        for name, value in plan.observation.items():
            if value.dtype == np.uint8:
                picture = np.ascontiguousarray(np.moveaxis(value[-1], 0, -1))
                height, width, channels = picture.shape
                image = {"height": height, "width": width, "encoding": "rgb8", "is_bigendian": 0}
                image |= {"step": width * channels, "data": picture.tobytes(), "header": self._header(plan.time_s)}
                self._write(name.replace(".", "/"), "sensor_msgs/msg/Image", image, plan.time_s)

    def _header(self, time_s: float) -> dict[str, Any]:
        seconds, nanoseconds = divmod(self._nanoseconds(time_s), 10**9)
        return {"stamp": {"sec": seconds, "nanosec": nanoseconds}, "frame_id": ""}

    def _nanoseconds(self, time_s: float) -> int:
        return self._wall_ns + int(time_s * 1e9)

    def _write(self, topic: str, kind: str, message: Mapping[str, Any], time_s: float) -> None:
        if topic not in self._channel_ids:
            self._channel_ids[topic] = self._writer.register_channel(
                topic=f"/robopolicy/{topic}", message_encoding="cdr", schema_id=self._schema_ids[kind]
            )
        at = self._nanoseconds(time_s)
        data = self._encoders[kind](message)
        self._writer.add_message(self._channel_ids[topic], log_time=at, publish_time=at, sequence=0, data=data)


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A recording read back."""

    about: dict[str, Any]
    plans: tuple[Plan, ...]
    ticks: tuple[dict[str, Any], ...]
    """Fields of `robopolicy_msgs/Tick`, with the joint positions of the turn as `measured`, `wanted`, `sent`."""
    events: tuple[dict[str, Any], ...]
    complete: bool
    """False if the file ends early: the recording process died."""


def read_recording(path: Path) -> Recording:
    """Read what `McapRecorder` wrote, also where it was cut off.

    Raises:
        RobopolicyError: no such file, or not a recording of robopolicy.
    """
    about = _about(path)
    plans: list[Plan] = []
    ticks: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    joints: dict[str, Any] = {}
    complete = True
    with path.open("rb") as file:
        reader = NonSeekingReader(file, decoder_factories=[DecoderFactory()])
        try:
            for _, channel, _, message in reader.iter_decoded_messages(log_time_order=False):
                topic = channel.topic.removeprefix("/robopolicy/")
                if topic in ("measured", "wanted", "sent"):
                    joints[topic] = np.array(message.position)
                elif topic == "tick":
                    ticks.append({**_fields(message), **joints})
                    joints = {}
                elif topic == "plan":
                    plans.append(_plan(message))
                elif topic == "event":
                    events.append(json.loads(message.data))
        except CUT_OFF:
            complete = False
    return Recording(about=about, plans=tuple(plans), ticks=tuple(ticks), events=tuple(events), complete=complete)


def _about(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            for metadata in NonSeekingReader(file).iter_metadata():
                if metadata.name == "robopolicy":
                    return {key: json.loads(value) for key, value in metadata.metadata.items()}
    except (OSError, *CUT_OFF) as error:
        raise RobopolicyError(f"{path} is not a readable recording: {str(error) or type(error).__name__}") from error
    raise RobopolicyError(f"{path} was not recorded by robopolicy: it lacks the metadata of a deployment.")


def _array(name: str, value: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {"name": name, "dtype": str(value.dtype), "shape": list(value.shape), "data": value.tobytes()}


def _numpy(message: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(bytes(message.data), message.dtype).reshape(tuple(message.shape)).copy()


def _fields(message: Any) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__slots__}


def _plan(message: Any) -> Plan:
    numbers = {name: getattr(message, name) for name in ("time_s", "observed_s", "inference_s", "spread_s", "shift")}
    return Plan(
        **numbers,
        generator_state=bytes(message.generator_state),
        chunk=_numpy(message.chunk),
        observation={array.name: _numpy(array) for array in message.observation},
        missing=tuple(getattr(message, "missing", ())),  # older recordings say neither
        diagnostics=dict(
            zip(getattr(message, "diagnostic_names", ()), getattr(message, "diagnostics", ()), strict=True)
        ),
    )
