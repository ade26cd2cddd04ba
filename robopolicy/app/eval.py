"""Measure a checkpoint's success in simulation on fixed seeds, with its interval, latency and film."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig
    from rich.console import Console

    from robopolicy.evaluation.rollout import Actor, EvalResult
    from robopolicy.evaluation.statistics import Latency
    from robopolicy.policies.base import Policy
    from robopolicy.policies.planners import Planner
    from robopolicy.training.checkpoint import LoadedPolicy
    from robopolicy.types import Environment, Frame

EXAMPLES: tuple[tuple[str, str], ...] = (
    ("robopolicy eval checkpoint=pick_cube", "100 episodes of the run's last step, success with its 95 % interval"),
    ("robopolicy eval checkpoint=pick_cube n_episodes=25 --video", "a quick look, with a film of the first 9 episodes"),
    ("robopolicy eval checkpoint=pick_cube episode=17 --video", "one episode, the one that starts from seed + 17"),
    (
        "robopolicy eval checkpoint=pick_cube latency=fixed_ms:200 executor=sync",
        "the simulation goes on while the policy thinks for 200 ms, and the robot stands still meanwhile",
    ),
    (
        "robopolicy eval checkpoint=pick_cube shift=suite n_episodes=50",
        "clean and under every perturbation of docs/shifts.md, paired on the same seeds",
    ),
    (
        "robopolicy eval checkpoint=pick_cube policy.sampler.num_inference_steps=4 n_action_steps=4",
        "the same weights with fewer denoising steps, replanning more often",
    ),
)

MOST_ENVS = {"cuda": 256, "cpu": 25, "single": 1}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate `cfg.checkpoint` and write its folder under the run's `eval/`."""
    if cfg.shift == "suite":
        from robopolicy.app.eval_suite import run_suite

        return run_suite(cfg)
    return run_one(cfg)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What is evaluated: the policy behind its engine, on which seeds, into which folder."""

    cfg: DictConfig
    loaded: LoadedPolicy
    policy: Policy
    device: torch.device
    settings: dict[str, Any]
    folder: Path
    backend: str
    num_envs: int

    @property
    def seeds(self) -> list[int]:
        return list(self.settings["seeds"])

    def planner(self, num_envs: int) -> Planner:
        from robopolicy.app.build import build_planner

        return build_planner(self.cfg.planner, self.policy, num_envs, self.loaded.path)


def run_one(cfg: DictConfig, *, quiet: bool = False, keep: bool = False) -> dict[str, Any]:
    """Evaluate one setting: `cfg.shift` is a single one, or none.

    Args:
        quiet: print nothing.
        keep: do not repeat an evaluation with the same settings that is already there.
    """
    from rich.console import Console

    from robopolicy import atomic
    from robopolicy.app.eval_pictures import failure_sheet, film
    from robopolicy.app.eval_words import say
    from robopolicy.evaluation import results
    from robopolicy.training.fit import threads

    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
    job = _prepared(cfg)
    earlier = results.require_free(job.folder, job.settings, overwrite=cfg.overwrite)
    if keep and earlier is not None and earlier.info["settings"] == job.settings:
        return {"folder": str(job.folder), **earlier.info["overall"]}
    with threads(cfg.num_threads or (1 if not _sees_images(job.loaded) else None)):
        result, times = _measured(job, console)
        with atomic.new_folder(job.folder) as staged:
            build = functools.partial(_environment, job, render=True)
            video = film(cfg, build, result, staged, job.backend, console) if cfg.video else None
            failures = failure_sheet(cfg, build, result, staged, console) if cfg.video or cfg.failures else None
            info = _described(job, result, times, video, failures)
            results.write_results(staged, info, result)
    say(console, info, job.folder, earlier, results.read_evaluation(job.folder))
    return {"folder": str(job.folder), **info["overall"]}


def _prepared(cfg: DictConfig) -> _Job:
    """Load what `cfg` names and check what can be checked before anything is simulated."""
    from robopolicy.app.eval_words import default_name
    from robopolicy.envs import default_backend
    from robopolicy.errors import RobopolicyError
    from robopolicy.evaluation import results

    if cfg.n_episodes < 1:
        raise RobopolicyError(f"n_episodes must be at least 1; got {cfg.n_episodes}.")
    device = _device(cfg.device)
    changes = dict(_changes(cfg.policy))
    loaded = _load(cfg, changes, device)
    _require_actionable(cfg.n_action_steps, loaded)
    seeds = list(range(cfg.seed, cfg.seed + cfg.n_episodes)) if cfg.episode is None else [cfg.seed + cfg.episode]
    results.require_disjoint(seeds, demonstration_seeds(loaded.config))
    backend = default_backend() if cfg.backend == "auto" else cfg.backend
    name = cfg.name or default_name(cfg, loaded.step, changes)
    return _Job(
        cfg=cfg,
        loaded=loaded,
        policy=_engine(loaded.policy, cfg.engine),
        device=device,
        settings=_settings(cfg, loaded, changes, seeds),
        folder=results.run_folder(loaded.path) / "eval" / name,
        backend=backend,
        num_envs=cfg.num_envs or _even_waves(len(seeds), MOST_ENVS.get(backend, 1)),
    )


def _measured(job: _Job, console: Console) -> tuple[EvalResult, tuple[Latency, Latency]]:
    """Run the episodes; return their result, and how long planning for one takes: the first plan, later ones."""
    from robopolicy.evaluation.latency import planner_latency
    from robopolicy.evaluation.progress import progress_bar
    from robopolicy.evaluation.rollout import evaluate

    cfg = job.cfg
    env = _environment(job, num_envs=job.num_envs)
    frame, _ = env.reset(seed=job.seeds[0])
    if hasattr(job.loaded.policy, "descent_path") and cfg.shift is None:
        _landscape(job, frame)
    measured = job.settings["latency"] == "measured"  # then the times decide the outcome
    times = planner_latency(job.planner(1), frame, num_calls=100 if measured else 25)
    with progress_bar(len(job.seeds), console=console) as show:
        result = evaluate(
            _actor(job, env, times),
            env,
            seeds=job.seeds,
            noise_seed=cfg.noise_seed,
            stop_on_success=cfg.stop_on_success,
            on_step=show,
        )
    env.close()
    return result, times


def _landscape(job: _Job, frame: Frame) -> None:
    """Draw the energy that the policy descends on, at the start of the first episode, into the run's folder."""
    import torch

    from robopolicy.evaluation.landscape import save_landscape
    from robopolicy.evaluation.results import run_folder
    from robopolicy.evaluation.rollout import noise_generator
    from robopolicy.policies.actors import ObservationWindow

    policy: Any = job.loaded.policy
    window = ObservationWindow(policy.spec, policy.timing.n_obs_steps, job.num_envs)
    window.push(frame)
    first = window.observation.take(torch.tensor([0])).to(job.device)
    path = run_folder(job.loaded.path) / "landscape.png"
    save_landscape(policy, first, path, generator=noise_generator(job.seeds[0], job.cfg.noise_seed))


