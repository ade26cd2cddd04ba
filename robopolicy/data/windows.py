"""Training windows over an episode store, and batches of them gathered by index, without per-sample Python.

Window `w` of an episode of L steps covers steps `w .. w + horizon - 1`; `w` runs from `-(n_obs_steps - 1)` to
`L - horizon + pad_after`, and what hangs over an end is padded with the first or the last step. An episode too short
for any such window still gives those that start at its first step or before.

Diffusion Policy (Chi et al., 2023; `create_indices` in sampler.py) has pad_after = n_action_steps - 1. Then the last
`horizon - n_action_steps` observations of an episode are never the newest of a window, so the policy has not seen where
a task ends; in short demonstrations that is much of them (docs/defaults.md measures what it costs). The default is
horizon - 1: every observation is the newest of some window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np
import torch
from torch import Tensor

from robopolicy.errors import DataError
from robopolicy.timing import ChunkTiming
from robopolicy.types import Batch, Observation

from .store import EpisodeStore

ActionPadding = Literal["hold", "repeat"]
"""`repeat`: the episode's first or last action, as Diffusion Policy does. `hold`: the same for absolute and discrete
dimensions, but zero, which means stay, where an action is an increment."""


@dataclass(frozen=True, eq=False)
class Windows:
    """W windows over the frames of a store."""

    first: Tensor
    """[W] int64, frame of each window's step 0; before its episode's start where the window hangs over it."""
    begin: Tensor
    """[W] int64, first frame of the episode."""
    end: Tensor
    """[W] int64, frame after the episode's last."""

    def __len__(self) -> int:
        return len(self.first)


def find_windows(episode_ends: Tensor, timing: ChunkTiming, *, pad_after: int | None = None) -> Windows:
    """Return all windows over episodes that end before `episode_ends` [E].

    Args:
        pad_after: steps by which a window may hang over the end; None for horizon - 1, Diffusion Policy has
            n_action_steps - 1.

    Raises:
        DataError: `pad_after` is not in [0, horizon - 1].
    """
    after = timing.horizon - 1 if pad_after is None else pad_after
    if not 0 <= after < timing.horizon:
        raise DataError(f"pad_after must be in [0, {timing.horizon - 1}] for horizon={timing.horizon}; got {after}.")
    table = _index(episode_ends.numpy(), timing.horizon, timing.now, after)
    return Windows(*torch.from_numpy(table).unbind(0))


def gather(
    store: EpisodeStore, windows: Windows, rows: Tensor, timing: ChunkTiming, *, action_padding: ActionPadding = "hold"
) -> Batch:
    """Return the windows `rows` [B] as a batch.

    numpy rather than torch does the indexing: it needs no thread pool, whose waking costs more than the work.
    """
    picked = rows.numpy()
    first, begin, end = (column.numpy()[picked][:, None] for column in (windows.first, windows.begin, windows.end))
    steps = first + np.arange(timing.horizon)
    inside = np.clip(steps, begin, end - 1)
    is_pad = steps != inside
    action = store.action.numpy()[inside]
    if action_padding == "hold":
        spec = store.spec.action
        stays = np.array([delta and not discrete for delta, discrete in zip(spec.delta, spec.discrete, strict=True)])
        action[is_pad[:, :, None] & stays] = 0.0
    seen = inside[:, : timing.n_obs_steps]
    modalities = {name: torch.from_numpy(value.numpy()[seen]) for name, value in store.modalities.items()}
    return Batch(
        obs=Observation(modalities=modalities), action=torch.from_numpy(action), is_pad=torch.from_numpy(is_pad)
    )


def batches(
    store: EpisodeStore,
    timing: ChunkTiming,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    action_padding: ActionPadding = "hold",
    pad_after: int | None = None,
) -> Iterator[Batch]:
    """Yield batches `start_step`, `start_step + 1`, ... without end.

    Batch k depends on (seed, k, rank) alone, so a run is resumed with its step number. The windows of all epochs, each
    in a new random order, form one endless row, of which batch k of rank r takes the places
    `(k * world_size + r) * batch_size` and following: every window is seen once an epoch, and none is dropped.

    Args:
        batch_size: windows per batch and rank.
        action_padding: what actions outside the episode are, see ActionPadding.
        pad_after: see `find_windows`.

    Raises:
        DataError: a number is out of range.
    """
    if batch_size < 1 or start_step < 0 or not 0 <= rank < world_size:
        raise DataError(
            "batches needs batch_size >= 1, start_step >= 0 and 0 <= rank < world_size; got "
            f"{batch_size=}, {start_step=}, {rank=}, {world_size=}."
        )
    if action_padding not in ("hold", "repeat"):
        raise DataError(f"action_padding must be 'hold' or 'repeat'; got {action_padding!r}.")
    windows = find_windows(store.episode_ends, timing, pad_after=pad_after)
    return _endless(store, windows, timing, batch_size, seed, start_step, device, rank, world_size, action_padding)


def _endless(
    store: EpisodeStore,
    windows: Windows,
    timing: ChunkTiming,
    batch_size: int,
    seed: int,
    start_step: int,
    device: torch.device | str,
    rank: int,
    world_size: int,
    action_padding: ActionPadding,
) -> Iterator[Batch]:
    orders: dict[int, Tensor] = {}
    step = start_step
    while True:
        rows = []
        place = (step * world_size + rank) * batch_size
        stop = place + batch_size
        while place < stop:
            epoch, offset = divmod(place, len(windows))
            if epoch not in orders:
                orders = {e: o for e, o in orders.items() if e == epoch - 1}
                orders[epoch] = epoch_order(len(windows), seed, epoch)
            taken = orders[epoch][offset : offset + stop - place]
            rows.append(taken)
            place += len(taken)
        yield gather(store, windows, torch.cat(rows), timing, action_padding=action_padding).to(device)
        step += 1


def epoch_order(num_windows: int, seed: int, epoch: int) -> Tensor:
    """Return the order [W] in which an epoch goes through the windows."""
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.randperm(num_windows, generator=torch.Generator().manual_seed(int(mixed >> np.uint64(1))))


@numba.njit(cache=True)
def _index(episode_ends: np.ndarray, horizon: int, pad_before: int, pad_after: int) -> np.ndarray:
    """Return [3, W] int64: first frame of each window, begin and end of its episode."""
    count = 0
    begin = 0
    for end in episode_ends:
        count += max(end - begin - horizon + pad_after, 0) + pad_before + 1
        begin = end
    table = np.empty((3, count), dtype=np.int64)
    at = 0
    begin = 0
    for end in episode_ends:
        for start in range(-pad_before, max(end - begin - horizon + pad_after, 0) + 1):
            table[0, at] = begin + start
            table[1, at] = begin
            table[2, at] = end
            at += 1
        begin = end
    return table
