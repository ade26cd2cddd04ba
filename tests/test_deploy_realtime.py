"""Real-time priority: all threads get it and give it back, and where it is not allowed that is said."""

from __future__ import annotations

import os
import threading

import pytest

from robopolicy.deploy import realtime
from robopolicy.deploy.realtime import put_first, real_time, why_not
from robopolicy.errors import RobopolicyError

needs_leave = pytest.mark.skipif(bool(why_not()), reason=f"{why_not()}")


@needs_leave
def test_all_threads_get_it_the_loop_more_of_it_and_give_it_back() -> None:
    if os.sched_getscheduler(0) != os.SCHED_OTHER:
        pytest.skip("the tests themselves run with another priority")
    seen: dict[str, tuple[int, int]] = {}
    begin, loop_is_first, end = threading.Event(), threading.Event(), threading.Event()

    def note(name: str) -> None:
        seen[name] = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority

    def loop() -> None:
        begin.wait()
        note("loop before")
        put_first()
        note("loop")
        loop_is_first.set()
        end.wait()
        note("loop after")

    thread = threading.Thread(target=loop)
    thread.start()
    with real_time("auto") as words:
        note("main")
        begin.set()
        loop_is_first.wait()
        with real_time(True) as again:
            assert "as it was started with" in again
    note("main after")
    end.set()
    thread.join()
    assert words == "real-time priority"
    fifo, normal = os.SCHED_FIFO, (os.SCHED_OTHER, 0)
    assert (seen["main"], seen["loop before"], seen["loop"]) == ((fifo, 10), (fifo, 10), (fifo, 20))
    assert (seen["main after"], seen["loop after"]) == (normal, normal)


def test_where_it_is_not_allowed_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(realtime.os, "sched_setscheduler", refuse)
    assert "rtprio" in why_not()
    with real_time("auto") as words:
        assert words.startswith("normal priority: the system does not allow")
    with real_time(False) as words:
        assert words == "normal priority, as real_time=false says"
    with pytest.raises(RobopolicyError, match="real_time=true, but the system does not allow"), real_time(True):
        pass
    with pytest.raises(RobopolicyError, match="must be auto, true or false; got 'yes please'"), real_time("yes please"):
        pass


def test_other_systems_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(realtime.os, "sched_setscheduler")
    assert why_not() == realtime.NOT_LINUX
