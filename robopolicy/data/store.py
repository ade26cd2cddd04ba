"""Demonstrations as flat arrays: every modality and the actions of all episodes end to end, and where each ends.

On disk a store is a folder of plain `.npy` files and a `meta.json`, so that it opens memory-mapped at any size and
holds nothing that could run code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from robopolicy.errors import DataError
from robopolicy.normalize import Limits
from robopolicy.types import TaskSpec

FORMAT = "robopolicy-episodes/1"
MEMORY_MAP_ABOVE = 512 * 1024**2
"""Bytes above which a store is opened memory-mapped."""
CHUNK = 65536
"""Frames at a time, where all are read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class EpisodeStore:
    """F frames of E episodes; frame `i` is an observation and the action taken there."""

    spec: TaskSpec
    modalities: Mapping[str, Tensor]
    """Name to [F, S] float32, or [F, C, Y, X] uint8 for `rgb.<camera>`."""
    action: Tensor
    """[F, A] float32, environment units."""
    episode_ends: Tensor
    """[E] int64, the frame after each episode's last."""
    seeds: Tensor
    """[E] int64, the seed of each episode; -1 where unknown."""
    success: Tensor
    """[E] bool, whether the last step was a success."""
    stored_limits: Limits | None = None
    """Known limits, from when the arrays were written."""

    def __post_init__(self) -> None:
        ends = self.episode_ends
        if len(ends) == 0 or int(ends[0]) < 1 or bool((ends.diff() < 1).any()) or int(ends[-1]) != len(self.action):
            raise DataError(
                f"episode_ends must rise strictly from at least 1 to {len(self.action)}, all frames; got {ends}."
            )
        for name, modality in self.spec.observation.items():
            if name not in self.modalities or tuple(self.modalities[name].shape) != (len(self.action), *modality.shape):
                found = tuple(self.modalities[name].shape) if name in self.modalities else "none"
                raise DataError(f"Modality {name!r} must be [F={len(self.action)}, {modality.shape}]; got {found}.")

    @property
    def num_frames(self) -> int:
        return len(self.action)

    @property
    def num_episodes(self) -> int:
        return len(self.episode_ends)

    @property
    def episode_lengths(self) -> Tensor:
        """[E] int64, steps."""
        return self.episode_ends.diff(prepend=self.episode_ends.new_zeros(1))

    def limits(self) -> Limits:
        """Return the smallest and largest value of every dimension of `action` and of modalities that are no images."""
        return self.stored_limits if self.stored_limits is not None else find_limits(self)

    def first(self, num_episodes: int) -> EpisodeStore:
        """Return the first `num_episodes` episodes; arrays are shared, limits are those of these episodes.

        Raises:
            DataError: there are fewer.
        """
        if not 1 <= num_episodes <= self.num_episodes:
            raise DataError(f"num_episodes must be in [1, {self.num_episodes}], all there are; got {num_episodes}.")
        if num_episodes == self.num_episodes:
            return self
        end = int(self.episode_ends[num_episodes - 1])
        return EpisodeStore(
            spec=self.spec,
            modalities={name: value[:end] for name, value in self.modalities.items()},
            action=self.action[:end],
            episode_ends=self.episode_ends[:num_episodes],
            seeds=self.seeds[:num_episodes],
            success=self.success[:num_episodes],
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the store to `folder`, which must not exist; it appears complete or not at all."""
        with StoreWriter(Path(folder), self.spec, self.num_frames) as writer:
            for name, value in self.modalities.items():
                writer.arrays[name][:] = value.numpy()
            writer.arrays["action"][:] = self.action.numpy()
            writer.finish(self.episode_ends.tolist(), self.seeds.tolist(), self.success.tolist())

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, in_memory: bool | None = None) -> EpisodeStore:
        """Open what `save` wrote.

        Args:
            in_memory: read everything now, or map the files; None decides by size (MEMORY_MAP_ABOVE).

        Raises:
            DataError: `folder` is no complete store of this format.
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text())
            if meta["format"] != FORMAT:
                raise DataError(f"{folder} has format {meta['format']!r}; this version reads {FORMAT!r}.")
            spec = TaskSpec.from_dict(meta["spec"])
            files = {name: folder / f"{name}.npy" for name in [*spec.observation, "action", "episodes"]}
            if in_memory is None:
                in_memory = sum(file.stat().st_size for file in files.values()) <= MEMORY_MAP_ABOVE
            # mode "c": writable pages of our own, so that torch accepts them; the files are never written to
            mode: Literal["c"] | None = None if in_memory else "c"
            arrays = {
                n: np.load(f, mmap_mode=None if n == "episodes" else mode, allow_pickle=False) for n, f in files.items()
            }
            tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
            limits = {name: (torch.tensor(low), torch.tensor(high)) for name, (low, high) in meta["limits"].items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{folder} is no complete episode store ({error}); delete it, it will be built anew."
            ) from error
        action, episodes = tensors.pop("action"), tensors.pop("episodes")
        return cls(
            spec=spec,
            modalities=tensors,
            action=action,
            episode_ends=episodes[:, 0].clone(),
            seeds=episodes[:, 1].clone(),
            success=episodes[:, 2] > 0,
            stored_limits=limits,
        )