def _actor(job: _Job, env: Environment, times: tuple[Latency, Latency]) -> Actor:
    """Return what plays the planner's chunks: at once, or as late as the latency asked for makes them."""
    from robopolicy.envs.holding import hold_action
    from robopolicy.evaluation.latency import FixedDelay, LatencyActor, LatencyMode, RecordedDelay
    from robopolicy.policies.actors import ChunkActor

    cfg = job.cfg
    planner = job.planner(job.num_envs)
    latency = LatencyMode.parse(cfg.latency)
    if latency.mode == "frozen":
        return ChunkActor(planner, job.num_envs, n_action_steps=cfg.n_action_steps)
    return LatencyActor(
        planner,
        job.num_envs,
        delays=RecordedDelay(*times) if latency.ms is None else FixedDelay(seconds=latency.ms / 1e3),
        start=functools.partial(hold_action, env),
        executor=cfg.executor,
        n_action_steps=cfg.n_action_steps,
    )


def _described(
    job: _Job,
    result: EvalResult,
    times: tuple[Latency, Latency],
    video: dict[str, Any] | None,
    failures: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the content of eval_info.json."""
    from robopolicy.app.eval_words import repeating_command
    from robopolicy.evaluation.results import eval_info

    loaded = job.loaded
    spec = dataclasses.replace(loaded.spec, max_episode_steps=result.max_episode_steps)
    return eval_info(
        result,
        task=spec.to_dict(),
        checkpoint={
            "path": str(loaded.path),
            "step": loaded.step,
            "weights_sha256": job.settings["weights_sha256"],
            "robopolicy_version": loaded.config.get("robopolicy_version"),
        },
        settings=job.settings,
        latency_batch_1=times[1],
        latency_first_plan=times[0],
        backend=job.backend,
        device=str(job.device),
        command=repeating_command(job.cfg),
        video=video,
        failures=failures,
    )


def demonstration_seeds(config: Mapping[str, Any]) -> list[int]:
    """Return the seeds of the demonstrations that policy.json names; none if it names none."""
    seeds = (config.get("data") or {}).get("seeds") or []
    return [int(seed) for seed in seeds]


def _load(cfg: DictConfig, changes: Mapping[str, Any], device: torch.device) -> LoadedPolicy:
    """Return the checkpoint's policy, built from its own config with `changes` applied."""
    from omegaconf import OmegaConf

    from robopolicy.app.build import build_policy
    from robopolicy.training import checkpoint
    from robopolicy.types import TaskSpec

    def build(config: Mapping[str, Any], spec: TaskSpec) -> Policy:
        merged = OmegaConf.create(dict(config))
        for key, value in changes.items():
            OmegaConf.update(merged, key, value, force_add=True)
        return build_policy(merged, spec)

    return checkpoint.load(cfg.checkpoint, build, device=device)


def _device(name: str) -> torch.device:
    """Return the device called `name`; `auto` is the GPU where there is one."""
    import torch

    from robopolicy.errors import MissingRequirementError, UnknownNameError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UnknownNameError("device", name, ("auto", "cpu", "cuda", "cuda:0"))
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise MissingRequirementError(f"device={name}: torch finds no CUDA device here; device=cpu works everywhere.")
    return torch.device(name)


def _require_actionable(n_action_steps: int | None, loaded: LoadedPolicy) -> None:
    """Raise RobopolicyError if chunks of this policy cannot be executed for `n_action_steps`."""
    from robopolicy.errors import RobopolicyError

    if n_action_steps is not None:
        try:
            dataclasses.replace(loaded.policy.timing, n_action_steps=n_action_steps)
        except ValueError as error:
            raise RobopolicyError(str(error)) from error


def _environment(job: _Job, *, num_envs: int, render: bool = False) -> Environment:
    """Build the environment that the policy was trained for, make sure that it is, and perturb it as asked.

    Raises:
        SpecMismatchError: it observes or acts otherwise.
    """
    from robopolicy.envs import make
    from robopolicy.envs.specs import ObsMode

    cfg, loaded = job.cfg, job.loaded
    saved = loaded.spec
    env: Environment = make(
        saved.name,
        num_envs=num_envs,
        backend=job.backend,
        control_mode=saved.action.control_mode,
        obs_mode=str(ObsMode.of(saved)),
        max_episode_steps=job.settings["max_episode_steps"],
        render=render,
        **({"render_size": cfg.video_tile_px} if render else {}),
    )
    saved.require_same(env.task_spec, mine=f"The policy in {loaded.path}", theirs=f"task {env.task_spec.name!r}")
    if cfg.shift is not None:
        from robopolicy.envs.shifts import apply, parse_shift

        env = apply(env, parse_shift(cfg.shift))
    return env


def _engine(policy: Policy, name: str) -> Policy:
    """Return `policy` behind the engine called `name`."""
    if name == "eager":
        return policy
    from robopolicy.policies.engines import build_engine

    engine: Policy = build_engine(policy, name)
    return engine


def _sees_images(loaded: LoadedPolicy) -> bool:
    return any(modality.is_image for modality in loaded.spec.observation.values())


def _changes(policy: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of what the command line changes in the policy's config."""
    for key, value in policy.items():
        if hasattr(value, "items"):
            yield from _changes(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _settings(cfg: DictConfig, loaded: LoadedPolicy, changes: Mapping[str, Any], seeds: list[int]) -> dict[str, Any]:
    """Return all that decides the outcome on a given machine."""
    from robopolicy.app.build import build_planner, resolve_planner
    from robopolicy.errors import UnknownNameError
    from robopolicy.evaluation.latency import EXECUTORS, LatencyMode
    from robopolicy.evaluation.results import sha256

    if cfg.executor not in EXECUTORS:
        raise UnknownNameError("executor", cfg.executor, EXECUTORS)
    planner = build_planner(cfg.planner, loaded.policy, 1, loaded.path)
    return {
        "weights_sha256": sha256(loaded.path / "model.safetensors"),
        "task": loaded.spec.name,
        "seeds": seeds,
        "noise_seed": cfg.noise_seed,
        "max_episode_steps": cfg.max_episode_steps or loaded.spec.max_episode_steps,
        "stop_on_success": cfg.stop_on_success,
        "n_action_steps": cfg.n_action_steps or planner.timing.n_action_steps,
        "policy_overrides": dict(changes),
        "sampler": loaded.config["policy"].get("sampler"),
        "latency": str(LatencyMode.parse(cfg.latency)),
        "executor": cfg.executor,
        "planner": resolve_planner(cfg.planner, loaded.path),
        "engine": cfg.engine,
        "shift": _shift_name(cfg.shift),
    }


def _shift_name(shift: str | None) -> str | None:
    """Return `shift` with its level spelled out."""
    if shift is None:
        return None
    from robopolicy.envs.shifts import parse_shift

    found = parse_shift(shift)
    return f"{found.name}:{found.level}"


def _even_waves(n_episodes: int, most: int) -> int:
    """Return the number of environments that runs `n_episodes` in as few waves as `most` does, with least padding."""
    waves = -(-n_episodes // most)
    return -(-n_episodes // waves)
