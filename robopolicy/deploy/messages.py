"""ROS messages as plain mappings: the two spellings of types and time, joint states, poses, pictures, commands.

A ROS 2 `Time` is {sec, nanosec}, a ROS 1 one {secs, nsecs}; a ROS 2 type is `pkg/msg/Type`, a ROS 1 one `pkg/Type`.
Servers write NaN as null inside arrays. Poses here are [x, y, z, qw, qx, qy, qz]; on the wire the w comes last.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .contract import Floats
from .wire import payload

Dialect = Literal["ros1", "ros2"]
Message = Mapping[str, Any]

JOINT_STATE = "sensor_msgs/JointState"
JOINT_TRAJECTORY = "trajectory_msgs/JointTrajectory"
FLOATS = "std_msgs/Float64MultiArray"
TWIST = "geometry_msgs/TwistStamped"
POSE = "geometry_msgs/PoseStamped"
POINT = "geometry_msgs/PointStamped"
COMPRESSED, IMAGE = "sensor_msgs/CompressedImage", "sensor_msgs/Image"
BOOL, STRING = "std_msgs/Bool", "std_msgs/String"


class MessageError(ValueError):
    """A message that is not what its type says; says what is wrong."""


# ---- spelling --------------------------------------------------------------------------------------------------------
def short_type(name: str) -> str:
    """Return `pkg/Type` for either spelling; both kinds of server understand it for messages.

    >>> short_type("sensor_msgs/msg/JointState")
    'sensor_msgs/JointState'
    """
    parts = name.split("/")
    return f"{parts[0]}/{parts[-1]}"


def long_type(name: str, kind: Literal["msg", "srv", "action"] = "msg") -> str:
    """Return ROS 2's `pkg/kind/Type` for either spelling."""
    parts = name.split("/")
    return f"{parts[0]}/{kind}/{parts[-1]}"


def time_fields(time_s: float, dialect: Dialect) -> dict[str, int]:
    """Return a Time or Duration of `time_s` seconds, which may be negative."""
    whole = math.floor(time_s)
    nanos = round((time_s - whole) * 1e9)
    if nanos == 1_000_000_000:
        whole, nanos = whole + 1, 0
    return {"secs": whole, "nsecs": nanos} if dialect == "ros1" else {"sec": whole, "nanosec": nanos}


def dialect_of(message: Message) -> Dialect | None:
    """Return who spells the stamp of `message` this way; None if it has none."""
    stamp = _stamp(message)
    if "secs" in stamp and "nsecs" in stamp:
        return "ros1"
    return "ros2" if "sec" in stamp and "nanosec" in stamp else None


def stamp_of(message: Message) -> float | None:
    """Return the stamp in seconds; None where it is absent or zero, which means unknown.

    Raises:
        MessageError: it is there and is no time.
    """
    stamp = _stamp(message)
    if not stamp:
        return None
    whole, nanos = (
        (stamp.get("secs"), stamp.get("nsecs")) if "secs" in stamp else (stamp.get("sec"), stamp.get("nanosec"))
    )
    numbers = all(isinstance(part, int | float) and not isinstance(part, bool) for part in (whole, nanos))
    if not numbers or not abs(whole) < 1e12 or not abs(nanos) < 1e12:  # type: ignore[arg-type]
        raise MessageError(f"the stamp {stamp} is no time")
    return float(whole + nanos * 1e-9) or None  # type: ignore[operator]


def _stamp(message: Message) -> Message:
    header = message.get("header")
    stamp = header.get("stamp") if isinstance(header, Mapping) else None
    return stamp if isinstance(stamp, Mapping) else {}


def header(time_s: float, dialect: Dialect, frame: str = "") -> dict[str, Any]:
    """Return a header; never leave one out: a missing header means stamp 0 on every server."""
    return {"stamp": time_fields(time_s, dialect), "frame_id": frame}


