"""`robopolicy bench latency`: how long one tick takes at batch 1, by engine and sampler, against bare network calls.

A tick is one call of a planner: from a window of recorded observations, in environment units, to a chunk of actions.
Contenders take turns within one process, a few consecutive ticks each; ratios are taken within a round and then their
median, so that a busy machine slows both sides alike.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from robopolicy.app.bench_latency_words import show, write
from robopolicy.app.build import build_planner, resolve_planner
from robopolicy.app.export import build_env, load
from robopolicy.errors import RobopolicyError
from robopolicy.evaluation.calibration import spaced
from robopolicy.evaluation.results import machine, read_evaluation, versions
from robopolicy.evaluation.rollout import evaluate
from robopolicy.evaluation.statistics import wilson_interval
from robopolicy.nn.graphs import build_graph
from robopolicy.policies.actors import ChunkActor, ObservationWindow
from robopolicy.policies.engines import OUTPUTS, build_engine
from robopolicy.policies.planners import Planner
from robopolicy.training.fit import threads
from robopolicy.types import Observation

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from robopolicy.training.checkpoint import LoadedPolicy

WARMUP_TICKS = 2
"""Dropped after the first tick of each round."""
EVALUATION_SEED = 10000
FRESH = {"_target_": "robopolicy.policies.planners.FreshPlanner"}


@dataclass(kw_only=True)
class Contender:
    """What is timed: `tick` on consecutive observations, `first` on the one after a reset."""

    engine: str
    sampler: str
    tick: Callable[[Observation], Any]
    reset: Callable[[], None]
    calls: Callable[[], float]
    """Network calls per tick, so far."""
    in_policy: Callable[[], float] = float
    """Seconds spent in the policy since this was last asked, the planner's own work left out."""
    rounds: list[list[float]] = field(default_factory=list)
    policy_rounds: list[list[float]] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Return milliseconds over all rounds."""
        ms = 1e3 * np.concatenate([np.asarray(one) for one in self.rounds])
        return {
            "engine": self.engine,
            "sampler": self.sampler,
            "network_calls": self.calls(),
            "median_ms": float(np.median(ms)),
            "p95_ms": float(np.percentile(ms, 95)),
            "p99_ms": float(np.percentile(ms, 99)),
            "policy_ms": 1e3 * float(np.median(np.concatenate([np.asarray(one) for one in self.policy_rounds]))),
            "first_tick_ms": 1e3 * float(np.median(self.first)),
            "n_ticks": len(ms),
        }

    def over(self, other: Contender, *, policy_only: bool = False) -> float:
        """Return the median over rounds of this contender's median time over `other`'s."""
        pairs = zip(self.policy_rounds if policy_only else self.rounds, other.rounds, strict=True)
        return float(np.median([np.median(mine) / np.median(theirs) for mine, theirs in pairs]))


def measure(cfg: DictConfig, console: Console) -> dict[str, Any]:
    """Time every engine with every sampler; return what is also written to `cfg.out`.json."""
    loaded = load(cfg)
    with threads(cfg.num_threads), torch.no_grad():
        windows = record_windows(loaded, cfg.n_observations)
        contenders: list[Contender] = []
        floors: dict[tuple[str, int], Contender] = {}
        for engine in cfg.engines:
            with console.status(f"building {engine}"):
                policy = build_engine(loaded.policy, engine, max_unrolled=cfg.max_unrolled)
                added = [_planned(cfg, loaded, policy, engine, sampler) for sampler in cfg.samplers]
                for contender in added:
                    for obs in windows[:3]:
                        contender.tick(obs)  # captures what there is to capture
                bare = _bare_network(loaded.policy, engine)
                for count in sorted({max(1, round(contender.calls())) for contender in added}):
                    floors[engine, count] = _floor(bare, loaded.policy, engine, count)
            contenders += added
        with real_time() if cfg.real_time else contextlib.nullcontext():
            _take_turns([*contenders, *floors.values()], windows, cfg, console)
        success = find_success(cfg, loaded, console)
    rows = [_compared(contender, contenders, floors, success) for contender in contenders]
    result = {
        "what": "latency",
        "checkpoint": str(loaded.path),
        "threads": cfg.num_threads,
        "control_period_ms": 1e3 * loaded.spec.action.control_dt_s,
        "rounds": cfg.rounds,
        "ticks_per_round": cfg.ticks,
        "max_unrolled": cfg.max_unrolled,
        "real_time": cfg.real_time,
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
        "floors": [floor.row() for floor in floors.values()],
    }
    show(result, console)
    if cfg.out:
        write(Path(cfg.out), result, console)
    return result


def record_windows(loaded: LoadedPolicy, most: int) -> list[Observation]:
    """Return the windows of observations [1, O, ...] of one episode in simulation, in order."""
    env = build_env(loaded, 1)
    actor = ChunkActor(build_planner(FRESH, loaded.policy, 1, loaded.path), 1)
    window = ObservationWindow(loaded.spec, loaded.policy.timing.n_obs_steps, 1)
    frame, _ = env.reset(seed=[EVALUATION_SEED])
    found = []
    for _ in range(min(most, loaded.spec.max_episode_steps)):
        window.push(frame)
        found.append(Observation(modalities={n: v.clone() for n, v in window.observation.modalities.items()}))
        frame, *_ = env.step(actor(frame, generator=[torch.Generator().manual_seed(0)]))
    env.close()
    return found


class _Sampled:
    """A policy that samples by another sampler than its own."""

    def __init__(self, policy: Any, sampler: Any) -> None:
        self._policy = policy
        self._sampler = sampler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_policy"], name)

    def act(self, obs: Observation, **settings: Any) -> Tensor:
        return self._policy.act(obs, sampler=self._sampler, **settings)


class _Timed:
    """A policy that adds up the seconds spent in it."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self.seconds = 0.0
        for name in OUTPUTS:
            if hasattr(policy, name):
                setattr(self, name, functools.partial(self._time, getattr(policy, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_policy"], name)

    def take(self) -> float:
        """Return the seconds since this was last asked."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def _time(self, method: Callable[..., Any], *args: Any, **settings: Any) -> Any:
        begin = time.perf_counter()
        result = method(*args, **settings)
        self.seconds += time.perf_counter() - begin
        return result


def make_planner(cfg: DictConfig, loaded: LoadedPolicy, policy: Any, name: str, num_envs: int) -> Planner:
    """Return the planner called `name`: ddpm_<k>, ddim_<k>, flow_<k>, rti, rti_<k>, or rti_adaptive.

    Raises:
        RobopolicyError: there is no such planner, or the policy cannot be sampled so.
    """
    from robopolicy.sampling.flow import FlowSampler
    from robopolicy.sampling.samplers import DDIMSampler, DDPMSampler

    samplers: Mapping[str, Any] = {"ddpm": DDPMSampler, "ddim": DDIMSampler, "flow": FlowSampler}
    kind, _, number = name.partition("_")
    if kind in samplers and number.isdigit():
        sampled: Any = _Sampled(policy, samplers[kind](num_inference_steps=int(number)))
        return build_planner(FRESH, sampled, num_envs, loaded.path)
    if kind == "rti" and (number.isdigit() or number in ("", "adaptive")):
        config = resolve_planner(cfg.planner, loaded.path)
        if number == "adaptive":
            config |= {"accept_below": cfg.accept_below, "resample_above": cfg.resample_above}
        elif number and "tau" in config["warm_start"]:
            config["warm_start"] = {**config["warm_start"], "num_inference_steps": int(number)}
        elif number:
            top = config["warm_start"]["timesteps"][0] if int(number) > 1 else 0
            while len(spaced(top, int(number))) < int(number):  # a calibrated K' may be as low as 1
                top += 1
            config["warm_start"] = {**config["warm_start"], "timesteps": list(spaced(top, int(number)))}
        return build_planner(config, policy, num_envs, loaded.path)
    raise RobopolicyError(
        f"Unknown sampler {name!r}; there are ddpm_<k>, ddim_<k>, flow_<k>, rti, rti_<k> and rti_adaptive."
    )


def _planned(cfg: DictConfig, loaded: LoadedPolicy, policy: Any, engine: str, sampler: str) -> Contender:
    timed = _Timed(policy)
    planner = make_planner(cfg, loaded, timed, sampler, 1)
    rows, shift = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    noise = [torch.Generator().manual_seed(0)]
    calls: list[float] = []

    def tick(obs: Observation) -> None:
        planner(obs, rows, shift=shift, generator=noise)
        said = planner.diagnostics
        if sampler == "rti_adaptive" and said["warm"].all():
            calls.append(float(said["network_calls"]))

    def average() -> float:
        if sampler == "rti_adaptive":
            return float(np.mean(calls))
        return float(planner.warm_start.num_calls if sampler == "rti" else sampler.partition("_")[2])  # type: ignore[attr-defined]

    return Contender(
        engine=engine, sampler=sampler, tick=tick, reset=planner.reset, calls=average, in_policy=timed.take
    )


def _bare_network(policy: Any, engine: str) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """Return the policy's network alone, in `engine`."""
    if engine == "eager":
        return policy.network
    inputs = _network_inputs(policy)
    return build_graph(
        engine,
        policy.network,
        inputs,
        what="the network",
        names=["x", "level", "cond"],
        outputs=["output"],
        num_threads=torch.get_num_threads(),
    )


def _network_inputs(policy: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(1, policy.timing.horizon, policy.spec.action.dim)
    return x, torch.zeros(1, dtype=torch.int64), torch.randn(1, policy.encoder.out_dim)


def _floor(bare: Callable[..., Any], policy: Any, engine: str, count: int) -> Contender:
    """Return `count` bare network calls as a contender."""
    inputs = _network_inputs(policy)

    def tick(obs: Observation) -> None:
        with torch.inference_mode():
            for _ in range(count):
                bare(*inputs)

    return Contender(
        engine=engine, sampler=f"{count} bare calls", tick=tick, reset=lambda: None, calls=lambda: float(count)
    )


@contextlib.contextmanager
def real_time(priority: int = 10) -> Iterator[None]:
    """Let no ordinary process interrupt this one for as long as the block lasts, as `chrt -f` does.

    Raises:
        RobopolicyError: not allowed, or no such thing here.
    """
    if not hasattr(os, "sched_setscheduler"):
        raise RobopolicyError("real_time=true is for Linux; real_time=false measures beside whatever else runs.")
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except PermissionError as error:
        raise RobopolicyError(
            "real_time=true needs the right to real-time scheduling (root, or rtprio in /etc/security/limits.conf); "
            "real_time=false measures beside whatever else runs."
        ) from error
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def _take_turns(
    contenders: Sequence[Contender], windows: Sequence[Observation], cfg: DictConfig, console: Console
) -> None:
    """Run `cfg.rounds` rounds of `cfg.ticks` ticks each, in an order that changes from round to round."""
    from rich.progress import track

    order = np.random.default_rng(0)
    for _ in track(range(cfg.rounds), "rounds", console=console, transient=True, disable=not console.is_terminal):
        start = int(order.integers(len(windows)))
        for at in order.permutation(len(contenders)):
            contender = contenders[at]
            contender.reset()
            seconds, policy_seconds = [], []
            for tick in range(1 + WARMUP_TICKS + cfg.ticks):
                obs = windows[(start + tick) % len(windows)]
                begin = time.perf_counter()
                contender.tick(obs)
                seconds.append(time.perf_counter() - begin)
                policy_seconds.append(contender.in_policy())
            contender.policy_rounds.append(policy_seconds[1 + WARMUP_TICKS :])
            contender.first.append(seconds[0])
            contender.rounds.append(seconds[1 + WARMUP_TICKS :])


def _compared(
    contender: Contender,
    contenders: Sequence[Contender],
    floors: Mapping[tuple[str, int], Contender],
    success: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the contender's row with its ratios."""

    def find(engine: str, sampler: str) -> Contender | None:
        return next((one for one in contenders if (one.engine, one.sampler) == (engine, sampler)), None)

    eager, full = find("eager", contender.sampler), find(contender.engine, "ddpm_100")
    floor = floors[contender.engine, max(1, round(contender.calls()))]
    return {
        **contender.row(),
        "over_bare_calls": contender.over(floor),
        "policy_over_bare_calls": contender.over(floor, policy_only=True),
        "faster_than_ddpm_100": None if full is None else full.over(contender),
        "faster_than_eager": None if eager is None else eager.over(contender),
        "success": success.get(contender.sampler),
    }


def find_success(cfg: DictConfig, loaded: LoadedPolicy, console: Console) -> dict[str, dict[str, Any]]:
    """Return each sampler's success: from the evaluations given, or from episodes run with the last engine."""
    found: dict[str, dict[str, Any]] = {}
    for sampler, folder in cfg.evaluations.items():
        top = read_evaluation(Path(folder)).info["overall"]
        found[sampler] = {"n_success": top["n_success"], "n_episodes": top["n_episodes"]}
    wanted = [sampler for sampler in cfg.samplers if sampler not in found] if cfg.success_episodes else []
    if wanted:
        num_envs = min(cfg.success_episodes, 25)
        env = build_env(loaded, num_envs)
        policy = build_engine(loaded.policy, cfg.engines[-1], max_unrolled=cfg.max_unrolled)
        for sampler in wanted:
            actor = ChunkActor(make_planner(cfg, loaded, policy, sampler, num_envs), num_envs)
            with console.status(f"{cfg.success_episodes} episodes of {sampler}"):
                seeds = range(EVALUATION_SEED, EVALUATION_SEED + cfg.success_episodes)
                result = evaluate(actor, env, seeds=list(seeds))
            found[sampler] = {"n_success": result.num_success, "n_episodes": cfg.success_episodes}
        env.close()
    for one in found.values():
        one["ci95"] = wilson_interval(one["n_success"], one["n_episodes"])
    return found
