"""What goes wrong on purpose: faults of the bridge and of the robot's joint states, switched while it runs."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from robopolicy.errors import RobopolicyError, UnknownNameError


@dataclass(kw_only=True)
class Faults:
    """The faults in force; the defaults are none."""

    freeze_s: float = 0.0
    """The bridge stands still for so long, as a stopped process: sockets stay open, pings are not answered."""
    half_dead: bool = False
    """The bridge answers pings and takes clients, and delivers nothing."""
    drop: float = 0.0
    """Part of the messages that get lost, both ways."""
    delay_s: float = 0.0
    """Every message takes so much longer, both ways."""
    silent: bool = False
    """The robot's driver says nothing more on the joint states; all else goes on."""
    silent_stream: str = ""
    """Name of a stream of the robot file on which nothing more is said."""
    frozen_stream: str = ""
    """Name of a stream that says what it last said, again and again, with new stamps."""
    nan_joint: str = ""
    """Name of a joint whose position is NaN."""
    missing_joint: str = ""
    """Name of a joint that the joint states leave out."""
    extra_joint: bool = False
    """A joint of somebody else stands among the others."""
    reorder_joints: bool = False
    """Every joint state lists the joints in another order."""
    null_effort: bool = False
    """Efforts are null, as a server writes NaN."""
    seed: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def set(self, name: str, value: Any) -> None:
        """Switch the fault `name`.

        Raises:
            UnknownNameError: there is no such fault.
            RobopolicyError: the value is not of its kind.
        """
        kinds: dict[str, Any] = {field.name: type(field.default) for field in dataclasses.fields(self)}
        if name not in kinds:
            raise UnknownNameError("fault", name, kinds)
        kind = kinds[name]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is float and not 0 <= value < 3600):
            raise RobopolicyError(f"Fault {name} takes a value like {kind()!r}; got {value!r}.")
        if name == "drop" and value > 1:
            raise RobopolicyError(f"Fault drop is a part of the messages, 0 to 1; got {value!r}.")
        setattr(self, name, value)

    def loses(self) -> bool:
        """Say whether a message gets lost now."""
        return self.half_dead or (self.drop > 0 and self._random.random() < self.drop)

    def spoil(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the joint state `message` with the faults in it."""
        names = list(message["name"])
        columns = {key: list(message[key]) for key in ("position", "velocity", "effort")}
        if self.null_effort:
            columns["effort"] = [float("nan")] * len(names)
        if self.nan_joint in names:
            columns["position"][names.index(self.nan_joint)] = float("nan")
        order = [i for i, name in enumerate(names) if name != self.missing_joint]
        if self.reorder_joints:
            self._random.shuffle(order)
        names = [names[i] for i in order]
        columns = {key: [column[i] for i in order] if column else [] for key, column in columns.items()}
        if self.extra_joint:
            names.insert(1, "somebody_elses_joint")
            for column in columns.values():
                if column:
                    column.insert(1, 123.0)
        return {**message, "name": names, **columns}
