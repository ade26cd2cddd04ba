"""What the library raises when a user can mend it: messages say what was expected, what came, what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class RobopolicyError(Exception):
    """Base of every error that is the user's to mend; the command line prints it without a traceback."""

    def __reduce__(self) -> tuple[Any, ...]:  # pickle would call the constructor with the message alone
        return _restore, (type(self), self.args)


class UnknownNameError(RobopolicyError, KeyError):
    """A name that is in no table; suggests the nearest one and lists them all."""

    def __init__(self, what: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"Unknown {what} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")

    def __str__(self) -> str:  # KeyError would print the message quoted
        return str(self.args[0])


class ShapeError(RobopolicyError, ValueError):
    """A tensor whose shape is not the documented one."""


class SpecMismatchError(RobopolicyError, ValueError):
    """Two task specifications that must agree do not."""

    def __init__(self, left: str, right: str, differences: Iterable[str]) -> None:
        lines = "\n".join(f"  - {line}" for line in differences)
        super().__init__(f"{left} does not fit {right}:\n{lines}")


class DataError(RobopolicyError, ValueError):
    """A demonstration file that cannot be used; names the file, the episode and the field."""


class CheckpointError(RobopolicyError, ValueError):
    """A checkpoint or run folder that is missing, incomplete, of another format, or would be overwritten."""


class MissingRequirementError(RobopolicyError, RuntimeError):
    """Something the machine lacks (a driver, an asset, an optional package); says the command that installs it."""


class TrainingError(RobopolicyError, RuntimeError):
    """Training cannot go on (loss not finite, disk full); the last good checkpoint is intact."""


def _restore(kind: type[RobopolicyError], args: tuple[Any, ...]) -> RobopolicyError:
    return kind.__new__(kind, *args)
