"""Flow matching along straight paths (Lipman et al. 2023, arXiv:2210.02747), and samplers that follow the flow.

    here          paper
    time t        t: 0 is noise, 1 is clean
    noise         x_0
    clean         x_1
    x             x_t = (1 - t) noise + t clean
    velocity      u_t = dx_t / dt = clean - noise

A network may predict the velocity, or the clean chunk, from which the velocity follows: (clean - x) / (1 - t).
A sampler is a frozen value: called with a velocity and a start it returns a clean chunk, knows no network and remembers
nothing. Times are floats that all rows share.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from robopolicy.errors import RobopolicyError, UnknownNameError

Velocity = Callable[[Tensor, float], Tensor]
"""(x [B, H, A], time) -> dx/dt [B, H, A]."""

FlowPrediction = Literal["velocity", "sample"]
FlowMethod = Literal["euler", "midpoint"]


def check_flow_prediction(kind: str) -> None:
    """Raise UnknownNameError unless `kind` is one of the two."""
    if kind not in get_args(FlowPrediction):
        raise UnknownNameError("prediction of a flow", kind, get_args(FlowPrediction))


def velocity_from(kind: FlowPrediction, x: Tensor, output: Tensor, time: float) -> Tensor:
    """Return the velocity at `x` from the network's output there, all [B, H, A]; `time` is below 1."""
    return output if kind == "velocity" else (output - x) / (1.0 - time)


def clean_from_velocity(x: Tensor, velocity: Tensor, time: float) -> Tensor:
    """Return the clean chunk that `velocity` at `x` points to, all [B, H, A]."""
    return torch.add(x, velocity, alpha=1.0 - time)


@dataclass(frozen=True, kw_only=True)
class FlowSampler:
    """Follows a flow from its first time to 1.

    Args:
        num_inference_steps: even steps from 0 to 1.
        method: euler, first order, one network call per step; or midpoint, second order, two calls per step.
        times: where the steps begin, instead of even ones: ascending in [0, 1). The last step ends at 1.

    Raises:
        RobopolicyError: there is no step, or `times` do not ascend within [0, 1).
    """

    num_inference_steps: int = 8
    method: FlowMethod = "euler"
    times: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.method not in get_args(FlowMethod):
            raise UnknownNameError("method of a flow sampler", self.method, get_args(FlowMethod))
        if self.num_inference_steps < 1:
            raise RobopolicyError(f"num_inference_steps must be at least 1; got {self.num_inference_steps}.")
        if self.times is not None:
            object.__setattr__(self, "times", check_times(self.times))  # lists come from configs

    @property
    def steps(self) -> tuple[tuple[float, float], ...]:
        """Begin and end of each step."""
        begins = self.times or even_times(0.0, self.num_inference_steps)
        return tuple(itertools.pairwise((*begins, 1.0)))

    @property
    def evaluations(self) -> tuple[float, ...]:
        """The times at which the velocity is asked for, in order."""
        if self.method == "euler":
            return tuple(begin for begin, _ in self.steps)
        return tuple(time for begin, end in self.steps for time in (begin, (begin + end) / 2))

    def __call__(self, velocity: Velocity, start: Tensor) -> Tensor:
        """Return the clean chunk [B, H, A] reached from `start` [B, H, A] at the first time."""
        x = start
        for begin, end in self.steps:
            slope = velocity(x, begin)
            if self.method == "midpoint":
                middle = (begin + end) / 2
                slope = velocity(torch.add(x, slope, alpha=middle - begin), middle)
            x = torch.add(x, slope, alpha=end - begin)
        return x


def even_times(begin: float, num_steps: int) -> tuple[float, ...]:
    """Return where `num_steps` even steps from `begin` to 1 begin."""
    return tuple(begin + (1.0 - begin) * i / num_steps for i in range(num_steps))


def check_times(times: Sequence[float]) -> tuple[float, ...]:
    """Return `times` as a tuple.

    Raises:
        RobopolicyError: it is empty, not strictly ascending, or leaves [0, 1).
    """
    values = tuple(float(time) for time in times)
    ascending = all(a < b for a, b in itertools.pairwise(values))
    if not values or not ascending or not values[0] >= 0.0 or not values[-1] < 1.0:
        raise RobopolicyError(
            f"The times of a flow must ascend strictly within [0, 1), 0 being noise; the last step ends at 1 by "
            f"itself, [0, 0.25, 0.5, 0.75] for example; got {list(values)}."
        )
    return values
