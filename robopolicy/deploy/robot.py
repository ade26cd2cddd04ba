"""The robot file: joints, limits, rates, topics and frames of one robot, as dataclasses that refuse unknown keys.

One reviewed file per robot stands in `configs/robot/`; the effective values are printed and recorded.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from robopolicy.errors import RobopolicyError

INTERFACES = ("joint_trajectory", "follow_joint_trajectory", "forward_position", "servo_twist")


@dataclass(frozen=True, kw_only=True)
class JointLimits:
    """Per joint of the arm, in the order of `RobotFile.joints`; the maker's figures, before `safety` scales them."""

    position_low: tuple[float, ...]
    position_high: tuple[float, ...]
    velocity: tuple[float, ...]
    acceleration: tuple[float, ...]
    jerk: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Safety:
    """What the filter enforces beside the joints' own limits."""

    position_margin_rad: float = 0.02
    velocity_scale: float = 1.0
    """Fraction of the maker's velocity limits."""
    acceleration_scale: float = 1.0
    jerk_scale: float = 1.0
    workspace_low_m: tuple[float, float, float]
    workspace_high_m: tuple[float, float, float]
    """Box that the tool centre must stay in, in the frame of the observations."""
    tcp_speed_m_s: float
    """Most speed of the tool centre."""
    following_error_rad: float
    """Most distance between the last sent and the measured position."""
    first_command_rad: float = 0.05
    """Most distance between the first command and the measured position."""
    ramp_in_s: float = 0.2
    """After arming, speed limits grow from a tenth to all over this time."""
    jump_rad: float = 0.5
    """A wanted position further than this from the last sent one is rejected, not clamped."""
    stop_after_rejections: int = 3
    """Rejected policy actions in a row that latch a stop."""
    stop_after_clamps: int = 0
    """Turns in a row with a clamp that latch a stop; 0 never."""


@dataclass(frozen=True, kw_only=True)
class Watchdogs:
    """Deadlines on the monotonic clock; any one passed means stop."""

    state_age_s: float = 0.2
    observation_age_s: float = 0.3
    inference_s: float = 1.0
    loop_overrun_s: float = 0.05
    link_s: float = 1.0
    """How long the bridge may take to answer a ping."""
    spread_s: float = 0.1
    """Most difference between the stamps of one observation's streams."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """How commands reach the arm."""

    interface: Literal["joint_trajectory", "follow_joint_trajectory", "forward_position", "servo_twist"]
    topic: str
    """Topic (trajectory, forward, servo) or action name (follow_joint_trajectory)."""
    rate_hz: float = 100.0
    timeout_s: float = 0.0
    """The controller's own command timeout: it stops by itself after this silence; 0 has none."""
    joints: tuple[str, ...] | None = None
    """Order that the controller expects, where it is not `RobotFile.joints`."""
    frame: str = ""
    """header.frame_id of stamped commands."""


@dataclass(frozen=True, kw_only=True)
class Gripper:
    """A two-finger gripper: the policy's ends of range become two openings."""

    joints: tuple[str, ...]
    """Finger joints in the joint states; the opening is the sum of their positions."""
    interface: Literal["gripper_command", "none"] = "gripper_command"
    topic: str = ""
    """Name of the GripperCommand action."""
    open_m: float
    closed_m: float
    """Openings to command."""
    message_per_m: float = 1.0
    """GripperCommand.position per metre of opening (0.5 where the message means one finger)."""
    max_effort_n: float
    hysteresis: float = 0.2
    """Dead band around the middle of the policy's range, as a fraction of it: within it the last command stays."""
    resend_s: float = 0.5
    """Least time between two commands to the gripper."""
    grasped_above_m: float
    """Something is held if the gripper was told to close and stands still wider than this."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One topic beside the joint states."""

    topic: str
    type: str
    """`geometry_msgs/PoseStamped`, `geometry_msgs/PointStamped`, `std_msgs/Float64MultiArray`,
    `sensor_msgs/CompressedImage`, `sensor_msgs/Image`; the ROS 2 spelling with `/msg/` is the same."""
    rate_hz: float
    """Least rate expected; `check` refuses less than half of it."""
    constant: bool = False
    """A value that does not age: a goal told once."""


