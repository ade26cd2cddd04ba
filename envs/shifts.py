"""Named, frozen perturbations of an environment, in three levels: `apply(env, parse_shift("goal_moved:2"))`.

docs/shifts.md tells what each does. The perturbed environment has the same interface; the perturbations of an episode
follow from its seed, so that results do not depend on N and can be paired with those of the clean environment.
"""

from __future__ import annotations

from dataclasses import dataclass

from robopolicy.errors import RobopolicyError, UnknownNameError
from robopolicy.types import Environment, TaskSpec

from .shifts_table import DEFAULT_LEVEL, GOALS, LEVELS, SHIFTS, SUITE, ShiftSpec
from .tasks import TASKS

__all__ = [
    "LEVELS",
    "SHIFTS",
    "SUITE",
    "Shift",
    "ShiftSpec",
    "apply",
    "apply_strength",
    "parse_shift",
    "why_not",
]


@dataclass(frozen=True)
class Shift:
    """A perturbation and how strong it is."""

    name: str
    level: int = DEFAULT_LEVEL
    """1, 2 or 3; 0 changes nothing."""

    def __post_init__(self) -> None:
        if self.name not in SHIFTS:
            raise UnknownNameError("shift", self.name, ["suite", *SHIFTS])
        if self.level not in (0, *LEVELS):
            raise RobopolicyError(f"The level of shift {self.name} must be 0 (none), 1, 2 or 3; got {self.level}.")

    def __str__(self) -> str:
        return f"{self.name}:{self.level}"


def parse_shift(text: str) -> Shift:
    """Return the shift that `text`, `name` or `name:level`, means; without a level the middle one.

    Raises:
        UnknownNameError: no such shift.
        RobopolicyError: no such level.
    """
    name, colon, level = text.partition(":")
    if colon and not level.isdigit():
        raise RobopolicyError(f"A shift is written name:level, {name}:2 for example; got {text!r}.")
    return Shift(name, int(level) if colon else DEFAULT_LEVEL)


def why_not(shift: str, spec: TaskSpec) -> str | None:
    """Return why the shift called `shift` means nothing for a policy that observes `spec`, or None if it does."""
    needs = SHIFTS[shift].needs
    if needs == "camera" and not any(modality.is_image for modality in spec.observation.values()):
        return "the policy sees no camera"
    if needs in ("proprio", "objects", "goal") and needs not in spec.observation:
        return f"the policy observes no `{needs}`"
    if needs == "free objects" and not (spec.name in TASKS and TASKS[spec.name].objects):
        return "the task has no free object"
    if needs == "movable goal" and spec.name not in GOALS:
        return "the task has no goal that can be moved"
    return None


def apply(env: Environment, shift: Shift) -> Environment:
    """Return `env` perturbed by `shift`; it takes `env` over. Calls can be nested.

    Level 0 returns `env` itself.

    Raises:
        RobopolicyError: the shift means nothing for this task, or cannot be done on this backend.
    """
    if shift.level == 0:
        return env
    return apply_strength(env, shift.name, SHIFTS[shift.name].strength(shift.level))


def apply_strength(env: Environment, name: str, strength: float) -> Environment:
    """Return `env` perturbed by the shift called `name`, as strongly as you like, in the unit of the table."""
    if (reason := why_not(name, env.task_spec)) is not None:
        raise RobopolicyError(f"shift={name} cannot be applied to task {env.task_spec.name!r}: {reason}.")
    from . import shifts_physical, shifts_signals  # loads SAPIEN

    row = SHIFTS[name]
    module = shifts_signals if hasattr(shifts_signals, row.kind) else shifts_physical
    more = {} if row.group is None else {"group": row.group}
    shifted: Environment = getattr(module, row.kind)(env, strength, name=name, **more)
    return shifted
