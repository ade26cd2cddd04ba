"""What an energy is trained on: which error is minimised, from which starts, and how far its derivative reaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from robopolicy.errors import UnknownNameError

ObjectiveKind = Literal["mse_all_steps", "mse_last_step", "denoise", "score", "infonce"]
Graph = Literal["per_step_detach", "momentum_path", "truncated_last", "full_bptt"]
TrainNoise = Literal["none", "cosine"]
Corruption = Literal["interpolate", "add"]

UNROLLED = ("mse_all_steps", "mse_last_step", "denoise")
"""Objectives that take energy steps; the others have no step size to learn."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised.

    Args:
        kind: `mse_all_steps` and `mse_last_step`: from pure noise, the squared error of every step or of the last.
            `denoise`: the same, of every step, from the noised target. `score`: denoising score matching on the target
            plus noise, |sigma grad E - eps|^2. `infonce`: the target among noise and own iterates.
        min_steps, max_steps: energy steps of a training pass, drawn uniformly; infonce's iterates take `max_steps`.
        graph: what a step's derivative reaches. `per_step_detach`: that step; `momentum_path`: earlier ones through the
            momentum; `truncated_last`: the last step alone is derived; `full_bptt`: everything.
        train_noise: `cosine` adds noise from 0.2 down to about 0.01 to the iterate before each step, as published.
        alpha_jitter: step sizes are multiplied by U[1 / jitter, jitter] per row; EBT-Policy has 1.5.
        corruption: of `denoise`: `interpolate` to (1 - sigma) target + sigma noise, pure noise at sigma 1; `add` it to
            the target.
        sigma_min, sigma_max: noise of `denoise` and `score`, log-uniform between the two.
        pure_share: share of rows of `denoise` that start from pure noise besides.
        num_negatives: candidates of `infonce` beside the target, half of them own iterates.
    """

    kind: ObjectiveKind = "denoise"
    min_steps: int = 1
    max_steps: int = 1
    graph: Graph = "per_step_detach"
    train_noise: TrainNoise = "none"
    alpha_jitter: float = 1.0
    corruption: Corruption = "interpolate"
    sigma_min: float = 0.02
    sigma_max: float = 1.0
    pure_share: float = 0.0
    num_negatives: int = 16

    def __post_init__(self) -> None:
        for what, name, kind in (
            ("objective", self.kind, ObjectiveKind),
            ("graph mode", self.graph, Graph),
            ("train noise", self.train_noise, TrainNoise),
            ("corruption", self.corruption, Corruption),
        ):
            known = get_args(kind)
            if name not in known:
                raise UnknownNameError(what, name, known)
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(f"1 <= min_steps <= max_steps; got {self.min_steps} and {self.max_steps}.")
        if self.graph == "truncated_last" and self.kind == "mse_all_steps":
            raise ValueError("truncated_last derives the last step only: use it with mse_last_step or denoise.")
        if not self.alpha_jitter >= 1:
            raise ValueError(f"alpha_jitter must be at least 1 (none); got {self.alpha_jitter}.")
        if not 0 < self.sigma_min <= self.sigma_max:
            raise ValueError(f"0 < sigma_min <= sigma_max; got {self.sigma_min} and {self.sigma_max}.")
        if self.kind == "denoise" and self.corruption == "interpolate" and self.sigma_max > 1:
            raise ValueError(f"interpolate is pure noise at sigma 1; got sigma_max={self.sigma_max}.")
        if not 0 <= self.pure_share <= 1:
            raise ValueError(f"pure_share must be in [0, 1]; got {self.pure_share}.")
        if self.num_negatives < 2:
            raise ValueError(f"num_negatives must be at least 2; got {self.num_negatives}.")

    @property
    def on_all_steps(self) -> bool:
        """Whether every step's error counts, not the last one's alone."""
        return self.kind != "mse_last_step" and self.graph != "truncated_last"

    def noise_std(self, step: int, num_steps: int) -> float:
        """Return the standard deviation of the training noise before `step` of `num_steps` (EBT-Policy's cosine)."""
        if self.train_noise == "none":
            return 0.0
        return 0.002 + 0.099 * (1.0 + float(torch.cos(torch.tensor(torch.pi * step / num_steps))))
