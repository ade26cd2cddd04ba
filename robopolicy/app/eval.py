"""Measure a checkpoint's success in simulation on fixed seeds, with its interval, latency and film."""

from __future__ import annotations

import dataclasses
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig
    from rich.console import Console

    from robopolicy.evaluation.results import Evaluation
    from robopolicy.evaluation.rollout import EvalResult
    from robopolicy.training.checkpoint import LoadedPolicy
    from robopolicy.types import Environment, Frame

EXAMPLES: tuple[tuple[str, str], ...] = (
    ("robopolicy eval checkpoint=pick_cube", "100 episodes of the run's last step, success with its 95 % interval"),
    ("robopolicy eval checkpoint=pick_cube n_episodes=25 --video", "a quick look, with a film of the first 9 episodes"),
    (
        "robopolicy eval checkpoint=pick_cube policy.sampler.num_inference_steps=4 n_action_steps=4",
        "the same weights with fewer denoising steps, replanning more often",
    ),
)

MOST_SEEDS_SHOWN = 20
MOST_ENVS = {"cuda": 256, "cpu": 25, "single": 1}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate `cfg.checkpoint` and write its folder under the run's `eval/`."""
    from rich.console import Console

    from robopolicy import atomic
    from robopolicy.envs import default_backend
    from robopolicy.errors import RobopolicyError
    from robopolicy.evaluation import results
    from robopolicy.evaluation.progress import progress_bar
    from robopolicy.evaluation.rollout import evaluate
    from robopolicy.policies.actors import ChunkActor
    from robopolicy.policies.planners import FreshPlanner
    from robopolicy.training.fit import threads

    if cfg.n_episodes < 1:
        raise RobopolicyError(f"n_episodes must be at least 1; got {cfg.n_episodes}.")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    device = _device(cfg.device)
    changes = dict(_changes(cfg.policy))
    loaded = _load(cfg, changes, device)
    _require_actionable(cfg.n_action_steps, loaded)
    seeds = list(range(cfg.seed, cfg.seed + cfg.n_episodes))
    results.require_disjoint(seeds, demonstration_seeds(loaded.config))
    settings = _settings(cfg, loaded, changes, seeds)
    folder = results.run_folder(loaded.path) / "eval" / (cfg.name or _name(cfg, loaded, changes))
    earlier = results.require_free(folder, settings, overwrite=cfg.overwrite)

    backend = default_backend() if cfg.backend == "auto" else cfg.backend
    num_envs = cfg.num_envs or _even_waves(cfg.n_episodes, MOST_ENVS.get(backend, 1))
    with threads(cfg.num_threads or (1 if not _sees_images(loaded) else None)):
        env = _environment(cfg, loaded, num_envs=num_envs, backend=backend)
        actor = ChunkActor(FreshPlanner(loaded.policy), num_envs, n_action_steps=cfg.n_action_steps)
        with progress_bar(cfg.n_episodes, console=console) as show:
            result = evaluate(
                actor,
                env,
                seeds=seeds,
                noise_seed=cfg.noise_seed,
                stop_on_success=cfg.stop_on_success,
                on_step=show,
            )
        frame, _ = env.reset(seed=seeds[0])
        latency = _latency_batch_1(cfg, loaded, frame)
        env.close()
        with atomic.new_folder(folder) as staged:
            video = _film(cfg, loaded, result, staged, backend, console) if cfg.video else None
            info = results.eval_info(
                result,
                task=env.task_spec.to_dict(),
                checkpoint=_source(loaded, settings),
                settings=settings,
                latency_batch_1=latency,
                backend=backend,
                device=str(device),
                command=_command(cfg),
                video=video,
            )
            results.write_results(staged, info, result)
    _say(console, info, folder, earlier, results.read_evaluation(folder))
    return {"folder": str(folder), **info["overall"]}


def demonstration_seeds(config: Mapping[str, Any]) -> list[int]:
    """Return the seeds of the demonstrations that policy.json names; none if it names none."""
    seeds = (config.get("data") or {}).get("seeds") or []
    return [int(seed) for seed in seeds]


def _load(cfg: DictConfig, changes: Mapping[str, Any], device: torch.device) -> LoadedPolicy:
    """Return the checkpoint's policy, built from its own config with `changes` applied."""
    from omegaconf import OmegaConf

    from robopolicy.app.build import build_policy
    from robopolicy.policies.base import Policy
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


def _environment(
    cfg: DictConfig, loaded: LoadedPolicy, *, num_envs: int, backend: str, render: bool = False
) -> Environment:
    """Build the environment that `loaded` was trained for, and make sure that it is.

    Raises:
        SpecMismatchError: it observes or acts otherwise.
    """
    from robopolicy.envs import make

    saved = loaded.spec
    env = make(
        saved.name,
        num_envs=num_envs,
        backend=backend,
        control_mode=saved.action.control_mode,
        obs_mode="rgb" if _sees_images(loaded) else "state",
        max_episode_steps=cfg.max_episode_steps or saved.max_episode_steps,
        render=render,
        **({"render_size": cfg.video_tile_px} if render else {}),
    )
    saved.require_same(env.task_spec, mine=f"The policy in {loaded.path}", theirs=f"task {env.task_spec.name!r}")
    return env


def _latency_batch_1(cfg: DictConfig, loaded: LoadedPolicy, frame: Frame) -> Any:
    from robopolicy.evaluation.rollout import actor_latency
    from robopolicy.policies.actors import ChunkActor
    from robopolicy.policies.planners import FreshPlanner

    return actor_latency(ChunkActor(FreshPlanner(loaded.policy), 1, n_action_steps=cfg.n_action_steps), frame)


