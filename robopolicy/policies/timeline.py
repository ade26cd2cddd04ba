"""When the actions of a chunk are due: stamping, dropping what has passed, holding, and keeping increments honest.

A chunk is made from the observation of control step k; its action i (counted from the newest observation) is due at
step k + i. It arrives at step k + d. What happens to the first d actions depends on what each dimension means:

    absolute, discrete   the value due now is taken; the passed ones are of no further interest
    increments           the passed ones meant a motion, and something else was executed meanwhile: the robot owes
                         a_0 + ... + a_{d-1} - (c_0 + ... + c_{d-1}), where c are the increments that were sent since
                         the observation. The debt is paid in d + 1 equal shares on top of the plan, and what the bounds
                         cut off is carried over: nothing is lost and nothing is doubled. From step k + 2 d on, the arm
                         is where the plan wants it

Paying at once would be exact d steps earlier, but plans that overlap then correct each other's corrections: replanning
every step one step late, c_{k+1} = a_1 + (a_0 - c_k) rings for ever at best (docs/latency.md). With shares each swing
is d / (d + 1) of the one before. They are exact where increments add to the previous target (`delta_from="target"`),
and for increments from the measured state as far as the arm follows each within its step; rotation increments add up
to first order.
Where the robot has stood still since the observation, nothing has moved and nothing is late: the chunk is played from
its beginning. This covers the first plan of an episode and every plan of a stop-and-think robot.

Everything is per row: each of N robots has its own timeline. Steps are those of one clock; nothing here reads a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robopolicy.timing import ChunkTiming
from robopolicy.types import ActionSpec


def delay_steps(seconds: float, control_dt_s: float) -> int:
    """Return the control steps after its observation from which a plan that took `seconds` can be executed.

    >>> [delay_steps(s, 0.05) for s in (0.0, 0.001, 0.05, 0.051)]
    [0, 1, 1, 2]
    """
    return max(0, math.ceil(seconds / control_dt_s - 1e-9))


class ChunkTimeline:
    """The chunk that each of N robots plays, by control steps.

    Args:
        action: what the dimensions mean, and their bounds.
        timing: where in a chunk the newest observation lies.
        convert: correct increments for what was passed and executed since the observation; else passed ones are lost.
    """

    def __init__(self, action: ActionSpec, timing: ChunkTiming, num_envs: int, *, convert: bool = True) -> None:
        self._now, self._num_actions = timing.now, timing.horizon - timing.now
        self._convert = convert
        self._increments = torch.tensor(action.delta) & ~torch.tensor(action.discrete)
        self._low, self._high = torch.tensor(action.low), torch.tensor(action.high)
        zeros = torch.zeros(num_envs, action.dim)
        self._chunk: Tensor | None = None
        self._stamp = torch.zeros(num_envs, dtype=torch.int64)
        self._has_chunk = torch.zeros(num_envs, dtype=torch.bool)
        self._debt, self._share, self._executed = zeros.clone(), zeros.clone(), zeros.clone()
        self._observed = torch.zeros(num_envs, dtype=torch.int64)
        self._stood_still = torch.zeros(num_envs, dtype=torch.bool)

    def due(self, step: int, after: int) -> Tensor:
        """Return [N] bool: no chunk, or `after` or more of its actions are due before `step`."""
        return ~self._has_chunk | (step - self._stamp >= after)

    def observe(self, rows: Tensor, step: int) -> None:
        """Remember that plans for `rows` [K] int are being made from their observations of `step`."""
        self._observed[rows] = step
        self._executed[rows] = 0
        self._stood_still[rows] = True

    def stop(self, rows: Tensor) -> None:
        """Play no more of the chunks of `rows` [K] int."""
        self._has_chunk[rows] = False

    def arrive(self, rows: Tensor, chunk: Tensor, step: int) -> None:
        """Play `chunk` [K, H, A] from `step` on: the plans of `rows` [K] int that the last `observe` announced."""
        if self._chunk is None:
            self._to(chunk.device)
            self._chunk = chunk.new_empty(len(self._stamp), *chunk.shape[1:])
        self._chunk[rows] = chunk
        still = self._stood_still[rows]
        late = torch.where(still, 0, step - self._observed[rows])
        self._stamp[rows] = step - late
        self._has_chunk[rows] = True
        self._debt[rows] = 0
        if self._convert and bool(late.any()):
            passed = (torch.arange(self._num_actions) < late[:, None]).to(chunk.device)
            meant = (self._clip(chunk[:, self._now :]) * passed[..., None]).sum(dim=1)
            debt = torch.where(still.to(chunk.device)[:, None], 0, meant - self._executed[rows])
            self._debt[rows] = torch.where(self._increments, debt, 0)
            self._share[rows] = self._debt[rows] / (late + 1).to(chunk.device)[:, None]

    def hold(self, last: Tensor) -> Tensor:
        """Return the actions [N, A] that stay: zero for increments, the value `last` [N, A] sent for all others."""
        return torch.where(self._increments, 0, last)

    def action(self, step: int, last: Tensor) -> tuple[Tensor, Tensor]:
        """Return the actions [N, A] to send at `step`, and whether each row plays a chunk [N] bool or holds `last`."""
        self._to(last.device)
        index = step - self._stamp
        playing = self._has_chunk & (index < self._num_actions)
        still = self.hold(last)
        if self._chunk is None:
            return still, playing
        there = playing.to(last.device)[:, None]
        planned = self._chunk[torch.arange(len(index)), (self._now + index).clamp(max=self._chunk.shape[1] - 1)]
        paid = torch.where(self._debt.abs() < self._share.abs(), self._debt, self._share)
        owed = self._increments & (self._debt != 0)
        sent = torch.where(there, torch.where(owed, self._clip(planned + paid), planned), still)
        self._debt = torch.where(there & owed, self._debt - (sent - planned), self._debt)
        return sent, playing

    def executed(self, action: Tensor, playing: Tensor) -> None:
        """Remember that `action` [N, A] was sent, by rows that were `playing` [N] bool and rows that held."""
        self._executed += torch.where(self._increments, self._clip(action), 0)
        self._stood_still &= ~playing

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget the chunks of `rows` [N] bool, or all of them."""
        self._has_chunk[slice(None) if rows is None else rows.cpu()] = False

    def _clip(self, action: Tensor) -> Tensor:
        return torch.clamp(action, self._low, self._high)

    def _to(self, device: torch.device) -> None:
        if self._debt.device != device:
            for name in ("_debt", "_share", "_executed", "_increments", "_low", "_high"):
                setattr(self, name, getattr(self, name).to(device))
