"""Checkpoints: a folder that is enough to act, and beside it what training needs to go on. JSON and safetensors only.

    <run>/step_<n:08d>/policy.json            format, step, task specification, timing; policy, data, train config
                      /model.safetensors      averaged weights and normalisation
                      /training_state/        weights.safetensors, optimizer.safetensors, state.json
    <run>/last                                name of the newest complete step folder

A step folder appears whole or not at all, and `last` moves only once it is on disk. Every step keeps its policy; only
the newest `keep` of them keep their training state, which is three times larger and of use only for resuming.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from robopolicy import __version__, atomic
from robopolicy.errors import CheckpointError, RobopolicyError, TrainingError
from robopolicy.policies.base import Policy
from robopolicy.types import TaskSpec

FORMAT = "robopolicy/1"
CHECKPOINTS = Path("checkpoints")
Build = Callable[[Mapping[str, Any], TaskSpec], Policy]
"""Makes a policy from its config and task; `robopolicy.app.build.build_policy` in the application."""


@dataclass(frozen=True, kw_only=True)
class LoadedPolicy:
    """A policy ready to act, and what its checkpoint says of it."""

    policy: Policy
    """In evaluation mode, weights frozen."""
    step: int
    spec: TaskSpec
    config: Mapping[str, Any]
    """The contents of policy.json: `policy`, `data`, `train`, `task_spec`, `timing`, ..."""
    path: Path
    """The folder that was read."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What resuming needs beside the averaged policy."""

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    info: Mapping[str, Any]
    """Plain JSON: losses not yet logged, number of processes, fingerprint of the data, ..."""
    best: Mapping[str, Tensor] = field(default_factory=dict)
    """What an early stage of training will leave behind if it does not find better, see `training.stages`."""


def save(
    run_dir: Path,
    *,
    step: int,
    policy: Policy,
    config: Mapping[str, Any],
    state: TrainingState | None = None,
    keep: int = 2,
) -> Path:
    """Write step folder and `last`; return the folder. `config` holds `policy`, `data` and `train` as plain JSON.

    Raises:
        TrainingError: the disk is full or cannot be written; what was saved before is untouched.
    """
    folder = run_dir / f"step_{step:08d}"
    try:
        with atomic.new_folder(folder) as new:
            write_policy(new, step=step, policy=policy, config=config)
            if state is not None:
                (new / "training_state").mkdir()
                for name in ("weights", "optimizer", *(["best"] if state.best else [])):
                    atomic.write_synced(new / "training_state" / f"{name}.safetensors", _pack(getattr(state, name)))
                atomic.write_synced(new / "training_state" / "state.json", _json(state.info))
        atomic.write_file(run_dir / "last", f"{folder.name}\n".encode())
        for old in _steps(run_dir)[:-keep]:
            if (old / "training_state").exists():
                atomic.remove_folder(old / "training_state")
    except OSError as error:
        last = (run_dir / "last").read_text().strip() if (run_dir / "last").exists() else None
        kept = f"The last good checkpoint is {run_dir / last}." if last else "There is no earlier checkpoint."
        raise TrainingError(
            f"Could not save step {step} in {run_dir}: {error.strerror or error}. {kept} Once there is room, go on "
            f"with: robopolicy train resume=true run={run_dir.name}"
        ) from error
    return folder


def write_policy(folder: Path, *, step: int, policy: Policy, config: Mapping[str, Any]) -> None:
    """Write policy.json and model.safetensors into `folder`: all that acting needs."""
    head = {
        "format": FORMAT,
        "step": step,
        "task_spec": policy.spec.to_dict(),
        "timing": dataclasses.asdict(policy.timing),
    }
    atomic.write_synced(folder / "model.safetensors", _pack(policy.state_dict()))
    atomic.write_synced(folder / "policy.json", _json({**head, **config, "robopolicy_version": __version__}))


