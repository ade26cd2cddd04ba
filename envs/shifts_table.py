"""The frozen table of perturbations: names, what each does, how strong its three levels are.

A table that was used to report numbers is never changed: a new one gets a new SUITE, and results say which they used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SUITE = "2"
"""Version of this table; it also fixes the random numbers and the order of draws. 1 had no `camera_distractors`."""
LEVELS = (1, 2, 3)
DEFAULT_LEVEL = 2

Family = Literal["observation", "camera", "physics", "start", "disturbance", "action"]
Need = Literal["", "proprio", "objects", "goal", "camera", "free objects", "movable goal"]

GOALS: dict[str, tuple[str, ...]] = {
    "pick_cube": ("goal_site",),
    "push_cube": ("goal_region",),
    "pull_cube": ("goal_region",),
    "roll_ball": ("goal_region",),
}
"""Task to the attributes of its ManiSkill environment that are its goal, where that is a thing that can be moved."""


@dataclass(frozen=True, kw_only=True)
class ShiftSpec:
    """One row of the table."""

    name: str
    family: Family
    what: str
    """One sentence with the strength as {}."""
    unit: str
    strengths: tuple[float, float, float]
    kind: str
    """Class that does it, in shifts_signals.py or shifts_physical.py."""
    group: str | None = None
    """Modality that it changes (`camera`: all cameras), for the classes that take one."""
    needs: Need = ""

    def strength(self, level: int) -> float:
        """Return the strength of `level`; level 0 changes nothing."""
        return self.strengths[level - 1] if level else 0.0


def _streams() -> tuple[ShiftSpec, ...]:
    """Return what can go wrong with each modality; a goal stays the same, so that late or stuck it is no different."""
    kinds: tuple[tuple[str, str, str, str, tuple[float, float, float], tuple[Need, ...]], ...] = (
        ("dropout", "Dropout", "each frame of {m} arrives as zeros with probability {}", "", (0.05, 0.2, 0.5),
         ("proprio", "objects", "goal", "camera")),
        ("freeze", "Freeze", "{m} is stuck for {} control steps, once, from a step between 5 and 24", "steps",
         (4, 12, 40), ("proprio", "objects", "camera")),
        ("noise", "Noise", "white noise on {m}: {} m on lengths, 2 rad/m on angles, 10/s on velocities", "m",
         (0.003, 0.01, 0.03), ("proprio", "objects", "goal")),
        ("delay", "Delay", "{m} arrives {} control steps late", "steps", (1, 3, 6), ("proprio", "objects", "camera")),
    )  # fmt: skip
    return tuple(
        ShiftSpec(
            name=f"{stem}_{group}",
            family="camera" if group == "camera" else "observation",
            what=what.replace("{m}", "the pictures" if group == "camera" else f"`{group}`"),
            unit=unit,
            strengths=strengths,
            kind=kind,
            group=group,
            needs=group,
        )
        for stem, kind, what, unit, strengths, groups in kinds
        for group in groups
    )


_ROWS = (
    *_streams(),
    ShiftSpec(
        name="noise_camera",
        family="camera",
        what="white noise of {} grey levels (of 255) on the pictures",
        unit="levels",
        strengths=(8, 24, 64),
        kind="PictureNoise",
        needs="camera",
    ),
    ShiftSpec(
        name="camera_occlusion",
        family="camera",
        what="a grey square covers {} of each picture, in one place throughout the episode",
        unit="",
        strengths=(0.04, 0.16, 0.36),
        kind="Occlusion",
        needs="camera",
    ),
    ShiftSpec(
        name="camera_brightness",
        family="camera",
        what="pictures are brighter or (by a coin) darker by {}",
        unit="",
        strengths=(0.2, 0.4, 0.6),
        kind="Brightness",
        needs="camera",
    ),
    ShiftSpec(
        name="camera_colour",
        family="camera",
        what="each colour channel is scaled by its own factor, up to {} from 1",
        unit="",
        strengths=(0.1, 0.25, 0.5),
        kind="Colour",
        needs="camera",
    ),
    ShiftSpec(
        name="camera_pose",
        family="camera",
        what="cameras stand {} m off in a random direction, turned by 2 rad/m about a random axis",
        unit="m",
        strengths=(0.01, 0.03, 0.06),
        kind="CameraPose",
        needs="camera",
    ),
    ShiftSpec(
        name="camera_distractors",
        family="camera",
        what="{} cubes of 4 cm that are only drawn lie about, in random colours",
        unit="cubes",
        strengths=(1, 3, 6),
        kind="Distractors",
        needs="camera",
    ),
    ShiftSpec(
        name="object_mass",
        family="physics",
        what="free objects are heavier by {} times their mass",
        unit="",
        strengths=(1, 4, 9),
        kind="ObjectMass",
        needs="free objects",
    ),
    ShiftSpec(
        name="object_friction",
        family="physics",
        what="free objects lose {} of their coefficient of friction",
        unit="",
        strengths=(0.5, 0.75, 0.95),
        kind="ObjectFriction",
        needs="free objects",
    ),
    ShiftSpec(
        name="start_objects",
        family="start",
        what="free objects start {} m from where they would, together, in a random direction",
        unit="m",
        strengths=(0.02, 0.05, 0.1),
        kind="StartObjects",
        needs="free objects",
    ),
    ShiftSpec(
        name="start_joints",
        family="start",
        what="the arm starts with further joint noise of standard deviation {} rad",
        unit="rad",
        strengths=(0.05, 0.1, 0.2),
        kind="StartJoints",
    ),
    ShiftSpec(
        name="impulse_object",
        family="disturbance",
        what="an impulse of {} N s per kg on free objects, once, before a step between 8 and 19",
        unit="N s/kg",
        strengths=(0.3, 0.6, 1.2),
        kind="ObjectImpulse",
        needs="free objects",
    ),
    ShiftSpec(
        name="impulse_arm",
        family="disturbance",
        what="an impulse of {} N s on the tool, once, before a step between 8 and 19",
        unit="N s",
        strengths=(1, 3, 6),
        kind="ArmImpulse",
    ),
    ShiftSpec(
        name="goal_moved",
        family="disturbance",
        what="the goal jumps by {} m, once, before a step between 8 and 19",
        unit="m",
        strengths=(0.03, 0.06, 0.12),
        kind="GoalMoved",
        needs="movable goal",
    ),
    ShiftSpec(
        name="action_delay",
        family="action",
        what="actions reach the robot {} control steps late",
        unit="steps",
        strengths=(1, 2, 4),
        kind="ActionDelay",
    ),
)

SHIFTS: dict[str, ShiftSpec] = {row.name: row for row in _ROWS}
