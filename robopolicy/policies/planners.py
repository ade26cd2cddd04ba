"""From windows of observations to chunks of actions, with whatever one plan leaves for the next, per environment.

Evaluation and deployment play chunks by different clocks, but plan with the same object.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from robopolicy.policies.base import Policy
from robopolicy.rng import Rng
from robopolicy.timing import ChunkTiming
from robopolicy.types import Observation, TaskSpec


class Planner(Protocol):
    """Plans chunks for numbered environments and keeps what it must remember of each."""

    @property
    def spec(self) -> TaskSpec: ...

    @property
    def timing(self) -> ChunkTiming: ...

    def __call__(self, obs: Observation, rows: Tensor, *, shift: Tensor, generator: Rng = None) -> Tensor:
        """Return the chunks [K, H, A] of the environments `rows`, in environment units, on the device of `obs`.

        Args:
            obs: their K windows.
            rows: [K] int, which environments these are.
            shift: [K] int, control steps between the observation that each row's previous plan was made from and
                this one; without meaning for a row that was reset since.
            generator: one, or one per entry of `rows`.
        """

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget the plans of `rows` [N] bool, or all of them."""


class FreshPlanner:
    """Plans every chunk anew: nothing is remembered."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @property
    def spec(self) -> TaskSpec:
        return self._policy.spec

    @property
    def timing(self) -> ChunkTiming:
        return self._policy.timing

    def __call__(self, obs: Observation, rows: Tensor, *, shift: Tensor, generator: Rng = None) -> Tensor:
        there = next(iter(obs.modalities.values())).device
        return self._policy.act(obs.to(self._policy.device), generator=generator).to(there)

    def reset(self, rows: Tensor | None = None) -> None:
        pass
