"""The folder that an evaluation leaves behind: `eval_info.json`, `episodes.jsonl`, films; written whole or not at all.

`overall` and `per_task` carry the key names of LeRobot's `eval_info.json` (rates named `pc_...` are percentages there).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from robopolicy import atomic
from robopolicy.errors import CheckpointError, RobopolicyError
from robopolicy.evaluation.rollout import EvalResult
from robopolicy.evaluation.statistics import Latency, wilson_interval
from robopolicy.evaluation.uncertainty import failure_prediction

FORMAT = "robopolicy-eval/1"
TIMES = ("reset_s", "simulation_s", "policy_s", "other_s", "env_steps_per_s")
PACKAGES = ("robopolicy", "mani_skill", "sapien", "torch", "diffusers", "numpy", "gymnasium")


def overall(result: EvalResult) -> dict[str, Any]:
    """Return the headline numbers under LeRobot's names, and ours beside them."""
    n = len(result.episodes)
    low, high = result.interval
    rewards = [episode.sum_reward for episode in result.episodes]
    steps = [episode.first_success_step for episode in result.episodes if episode.first_success_step is not None]
    out: dict[str, Any] = {
        "n_episodes": n,
        "n_success": result.num_success,
        "pc_success": 100 * result.success_once,
        "pc_success_ci95": [100 * low, 100 * high],
        "avg_sum_reward": sum(rewards) / n,
        "avg_max_reward": sum(episode.max_reward for episode in result.episodes) / n,
        "eval_s": result.wall_s,
        "eval_ep_s": result.wall_s / n,
        "pc_success_at_end": None,
        "pc_success_at_end_ci95": None,
        "avg_first_success_step": sum(steps) / len(steps) if steps else None,
        "avg_action_jerk": sum(episode.action_jerk for episode in result.episodes) / n,
        "avg_num_replans": sum(episode.num_replans for episode in result.episodes) / n,
        "avg_num_hold_steps": sum(episode.num_hold_steps for episode in result.episodes) / n,
    }
    if result.success_at_end is not None:
        at_end = sum(bool(episode.success_at_end) for episode in result.episodes)
        out["pc_success_at_end"] = 100 * result.success_at_end
        out["pc_success_at_end_ci95"] = [100 * side for side in wilson_interval(at_end, n)]
    return out


