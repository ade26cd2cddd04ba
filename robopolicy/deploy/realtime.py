"""Real-time priority on Linux: the control loop comes before the machine's other work.

All threads of the process get it, not the loop alone: whoever holds Python's lock while other programs have the
processor holds the loop up.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from robopolicy.errors import RobopolicyError

PRIORITY, LOOP_PRIORITY = 10, 20
"""Of 1 to 99, first in, first out; the system's own urgent threads have 50 and more."""
THREADS = Path("/proc/self/task")
NOT_LINUX = "this system has no real-time priorities"
NOT_ALLOWED = (
    "the system does not allow real-time priority to this user; a line `<user> - rtprio 20` in "
    "/etc/security/limits.d/robot.conf and a new log-in do"
)


def why_not() -> str:
    """Return why this process cannot have real-time priority; empty if it can."""
    if not hasattr(os, "sched_setscheduler") or not THREADS.is_dir():
        return NOT_LINUX
    refused: list[str] = []

    def attempt() -> None:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(LOOP_PRIORITY))
        except OSError:
            refused.append(NOT_ALLOWED)

    thread = threading.Thread(target=attempt)  # a thread of its own, which ends with what it got
    thread.start()
    thread.join()
    return "".join(refused)


@contextlib.contextmanager
def real_time(wanted: bool | str) -> Iterator[str]:
    """Give all threads of this process, and those that they start, real-time priority; yield in words what they got.

    Args:
        wanted: true: raise if that is not allowed; "auto": go on with normal priority then; false: normal priority.

    Raises:
        RobopolicyError: it is wanted and not allowed, or `wanted` is something else.
    """
    if wanted not in (True, False, "auto"):
        raise RobopolicyError(f"real_time must be auto, true or false; got {wanted!r}.")
    if not wanted:
        yield "normal priority, as real_time=false says"
    elif why := why_not():
        if wanted is True:
            raise RobopolicyError(f"real_time=true, but {why}.")
        yield f"normal priority: {why}. Other programs on this computer can hold the loop up"
    elif os.sched_getscheduler(0) == os.SCHED_FIFO:
        yield "real-time priority, as it was started with"
    else:
        _give_all(os.SCHED_FIFO, PRIORITY)
        try:
            yield "real-time priority"
        finally:
            _give_all(os.SCHED_OTHER, 0)


def put_first() -> None:
    """Put the calling thread before the process's others if they have real-time priority."""
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) == os.SCHED_FIFO:
        with contextlib.suppress(OSError):  # it had less from whoever started it
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(LOOP_PRIORITY))


def _give_all(policy: int, priority: int) -> None:
    for thread in THREADS.iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))
