"""A small made-up task, for tests that need a specification and no simulator."""

from __future__ import annotations

import torch

from robopolicy.normalize import Normalizer
from robopolicy.types import ActionSpec, Batch, ModalitySpec, Observation, TaskSpec


def fake_spec(*, camera: bool = False, action_dim: int = 4, proprio: int = 9, objects: int = 5) -> TaskSpec:
    """A robot with a gripper as last action; `camera` adds images of 3 x 24 x 32."""
    observation = {
        "proprio": ModalitySpec(shape=(proprio,), fields={"agent/qpos": proprio}),
        "objects": ModalitySpec(shape=(objects,), fields={"extra/obj_pose": objects}),
    }
    if camera:
        observation["rgb.base"] = ModalitySpec(shape=(3, 24, 32), fields={"sensor_data/base/rgb": 3}, dtype="uint8")
    arm = action_dim - 1
    return TaskSpec(
        name="fake",
        env_id="Fake-v0",
        robot="fake",
        instruction="Do it.",
        max_episode_steps=20,
        observation=observation,
        action=ActionSpec(
            names=(*(f"x{i}" for i in range(arm)), "gripper"),
            low=(-1.0,) * arm + (-0.5,),
            high=(1.0,) * arm + (1.5,),
            delta=(True,) * arm + (False,),
            discrete=(False,) * arm + (True,),
            units=("m",) * arm + ("m",),
            physical_low=(-0.1,) * arm + (0.0,),
            physical_high=(0.1,) * arm + (0.04,),
            control_mode="pd_ee_delta_pos",
            control_dt_s=0.05,
        ),
    )


def fake_observation(spec: TaskSpec, batch_size: int, n_obs_steps: int, generator: torch.Generator) -> Observation:
    """Random windows of `spec`'s modalities."""
    modalities = {}
    for name, modality in spec.observation.items():
        shape = (batch_size, n_obs_steps, *modality.shape)
        if modality.is_image:
            modalities[name] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        else:
            modalities[name] = torch.randn(shape, generator=generator)
    return Observation(modalities=modalities)


def fake_batch(spec: TaskSpec, batch_size: int, n_obs_steps: int, horizon: int, seed: int = 0) -> Batch:
    """Random windows, actions within bounds, the last two of each chunk beyond the episode's end."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
    is_pad = torch.zeros(batch_size, horizon, dtype=torch.bool)
    is_pad[:, -2:] = True
    return Batch(
        obs=fake_observation(spec, batch_size, n_obs_steps, generator),
        action=low + (high - low) * torch.rand(batch_size, horizon, spec.action.dim, generator=generator),
        is_pad=is_pad,
    )


def fit_to_bounds(norm: Normalizer, spec: TaskSpec) -> None:
    """Fit `norm` to states in [-3, 3] and actions in their bounds."""
    limits = {n: (-3 * torch.ones(m.shape), 3 * torch.ones(m.shape)) for n, m in spec.observation.items()}
    limits["action"] = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
    norm.fit(limits)
