"""How a chunk is restarted from a guess: where the chain begins, and by which steps it comes down.

Real-time iteration (arXiv 2508.05396) feeds the previous chunk, shifted in time, to a sampler's last few steps. The
published recipe and ours differ in switches, which are fields of `WarmStart` here:

    start    raw               x = guess, as released: taken for a sample of level K' without its scale or noise
             scaled            x = signal * guess
             renoise           x = signal * guess + sigma * noise: distributed as what the network was trained on
             renoise_tail      as renoise, with sigma growing along the chunk: a guess's far end is the least sure
             noise             pure noise, the guess is ignored: the control that shows what a guess is worth
    stepper  ddpm_relabel      as released: each listed level t steps to t - 1, whatever the next listed one is
             ddpm_posterior    q(x_next | x, clean) of the next LISTED level
             ddim              DDIM along the list
    betas    matched           those that the network was trained on
             released_default  as the release evaluates: diffusers' linear betas, whatever the network was trained on

For a Gaussian posterior the share of a guess's error that survives is known in closed form (tests/test_warm_start.py).
`FlowWarmStart` is the same idea for flow matching: restart at time tau on (1 - tau) * noise + tau * guess.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from robopolicy.errors import RobopolicyError, UnknownNameError
from robopolicy.rng import Rng, randn
from robopolicy.sampling.flow import even_times
from robopolicy.sampling.prediction import Prediction
from robopolicy.sampling.samplers import Step, check_timesteps, ddim_steps, ddpm_steps, posterior_step
from robopolicy.sampling.schedule import NoiseSchedule

Start = Literal["raw", "scaled", "renoise", "renoise_tail", "noise"]
Stepper = Literal["ddpm_relabel", "ddpm_posterior", "ddim"]
Betas = Literal["matched", "released_default"]


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """Restarts a diffusion sampler at level `timesteps[0]` (called K') from a guess in network units.

    Args:
        timesteps: levels from K' down to 0, one network call each.
        start, stepper, betas: see the module.
        eta: noise of `ddim`; 0 is deterministic.
        tail_growth: `renoise_tail`'s sigma at the far end of the chunk, as a multiple of that at its start.
        clip_sample: keep each predicted clean chunk in [-1, 1], the range of normalised actions.
    """

    timesteps: tuple[int, ...]
    start: Start = "renoise"
    stepper: Stepper = "ddpm_posterior"
    betas: Betas = "matched"
    eta: float = 0.0
    tail_growth: float = 2.0
    clip_sample: bool = True

    def __post_init__(self) -> None:
        for what, name, known in (
            ("start of a warm start", self.start, get_args(Start)),
            ("stepper", self.stepper, get_args(Stepper)),
            ("betas of a warm start", self.betas, get_args(Betas)),
        ):
            if name not in known:
                raise UnknownNameError(what, name, known)
        levels = tuple(int(level) for level in self.timesteps)
        object.__setattr__(self, "timesteps", levels)  # lists come from configs; a value must be hashable
        descending = all(a > b for a, b in itertools.pairwise(levels))
        if not levels or not descending or levels[-1] != 0:
            raise RobopolicyError(
                f"The timesteps of a warm start must descend strictly and end at 0, [7, 3, 0] for example; got "
                f"{list(levels)}."
            )
        if not 0.0 <= self.eta <= 1.0:
            raise RobopolicyError(f"eta must be in [0, 1]; got {self.eta}.")
        if self.tail_growth < 1.0:
            raise RobopolicyError(f"tail_growth must be at least 1; got {self.tail_growth}.")

    @property
    def num_calls(self) -> int:
        """Network calls per warm-started chunk."""
        return len(self.timesteps)

    def check(self, schedule: NoiseSchedule) -> None:
        """Raise RobopolicyError if K' lies beyond `schedule`."""
        top = schedule.num_train_timesteps - 1
        if self.timesteps[0] > top:
            raise RobopolicyError(
                f"A warm start at level {self.timesteps[0]} lies beyond the policy's noise schedule, whose highest "
                f"level is {top}."
            )

    def schedule(self, trained_on: NoiseSchedule) -> NoiseSchedule:
        """Return the schedule that steps are taken with; only `released_default` is not the policy's own."""
        if self.betas == "matched":
            return trained_on
        return NoiseSchedule(num_train_timesteps=trained_on.num_train_timesteps, beta_schedule="linear")

    def steps(self, trained_on: NoiseSchedule, prediction: Prediction) -> tuple[Step, ...]:
        """Return the weights of the chain from K' to the clean chunk."""
        schedule = self.schedule(trained_on)
        if self.stepper == "ddpm_relabel":
            return relabel_steps(schedule, prediction, self.timesteps)
        if self.stepper == "ddim":
            return ddim_steps(schedule, prediction, self.timesteps, self.eta)
        return ddpm_steps(schedule, prediction, self.timesteps)

    def begin(self, guess: Tensor, trained_on: NoiseSchedule, *, generator: Rng = None) -> Tensor:
        """Return where the chain starts, [B, H, A], from `guess` [B, H, A] in network units."""
        if self.start == "raw":
            return guess
        alpha_bar = self.schedule(trained_on).alpha_bar[self.timesteps[0]]
        signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.start == "scaled":
            return signal * guess
        noise = randn(*guess.shape, generator=generator, device=guess.device).to(guess.dtype)
        if self.start == "renoise":
            return torch.add(signal * guess, noise, alpha=sigma)
        if self.start == "noise":
            return noise
        growth = torch.linspace(1.0, self.tail_growth, guess.shape[1], dtype=guess.dtype, device=guess.device)
        return signal * guess + (sigma * growth).clamp_max(1.0)[:, None] * noise


@dataclass(frozen=True, kw_only=True)
class FlowWarmStart:
    """Restarts a flow at time `tau` from a guess in network units, with `num_inference_steps` even steps to time 1.

    `start` is one of raw (x = guess), scaled (x = tau * guess) and renoise (x = (1 - tau) * noise + tau * guess).
    """

    tau: float
    num_inference_steps: int = 3
    start: Start = "renoise"

    def __post_init__(self) -> None:
        if not 0.0 <= self.tau < 1.0:
            raise RobopolicyError(f"A flow restarts at a time tau in [0, 1), 1 being clean; got {self.tau}.")
        if self.num_inference_steps < 1:
            raise RobopolicyError(f"num_inference_steps must be at least 1; got {self.num_inference_steps}.")
        known = ("raw", "scaled", "renoise")
        if self.start not in known:
            raise UnknownNameError("start of a flow's warm start", self.start, known)

    @property
    def num_calls(self) -> int:
        """Network calls per warm-started chunk."""
        return self.num_inference_steps

    @property
    def times(self) -> tuple[float, ...]:
        """Where the steps begin; the last ends at 1."""
        return even_times(self.tau, self.num_inference_steps)

    def begin(self, guess: Tensor, *, generator: Rng = None) -> Tensor:
        """Return where the flow restarts, [B, H, A], from `guess` [B, H, A] in network units."""
        if self.start == "raw":
            return guess
        if self.start == "scaled":
            return self.tau * guess
        noise = randn(*guess.shape, generator=generator, device=guess.device).to(guess.dtype)
        return torch.add(self.tau * guess, noise, alpha=1 - self.tau)


@functools.lru_cache(maxsize=256)
def relabel_steps(schedule: NoiseSchedule, prediction: Prediction, levels: tuple[int, ...]) -> tuple[Step, ...]:
    """Return DDPM's steps from each listed level t to t - 1, which the next step takes for the next listed level.

    What stepping a scheduler of diffusers 0.11 through a list of one's own does; not a sampler of the sub-sequence.
    """
    bars = (*schedule.alpha_bar, 1.0)  # the last stands before the first: level 0 goes to the clean chunk
    listed: Sequence[int] = check_timesteps(schedule, levels)
    return tuple(posterior_step(prediction, level, bars[level], bars[level - 1]) for level in listed)


def surviving_share(signal: float, sigma: float, spread: float, *, deterministic: bool = False) -> float:
    """Return the share of a guess's error that a restart at `signal` * guess + `sigma` * noise leaves.

    Exact for the best network of a Gaussian posterior of standard deviation `spread`: for a chain of posterior steps
    whatever its list, and, if `deterministic`, in the limit of fine steps of DDIM or of a flow.
    """
    kept = signal**2 * spread**2
    if kept == 0.0:
        return 0.0
    share = kept / (kept + sigma**2)
    return float(share**0.5) if deterministic else share


def switch_probability(
    signal: float, sigma: float, half_gap: float, spread: float, *, weight: float = 0.5, start: Start = "renoise"
) -> float:
    """Return how likely a restart from one of two modes ends in the other; the chain draws noise at every step.

    Args:
        signal, sigma: of the level at which it restarts.
        half_gap, spread: the modes are Gaussians of standard deviation `spread` at -half_gap (the guess) and half_gap.
        weight: posterior probability of the other mode, in (0, 1).
        start: raw, scaled or renoise.
    """
    if not 0.0 < weight < 1.0:
        raise ValueError(f"The weight of the other mode must be in (0, 1); got {weight}.")
    variance = signal**2 * spread**2 + sigma**2
    if variance == 0.0:
        return 0.0
    where = {"raw": -half_gap, "scaled": -signal * half_gap, "renoise": -signal * half_gap}[start]
    noise = np.linspace(-8.0, 8.0, 1601) if start == "renoise" else np.zeros(1)
    density = np.exp(-(noise**2) / 2)
    x = where + variance**0.5 * noise
    log_odds = np.log(weight / (1 - weight)) + 2 * signal * half_gap * x / variance
    return float((density / (1 + np.exp(-np.clip(log_odds, -700, 700)))).sum() / density.sum())
