"""Real-time iteration (arXiv 2508.05396): plan at every tick by refining the previous plan, kept per environment.

    here                 paper
    guess [N, H, A]      the action sequence of the previous inference, shifted
    timesteps            its list of denoising steps, from K' to 0

A row's first plan (after a reset) is sampled in full; later ones start from its previous chunk, moved on by the control
steps that have passed since the observation it was made from. Rows of different ages are planned in one call and do not
know of each other. What becomes of a guess is the policy's: `refine` and the values in sampling/warm_start.py.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from robopolicy.errors import RobopolicyError, UnknownNameError
from robopolicy.policies.base import Policy
from robopolicy.rng import Rng, randn, take_generators
from robopolicy.timing import ChunkTiming
from robopolicy.types import Observation, TaskSpec

Tail = Literal["repeat", "zero", "extrapolate", "renoise"]
Gripper = Literal["keep", "clip"]


class WarmStartPlanner:
    """Plans from the previous plan of each environment.

    Args:
        policy: has `refine(obs, guess, warm_start=..., generator=...) -> (chunk, first estimate)`.
        num_envs: number N of environments.
        warm_start: how the policy refines a guess; None leaves it to the policy.
        sampler: for rows without a guess, instead of the policy's own.
        n_action_steps: steps after which it wants to be asked again; the point of it all is 1.
        shift: move a guess by the control steps that have passed since its observation, or always by one (the release).
        tail_delta, tail_absolute: what follows the last action of the guess. repeat: the same again; zero: no further
            motion; extrapolate: on along the last difference; renoise: pure noise. Discrete dimensions always repeat.
        gripper: clip overwrites the discrete dimensions of the kept guess by their sign over `gripper_factor`, in
            network units, so that few steps can change ends; keep leaves them (policies trained with `discrete_scale`).
        hysteresis: for whoever executes, see `actors.DiscreteEnds`.
        max_shift: a guess older than so many control steps is stale and planned anew; None: half the horizon.
        resample_above: plan a row anew if the network's first estimate is further than this from the guess (RMS over
            the part of the guess that is no tail, network units). None never does.
        accept_below: take the first estimate, one network call, if it is nearer than this to the guess.
        stall_below, stall_ticks: plan anew after so many plans in a row that each changed by less than this (RMS,
            network units): static friction can hold an arm whose plan is too small to move it. 0 ticks never does.
    """

    def __init__(
        self,
        policy: Policy,
        num_envs: int,
        *,
        warm_start: Any = None,
        sampler: Any = None,
        n_action_steps: int = 1,
        shift: Literal["executed", "one"] = "executed",
        tail_delta: Tail = "zero",
        tail_absolute: Tail = "repeat",
        gripper: Gripper = "keep",
        gripper_factor: float = 10.0,
        hysteresis: float = 0.0,
        max_shift: int | None = None,
        resample_above: float | None = None,
        accept_below: float | None = None,
        stall_below: float = 0.0,
        stall_ticks: int = 0,
    ) -> None:
        if not hasattr(policy, "refine"):
            raise RobopolicyError(
                f"{type(policy).__name__} cannot refine a guess, so it cannot be warm-started; planner=fresh works."
            )
        for what, name, known in (
            ("shift", shift, ("executed", "one")),
            ("tail", tail_delta, get_args(Tail)),
            ("tail", tail_absolute, get_args(Tail)),
            ("treatment of the gripper", gripper, get_args(Gripper)),
        ):
            if name not in known:
                raise UnknownNameError(what, name, known)
        horizon = policy.timing.horizon
        self.max_shift = horizon // 2 if max_shift is None else max_shift
        if not 1 <= self.max_shift < horizon:
            raise RobopolicyError(f"max_shift must be in [1, {horizon - 1}] for horizon={horizon}; got {max_shift}.")
        self._policy: Any = policy
        self._spec: TaskSpec = policy.spec
        self._timing = dataclasses.replace(policy.timing, n_action_steps=n_action_steps)
        self.warm_start, self.sampler = warm_start, sampler
        self.hysteresis = hysteresis
        self._shift_by_one = shift == "one"
        self._clip_factor = gripper_factor if gripper == "clip" else None
        self._resample_above, self._accept_below = resample_above, accept_below
        self._stall_below, self._stall_ticks = stall_below, stall_ticks
        self._tails = _tails(self._spec, tail_delta, tail_absolute)
        self._discrete = torch.tensor(self._spec.action.discrete)
        self._guess: Tensor | None = None
        self._known = torch.zeros(num_envs, dtype=torch.bool)
        self._still = torch.zeros(num_envs, dtype=torch.int64)
        self.totals: Counter[str] = Counter()
        """Since it was built, over all rows: plans, fresh, warm, resampled (planned anew though there was a guess),
        network_calls."""
        self.diagnostics: Mapping[str, Tensor] = {}
        """Of each row of the last call: network_calls, warm, resampled (0 or 1), disagreement (RMS of first estimate
        and guess in network units; NaN where there was none)."""

    @property
    def spec(self) -> TaskSpec:
        return self._spec

    @property
    def timing(self) -> ChunkTiming:
        return self._timing

    def __call__(self, obs: Observation, rows: Tensor, *, shift: Tensor, generator: Rng = None) -> Tensor:
        """See `planners.Planner`."""
        there = next(iter(obs.modalities.values())).device
        obs = obs.to(self._policy.device)
        rows = rows.cpu()
        age = torch.ones_like(rows) if self._shift_by_one else shift.cpu()
        known = self._known[rows]
        warm = known & (age <= self.max_shift)
        if self._stall_ticks:
            warm &= self._still[rows] < self._stall_ticks
        notes = {
            "network_calls": torch.zeros(len(rows)),
            "warm": warm.float(),
            "resampled": (known & ~warm).float(),
            "disagreement": torch.full((len(rows),), torch.nan),
        }
        chunk = self._plan(obs, rows, age, warm, notes, generator)
        notes.update({name: value.cpu() for name, value in self._policy.diagnose(obs).items()})
        self._keep(rows, chunk, known)
        self.diagnostics = notes
        self._count(notes)
        return chunk.to(there)

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget the plans of `rows` [N] bool, or all of them."""
        where = slice(None) if rows is None else rows.cpu()
        self._known[where] = False
        self._still[where] = 0

    def _plan(
        self, obs: Observation, rows: Tensor, age: Tensor, warm: Tensor, notes: dict[str, Tensor], generator: Rng
    ) -> Tensor:
        """Return the chunks [K, H, A]: sampled in full for rows that are not `warm`, refined for the others."""
        if not warm.any():
            return self._fresh(obs, torch.arange(len(rows)), notes, generator)
        if warm.all():
            return self._warm(obs, torch.arange(len(rows)), rows, age, notes, generator)
        fresh_at, warm_at = (~warm).nonzero().flatten(), warm.nonzero().flatten()
        new = self._fresh(obs.take(fresh_at), fresh_at, notes, take_generators(generator, fresh_at))
        refined = self._warm(
            obs.take(warm_at), warm_at, rows[warm_at], age[warm_at], notes, take_generators(generator, warm_at)
        )
        chunk = refined.new_empty(len(rows), *refined.shape[1:])
        chunk[fresh_at], chunk[warm_at] = new, refined
        return chunk

    def _fresh(self, obs: Observation, at: Tensor, notes: dict[str, Tensor], generator: Rng) -> Tensor:
        settings = {"warm_start": self.warm_start, "sampler": self.sampler}
        given = {name: value for name, value in settings.items() if value is not None}
        notes["network_calls"][at] += self._policy.network_calls(*([self.sampler] if self.sampler else []))
        return self._policy.act(obs, generator=generator, **given)

    def _warm(
        self, obs: Observation, at: Tensor, rows: Tensor, age: Tensor, notes: dict[str, Tensor], generator: Rng
    ) -> Tensor:
        assert self._guess is not None
        guess = self._shifted(self._guess[rows], age, generator)
        settings = {} if self.warm_start is None else {"warm_start": self.warm_start}
        calls = (self.warm_start or self._policy.warm_start).num_calls
        if self._accept_below is None and self._resample_above is None:
            chunk, estimate = self._policy.refine(obs, guess, generator=generator, **settings)
            notes["disagreement"][at] = self._disagreement(estimate, guess, age)
            notes["network_calls"][at] += calls
            return chunk
        x, cond, estimate = self._policy.refine_first(obs, guess, generator=generator, **settings)
        disagreement = self._disagreement(estimate, guess, age)
        notes["disagreement"][at] = disagreement
        notes["network_calls"][at] += 1
        low = -1.0 if self._accept_below is None else self._accept_below
        high = float("inf") if self._resample_above is None else self._resample_above
        near, far = disagreement < low, disagreement > high
        chunk = estimate.clone()
        rest = (~near & ~far).nonzero().flatten()
        if len(rest):
            some = take_generators(generator, rest)
            chunk[rest] = self._policy.refine_rest(x[rest], cond[rest], generator=some, **settings)
            notes["network_calls"][at[rest]] += calls - 1
        anew = far.nonzero().flatten()
        if len(anew):
            chunk[anew] = self._fresh(obs.take(anew), at[anew], notes, take_generators(generator, anew))
            notes["resampled"][at[anew]] = 1.0
        return chunk

    def _shifted(self, guess: Tensor, age: Tensor, generator: Rng) -> Tensor:
        """Return `guess` [K, H, A] moved on by `age` [K] steps, its tail filled by the rules."""
        horizon = guess.shape[1]
        index = torch.arange(horizon) + age[:, None]
        moved = guess[torch.arange(len(guess))[:, None], index.clamp_max(horizon - 1)]
        beyond = rearrange(index - (horizon - 1), "k h -> k h 1").clamp_min(0).to(guess.device)
        for rule, where in self._tails.items():
            if rule == "repeat":
                continue
            if rule == "zero":
                tail = torch.zeros_like(moved)
            elif rule == "extrapolate":
                tail = self._policy.clip(guess[:, -1:] + beyond * (guess[:, -1:] - guess[:, -2:-1]))
            else:
                noise = randn(*guess.shape, generator=generator, device=guess.device)
                tail = self._policy.norm.decode("action", noise)
            moved = torch.where((beyond > 0) & where.to(guess.device), tail, moved)
        return moved

    def _disagreement(self, estimate: Tensor, guess: Tensor, age: Tensor) -> Tensor:
        """Return the RMS [K] of `estimate` - `guess` in network units over the steps that are no tail, on the CPU."""
        error = (self._difference(estimate, guess)).square().mean(dim=-1)
        inside = torch.arange(guess.shape[1]) < guess.shape[1] - age[:, None]
        inside = inside.to(error)
        return ((error * inside).sum(dim=1) / inside.sum(dim=1)).sqrt().cpu()

    def _difference(self, one: Tensor, other: Tensor) -> Tensor:
        """Return `one` - `other`, both [K, H, A] in environment units, in network units."""
        return self._policy.norm.encode("action", one) - self._policy.norm.encode("action", other)

    def _keep(self, rows: Tensor, chunk: Tensor, known: Tensor) -> None:
        """Make `chunk` [K, H, A] the guess of `rows`."""
        if self._guess is None:
            self._guess = chunk.new_zeros(len(self._known), *chunk.shape[1:])
        if self._stall_ticks:
            change = self._difference(chunk, self._guess[rows]).square().mean(dim=(1, 2)).sqrt().cpu()
            small = known & (change < self._stall_below) & (self._still[rows] < self._stall_ticks)
            self._still[rows] = torch.where(small, self._still[rows] + 1, 0)
        self._guess[rows] = chunk if self._clip_factor is None else self._clipped(chunk, self._clip_factor)
        self._known[rows] = True

    def _clipped(self, chunk: Tensor, factor: float) -> Tensor:
        encoded = self._policy.norm.encode("action", chunk)
        ends = self._policy.norm.decode("action", encoded.sign() / factor)
        return torch.where(self._discrete.to(chunk.device), ends, chunk)

    def _count(self, notes: Mapping[str, Tensor]) -> None:
        plans, warm = len(notes["warm"]), int(notes["warm"].sum())
        self.totals["plans"] += plans
        self.totals["warm"] += warm
        self.totals["fresh"] += plans - warm
        self.totals["resampled"] += int(notes["resampled"].sum())
        self.totals["network_calls"] += int(notes["network_calls"].sum())


def _tails(spec: TaskSpec, delta: Tail, absolute: Tail) -> dict[Tail, Tensor]:
    """Return each rule that is used and its action dimensions, [A] bool."""
    per_dim: list[Tail] = [
        "repeat" if discrete else (delta if is_delta else absolute)
        for is_delta, discrete in zip(spec.action.delta, spec.action.discrete, strict=True)
    ]
    return {rule: torch.tensor([one == rule for one in per_dim]) for rule in dict.fromkeys(per_dim)}
