"""A ManiSkill task whose N environments are N PhysX CPU scenes in this process."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import sapien
import sapien.physx as physx
import torch
from mani_skill.agents.base_agent import BaseAgent
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.envs.utils.randomization.batched_rng import BatchedRNG
from torch import Tensor

from robopolicy.errors import RobopolicyError, ShapeError

from .physx_scene import BatchedScene
from .rendering import inert_materials

if TYPE_CHECKING:
    from mani_skill.envs.utils.system.backend import BackendInfo

BACKEND = "physx_cpu_batched"


class BatchedCpuTask(BaseEnv):
    """Mixed in before a ManiSkill task; replaces how it makes scenes, resets, steps and closes."""

    _closed = False

    # ManiSkill refuses several environments on the backend "physx_cpu"; under another name it asks no more.
    @property
    def backend(self) -> BackendInfo:
        return self._backend

    @backend.setter
    def backend(self, info: BackendInfo) -> None:
        self._backend = dataclasses.replace(info, sim_backend=BACKEND)

    def _setup_scene(self) -> None:
        self._set_scene_config()
        scenes = []
        for _ in range(self.num_envs):
            systems: list[Any] = [physx.PhysxCpuSystem()]
            if self._render_device is not None:
                systems.append(sapien.render.RenderSystem(self._render_device))
            scenes.append(sapien.Scene(systems))
        self.scene = BatchedScene(scenes, sim_config=self.sim_config, device=self.device, backend=self.backend)
        self.scene.px.timestep = 1.0 / self._sim_freq

    def _reconfigure(self, options: dict[str, Any] | None = None) -> None:
        with inert_materials() if self._render_device is None else contextlib.nullcontext():
            super()._reconfigure(options or {})

    # ---- reset -------------------------------------------------------------------------------------------------------
    def reset(
        self, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes, each from its own seed alone.

        Args:
            seed: one per environment that is reset. An int is the first environment's, the others' follow from it as in
                ManiSkill. None goes on with the present random numbers, as in ManiSkill.
            options: ManiSkill's; `env_idx` [K] int restarts only these environments.

        Raises:
            RobopolicyError: closed, or a rebuild of only some environments was asked for.
            ShapeError: another number of seeds than environments to reset.
        """
        self._require_open()
        options = dict(options or {})
        rows = torch.arange(self.num_envs)
        if options.get("env_idx") is not None:
            rows = torch.as_tensor(options["env_idx"], dtype=torch.int64).flatten()
        partial = len(rows) < self.num_envs
        if partial and options.get("reconfigure"):
            raise RobopolicyError(
                "Scenes are rebuilt all together: reset every environment, or leave out `reconfigure`."
            )
        due = self._reconfig_counter == 0 and self.reconfiguration_freq != 0
        reconfigure = bool(options.get("reconfigure")) or (due and not partial)
        seeds = self._seed_rows(seed, rows, draw=reconfigure or self._enhanced_determinism)
        if reconfigure:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._episode_seed[0])  # type: ignore[has-type]
                self._reconfigure(options)
                self._after_reconfigure(options)
            self._batched_episode_rng = BatchedRNG.from_seeds(self._episode_seed, backend=self._batched_rng_backend)  # type: ignore[has-type]
            self._episode_rng = self._batched_episode_rng[0]
        if self.reconfiguration_freq != 0 and not partial:
            self._reconfig_counter -= 1
        mask = torch.zeros(self.num_envs, dtype=torch.bool)
        mask[rows] = True
        known = self._restart(rows, mask, seeds, options)
        info = self.get_info()
        obs = self.get_obs(info) if known is None else known
        info["reconfigure"] = reconfigure
        self._last_obs = obs
        return obs, info

    def _restart(self, rows: Tensor, mask: Tensor, seeds: list[int] | None, options: dict[str, Any]) -> Any:
        """Bring the environments `rows` into their first state; return their observation if the caller knows it."""
        known = None
        self._elapsed_steps[rows] = 0
        self.scene._reset_mask = mask
        self._zero_velocities()
        if self.agent is not None:
            self.agent.reset()
        if "reset_to_env_states" in options:
            states = options["reset_to_env_states"]
            (self.set_state_dict if isinstance(states["env_states"], dict) else self.set_state)(
                states["env_states"], rows
            )
            known = states.get("obs")
        elif seeds is None:
            self._initialize_episode(rows, options)
        else:
            self._initialize_rows(rows, seeds, options)
        self.scene.renew(mask)
        self.scene.px.force_writing(mask)
        self.scene._gpu_apply_all()
        self.scene._gpu_fetch_all()
        if self.agent is not None:  # only where the episode restarts; the others keep their targets
            self.scene._reset_mask = mask
            controller = self.agent.controller
            for part in controller.values() if isinstance(controller, dict) else [controller]:
                part.reset()
        self.scene._reset_mask = torch.ones(self.num_envs, dtype=torch.bool)
        return known

    def _initialize_rows(self, rows: Tensor, seeds: list[int], options: dict[str, Any]) -> None:
        """Run the task's own initialisation for one environment at a time, each with the random numbers of its seed."""
        with torch.random.fork_rng(devices=[]):
            for row, seed in zip(rows.tolist(), seeds, strict=True):
                self.scene._reset_mask = torch.zeros(self.num_envs, dtype=torch.bool)
                self.scene._reset_mask[row] = True
                self._episode_rng = self._batched_episode_rng[row]
                torch.manual_seed(seed)
                self._initialize_episode(torch.tensor([row]), options)
        self._episode_rng = self._batched_episode_rng[0]

    def _zero_velocities(self) -> None:
        for actor in self.scene.actors.values():
            if actor.px_body_type == "dynamic":
                actor.set_linear_velocity(torch.zeros(3))
                actor.set_angular_velocity(torch.zeros(3))
        for articulation in self.scene.articulations.values():
            articulation.set_qvel(torch.zeros(articulation.max_dof))
            articulation.set_root_linear_velocity(torch.zeros(3))
            articulation.set_root_angular_velocity(torch.zeros(3))

    def _seed_rows(self, seed: int | Sequence[int] | None, rows: Tensor, *, draw: bool) -> list[int] | None:
        """Seed the random numbers of `rows` by `seed`, or from ManiSkill's main stream if `draw`; return the seeds."""
        index = rows.numpy()
        if seed is None:
            if not draw:
                return None
            self._set_main_rng(None)
            seeds = [int(s) for s in np.asarray(self._batched_main_rng[index].randint(2**31)).reshape(-1)]
        else:
            seeds = self._as_seeds(seed, len(rows))
            if len(rows) == self.num_envs:
                self._set_main_rng(seeds)
        if self._batched_episode_rng is None or self._episode_seed is None:  # type: ignore[has-type]
            self._episode_seed = np.zeros(self.num_envs, np.int64)
            self._batched_episode_rng = BatchedRNG.from_seeds(self._episode_seed, backend=self._batched_rng_backend)
        self._episode_seed[index] = seeds
        self._batched_episode_rng[index] = [np.random.RandomState(s) for s in seeds]
        self._episode_rng = self._batched_episode_rng[0]
        return seeds

    def _as_seeds(self, seed: int | Sequence[int], count: int) -> list[int]:
        seeds = [int(s) for s in np.atleast_1d(np.asarray(seed))]
        if len(seeds) == 1 and count > 1:
            seeds += np.random.RandomState(seeds[0]).randint(2**31, size=count - 1).tolist()
        if len(seeds) != count:
            raise ShapeError(f"seed must be one int or one per environment to reset ({count}); got {len(seeds)}.")
        return seeds

    def set_state_dict(self, state: dict[str, Any], env_idx: Tensor | None = None) -> None:
        """Set the state of all environments, or of `env_idx` [K]; see ManiSkill's method."""
        mask = torch.ones(self.num_envs, dtype=torch.bool)
        if env_idx is not None:
            mask[:] = False
            mask[env_idx] = True
        self.scene.px.force_writing(mask)
        super().set_state_dict(state, env_idx)

    # ---- step --------------------------------------------------------------------------------------------------------
    def _step_action(self, action: Any) -> Tensor | None:
        self._require_open()
        if isinstance(action, dict) and "control_mode" in action:
            if action["control_mode"] != self.agent.control_mode:
                self.agent.set_control_mode(action["control_mode"])
                self.agent.controller.reset()
            action = action["action"]
        if action is not None:
            action = self._checked(action)
            self.agent.set_action(action)
            self.scene.px.gpu_apply_articulation_target_position()
            if self._sets_velocities():
                self.scene.px.gpu_apply_articulation_target_velocity()
        self._before_control_step()
        if self._acts_between_steps():
            for _ in range(self._sim_steps_per_control):
                if self.agent is not None:
                    self.agent.before_simulation_step()
                self._before_simulation_step()
                self.scene.step()
                self._after_simulation_step()
        else:  # scenes are independent: each may run all its steps before the next scene starts
            self.scene.px.step_many(self._sim_steps_per_control)
        self._after_control_step()
        self.scene._gpu_fetch_all()
        return action

    def _checked(self, action: Any) -> Any:
        """Return `action` as [N, A] float32 (or a dict of such, for several robots).

        Raises:
            ShapeError: another shape.
            RobopolicyError: not finite.
        """
        if isinstance(action, dict):
            return {name: torch.as_tensor(value, dtype=torch.float32) for name, value in action.items()}
        action = torch.as_tensor(action, dtype=torch.float32)
        width = self._orig_single_action_space.shape[0]
        if self.num_envs == 1 and action.shape == (width,):
            action = action[None]
        if action.shape != (self.num_envs, width):
            raise ShapeError(f"action must be [N={self.num_envs}, A={width}], got {tuple(action.shape)}.")
        if not np.isfinite(action.numpy()).all():
            bad = (~torch.isfinite(action)).any(1).nonzero().flatten().tolist()
            raise RobopolicyError(f"Actions of environments {bad} are not finite.")
        return action

    def _sets_velocities(self) -> bool:
        controller = self.agent.controller
        return isinstance(controller, dict) or bool(controller.sets_target_qvel)

    def _acts_between_steps(self) -> bool:
        """Whether the task or a controller must run between two simulation steps."""
        kind = type(self)
        if kind._before_simulation_step is not BaseEnv._before_simulation_step:
            return True
        if kind._after_simulation_step is not BaseEnv._after_simulation_step:
            return True
        if self.agent is None:
            return False
        if getattr(type(self.agent), "before_simulation_step", None) is not BaseAgent.before_simulation_step:
            return True
        controller = self.agent.controller
        parts = getattr(controller, "controllers", {"": controller}).values()
        return any(getattr(part.config, "interpolate", False) for part in parts)

    # ---- end ---------------------------------------------------------------------------------------------------------
    def render(self) -> Any:
        self._require_open()
        return super().render()

    def close(self) -> None:
        """Free the scenes; closing twice is harmless."""
        if not self._closed:
            self._closed = True
            super().close()

    def _require_open(self) -> None:
        if self._closed:
            raise RobopolicyError(f"This {type(self).__name__} environment is closed; make a new one.")


@cache
def batched_class(task: type[BaseEnv]) -> type[BaseEnv]:
    """Return `task` with its N environments simulated by this module."""
    return type(f"Batched{task.__name__}", (BatchedCpuTask, task), {"__module__": task.__module__})