# ---- what a robot says -----------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, slots=True)
class JointReading:
    """One JointState, in its own order."""

    stamp_s: float | None
    names: tuple[str, ...]
    position: Floats
    """[n], NaN where the server said null or nothing."""
    velocity: Floats
    """[n], likewise."""


def parse_joint_state(message: Message) -> JointReading:
    """Read a sensor_msgs/JointState.

    Raises:
        MessageError: names or numbers are missing, or are not as many as there are names.
    """
    names = message.get("name")
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise MessageError("a joint state has no list of names")
    count = len(names)
    return JointReading(
        stamp_s=stamp_of(message),
        names=tuple(names),
        position=_numbers(message.get("position"), count, "position"),
        velocity=_numbers(message.get("velocity"), count, "velocity"),
    )


def _numbers(value: Any, count: int, what: str) -> Floats:
    """Return [count] float64; absent or empty means unknown, NaN."""
    if value is None or (isinstance(value, list | tuple | np.ndarray) and len(value) == 0):
        return np.full(count, np.nan)
    out = _vector(value, what)
    if len(out) != count:
        raise MessageError(f"{what} has {len(out)} numbers for {count} joints")
    return out


def _vector(value: Any, what: str) -> Floats:
    """Return a list of numbers or nulls as [n] float64."""
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or value.dtype.kind not in "fiu":
            raise MessageError(f"{what} is no list of numbers")
        return value.astype(np.float64)
    if not isinstance(value, list | tuple) or not all(type(v) in (int, float, type(None)) for v in value):
        raise MessageError(f"{what} is no list of numbers")
    try:
        return np.array(value, dtype=np.float64)
    except OverflowError as error:
        raise MessageError(f"{what} has a number out of range") from error


def _fields(value: Any, names: Sequence[str], what: str) -> list[float]:
    if not isinstance(value, Mapping):
        raise MessageError(f"{what} is missing")
    out = _vector([value.get(name, math.nan) for name in names], what)
    if not np.isfinite(out).all():
        raise MessageError(f"{what} is not finite or lacks one of {', '.join(names)}")
    return [float(v) for v in out]


def parse_pose(message: Message) -> Floats:
    """Return the pose [7] of a geometry_msgs/PoseStamped."""
    pose = message.get("pose")
    pose = pose if isinstance(pose, Mapping) else {}
    quaternion = np.array(_fields(pose.get("orientation"), "wxyz", "orientation"))
    norm = float(np.linalg.norm(quaternion))
    if not 0.5 < norm < 2.0:
        raise MessageError(f"the orientation has the norm {norm:g}")
    return np.array([*_fields(pose.get("position"), "xyz", "position"), *quaternion])


def parse_point(message: Message) -> Floats:
    """Return the point [3] of a geometry_msgs/PointStamped."""
    return np.array(_fields(message.get("point"), "xyz", "point"))


def parse_floats(message: Message) -> Floats:
    """Return the numbers [S] of a std_msgs/Float64MultiArray."""
    out = _vector(message.get("data"), "data")
    if not np.isfinite(out).all():
        raise MessageError("data is not finite")
    return out


def parse_picture(message: Message) -> NDArray[np.uint8]:
    """Return the picture [Y, X, 3], RGB, of a sensor_msgs/CompressedImage (JPEG, PNG) or Image (rgb8, bgr8, mono8).

    Takes milliseconds; not for the thread that reads.
    """
    try:
        data = payload(message.get("data"))
    except ValueError as error:
        raise MessageError(f"the picture's data cannot be read: {error}") from error
    if "encoding" in message:
        return _raw_picture(message, data)
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as picture:
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow raises what it likes for broken files
        raise MessageError(f"the picture cannot be decoded: {error}") from error


