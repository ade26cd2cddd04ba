"""Episodes of a policy in a batch of simulated environments: every seed gets one whole episode, none is favoured.

Episodes run in waves of `env.num_envs`. All environments of a wave start together from their own seeds and run to the
same length: nothing resets in between, so short (successful) episodes are not counted more often than long ones.
Sampling noise comes from one generator per episode, seeded from its seed: an outcome does not depend on the wave.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from robopolicy.errors import RobopolicyError
from robopolicy.evaluation.episodes import Episode, Wave
from robopolicy.evaluation.statistics import Latency, drop_warmup, wilson_interval
from robopolicy.rng import Rng
from robopolicy.types import Environment, Frame, check_shape


class Actor(Protocol):
    """Something that acts in N environments and keeps what it must remember of each."""

    @property
    def replanned(self) -> bool:
        """Whether the last call ran the policy (and did not only play on a chunk)."""

    def __call__(self, frame: Frame, *, generator: Rng = None) -> Tensor:
        """Return the actions [N, A] to execute now."""

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget the episodes of `rows` [N] bool, or all of them."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """All episodes in the order of the seeds, and where the time went."""

    episodes: tuple[Episode, ...]
    latency: Latency
    """Of the calls that ran the policy, at batch size `num_envs`."""
    num_envs: int
    max_episode_steps: int
    wall_s: float
    reset_s: float
    simulation_s: float
    policy_s: float
    num_env_steps: int
    """Simulated steps, padding of the last wave included."""

    @property
    def num_success(self) -> int:
        return sum(episode.success_once for episode in self.episodes)

    @property
    def success_once(self) -> float:
        return self.num_success / len(self.episodes)

    @property
    def success_at_end(self) -> float | None:
        ends = [episode.success_at_end for episode in self.episodes]
        return None if any(end is None for end in ends) else sum(map(bool, ends)) / len(ends)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95 % interval of `success_once`."""
        return wilson_interval(self.num_success, len(self.episodes))

    @property
    def other_s(self) -> float:
        return max(0.0, self.wall_s - self.reset_s - self.simulation_s - self.policy_s)

    @property
    def env_steps_per_s(self) -> float:
        return self.num_env_steps / self.wall_s


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a progress bar shows after each step of a wave."""

    steps_done: int
    steps_total: int
    episodes_started: int
    num_success: int


@dataclass
class _Clock:
    """Time by activity, and the length of each policy call."""

    device: torch.device
    reset_s: float = 0.0
    simulation_s: float = 0.0
    policy_s: float = 0.0
    replan_s: list[float] = field(default_factory=list)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def evaluate(
    actor: Actor,
    env: Environment,
    *,
    seeds: Sequence[int],
    max_episode_steps: int | None = None,
    noise_seed: int = 0,
    stop_on_success: bool = False,
    num_warmup_calls: int = 2,
    on_step: Callable[[Progress], None] | None = None,
) -> EvalResult:
    """Run one episode per seed and return all outcomes in that order.

    Args:
        actor: acts for `env.num_envs` environments; reset before every wave.
        env: must not reset by itself. The last wave is filled up with further seeds whose outcomes are dropped.
        seeds: of the episodes, all different.
        max_episode_steps: control steps per episode; the task's own length if None.
        noise_seed: with the episode's seed it gives the sampling noise; change it to sample again from the same starts.
        stop_on_success: end an episode at its first success (faster; success_at_end is then not measured).
        num_warmup_calls: policy calls at the start that do not count as latency.
        on_step: called after each step of a wave.

    Raises:
        RobopolicyError: no or repeated seeds; the environment resets by itself or reports no success; an action is
            not finite.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise RobopolicyError(f"Evaluation needs at least one seed and each only once; got {list(seeds)}.")
    steps = max_episode_steps or env.task_spec.max_episode_steps
    clock = _Clock(device=torch.device(env.device))
    waves = list(_waves(seeds, env.num_envs))
    episodes: list[Episode] = []
    steps_run = 0
    begin = clock.now()
    for wave in waves:
        report = _reporter(on_step, episodes, steps, len(waves), env.num_envs, len(seeds))
        record = _run_wave(actor, env, wave, steps, noise_seed, stop_on_success, clock, report)
        steps_run += len(record.rewards) * env.num_envs
        episodes += record.episodes(wave[: len(seeds) - len(episodes)], stop_on_success, env.task_spec.action)
    return EvalResult(
        episodes=tuple(episodes),
        latency=drop_warmup(clock.replan_s, batch_size=env.num_envs, num_warmup=num_warmup_calls),
        num_envs=env.num_envs,
        max_episode_steps=steps,
        wall_s=clock.now() - begin,
        reset_s=clock.reset_s,
        simulation_s=clock.simulation_s,
        policy_s=clock.policy_s,
        num_env_steps=steps_run,
    )


