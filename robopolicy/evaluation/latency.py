"""Evaluation in which the world goes on while the policy thinks.

An observation of control step k whose inference takes d seconds gives a chunk that can be played from step
k + ceil(d / control_dt_s) on (`policies.timeline`). Each environment is a robot with one inference worker and its own
clock. Two ways of executing:

    async   plays on in the old chunk during inference, drops the actions that have passed when the new one is there,
            holds when it has none left. The next inference starts `n_action_steps` control steps after the observation
            of the last one, or as soon as the worker is free
    sync    stops and thinks: holds during every inference, then plays `n_action_steps` actions of the new chunk

How long an inference takes is either fixed, or drawn per plan from times that were measured at batch 1 on this machine
beforehand: the time of a call that plans for 25 simulated robots at once is no robot's latency.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from robopolicy.errors import RobopolicyError, UnknownNameError
from robopolicy.evaluation.statistics import Latency, drop_warmup
from robopolicy.policies.actors import DiscreteEnds, ObservationWindow, Planned
from robopolicy.policies.planners import Planner
from robopolicy.policies.timeline import ChunkTimeline, delay_steps
from robopolicy.rng import Rng, take_generators
from robopolicy.types import Frame

EXECUTORS = ("async", "sync")


@dataclass(frozen=True, kw_only=True)
class LatencyMode:
    """What an evaluation does with the time that inference takes."""

    mode: Literal["frozen", "measured", "fixed_ms"]
    ms: float | None = None

    @classmethod
    def parse(cls, text: str) -> LatencyMode:
        """Read `frozen`, `measured`, or `fixed_ms:50` (`fixed_ms=50` too).

        Raises:
            UnknownNameError: something else.
            RobopolicyError: no number, or a negative one.
        """
        name, separator, value = str(text).replace("=", ":").partition(":")
        if name in ("frozen", "measured") and not separator:
            return cls(mode=name)  # type: ignore[arg-type]
        if name != "fixed_ms":
            raise UnknownNameError("latency", str(text), ("frozen", "measured", "fixed_ms:50"))
        if not re.fullmatch(r"\d+(\.\d*)?", value):
            raise RobopolicyError(f"latency={text} needs milliseconds, zero or more; fixed_ms:50 for example.")
        return cls(mode="fixed_ms", ms=float(value))

    def __str__(self) -> str:
        return self.mode if self.ms is None else f"{self.mode}:{self.ms:g}"


class Delays(Protocol):
    """How long the inferences of numbered environments take."""

    def __call__(self, rows: Tensor, first: Tensor, generator: Rng) -> list[float]:
        """Return seconds for each of `rows` [K] int; `first` [K] bool: its first plan of the episode."""


@dataclass(frozen=True, kw_only=True)
class FixedDelay:
    """Every inference takes `seconds`."""

    seconds: float

    def __call__(self, rows: Tensor, first: Tensor, generator: Rng) -> list[float]:
        return [self.seconds] * len(rows)


class RecordedDelay:
    """Inference times drawn, with replacement, from recorded ones; per episode from a stream of its own.

    The stream follows from the seed of the episode's noise generator and takes nothing out of that generator: the
    policy's noise is that of every other latency, and an outcome does not depend on the neighbours.

    Args:
        first: seconds of first plans of an episode, at batch 1.
        later: seconds of all further plans (a warm start is faster then).
    """

    def __init__(self, first: Latency, later: Latency) -> None:
        self._times = {True: np.asarray(first.seconds), False: np.asarray(later.seconds)}
        self._streams: dict[int, np.random.Generator] = {}

    def __call__(self, rows: Tensor, first: Tensor, generator: Rng) -> list[float]:
        each = generator if isinstance(generator, Sequence) else [generator] * len(rows)
        drawn = []
        for row, new, noise in zip(rows.tolist(), first.tolist(), each, strict=True):
            if new or row not in self._streams:
                seed = noise.initial_seed() if isinstance(noise, torch.Generator) else 0
                self._streams[row] = np.random.default_rng(seed if each is generator else [seed, row])
            drawn.append(float(self._streams[row].choice(self._times[new])))
        return drawn


class LatencyActor:
    """Plays chunks that arrive late, in N environments; see the top of this file.

    With delays of zero every action is that of `policies.actors.ChunkActor`, bit for bit.

    Args:
        planner: its policy in evaluation mode.
        num_envs: number N of environments.
        delays: how long inferences take.
        executor: `async` or `sync`.
        start: returns the action [N, A] that keeps the robots where they are when an episode begins: what they do until
            their first plan is there.
        n_action_steps: control steps per chunk; None takes the planner's timing.
        convert: correct increments for what was passed and executed since the observation.

    Raises:
        UnknownNameError: no such executor.
    """

    def __init__(
        self,
        planner: Planner,
        num_envs: int,
        *,
        delays: Delays,
        start: Callable[[], Tensor],
        executor: str = "async",
        n_action_steps: int | None = None,
        convert: bool = True,
    ) -> None:
        if executor not in EXECUTORS:
            raise UnknownNameError("executor", executor, EXECUTORS)
        timing = planner.timing
        self.timing = timing if n_action_steps is None else dataclasses.replace(timing, n_action_steps=n_action_steps)
        self.replanned = False
        """Whether the last call planned."""
        self.planned: Planned | None = None
        """What the last call planned."""
        self.held = torch.zeros(num_envs, dtype=torch.bool)
        """[N], the rows that had nothing to play in the last call."""
        self._planner, self._delays, self._start = planner, delays, start
        self._plays_on = executor == "async"
        self._window = ObservationWindow(planner.spec, timing.n_obs_steps, num_envs)
        self._ends = DiscreteEnds(planner.spec.action, num_envs, hysteresis=planner.hysteresis)
        self._timeline = ChunkTimeline(planner.spec.action, timing, num_envs, convert=convert)
        self._control_dt_s = planner.spec.action.control_dt_s
        self._step = 0
        self._fresh = torch.ones(num_envs, dtype=torch.bool)
        self._first = torch.ones(num_envs, dtype=torch.bool)
        self._seen = torch.zeros(num_envs, dtype=torch.int64)
        self._ready = torch.full((num_envs,), -1)
        self._waiting: Tensor | None = None
        self._last: Tensor | None = None

    def __call__(self, frame: Frame, *, generator: Rng = None) -> Tensor:
        """Return the action [N, A] to execute now, on the device of `frame`; generators as in `ChunkActor`."""
        self._window.push(frame)
        if bool(self._fresh.any()):
            self._begin_episodes(next(iter(frame.values())).device)
        assert self._last is not None
        self._arrive()
        self._infer(generator)
        self._arrive()  # what takes no time
        action, playing = self._timeline.action(self._step, self._last)
        action = self._ends.round(action)
        self._timeline.executed(action, playing)
        self._last, self.held = action, ~playing
        self._step += 1
        return action

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget all about the episodes of `rows` [N] bool (None: of all); call whenever those environments reset."""
        self._window.reset(rows)
        self._planner.reset(rows)
        self._ends.reset(rows)
        self._timeline.reset(rows)
        where = slice(None) if rows is None else rows.cpu()
        self._fresh[where] = True
        self._ready[where] = -1

    def _begin_episodes(self, device: torch.device) -> None:
        start = self._start().to(device)
        if self._last is None:
            self._last = start.clone()
        self._last = torch.where(self._fresh.to(device)[:, None], start, self._last)
        self._first |= self._fresh
        self._seen[self._fresh] = self._step - self.timing.n_action_steps
        self._fresh[:] = False

    def _infer(self, generator: Rng) -> None:
        """Start an inference wherever one is due and the worker is free. Its result is known now and used later."""
        idle = self._ready < 0
        begin = idle & (self._first | self._timeline.due(self._step, self.timing.n_action_steps))
        self.replanned, self.planned = bool(begin.any()), None
        if not self.replanned:
            return
        rows = begin.nonzero().flatten()
        obs = self._window.observation
        if len(rows) < len(begin):
            obs, generator = obs.take(rows), take_generators(generator, rows)
        chunk = self._planner(obs, rows, shift=self._step - self._seen[rows], generator=generator)
        seconds = self._delays(rows, self._first[rows], generator)
        self.planned = Planned(rows=rows, diagnostics=self._planner.diagnostics, inference_s=seconds)
        if self._waiting is None:
            self._waiting = chunk.new_empty(len(begin), *chunk.shape[1:])
        self._waiting[rows] = chunk
        self._ready[rows] = self._step + torch.tensor([delay_steps(s, self._control_dt_s) for s in seconds])
        self._seen[rows], self._first[rows] = self._step, False
        self._timeline.observe(rows, self._step)
        if not self._plays_on:
            self._timeline.stop(rows)

    def _arrive(self) -> None:
        """Go over to the chunks whose inference has ended."""
        rows = ((self._ready >= 0) & (self._ready <= self._step)).nonzero().flatten()
        if len(rows):
            assert self._waiting is not None
            self._timeline.arrive(rows, self._waiting[rows], self._step)
            self._ready[rows] = -1


