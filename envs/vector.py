"""N simulated environments behind gymnasium's vector interface, as torch tensors, with seeds that mean something.

ManiSkill draws the first states of a batch from the first seed of the batch. Here every environment is initialised
from its own seed alone, so episode `i` starts alike on every backend, for every N, next to every neighbour; the state
equals that of ManiSkill's single environment after `reset(seed=i)`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
import torch
from einops import rearrange
from gymnasium import spaces
from torch import Tensor

from robopolicy.errors import RobopolicyError, ShapeError, UnknownNameError
from robopolicy.types import Frame, TaskSpec, check_shape

from .backends import BACKENDS, building, default_backend
from .distances import DISTANCES
from .rendering import require_rendering
from .specs import ObsMode, flatten_observation, task_spec
from .tasks import Task, find_task

if TYPE_CHECKING:
    from mani_skill.envs.sapien_env import BaseEnv

Info = dict[str, Any]


def make(
    task: str,
    *,
    num_envs: int = 1,
    backend: str = "auto",
    control_mode: str | None = None,
    obs_mode: str = "state",
    max_episode_steps: int | None = None,
    auto_reset: bool = False,
    render: bool = False,
    render_size: int = 256,
    reward_mode: str | None = None,
    seed: int = 0,
) -> SimVectorEnv:
    """Build `num_envs` environments of `task`.

    Args:
        backend: `cuda` (ManiSkill's GPU simulation), `cpu` (many scenes in one process), `single` (ManiSkill's own CPU
            environment, N = 1), or `auto`: `cuda` where it works, else `cpu`.
        control_mode: one of ManiSkill's, or None for the task's default.
        obs_mode: `state`, `rgb` or `rgb64`, as `task_spec` says.
        max_episode_steps: steps until `truncated`; None for the task's default.
        auto_reset: restart finished environments within `step`; otherwise endings are only reported.
        render: allow `render()`, with pictures of `render_size` x `render_size` pixels.
        reward_mode: ManiSkill's; None for the task's first (`normalized_dense` for most, `none` for plug_charger).
        seed: of the first episodes, if `reset` is called without one, and of all later unseeded ones.

    Raises:
        UnknownNameError: no such task, backend, control mode or observation mode.
        MissingRequirementError: missing assets, GPU, or (for pictures) Vulkan driver; says what to install.
    """
    row = find_task(task)
    if backend != "auto" and backend not in BACKENDS:
        raise UnknownNameError("simulation backend", backend, ("auto", *BACKENDS))
    if num_envs < 1:
        raise RobopolicyError(f"num_envs must be at least 1; got {num_envs}.")
    spec = task_spec(task, control_mode=control_mode, obs_mode=obs_mode, max_episode_steps=max_episode_steps)
    backend = default_backend() if backend == "auto" else backend
    observed = ObsMode.parse(obs_mode)
    pictures = require_rendering() if render or observed.pictures else "none"
    settings: dict[str, Any] = {
        "control_mode": spec.action.control_mode,
        **observed.settings,
        "reward_mode": reward_mode,
        "render_mode": "rgb_array" if render else None,
        "render_backend": pictures,
        "human_render_camera_configs": {"width": render_size, "height": render_size},
    }
    with building(rendered=pictures != "none", observed=observed.pictures):
        base = BACKENDS[backend](row.env_id, num_envs, settings)
    return SimVectorEnv(base, row, spec, auto_reset=auto_reset, render=render, seed=seed)


class SimVectorEnv(gymnasium.vector.VectorEnv):
    """A batch of N environments; implements `robopolicy.types.Environment`.

    With `auto_reset`, finished environments restart within the same step and `info` holds `final_observation` and
    `final_info` of the step that ended them (rows `_final_observation`), as ManiSkillVectorEnv does it.
    """

    def __init__(
        self,
        base: BaseEnv,
        task: Task,
        spec: TaskSpec,
        *,
        auto_reset: bool = False,
        render: bool = False,
        seed: int = 0,
    ) -> None:
        self.base_env = base
        self.task = task
        self.task_spec = spec
        self.num_envs = base.num_envs
        self.auto_reset = auto_reset
        self.spec = gymnasium.spec(task.env_id)
        self.render_mode = "rgb_array" if render else None
        mode = gymnasium.vector.AutoresetMode.SAME_STEP if auto_reset else gymnasium.vector.AutoresetMode.DISABLED
        self.metadata = {"render_modes": ["rgb_array"], "autoreset_mode": mode}
        self.single_observation_space = spaces.Dict(
            {
                name: spaces.Box(0, 255, m.shape, np.uint8)
                if m.is_image
                else spaces.Box(-np.inf, np.inf, m.shape, np.float32)
                for name, m in spec.observation.items()
            }
        )
        low, high = (np.array(side, dtype=np.float32) for side in (spec.action.low, spec.action.high))
        self.single_action_space = spaces.Box(low, high, dtype=np.float32)
        self.observation_space = gymnasium.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self._seed = seed
        self._unseeded_resets = 0
        self._has_state = False
        self._observes_pictures = any(m.is_image for m in spec.observation.values())
        self._episode_seeds: dict[int, int] | None = None
        self._initialize_scenes: Callable[[Tensor, Info], None] = base._initialize_episode
        base._initialize_episode = self._initialize_episode
        self._skips_pictures = False
        self._pictures: Info | None = None
        self._draw_pictures: Callable[..., Info] = base._get_obs_sensor_data
        base._get_obs_sensor_data = self._sensor_data

    @property
    def device(self) -> torch.device:
        return torch.device(self.base_env.device)

    @property
    def unwrapped(self) -> SimVectorEnv:
        return self

    def reset(self, *, seed: int | Sequence[int] | None = None, options: Info | None = None) -> tuple[Frame, Info]:
        """Start new episodes; the first state of each depends on its seed alone.

        Args:
            seed: one per environment to reset; an int s means s, s + 1, ...; None continues the stream of the last.
            options: `env_idx` [K] int restarts only these environments; the others keep their state.

        Returns:
            frame of all N environments, and info; `info["episode_seed"]` [N] int64, -1 where the episode had none.

        Raises:
            ShapeError: another number of seeds than environments to reset.
            RobopolicyError: some environments of a task whose shapes vary were to be reset with seeds.
        """
        self._require_open()
        self._pictures = None
        options = dict(options or {})
        rows = self._rows(options.pop("env_idx", None))
        seeds = self._as_seeds(seed, rows)
        partial = len(rows) < self.num_envs
        base, reset_seed = self.base_env, None
        if seeds is None:
            self._unseeded_resets += 1
        else:
            self._seed, self._unseeded_resets = seeds[0], 0
            if self.task.geometry_varies and partial:
                raise RobopolicyError(
                    f"The shapes of task {self.task.name!r} follow the seed, so seeded resets rebuild all "
                    f"{self.num_envs} environments; reset all of them, or leave the seeds out for {len(rows)} of them."
                )
            if self.task.geometry_varies:
                reset_seed, options["reconfigure"] = list(seeds), True
            base._batched_episode_rng[rows.cpu()] = [np.random.RandomState(s) for s in seeds]
            base._episode_seed[rows.cpu().numpy()] = seeds
        self._episode_seeds = None if seeds is None else dict(zip(rows.tolist(), seeds, strict=True))
        if partial:
            options["env_idx"] = rows
        on_cuda = self.device.type == "cuda"
        targets = _clone(base.agent.get_controller_state()) if partial and on_cuda else {}
        with (
            torch.random.fork_rng(devices=[self.device] if on_cuda else []),
            self._rebuilding(options, partial),
        ):
            obs, info = base.reset(seed=reset_seed, options=options)
        if targets:  # on the GPU ManiSkill resets the controllers of the environments that go on, too
            reset_mask = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
            reset_mask[rows] = True
            base.agent.set_controller_state(_merge(reset_mask, base.agent.get_controller_state(), targets))
            obs = base.get_obs(info)
        self._has_state = True
        chosen = torch.full((self.num_envs,), -1, dtype=torch.int64, device=self.device)
        if seeds is not None:
            chosen[rows] = torch.tensor(seeds, dtype=torch.int64, device=self.device)
        return self._frame(obs), {**self._info(info), "episode_seed": chosen}

    def step(self, actions: Tensor) -> tuple[Frame, Tensor, Tensor, Tensor, Info]:
        """Apply `actions` [N, A], in the units and bounds of `task_spec.action`; ManiSkill clips them to the bounds.

        Returns:
            frame, reward [N] float32, terminated [N] bool (success or failure), truncated [N] bool (out of steps), and
            info with `success` [N] bool, `elapsed_steps` [N], and `distance` [N] to success in metres (some tasks).

        Raises:
            ShapeError: `actions` is not [N, A].
            RobopolicyError: an action is not finite, or the environment is closed or was never reset.
        """
        self._require_open()
        if not self._has_state:
            raise RobopolicyError("Call reset() before the first step().")
        actions = torch.as_tensor(actions, dtype=torch.float32, device=self.device)
        check_shape("actions", actions, "N A", N=self.num_envs, A=self.task_spec.action.dim)
        if not torch.isfinite(actions).all():
            bad = (~torch.isfinite(actions)).any(dim=1).nonzero().flatten().tolist()
            raise RobopolicyError(f"Actions of environments {bad} are not finite.")
        obs, reward, terminated, _, raw_info = self.base_env.step(actions)
        frame, info = self._frame(obs), self._info(raw_info)
        reward = torch.as_tensor(reward, dtype=torch.float32, device=self.device).expand(self.num_envs).clone()
        terminated = torch.as_tensor(terminated, dtype=torch.bool, device=self.device).clone()
        truncated = info["elapsed_steps"] >= self.task_spec.max_episode_steps
        done = terminated | truncated
        if self.auto_reset and bool(done.any()):
            final_frame, final_info = frame, info
            frame, info = self.reset(options={"env_idx": done.nonzero().flatten()})
            info |= {"final_observation": final_frame, "final_info": final_info}
            info |= {"_final_observation": done, "_final_info": done, "_elapsed_steps": done}
        return frame, reward, terminated, truncated, info

    def render(self, rows: Sequence[int] | Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Return pictures [K, Y, X, 3] uint8 of `rows` [K] (all N by default) from the task's camera for people.

        Without a GPU each picture takes tens of milliseconds: name the rows a video shows.

        Raises:
            MissingRequirementError: nothing can render on this machine.
            RobopolicyError: the environments were made without `render=True`.
        """
        self._require_open()
        require_rendering()
        if self.render_mode is None:
            raise RobopolicyError("These environments were made without pictures; call make(..., render=True).")
        wanted = self._rows(rows)
        base = self.base_env
        if self.device.type == "cuda":
            return base.render_rgb_array()[wanted]
        hidden = [thing for thing in base._hidden_objects if thing.hidden]
        for thing in hidden:
            thing.show_visual()
        camera = next(iter(base._human_render_cameras.values()))
        textures = camera.config.shader_config
        name = next(texture for texture, kinds in textures.texture_names.items() if "rgb" in kinds)
        pictures = []
        for row in wanted.tolist():
            base.scene.sub_scenes[row].update_render()
            lens = camera.camera._render_cameras[row]
            lens.take_picture()
            pictures.append(textures.texture_transforms[name](torch.as_tensor(lens.get_picture(name)))["rgb"])
        for thing in hidden:
            thing.hide_visual()
        return torch.stack(pictures)

    def skip_pictures(self, skip: bool) -> None:
        """Say whether nobody will look at the cameras' pictures of the steps that follow; then `step` shows old ones.

        Without a GPU a picture costs as much as tens of steps. `reset` always shows new ones.
        """
        self._skips_pictures = skip

    def close_extras(self, **kwargs: Any) -> None:
        self.base_env.close()

    def _sensor_data(self, *args: Any) -> Info:
        """Stand in for the task's own method."""
        if self._pictures is None or not self._skips_pictures:
            self._pictures = self._draw_pictures(*args)
        return self._pictures

    def _frame(self, obs: Info) -> Frame:
        """Sort ManiSkill's observation into modalities; always new tensors."""
        flat = flatten_observation(obs)
        out: dict[str, Tensor] = {}
        for name, modality in self.task_spec.observation.items():
            if modality.is_image:
                (path,) = modality.fields
                out[name] = rearrange(flat[path][..., :3].to(self.device), "n y x c -> n c y x").contiguous()
            else:
                fields = [flat[path].to(torch.float32) for path in modality.fields]
                out[name] = torch.cat([f.unsqueeze(-1) if f.ndim == 1 else f for f in fields], dim=-1)
        return out

    def _info(self, info: Info) -> Info:
        out = {key: value.clone() if isinstance(value, Tensor) else value for key, value in info.items()}
        out["elapsed_steps"] = self.base_env.elapsed_steps.clone()
        if (distance := DISTANCES.get(self.task.name)) is not None:
            out["distance"] = distance(self.base_env)
        out.setdefault("success", torch.zeros(self.num_envs, dtype=torch.bool, device=self.device))
        return out

    def _initialize_episode(self, env_idx: Tensor, options: Info) -> None:
        """Stand in for the task's own method: draw each seeded environment's first state by itself."""
        base = self.base_env
        if self._episode_seeds is None:
            stream = np.random.SeedSequence([self._seed, self._unseeded_resets, int(env_idx[0])])
            drawn = int(stream.generate_state(1)[0])
            torch.manual_seed(drawn)
            base._episode_rng = np.random.RandomState(drawn)
            self._initialize_scenes(env_idx, options)
            return
        mask = base.scene._reset_mask
        for row in env_idx.tolist():
            base.scene._reset_mask = torch.zeros_like(mask)
            base.scene._reset_mask[row] = True
            base._episode_rng = base._batched_episode_rng[row]
            torch.manual_seed(self._episode_seeds[row])
            self._initialize_scenes(torch.tensor([row], device=env_idx.device), options)
        base.scene._reset_mask = mask

    def _as_seeds(self, seed: int | Sequence[int] | None, rows: Tensor) -> list[int] | None:
        if seed is None:
            if self._has_state:
                return None
            seed = self._seed
        seeds = (
            range(int(seed), int(seed) + len(rows)) if isinstance(seed, int | np.integer) else [int(s) for s in seed]
        )
        if len(seeds) != len(rows):
            raise ShapeError(f"seed must hold one number per environment to reset ({len(rows)}); got {len(seeds)}.")
        if not all(0 <= s < 2**32 for s in seeds):
            raise RobopolicyError(f"Seeds must lie in 0..2**32 - 1; got {min(seeds)}..{max(seeds)}.")
        return list(seeds)

    def _rows(self, rows: Sequence[int] | Tensor | None) -> Tensor:
        if rows is None:
            return torch.arange(self.num_envs, device=self.device)
        chosen = torch.as_tensor(rows, device=self.device)
        chosen = chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen.to(torch.int64).flatten()
        if len(chosen) == 0 or chosen.min() < 0 or chosen.max() >= self.num_envs or len(chosen.unique()) < len(chosen):
            raise ShapeError(f"Rows must be distinct and within 0..{self.num_envs - 1}; got {chosen.tolist()}.")
        return chosen

    def _rebuilding(self, options: Info, partial: bool) -> contextlib.AbstractContextManager[None]:
        if not options.get("reconfigure") and (partial or self.base_env.reconfiguration_freq == 0):
            return contextlib.nullcontext()
        return building(rendered=self.base_env.scene.can_render(), observed=self._observes_pictures)

    def _require_open(self) -> None:
        if self.closed:
            raise RobopolicyError(f"This {self.task.name} environment is closed; make a new one.")


def _clone(tree: Any) -> Any:
    return {k: _clone(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.clone()


def _merge(take_first: Tensor, first: Any, second: Any) -> Any:
    """Merge two trees of [N, ...] tensors row by row."""
    if isinstance(first, dict):
        return {key: _merge(take_first, first[key], second[key]) for key in first}
    return torch.where(take_first[:, None], first, second)