@dataclass(frozen=True, kw_only=True)
class JointStates:
    """The state topic(s): sensor_msgs/JointState, matched by name."""

    topics: tuple[str, ...]
    rate_hz: float


@dataclass(frozen=True, kw_only=True)
class Frames:
    """Where the robot stands in the frame of the observations (ManiSkill's world)."""

    world: str
    """Name of that frame in ROS messages."""
    base_position_m: tuple[float, float, float]
    base_quaternion: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)
    """w, x, y, z."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Topics and services for stopping from ROS."""

    topic: str = ""
    """std_msgs/Bool to listen to: true stops."""
    service: str = ""
    """std_srvs/Trigger that deploy offers: a call stops."""


@dataclass(frozen=True, kw_only=True)
class RobotFile:
    """One robot. See `configs/robot/panda.yaml` for every key with its meaning."""

    name: str
    simulated_as: str
    """The `robot` of the task specifications that it stands for."""
    joints: tuple[str, ...]
    limits: JointLimits
    safety: Safety
    watchdogs: Watchdogs = field(default_factory=Watchdogs)
    joint_states: JointStates
    command: Command
    gripper: Gripper | None = None
    kinematics: str
    """Name of a chain in `deploy/kinematics.py`."""
    frames: Frames
    streams: Mapping[str, Stream] = field(default_factory=dict)
    observations: Mapping[str, str] = field(default_factory=dict)
    """Field of the policy's observation (`extra/tcp_pose`) to its source, see `deploy/semantics.py`."""
    trained_lag_s: float = 0.0
    """Time constant with which the joint drives that a policy was trained with approach their targets."""
    arm_lag_s: float = 0.0
    """How far behind what it is sent this arm is. Commands approach a target with what it lacks of `trained_lag_s`;
    where it lacks nothing, in a straight line over the control period."""
    stop: Stop = field(default_factory=Stop)
    status_topic: str = "/robopolicy/status"

    def __post_init__(self) -> None:
        count = len(self.joints)
        for limit in dataclasses.fields(self.limits):
            got = len(getattr(self.limits, limit.name))
            if got != count:
                raise RobopolicyError(
                    f"Robot file {self.name!r}: limits.{limit.name} must have one entry per joint ({count}); got {got}."
                )
        if self.command.joints is not None and sorted(self.command.joints) != sorted(self.joints):
            raise RobopolicyError(
                f"Robot file {self.name!r}: command.joints must be the joints of `joints`, reordered."
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RobotFile:
        """Build it from a YAML file's mapping.

        Raises:
            RobopolicyError: a key is unknown or missing, or a value has another type; names it and the nearest key.
        """
        return _build(cls, data, "robot")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types: the effective values."""
        return dataclasses.asdict(self)


def _build(kind: type, data: Any, where: str) -> Any:
    """Return `kind` (a dataclass) filled from the mapping `data`."""
    if not isinstance(data, Mapping):
        raise RobopolicyError(f"{where} must be a mapping with the keys {_names(kind)}; got {data!r}.")
    hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RobopolicyError(f"{where} has no key {key!r}.{hint} Known: {_names(kind)}.")
    absent = dataclasses.MISSING
    missing = [n for n, f in fields.items() if n not in data and f.default is absent and f.default_factory is absent]
    if missing:
        raise RobopolicyError(f"{where} lacks {', '.join(missing)}.")
    return kind(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as `hint` says, or raise."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, where)
    if origin is Literal:
        if value not in args:
            raise RobopolicyError(f"{where} must be one of {', '.join(map(repr, args))}; got {value!r}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RobopolicyError(f"{where} must be a list; got {value!r}.")
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise RobopolicyError(f"{where} must have {len(inner)} entries; got {len(value)}.")
        return tuple(_convert(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(inner, value, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise RobopolicyError(f"{where} must be a mapping; got {value!r}.")
        return {str(key): _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if value != value:
            raise RobopolicyError(f"{where} must be a number; got {value!r}.")
        return float(value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise RobopolicyError(f"{where} must be of type {hint.__name__}; got {value!r}.")


def _names(kind: type) -> str:
    return ", ".join(f.name for f in dataclasses.fields(kind))
