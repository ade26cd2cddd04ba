#!/usr/bin/env python3
"""Training speed: our loop and batches against a per-sample DataLoader and against the bare network, in one run.

    scripts/bench_train.py [--demos demos/pick_cube/pd_ee_delta_pos.state.h5] [--policy diffusion] [--rounds 7]

All contenders train the same network with the same loop, optimiser and average on the same demonstrations; only the
source of the batches differs. Each is tried with 1 and 2 threads (the loader with 0 and 2 workers as well) and counts
with its best. They take turns, so that a busy machine disturbs all alike; medians over the rounds. The floor is
forward, backward and optimiser step on one fixed batch: no data, no clipping, no average, no bookkeeping.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset, RandomSampler

from robopolicy.app.build import build_policy
from robopolicy.app.composing import compose
from robopolicy.data import EpisodeStore, batches, load_demonstrations
from robopolicy.policies.base import Policy
from robopolicy.timing import ChunkTiming
from robopolicy.training.ema import EMA
from robopolicy.training.loop import Window, train
from robopolicy.training.optim import make_optimizer, make_scheduler
from robopolicy.types import ActionSpec, Batch, ModalitySpec, Observation, TaskSpec

BATCH_SIZE = 128
FOREVER = 10**9


class WindowDataset(Dataset[dict[str, torch.Tensor]]):
    """One window per item, cut and padded with numpy: how imitation-learning code usually feeds its loader."""

    def __init__(self, store: EpisodeStore, timing: ChunkTiming) -> None:
        self.arrays = {name: np.asarray(value) for name, value in store.modalities.items()}
        self.action, self.timing = np.asarray(store.action), timing
        ends = np.asarray(store.episode_ends)
        starts = np.concatenate([[0], ends[:-1]])
        self.rows = [(t, a, b) for a, b in zip(starts, ends, strict=True) for t in range(a - timing.now, b)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        first, start, end = self.rows[index]
        frames = np.clip(np.arange(first, first + self.timing.n_obs_steps), start, end - 1)
        steps = np.arange(first, first + self.timing.horizon)
        item = {name: torch.from_numpy(value[frames]) for name, value in self.arrays.items()}
        item["action"] = torch.from_numpy(self.action[np.clip(steps, start, end - 1)])
        item["is_pad"] = torch.from_numpy((steps < start) | (steps >= end))
        return item


def loader_batches(store: EpisodeStore, timing: ChunkTiming, workers: int) -> Iterator[Batch]:
    """Yield batches from a DataLoader over single windows; drawn with replacement, so no epoch ever restarts it."""
    data = WindowDataset(store, timing)
    sampler = RandomSampler(data, replacement=True, num_samples=FOREVER)
    for item in DataLoader(data, batch_size=BATCH_SIZE, sampler=sampler, num_workers=workers):
        action, is_pad = item.pop("action"), item.pop("is_pad")
        yield Batch(obs=Observation(modalities=item), action=action, is_pad=is_pad)


class Contender:
    """A policy in training that can be given a few steps at a time."""

    def __init__(self, make_policy: Callable[[], Policy], source: Iterator[Batch], threads: int) -> None:
        self.policy, self.source, self.threads = make_policy(), source, threads
        self.optimizer, self.ema, self.done = make_optimizer(self.policy), EMA(self.policy), 0
        self.scheduler = make_scheduler(self.optimizer, num_steps=FOREVER)
        self.rates: list[float] = []
        self.data_shares: list[float] = []

    def take_turn(self, accelerator: Accelerator, steps: int) -> None:
        """Train `steps` and note samples per second and the share of time spent on batches."""
        torch.set_num_threads(self.threads)
        logged: dict[str, float] = {}
        began_s = time.perf_counter()
        self.done = train(
            self.policy,
            self.source,
            accelerator=accelerator,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            ema=self.ema,
            num_steps=self.done + steps,
            start_step=self.done,
            window=Window(),
            log=lambda step, metrics: logged.update(metrics),
            log_every=FOREVER,
            save=lambda step, window: None,
            save_every=FOREVER,
        )
        self.rates.append(BATCH_SIZE * steps / (time.perf_counter() - began_s))
        self.data_shares.append(logged["train/data_share"])


class Floor(Contender):
    """Forward, backward and optimiser step on one batch."""

    def take_turn(self, accelerator: Accelerator, steps: int) -> None:
        """Train `steps` and note samples per second."""
        torch.set_num_threads(self.threads)
        batch = next(self.source)
        began_s = time.perf_counter()
        for _ in range(steps):
            self.policy(batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.rates.append(BATCH_SIZE * steps / (time.perf_counter() - began_s))


def best(group: dict[str, Contender]) -> tuple[str, Contender]:
    """Return the fastest of `group`."""
    return max(group.items(), key=lambda entry: statistics.median(entry[1].rates))


def synthetic_store(*, num_episodes: int = 100, length: int = 60) -> EpisodeStore:
    """Return random demonstrations in the shape of PickCube's: 39 numbers observed, 4 commanded."""
    widths = {"proprio": 25, "objects": 11, "goal": 3}
    spec = TaskSpec(
        name="pick_cube",
        env_id="PickCube-v1",
        robot="panda",
        instruction="",
        max_episode_steps=100,
        observation={n: ModalitySpec(shape=(size,), fields={f"extra/{n}": size}) for n, size in widths.items()},
        action=ActionSpec(
            names=("x", "y", "z", "gripper"),
            low=(-1.0,) * 4,
            high=(1.0,) * 4,
            delta=(True, True, True, False),
            discrete=(False, False, False, True),
            units=("m",) * 4,
            physical_low=(-0.1,) * 4,
            physical_high=(0.1,) * 4,
            control_mode="pd_ee_delta_pos",
            control_dt_s=0.05,
        ),
    )
    frames, source = num_episodes * length, torch.Generator().manual_seed(0)
    return EpisodeStore(
        spec=spec,
        modalities={n: torch.rand(frames, size, generator=source) for n, size in widths.items()},
        action=torch.rand(frames, 4, generator=source) * 2 - 1,
        episode_ends=torch.arange(1, num_episodes + 1) * length,
        seeds=torch.arange(num_episodes),
        success=torch.ones(num_episodes, dtype=torch.bool),
    )


