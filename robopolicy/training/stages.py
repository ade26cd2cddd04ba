"""Training in stages: where each begins and ends, and which weights the early ones leave to the rest.

Stage k of a policy (see `nn.staged.Staged`) begins with the averaged weights of stage k - 1, an optimiser, a learning
rate schedule and an average of its own. With held-out episodes, an early stage leaves the average with the lowest
held-out loss, and ends once that has not improved for some validations: a base that has learned its demonstrations by
heart cannot be put right by what is added to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robopolicy.errors import RobopolicyError

EARLY_SHARE = 0.05
"""Of all steps, for each stage but the last: the longer a base trains, the less follows from what comes after it."""


def stage_ends(num_steps: int, num_stages: int, shares: Sequence[float] | None) -> list[int]:
    """Return the step after which each stage is over at the latest.

    Args:
        shares: of `num_steps`, one per stage; None: `EARLY_SHARE` for each but the last, though at least a step.

    Raises:
        RobopolicyError: there are not as many shares as stages, or a stage would have no step.
    """
    if shares is None:
        early = max(1, round(EARLY_SHARE * num_steps))
        shares = [early] * (num_stages - 1) + [num_steps - early * (num_stages - 1)]
    shares = list(shares)
    if len(shares) != num_stages:
        raise RobopolicyError(
            f"train.stages must have one share per stage of the policy, {num_stages}; got {len(shares)}."
        )
    ends = [round(num_steps * sum(shares[: k + 1]) / sum(shares)) for k in range(num_stages)]
    if any(end <= start for start, end in zip([0, *ends], ends, strict=False)):
        raise RobopolicyError(f"{num_steps} steps in the shares {shares} leave a stage without a step.")
    return ends


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far training in stages has come."""

    stage: int = 0
    start: int = 0
    """Steps done when the stage began."""
    best_loss: float = math.inf
    """Lowest held-out loss in this stage."""
    worse: int = 0
    """Validations since then."""
    over: bool = False
    """Whether the stage ended early."""

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> Progress:
        """Read what `to_info` wrote; a run without stages wrote nothing."""
        return cls(**info.get("stages", {}))

    def to_info(self) -> dict[str, Any]:
        """Return plain JSON; nothing for a run that is in its first stage and knows of no other."""
        found = dataclasses.asdict(self)
        return {key: value for key, value in found.items() if value != math.inf}

    def judged(self, loss: float, *, patience: int) -> Progress:
        """Return the progress after a validation; the weights are the best so far if its `worse` is 0."""
        if loss < self.best_loss:
            return dataclasses.replace(self, best_loss=loss, worse=0)
        return dataclasses.replace(self, worse=self.worse + 1, over=self.worse + 1 >= patience)

    def next(self, done: int) -> Progress:
        """Return the beginning of the next stage after `done` steps."""
        return Progress(stage=self.stage + 1, start=done)


Best = dict[str, Tensor]
"""The averaged weights with the lowest held-out loss of the stage."""
