"""A policy, its data and a training run small enough to check by hand and to run in a moment."""

from __future__ import annotations

import contextlib
import math
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robopolicy.policies.base import Policy
from robopolicy.rng import Rng, randn
from robopolicy.timing import ChunkTiming
from robopolicy.training.fit import fit, make_accelerator
from robopolicy.training.loop import step_seed
from robopolicy.training.settings import TrainSettings
from robopolicy.types import ActionSpec, Batch, ModalitySpec, Observation, TaskSpec

SPEC = TaskSpec(
    name="toy",
    env_id="Toy-v1",
    robot="none",
    instruction="",
    max_episode_steps=10,
    observation={"proprio": ModalitySpec(shape=(3,), fields={"agent/qpos": 3})},
    action=ActionSpec(
        names=("x", "y"),
        low=(-1.0, -1.0),
        high=(1.0, 1.0),
        delta=(True, True),
        discrete=(False, False),
        units=("m", "m"),
        physical_low=(-0.1, -0.1),
        physical_high=(0.1, 0.1),
        control_mode="pd_ee_delta_pos",
        control_dt_s=0.05,
    ),
)
LIMITS = {"proprio": (-torch.ones(3), torch.ones(3)), "action": (-torch.ones(2), torch.ones(2))}
TIMING = ChunkTiming(n_obs_steps=1, horizon=2, n_action_steps=1)


class ToyPolicy(Policy):
    """A regression with noise and dropout, so that randomness of every kind is in play."""

    def __init__(self, spec: TaskSpec = SPEC, *, width: int = 8) -> None:
        super().__init__(spec, timing=TIMING)
        self.net = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.1), nn.Tanh(), nn.Linear(width, 4))

    def loss(self, batch: Batch, *, generator: Rng = None) -> Tensor:
        out = self.act(batch.obs)
        return (out - batch.action + 0.1 * randn(*out.shape, generator=generator)).square().mean()

    def act(self, obs: Observation, *, guess: Tensor | None = None, generator: Rng = None) -> Tensor:
        return self.net(self.normalized(obs)["proprio"][:, 0]).unflatten(1, (2, 2))


def toy_policy(*, width: int = 8) -> ToyPolicy:
    torch.manual_seed(0)
    policy = ToyPolicy(width=width)
    policy.norm.fit(LIMITS)
    return policy


def toy_batches(start: int = 0, *, rank: int = 0, size: int = 16, spoil_at: int = -1) -> Iterator[Batch]:
    """Batch k depends on k alone; actions are a fixed linear map of the observation."""
    k = start
    while True:
        source = torch.Generator().manual_seed(step_seed(7, k, rank))
        proprio = torch.rand(size, 1, 3, generator=source) * 2 - 1
        action = torch.stack([proprio[..., 0], proprio[..., 1] * proprio[..., 2]], dim=-1).expand(-1, 2, -1).clone()
        if k == spoil_at:
            action[0, 0, 0] = math.nan
        pad = torch.zeros(size, 2, dtype=torch.bool)
        yield Batch(obs=Observation(modalities={"proprio": proprio}), action=action, is_pad=pad)
        k += 1


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond `size` bytes: writing fails midway, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run_toy(run_dir: Path, **changes: Any) -> tuple[ToyPolicy, list[dict[str, float]]]:
    """Train the toy policy into `run_dir`; return it and what was logged. `changes`: arguments of `fit` or settings."""
    rows: list[dict[str, float]] = []
    options = {"make_batches": toy_batches, "log": lambda step, metrics: rows.append({"step": step, **metrics})}
    options |= {
        name: changes.pop(name)
        for name in ("make_batches", "log", "resume_from", "stop", "held_out")
        if name in changes
    }
    policy = toy_policy(width=changes.pop("width", 8))
    settings = TrainSettings(**{"num_steps": 40, "warmup_steps": 5, "log_every": 10, "save_every": 15, **changes})
    fit(
        policy,
        settings=settings,
        accelerator=make_accelerator(settings),
        run_dir=run_dir,
        config={"policy": {}, "data": {}, "train": {}},
        seed=3,
        **options,
    )
    return policy, rows