def _reporter(
    on_step: Callable[[Progress], None] | None,
    episodes: Sequence[Episode],
    steps: int,
    num_waves: int,
    num_envs: int,
    num_seeds: int,
) -> Callable[[int, Tensor], None]:
    """Return what tells `on_step` of each step of the wave that follows `episodes`."""
    before, won = len(episodes), sum(episode.success_once for episode in episodes)
    wanted = min(num_envs, num_seeds - before)

    def report(step: int, success: Tensor) -> None:
        if on_step is not None:
            on_step(
                Progress(
                    steps_done=before // num_envs * steps + step,
                    steps_total=num_waves * steps,
                    episodes_started=before + wanted,
                    num_success=won + int(success[:wanted].sum()),
                )
            )

    return report


def noise_generator(seed: int, noise_seed: int = 0) -> torch.Generator:
    """Return the generator of one episode's sampling noise; it depends on nothing but these two numbers."""
    mixed = np.random.SeedSequence([seed, noise_seed]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed >> np.uint64(1)))


def actor_latency(actor: Actor, frame: Frame, *, num_calls: int = 50, num_warmup_calls: int = 5) -> Latency:
    """Measure replanning at batch 1 on the first row of `frame`, as a robot would feel it.

    Args:
        actor: acts for one environment; it is reset before every call, so that each call runs the policy.
        frame: a recorded observation, [N, S] per modality.
    """
    one = {name: value[:1] for name, value in frame.items()}
    clock = _Clock(device=next(iter(one.values())).device)
    generator = noise_generator(0)
    seconds = []
    for _ in range(num_warmup_calls + num_calls):
        actor.reset()
        begin = clock.now()
        with torch.no_grad():
            actor(one, generator=[generator])
        seconds.append(clock.now() - begin)
    actor.reset()
    return drop_warmup(seconds, batch_size=1, num_warmup=num_warmup_calls)


@torch.no_grad()
def _run_wave(
    actor: Actor,
    env: Environment,
    seeds: Sequence[int],
    steps: int,
    noise_seed: int,
    stop_on_success: bool,
    clock: _Clock,
    report: Callable[[int, Tensor], None],
) -> Wave:
    record = Wave(env.num_envs)
    generators = [noise_generator(seed, noise_seed) for seed in seeds]
    before = clock.now()
    frame, _ = env.reset(seed=list(seeds))
    actor.reset()
    clock.reset_s += clock.now() - before
    ever = torch.zeros(env.num_envs, dtype=torch.bool)
    nobody = torch.zeros(env.num_envs, dtype=torch.bool)
    skip_pictures = getattr(env, "skip_pictures", None)  # drawing those that no plan will see may take most of the time
    for step in range(steps):
        before = clock.now()
        action = actor(frame, generator=generators)
        planned = clock.now()
        clock.policy_s += planned - before
        if actor.replanned:
            clock.replan_s.append(planned - before)
            record.note_plans(getattr(actor, "planned", None), step)
        _check_action(action, env, seeds, step)
        before = clock.now()
        if skip_pictures is not None:
            skip_pictures(not getattr(actor, "sees_next", True))
        frame, reward, _, _, info = env.step(action.to(env.device))
        clock.simulation_s += clock.now() - before
        success = _success(info, env)
        record.note_step(action, getattr(actor, "held", nobody), reward, success, info)
        ever |= success
        report(step + 1, ever)
        if stop_on_success and ever.all():
            break
    return record


def _waves(seeds: Sequence[int], num_envs: int) -> Iterator[list[int]]:
    spare = max(seeds) + 1
    for start in range(0, len(seeds), num_envs):
        wave = list(seeds[start : start + num_envs])
        yield wave + list(range(spare, spare + num_envs - len(wave)))


def _success(info: dict[str, Any], env: Environment) -> Tensor:
    if "final_info" in info:
        raise RobopolicyError(
            "The environment reset itself during evaluation; short episodes would count more often than long ones. "
            "Build it with auto_reset=False."
        )
    if "success" not in info:
        found = ", ".join(sorted(info)) or "nothing"
        raise RobopolicyError(f"Task {env.task_spec.name!r} reports no success; its info has only: {found}.")
    return torch.as_tensor(info["success"]).bool().cpu().clone()


def _check_action(action: Tensor, env: Environment, seeds: Sequence[int], step: int) -> None:
    check_shape("action of the actor", action, "N A", N=env.num_envs, A=env.task_spec.action.dim)
    if not bool(torch.isfinite(action).all()):
        rows = (~torch.isfinite(action).all(dim=-1)).nonzero().flatten().tolist()
        raise RobopolicyError(
            f"The policy commanded values that are not finite at step {step} of seeds "
            f"{', '.join(str(seeds[row]) for row in rows)}."
        )
