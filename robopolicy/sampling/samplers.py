"""DDPM's and DDIM's ancestral steps over any descending list of noise levels.

A sampler is a frozen value: called with a field and a start it returns a clean chunk, knows no network and remembers
nothing. Both samplers make the same kind of step, whose weights depend on the levels alone:

    clean <- clip(x_weight * x + output_weight * output)
    x     <- from_clean * clean + from_x * x + from_output * output + noise_std * fresh noise

so the weights are worked out once per (sampler, schedule, prediction, levels) as Python floats, and a step costs a
handful of tensor operations. `scheduler.step` of diffusers works them out again at each step and took six times as
long at batch 1 (scripts/bench_policy.py); tests hold both to the same numbers.

    DDPM   Ho et al. 2020 (arXiv:2006.11239), eq. 7; the posterior q(x_next | x, clean) for the NEXT LISTED level
    DDIM   Song et al. 2021 (arXiv:2010.02502), eq. 12 and 16; the noise is that of the unclipped prediction

The step after the last listed level always goes to the clean chunk. For lists where diffusers' DDIM steps by a fixed
stride past the next listed level (`linspace`, uneven `trailing`), the next listed level is used here.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from robopolicy.errors import UnknownNameError
from robopolicy.rng import Rng, randn
from robopolicy.sampling.prediction import Linear, Prediction, check_prediction, clean_from, noise_from
from robopolicy.sampling.schedule import NoiseSchedule

Field = Callable[[Tensor, Tensor], Tensor]
"""(x [B, H, A], level [B] int64) -> the prediction [B, H, A]."""

Spacing = Literal["leading", "trailing", "linspace"]


class Sampler(Protocol):
    """Turns a field and a starting point into a chunk."""

    def timesteps(self, schedule: NoiseSchedule) -> tuple[int, ...]:
        """Return the descending levels that a chunk started from pure noise goes through."""

    def __call__(
        self,
        field: Field,
        start: Tensor,
        schedule: NoiseSchedule,
        prediction: Prediction,
        *,
        generator: Rng = None,
        timesteps: Sequence[int] | None = None,
    ) -> Tensor:
        """Return the clean chunk [B, H, A] reached from `start` [B, H, A] at level `timesteps[0]`."""


class Step(NamedTuple):
    """One step of the chain; see the module's docstring."""

    level: int
    clean: Linear
    from_clean: float
    from_x: float
    from_output: float
    noise_std: float


@dataclass(frozen=True, kw_only=True)
class DDPMSampler:
    """Stochastic ancestral sampling; with fewer levels than the schedule has, the posterior of the sub-sequence.

    `clip_sample` keeps each predicted clean chunk in [-1, 1], the range of normalised actions.
    """

    num_inference_steps: int = 100
    spacing: Spacing = "leading"
    clip_sample: bool = True

    def __post_init__(self) -> None:
        _check(self.num_inference_steps, self.spacing)

    def timesteps(self, schedule: NoiseSchedule) -> tuple[int, ...]:
        return spaced_timesteps(schedule, self.num_inference_steps, self.spacing)

    def __call__(
        self,
        field: Field,
        start: Tensor,
        schedule: NoiseSchedule,
        prediction: Prediction,
        *,
        generator: Rng = None,
        timesteps: Sequence[int] | None = None,
    ) -> Tensor:
        levels = self.timesteps(schedule) if timesteps is None else tuple(timesteps)
        steps = ddpm_steps(schedule, prediction, levels)
        return run_steps(field, start, steps, clip=self.clip_sample, generator=generator)


@dataclass(frozen=True, kw_only=True)
class DDIMSampler:
    """Few-step sampling; deterministic for `eta` 0, as noisy as the DDPM posterior for `eta` 1.

    `clip_sample` keeps each predicted clean chunk in [-1, 1], the range of normalised actions.
    """

    num_inference_steps: int = 10
    eta: float = 0.0
    spacing: Spacing = "leading"
    clip_sample: bool = True

    def __post_init__(self) -> None:
        _check(self.num_inference_steps, self.spacing)
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must be in [0, 1]; got {self.eta}.")

    def timesteps(self, schedule: NoiseSchedule) -> tuple[int, ...]:
        return spaced_timesteps(schedule, self.num_inference_steps, self.spacing)

    def __call__(
        self,
        field: Field,
        start: Tensor,
        schedule: NoiseSchedule,
        prediction: Prediction,
        *,
        generator: Rng = None,
        timesteps: Sequence[int] | None = None,
    ) -> Tensor:
        levels = self.timesteps(schedule) if timesteps is None else tuple(timesteps)
        steps = ddim_steps(schedule, prediction, levels, self.eta)
        return run_steps(field, start, steps, clip=self.clip_sample, generator=generator)


