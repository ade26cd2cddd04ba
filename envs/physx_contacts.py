"""Contact impulses of many PhysX CPU scenes, read once per step and only for bodies that someone asked about."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class ImpulseQuery:
    """Impulses [K, 3] in newton seconds: of body pairs (on the first, by the second) or of bodies (by anything)."""

    def __init__(self, keys: Sequence[tuple[Any, Any]]) -> None:
        self.rows: dict[tuple[Any, Any], list[int]] = defaultdict(list)
        for row, key in enumerate(keys):
            self.rows[key].append(row)
        self.cuda_impulses = _Impulses(len(keys))


class _Impulses:
    def __init__(self, count: int) -> None:
        self.array = np.zeros((count, 3), np.float32)
        self._tensor = torch.from_numpy(self.array)

    def torch(self) -> torch.Tensor:
        return self._tensor


class ContactReader:
    """Reads contacts of `systems` lazily; a scene that was just reset has none until it is stepped."""

    def __init__(self, systems: Sequence[Any]) -> None:
        self._systems = systems
        self._watched: set[tuple[Any, Any]] = set()
        self._read = False
        self._blank = np.ones(len(systems), bool)
        self._sums: dict[tuple[Any, Any], list[float]] = {}

    def forget_all(self) -> None:
        """The scenes were stepped: what was read is out of date."""
        self._read = False
        self._blank[:] = False

    def forget(self, scenes: NDArray[np.bool_]) -> None:
        """The state of `scenes` [N] was set: their contacts are unknown until the next step, and count as none."""
        self._read = False
        self._blank |= scenes

    def watch_pairs(self, pairs: Sequence[tuple[Any, Any]]) -> ImpulseQuery:
        """Return a query of the impulses on the first body of each pair by the second."""
        return self._watch(pairs)

    def watch_bodies(self, bodies: Sequence[Any]) -> ImpulseQuery:
        """Return a query of the net impulse on each body."""
        return self._watch([(body, None) for body in bodies])

    def _watch(self, keys: Sequence[tuple[Any, Any]]) -> ImpulseQuery:
        before = len(self._watched)
        self._watched.update(keys)
        self._read = self._read and len(self._watched) == before
        return ImpulseQuery(keys)

    def read(self, query: ImpulseQuery) -> None:
        """Fill `query.cuda_impulses` with what the last step left."""
        if not self._read:
            self._collect()
        out = query.cuda_impulses.array
        out[:] = 0
        for key, impulse in self._sums.items():
            if key in query.rows:
                out[query.rows[key]] = impulse

    def _collect(self) -> None:
        """Sum the impulses on what is watched: a body, by its partner or (partner None) in total."""
        sums: dict[tuple[Any, Any], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        watched = self._watched
        for system, blank in zip(self._systems, self._blank.tolist(), strict=True):
            if blank:
                continue
            for contact in system.get_contacts():
                first, second = contact.bodies
                on_first = [key for key in ((first, second), (first, None)) if key in watched]
                on_second = [key for key in ((second, first), (second, None)) if key in watched]
                if not (on_first or on_second):
                    continue
                x, y, z = 0.0, 0.0, 0.0
                for point in contact.points:
                    px, py, pz = point.impulse.tolist()
                    x, y, z = x + px, y + py, z + pz
                for key in on_first:
                    _add(sums[key], x, y, z)
                for key in on_second:
                    _add(sums[key], -x, -y, -z)
        self._sums = dict(sums)
        self._read = True


def _add(total: list[float], x: float, y: float, z: float) -> None:
    total[0] += x
    total[1] += y
    total[2] += z
