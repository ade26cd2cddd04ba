"""The noise schedule of a diffusion process; it fixes what the network learns, so it is saved with the policy.

    here              Ho et al. 2020 (arXiv:2006.11239)     diffusers
    level t           t - 1 (levels count from 0)           timestep
    alpha_bar[t]      \\bar{alpha}_t                         alphas_cumprod[t]
    signal, sigma     sqrt(alpha_bar), sqrt(1 - alpha_bar)

A chunk at level t is `signal[t] * clean + sigma[t] * noise`. The betas are diffusers' own, so that checkpoints mean
the same there and here.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from robopolicy.errors import UnknownNameError

BetaSchedule = Literal["squaredcos_cap_v2", "linear", "scaled_linear", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """`num_train_timesteps` noise levels; 0 is the cleanest, `num_train_timesteps - 1` is almost pure noise.

    The default, a squared cosine over 100 levels, is Diffusion Policy's. `beta_start` and `beta_end` are ignored by
    `squaredcos_cap_v2`.
    """

    num_train_timesteps: int = 100
    beta_schedule: BetaSchedule = "squaredcos_cap_v2"
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        known = get_args(BetaSchedule)
        if self.beta_schedule not in known:
            raise UnknownNameError("beta schedule", self.beta_schedule, known)
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1; got {self.num_train_timesteps}.")

    @property
    def alpha_bar(self) -> tuple[float, ...]:
        """Share of the signal's variance kept at each level; falls with the level."""
        return _alpha_bar(self)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Return (signal, sigma), each [num_train_timesteps] float32."""
        alpha_bar = torch.tensor(self.alpha_bar, dtype=torch.float64)
        return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()

    def add_noise(self, clean: Tensor, noise: Tensor, level: int) -> Tensor:
        """Return `clean` [B, H, A] brought to `level` with `noise` [B, H, A]."""
        alpha_bar = self.alpha_bar[level]
        return alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `NoiseSchedule(**data)` inverts it."""
        return dataclasses.asdict(self)


@functools.lru_cache(maxsize=32)
def _alpha_bar(schedule: NoiseSchedule) -> tuple[float, ...]:
    from diffusers import DDPMScheduler  # a second to import, so only when a schedule is used

    scheduler: Any = DDPMScheduler(**schedule.to_dict())
    return tuple(scheduler.alphas_cumprod.tolist())