def load(
    path: Path | str,
    build: Build,
    *,
    spec: TaskSpec | None = None,
    device: torch.device | str = "cpu",
    root: Path = CHECKPOINTS,
) -> LoadedPolicy:
    """Rebuild the policy at `path` (see `resolve`), in evaluation mode on `device`.

    Raises:
        CheckpointError: missing, incomplete, corrupt, or of another format.
        SpecMismatchError: `spec` is given, and the policy was trained to observe or act otherwise.
    """
    folder = resolve(path, root=root)
    config = read_config(folder)
    saved = TaskSpec.from_dict(config["task_spec"])
    if spec is not None:
        saved.require_same(spec, mine=f"The policy in {folder}", theirs="the task")
    try:
        policy = build(config["policy"], saved)
        policy.check_saved(config["policy"])  # `build` may have changed what it was given
        policy.load_state_dict(read_weights(folder))
    except CheckpointError:
        raise
    except RobopolicyError as error:
        raise CheckpointError(f"{folder / 'policy.json'} describes no policy that can be built: {error}") from error
    except RuntimeError as error:  # load_state_dict: names and shapes of the weights
        raise CheckpointError(f"{folder / 'model.safetensors'} does not fit its policy.json: {error}") from error
    if dataclasses.asdict(policy.timing) != config["timing"]:
        raise CheckpointError(
            f"{folder / 'policy.json'} contradicts itself: timing is {config['timing']}, the policy has "
            f"{policy.timing}."
        )
    policy.to(device).eval().requires_grad_(False)
    return LoadedPolicy(policy=policy, step=config["step"], spec=saved, config=config, path=folder)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the averaged weights and the normalisation of the step in `folder`.

    Raises:
        CheckpointError: absent or corrupt.
    """
    return _read_tensors(folder / "model.safetensors")


def load_training_state(folder: Path) -> TrainingState:
    """Return what `save` was given as `state`.

    Raises:
        CheckpointError: absent (an old step, or a published policy) or corrupt.
    """
    state = folder / "training_state"
    if not state.is_dir():
        raise CheckpointError(f"{folder} holds a policy but no training_state, so training cannot go on from it.")
    weights, optimizer = (_read_tensors(state / f"{name}.safetensors") for name in ("weights", "optimizer"))
    best = _read_tensors(state / "best.safetensors") if (state / "best.safetensors").exists() else {}
    return TrainingState(weights=weights, optimizer=optimizer, info=_read_json(state / "state.json"), best=best)


def resolve(path: Path | str, *, root: Path = CHECKPOINTS) -> Path:
    """Return the folder that holds policy.json.

    `path` may be a step folder, a run folder (its last step is meant), a published policy, or the name of a run in
    `root` or of a policy in `root`/zoo.

    Raises:
        CheckpointError: there is no such thing; names the nearest runs.
    """
    for folder in (Path(path), root / path, root / "zoo" / path):
        if (folder / "policy.json").is_file():
            return folder
        if (folder / "last").is_file():
            step = folder / (folder / "last").read_text().strip()
            if (step / "policy.json").is_file():
                return step
            raise CheckpointError(f"{folder / 'last'} names {step.name!r}, which is not there.{_known(_steps(folder))}")
    for folder in (Path(path), root / path):
        if folder.is_dir() and any(folder.iterdir()):
            raise CheckpointError(f"{folder} holds no checkpoint (no `last` and no policy.json).{_runs(root, path)}")
    raise CheckpointError(f"There is no checkpoint {str(path)!r}.{_runs(root, path)}")


def read_config(folder: Path) -> dict[str, Any]:
    """Return policy.json of `folder`, checked.

    Raises:
        CheckpointError: unreadable, incomplete, or of another format.
    """
    file = folder / "policy.json"
    config = _read_json(file)
    if config.get("format") != FORMAT:
        raise CheckpointError(f"{file} has format {config.get('format')!r}; this version reads {FORMAT!r}.")
    kinds = {"step": int, "task_spec": dict, "timing": dict, "policy": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(config.get(key), kind)]:
        raise CheckpointError(f"{file} is incomplete: {', '.join(wrong)} missing or of the wrong kind.")
    if "${" in json.dumps(config["policy"]):
        raise CheckpointError(f"{file} has a policy config with interpolations; it must hold plain values.")
    try:
        TaskSpec.from_dict(config["task_spec"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} has no readable task_spec: {error!r}") from error
    return config


def suggestion(wanted: str, names: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the nearest of `names`, and all of them."""
    known = sorted(names)
    near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    return (f" Did you mean {near[0]!r}?" if near else "") + _known(known)


def _steps(run_dir: Path) -> list[Path]:
    """Return the complete step folders of a run, oldest first."""
    return sorted(p.parent for p in run_dir.glob("step_*/policy.json"))


def _runs(root: Path, wanted: Path | str) -> str:
    names = [p.parent.name for p in root.glob("*/last")] + [p.parent.name for p in root.glob("zoo/*/policy.json")]
    return suggestion(Path(wanted).name, names)


def _known(names: Iterable[Path | str]) -> str:
    return f" Known: {', '.join(Path(n).name for n in names) or 'none'}."


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Return safetensors bytes; each tensor is copied, since weights that share memory cannot be written."""
    return safetensors.torch.save({n: t.detach().to("cpu", copy=True).contiguous() for n, t in tensors.items()})


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2) + "\n").encode()


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(file.read_bytes())
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} must hold a JSON object; got {type(data).__name__}.")
    return data
