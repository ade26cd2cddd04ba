"""From windows of observations to chunks of actions, with whatever one plan leaves for the next, per environment.

Evaluation and deployment play chunks by different clocks, but plan with the same object.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    def timing(self) -> ChunkTiming:
        """The policy's, with the number of steps after which this planner wants to be asked again."""

    @property
    def hysteresis(self) -> float:
        """For whoever executes the chunks: see `actors.DiscreteEnds`."""

    @property
    def diagnostics(self) -> Mapping[str, Tensor]:
        """What the last call says of each of its rows, name to [K]; may be empty."""

    def __call__(self, obs: Observation, rows: Tensor, *, shift: Tensor, generator: Rng = None) -> Tensor:
        """Return the chunks [K, H, A] of the environments `rows`, in environment units, on the device of `obs`.

        They are not to be written into: a planner may go on from them.

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
    """Plans every chunk anew: nothing is remembered, so `num_envs` is of no account; all planners are built alike."""

    hysteresis = 0.0

    def __init__(self, policy: Policy, num_envs: int | None = None) -> None:
        self._policy = policy
        self._said: Mapping[str, Tensor] = {}

    @property
    def spec(self) -> TaskSpec:
        return self._policy.spec

    @property
    def timing(self) -> ChunkTiming:
        return self._policy.timing

    @property
    def diagnostics(self) -> Mapping[str, Tensor]:
        found = getattr(self._policy, "last_diagnostics", None)  # policies that think for a time of their own have them
        return {**self._said, **({} if found is None else vars(found))}

    def __call__(self, obs: Observation, rows: Tensor, *, shift: Tensor, generator: Rng = None) -> Tensor:
        there = next(iter(obs.modalities.values())).device
        obs = obs.to(self._policy.device)
        self._said = self._policy.diagnose(obs)
        return self._policy.act(obs, generator=generator).to(there)

    def reset(self, rows: Tensor | None = None) -> None:
        pass
