"""What a ManiSkill environment observes and how it is commanded, read from itself and its controllers."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from robopolicy.errors import MissingRequirementError, UnknownNameError
from robopolicy.types import ActionSpec, ModalitySpec, TaskSpec

from .rendering import inert_materials, load_maniskill, quiet_drivers
from .tasks import Task, find_task

if TYPE_CHECKING:
    from mani_skill.agents.controllers.base_controller import BaseController
    from mani_skill.envs.sapien_env import BaseEnv

OBS_MODES = ("state", "rgb", "rgb64")
"""Observation modes; a number behind `rgb` is the side of the pictures in pixels, any from 8 to 1024."""

MODALITIES = ("proprio", "objects", "goal")


@dataclass(frozen=True)
class ObsMode:
    """What is observed."""

    pictures: bool
    px: int | None = None
    """Side of the pictures; None for the size that the task's cameras have."""

    @classmethod
    def parse(cls, text: str) -> ObsMode:
        """Read `state`, `rgb` or `rgb64`.

        Raises:
            UnknownNameError: something else.
        """
        found = re.fullmatch(r"state|rgb(\d{1,4})?", text)
        px = int(found[1]) if found and found[1] else None
        if found is None or (px is not None and not 8 <= px <= 1024):
            raise UnknownNameError("observation mode", text, OBS_MODES)
        return cls(pictures=text != "state", px=px)

    @classmethod
    def of(cls, spec: TaskSpec) -> ObsMode:
        """Return the mode that makes the observations of `spec`."""
        sizes = {m.shape[1:] for m in spec.observation.values() if m.is_image}
        sides = {side for size in sizes for side in size}
        return cls(pictures=bool(sizes), px=sides.pop() if len(sides) == 1 else None)

    @property
    def maniskill(self) -> str:
        """ManiSkill's name."""
        return "rgb" if self.pictures else "state_dict"

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of a ManiSkill environment that observes so."""
        sized = {"sensor_configs": {"width": self.px, "height": self.px}} if self.px is not None else {}
        return {"obs_mode": self.maniskill, **sized}

    def __str__(self) -> str:
        return f"rgb{self.px or ''}" if self.pictures else "state"


def task_spec(
    task: str, *, control_mode: str | None = None, obs_mode: str = "state", max_episode_steps: int | None = None
) -> TaskSpec:
    """Return the specification of `task` without building the environments that will run it.

    The first call for a task in a process builds one small scene, without rendering: about 0.3 s after the 3 s that
    importing ManiSkill takes. Later calls cost milliseconds.

    Args:
        control_mode: one of ManiSkill's, or None for the task's default.
        obs_mode: `state` (proprio, objects, goal) or `rgb` (what a robot has: proprio, `rgb.<camera>`, and the goal
            where ManiSkill tells it), with pictures of the task's size; `rgb64` for pictures of 64 x 64.
        max_episode_steps: None for the task's default.

    Raises:
        UnknownNameError: no such task, control mode or observation mode.
        MissingRequirementError: the task's assets are not downloaded.
    """
    row = find_task(task)
    observed = ObsMode.parse(obs_mode)
    mode = control_mode or row.control_mode
    env = _sample_scene(row.env_id)
    if mode not in control_modes(env):
        raise UnknownNameError(f"control mode of {env.agent.uid} in task {row.name}", mode, control_modes(env))
    if env.control_mode != mode:
        env.agent.set_control_mode(mode)
        env.agent.controller.reset()
    return TaskSpec(
        name=row.name,
        env_id=row.env_id,
        robot=env.agent.uid,
        instruction=row.instruction,
        max_episode_steps=row.max_episode_steps if max_episode_steps is None else max_episode_steps,
        observation=observation_spec(env, row, observed),
        action=action_spec(env),
    )


def require_assets(env_id: str) -> None:
    """Check that ManiSkill knows `env_id` and that everything it would download is there.

    Raises:
        UnknownNameError: no such environment.
        MissingRequirementError: names the download command. (ManiSkill itself would ask on stdin and exit.)
    """
    load_maniskill()
    from mani_skill.utils import assets
    from mani_skill.utils.registration import REGISTERED_ENVS

    if env_id not in REGISTERED_ENVS:
        raise UnknownNameError("ManiSkill environment", env_id, REGISTERED_ENVS)
    missing: list[str] = []
    for asset in REGISTERED_ENVS[env_id].asset_download_ids or []:
        parts = (
            assets.expand_data_group_into_individual_data_source_ids(asset) if asset in assets.DATA_GROUPS else [asset]
        )
        if not all(assets.is_data_source_downloaded(part) for part in parts):
            missing.append(asset)
    if missing:
        commands = "\n".join(f"  python -m mani_skill.utils.download_asset {asset}" for asset in missing)
        raise MissingRequirementError(
            f"{env_id} needs assets that are not on this machine. Download them with:\n{commands}"
        )


def build_stock(env_id: str, **kwargs: Any) -> BaseEnv:
    """Build ManiSkill's own environment, bare (no gymnasium wrapper, no time limit).

    Raises:
        UnknownNameError, MissingRequirementError: as `require_assets`.
    """
    require_assets(env_id)
    from mani_skill.utils.registration import REGISTERED_ENVS

    entry = REGISTERED_ENVS[env_id]
    return entry.cls(**{**entry.default_kwargs, **kwargs})


def control_modes(env: BaseEnv) -> tuple[str, ...]:
    """Return the control modes of the robot in `env`, without those whose frame ManiSkill does not implement."""
    modes = env.agent._controller_configs
    return tuple(mode for mode, parts in modes.items() if not _has_dead_frame(parts))


def observation_spec(env: BaseEnv, task: Task, obs_mode: ObsMode) -> dict[str, ModalitySpec]:
    """Describe each modality of one observation of `env`, whatever mode `env` itself was built for."""
    fields = flatten_observation(_state_observation(env, obs_mode.maniskill))
    out = {name: ModalitySpec(shape=(sum(w.values()),), fields=w) for name, w in split_fields(task, fields).items()}
    if not obs_mode.pictures:
        return out
    out.pop("objects", None)
    for camera, (width, height) in _cameras(env).items():
        width, height = obs_mode.px or width, obs_mode.px or height
        path = {f"sensor_data/{camera}/rgb": 3}
        out[f"rgb.{camera}"] = ModalitySpec(shape=(3, height, width), fields=path, dtype="uint8")
    return out


def split_fields(task: Task, fields: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Sort observation fields into modalities, each with the width of its fields; modalities without any are left out.

    Args:
        fields: path to tensor [N] or [N, S].
    """
    out: dict[str, dict[str, int]] = {name: {} for name in MODALITIES}
    for path, value in fields.items():
        out[task.modality_of(path)][path] = 1 if value.ndim == 1 else value.shape[-1]
    return {name: widths for name, widths in out.items() if widths}


