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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robopolicy.errors import RobopolicyError, UnknownNameError
from robopolicy.policies.base import Policy
from robopolicy.rng import Rng, randn, take_generators
from robopolicy.timing import ChunkTiming
from robopolicy.types import Observation, TaskSpec

Tail = Literal["repeat", "zero", "extrapolate", "renoise"]
Gripper = Literal["keep", "clip"]

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
"""What is kept of each row: small and read at every tick, where numpy's calls are quicker than torch's."""


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
        self._moves: dict[int, _Move] = {}
        self._all = np.arange(num_envs)
        self._known: Bools = np.zeros(num_envs, dtype=bool)
        self._still: Ints = np.zeros(num_envs, dtype=np.int64)
        self.totals: Counter[str] = Counter()
        """Since it was built, over all rows: plans, fresh, warm, resampled (planned anew though there was a guess),
        network_calls."""
        self.diagnostics: Mapping[str, Tensor] = {}
        """Of each row of the last call: network_calls, warm, resampled (0 or 1), disagreement (RMS of first estimate
        and guess in network units; NaN where there was none), which is worked out when it is read."""

    @property
    def spec(self) -> TaskSpec:
        return self._spec

    @property
    def timing(self) -> ChunkTiming:
        return self._timing

    def __call__(self, obs: Observation, rows: Tensor, *, shift: Tensor, generator: Rng = None) -> Tensor:
        """See `planners.Planner`."""
        there, here = next(iter(obs.modalities.values())).device, self._policy.device
        if there != here:
            obs = obs.to(here)
        at: Ints = rows.cpu().numpy()
        age: Ints = np.ones_like(at) if self._shift_by_one else shift.cpu().numpy()
        known = self._known[at]
        warm = known & (age <= self.max_shift)
        if self._stall_ticks:
            warm &= self._still[at] < self._stall_ticks
        notes = _Notes(warm=warm, resampled=known & ~warm)
        chunk = self._plan(obs, at, age, warm, notes, generator)
        notes.said = self._policy.diagnose(obs)
        self._keep(at, chunk, known)
        self.diagnostics = notes
        self._count(notes)
        return chunk if there == here else chunk.to(there)

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget the plans of `rows` [N] bool, or all of them."""
        where = slice(None) if rows is None else rows.cpu().numpy()
        self._known[where] = False
        self._still[where] = 0

    def _plan(self, obs: Observation, rows: Ints, age: Ints, warm: Bools, notes: _Notes, generator: Rng) -> Tensor:
        """Return the chunks [K, H, A]: sampled in full for rows that are not `warm`, refined for the others."""
        num_warm = np.count_nonzero(warm)
        if num_warm in (0, len(rows)):
            at = self._all[: len(rows)]
            if num_warm:
                return self._warm(obs, at, rows, age, notes, generator)
            return self._fresh(obs, at, notes, generator)
        fresh_at, warm_at = np.flatnonzero(~warm), np.flatnonzero(warm)
        fresh, old = torch.from_numpy(fresh_at), torch.from_numpy(warm_at)
        new = self._fresh(obs.take(fresh), fresh_at, notes, take_generators(generator, fresh))
        noise = take_generators(generator, old)
        refined = self._warm(obs.take(old), warm_at, rows[warm_at], age[warm_at], notes, noise)
        chunk = refined.new_empty(len(rows), *refined.shape[1:])
        chunk[fresh], chunk[old] = new, refined
        return chunk

    def _fresh(self, obs: Observation, at: Ints, notes: _Notes, generator: Rng) -> Tensor:
        settings = {"warm_start": self.warm_start, "sampler": self.sampler}
        given = {name: value for name, value in settings.items() if value is not None}
        notes.calls[at] += self._policy.network_calls(*([self.sampler] if self.sampler else []))
        return self._policy.act(obs, generator=generator, **given)

    def _warm(self, obs: Observation, at: Ints, rows: Ints, age: Ints, notes: _Notes, generator: Rng) -> Tensor:
        assert self._guess is not None
        guess = self._shifted(self._guess if self._are_all(rows) else self._guess[rows], age, generator)
        settings = {} if self.warm_start is None else {"warm_start": self.warm_start}
        calls = (self.warm_start or self._policy.warm_start).num_calls
        if self._accept_below is None and self._resample_above is None:
            chunk, estimate = self._policy.refine(obs, guess, generator=generator, **settings)
            notes.calls[at] += calls
            notes.disagreements.append((at, lambda: self._disagreement(estimate, guess, age)))
            return chunk
        x, cond, estimate = self._policy.refine_first(obs, guess, generator=generator, **settings)
        notes.calls[at] += 1
        disagreement = self._disagreement(estimate, guess, age)
        notes.disagreements.append((at, lambda: disagreement))
        low = -1.0 if self._accept_below is None else self._accept_below
        high = float("inf") if self._resample_above is None else self._resample_above
        near, far = disagreement < low, disagreement > high
        rest = (~near & ~far).nonzero().flatten()
        chunk = estimate
        if len(rest) == len(at):
            chunk = self._policy.refine_rest(x, cond, generator=generator, **settings)
            notes.calls[at] += calls - 1
        elif len(rest):
            some = take_generators(generator, rest)
            chunk[rest] = self._policy.refine_rest(x[rest], cond[rest], generator=some, **settings)
            notes.calls[at[rest]] += calls - 1
        anew = far.nonzero().flatten()
        if len(anew):
            chunk[anew] = self._fresh(obs.take(anew), at[anew], notes, take_generators(generator, anew))
            notes.resampled[at[anew]] = True
        return chunk

    def _are_all(self, rows: Ints) -> bool:
        """Whether `rows` [K] are all environments in their order."""
        return len(rows) == len(self._all) == np.count_nonzero(rows == self._all)

    def _shifted(self, guess: Tensor, age: Ints, generator: Rng) -> Tensor:
        """Return `guess` [K, H, A] moved on by `age` [K] steps, its tail filled by the rules."""
        noise = None
        if "renoise" in self._tails:
            noise = self._policy.norm.decode("action", randn(*guess.shape, generator=generator, device=guess.device))
        first = int(age[0])
        if np.count_nonzero(age == first) == len(age):
            return self._moved(guess, first, noise)
        moved = torch.empty_like(guess)
        for steps in np.unique(age):
            some = torch.from_numpy(np.flatnonzero(age == steps))
            moved[some] = self._moved(guess[some], int(steps), None if noise is None else noise[some])
        return moved

    def _moved(self, guess: Tensor, steps: int, noise: Tensor | None) -> Tensor:
        """Return `guess` [K, H, A] moved on by `steps`; pure `noise` [K, H, A] is for tails that want it."""
        if steps not in self._moves or self._moves[steps].index.device != guess.device:
            self._moves[steps] = _Move.by(steps, guess, self._tails)
        move = self._moves[steps]
        moved = guess.index_select(1, move.index)
        for rule, where in move.tails.items():
            if rule == "zero":
                moved.masked_fill_(where, 0.0)
            elif rule == "extrapolate":
                last = guess[:, -1:]
                beyond = last + move.beyond * (last - guess[:, -2:-1])
                moved = torch.where(where, self._policy.clip(beyond), moved)
            elif rule == "renoise":
                assert noise is not None
                moved = torch.where(where, noise, moved)
        return moved

    def _disagreement(self, estimate: Tensor, guess: Tensor, age: Ints) -> Tensor:
        """Return the RMS [K] of `estimate` - `guess` in network units over the steps that are no tail, on the CPU."""
        error = (self._difference(estimate, guess)).square().mean(dim=-1)
        inside = torch.arange(guess.shape[1]) < guess.shape[1] - torch.from_numpy(age)[:, None]
        inside = inside.to(error)
        return ((error * inside).sum(dim=1) / inside.sum(dim=1)).sqrt().cpu()

    def _difference(self, one: Tensor, other: Tensor) -> Tensor:
        """Return `one` - `other`, both [K, H, A] in environment units, in network units."""
        return self._policy.norm.encode("action", one) - self._policy.norm.encode("action", other)

    def _keep(self, rows: Ints, chunk: Tensor, known: Bools) -> None:
        """Make `chunk` [K, H, A] the guess of `rows`."""
        if self._guess is None:
            self._guess = chunk.new_zeros(len(self._known), *chunk.shape[1:])
        if self._stall_ticks:
            change = self._difference(chunk, self._guess[rows]).square().mean(dim=(1, 2)).sqrt().cpu().numpy()
            small = known & (change < self._stall_below) & (self._still[rows] < self._stall_ticks)
            self._still[rows] = np.where(small, self._still[rows] + 1, 0)
        guess = chunk if self._clip_factor is None else self._clipped(chunk, self._clip_factor)
        if self._are_all(rows):
            self._guess = guess  # also the caller's, so it is never written into
        else:
            self._guess = self._guess.index_put((torch.from_numpy(rows).to(guess.device),), guess)
        self._known[rows] = True

    def _clipped(self, chunk: Tensor, factor: float) -> Tensor:
        encoded = self._policy.norm.encode("action", chunk)
        ends = self._policy.norm.decode("action", encoded.sign() / factor)
        return torch.where(self._discrete.to(chunk.device), ends, chunk)

    def _count(self, notes: _Notes) -> None:
        plans, warm = len(notes.warm), int(np.count_nonzero(notes.warm))
        self.totals["plans"] += plans
        self.totals["warm"] += warm
        self.totals["fresh"] += plans - warm
        self.totals["resampled"] += int(np.count_nonzero(notes.resampled))
        self.totals["network_calls"] += int(notes.calls.sum())


@dataclass(frozen=True, kw_only=True)
class _Move:
    """How a chunk is moved on by some steps; built once, because every operation counts at one row."""

    index: Tensor
    """[H], the step that comes to each place; beyond the end, the last."""
    beyond: Tensor
    """[H, 1], by how many steps a place is beyond the end."""
    tails: Mapping[Tail, Tensor]
    """Rules other than repeating, and where in a chunk they hold, [H, A] bool."""

    @classmethod
    def by(cls, steps: int, chunk: Tensor, tails: Mapping[Tail, Tensor]) -> _Move:
        """Return the move by `steps` of chunks like `chunk` [K, H, A]; `tails` says which rule each dimension has."""
        last = chunk.shape[1] - 1
        index = torch.arange(chunk.shape[1]) + steps
        beyond = (index - last).clamp_min(0)[:, None]
        used = {rule: ((beyond > 0) & dims).to(chunk.device) for rule, dims in tails.items() if rule != "repeat"}
        return cls(
            index=index.clamp_max(last).to(chunk.device),
            beyond=beyond.to(chunk.device),
            tails={rule: where for rule, where in used.items() if where.any()},
        )


class _Notes(Mapping[str, Tensor]):
    """What a plan says of its K rows, as tensors [K] when they are read: most ticks nobody asks."""

    def __init__(self, *, warm: Bools, resampled: Bools) -> None:
        self.warm, self.resampled = warm, resampled
        self.calls: Ints = np.zeros(len(warm), dtype=np.int64)
        self.disagreements: list[tuple[Ints, Callable[[], Tensor]]] = []
        """Some of the rows, and what works it out for them."""
        self.said: Mapping[str, Tensor] = {}
        """By the policy."""

    def __getitem__(self, name: str) -> Tensor:
        if name in self.said:
            return self.said[name].cpu()
        if name == "disagreement":
            found = torch.full((len(self.warm),), torch.nan)
            for at, work_out in self.disagreements:
                found[at] = work_out()
            return found
        if name not in ("network_calls", "warm", "resampled"):
            raise KeyError(name)
        return torch.from_numpy(getattr(self, name.removeprefix("network_"))).float()

    def __iter__(self) -> Iterator[str]:
        return iter(("network_calls", "warm", "resampled", "disagreement", *self.said))

    def __len__(self) -> int:
        return 4 + len(self.said)


def _tails(spec: TaskSpec, delta: Tail, absolute: Tail) -> dict[Tail, Tensor]:
    """Return each rule that is used and its action dimensions, [A] bool."""
    per_dim: list[Tail] = [
        "repeat" if discrete else (delta if is_delta else absolute)
        for is_delta, discrete in zip(spec.action.delta, spec.action.discrete, strict=True)
    ]
    return {rule: torch.tensor([one == rule for one in per_dim]) for rule in dict.fromkeys(per_dim)}
