"""Collecting demonstrations: seeds are handed to worker processes, what they make is kept in a journal, then one file.

The result depends on the recipe alone: the first `num_demos` successes in the order of their seeds, however many
workers there were and however often the collection was interrupted and continued.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py

from robopolicy.errors import DataError, RobopolicyError, UnknownNameError

from .demo_crew import Crew, Progress, reasons
from .demo_files import Attempt, Journal, Tally, write_trajectories
from .demo_worker import Recipe
from .playback import ENCODERS, Shortening
from .solvers import SOLVERS
from .specs import ObsMode, task_spec
from .tasks import TASKS, find_task

DEFAULT_NUM_DEMOS = 100


def collect(
    task: str,
    *,
    num_demos: int | None = None,
    out_dir: str | os.PathLike[str] = "demos",
    control_mode: str | None = None,
    obs_mode: str = "state",
    max_episode_steps: int | None = None,
    num_workers: int | None = None,
    seed: int = 0,
    shortening: Shortening | None = None,
    source: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Path:
    """Write successful demonstrations of `task` and return the path of the HDF5 file.

    `<out_dir>/<task>/<control_mode>.<obs_mode>.h5` and the `.json` beside it are in ManiSkill's trajectory format. A
    call that was interrupted is continued by the same call; a finished file with too few demonstrations is extended.

    Args:
        num_demos: how many; None for DEFAULT_NUM_DEMOS, or for all that a source file yields.
        control_mode: None for the task's default.
        obs_mode: `state`, or `rgb` for camera pictures, `rgb64` for pictures of 64 x 64.
        max_episode_steps: written into the task's description; None for the task's default.
        num_workers: processes; None for one per core.
        seed: of the first attempt; attempts use `seed`, `seed + 1`, ...
        shortening: how plans are played back.
        source: a ManiSkill trajectory file to replay, instead of planning.
        overwrite: replace a file, or an unfinished collection, that was made with other settings.

    Raises:
        UnknownNameError: no such task, control mode or observation mode, or nothing solves the task.
        DataError: the source file cannot be used, or something else stands where the result should go.
        RobopolicyError: too few attempts succeed.
    """
    if num_demos is not None and num_demos < 1:
        raise RobopolicyError(f"num_demos must be at least 1; got {num_demos}.")
    if num_workers is not None and num_workers < 1:
        raise RobopolicyError(f"num_workers must be at least 1; got {num_workers}.")
    row, shortening = find_task(task), shortening or Shortening()
    if source is None:
        require_solver(task)
    spec = task_spec(task, control_mode=control_mode, obs_mode=obs_mode, max_episode_steps=max_episode_steps)
    mode = spec.action.control_mode
    total: int | None = None
    env_kwargs: dict[str, Any] = {}
    if source is not None:
        total, source_mode, env_kwargs = inspect_source(Path(source), row.env_id)
        num_demos = min(num_demos or total, total)
        if source_mode != mode and mode not in ENCODERS:
            raise UnknownNameError("control mode for demonstrations", mode, ENCODERS)
    elif mode not in ENCODERS:
        raise UnknownNameError("control mode for demonstrations", mode, ENCODERS)
    num_demos = num_demos or DEFAULT_NUM_DEMOS
    recipe = Recipe(
        env_id=row.env_id,
        control_mode=mode,
        obs_mode=obs_mode,
        shortening=shortening,
        source=None if source is None else str(Path(source).resolve()),
        env_kwargs=env_kwargs,
    )
    path = Path(out_dir) / task / f"{mode}.{obs_mode}.h5"
    settings = _settings(recipe, seed)
    journal = Journal(path.parent / f".{path.stem}.partial")
    first = 0 if source is not None else seed
    if _is_finished(path, settings, num_demos, total, overwrite=overwrite):
        return path
    done = journal.open(settings, overwrite=overwrite)
    done |= _adopt(path, journal, settings, done)
    crew = Crew(recipe, journal, num_workers or len(os.sched_getaffinity(0)))
    used = crew.fill(done, first=first, num_demos=num_demos, total=total, on_progress=on_progress)
    if not any(a.kept for a in used):
        raise RobopolicyError(f"None of the episodes of {source} could be replayed: {reasons(Tally.of(used))}.")
    write_trajectories(path, journal, used, _about(spec, recipe, settings, used))
    journal.remove()
    return path


def require_solver(task: str) -> None:
    """Raise UnknownNameError, listing those that have one, unless ManiSkill has a motion-planning solver for `task`."""
    if find_task(task).env_id not in SOLVERS:
        solved = [name for name, row in TASKS.items() if row.env_id in SOLVERS]
        raise UnknownNameError("task with a motion-planning solver", task, solved)


def summary(path: Path) -> Mapping[str, Any]:
    """Return the counts of a finished collection: kept, attempts, rejected by reason, median lengths in steps."""
    return json.loads(path.with_suffix(".json").read_text())["robopolicy"]["counts"]


def inspect_source(path: Path, env_id: str) -> tuple[int, str, dict[str, Any]]:
    """Check a trajectory file and return its number of episodes, control mode and further environment arguments.

    Raises:
        DataError: it is missing, unreadable, of another environment, empty, or mixes control modes.
    """
    json_path = path.with_suffix(".json")
    for needed in (path, json_path):
        if not needed.exists():
            raise DataError(f"source={path}: {needed} does not exist; ManiSkill trajectories are an .h5 and a .json.")
    try:
        about = json.loads(json_path.read_text())
        episodes, info = about["episodes"], about["env_info"]
        with h5py.File(path, "r") as file:
            missing = [e["episode_id"] for e in episodes if f"traj_{e['episode_id']}/actions" not in file]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"source={path} is no readable ManiSkill trajectory file: {error}") from error
    if info["env_id"] != env_id:
        raise DataError(f"source={path} was recorded in {info['env_id']}; the task simulates {env_id}.")
    if not episodes or missing:
        raise DataError(f"source={path} lacks {'episodes' if not episodes else f'the actions of episodes {missing}'}.")
    modes = sorted({e["control_mode"] for e in episodes})
    if len(modes) > 1:
        raise DataError(f"source={path} mixes control modes ({', '.join(modes)}); split it into one file per mode.")
    ours = {"obs_mode", "control_mode", "reward_mode", "render_mode", "sim_backend", "render_backend", "num_envs"}
    looks = {"shader_dir", "sensor_configs", "human_render_camera_configs", "viewer_camera_configs"}
    return len(episodes), modes[0], {k: v for k, v in info["env_kwargs"].items() if k not in ours | looks}


def _settings(recipe: Recipe, seed: int) -> dict[str, Any]:
    """Return what determines the demonstrations, as plain JSON; `num_demos` and the number of workers do not."""
    settings: dict[str, Any] = {**asdict(recipe), "env_kwargs": dict(recipe.env_kwargs), "seed": seed}
    if recipe.source is not None:
        stat = os.stat(recipe.source)
        settings["source_size"], settings["source_mtime_ns"] = stat.st_size, stat.st_mtime_ns
    return json.loads(json.dumps(settings))


def _about(spec: Any, recipe: Recipe, settings: Mapping[str, Any], used: list[Attempt]) -> dict[str, Any]:
    """Return the head of the JSON file."""
    env_kwargs = {
        **recipe.env_kwargs,
        **ObsMode.parse(recipe.obs_mode).settings,
        "control_mode": recipe.control_mode,
        "reward_mode": "none",
        "sim_backend": "physx_cpu",
    }
    packages = ("robopolicy", "mani_skill", "sapien", "mplib", "numpy", "torch")
    planned = recipe.source is None
    return {
        "env_info": {"env_id": recipe.env_id, "max_episode_steps": spec.max_episode_steps, "env_kwargs": env_kwargs},
        "source_type": "motionplanning" if planned else "replay",
        "source_desc": "ManiSkill's motion-planning solver, played back by robopolicy"
        if planned
        else f"replay of {Path(str(recipe.source)).name} by robopolicy",
        "task_spec": spec.to_dict(),
        "robopolicy": {
            "settings": dict(settings),
            "counts": Tally.of(used).to_dict(),
            "rejected": {str(a.key): a.reason for a in used if not a.kept},
            "keys": [a.key for a in used if a.kept],
            "versions": {name: importlib.metadata.version(name) for name in packages},
        },
    }


def _is_finished(
    path: Path, settings: Mapping[str, Any], num_demos: int, total: int | None, *, overwrite: bool
) -> bool:
    """Whether `path` already holds what is asked for; removes it if it holds something else and `overwrite` is true."""
    json_path = path.with_suffix(".json")
    if not path.exists() or not json_path.exists():
        return False
    try:
        ours = json.loads(json_path.read_text()).get("robopolicy", {})
    except ValueError:
        ours = {}
    found = ours.get("settings")
    if found == settings:
        tried = ours["counts"]["attempts"]
        return ours["counts"]["kept"] >= num_demos or tried == total
    if not overwrite:
        changed = "not made by collect"
        if found is not None:
            changed = ", ".join(sorted(k for k in {*found, *settings} if found.get(k) != settings.get(k)))
        raise DataError(
            f"{path} exists and was made with other settings ({changed}). Choose another out_dir=, or overwrite=true."
        )
    path.unlink()
    json_path.unlink()
    return False


def _adopt(
    path: Path, journal: Journal, settings: Mapping[str, Any], done: Mapping[int, Attempt]
) -> dict[int, Attempt]:
    """Take the attempts of a finished file that is to be extended back into the journal."""
    json_path = path.with_suffix(".json")
    if not path.exists() or not json_path.exists():
        return {}
    about = json.loads(json_path.read_text())
    adopted = {}
    with h5py.File(path, "r") as file:
        for key, entry in zip(about["robopolicy"]["keys"], about["episodes"], strict=True):
            if key not in done:
                adopted[key] = journal.adopt(key, file[f"traj_{entry['episode_id']}"], entry)
    for key, reason in about["robopolicy"]["rejected"].items():
        if int(key) not in done:
            adopted[int(key)] = Attempt(key=int(key), reason=reason)
            journal.reject(adopted[int(key)])
    return adopted
