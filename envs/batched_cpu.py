"""ManiSkill's batched simulation on the CPU: many PhysX scenes in one process, no GPU needed.

ManiSkill simulates a batch only on a CUDA GPU. Here its own batched code runs over one PhysX CPU scene per environment:
`physx_cpu_system` has the surface of SAPIEN's GPU system, `physx_env` changes how a task makes, resets and steps its
scenes, `physx_patches` lists what had to change in ManiSkill. Threads step the scenes side by side; set
`ROBOPOLICY_SIM_THREADS` to use fewer than all cores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from robopolicy.errors import UnknownNameError

from .rendering import load_maniskill

if TYPE_CHECKING:
    from mani_skill.envs.sapien_env import BaseEnv

REBUILT_BY_SEED = frozenset({"PegInsertionSide-v1"})
"""Tasks that draw shapes per episode: ManiSkill rebuilds them at every reset of a single environment, so do we."""


def make_batched(env_id: str, num_envs: int, **gym_kwargs: Any) -> BaseEnv:
    """Return the ManiSkill environment `env_id` with `num_envs` environments on the CPU.

    It has the interface of ManiSkill's GPU environments: batched torch tensors, `reset(seed=[...])`, partial resets by
    `options={"env_idx": ...}`. Environment `i` depends on its own seed and actions alone, not on N, or on threads.

    Args:
        env_id: ManiSkill's name, `PickCube-v1` for example.
        num_envs: N.
        gym_kwargs: what ManiSkill's environments take (`obs_mode`, `control_mode`, `render_mode`, ...); without
            `render_backend` nothing can be rendered and no graphics driver is needed.

    Raises:
        UnknownNameError: no such environment.
        MissingRequirementError: its assets were not downloaded, or ManiSkill's version is not supported.
        ValueError: `num_envs` is not positive, or another `sim_backend` is asked for.
    """
    load_maniskill()
    from mani_skill.utils.registration import REGISTERED_ENVS

    from .physx_env import batched_class
    from .physx_patches import install
    from .specs import require_assets

    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1; got {num_envs}.")
    if env_id not in REGISTERED_ENVS:
        raise UnknownNameError("ManiSkill environment", env_id, REGISTERED_ENVS)
    if gym_kwargs.pop("sim_backend", "physx_cpu") not in ("physx_cpu", "cpu"):
        raise ValueError("make_batched simulates on the CPU: leave out sim_backend.")
    require_assets(env_id)
    install()
    entry = REGISTERED_ENVS[env_id]
    settings = {"render_backend": "none", **entry.default_kwargs, **gym_kwargs}
    if env_id in REBUILT_BY_SEED:
        settings.setdefault("reconfiguration_freq", 1)
    env = batched_class(entry.cls)(num_envs=num_envs, sim_backend="physx_cpu", **settings)
    env.spec = entry.gym_spec
    return env
