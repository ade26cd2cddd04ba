"""The worker processes of a collection: which seed goes to whom, and what happens when one dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from robopolicy.errors import RobopolicyError

from .demo_files import Attempt, Journal, Tally
from .demo_worker import Recipe, serve

MOST_CRASHES = 3
"""A seed that kills its worker this often is rejected."""
HOPELESS_AFTER = 30
"""Attempts without any success after which a collection gives up."""
LEAST_KEEP_RATE = 0.05
"""A collection that keeps fewer gives up, too."""
TIME_LIMIT_S = 300.0
"""A worker that says nothing for so long is taken for dead."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What `on_progress` is told after every attempt."""

    tally: Tally
    num_demos: int
    resumed: int
    """Demonstrations that an earlier run had left."""


class Crew:
    """Worker processes and the order in which they are given keys."""

    def __init__(self, recipe: Recipe, journal: Journal, num_workers: int) -> None:
        self.recipe, self.journal, self.num_workers = recipe, journal, num_workers
        self._context = multiprocessing.get_context("spawn")
        self._idle: list[Any] = []
        self._workers: dict[Any, Any] = {}
        self._busy: dict[Any, int | None] = {}
        self._crashes: dict[int, int] = {}

    def fill(
        self,
        done: Mapping[int, Attempt],
        *,
        first: int,
        num_demos: int,
        total: int | None,
        on_progress: Callable[[Progress], None] | None,
    ) -> list[Attempt]:
        """Make attempts from key `first` on until `num_demos` succeed; return them in order, up to the last needed."""
        done = dict(done)
        resumed = sum(a.kept for a in done.values())
        keys = (key for key in _count(first, total) if key not in done)
        again: list[int] = []
        with contextlib.ExitStack() as stack:
            stack.callback(self._dismiss)
            while True:
                kept = sum(a.kept for a in done.values())
                while kept + len(self._busy) < num_demos or again:
                    key = again.pop() if again else next(keys, None)
                    if key is None:
                        break
                    if not self._give(key):
                        again.append(key)
                        break
                tally = Tally.of(list(done.values()))
                if on_progress is not None:
                    on_progress(Progress(tally=tally, num_demos=num_demos, resumed=resumed))
                if not self._busy:
                    break
                if total is None:
                    _require_hope(tally, self.recipe)
                for attempt in self._answers(again):
                    done[attempt.key] = attempt
        return _needed(done, first, num_demos)

    def _give(self, key: int) -> bool:
        """Hand `key` to a worker; false if all are busy."""
        if not self._idle:
            if len(self._workers) >= self.num_workers:
                return False
            self._hire()
        connection = self._idle.pop()
        self._busy[connection] = key
        connection.send(key)
        return True

    def _hire(self) -> None:
        ours, theirs = self._context.Pipe()
        worker = self._context.Process(target=serve, args=(theirs, self.recipe, str(self.journal.folder)), daemon=True)
        with _workers_manners():
            worker.start()
        theirs.close()
        self._workers[ours] = worker
        self._idle.append(ours)

    def _answers(self, again: list[int]) -> Iterator[Attempt]:
        """Wait for workers; yield what they finished, and put the keys of those that died into `again`."""
        ready: list[Any] = multiprocessing.connection.wait(list(self._busy), timeout=TIME_LIMIT_S)
        for connection in ready or list(self._busy)[:1]:
            key = self._busy[connection]
            assert key is not None
            try:
                answer = connection.recv() if ready else None
            except (EOFError, ConnectionError):
                answer = None
            if answer == "ready":
                continue
            if isinstance(answer, Exception):
                raise answer
            self._busy.pop(connection)
            if answer is not None:
                self._idle.append(connection)
                yield answer
                continue
            self._remove(connection)
            self._crashes[key] = self._crashes.get(key, 0) + 1
            if self._crashes[key] < MOST_CRASHES:
                again.append(key)
            else:
                attempt = Attempt(key=key, reason="planner crashed")
                self.journal.reject(attempt)
                yield attempt

    def _remove(self, connection: Any) -> None:
        worker = self._workers.pop(connection)
        connection.close()
        worker.terminate()
        worker.join()

    def _dismiss(self) -> None:
        for connection in list(self._workers):
            connection.close()
        for worker in self._workers.values():
            worker.join(timeout=0.5)
            worker.terminate()
            worker.join()
        self._workers.clear()


def _count(first: int, total: int | None) -> Iterator[int]:
    key = first
    while total is None or key < total:
        yield key
        key += 1


def _needed(done: Mapping[int, Attempt], first: int, num_demos: int) -> list[Attempt]:
    """Return attempts in the order of their keys, up to the success that completes `num_demos`."""
    used: list[Attempt] = []
    kept = 0
    for key in sorted(k for k in done if k >= first):
        if kept == num_demos:
            break
        used.append(done[key])
        kept += done[key].kept
    return used


def _require_hope(tally: Tally, recipe: Recipe) -> None:
    if tally.attempts < HOPELESS_AFTER or tally.keep_rate >= LEAST_KEEP_RATE:
        return
    hint = " This task turns the tool: try control_mode=pd_ee_delta_pose." if "delta_pos" in recipe.control_mode else ""
    raise RobopolicyError(
        f"Only {tally.kept} of {tally.attempts} attempts at {recipe.env_id} succeed in {recipe.control_mode} "
        f"({reasons(tally)}).{hint} A smaller shortening.max_action, or shortening.speed=1, is gentler."
    )


def reasons(tally: Tally) -> str:
    """Return why attempts were rejected, most frequent first."""
    return ", ".join(f"{reason}: {count}" for reason, count in tally.rejected.most_common())


@contextlib.contextmanager
def _workers_manners() -> Iterator[None]:
    """Processes started within have one thread per numerical library (there is one process per core) and leave Ctrl-C
    to the parent, from their first moment on."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
