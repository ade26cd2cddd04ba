"""Descent on an energy: one step, and the loop that turns a start into a chunk.

    here           EBT-Policy (arXiv:2510.27545) and its code
    x              a, the candidate chunk
    alpha          alpha / temp; with `exp_energy` it is multiplied by exp(E)
    move           v, the momentum
    landing        where a whole step ends

One step, rows independent of each other (but for `rms_batch`, kept to reproduce the published code):

    x    <- x / RMS(x)                       if normalised
    E, g <- energy and its gradient at x + momentum * move
    move <- momentum * move - alpha g        alpha: fixed, learned, or times exp(E)
    x    <- x + share_k * move               share_k: `schedule`

`full` takes whole steps. `harmonic` takes 1/n, 1/(n-1), ..., 1 of them: where a whole step lands on the expected clean
chunk, as the denoising objective teaches, this is Euler's method along the straight paths of flow matching. `flow` is
for energies that are minus a log density (score matching): x goes from `sigma_max` N(0, I) down the levels sigma_k by
(sigma_k - sigma_{k+1}) sigma_k, the probability flow's Euler step.

Rows stop on their own and cost nothing afterwards. A row that meets `stop` takes its whole step, so it ends where that
points to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from robopolicy.errors import UnknownNameError

Normalise = Literal["none", "rms_row", "rms_batch"]
StepSize = Literal["fixed", "learned", "exp_energy"]
Schedule = Literal["full", "harmonic", "flow"]
Stop = Literal["fixed", "gradient_norm", "step_length"]


class Energy(Protocol):
    """An energy of chunks, given what was observed."""

    def __call__(self, x: Tensor, rows: Tensor | None, scale: Tensor | None) -> Tensor:
        """Return the energies [K] of `x` [K, H, A].

        Args:
            rows: [K] int, which observations these belong to; None for all of them in order.
            scale: [K], the RMS that each row of x was divided by; None if it was not.
        """


class Moved(NamedTuple):
    """What one step did, K rows."""

    x: Tensor
    """[K, H, A], the point the step began at, normalised if the rule says so."""
    move: Tensor
    """[K, H, A]; x + move is the landing of a whole step."""
    energy: Tensor
    """[K]"""
    gradient: Tensor
    """[K, H, A]"""


@dataclass(frozen=True, kw_only=True)
class StepRule:
    """How one energy step moves; part of what was learned, so training and sampling share it.

    Args:
        step_size: `fixed` alpha; `learned`, a weight of the policy that starts at alpha; `exp_energy`, alpha exp(E).
        alpha: step size for the energy as the network reads it out (a mean over H x A outputs needs H A times a sum's).
        temperature: divides alpha; EBT-Policy has 1, in its later version 9.
        energy_cap: exp(E) counts energies above this as this.
        momentum: Nesterov's; 0 for none, EBT-Policy has 0.9.
        normalise: divide each iterate by its RMS: per row, or over the whole batch as the published code does (its rows
            then depend on each other).
    """

    step_size: StepSize = "learned"
    alpha: float = 1.0
    temperature: float = 1.0
    energy_cap: float = 3.0
    momentum: float = 0.0
    normalise: Normalise = "none"

    def __post_init__(self) -> None:
        _check_name("step size", self.step_size, StepSize)
        _check_name("normalisation", self.normalise, Normalise)
        for name in ("alpha", "temperature", "energy_cap"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1); got {self.momentum}.")

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return `x` [K, H, A] divided by its RMS, and the RMS [K]; or x and None."""
        if self.normalise == "none":
            return x, None
        square = x.square()
        mean = square.mean().expand(len(x)) if self.normalise == "rms_batch" else square.mean(dim=(1, 2))
        rms = (mean + 1e-12).sqrt()
        return x / rms[:, None, None], rms

    def __call__(
        self,
        energy: Energy,
        x: Tensor,
        move: Tensor | None,
        alpha: Tensor | float,
        *,
        rows: Tensor | None = None,
        create_graph: bool = False,
        scale: Tensor | None = None,
    ) -> Moved:
        """Return the whole step from `x` [K, H, A] (normalised) with the momentum `move`; gradients must be enabled.

        Args:
            alpha: step size, a number or one per row [K, 1, 1]; temperature and exp(E) still apply.
            create_graph: keep what a derivative of the step needs.
        """
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        ahead = x if move is None or not self.momentum else x + self.momentum * move
        value = energy(ahead, rows, scale)
        (gradient,) = torch.autograd.grad(value.sum(), ahead, create_graph=create_graph)
        size = alpha / self.temperature
        if self.step_size == "exp_energy":
            size = size * value.clamp_max(self.energy_cap).exp()[:, None, None]
        step = -size * gradient
        if move is not None and self.momentum:
            step = self.momentum * move + step
        return Moved(x, step, value, gradient)


@dataclass(frozen=True, kw_only=True, eq=False)
class Diagnostics:
    """What a descent knew of each of its B rows when it ended; the higher, the less sure."""

    energy: Tensor
    """[B], at the last point where it was evaluated."""
    energy_drop: Tensor
    """[B], by how much the energy fell after the first step: a sure descent is as good as there by then. Energies of
    different observations differ by a free offset, this difference does not."""
    gradient_norm: Tensor
    """[B], of the energy at that last point."""
    num_steps: Tensor
    """[B] int64, energy steps taken."""

    def to_rows(self) -> list[dict[str, float]]:
        """Return one mapping of plain numbers per row."""
        columns = {name: value.tolist() for name, value in vars(self).items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@dataclass(frozen=True, kw_only=True, eq=False)
class CandidateDiagnostics(Diagnostics):
    """Of the chosen one of several descents per row."""

    disagreement: Tensor
    """[B], standard deviation of the chunks that the descents found, mean over their numbers, in network units."""


@dataclass(frozen=True, kw_only=True)
class Descent:
    """The loop: how many steps, how long each, and when a row has had enough.

    Args:
        max_steps: energy steps at most.
        schedule: `full`, `harmonic` or `flow`; see the module.
        stop: `fixed`: all steps; `gradient_norm`: a row stops where its gradient's norm is at most `tolerance`;
            `step_length`: where the landing moved by at most `tolerance` (RMS) since the step before.
        tolerance: for `stop`, in network units (the data's range is 2).
        warm_steps: steps from a guess instead of from noise.
        warm_noise: standard deviation of the noise added to a guess.
        sigma_min: last level of `flow` before 0.
        sigma_max: first level of `flow`, by which the starting noise is multiplied.
    """

    max_steps: int = 4
    schedule: Schedule = "full"
    stop: Stop = "fixed"
    tolerance: float = 0.02
    warm_steps: int = 2
    warm_noise: float = 0.1
    sigma_min: float = 0.02
    sigma_max: float = 2.0

    def __post_init__(self) -> None:
        _check_name("descent schedule", self.schedule, Schedule)
        _check_name("stopping rule", self.stop, Stop)
        for name in ("max_steps", "warm_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("tolerance", "warm_noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}.")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"flow needs 0 < sigma_min < sigma_max; got {self.sigma_min} and {self.sigma_max}.")

    @property
    def num_calls(self) -> int:
        """Energy steps from a guess, at most."""
        return self.warm_steps

    @property
    def start_scale(self) -> float:
        """Standard deviation of the noise that a chunk starts from."""
        return self.sigma_max if self.schedule == "flow" else 1.0

    def shares(self, num_steps: int, *, highest: float | None = None) -> tuple[float, ...]:
        """Return the factor on each of `num_steps` steps; `highest` is the first level of `flow`."""
        if self.schedule == "full":
            return (1.0,) * num_steps
        if self.schedule == "harmonic":
            return tuple(1.0 / (num_steps - k) for k in range(num_steps))
        top = max(highest or self.sigma_max, self.sigma_min)
        ratio = (self.sigma_min / top) ** (1 / max(1, num_steps - 1))
        levels = [top * ratio**k for k in range(num_steps)] + [0.0]
        return tuple(high * (high - low) for high, low in itertools.pairwise(levels))

    def __call__(
        self,
        energy: Energy,
        start: Tensor,
        rule: StepRule,
        alpha: Tensor | float,
        *,
        warm: bool = False,
        record: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Diagnostics]:
        """Return the chunk [B, H, A] reached from `start` [B, H, A], detached, and what was seen on the way.

        Args:
            warm: `start` is a noised guess: `warm_steps` from level `warm_noise`.
            record: called with every iterate [B, H, A], the start and the end included.
        """
        shares = self.shares(self.warm_steps, highest=self.warm_noise) if warm else self.shares(self.max_steps)
        state = _State(start.detach())
        with torch.enable_grad():
            for k, share in enumerate(shares):
                if record is not None:
                    record(state.x)
                moving = None if self.stop == "fixed" else state.moving
                if moving is not None and len(moving) == 0:
                    break
                self._step(energy, state, rule, alpha, k, share, moving, last=k == len(shares) - 1)
        if record is not None:
            record(state.x)
        return state.x, state.diagnostics()

    def _step(
        self,
        energy: Energy,
        state: _State,
        rule: StepRule,
        alpha: Tensor | float,
        k: int,
        share: float,
        rows: Tensor | None,
        *,
        last: bool,
    ) -> None:
        x, move = _take(state.x, rows), _take(state.move, rows)
        x, scale = rule.normalised(x)
        moved = rule(energy, x, move if k else None, alpha, rows=rows, scale=scale)
        with torch.no_grad():
            # a share below 1 moves part of the way; in `flow` shares are step sizes, and no step is whole
            whole = moved.x + (share * moved.move if self.schedule == "flow" else moved.move)
            after = whole if last or self.schedule != "harmonic" else moved.x + share * moved.move
            new = {"x": after, "move": moved.move, "energy": moved.energy}
            if k <= 1:
                new["baseline"] = moved.energy
            if last or self.stop != "fixed":
                new["norm"] = norm = moved.gradient.flatten(1).norm(dim=1)
            if self.stop != "fixed":
                new["done"] = done = self._done(norm, whole, _take(state.landing, rows) if k else None)
                new["x"] = torch.where(done[:, None, None], whole, after)
                new["landing"] = whole
            state.put(rows, k, new)

    def _done(self, norm: Tensor, landing: Tensor, before: Tensor | None) -> Tensor:
        """Return which rows stop, [K] bool: by the gradient's `norm` [K], or by how far the landing moved."""
        if self.stop == "gradient_norm":
            return norm <= self.tolerance
        if before is None:
            return torch.zeros_like(norm, dtype=torch.bool)
        return (landing - before).square().mean(dim=(1, 2)).sqrt() <= self.tolerance


class _State:
    """All rows of a descent: iterate, momentum, last landing, and what the diagnostics need."""

    def __init__(self, start: Tensor) -> None:
        size, there = len(start), start.device
        self.x = start
        self.move = torch.zeros_like(start)
        self.landing = start
        self.energy = torch.zeros(size, device=there)
        self.baseline = self.energy
        self.norm = self.energy
        self.num_steps = torch.zeros(size, dtype=torch.int64, device=there)
        self.done = torch.zeros(size, dtype=torch.bool, device=there)

    @property
    def moving(self) -> Tensor | None:
        """[K] int, the rows that have not stopped; None while all of them move."""
        return (~self.done).nonzero().flatten() if bool(self.done.any()) else None

    def put(self, rows: Tensor | None, k: int, new: Mapping[str, Tensor]) -> None:
        """Note what step `k` found for `rows` [K] (None: all)."""
        for name, value in new.items():
            if rows is not None:
                value = getattr(self, name).index_copy(0, rows, value.to(getattr(self, name).dtype))
            setattr(self, name, value.detach())
        if rows is None:
            self.num_steps = torch.full_like(self.num_steps, k + 1)
        else:
            self.num_steps = self.num_steps.index_fill(0, rows, k + 1)

    def diagnostics(self) -> Diagnostics:
        return Diagnostics(
            energy=self.energy,
            energy_drop=self.baseline - self.energy,
            gradient_norm=self.norm,
            num_steps=self.num_steps,
        )


def _take(value: Tensor, rows: Tensor | None) -> Tensor:
    return value if rows is None else value[rows]


def _check_name(what: str, name: str, kind: Any) -> None:
    if name not in get_args(kind):
        raise UnknownNameError(what, name, get_args(kind))
