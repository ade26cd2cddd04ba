"""Where environments are simulated: one by one, many in a process, or on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from robopolicy.errors import MissingRequirementError, RobopolicyError

from .meshes import coarse_meshes
from .rendering import inert_materials, load_maniskill, quiet_drivers, renders_in_software
from .specs import build_stock, require_assets

if TYPE_CHECKING:
    from mani_skill.envs.sapien_env import BaseEnv

Settings = dict[str, Any]
"""Keywords of ManiSkill's environments."""


def default_backend() -> str:
    """Return `cuda` where ManiSkill's GPU simulation works, else `cpu`."""
    return "cuda" if why_no_cuda() is None else "cpu"


def why_no_cuda() -> str | None:
    """Return None if GPU simulation works here, else what is missing, in words."""
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    load_maniskill()
    from sapien import physx

    try:
        physx.enable_gpu()  # downloads PhysX's GPU library at its first use
    except Exception as error:  # network, unzip, driver: whatever it is, it is told
        return f"PhysX's GPU library cannot be loaded: {error}"
    return None


@contextlib.contextmanager
def building(*, rendered: bool, observed: bool = False) -> Iterator[None]:
    """The surroundings in which a scene is built: quiet, and without materials unless it is `rendered`.

    Where pictures are `observed` and drawn by the processor, with coarse meshes.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_drivers())
        if not rendered:
            stack.enter_context(inert_materials())
        elif observed and renders_in_software():
            stack.enter_context(coarse_meshes())
        yield


def _make_single(env_id: str, num_envs: int, settings: Settings) -> BaseEnv:
    if num_envs != 1:
        raise RobopolicyError(
            f"Backend 'single' simulates one environment; got num_envs={num_envs}. Use backend 'cpu'."
        )
    return build_stock(env_id, num_envs=1, sim_backend="physx_cpu", **settings)


def _make_batched(env_id: str, num_envs: int, settings: Settings) -> BaseEnv:
    from .batched_cpu import make_batched

    require_assets(env_id)
    return make_batched(env_id, num_envs, **settings)


def _make_cuda(env_id: str, num_envs: int, settings: Settings) -> BaseEnv:
    if (reason := why_no_cuda()) is not None:
        raise MissingRequirementError(f"Backend 'cuda' does not work here: {reason}. Use backend 'cpu'.")
    return build_stock(env_id, num_envs=num_envs, sim_backend="physx_cuda", **settings)


BACKENDS: dict[str, Callable[[str, int, Settings], Any]] = {
    "cuda": _make_cuda,
    "cpu": _make_batched,
    "single": _make_single,
}
"""Simulation backends by name."""
