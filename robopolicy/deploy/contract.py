"""What the parts of deployment say to each other: the robot as the loop sees it, and the records that leave the loop.

Two clocks, never mixed: `arrival_s` is this process's monotonic clock (`time.monotonic`), `stamp_s` the robot's. Joint
arrays are in the order of the robot file, poses are [x, y, z, qw, qx, qy, qz] as in ManiSkill, whatever the wire has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class RobotState:
    """The measured state of the arm at one moment."""

    stamp_s: float | None
    """Robot clock; None where the message had no stamp or stamp 0."""
    arrival_s: float
    """Monotonic clock of this process."""
    position: Floats
    """[J] rad."""
    velocity: Floats | None
    """[J] rad/s; None where the robot does not say."""
    gripper_width_m: float | None = None
    """Opening between the fingers."""
    gripper_velocity_m_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One message of a stream that is not the arm: an object's pose, a goal, a picture."""

    value: NDArray[Any]
    """Pose [7], point [3], vector [S] float64; picture [Y, X, 3] uint8, RGB."""
    stamp_s: float | None
    arrival_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkStatus:
    """How the connection is."""

    connected: bool
    """All sockets are open."""
    data_age_s: float
    """Since the newest joint state arrived; infinite before the first."""
    ping_s: float | None
    """Round trip of the newest answered ping; None before the first."""
    generation: int
    """Counts connections: it grew if the link was lost and came back."""
    detail: str = ""
    """What is wrong, in words; empty when nothing is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamReport:
    """What was seen of one topic that the robot file names; `check` mode prints it."""

    name: str
    """`joints`, a stream of the robot file, or `command`."""
    topic: str
    expected_type: str
    seen_type: str | None = None
    """As the bridge's rosapi says; None where it does not say."""
    messages: int = 0
    rate_hz: float | None = None
    age_s: float | None = None
    problem: str = ""
    """What is wrong and what would mend it; empty when nothing is."""


class Robot(Protocol):
    """A robot behind a link. No method blocks, except `call` and `close`; none raises for a lost link."""

    def state(self) -> RobotState | None:
        """Return the newest measured state; None before the first."""

    def states(self) -> Sequence[RobotState]:
        """Return the last second or so of measured states, oldest first."""

    def samples(self, stream: str) -> Sequence[Sample]:
        """Return the last second or so of `stream` (a name of the robot file), oldest first."""

    def send(self, position: Floats, velocity: Floats, gripper: float | None) -> None:
        """Replace what waits to be sent by this command; nothing is queued.

        Args:
            position: [J] rad, where the arm should be one command period from now. Filtered: it may go out as it is.
            velocity: [J] rad/s, how fast it should pass there.
            gripper: opening in metres to command now, once; None commands nothing (hysteresis and a limit on resends
                are the caller's business).
        """

    def stop(self, reason: str) -> None:
        """Stop the arm in the way its controller understands, on the stop's own socket, and send nothing after it.

        Commands are refused until `rearm`. Callable from any thread, any number of times.
        """

    def rearm(self) -> None:
        """Accept commands again after `stop` or a lost link; whatever waited is discarded."""

    @property
    def armed(self) -> bool:
        """Whether commands go out; a robot starts disarmed, and a lost link disarms it."""

    def link(self) -> LinkStatus: ...

    def reports(self) -> Sequence[StreamReport]:
        """Say what was seen so far of every topic that the robot file names."""

    def call(self, service: str, request: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        """Call a ROS service and wait for its answer; never from the loop.

        Raises:
            RobopolicyError: no answer in time, or the service says no; names the service and the reason.
        """

    def listen(self, *, on_stop: Callable[[str], None]) -> None:
        """Have `on_stop(reason)` called when an e-stop arrives by topic or service of the robot file."""

    def publish_status(self, status: Mapping[str, Any]) -> None:
        """Publish the heartbeat (std_msgs/String, JSON); newest only."""

    def close(self) -> None:
        """Close the sockets. Stops the arm first if it is armed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tick:
    """One turn of the controller loop, as recorded. Arrays are copies."""

    time_s: float
    """Monotonic."""
    index: int
    late_s: float
    """How much later than its deadline the turn began."""
    work_s: float
    """How long it took."""
    phase: str
    """`disarmed`, `waiting`, `moving`, `holding`, `stopped`."""
    measured: Floats | None
    """[J] rad."""
    state_age_s: float
    wanted: Floats | None
    """[J] rad: what the policy's action became, before the filter."""
    sent: Floats | None
    """[J] rad: what left; None where nothing did."""
    sent_velocity: Floats | None
    gripper: float | None
    """Opening commanded at this turn, m."""
    action: Floats | None
    """[A]: the policy's action that is being played, environment units."""
    clamped: int
    """Bits of `limits.CLAMPS`."""
    rejected: str
    """Why nothing of the policy left at this turn; empty if it did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One plan of the policy, as recorded."""

    time_s: float
    """Monotonic, when it was ready."""
    observed_s: float
    """Monotonic, the time its newest observation stands for."""
    inference_s: float
    spread_s: float
    """Largest difference between the stamps of the streams in the newest observation."""
    observation: Mapping[str, NDArray[Any]]
    """Modality to [O, ...]."""
    chunk: NDArray[np.float32]
    """[H, A] environment units, as the planner gave it."""
    shift: int
    """Steps since the previous plan, as the planner was told."""
    generator_state: bytes
    """State of the noise generator before the plan, so that a replay gives the same actions; empty if none."""
    missing: tuple[str, ...] = ()
    """Modalities that the policy did without: their streams were silent."""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    """What the planner says of this plan: energies, doubts, disagreement."""


class Recorder(Protocol):
    """Something that wants to know what happens: the recording, the live view. Never blocks: takes a copy or drops."""

    def tick(self, tick: Tick) -> None: ...

    def plan(self, plan: Plan) -> None: ...

    def event(self, kind: str, text: str, **data: Any) -> None:
        """`kind`: `start`, `stop`, `rearm`, `warning`, `episode`, `end`."""


class Commands(Protocol):
    """What a person may ask of a running deployment, from any thread: a key, a signal, a page."""

    def stop(self, reason: str) -> None:
        """Stop the robot and latch."""

    def rearm(self) -> str:
        """Leave the latched stop; return an empty string, or why not."""

    def snapshot(self) -> Mapping[str, Any]:
        """Return plain JSON values: phase, reason, ages, latencies, jitter, filter counts, joints."""
