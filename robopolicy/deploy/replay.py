"""Plans a recorded deployment once more, without a robot: equal observations and noise must give equal actions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from robopolicy.deploy.recording import Recording
from robopolicy.errors import RobopolicyError
from robopolicy.policies.planners import Planner
from robopolicy.types import Observation


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """How far the replayed chunks are from the recorded ones."""

    num_plans: int
    num_equal: int
    """Equal to the last bit."""
    max_difference: float
    """Largest difference of any action, in environment units."""


def replay(
    recording: Recording, planner: Planner, *, on_plan: Callable[[int, int], None] | None = None
) -> ReplayResult:
    """Plan from every recorded observation in order and compare.

    Args:
        planner: built as in the deployment, for one robot; a plan with `shift` 0 starts it anew, as there.
        on_plan: called with (done, total).

    Raises:
        RobopolicyError: nothing was planned in this recording, or the planner observes or acts otherwise.
    """
    if not recording.plans:
        raise RobopolicyError(
            "This recording holds no plans: the policy never ran (mode=check, or no observation came)."
        )
    expected = (planner.timing.horizon, planner.spec.action.dim)
    equal, worst = 0, 0.0
    for number, plan in enumerate(recording.plans, start=1):
        if plan.chunk.shape != expected:
            raise RobopolicyError(
                f"The recorded chunks are {plan.chunk.shape}, this policy's are {expected}: another checkpoint."
            )
        if plan.shift == 0:
            planner.reset(None)
        generator = None
        if plan.generator_state:
            generator = torch.Generator()
            generator.set_state(torch.frombuffer(bytearray(plan.generator_state), dtype=torch.uint8))
        obs = Observation(modalities={name: torch.from_numpy(value)[None] for name, value in plan.observation.items()})
        with torch.no_grad():
            chunk = planner(
                obs, torch.zeros(1, dtype=torch.int64), shift=torch.tensor([plan.shift]), generator=generator
            )
        difference = float(np.abs(chunk[0].float().cpu().numpy() - plan.chunk).max())
        equal, worst = equal + (difference == 0.0), max(worst, difference)
        if on_plan is not None:
            on_plan(number, len(recording.plans))
    return ReplayResult(num_plans=len(recording.plans), num_equal=equal, max_difference=worst)