def eval_info(
    result: EvalResult,
    *,
    task: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    settings: Mapping[str, Any],
    latency_batch_1: Latency | None,
    latency_first_plan: Latency | None = None,
    backend: str,
    device: str,
    command: str,
    video: Mapping[str, Any] | None,
    failures: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what `eval_info.json` holds.

    Args:
        task: `TaskSpec.to_dict()` of the environment.
        checkpoint: where the weights came from: path, step, weights_sha256.
        settings: everything that decides the outcome on a given machine; equal settings are the same evaluation.
        latency_batch_1: replanning for one environment.
        latency_first_plan: the same for the first plan of an episode, which has no plan before it to start from.
        backend: simulation backend.
        device: of the policy.
        command: line that repeats this evaluation.
        video: file names in the folder and whether the replays matched; None without film.
        failures: the same for the picture of how failed episodes ended.
    """
    rows = result.episodes
    paths = [video["mp4"]] if video else []
    metrics = {
        "sum_rewards": [episode.sum_reward for episode in rows],
        "max_rewards": [episode.max_reward for episode in rows],
        "successes": [episode.success_once for episode in rows],
        "video_paths": paths,
    }
    return {
        "format": FORMAT,
        "overall": {**overall(result), "video_paths": paths},
        "per_task": [{"task_group": task["env_id"], "task_id": 0, "metrics": metrics}],
        "settings": dict(settings),
        "checkpoint": dict(checkpoint),
        "failure_prediction": failure_prediction([episode.to_row(i) for i, episode in enumerate(rows)]),
        "failed_seeds": [episode.seed for episode in rows if not episode.success_once],
        "latency": result.latency.to_dict(),
        "latency_batch_1": None if latency_batch_1 is None else latency_batch_1.to_dict(),
        "latency_first_plan": None if latency_first_plan is None else latency_first_plan.to_dict(),
        "time": {key: getattr(result, key) for key in TIMES},
        "num_envs": result.num_envs,
        "backend": backend,
        "device": device,
        "machine": machine(),
        "versions": versions(),
        "command": command,
        "video": None if video is None else dict(video),
        "failures": None if failures is None else dict(failures),
        "task_spec": dict(task),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide an outcome."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def machine() -> dict[str, Any]:
    """Return what the timings were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "num_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_disjoint(eval_seeds: Sequence[int], demo_seeds: Sequence[int]) -> None:
    """Refuse to evaluate on initial states that were trained on.

    Raises:
        RobopolicyError: the two share seeds; says which start would be free.
    """
    if shared := sorted(set(eval_seeds) & set(demo_seeds)):
        some = ", ".join(map(str, shared[:5])) + (", ..." if len(shared) > 5 else "")
        raise RobopolicyError(
            f"{len(shared)} of the {len(eval_seeds)} evaluation seeds are seeds of the demonstrations ({some}): the "
            f"policy has seen these starts. Free is for example seed={_round_up(max(demo_seeds) + 1)}."
        )


def run_folder(policy_folder: Path) -> Path:
    """Return the run of a step folder; a published policy is its own run."""
    return policy_folder.parent if policy_folder.name.startswith("step_") else policy_folder


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """An evaluation read back from its folder."""

    folder: Path
    info: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.folder.name


def read_evaluation(folder: Path) -> Evaluation:
    """Read what `write_results` wrote.

    Raises:
        RobopolicyError: a file is missing, not JSON, or of another format.
    """
    try:
        info = json.loads((folder / "eval_info.json").read_text())
        rows = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines() if line]
    except (OSError, json.JSONDecodeError) as error:
        raise RobopolicyError(f"{folder} is not a readable evaluation: {error}") from error
    if info.get("format") != FORMAT:
        raise RobopolicyError(f"{folder}/eval_info.json has format {info.get('format')!r}; expected {FORMAT!r}.")
    return Evaluation(folder=folder, info=info, rows=rows)


def read_evaluations(run_dir: Path) -> list[Evaluation]:
    """Read all evaluations under `run_dir/eval`, by step and name; unfinished ones (`.name`) are left out."""
    root = run_dir / "eval"
    folders = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")] if root.is_dir() else []
    folders = [p for p in folders if not (p / "robustness.json").is_file()]  # the table of a suite, not an evaluation
    found = [read_evaluation(folder) for folder in folders]
    return sorted(found, key=lambda e: (e.info["checkpoint"].get("step") or 0, e.name))


def require_free(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> Evaluation | None:
    """Return the earlier evaluation that `folder` holds if this one may replace it: equal settings, or `overwrite`.

    Raises:
        CheckpointError: `folder` holds something else.
    """
    if not folder.exists():
        return None
    try:
        earlier = read_evaluation(folder)
    except RobopolicyError:
        earlier = None
    if overwrite or (earlier is not None and earlier.info["settings"] == dict(settings)):
        return earlier
    why = "a folder that is no evaluation"
    if earlier is not None:
        old, new = earlier.info["settings"], dict(settings)
        changed = [key for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)]
        why = f"an evaluation with other settings ({', '.join(changed)})"
    raise CheckpointError(f"{folder} holds {why}. Choose another name=..., or replace it with overwrite=true.")


def write_results(folder: Path, info: Mapping[str, Any], result: EvalResult) -> None:
    """Write `episodes.jsonl` and `eval_info.json` into `folder` (see `atomic.new_folder`)."""
    rows = [json.dumps(episode.to_row(i)) for i, episode in enumerate(result.episodes)]
    atomic.write_synced(folder / "episodes.jsonl", ("\n".join(rows) + "\n").encode())
    atomic.write_synced(folder / "eval_info.json", (json.dumps(info, indent=1, allow_nan=False) + "\n").encode())


def _round_up(seed: int) -> int:
    return -(-seed // 10000) * 10000
