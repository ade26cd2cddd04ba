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
        self.keys = list(keys)
        self.cuda_impulses = _Impulses(len(self.keys))


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
        self._watched: set[Any] = set()
        self._read = False
        self._blank = np.ones(len(systems), bool)
        self._sums: dict[tuple[Any, Any], NDArray[np.float64]] = {}

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
        self._watch(first for first, _ in pairs)
        return ImpulseQuery(pairs)

    def watch_bodies(self, bodies: Sequence[Any]) -> ImpulseQuery:
        """Return a query of the net impulse on each body."""
        self._watch(bodies)
        return ImpulseQuery([(body, None) for body in bodies])

    def _watch(self, bodies: Any) -> None:
        before = len(self._watched)
        self._watched.update(bodies)
        self._read = self._read and len(self._watched) == before

    def read(self, query: ImpulseQuery) -> None:
        """Fill `query.cuda_impulses` with what the last step left."""
        if not self._read:
            self._collect()
        out = query.cuda_impulses.array
        out[:] = 0
        if self._sums:
            for row, key in enumerate(query.keys):
                if key in self._sums:
                    out[row] = self._sums[key]

    def _collect(self) -> None:
        """Sum the impulses on every watched body, by partner and (partner None) in total."""
        sums: dict[tuple[Any, Any], NDArray[np.float64]] = defaultdict(lambda: np.zeros(3))
        watched = self._watched
        for system, blank in zip(self._systems, self._blank.tolist(), strict=True):
            if blank:
                continue
            for contact in system.get_contacts():
                first, second = contact.bodies
                if first not in watched and second not in watched:
                    continue
                impulse = np.sum([point.impulse for point in contact.points], axis=0, dtype=np.float64)
                if first in watched:
                    sums[first, second] += impulse
                    sums[first, None] += impulse
                if second in watched:
                    sums[second, first] -= impulse
                    sums[second, None] -= impulse
        self._sums = dict(sums)
        self._read = True
