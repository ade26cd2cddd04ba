"""Rollout state around a planner, per environment: the window of observations and the chunk being played.

Environments end and reset row by row, so everything here is kept and forgotten per row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robopolicy.policies.planners import Planner
from robopolicy.rng import Rng, take_generators
from robopolicy.types import ActionSpec, Frame, Observation, TaskSpec


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What one call of a planner was about."""

    rows: Tensor
    """[K] int, the environments planned for."""
    diagnostics: Mapping[str, Tensor]
    """The planner's, name to [K]."""
    inference_s: Sequence[float] | None = None
    """How long each of the K robots waited for its plan, where waiting is simulated."""


class ChunkActor:
    """Plays chunks: the planner is asked once per `n_action_steps`, and only for the rows that have run out.

    Discrete dimensions (a gripper) are rounded to the nearer end of their range at execution.

    Args:
        planner: its policy in evaluation mode.
        num_envs: number N of environments.
        n_action_steps: steps to execute per chunk; None takes the planner's timing.
    """

    def __init__(self, planner: Planner, num_envs: int, *, n_action_steps: int | None = None) -> None:
        timing = planner.timing
        self.timing = timing if n_action_steps is None else dataclasses.replace(timing, n_action_steps=n_action_steps)
        self.num_envs = num_envs
        self.replanned = False
        """Whether the last call planned."""
        self.planned: Planned | None = None
        """What the last call planned."""
        self._planner = planner
        self._window = ObservationWindow(planner.spec, timing.n_obs_steps, num_envs)
        self._ends = DiscreteEnds(planner.spec.action, num_envs, hysteresis=planner.hysteresis)
        # how far each row has played: small and read at every step, so kept by numpy; chunks stay with the environments
        self._step = np.full(num_envs, self.timing.n_action_steps)
        self._chunk: Tensor | None = None

    def __call__(self, frame: Frame, *, generator: Rng = None) -> Tensor:
        """Return the action [N, A] to execute now, on the device of `frame`.

        A sequence of generators has one per environment, so that rows do not depend on their neighbours.
        """
        self._window.push(frame)
        stale = self._step >= self.timing.n_action_steps
        self.replanned, self.planned = bool(stale.any()), None
        if self.replanned:
            self._replan(stale, generator)
        assert self._chunk is not None
        index = self.timing.now + self._step
        if np.count_nonzero(index == index[0]) == self.num_envs:
            action = self._chunk.select(1, int(index[0]))
        else:
            action = self._chunk[torch.arange(self.num_envs), torch.from_numpy(index)]
        self._step += 1
        return self._ends.round(action)

    @property
    def sees_next(self) -> bool:
        """Whether the frame that follows the last action will be in the window of a plan."""
        return bool((self._step > self.timing.n_action_steps - self.timing.n_obs_steps).any())

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget window and chunk of `rows` [N] bool (None: of all); call whenever those environments reset."""
        self._window.reset(rows)
        self._planner.reset(rows)
        self._ends.reset(rows)
        self._step[slice(None) if rows is None else rows.cpu().numpy()] = self.timing.n_action_steps

    def _replan(self, stale: NDArray[np.bool_], generator: Rng) -> None:
        at = np.flatnonzero(stale)
        rows, shift = torch.from_numpy(at), torch.from_numpy(self._step[at])
        obs = self._window.observation
        if len(at) < self.num_envs:
            obs, generator = obs.take(rows), take_generators(generator, rows)
        chunk = self._planner(obs, rows, shift=shift, generator=generator)
        self.planned = Planned(rows=rows, diagnostics=self._planner.diagnostics)
        if len(at) == self.num_envs:
            self._chunk = chunk  # the planner's too, so nobody writes into it
        else:
            assert self._chunk is not None  # all rows have been planned for at the first step
            self._chunk = self._chunk.index_put((rows.to(chunk.device),), chunk)
        self._step[at] = 0


class ObservationWindow:
    """The last `n_obs_steps` frames of N environments; a new episode's window is filled with its first frame."""

    def __init__(self, spec: TaskSpec, n_obs_steps: int, num_envs: int) -> None:
        self._names = tuple(spec.observation)
        self._steps = n_obs_steps
        self._fresh = np.ones(num_envs, dtype=bool)
        self._history: dict[str, Tensor] = {}

    @property
    def observation(self) -> Observation:
        return Observation(modalities=self._history)

    def push(self, frame: Frame) -> None:
        """Append `frame` and drop the oldest one."""
        num_fresh = np.count_nonzero(self._fresh)
        history = {}
        for name in self._names:
            now = frame[name].unsqueeze(1)
            if num_fresh == len(self._fresh):
                history[name] = now.expand(-1, self._steps, *now.shape[2:])
                continue
            history[name] = torch.cat([self._history[name].narrow(1, 1, self._steps - 1), now], dim=1)
            if num_fresh:
                fresh = torch.from_numpy(self._fresh)
                history[name][fresh] = now[fresh]
        self._history = history
        self._fresh[:] = False

    def reset(self, rows: Tensor | None = None) -> None:
        """Start the windows of `rows` [N] bool (None: all) anew with the next frame."""
        self._fresh[slice(None) if rows is None else rows.cpu().numpy()] = True


class DiscreteEnds:
    """Rounds the discrete dimensions of an action to the nearer end of their range.

    With hysteresis a dimension stays at its end until the action is past the middle by `hysteresis` of half the range,
    so that a value that trembles around the middle does not open and close a gripper.

    Args:
        action: which dimensions are discrete, and their ends.
        num_envs: rows N of the actions to round; needed for hysteresis alone.
        hysteresis: in [0, 1).
    """

    def __init__(self, action: ActionSpec, num_envs: int = 1, *, hysteresis: float = 0.0) -> None:
        if not 0.0 <= hysteresis < 1.0:
            raise ValueError(f"hysteresis must be in [0, 1); got {hysteresis}.")
        self._any = any(action.discrete)
        self._discrete = torch.tensor(action.discrete)
        self._low, self._high = torch.tensor(action.low), torch.tensor(action.high)
        middle, margin = (self._low + self._high) / 2, hysteresis * (self._high - self._low) / 2
        self._if_high, self._if_low, self._if_new = middle - margin, middle + margin, middle
        """Where the next action counts as high: after a high one, after a low one, as the first."""
        self._middle = middle.repeat(num_envs, 1)
        """Where the next action of each row counts as high, [N, A]."""
        self._has_memory = hysteresis > 0.0

    def round(self, action: Tensor) -> Tensor:
        """[N, A] -> [N, A], a tensor of its own."""
        if not self._any:
            return action.clone()
        if self._discrete.device != action.device:
            for name in ("_discrete", "_low", "_high", "_if_high", "_if_low", "_if_new", "_middle"):
                setattr(self, name, getattr(self, name).to(action.device))
        up = action >= self._middle
        if self._has_memory:
            self._middle = torch.where(up, self._if_high, self._if_low)
        return torch.where(self._discrete, torch.where(up, self._high, self._low), action)

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget the ends of `rows` [N] bool (None: all)."""
        self._middle[slice(None) if rows is None else rows.to(self._middle.device)] = self._if_new
