"""What a training run is called, what it was asked to do, and what may change when it is resumed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from robopolicy import atomic
from robopolicy.app import cli
from robopolicy.errors import CheckpointError
from robopolicy.training import checkpoint

FREE = ("resume", "run", "checkpoints_dir", "logger", "data.path", "train.save_every", "train.keep")
"""What may differ when a run is resumed: the result does not depend on it (demonstrations are told by fingerprint)."""


def overrides() -> list[str]:
    """Return the words of the command line that change settings; none when the config was not composed for one."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def run_folder(cfg: DictConfig) -> Path:
    """Return the folder of the run that `cfg` names, or the one it gets when it names none.

    The jobs of a sweep must not share a folder: what a job sets beside task, policy and seed joins its name.
    """
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    policy = choices.get("policy", "policy")
    name = cfg.run or "-".join([choices.get("task", cfg.task.name), policy, f"s{cfg.seed}", *_swept()])
    return Path(cfg.checkpoints_dir) / name


def _swept() -> list[str]:
    """Return what this job of a sweep sets beside task, policy and seed, fit for a file name; [] without a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return []
    named = {"task", "policy", "seed", *FREE}
    words = [word.lstrip("+~") for word in overrides()]
    return [re.sub(r"[^\w.+-]+", "_", word) for word in words if word.partition("=")[0] not in named]


def resumed(cfg: DictConfig, run_dir: Path, given: Sequence[str]) -> DictConfig:
    """Return the config that the run in `run_dir` was started with, changed only where the result cannot depend on it.

    Raises:
        CheckpointError: there is no such run, or `given` (overrides) ask for other settings; names the difference.
    """
    file = run_dir / "config.yaml"
    if not file.is_file():
        runs = [path.parent.name for path in run_dir.parent.glob("*/config.yaml")]
        raise CheckpointError(f"There is no run {run_dir} to resume.{checkpoint.suggestion(run_dir.name, runs)}")
    saved = OmegaConf.load(file)
    assert isinstance(saved, DictConfig)
    differences: list[str] = []
    for word in given:
        key = word.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")
        asked, had = OmegaConf.select(cfg, key), OmegaConf.select(saved, key)
        if key in FREE:
            OmegaConf.update(saved, key, asked)
        else:
            differences += _differences(key, _plain(had), _plain(asked))
    if differences:
        shown = differences[:6] + (["..."] if len(differences) > 6 else [])
        raise CheckpointError(
            f"The run {run_dir} is resumed with the settings it was started with; leave these out, or start a new run "
            "with another `run=`:\n" + "\n".join(f"  - {line}" for line in shown)
        )
    return saved


def save(cfg: Mapping[str, Any], run_dir: Path) -> None:
    """Write `run_dir`/config.yaml."""
    atomic.write_file(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(cfg))).encode())


def resume_command(cfg: Mapping[str, Any]) -> str:
    """Return what to type to go on with the run of `cfg`."""
    folder = (
        [] if cfg["checkpoints_dir"] == str(checkpoint.CHECKPOINTS) else [f"checkpoints_dir={cfg['checkpoints_dir']}"]
    )
    return shlex.join(["robopolicy", "train", "resume=true", f"run={cfg['run']}", *folder])


def collect_command(cfg: Mapping[str, Any], given: Sequence[str]) -> str:
    """Return what to type to get the demonstrations that `cfg` looks for."""
    words = [word for word in given if word.startswith("task.") and not word.startswith("task.obs_mode=")]
    return shlex.join(["robopolicy", "collect", *task_words(cfg["task"]), *words])


def task_words(task: Mapping[str, Any]) -> list[str]:
    """Return what to type to mean the config `task` with what it observes."""
    name, obs_mode = task["name"], task["obs_mode"]
    if obs_mode == "state":
        return [f"task={name}"]
    short = f"{name}_rgb"
    if obs_mode == "rgb64" and (cli.configs_folder() / "task" / f"{short}.yaml").is_file():
        return [f"task={short}"]
    return [f"task={name}", f"task.obs_mode={obs_mode}"]


def _differences(key: str, had: Any, asked: Any) -> Iterator[str]:
    if isinstance(had, dict) and isinstance(asked, dict):
        for name in dict.fromkeys([*had, *asked]):
            yield from _differences(f"{key}.{name}", had.get(name), asked.get(name))
    elif had != asked:
        yield f"{key}: {had} in the run, {asked} asked for"


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