def _raw_picture(message: Message, data: bytes) -> NDArray[np.uint8]:
    channels = {"rgb8": 3, "bgr8": 3, "mono8": 1, "rgba8": 4, "bgra8": 4}
    encoding, height, width = message.get("encoding"), message.get("height"), message.get("width")
    if not isinstance(encoding, str) or encoding not in channels:
        raise MessageError(f"the encoding {encoding!r} is not one of {', '.join(channels)}")
    if not isinstance(height, int) or not isinstance(width, int) or not 0 < height <= 16384 or not 0 < width <= 16384:
        raise MessageError(f"the size {height} x {width} is no picture's")
    depth = channels[encoding]
    step = message.get("step") or width * depth
    if not isinstance(step, int) or step < width * depth or len(data) < step * height:
        raise MessageError(f"{len(data)} bytes are too few for {height} x {width} {encoding}")
    rows = np.frombuffer(data, np.uint8, step * height).reshape(height, step)[:, : width * depth]
    picture = rows.reshape(height, width, depth)
    if encoding.startswith("bgr"):
        picture = picture[..., 2::-1]
    return np.ascontiguousarray(np.repeat(picture, 3, axis=2) if depth == 1 else picture[..., :3])


PARSERS: dict[str, Callable[[Message], NDArray[Any]]] = {
    POSE: parse_pose,
    POINT: parse_point,
    FLOATS: parse_floats,
    COMPRESSED: parse_picture,
    IMAGE: parse_picture,
}
"""Type of a stream (`short_type`) to its reader."""


# ---- what robots are told, and what a simulated one says -------------------------------------------------------------
def joint_state(
    names: Sequence[str], position: Floats, velocity: Floats, *, time_s: float, dialect: Dialect
) -> dict[str, Any]:
    """Return a sensor_msgs/JointState without efforts."""
    body = {"name": list(names), "position": position.tolist(), "velocity": velocity.tolist(), "effort": []}
    return {"header": header(time_s, dialect), **body}


def pose_stamped(pose: Floats, *, time_s: float, frame: str, dialect: Dialect) -> dict[str, Any]:
    x, y, z, qw, qx, qy, qz = (float(v) for v in pose)
    body = {"position": {"x": x, "y": y, "z": z}, "orientation": {"x": qx, "y": qy, "z": qz, "w": qw}}
    return {"header": header(time_s, dialect, frame), "pose": body}


def point_stamped(point: Floats, *, time_s: float, frame: str, dialect: Dialect) -> dict[str, Any]:
    x, y, z = (float(v) for v in point)
    return {"header": header(time_s, dialect, frame), "point": {"x": x, "y": y, "z": z}}


def float_array(values: Floats) -> dict[str, Any]:
    return {"layout": {"dim": [], "data_offset": 0}, "data": values.tolist()}


def trajectory_point(
    time_s: float, position: Floats, velocity: Floats | None = None, *, dialect: Dialect
) -> dict[str, Any]:
    """Return a trajectory_msgs/JointTrajectoryPoint that is reached `time_s` after the trajectory starts."""
    return {
        "positions": position.tolist(),
        "velocities": [] if velocity is None else velocity.tolist(),
        "accelerations": [],
        "effort": [],
        "time_from_start": time_fields(time_s, dialect),
    }


def trajectory(names: Sequence[str], points: Sequence[Message], *, frame: str, dialect: Dialect) -> dict[str, Any]:
    """Return a trajectory_msgs/JointTrajectory that starts when it arrives (stamp 0)."""
    return {"header": header(0.0, dialect, frame), "joint_names": list(names), "points": list(points)}


def twist_stamped(twist: Floats, *, time_s: float, frame: str, dialect: Dialect) -> dict[str, Any]:
    """Return a geometry_msgs/TwistStamped of `twist` [6]: linear m/s, angular rad/s."""
    linear, angular = ({axis: float(v) for axis, v in zip("xyz", part, strict=True)} for part in (twist[:3], twist[3:]))
    return {"header": header(time_s, dialect, frame), "twist": {"linear": linear, "angular": angular}}
