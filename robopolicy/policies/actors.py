"""Rollout state around a policy, per environment: the window of observations and the chunk being played.

Environments end and reset row by row, so everything here is kept and forgotten per row.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from robopolicy.policies.base import Policy
from robopolicy.rng import Rng
from robopolicy.types import ActionSpec, Frame, Observation


class ChunkActor:
    """Plays chunks: the policy is asked once per `n_action_steps`, and only for the rows that have run out.

    Discrete dimensions (a gripper) are rounded to the nearer end of their range at execution.

    Args:
        policy: in evaluation mode.
        num_envs: number N of environments.
        n_action_steps: steps to execute per chunk; None takes the policy's timing.
    """

    def __init__(self, policy: Policy, num_envs: int, *, n_action_steps: int | None = None) -> None:
        timing = policy.timing
        self.timing = timing if n_action_steps is None else dataclasses.replace(timing, n_action_steps=n_action_steps)
        self.num_envs = num_envs
        self.replanned = False
        """Whether the last call ran the policy."""
        self._policy = policy
        # which rows start anew and how far each has played: small, read every step, so kept on the CPU
        self._fresh = torch.ones(num_envs, dtype=torch.bool)
        self._step = torch.full((num_envs,), self.timing.n_action_steps)
        # windows and chunks stay on the environments' device
        self._history: dict[str, Tensor] = {}
        self._chunk: Tensor | None = None
        self._ends: _DiscreteEnds | None = None

    def __call__(self, frame: Frame, *, generator: Rng = None) -> Tensor:
        """Return the action [N, A] to execute now, on the device of `frame`.

        A sequence of generators has one per environment, so that rows do not depend on their neighbours.
        """
        self._remember(frame)
        stale = self._step >= self.timing.n_action_steps
        self.replanned = bool(stale.any())
        if self.replanned:
            self._replan(stale, generator)
        assert self._chunk is not None
        assert self._ends is not None
        action = self._chunk[torch.arange(self.num_envs), self.timing.now + self._step]
        self._step += 1
        return self._ends.round(action)

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget window and chunk of `rows` [N] bool (None: of all); call whenever those environments reset."""
        mask = slice(None) if rows is None else rows.cpu()
        self._fresh[mask] = True
        self._step[mask] = self.timing.n_action_steps

    def _remember(self, frame: Frame) -> None:
        """Push `frame` into the window; a fresh row's window is filled with its first frame."""
        steps = self.timing.n_obs_steps
        all_fresh, any_fresh = bool(self._fresh.all()), bool(self._fresh.any())
        for name in self._policy.spec.observation:
            now = frame[name][:, None]
            repeated = now.expand(-1, steps, *now.shape[2:])
            if all_fresh:
                self._history[name] = repeated
                continue
            window = torch.cat([self._history[name][:, 1:], now], dim=1)
            if any_fresh:
                window[self._fresh] = repeated[self._fresh]
            self._history[name] = window
        self._fresh[:] = False

    def _replan(self, stale: Tensor, generator: Rng) -> None:
        obs = Observation(modalities=self._history)
        device = next(iter(self._history.values())).device
        if not stale.all():
            obs = obs.take(stale)
            if generator is not None and not isinstance(generator, torch.Generator):
                generator = [generator[i] for i in stale.nonzero().flatten().tolist()]
        chunk = self._policy.act(obs.to(self._policy.device), generator=generator).to(device)
        if self._chunk is None:
            self._chunk = chunk.new_empty(self.num_envs, *chunk.shape[1:])
            self._ends = _DiscreteEnds(self._policy.spec.action, device)
        self._chunk[stale] = chunk
        self._step[stale] = 0


class _DiscreteEnds:
    """Rounds the discrete dimensions of an action to the nearer end of their range."""

    def __init__(self, action: ActionSpec, device: torch.device) -> None:
        self._any = any(action.discrete)
        self._discrete = torch.tensor(action.discrete, device=device)
        self._low, self._high = torch.tensor(action.low, device=device), torch.tensor(action.high, device=device)
        self._middle = (self._low + self._high) / 2

    def round(self, action: Tensor) -> Tensor:
        """[N, A] -> [N, A]."""
        if not self._any:
            return action
        ends = torch.where(action >= self._middle, self._high, self._low)
        return torch.where(self._discrete, ends, action)
