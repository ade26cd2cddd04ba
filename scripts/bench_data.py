#!/usr/bin/env python
"""How fast training windows arrive, against a per-sample DataLoader, and what a large store costs to open.

    python scripts/bench_data.py            both tables
    python scripts/bench_data.py --json     the same as JSON

Times are process-wide CPU and wall time on made-up data, the two loaders interleaved; quote the ratio, not the times.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from robopolicy.data.store import EpisodeStore, StoreWriter
from robopolicy.data.windows import batches, find_windows
from robopolicy.timing import ChunkTiming
from robopolicy.types import ActionSpec, ModalitySpec, TaskSpec

WIDTHS = {"proprio": 25, "objects": 14, "goal": 3}
ACTION_DIM = 4
EPISODE_STEPS = 50


def spec() -> TaskSpec:
    """PickCube's sizes."""
    each = {"low": -1.0, "high": 1.0, "units": "m", "physical_low": -0.1, "physical_high": 0.1}
    columns: dict[str, Any] = {name: (value,) * ACTION_DIM for name, value in each.items()}
    return TaskSpec(
        name="made_up",
        env_id="MadeUp-v0",
        robot="panda",
        instruction="",
        max_episode_steps=EPISODE_STEPS,
        observation={name: ModalitySpec(shape=(width,), fields={name: width}) for name, width in WIDTHS.items()},
        action=ActionSpec(
            **columns,
            names=("x", "y", "z", "gripper"),
            delta=(True, True, True, False),
            discrete=(False, False, False, True),
            control_mode="pd_ee_delta_pos",
            control_dt_s=0.05,
        ),
    )


def write_store(folder: Path, num_frames: int) -> None:
    """Fill a store on disk with noise, a chunk at a time."""
    rng = np.random.default_rng(0)
    episodes = num_frames // EPISODE_STEPS
    with StoreWriter(folder, spec(), num_frames) as writer:
        for array in writer.arrays.values():
            for start in range(0, num_frames, 50_000):
                chunk = array[start : start + 50_000]
                chunk[:] = rng.standard_normal(chunk.shape, dtype=np.float32)
        ends = [(i + 1) * EPISODE_STEPS for i in range(episodes)]
        writer.finish(ends, list(range(episodes)), [True] * episodes)


class PerSample(Dataset[dict[str, torch.Tensor]]):
    """The usual way: one window per `__getitem__`, collated by the DataLoader."""

    def __init__(self, store: EpisodeStore, timing: ChunkTiming) -> None:
        self.store, self.timing = store, timing
        self.windows = find_windows(store.episode_ends, timing)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        begin, end = int(self.windows.begin[index]), int(self.windows.end[index])
        steps = int(self.windows.first[index]) + torch.arange(self.timing.horizon)
        inside = steps.clamp(begin, end - 1)
        seen = inside[: self.timing.n_obs_steps]
        sample = {name: value[seen] for name, value in self.store.modalities.items()}
        return sample | {"action": self.store.action[inside], "is_pad": steps != inside}


def bench_batches(folder: Path, *, batch_size: int, rounds: int, num_batches: int) -> dict[str, float]:
    """Return the median seconds per batch of both loaders, and their ratio."""
    write_store(folder, 10_000)
    store, timing = EpisodeStore.open(folder), ChunkTiming()
    ours: Iterator[Any] = batches(store, timing, batch_size=batch_size, seed=0)
    loader = DataLoader(PerSample(store, timing), batch_size=batch_size, shuffle=True, drop_last=True)

    def per_sample() -> Iterator[Any]:
        while True:
            yield from loader

    theirs = per_sample()
    times: dict[str, list[float]] = {"gathered": [], "per_sample": []}
    for stream in (ours, theirs):
        next(stream)  # compiles the index, starts the iterator
    for _ in range(rounds):
        for name, stream in (("gathered", ours), ("per_sample", theirs)):
            times[name].append(_seconds(lambda stream=stream: [next(stream) for _ in range(num_batches)]) / num_batches)  # type: ignore[misc]
    medians = {f"{name}_s": statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": medians["per_sample_s"] / medians["gathered_s"], "batch_size": batch_size}


OPEN_LARGE = """
import json, sys, time
from robopolicy.data.store import EpisodeStore
from robopolicy.data.windows import batches
from robopolicy.timing import ChunkTiming

def memory_mb():
    lines = [line.split() for line in open("/proc/self/status") if line.startswith(("VmRSS", "RssAnon"))]
    return {name: int(kilobytes) / 1024 for name, kilobytes, _ in lines}

imported = memory_mb()
start = time.perf_counter()
store = EpisodeStore.open(sys.argv[1], in_memory=False)
store.limits()
stream = batches(store, ChunkTiming(), batch_size=128, seed=0)
next(stream)
open_s, opened = time.perf_counter() - start, memory_mb()
for _ in range(1000):
    next(stream)
later = memory_mb()
print(json.dumps({"frames": store.num_frames, "open_s": open_s, "imported_mb": imported["VmRSS:"],
                  "resident_mb": opened["VmRSS:"],
                  "later_resident_mb": later["VmRSS:"], "later_own_mb": later["RssAnon:"]}))
"""


def bench_large(folder: Path, num_frames: int) -> dict[str, float]:
    """Return seconds until the first batch of a mapped store, and the process's memory then and 1000 batches later.

    `resident_mb` holds Python, torch and numba too (300 MB); of `later_resident_mb` all but `later_own_mb` are pages of
    the files and of libraries, which the kernel drops when memory is wanted elsewhere.
    """
    write_store(folder, num_frames)
    size_mb = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OPEN_LARGE, str(folder)], capture_output=True, text=True, check=True, env=env
    )
    return {**json.loads(done.stdout), "disk_mb": size_mb}


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", choices=("batches", "large"), help="one of the two tables")
    parser.add_argument("--frames", type=int, default=1_000_000, help="size of the large store")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="where to put the stores; default: a temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    results: dict[str, dict[str, float]] = {}
    try:
        if args.only != "large":
            results["batches"] = bench_batches(folder / "small", batch_size=args.batch_size, rounds=9, num_batches=20)
        if args.only != "batches":
            results["large"] = bench_large(folder / "large", args.frames)
    finally:
        shutil.rmtree(folder)
    if args.json:
        print(json.dumps(results, indent=2))
        return
    if found := results.get("batches"):
        print(
            f"batch of {args.batch_size}: {found['gathered_s'] * 1e6:.0f} us gathered, "
            f"{found['per_sample_s'] * 1e6:.0f} us by a per-sample DataLoader, ratio {found['ratio']:.0f}"
        )
    if found := results.get("large"):
        print(
            f"{found['frames']:,} frames ({found['disk_mb']:.0f} MB): first batch after {found['open_s']:.2f} s, "
            f"{found['resident_mb']:.0f} MB resident; 1000 batches later {found['later_resident_mb']:.0f} MB, of which "
            f"{found['later_own_mb']:.0f} MB are not pages of files"
        )


if __name__ == "__main__":
    main()
