"""Threads that run compiled code which needs no lock of Python's (PhysX steps, inverse kinematics) side by side."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

VARIABLE = "ROBOPOLICY_SIM_THREADS"


def thread_count() -> int:
    """Return how many threads simulate: `ROBOPOLICY_SIM_THREADS`, by default every core this process may use."""
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{VARIABLE} must be a whole number of at least 1; got {text!r}.")
    return int(text)


class WorkerPool:
    """`size` threads, the caller's among them, that share out the items of one list."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._lock = threading.Lock()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._tasks: list[queue.SimpleQueue[tuple[Callable[[Any], None], Iterator[Any]]]] = []
        for number in range(size - 1):
            tasks: queue.SimpleQueue[tuple[Callable[[Any], None], Iterator[Any]]] = queue.SimpleQueue()
            self._tasks.append(tasks)
            name = f"robopolicy-sim-{number}"
            threading.Thread(target=_work, args=(tasks, self._done), name=name, daemon=True).start()

    def map(self, function: Callable[[Any], None], items: Sequence[Any]) -> None:
        """Call `function` on every item, in no fixed order, and return when all are done; raises the first error."""
        with self._lock:
            shared = iter(
                items
            )  # `next` of a list's iterator is atomic: each item goes to the thread that is free first
            helpers = self._tasks[: max(0, len(items) - 1)]
            for tasks in helpers:
                tasks.put((function, shared))
            error = _drain(function, shared)
            for _ in helpers:
                error = self._done.get() or error
        if error is not None:
            raise error


def _drain(function: Callable[[Any], None], items: Iterator[Any]) -> BaseException | None:
    try:
        for item in items:
            function(item)
    except BaseException as error:
        return error
    return None


def _work(tasks: queue.SimpleQueue[Any], done: queue.SimpleQueue[BaseException | None]) -> None:
    while True:
        function, items = tasks.get()
        done.put(_drain(function, items))
        del function, items  # keep no scene alive while waiting


@lru_cache(maxsize=8)
def _pool(size: int, process: int) -> WorkerPool:
    return WorkerPool(size)


def worker_pool(size: int | None = None) -> WorkerPool:
    """Return this process's pool of `size` threads (default `thread_count()`); a forked child gets its own."""
    return _pool(size or thread_count(), os.getpid())