def run_steps(field: Field, start: Tensor, steps: Sequence[Step], *, clip: bool, generator: Rng = None) -> Tensor:
    """Return the end of the chain of `steps` from `start` [B, H, A]; `generator` draws the fresh noise."""
    x = start
    levels = torch.tensor([step.level for step in steps], device=start.device)[:, None].expand(-1, len(start))
    for step, level in zip(steps, levels, strict=True):
        output = field(x, level)
        if output.dtype != x.dtype:  # mixed precision: the chain itself stays in the start's
            output = output.to(x.dtype)
        clean = combine(step.clean, x, output)
        following = clean.clamp(-1.0, 1.0).mul_(step.from_clean) if clip else clean * step.from_clean
        if step.from_x:
            following.add_(x, alpha=step.from_x)
        if step.from_output:
            following.add_(output, alpha=step.from_output)
        if step.noise_std:
            noise = randn(*x.shape, generator=generator, device=x.device)
            following.add_(noise.to(x.dtype), alpha=step.noise_std)
        x = following
    return x


@functools.lru_cache(maxsize=256)
def ddpm_steps(schedule: NoiseSchedule, prediction: Prediction, levels: tuple[int, ...]) -> tuple[Step, ...]:
    """Return the weights of q(x_next | x, clean) along `levels`; the last step goes to the clean chunk.

    Raises:
        ValueError: `levels` is empty, not strictly descending, or leaves the schedule.
    """
    return tuple(posterior_step(prediction, *pair) for pair in _pairs(schedule, prediction, levels))


def posterior_step(prediction: Prediction, level: int, here: float, there: float) -> Step:
    """Return the weights of q(x_there | x_here, clean) between two alpha_bars, the network being asked at `level`."""
    ratio = here / there  # alpha of the whole stride
    beta = 1 - ratio
    return Step(
        level=level,
        clean=clean_from(prediction, here),
        from_clean=there**0.5 * beta / (1 - here),
        from_x=ratio**0.5 * (1 - there) / (1 - here),
        from_output=0.0,
        noise_std=((1 - there) / (1 - here) * beta) ** 0.5,
    )


@functools.lru_cache(maxsize=256)
def ddim_steps(
    schedule: NoiseSchedule, prediction: Prediction, levels: tuple[int, ...], eta: float
) -> tuple[Step, ...]:
    """Return the weights of DDIM's steps along `levels`; the last step goes to the clean chunk.

    Raises:
        ValueError: `levels` is empty, not strictly descending, or leaves the schedule.
    """
    steps = []
    for level, here, there in _pairs(schedule, prediction, levels):
        std = eta * ((1 - there) / (1 - here) * (1 - here / there)) ** 0.5
        direction = (1 - there - std**2) ** 0.5
        noise = noise_from(prediction, here)
        steps.append(
            Step(
                level=level,
                clean=clean_from(prediction, here),
                from_clean=there**0.5,
                from_x=direction * noise.x_weight,
                from_output=direction * noise.output_weight,
                noise_std=std,
            )
        )
    return tuple(steps)


@functools.lru_cache(maxsize=64)
def spaced_timesteps(schedule: NoiseSchedule, num_inference_steps: int, spacing: Spacing) -> tuple[int, ...]:
    """Return diffusers' descending levels for `num_inference_steps` of `schedule`.

    `leading` (Diffusion Policy) ends at 0 and starts below the top; `trailing` starts at the top and ends above 0;
    `linspace` has both ends.
    """
    from diffusers import DDPMScheduler  # a second to import, so only when a sampler is used

    scheduler: Any = DDPMScheduler(num_train_timesteps=schedule.num_train_timesteps, timestep_spacing=spacing)
    scheduler.set_timesteps(num_inference_steps)
    return tuple(scheduler.timesteps.tolist())


def check_timesteps(schedule: NoiseSchedule, timesteps: Sequence[int]) -> tuple[int, ...]:
    """Return `timesteps` as a tuple.

    Raises:
        ValueError: it is empty, not strictly descending, or leaves the schedule.
    """
    levels = tuple(int(level) for level in timesteps)
    top = schedule.num_train_timesteps - 1
    descending = all(a > b for a, b in itertools.pairwise(levels))
    if not levels or not descending or levels[0] > top or levels[-1] < 0:
        raise ValueError(f"Timesteps must descend strictly within [{top}, 0]; got {list(levels)}.")
    return levels


def _pairs(
    schedule: NoiseSchedule, prediction: Prediction, timesteps: tuple[int, ...]
) -> list[tuple[int, float, float]]:
    """Return (level, its alpha_bar, alpha_bar of the next one) along `timesteps`."""
    check_prediction(prediction)
    levels = check_timesteps(schedule, timesteps)
    alpha_bar = [*(schedule.alpha_bar[level] for level in levels), 1.0]
    return list(zip(levels, alpha_bar[:-1], alpha_bar[1:], strict=True))


def combine(weights: Linear, x: Tensor, output: Tensor) -> Tensor:
    """Return the linear map of `weights`, [B, H, A]."""
    if weights.x_weight == 0.0 and weights.output_weight == 1.0:
        return output
    return torch.add(output * weights.output_weight, x, alpha=weights.x_weight)


def _check(num_inference_steps: int, spacing: str) -> None:
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1; got {num_inference_steps}.")
    if spacing not in get_args(Spacing):
        raise UnknownNameError("timestep spacing", spacing, get_args(Spacing))
