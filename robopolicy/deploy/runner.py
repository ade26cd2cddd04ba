"""The policy runner: a thread of its own that observes, plans and hands over plans with their times.

| executor | observes | plays |
| --- | --- | --- |
| sync | when a chunk has been played | `n_action_steps` actions from when the plan is ready; the arm waits |
| async | so that the next plan is ready when `n_action_steps` are over | by time: what has passed is left out |
| rti | at every control period | by time; with a warm-start planner this is real-time iteration |
| ensemble | at every control period | by time, averaged over all plans that speak of it |

An action is due at its plan's observation time plus its place in the chunk. Where the arm has stood still since the
observation, nothing is late, and the chunk is played from its beginning.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from robopolicy.deploy.contract import Plan, Recorder, Robot
from robopolicy.deploy.observations import Built, ObservationBuilder
from robopolicy.deploy.playback import Ensemble, Playlist, TimedPlan
from robopolicy.policies.planners import Planner
from robopolicy.types import Observation

Executor = Literal["sync", "async", "rti", "ensemble"]
EXECUTORS: tuple[Executor, ...] = ("sync", "async", "rti", "ensemble")
POLL_S = 0.002
WARM_UPS = 4
KEPT_PLANS = 1 << 16
"""Of how many plans the latencies are kept."""
KEPT_DIAGNOSTICS = 4096


class PolicyRunner:
    """Plans in its own thread while it is told to.

    Args:
        planner: for one robot, its policy in evaluation mode.
        builder: makes the observations.
        playlist: where plans go.
        speed: share of real time at which the policy is played.
        on_fault: called with the reason when the policy does what it must not; the run is to be stopped.
        confirm: asked before each plan is played (`mode=step`); None plays all.
    """

    def __init__(
        self,
        planner: Planner,
        builder: ObservationBuilder,
        playlist: Playlist,
        robot: Robot,
        *,
        executor: Executor,
        n_action_steps: int,
        speed: float = 1.0,
        on_fault: Callable[[str], None],
        recorders: Sequence[Recorder] = (),
        confirm: Callable[[Plan], bool] | None = None,
        ensemble_decay: float = 0.01,
    ) -> None:
        spec, timing = planner.spec, planner.timing
        self.executor = executor
        self.period_s = spec.action.control_dt_s / speed
        self.n_action_steps = n_action_steps
        self.latencies_s: deque[float] = deque(maxlen=KEPT_PLANS)
        """Of every plan, from its observation being built to being handed over."""
        self.observed_ages_s: deque[float] = deque(maxlen=KEPT_PLANS)
        """How old the observation was when it was used."""
        self.skipped: deque[int] = deque(maxlen=KEPT_PLANS)
        """Actions of each plan that were over when it came."""
        self.inferring_since_s: float | None = None
        self.waiting_for = ""
        """Why there is no observation yet; empty while there is."""
        self.spread_s = 0.0
        self.plans = 0
        self.without: Counter[str] = Counter()
        """Plans that were made without each modality."""
        self.missing: tuple[str, ...] = ()
        """Modalities that the newest plan did without."""
        self.diagnostics: dict[str, deque[float]] = {}
        """What the planner said of each plan."""
        self.missed_periods = 0
        """Control periods in which no observation was taken because the plan before took too long."""
        self._planner, self._builder, self._playlist, self._robot = planner, builder, playlist, robot
        self._now, self._shape = timing.now, (1, timing.horizon, spec.action.dim)
        self._on_fault, self._recorders, self._confirm = on_fault, recorders, confirm
        self._ensemble = Ensemble(spec.action.discrete, decay=ensemble_decay) if executor == "ensemble" else None
        self._running = threading.Event()
        self._closed = False
        self._warm = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._generator: torch.Generator | None = None
        self._last_observed_s = -math.inf
        self._recent_s: deque[float] = deque(maxlen=16)
        self._due_s = 0.0
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)

    def open(self) -> None:
        """Start the thread; it first plans for nobody, since first calls compile and allocate."""
        self._thread.start()
        self._warm.wait()

    def start(self, seed: int) -> None:
        """Plan from now on, remembering nothing; the policy's noise comes from `seed`."""
        self.pause()
        self._planner.reset(None)
        if self._ensemble is not None:
            self._ensemble.reset()
        self._playlist.clear()
        self._generator = torch.Generator().manual_seed(seed)
        self._last_observed_s, self._due_s = -math.inf, 0.0
        self.missing = ()
        self._builder.start(time.monotonic())
        self._running.set()

    def pause(self, timeout_s: float = 5.0) -> None:
        """Plan no more; returns when the present plan, which will not be played, is done."""
        self.interrupt()
        if threading.current_thread() is not self._thread:
            self._idle.wait(timeout_s)
            self._playlist.clear()

    def interrupt(self) -> None:
        """Plan no more, without waiting for the present plan; from any thread."""
        self._running.clear()
        self._playlist.clear()

    def close(self) -> None:
        self._closed = True
        self._running.set()
        if self._thread.ident is not None and threading.current_thread() is not self._thread:
            self._thread.join(5.0)

    def inferring_s(self, now_s: float) -> float:
        """Return how long the present inference has been running, 0 between two."""
        since = self.inferring_since_s
        return 0.0 if since is None else now_s - since

    def recent_p95_s(self) -> float | None:
        """Return the time that 95 % of the last plans stayed below, from observation to hand-over."""
        recent = sorted(self._recent_s)
        return recent[round(0.95 * (len(recent) - 1))] if recent else None

    def _run(self) -> None:
        torch.set_num_threads(1)
        try:
            self._warm_up()
        except Exception as error:
            self._on_fault(f"the policy failed: {type(error).__name__}: {error}")
        self._warm.set()
        while True:
            self._idle.set()
            self._running.wait()
            self._idle.clear()
            if self._closed:
                self._idle.set()
                return
            try:
                with torch.no_grad():
                    if not self._turn():
                        time.sleep(POLL_S)
            except Exception as error:  # whatever it is: a policy that fails must stop the arm
                self._running.clear()
                self._on_fault(f"the policy failed: {type(error).__name__}: {error}")

    @torch.no_grad()
    def _warm_up(self) -> None:
        shapes = {n: ((1, self._now + 1, *m.shape), m.is_image) for n, m in self._planner.spec.observation.items()}
        dtypes = {True: torch.uint8, False: torch.float32}
        blank = Observation(modalities={n: torch.zeros(shape, dtype=dtypes[i]) for n, (shape, i) in shapes.items()})
        for shift in range(WARM_UPS):
            generator = torch.Generator().manual_seed(0)
            self._planner(blank, torch.zeros(1, dtype=torch.int64), shift=torch.tensor([shift]), generator=generator)
        self._planner.reset(None)

    def _turn(self) -> bool:
        """Observe and plan if it is time to; return whether it was."""
        now_s = time.monotonic()
        if not self._is_time(now_s):
            return False
        built = self._builder(self._robot)
        if isinstance(built, str):
            self.waiting_for = built
            return False
        if built.time_s <= self._last_observed_s:
            return False
        self.waiting_for, self.spread_s = "", built.spread_s
        self._plan(built, now_s)
        return True

    def _is_time(self, now_s: float) -> bool:
        if self.executor == "sync":
            return self._playlist.remaining_s(now_s) <= 0.0
        if self.executor == "async":
            plan = self._playlist.plan
            if plan is None or self._playlist.remaining_s(now_s) <= 0.0:
                return True
            played = plan.start_s + self.n_action_steps * self.period_s
            return now_s >= played - self._expected_latency_s()
        if now_s < self._due_s:
            return False
        if self._due_s > 0.0:
            missed = int((now_s - self._due_s) / self.period_s)
            self.missed_periods += missed
            self._due_s += (missed + 1) * self.period_s
        else:
            self._due_s = now_s + self.period_s
        return True

    def _expected_latency_s(self) -> float:
        return max(self._recent_s, default=0.0)

    def _plan(self, built: Built, now_s: float) -> None:
        first = math.isinf(self._last_observed_s)
        shift = 0 if first else max(1, round((built.time_s - self._last_observed_s) / self.period_s))
        state = b"" if self._generator is None else self._generator.get_state().numpy().tobytes()
        self.inferring_since_s = now_s
        try:
            chunk = self._planner(
                built.observation,
                torch.zeros(1, dtype=torch.int64),
                shift=torch.tensor([shift]),
                generator=self._generator,
            )
        finally:
            self.inferring_since_s = None
        ready_s = time.monotonic()
        if not self._running.is_set():
            return
        if why := self._why_unusable(chunk):
            self._running.clear()
            self._on_fault(why)
            return
        self._last_observed_s = built.time_s
        self.plans += 1
        self.latencies_s.append(ready_s - now_s)
        self.observed_ages_s.append(now_s - built.time_s)
        self._recent_s.append(ready_s - built.time_s)
        array: NDArray[np.float32] = chunk[0].float().cpu().numpy().copy()
        said = self._take_notes(built)
        record = Plan(
            time_s=ready_s,
            observed_s=built.time_s,
            inference_s=ready_s - now_s,
            spread_s=built.spread_s,
            observation=built.arrays,
            chunk=array,
            shift=shift,
            generator_state=state,
            missing=built.missing,
            diagnostics=said,
        )
        for recorder in self._recorders:
            recorder.plan(record)
        if self._confirm is not None and not self._confirm(record):
            self._running.clear()
            self._on_fault("the operator did not confirm the next chunk")
            return
        self._hand_over(array, built.time_s)

    def _take_notes(self, built: Built) -> dict[str, float]:
        """Note what the policy did without, telling when that changes, and what the planner says of its plan."""
        self.without.update(built.missing)
        for name in set(built.missing) ^ set(self.missing):
            text = f"plans without {name}" if name in built.missing else f"{name} is there again"
            for recorder in self._recorders:
                recorder.event("warning", text, modality=name)
        self.missing = built.missing
        said = {name: float(value.flatten()[0]) for name, value in self._planner.diagnostics.items()}
        for name, value in said.items():
            self.diagnostics.setdefault(name, deque(maxlen=KEPT_DIAGNOSTICS)).append(value)
        return said

    def _hand_over(self, chunk: NDArray[np.float32], observed_s: float) -> None:
        actions = chunk[self._now :].astype(np.float64)
        if self._ensemble is not None:
            actions = self._ensemble(actions, observed_s, self.period_s)
        ready_s = time.monotonic()
        still = self.executor == "sync" or self._playlist.stood_still_since(observed_s)
        if self.executor == "sync":
            actions = actions[: self.n_action_steps]
        plan = TimedPlan(self.plans, observed_s, ready_s if still else observed_s, self.period_s, actions)
        self.skipped.append(plan.index(ready_s))
        if self._running.is_set():
            self._playlist.publish(plan)

    def _why_unusable(self, chunk: torch.Tensor) -> str:
        if tuple(chunk.shape) != self._shape:
            return f"the policy gave a chunk of shape {tuple(chunk.shape)}, expected {self._shape}"
        if not bool(torch.isfinite(chunk).all()):
            return "the policy gave actions that are not finite"
        return ""
