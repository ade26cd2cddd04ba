"""How fast the simulation steps: ManiSkill's single environment, its processes, and our batch, measured in turn.

All contenders run the same task with random actions for a short while, one after the other, several rounds long, so
that whatever else the machine does meets them alike. Resets are not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch

from .batched_cpu import make_batched
from .physx_threads import thread_count
from .rendering import inert_materials, load_maniskill


@dataclass(kw_only=True)
class Speed:
    """What one contender did."""

    name: str
    num_envs: int
    steps_per_s: list[float] = field(default_factory=list)
    """Environment steps per second, one entry per round."""
    over_physx: list[float] = field(default_factory=list)
    """Time per step over the time that PhysX alone took in the same steps; only for the batch."""

    @property
    def median(self) -> float:
        return statistics.median(self.steps_per_s)

    def ratio(self, other: Speed) -> float:
        """Return the median over rounds of how many times faster this was than `other`."""
        return statistics.median(a / b for a, b in zip(self.steps_per_s, other.steps_per_s, strict=True))


def measure(
    env_id: str, control_mode: str, *, num_envs: Sequence[int], rounds: int, seconds: float
) -> Iterator[list[Speed]]:
    """Yield the speeds so far after each round: stock single, stock in one process per core, the batch per N.

    Args:
        env_id: ManiSkill's name of the environment.
        control_mode: ManiSkill's name of the controller.
        num_envs: sizes of the batch.
        rounds: how often every contender runs.
        seconds: how long, each time.
    """
    load_maniskill()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a batch of states is too small to share
    settings = {"obs_mode": "state", "control_mode": control_mode}
    contenders: list[tuple[Speed, Any, Callable[[Any, Speed, float], None]]] = []
    try:
        single = Speed(name="ManiSkill, one environment", num_envs=1)
        contenders.append((single, _Stock(env_id, settings), _run_single))
        cores = thread_count()
        processes = Speed(name=f"AsyncVectorEnv, {cores} processes", num_envs=cores)
        workers = gymnasium.vector.AsyncVectorEnv([_Stock(env_id, settings)] * cores, context="spawn")
        workers.reset(seed=0)
        contenders.append((processes, workers, _run_processes))
        for n in num_envs:
            batch = make_batched(env_id, n, **settings)
            batch.reset(seed=list(range(n)))
            contenders.append((Speed(name=f"batch, N={n}", num_envs=n), batch, _run_batch))
        stock = contenders[0][1]()
        contenders[0] = (single, stock, _run_single)
        for speed, env, run in contenders:  # compile and warm up
            run(env, Speed(name=speed.name, num_envs=speed.num_envs), 0.2)
        for _ in range(rounds):
            for speed, env, run in contenders:
                run(env, speed, seconds)
            yield [speed for speed, _, _ in contenders]
    finally:
        for _, env, _ in contenders:
            if hasattr(env, "close"):
                env.close()
        torch.set_num_threads(before)


class _Stock:
    """Makes ManiSkill's own single environment on the CPU; picklable, for worker processes."""

    def __init__(self, env_id: str, settings: dict[str, Any]) -> None:
        self._env_id, self._settings = env_id, settings

    def __call__(self) -> gymnasium.Env[Any, Any]:
        load_maniskill()
        from mani_skill.utils.wrappers.gymnasium import CPUGymWrapper

        torch.set_num_threads(1)
        with inert_materials():
            env = gymnasium.make(self._env_id, sim_backend="physx_cpu", render_backend="none", **self._settings)
        wrapped = CPUGymWrapper(env)
        wrapped.reset(seed=0)
        return wrapped


def _actions(count: int, space: gymnasium.spaces.Box) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).uniform(-1, 1, (100, count, *space.shape)).astype(np.float32)


def _run_single(env: Any, speed: Speed, seconds: float) -> None:
    env.reset(seed=0)
    actions, steps = _actions(1, env.action_space)[:, 0], 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        env.step(actions[steps % 100])
        steps += 1
    speed.steps_per_s.append(steps / (time.perf_counter() - start))


def _run_processes(env: Any, speed: Speed, seconds: float) -> None:
    env.reset(seed=0)
    actions, steps = _actions(env.num_envs, env.single_action_space), 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        env.step(actions[steps % 100])
        steps += 1
    speed.steps_per_s.append(steps * env.num_envs / (time.perf_counter() - start))


def _run_batch(env: Any, speed: Speed, seconds: float) -> None:
    env.reset(seed=list(range(env.num_envs)))
    actions, steps = torch.from_numpy(_actions(env.num_envs, env.single_action_space)), 0
    system = env.scene.px
    stepping = 0.0
    advance = system.step_many

    def timed(count: int) -> None:
        nonlocal stepping
        begin = time.perf_counter()
        advance(count)
        stepping += time.perf_counter() - begin

    system.step_many = timed
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        env.step(actions[steps % 100])
        steps += 1
    spent = time.perf_counter() - start
    del system.step_many
    speed.steps_per_s.append(steps * env.num_envs / spent)
    speed.over_physx.append(spent / stepping)
