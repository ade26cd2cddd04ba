"""Reads ManiSkill trajectory files (HDF5 + JSON) into an episode store, checking all that a training run relies on.

The store is kept beside the file (`.cache/`), so that the next run opens it at once; it is built anew when the file,
its JSON or the wanted observation changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from einops import rearrange

from robopolicy.errors import DataError
from robopolicy.types import ModalitySpec, TaskSpec

from .store import FORMAT, EpisodeStore, StoreWriter


def load_demonstrations(
    path: str | os.PathLike[str],
    *,
    spec: TaskSpec | None = None,
    num_episodes: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    in_memory: bool | None = None,
) -> EpisodeStore:
    """Return the demonstrations of an `.h5` file and the `.json` beside it.

    Args:
        spec: what a policy observes and how it acts; None takes the one in the JSON, which `robopolicy collect` writes.
        num_episodes: only the first so many; None for all.
        cache_dir: where stores are kept; None for `.cache` beside the file.
        in_memory: see `EpisodeStore.open`.

    Raises:
        DataError: the file cannot be used; says which episode and field, and what would work.
    """
    path = Path(path)
    about = read_description(path)
    spec = wanted_spec(path, about, spec)
    folder = Path(cache_dir) if cache_dir is not None else path.parent / ".cache"
    cached = folder / f"{path.stem}-{_fingerprint(path, spec)}"
    if not (cached / "meta.json").exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob(f"{path.stem}-*"):
                shutil.rmtree(stale, ignore_errors=True)
            build_store(path, about, spec, cached)
        except (PermissionError, FileNotFoundError, NotADirectoryError):
            return _build_in_memory(path, about, spec, num_episodes)
    store = EpisodeStore.open(cached, in_memory=in_memory)
    return store if num_episodes is None else store.first(num_episodes)


def read_description(path: Path) -> dict[str, Any]:
    """Return the JSON beside `path`.

    Raises:
        DataError: a file is missing, unreadable, or lists no episodes.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist. `robopolicy collect` writes demonstrations.")
    json_path = path.with_suffix(".json")
    if not json_path.exists():
        raise DataError(
            f"{path} lacks the file {json_path.name} that ManiSkill writes beside it (seeds, control mode, "
            "environment); copy both, or collect again."
        )
    try:
        about = json.loads(json_path.read_text())
    except ValueError as error:
        raise DataError(f"{json_path} is not readable JSON ({error}); copy it again, or collect again.") from error
    if not isinstance(about, dict) or "env_info" not in about or "episodes" not in about:
        raise DataError(f"{json_path} is no description of ManiSkill trajectories: it needs `env_info` and `episodes`.")
    if not about["episodes"]:
        raise DataError(f"{path} holds no episodes; `robopolicy collect` writes demonstrations.")
    return about


def wanted_spec(path: Path, about: Mapping[str, Any], spec: TaskSpec | None) -> TaskSpec:
    """Return what is to be read from a file: `spec`, or the file's own.

    Raises:
        DataError: neither is there, or the file was recorded in another environment or control mode than `spec` says.
    """
    own = TaskSpec.from_dict(about["task_spec"]) if "task_spec" in about else None
    if spec is None and own is None:
        raise DataError(
            f"{path.with_suffix('.json')} has no `task_spec`, as files not written by `robopolicy collect` do not. "
            f"{_replay(path)}"
        )
    if spec is None:
        assert own is not None
        return own
    env_id = about["env_info"].get("env_id")
    if env_id != spec.env_id:
        raise DataError(f"{path} was recorded in {env_id}; the task {spec.name!r} simulates {spec.env_id}.")
    for episode in about["episodes"]:
        if (mode := episode.get("control_mode")) != spec.action.control_mode:
            raise DataError(
                f"{path}, episode {episode.get('episode_id')}: actions are for control_mode={mode}, wanted is "
                f"{spec.action.control_mode}. {_replay(path, spec)}"
            )
    if own is not None and (differing := [d for d in spec.differences(own) if d.startswith("action.")]):
        raise DataError(
            f"{path}: actions mean something else than wanted: {'; '.join(differing)}. {_replay(path, spec)}"
        )
    return spec


def build_store(path: Path, about: Mapping[str, Any], spec: TaskSpec, folder: Path) -> None:
    """Read all episodes of `path` into a store at `folder`, one episode in memory at a time.

    Raises:
        DataError: as `load_demonstrations`.
    """
    episodes = about["episodes"]
    with _opened(path) as file:
        lengths = [_length(path, file, episode, spec) for episode in episodes]
        ends = np.cumsum(lengths)
        success = []
        with StoreWriter(folder, spec, int(ends[-1])) as writer:
            for episode, length, end in zip(episodes, lengths, ends, strict=True):
                rows = slice(int(end) - length, int(end))
                reader = _EpisodeReader(path, file, episode, length)
                writer.arrays["action"][rows] = reader.read("actions", length)
                for name, modality in spec.observation.items():
                    writer.arrays[name][rows] = reader.modality(name, modality)
                success.append(reader.success())
            writer.finish(ends.tolist(), [_seed(episode) for episode in episodes], success)


