"""What all perturbed environments share: random numbers that follow from the episode's seed, and everything untouched.

An episode's perturbation is drawn from its seed and the perturbation's name alone. It is the same for every policy, for
every N and beside every neighbour, and the draws do not depend on the level, which only scales them.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robopolicy.errors import RobopolicyError
from robopolicy.types import Environment, Frame, TaskSpec

Draws = np.random.Generator


class Shifted:
    """An environment with something wrong with it; what is not overridden is that of the environment inside.

    Subclasses implement some of `begin`, `before_step`, `command` and `show`; all work on chosen rows.
    """

    modalities: tuple[str, ...] = ()
    """What `show` changes; other modalities pass as they are."""
    task_spec: TaskSpec
    num_envs: int
    spec: Any

    def __init__(self, env: Environment, strength: float, *, name: str) -> None:
        if getattr(env, "auto_reset", False):
            raise RobopolicyError(f"shift={name} needs an environment that does not reset by itself: auto_reset=False.")
        self.env = env
        self.strength = strength
        self.name = name
        self.draws: list[Draws] = [np.random.default_rng(0)] * env.num_envs
        """One generator per environment, renewed with its episode."""
        self.steps = np.zeros(env.num_envs, dtype=np.int64)
        """Control steps since the start of each episode."""
        self._unseeded_resets = 0
        self._shown: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "env":  # not there yet: copying or unpickling
            raise AttributeError(name)
        return getattr(self.env, name)

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frame, dict[str, Any]]:
        """Start new episodes; see `Environment.reset`. Without seeds perturbations follow from the count of resets."""
        rows = self._rows((options or {}).get("env_idx"))
        for row, key in zip(rows, self._keys(seed, len(rows)), strict=True):
            self.draws[row] = np.random.default_rng([*key, zlib.crc32(self.name.encode())])
            self.steps[row] = 0
        self.begin(rows)
        frame, info = self.env.reset(seed=seed, options=options)
        return self._showing(frame, rows, fresh=True), info

    def step(self, actions: Tensor) -> tuple[Frame, Tensor, Tensor, Tensor, dict[str, Any]]:
        self.before_step()
        frame, reward, terminated, truncated, info = self.env.step(self.command(actions))
        self.steps += 1
        return self._showing(frame, list(range(self.env.num_envs)), fresh=False), reward, terminated, truncated, info

    def begin(self, rows: Sequence[int]) -> None:
        """Draw what the new episodes of `rows` need, before they start."""

    def before_step(self) -> None:
        """Interfere with the simulation before a control step."""

    def command(self, actions: Tensor) -> Tensor:
        """Return the actions [N, A] that reach the robot."""
        return actions

    def show(self, name: str, value: Tensor, rows: Sequence[int], *, fresh: bool) -> Tensor:
        """Return what is observed of modality `name` in `rows` [K], [K, ...], instead of `value[rows]`.

        Args:
            value: [N, ...] as the environment inside shows it.
            fresh: `rows` have just been reset.
        """
        return value[list(rows)]

    def _showing(self, frame: Frame, rows: Sequence[int], *, fresh: bool) -> Frame:
        out = dict(frame)
        for name in self.modalities:
            value = self._shown.get(name, frame[name]).clone()  # rows that were not reset keep what they showed
            value[list(rows)] = self.show(name, frame[name], rows, fresh=fresh)
            out[name] = self._shown[name] = value
        return out

    def _rows(self, env_idx: Any) -> list[int]:
        if env_idx is None:
            return list(range(self.env.num_envs))
        chosen = torch.as_tensor(env_idx)
        return [int(i) for i in (chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen.flatten())]

    def _keys(self, seed: int | Sequence[int] | None, count: int) -> list[tuple[int, ...]]:
        """Return what seeds each episode's generator."""
        if seed is None:
            self._unseeded_resets += 1
            return [(2**32, self._unseeded_resets, i) for i in range(count)]  # no seed is that large
        if isinstance(seed, int | np.integer):
            return [(int(seed) + i,) for i in range(count)]
        return [(int(s),) for s in seed]


def direction(draws: Draws) -> np.ndarray:
    """Return a horizontal unit vector [3], drawn uniformly."""
    angle = draws.uniform(-np.pi, np.pi)
    return np.array([np.cos(angle), np.sin(angle), 0.0])