def flatten_observation(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn ManiSkill's nested observation into one level of `agent/qpos`-like paths, in its order."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            out |= flatten_observation(value, f"{prefix}{key}/")
        else:
            out[prefix + key] = value
    return out


def action_spec(env: BaseEnv) -> ActionSpec:
    """Describe every action dimension of `env`'s present controller from the controllers' own configuration."""
    controller = env.agent.controller
    parts = getattr(controller, "controllers", {"": controller})
    rows = [row for uid, part in parts.items() for row in _describe_controller(uid, part)]
    columns: dict[str, tuple[Any, ...]] = {key: tuple(row[key] for row in rows) for key in rows[0]} if rows else {}
    configs = [part.config for part in parts.values()]
    moving = [config for config in configs if getattr(config, "use_delta", False)]
    frames = [frame for config in configs if (frame := getattr(config, "frame", None)) is not None]
    return ActionSpec(
        **columns,
        control_mode=env.control_mode,
        control_dt_s=1.0 / env.control_freq,
        delta_from="none" if not moving else "target" if any(c.use_target for c in moving) else "measured",
        frame=_frame(frames[0]) if frames else "base",
    )


def _describe_controller(uid: str, controller: BaseController) -> Iterator[dict[str, Any]]:
    """Yield one row per action dimension of a simple controller."""
    from mani_skill.agents.controllers.pd_ee_pose import PDEEPosController, PDEEPoseController
    from mani_skill.agents.controllers.pd_joint_pos import PDJointPosController, PDJointPosMimicController
    from mani_skill.agents.controllers.pd_joint_pos_vel import PDJointPosVelController
    from mani_skill.agents.controllers.pd_joint_vel import PDJointVelController

    space = controller.single_action_space
    if space.shape[0] == 0:  # passive joints
        return
    config: Any = controller.config
    delta = bool(getattr(config, "use_delta", False))
    physical = controller._original_single_action_space if controller._normalize_action else space
    low, high = np.array(physical.low, dtype=np.float64), np.array(physical.high, dtype=np.float64)
    joints = [joint.name for joint in controller.joints]
    units = ["m" if joint.type[0].startswith("prismatic") else "rad" for joint in controller.joints]
    deltas, discrete = [delta] * space.shape[0], False
    if isinstance(controller, PDEEPosController):
        axes = "xyz" if not isinstance(controller, PDEEPoseController) else ("x", "y", "z", "rx", "ry", "rz")
        names = [f"ee_{'d' if delta else ''}{axis}" for axis in axes]
        units = ["m", "m", "m", "rad", "rad", "rad"][: len(names)]
        if isinstance(controller, PDEEPoseController) and controller._normalize_action:
            # ManiSkill multiplies normalised rotations by `rot_lower`, which is negative: +1 turns by -|bound|.
            low[3:], high[3:] = -np.broadcast_to(config.rot_lower, 3), np.broadcast_to(config.rot_lower, 3)
    elif isinstance(controller, PDJointPosMimicController):
        led = [int(i) for i in controller.control_joint_indices]
        names = [uid] if len(led) == 1 and uid else [joints[i] for i in led]
        units, discrete = [units[i] for i in led], not delta
    elif isinstance(controller, PDJointPosVelController):
        names = [*joints, *(f"{joint}_vel" for joint in joints)]
        deltas = [delta] * len(joints) + [True] * len(joints)  # zero velocity means stay
        units = [*units, *(f"{unit}/s" for unit in units)]
    elif isinstance(controller, PDJointVelController):
        names, units = [f"{joint}_vel" for joint in joints], [f"{unit}/s" for unit in units]
        deltas = [True] * len(joints)
    elif isinstance(controller, PDJointPosController):
        names = joints
    else:
        raise UnknownNameError(
            "kind of controller", type(controller).__name__, ("PDJointPos", "PDJointPosMimic", "PDJointVel", "PDEEPose")
        )
    for i, name in enumerate(names):
        yield {
            "names": name,
            "low": _decimal(space.low[i]),
            "high": _decimal(space.high[i]),
            "delta": deltas[i],
            "discrete": discrete,
            "units": units[i],
            "physical_low": _decimal(low[i]),
            "physical_high": _decimal(high[i]),
        }


def _decimal(value: float) -> float:
    """Return the shortest decimal that is the same float32: the 0.1 of the configuration, not 0.10000000149."""
    return float(str(np.float32(value)))


def _frame(name: str) -> str:
    return {
        "root_translation": "base",
        "root_translation:root_aligned_body_rotation": "base",
        "body_translation": "tool",
    }.get(name, name)


def _has_dead_frame(parts: Any) -> bool:
    configs = parts.values() if isinstance(parts, dict) else [parts]
    return any("translation" not in getattr(config, "frame", "translation") for config in configs)


def _cameras(env: BaseEnv) -> dict[str, tuple[int, int]]:
    """Return width and height of the cameras that observe, whether or not `env` renders."""
    from mani_skill.sensors.camera import parse_camera_configs

    configs = {**parse_camera_configs(env._default_sensor_configs), **parse_camera_configs(env.agent._sensor_configs)}
    return {name: (config.width, config.height) for name, config in configs.items()}


def _state_observation(env: BaseEnv, maniskill_mode: str) -> dict[str, Any]:
    """Return the part of an observation that needs no rendering, as `maniskill_mode` would give it."""
    from mani_skill.envs.utils.observations import parse_obs_mode_to_struct

    before = env._obs_mode, env.obs_mode_struct
    env._obs_mode, env.obs_mode_struct = maniskill_mode, parse_obs_mode_to_struct(maniskill_mode)
    try:
        return env._get_obs_state_dict(env.get_info())
    finally:
        env._obs_mode, env.obs_mode_struct = before


@functools.cache
def _sample_scene(env_id: str) -> BaseEnv:
    """Return one scene of `env_id`, built once a process, to read specifications from."""
    with inert_materials(), quiet_drivers():
        return build_stock(env_id, obs_mode="state_dict", sim_backend="physx_cpu", render_backend="none")
