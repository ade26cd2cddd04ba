"""Demonstration files: a small file per attempt while collecting, ManiSkill's HDF5 and JSON at the end.

Attempts are written under a temporary name and renamed, so what stands in the folder is whole; the final file is made
from the attempts in the order of their keys, so it does not depend on who made them, when, or with which interruptions.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from robopolicy import atomic
from robopolicy.errors import DataError

Tree = Mapping[str, Any]
"""Nested dicts whose leaves are arrays with one row per step."""

COMPRESSED = ("rgb", "depth", "segmentation")
"""Leaves that are images; compressed as ManiSkill's RecordEpisode does."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One demonstration of T steps, in the layout of ManiSkill's RecordEpisode."""

    seed: int
    reset_kwargs: Mapping[str, Any]
    obs: Tree
    """Leaves [T + 1, ...]."""
    env_states: Tree
    """Leaves [T + 1, ...]."""
    actions: np.ndarray
    """[T, A] float32."""
    outcomes: Mapping[str, np.ndarray]
    """`success`, `terminated`, `truncated` and, where the task has it, `fail`: [T] bool."""
    plan_steps: int
    """Length of the motion that this was made from, before shortening."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What became of one seed (or of one episode of a source file)."""

    key: int
    reason: str = ""
    """Why it was rejected; empty for a demonstration that was kept."""
    steps: int = 0
    plan_steps: int = 0

    @property
    def kept(self) -> bool:
        return not self.reason


@dataclass(kw_only=True)
class Tally:
    """Counts over attempts."""

    steps: list[int] = field(default_factory=list)
    plan_steps: list[int] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, attempts: Sequence[Attempt]) -> Tally:
        kept = [a for a in attempts if a.kept]
        return cls(
            steps=[a.steps for a in kept],
            plan_steps=[a.plan_steps for a in kept],
            rejected=Counter(a.reason for a in attempts if not a.kept),
        )

    @property
    def kept(self) -> int:
        return len(self.steps)

    @property
    def attempts(self) -> int:
        return self.kept + self.rejected.total()

    @property
    def keep_rate(self) -> float:
        return self.kept / self.attempts if self.attempts else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; lengths in control steps."""
        return {
            "kept": self.kept,
            "attempts": self.attempts,
            "rejected": dict(sorted(self.rejected.items())),
            "median_steps": float(np.median(self.steps)) if self.steps else None,
            "median_plan_steps": float(np.median(self.plan_steps)) if self.plan_steps else None,
        }


class Journal:
    """The folder of attempts of an unfinished collection; every attempt in it is complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, settings: Mapping[str, Any], *, overwrite: bool) -> dict[int, Attempt]:
        """Create or continue the collection described by `settings`; return the attempts already made, by key.

        Raises:
            DataError: an unfinished collection with other settings is there and `overwrite` is false.
        """
        about = self.folder / "settings.json"
        wanted = json.loads(json.dumps(settings))
        if about.exists() and (found := json.loads(about.read_text())) != wanted:
            if not overwrite:
                changed = sorted(k for k in {*wanted, *found} if wanted.get(k) != found.get(k))
                raise DataError(
                    f"{self.folder} holds an unfinished collection with other settings ({', '.join(changed)}). "
                    "Run with the former settings to finish it, or with overwrite=true to start anew."
                )
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        if not about.exists():
            atomic.write_file(about, json.dumps(wanted, indent=2).encode())
        attempts = [self._read(path) for path in sorted(self.folder.glob("[0-9]*.*"))]
        return {attempt.key: attempt for attempt in attempts if attempt is not None}

    def reject(self, attempt: Attempt) -> None:
        atomic.write_file(self.folder / f"{attempt.key:010d}.json", json.dumps({"reason": attempt.reason}).encode())

    def keep(self, key: int, episode: Episode) -> Attempt:
        """Write `episode` and return its line of the journal."""
        path = self.path(key)
        temporary = path.with_suffix(".h5.tmp")
        with h5py.File(temporary, "w") as file:
            write_episode(file.create_group("episode", track_order=True), episode)
            file.attrs["seed"] = episode.seed
            file.attrs["reset_kwargs"] = json.dumps(episode.reset_kwargs)
            file.attrs["plan_steps"] = episode.plan_steps
        os.replace(temporary, path)
        return Attempt(key=key, steps=len(episode.actions), plan_steps=episode.plan_steps)

    def adopt(self, key: int, trajectory: h5py.Group, entry: Mapping[str, Any]) -> Attempt:
        """Take a trajectory of a finished file, with its JSON `entry`, back as the attempt `key`."""
        path = self.path(key)
        temporary = path.with_suffix(".h5.tmp")
        with h5py.File(temporary, "w") as file:
            trajectory.file.copy(trajectory, file, "episode")
            file.attrs["seed"] = entry["episode_seed"]
            file.attrs["reset_kwargs"] = json.dumps(entry["reset_kwargs"])
            file.attrs["plan_steps"] = entry["plan_steps"]
        os.replace(temporary, path)
        return Attempt(key=key, steps=entry["elapsed_steps"], plan_steps=entry["plan_steps"])

    def path(self, key: int) -> Path:
        return self.folder / f"{key:010d}.h5"

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, path: Path) -> Attempt | None:
        """Return the attempt in `path`; one that a power failure left unreadable is removed, to be made again."""
        key = int(path.stem)
        try:
            if path.suffix == ".json":
                return Attempt(key=key, reason=json.loads(path.read_text())["reason"])
            with h5py.File(path, "r") as file:
                return Attempt(key=key, steps=len(file["episode/actions"]), plan_steps=int(file.attrs["plan_steps"]))
        except (OSError, ValueError, KeyError):
            path.unlink()
            return None