class _EpisodeReader:
    """Reads the fields of one trajectory and blames the right one when something is wrong."""

    def __init__(self, path: Path, file: h5py.File, episode: Mapping[str, Any], length: int) -> None:
        self.path, self.episode, self.length = path, episode, length
        self.group = file[f"traj_{episode['episode_id']}"]

    def modality(self, name: str, modality: ModalitySpec) -> np.ndarray:
        """Return the T frames of a modality, [T, S] float32 or [T, C, Y, X] uint8."""
        parts = [self.read(f"obs/{field}", self.length + 1)[: self.length] for field in modality.fields]
        if modality.is_image:
            if parts[0].dtype != np.uint8 or parts[0].ndim != 4:
                raise self.error(f"obs/{next(iter(modality.fields))}", f"is no uint8 image: {parts[0].dtype}")
            image = rearrange(parts[0][..., :3], "t y x c -> t c y x")
            if image.shape[1:] != modality.shape:
                field = f"obs/{next(iter(modality.fields))}"
                raise self.error(field, f"has pictures [C, Y, X] of {image.shape[1:]}, wanted is {modality.shape}")
            return image
        columns = []
        for (field, width), part in zip(modality.fields.items(), parts, strict=True):
            flat = part.reshape(self.length, -1).astype(np.float32)
            if flat.shape[1] != width:
                raise self.error(f"obs/{field}", f"is {flat.shape[1]} wide, wanted is {width} for modality {name!r}")
            columns.append(flat)
        return np.concatenate(columns, axis=1)

    def read(self, field: str, rows: int) -> np.ndarray:
        """Return a field, which must have `rows` rows and be finite."""
        node = self.group
        for key in field.split("/"):
            if not isinstance(node, h5py.Group) or key not in node:
                raise self.error(field, f"is missing. {self._why_missing(field)}")
            node = node[key]
        try:
            values = node[()]
        except OSError as error:
            raise self.error(field, f"cannot be read, the file is damaged ({error})") from error
        if not isinstance(values, np.ndarray) or len(values) != rows:
            found = getattr(values, "shape", "a scalar")
            raise self.error(field, f"must have {rows} rows for {self.length} actions; its shape is {found}")
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            step = int(np.flatnonzero(~np.isfinite(values.reshape(rows, -1)).all(axis=1))[0])
            raise self.error(field, f"is not finite at step {step}; leave the episode out, or collect again")
        return values

    def success(self) -> bool:
        if "success" in self.group and len(self.group["success"]):
            return bool(self.group["success"][-1])
        return bool(self.episode.get("success", False))

    def error(self, field: str, what: str) -> DataError:
        return DataError(f"{self.path}, episode {self.episode['episode_id']}, field {field!r}: {what}.")

    def _why_missing(self, field: str) -> str:
        if field == "actions":
            return "Collect again"
        obs = self.group.get("obs")
        if isinstance(obs, h5py.Dataset):
            return f"Observations are one flat array (obs_mode=state), wanted are named fields. {_replay(self.path)}"
        if obs is None or not len(obs):
            return f"The file holds no observations (obs_mode=none). {_replay(self.path)}"
        if field.startswith("obs/sensor_data"):
            return f"The file holds no such pictures. {_replay(self.path, obs_mode='rgb')}"
        return f"There are: {', '.join(sorted(_fields(obs)))}. {_replay(self.path)}"


def _length(path: Path, file: h5py.File, episode: Mapping[str, Any], spec: TaskSpec) -> int:
    """Return the number of actions of an episode, having checked that they fit `spec`."""
    name = f"traj_{episode.get('episode_id')}"
    if name not in file:
        raise DataError(f"{path} lacks {name}, which its JSON lists; copy both files again, or collect again.")
    group = file[name]
    if not isinstance(group, h5py.Group) or not isinstance(group.get("actions"), h5py.Dataset):
        raise DataError(f"{path}, episode {episode['episode_id']}, field 'actions': is missing. Collect again.")
    shape = group["actions"].shape
    if len(shape) != 2 or shape[0] < 1 or shape[1] != spec.action.dim:
        raise DataError(
            f"{path}, episode {episode['episode_id']}, field 'actions': must be [T >= 1, {spec.action.dim}] for "
            f"{spec.action.control_mode}; its shape is {shape}. {_replay(path, spec)}"
        )
    return int(shape[0])


def _opened(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path} is no complete HDF5 file ({error}); copy it again, or collect again.") from error


def _build_in_memory(path: Path, about: Mapping[str, Any], spec: TaskSpec, num_episodes: int | None) -> EpisodeStore:
    """Build the store where nothing can be kept beside the file."""
    with tempfile.TemporaryDirectory() as folder:
        build_store(path, about, spec, Path(folder) / "store")
        store = EpisodeStore.open(Path(folder) / "store", in_memory=True)
    return store if num_episodes is None else store.first(num_episodes)


def _fingerprint(path: Path, spec: TaskSpec) -> str:
    """Return what changes when the file, its JSON, or what is read from it changes."""
    stats = [os.stat(file) for file in (path, path.with_suffix(".json"))]
    facts = [FORMAT, spec.to_dict(), *((s.st_size, s.st_mtime_ns) for s in stats)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _seed(episode: Mapping[str, Any]) -> int:
    seed = episode.get("episode_seed", episode.get("reset_kwargs", {}).get("seed"))
    seed = seed[0] if isinstance(seed, list) and seed else seed
    return int(seed) if isinstance(seed, int) else -1


def _fields(group: h5py.Group, prefix: str = "") -> list[str]:
    out: list[str] = []
    for key, node in group.items():
        out += _fields(node, f"{prefix}{key}/") if isinstance(node, h5py.Group) else [prefix + key]
    return out


def _replay(path: Path, spec: TaskSpec | None = None, *, obs_mode: str = "state") -> str:
    """Return the advice that turns a file into a usable one."""
    task = spec.name if spec is not None else "<task>"
    mode = f" control_mode={spec.action.control_mode}" if spec is not None else ""
    shown = f" obs_mode={obs_mode}" if obs_mode != "state" else ""
    return f"Replay it into the wanted form: robopolicy collect source={path} task={task}{mode}{shown}"
