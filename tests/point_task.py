"""A point mass with a known way to the goal, an actor that walks it, and evaluations of it that take milliseconds."""

from __future__ import annotations

import torch
from torch import Tensor

from robopolicy.evaluation.results import eval_info
from robopolicy.evaluation.rollout import EvalResult, evaluate
from robopolicy.rng import Rng, randn
from robopolicy.types import ActionSpec, Frame, ModalitySpec, TaskSpec

LENGTH = 20
SEEDS = list(range(10000, 10023))


def point_spec() -> TaskSpec:
    two = ("x", "y")
    action = ActionSpec(
        names=two,
        low=(-1.0, -1.0),
        high=(1.0, 1.0),
        delta=(True, True),
        discrete=(False, False),
        units=("m", "m"),
        physical_low=(-0.1, -0.1),
        physical_high=(0.1, 0.1),
        control_mode="pd_delta_pos",
        control_dt_s=0.05,
    )
    return TaskSpec(
        name="point",
        env_id="Point-v0",
        robot="point",
        instruction="Go to the origin.",
        max_episode_steps=LENGTH,
        observation={"proprio": ModalitySpec(shape=(2,), fields={"agent/qpos": 2})},
        action=action,
    )


class PointEnv:
    """A point that moves by a tenth of the action; success within .1 of the origin. Counts its resets."""

    spec = None
    device = torch.device("cpu")

    def __init__(self, num_envs: int) -> None:
        self.num_envs, self.task_spec, self.resets = num_envs, point_spec(), []

    def reset(self, *, seed=None, options=None) -> tuple[Frame, dict]:
        self.resets.append(list(seed))
        starts = [torch.rand(2, generator=torch.Generator().manual_seed(s)) * 2 - 1 for s in seed]
        self.where = torch.stack(starts)
        return {"proprio": self.where.clone()}, {}

    def step(self, actions: Tensor):
        self.where = self.where + 0.1 * actions.clamp(-1, 1)
        distance = self.where.norm(dim=-1)
        info = {"success": distance < 0.1}
        never = torch.zeros(self.num_envs, dtype=torch.bool)
        return {"proprio": self.where.clone()}, -distance, info["success"].clone(), never, info

    def render(self) -> Tensor:
        """A white dot on grey, wider than high."""
        picture = torch.full((self.num_envs, 48, 64, 3), 30, dtype=torch.uint8)
        pixel = ((self.where + 1) / 2 * 47).round().long().clamp(1, 46)
        for i, (x, y) in enumerate(pixel.tolist()):
            picture[i, y - 1 : y + 2, x + 7 : x + 10] = 255
        return picture

    def close(self) -> None: ...


class HomingActor:
    """Walks to the origin with noise, in chunks of 4; seeds whose start has x > `lame_above` stand still."""

    def __init__(self, num_envs: int, *, noise: float = 0.3, lame_above: float = 2.0, leave: bool = False) -> None:
        self.n, self.noise, self.lame_above, self.leave = num_envs, noise, lame_above, leave
        self.replanned = False
        self.reset()

    def reset(self, rows: Tensor | None = None) -> None:
        assert rows is None, "evaluation resets whole waves only"
        self.age, self.lame = 0, None

    def __call__(self, frame: Frame, *, generator: Rng = None) -> Tensor:
        where = frame["proprio"]
        self.replanned = self.age % 4 == 0
        if self.replanned:
            self.jitter = self.noise * randn(self.n, 2, generator=generator)
        if self.lame is None:
            self.lame = where[:, 0] > self.lame_above
        self.age += 1
        action = -10 * where + self.jitter
        if self.leave and self.age > LENGTH // 2 + 5:
            action = torch.ones_like(action)
        return torch.where(self.lame[:, None], torch.zeros_like(action), action)


def run_point(num_envs: int, seeds=SEEDS, *, noise=0.3, lame_above=0.3, leave=False, **kwargs) -> EvalResult:
    actor = HomingActor(num_envs, noise=noise, lame_above=lame_above, leave=leave)
    return evaluate(actor, PointEnv(num_envs), seeds=seeds, **kwargs)


def info_of(result: EvalResult, settings: dict, **changes) -> dict:
    parts = {
        "task": point_spec().to_dict(),
        "checkpoint": {"path": "checkpoints/run/step_00000100", "step": 100, "weights_sha256": "0" * 64},
        "settings": settings,
        "latency_batch_1": result.latency,
        "backend": "analytic",
        "device": "cpu",
        "command": "robopolicy eval checkpoint=checkpoints/run",
        "video": None,
    }
    return eval_info(result, **{**parts, **changes})
