"""Plans on the time axis: which action is due now, on the monotonic clock, whichever way plans are made and played."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from robopolicy.deploy.contract import Floats


@dataclass(frozen=True, slots=True)
class TimedPlan:
    """Actions with the times at which they are due."""

    number: int
    """Counts plans; grows."""
    observed_s: float
    start_s: float
    """When the first of `actions` is due, monotonic."""
    period_s: float
    actions: Floats
    """[K, A] environment units."""

    def index(self, now_s: float) -> int:
        """Return which action is due at `now_s`; K or more: none any more."""
        return max(0, math.floor((now_s - self.start_s) / self.period_s + 1e-9))


@dataclass(frozen=True, slots=True)
class Slot:
    """The action to be played now."""

    plan: TimedPlan
    index: int

    @property
    def action(self) -> Floats:
        return self.plan.actions[self.index]

    @property
    def due_s(self) -> float:
        return self.plan.start_s + self.index * self.plan.period_s


class Playlist:
    """The newest plan, handed from the runner to the loop; one writer, one reader, nobody waits."""

    def __init__(self) -> None:
        self.plan: TimedPlan | None = None
        self.standing_since_s: float | None = -math.inf
        """Since when no action has been played; None while one is. Written by the loop."""
        self.underruns = 0

    def publish(self, plan: TimedPlan) -> None:
        self.plan = plan

    def clear(self) -> None:
        self.plan, self.standing_since_s = None, -math.inf

    def stood_still_since(self, time_s: float) -> bool:
        """Whether nothing was played from `time_s` on."""
        return self.standing_since_s is not None and self.standing_since_s <= time_s

    def slot(self, now_s: float) -> Slot | None:
        """Return what is due at `now_s`, or None where the plan has run out; called by the loop alone."""
        plan = self.plan
        index = 0 if plan is None else plan.index(now_s)
        if plan is None or index >= len(plan.actions):
            if self.standing_since_s is None:
                self.standing_since_s = now_s
                self.underruns += 1
            return None
        self.standing_since_s = None
        return Slot(plan, index)

    def remaining_s(self, now_s: float) -> float:
        """Return for how long the plan still says what to do."""
        plan = self.plan
        return 0.0 if plan is None else plan.start_s + len(plan.actions) * plan.period_s - now_s


class Ensemble:
    """Temporal ensembling (Zhao et al., 2023; https://arxiv.org/abs/2304.13705): averages what all plans say of a time.

    Weights are exp(-m i), i = 0 for the oldest. Discrete dimensions are the newest plan's: the mean of open and closed
    is neither.
    """

    def __init__(self, discrete: tuple[bool, ...], *, decay: float = 0.01, most: int = 16) -> None:
        self._discrete = np.array(discrete)
        self._decay = decay
        self._plans: deque[tuple[float, Floats]] = deque(maxlen=most)

    def reset(self) -> None:
        self._plans.clear()

    def __call__(self, actions: Floats, observed_s: float, period_s: float) -> Floats:
        """Return the averaged [K, A] of the plan `actions` [K, A], observed at `observed_s`, and those before it."""
        self._plans.append((observed_s, actions))
        total, weights = np.zeros_like(actions), np.zeros(len(actions))
        rank = 0
        for at, older in self._plans:
            behind = round((observed_s - at) / period_s)
            if behind >= len(older):
                continue
            part = older[behind:][: len(actions)]
            weight = math.exp(-self._decay * rank)
            total[: len(part)] += weight * part
            weights[: len(part)] += weight
            rank += 1
        return np.where(self._discrete, actions, total / weights[:, None])