class StoreWriter:
    """Fills a store on disk frame by frame, without holding it in memory; a context that cleans up after errors."""

    def __init__(self, folder: Path, spec: TaskSpec, num_frames: int) -> None:
        self.folder, self.spec = folder, spec
        self._temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        shapes = {name: (m.shape, m.dtype) for name, m in spec.observation.items()}
        shapes["action"] = ((spec.action.dim,), "float32")
        self.arrays: dict[str, np.memmap] = {
            name: np.lib.format.open_memmap(self._path(name), "w+", dtype=dtype, shape=(num_frames, *shape))
            for name, (shape, dtype) in shapes.items()
        }
        """Modality name, or `action`, to the array to fill."""

    def finish(self, episode_ends: list[int], seeds: list[int], success: list[bool]) -> None:
        """Write the episode table, the limits and the description, and give the folder its name.

        If the folder exists by now (another process was faster), that one stays.
        """
        np.save(self._path("episodes"), np.array([episode_ends, seeds, success], dtype=np.int64).T)
        images = {name for name, m in self.spec.observation.items() if m.is_image}
        limits = {n: _array_limits(a) for n, a in self.arrays.items() if n not in images}
        meta: dict[str, Any] = {
            "format": FORMAT,
            "spec": self.spec.to_dict(),
            "limits": {name: [side.tolist() for side in sides] for name, sides in limits.items()},
        }
        for array in self.arrays.values():
            array.flush()
        (self._temporary / "meta.json").write_text(json.dumps(meta, indent=2))
        try:
            os.rename(self._temporary, self.folder)
        except OSError:
            if not (self.folder / "meta.json").exists():
                raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.arrays.clear()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._temporary / f"{name}.npy"


def find_limits(store: EpisodeStore) -> Limits:
    """Read all frames of `store` and return the limits of every modality that is no image and of `action`."""
    names = [name for name, m in store.spec.observation.items() if not m.is_image]
    arrays = {name: store.modalities[name].numpy() for name in names} | {"action": store.action.numpy()}
    return {n: tuple(map(torch.from_numpy, _array_limits(a))) for n, a in arrays.items()}  # type: ignore[misc]


def _array_limits(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and largest rows of `array` [F, S], a chunk at a time."""
    chunks = [array[i : i + CHUNK] for i in range(0, len(array), CHUNK)]
    low = np.min([np.min(chunk, axis=0) for chunk in chunks], axis=0)
    high = np.max([np.max(chunk, axis=0) for chunk in chunks], axis=0)
    return low, high