def planner_latency(
    planner: Planner, frame: Frame, *, num_calls: int = 50, num_warmup_calls: int = 5
) -> tuple[Latency, Latency]:
    """Measure planning at batch 1, as a robot would feel it: window and planner, the device waited for.

    Args:
        planner: plans for one environment.
        frame: recorded observations, [N, S] per modality; its rows are taken in turn.

    Returns:
        first plans of an episode, and plans that follow one `n_action_steps` earlier.
    """
    device = next(iter(frame.values())).device
    window = ObservationWindow(planner.spec, planner.timing.n_obs_steps, 1)
    rows, shift = torch.zeros(1, dtype=torch.int64), torch.tensor([planner.timing.n_action_steps])
    noise = torch.Generator().manual_seed(0)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    seconds: list[list[float]] = [[], []]
    num_rows = len(next(iter(frame.values())))
    for call in range(num_warmup_calls + num_calls):
        one = {name: value[call % num_rows][None] for name, value in frame.items()}
        planner.reset()
        window.reset()
        for kind in seconds:
            begin = now()
            window.push(one)
            with torch.no_grad():
                planner(window.observation, rows, shift=shift, generator=[noise])
            kind.append(now() - begin)
    planner.reset()
    first, later = (drop_warmup(kind, batch_size=1, num_warmup=num_warmup_calls) for kind in seconds)
    return first, later