def main() -> None:
    """Run the contenders in turns and print what they reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demos", type=Path, default=Path("demos/pick_cube/pd_ee_delta_pos.state.h5"))
    parser.add_argument("--policy", default="diffusion", help="a choice of configs/policy")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60, help="per turn")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    store = load_demonstrations(options.demos) if options.demos.exists() else synthetic_store()
    config = compose("train", [f"policy={options.policy}"]).policy

    def make_policy() -> Policy:
        torch.manual_seed(0)
        policy = build_policy(config, store.spec)
        policy.norm.fit(store.limits())
        return policy

    timing, accelerator = make_policy().timing, Accelerator(cpu=True)
    ours: dict[str, Contender] = {}
    loaders: dict[str, Contender] = {}
    floors: dict[str, Contender] = {}
    for threads in (1, 2):
        source = batches(store, timing, batch_size=BATCH_SIZE, seed=0)
        ours[f"{threads} thread(s)"] = Contender(make_policy, source, threads)
        floors[f"{threads} thread(s)"] = Floor(make_policy, source, threads)
        for workers in (0, 2):
            name = f"{threads} thread(s), {workers} workers"
            loaders[name] = Contender(make_policy, loader_batches(store, timing, workers), threads)
    everyone = [*ours.values(), *loaders.values(), *floors.values()]
    for contender in everyone:
        contender.take_turn(accelerator, 5)  # first calls allocate, compile and start workers
        contender.rates.clear()
        contender.data_shares.clear()
    for _ in range(options.rounds):
        for contender in everyone:
            contender.take_turn(accelerator, options.steps)
    print(
        f"{options.policy}, batch {BATCH_SIZE}, {store.num_frames:,} frames of "
        f"{options.demos if options.demos.exists() else 'random numbers'}; median of {options.rounds} turns"
    )
    report(ours, loaders, floors, options.json)


def report(
    ours: dict[str, Contender], loaders: dict[str, Contender], floors: dict[str, Contender], file: Path | None
) -> None:
    """Print the table and the ratios; write them to `file`, if given."""
    figures: dict[str, Any] = {}
    for title, group in {"robopolicy": ours, "DataLoader": loaders, "floor": floors}.items():
        for name, one in group.items():
            figures[f"{title}, {name}"] = rate = statistics.median(one.rates)
            share = f"{100 * statistics.median(one.data_shares):5.1f} % on data" if one.data_shares else ""
            print(f"  {title:<12}{name:<26}{rate:>10,.0f} samples/s  {share}")
    (our_name, our), (their_name, their), (floor_name, floor) = best(ours), best(loaders), best(floors)
    figures["ratio"] = paired(our, their)
    figures["ratio, same threads"] = {
        n: paired(one, best({k: v for k, v in loaders.items() if k.startswith(n)})[1]) for n, one in ours.items()
    }
    figures["data share"] = statistics.median(our.data_shares)
    figures["of the floor"] = paired(our, floor)
    print(f"{figures['ratio']:.2f} x the best DataLoader ({our_name} against {their_name})")
    for name, ratio in figures["ratio, same threads"].items():
        print(f"{ratio:.2f} x the best DataLoader where both use {name}")
    print(f"{100 * figures['data share']:.1f} % of the step is spent on data")
    print(f"{100 * figures['of the floor']:.0f} % of the speed of bare forward, backward and optimiser ({floor_name})")
    if file is not None:
        file.write_text(json.dumps(figures, indent=2) + "\n")


def paired(one: Contender, other: Contender) -> float:
    """Return the median over the rounds of how many times faster `one` was than `other`."""
    return statistics.median(a / b for a, b in zip(one.rates, other.rates, strict=True))


if __name__ == "__main__":
    main()
