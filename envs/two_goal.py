"""A reach with two right answers: two goals mirror each other about the plane in which the tool starts.

The first observation says nothing about which goal a demonstrator will choose (a fair coin that only the seed decides),
so that the distribution of actions there has two modes. A policy that averages them moves straight ahead, into a wedge
between the goals that ends the episode; a policy that keeps them reaches each about as often as it was demonstrated.
Without the wedge, a policy that replans often would get away with averaging: once it is a little off the middle, what
it observes tells it which way the demonstrators went from there.

    extra/goal_positions   [6]: the left goal (y > 0), then the right one, metres in the world
    info["goal_index"]     [N] int64: 0 or 1 while the tool rests at the left or the right goal, else -1
    info["fail"]           [N] bool: the tool was in the wedge, now or before; nothing is a success after that

Importing this module registers the environment with ManiSkill; `load_maniskill` does it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils import sapien_utils
from mani_skill.utils.building import actors
from mani_skill.utils.registration import register_env
from mani_skill.utils.scene_builder.table import TableSceneBuilder
from mani_skill.utils.structs.pose import Pose
from torch import Tensor

ENV_ID = "TwoGoalReach-v1"
GOAL_RADIUS_M = 0.02
FORWARD_M = (0.06, 0.10)
"""Distance of the goals' plane ahead of the robot's first tool position; drawn per episode, as the two below."""
SIDEWAYS_M = (0.12, 0.16)
"""Distance of each goal from the plane y = 0, in which the tool starts."""
HEIGHT_M = (0.12, 0.24)
"""Height of both goals above the table."""
WEDGE_FROM, WEDGE_SLOPE = 0.25, 0.5
"""The wedge, with x and y as parts of the way to a goal (1, 1): x beyond the first, |y| below the second times x."""
PLAN_STEP_M = 0.00125
"""Length of a step of the scripted plan: ten of them, what `collect` plays back in a control step, are 12.5 mm."""


@register_env(ENV_ID, max_episode_steps=50)
class TwoGoalReachEnv(BaseEnv):
    """Move the tool of a Panda into either of two spheres in the air; nothing else is in the scene.

    **Randomizations:** distance ahead, distance aside and height of the goals; the robot always starts alike, in the
    plane between them.

    **Success Conditions:**
    - the tool centre is within 2 cm of either goal
    - the robot is static (q velocity < 0.2), so that demonstrations end where they should stay
    - the tool centre was never in the wedge between the goals
    """

    SUPPORTED_ROBOTS = ("panda",)

    def __init__(self, *args: Any, robot_uids: str = "panda", **kwargs: Any) -> None:
        super().__init__(*args, robot_uids=robot_uids, **kwargs)

    @property
    def _default_sensor_configs(self) -> list[CameraConfig]:
        pose = sapien_utils.look_at(eye=[0.4, 0.0, 0.6], target=[-0.1, 0.0, 0.1])
        return [CameraConfig("base_camera", pose, 128, 128, np.pi / 2, 0.01, 100)]

    @property
    def _default_human_render_camera_configs(self) -> CameraConfig:
        pose = sapien_utils.look_at(eye=[0.75, 0.0, 0.65], target=[0.0, 0.0, 0.2])
        return CameraConfig("render_camera", pose, 512, 512, 1, 0.01, 100)

    def _load_agent(self, options: dict[str, Any]) -> None:
        super()._load_agent(options, sapien.Pose(p=[-0.615, 0, 0]))

    def _load_scene(self, options: dict[str, Any]) -> None:
        self.table_scene = TableSceneBuilder(self, robot_init_qpos_noise=0.0)
        self.table_scene.build()
        self.goal_sites = [
            actors.build_sphere(
                self.scene,
                radius=GOAL_RADIUS_M,
                color=[0, 1, 0, 1],
                name=f"{side}_goal",
                body_type="kinematic",
                add_collision=False,
                initial_pose=sapien.Pose(),
            )
            for side in ("left", "right")
        ]
        self.post = actors.build_box(  # shows where the wedge is
            self.scene,
            half_sizes=[0.005, 0.02, 0.15],
            color=[1, 0, 0, 1],
            name="post",
            body_type="kinematic",
            add_collision=False,
            initial_pose=sapien.Pose(),
        )
        self._failed = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)

    def _initialize_episode(self, env_idx: Tensor, options: dict[str, Any]) -> None:
        with torch.device(self.device):
            self.table_scene.initialize(env_idx)
            ranges = torch.tensor([FORWARD_M, SIDEWAYS_M, HEIGHT_M])
            drawn = ranges[:, 0] + torch.rand((len(env_idx), 3)) * (ranges[:, 1] - ranges[:, 0])
            for site, side in zip(self.goal_sites, (1.0, -1.0), strict=True):
                site.set_pose(Pose.create_from_pq(drawn * torch.tensor([1.0, side, 1.0])))
            self.post.set_pose(Pose.create_from_pq(torch.stack([drawn[:, 0], 0 * drawn[:, 0], drawn[:, 2]], dim=1)))
            self._failed[env_idx] = False

    def goal_positions(self) -> Tensor:
        """Return the goals [N, 2, 3], left (y > 0) first, metres in the world."""
        return torch.stack([site.pose.p for site in self.goal_sites], dim=1)

    def _get_obs_extra(self, info: dict[str, Any]) -> dict[str, Tensor]:
        return {"tcp_pose": self.agent.tcp_pose.raw_pose, "goal_positions": self.goal_positions().flatten(1)}

    def goal_distances(self) -> Tensor:
        """Return the distances [N, 2] of the tool from the goals, metres."""
        return torch.linalg.norm(self.goal_positions() - self.agent.tcp_pose.p[:, None], dim=-1)

    def evaluate(self) -> dict[str, Tensor]:
        forward, sideways = (self.agent.tcp_pose.p[:, :2] / self.goal_positions()[:, 0, :2]).unbind(dim=1)
        self._failed = self._failed | ((forward > WEDGE_FROM) & (sideways.abs() < WEDGE_SLOPE * forward))
        distance, nearest = self.goal_distances().min(dim=1)
        success = (distance <= GOAL_RADIUS_M) & self.agent.is_static(0.2) & ~self._failed
        return {"success": success, "fail": self._failed, "goal_index": torch.where(success, nearest, -1)}

    def compute_dense_reward(self, obs: Any, action: Tensor, info: dict[str, Any]) -> Tensor:
        reward = 1 - torch.tanh(5 * self.goal_distances().amin(dim=1))
        reward[info["success"]] = 2
        return reward

    def compute_normalized_dense_reward(self, obs: Any, action: Tensor, info: dict[str, Any]) -> Tensor:
        return self.compute_dense_reward(obs=obs, action=action, info=info) / 2


def chosen_goal(seed: int) -> int:
    """Return the goal that the demonstrator of episode `seed` reaches for; it depends on nothing that is observed."""
    return int(np.random.default_rng([seed, 2]).integers(2))


def solve(env: Any, seed: int, debug: bool = False, vis: bool = False) -> int | None:
    """Move the tool of `env` (one environment in `pd_joint_pos`) along a straight line to the goal chosen by `seed`.

    Called as ManiSkill's motion-planning solvers are; -1 means that no motion was found.
    """
    env.reset(seed=seed)
    base = env.unwrapped
    robot, arm = base.agent.robot, base.agent.controller.controllers["arm"]
    model, tool = robot.create_pinocchio_model(), int(base.agent.tcp.index[0])
    moving = np.zeros(robot.max_dof, dtype=bool)
    moving[np.asarray(arm.active_joint_indices.cpu()).astype(int)] = True
    qpos = np.asarray(robot.get_qpos()[0].cpu(), dtype=np.float64)
    model.compute_forward_kinematics(qpos)
    start = model.get_link_pose(tool)  # in the robot's base, which stands upright
    goal = np.asarray((base.goal_positions()[0, chosen_goal(seed)] - robot.pose.p[0]).cpu(), dtype=np.float64)
    way = goal - start.p
    count = int(np.ceil(np.linalg.norm(way) / PLAN_STEP_M))
    for share in np.arange(1, count + 1) / count:
        target = sapien.Pose(start.p + share * way, start.q)
        qpos, found, _ = model.compute_inverse_kinematics(tool, target, qpos, moving, eps=1e-4, max_iterations=100)
        if not found:
            return -1
        env.step(np.append(qpos[moving], 1.0))  # the gripper stays open
    return None