def write_trajectories(path: Path, journal: Journal, attempts: Sequence[Attempt], about: Mapping[str, Any]) -> None:
    """Write the kept `attempts`, in their order, to `path` and the JSON beside it; both appear whole or not at all.

    Args:
        about: what the JSON says besides `episodes`: `env_info`, `task_spec`, ...
    """
    episodes = []
    temporary = path.with_name(f".{path.name}.tmp")
    with h5py.File(temporary, "w") as out:
        for index, attempt in enumerate(a for a in attempts if a.kept):
            with h5py.File(journal.path(attempt.key), "r") as file:
                file.copy("episode", out, f"traj_{index}")
                episodes.append(_describe(index, file, about["env_info"]["env_kwargs"]["control_mode"]))
    with open(temporary, "rb") as written:
        os.fsync(written.fileno())
    json_path = path.with_suffix(".json")
    json_path.unlink(missing_ok=True)  # without its JSON a file is unfinished, so a kill between the two moves is seen
    os.replace(temporary, path)
    atomic.write_file(json_path, json.dumps({**about, "episodes": episodes}, indent=2).encode())


def write_episode(group: h5py.Group, episode: Episode) -> None:
    """Write one trajectory group."""
    _write_tree(group, "obs", episode.obs)
    group.create_dataset("actions", data=episode.actions, dtype=np.float32)
    for name, values in episode.outcomes.items():
        group.create_dataset(name, data=values, dtype=bool)
    _write_tree(group, "env_states", episode.env_states)


def read_tree(group: h5py.Group, index: int) -> dict[str, Any]:
    """Return row `index` of every leaf, with a batch axis of one in front, as `set_state_dict` takes it."""
    return {k: read_tree(v, index) if isinstance(v, h5py.Group) else v[index][None] for k, v in group.items()}


def read_all(group: h5py.Group) -> dict[str, Any]:
    """Return every leaf whole."""
    return {k: read_all(v) if isinstance(v, h5py.Group) else v[()] for k, v in group.items()}


def stack(trees: Sequence[Tree]) -> dict[str, Any]:
    """Stack trees of equal structure, one per step, into one tree of arrays [T, ...]."""
    return {
        key: stack([tree[key] for tree in trees])
        if isinstance(trees[0][key], Mapping)
        else np.stack([tree[key] for tree in trees])
        for key in trees[0]
    }


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield (path, array) of every leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def _write_tree(group: h5py.Group, name: str, tree: Tree) -> None:
    child = group.create_group(name, track_order=True)
    for key, value in tree.items():
        if isinstance(value, Mapping):
            _write_tree(child, key, value)
        elif key in COMPRESSED:
            child.create_dataset(key, data=value, compression="gzip", compression_opts=5)
        else:
            child.create_dataset(key, data=value)


def _describe(index: int, file: h5py.File, control_mode: str) -> dict[str, Any]:
    """Return the JSON entry of an episode, with RecordEpisode's keys."""
    group = file["episode"]
    return {
        "episode_id": index,
        "episode_seed": int(file.attrs["seed"]),
        "control_mode": control_mode,
        "elapsed_steps": len(group["actions"]),
        "reset_kwargs": json.loads(file.attrs["reset_kwargs"]),
        "success": bool(group["success"][-1]),
        **({"fail": bool(group["fail"][-1])} if "fail" in group else {}),
        "plan_steps": int(file.attrs["plan_steps"]),
    }