def _film(
    cfg: DictConfig, loaded: LoadedPolicy, result: EvalResult, folder: Path, backend: str, console: Console
) -> dict[str, Any]:
    """Replay the first episodes with pictures and write the film into `folder`."""
    from rich.progress import Progress

    from robopolicy.evaluation.video import record

    episodes = result.episodes[: cfg.video_episodes]
    begin = time.perf_counter()
    tiles = len(episodes) if backend == "cuda" else 1  # one by one on a CPU: no picture is drawn of a finished episode
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("rendering", total=None)
        env = _environment(cfg, loaded, num_envs=tiles, backend=backend, render=True)
        video = record(
            env,
            episodes,
            folder,
            size_px=cfg.video_tile_px,
            stride=cfg.video_stride,
            on_step=lambda done, total: bar.update(task, completed=done, total=total),
        )
        env.close()
    return {**video, "seconds": time.perf_counter() - begin}


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
    from robopolicy.evaluation.results import sha256

    return {
        "weights_sha256": sha256(loaded.path / "model.safetensors"),
        "task": loaded.spec.name,
        "seeds": seeds,
        "noise_seed": cfg.noise_seed,
        "max_episode_steps": cfg.max_episode_steps or loaded.spec.max_episode_steps,
        "stop_on_success": cfg.stop_on_success,
        "n_action_steps": cfg.n_action_steps or loaded.policy.timing.n_action_steps,
        "policy_overrides": dict(changes),
        "sampler": loaded.config["policy"].get("sampler"),
    }


def _source(loaded: LoadedPolicy, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "path": str(loaded.path),
        "step": loaded.step,
        "weights_sha256": settings["weights_sha256"],
        "robopolicy_version": loaded.config.get("robopolicy_version"),
    }


def _name(cfg: DictConfig, loaded: LoadedPolicy, changes: Mapping[str, Any]) -> str:
    """Return a folder name that tells evaluations of one run apart: step, episodes, seed, and what was changed."""
    parts = [f"step_{loaded.step:08d}", f"n{cfg.n_episodes}", f"s{cfg.seed}"]
    for key in ("n_action_steps", "max_episode_steps"):
        if cfg[key]:
            parts.append(f"{key}_{cfg[key]}")
    if cfg.noise_seed:
        parts.append(f"noise_{cfg.noise_seed}")
    if cfg.stop_on_success:
        parts.append("stop")
    parts += [f"{key.rpartition('.')[2]}_{value}" for key, value in changes.items()]
    return "-".join(re.sub(r"[^\w.+-]+", "_", part) for part in parts)


def _command(cfg: DictConfig) -> str:
    """Return the line that repeats this evaluation: all settings that are not the default."""
    from omegaconf import OmegaConf

    from robopolicy.app.cli import configs_folder

    def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    default = dict(leaves(OmegaConf.to_container(OmegaConf.load(configs_folder() / "eval.yaml"))))
    words = []
    for key, value in leaves(OmegaConf.to_container(cfg, resolve=True)):
        if key not in default:
            words.append(f"+{key}={value}")
        elif value != default[key] or key == "n_episodes":
            words.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return shlex.join(["robopolicy", "eval", *words])


def _even_waves(n_episodes: int, most: int) -> int:
    """Return the number of environments that runs `n_episodes` in as few waves as `most` does, with least padding."""
    waves = -(-n_episodes // most)
    return -(-n_episodes // waves)


def _say(console: Console, info: Mapping[str, Any], folder: Path, earlier: Evaluation | None, now: Evaluation) -> None:
    """Print the result, where it is, and what to do next."""
    from rich.markup import escape

    from robopolicy.evaluation.report import duration, milliseconds, percent

    top, time_s, at_1 = info["overall"], info["time"], info["latency_batch_1"]
    low, high = top["pc_success_ci95"]
    console.print(
        f"[bold]{percent(top['pc_success'])} % success[/] ({top['n_success']} of {top['n_episodes']}), "
        f"95 % interval {percent(low)} to {percent(high)} %"
    )
    if top["pc_success_at_end"] is not None:
        console.print(f"still successful at the end: {percent(top['pc_success_at_end'])} %")
    if at_1["num_calls"]:
        console.print(
            f"one action chunk: {milliseconds(at_1['median_ms'])} ms (p95 {milliseconds(at_1['p95_ms'])} ms) "
            f"at batch 1 on {info['device']}"
        )
    console.print(
        f"took {duration(top['eval_s'])}: simulation {duration(time_s['simulation_s'])}, policy "
        f"{duration(time_s['policy_s'])}, reset {duration(time_s['reset_s'])}; "
        f"{time_s['env_steps_per_s']:,.0f} steps/s"
    )
    if failed := info["failed_seeds"]:
        more = ", ..." if len(failed) > MOST_SEEDS_SHOWN else ""
        console.print(f"failed seeds: {', '.join(map(str, failed[:MOST_SEEDS_SHOWN]))}{more}")
    if earlier is not None:
        old = {row["seed"]: row["success"] for row in earlier.rows}
        other = [row["seed"] for row in now.rows if old.get(row["seed"], row["success"]) != row["success"]]
        console.print(f"replaces an earlier evaluation of that name; other outcome for {len(other)} of its seeds")
    if info["video"] and not info["video"]["same_outcomes"]:
        console.print("[yellow]some replays in the film ended otherwise than the counted episodes")
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    console.print(f"wrote [bold]{escape(str(folder))}[/]: {names}")
    console.print(f"next: robopolicy report run={escape(str(folder.parent.parent))}")
