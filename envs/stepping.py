"""One simulated robot, one physics step at a time: what a controller at the rate of the physics drives and measures.

`SimVectorEnv.step` takes an action for a whole control step of 50 ms. A robot that runs in real time behind a bridge
has no such steps: its controller sets joint targets whenever it likes, and its sensors tell what is there now.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robopolicy.errors import RobopolicyError, UnknownNameError
from robopolicy.types import Frame

from .specs import flatten_observation
from .vector import SimVectorEnv

DRIVES: dict[str, tuple[float, float, float] | None] = {"stiff": (1e5, 3e3, 100.0), "maniskill": None}
"""Stiffness, damping and greatest torque of the arm's joint drives. The position interface of a real arm follows within
0.03 s (`stiff`) where ManiSkill's own drives take 0.1 s; whoever plays a policy that learned with the slow ones puts
the difference in front, as on a real arm."""
CLOSED_FINGER_M = -0.01
"""Where ManiSkill drives a finger that is told to close: into the object, so that it holds."""


class SteppedRobot:
    """The robot in environment 0 of `env`, which has one environment and absolute joint positions as actions."""

    def __init__(self, env: SimVectorEnv, *, drives: str = "stiff") -> None:
        """Raises RobopolicyError if `env` is not of that kind, UnknownNameError if `drives` is not in `DRIVES`."""
        if env.num_envs != 1 or env.task_spec.action.control_mode != "pd_joint_pos":
            raise RobopolicyError("A robot in real time needs one environment with control_mode=pd_joint_pos.")
        if drives not in DRIVES:
            raise UnknownNameError("kind of joint drive", drives, DRIVES)
        self.env = env
        self.arm_dof = env.task_spec.action.dim - 1
        self._drives = DRIVES[drives]
        self._base: Any = env.base_env
        self._attach()
        prefix = f"scene-0-{self._base.agent.uid}_"
        self.joint_names = tuple(joint.name.removeprefix(prefix) for joint in self._joints)
        """All moving joints, arm first, as in `agent/qpos`."""
        self.dt_s = 1.0 / self._base.sim_freq
        self.control_steps_every = self._base.sim_freq // self._base.control_freq
        """Physics steps in a control step."""
        self.physics_steps = 0
        """Since the last reset."""
        self._info: dict[str, Any] = {}

    def _attach(self) -> None:
        """Take hold of the robot in the scene; tasks whose shapes vary build another one at every reset."""
        self._body: Any = self._base.agent.robot._objs[0]
        self._joints = list(self._body.get_active_joints())
        if self._drives is not None:
            for joint in self._joints[: self.arm_dof]:
                joint.set_drive_properties(*self._drives, "force")

    def reset(self, seed: int) -> None:
        """Start the episode of `seed`; the joints are told to stay where they begin."""
        self.env.reset(seed=seed)
        self._attach()
        self.physics_steps = 0
        self._info = self._base.get_info()
        start = self.position()
        self.drive(start[: self.arm_dof], float(start[self.arm_dof]))

    def drive(self, arm_rad: NDArray[np.float64], finger_m: float) -> None:
        """Set the targets of the joint drives: arm [J], and one finger's place for all of them; 0 m closes."""
        finger_m = CLOSED_FINGER_M if finger_m <= 0 else finger_m
        for joint, target in zip(self._joints, (*arm_rad, finger_m, finger_m), strict=True):
            joint.set_drive_target(float(target))

    def step(self) -> None:
        """Advance the physics by `dt_s`."""
        base, first = self._base, self.physics_steps % self.control_steps_every == 0
        if first:
            base._before_control_step()
        base._before_simulation_step()
        base.scene.step()
        base._after_simulation_step()
        self.physics_steps += 1
        if self.physics_steps % self.control_steps_every == 0:
            base._after_control_step()
            self._info = base.get_info()

    def position(self) -> NDArray[np.float64]:
        """Return the position of `joint_names`, rad and m."""
        return np.asarray(self._body.get_qpos(), dtype=np.float64)

    def velocity(self) -> NDArray[np.float64]:
        return np.asarray(self._body.get_qvel(), dtype=np.float64)

    def extras(self) -> dict[str, NDArray[np.float64]]:
        """Return what the task observes beside the robot: name to [S]; contacts are as of the last control step."""
        fields = flatten_observation(self._base._get_obs_extra(self._info))
        return {name: np.atleast_1d(np.asarray(value[0], dtype=np.float64)) for name, value in fields.items()}

    @property
    def success(self) -> bool:
        """Whether the task was solved at the end of the last control step."""
        return bool(self._info["success"][0])

    def observation(self) -> Frame:
        """Return the observation that `env.step` would give now."""
        return self.env._frame(self._base.get_obs(self._base.get_info()))

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras that observe; none unless the environment has obs_mode=rgb."""
        return tuple(name.removeprefix("rgb.") for name in self.env.task_spec.observation if name.startswith("rgb."))

    def take_picture(self, camera: str) -> Callable[[], NDArray[np.uint8]]:
        """Let `camera` look, and return what waits until its picture [Y, X, 3], RGB, is drawn and returns it.

        Looking takes a tenth of a millisecond. Drawing takes tens of them without a GPU, in threads of the renderer:
        the physics may go on.
        """
        base = self._base
        for thing in base._hidden_objects:
            thing.hide_visual()
        base.scene.update_render(update_sensors=True, update_human_render_cameras=False)
        sensor = base.scene.sensors[camera]
        sensor.capture()

        def picture() -> NDArray[np.uint8]:
            seen = sensor.get_obs(rgb=True, depth=False, position=False, segmentation=False)["rgb"]
            return np.ascontiguousarray(np.asarray(seen[0][..., :3], dtype=np.uint8))

        return picture
