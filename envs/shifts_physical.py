"""Perturbations inside ManiSkill: bodies, first states, pushes, goals that move, cameras that stand elsewhere.

States are written through ManiSkill's own structures, one environment at a time by the mask that its resets use. Mass,
friction and camera poses are set on SAPIEN's objects, for which the simulation has to run on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.utils.structs.pose import Pose
from torch import Tensor

from robopolicy.errors import RobopolicyError
from robopolicy.types import Environment

from .shifts_signals import RAD_PER_M
from .shifts_table import GOALS
from .shifts_wrapper import Draws, Shifted, direction

DISTURBED_AT = (8, 20)
"""Control step before which something happens, drawn per episode; the last value is excluded."""


class Physical(Shifted):
    """A perturbation of the simulation itself."""

    needs_cpu = False

    def __init__(self, env: Environment, strength: float, *, name: str) -> None:
        super().__init__(env, strength, name=name)
        sim: Any = getattr(env, "unwrapped", None)
        if not hasattr(sim, "base_env"):
            raise RobopolicyError(f"shift={name} acts inside ManiSkill; it needs an environment of robopolicy.envs.")
        if self.needs_cpu and sim.device.type != "cpu":
            raise RobopolicyError(f"shift={name} needs a simulation on the CPU: backend=cpu or backend=single.")
        self.sim = sim

    @property
    def base(self) -> Any:
        """ManiSkill's environment."""
        return self.sim.base_env

    @contextmanager
    def only(self, row: int) -> Iterator[None]:
        """Within the block ManiSkill's structures write to environment `row` alone."""
        scene = self.base.scene
        before = scene._reset_mask
        scene._reset_mask = torch.zeros_like(before)
        scene._reset_mask[row] = True
        try:
            yield
        finally:
            scene._reset_mask = before

    def flush(self) -> None:
        """Hand what was written between two steps to the simulation."""
        scene = self.base.scene
        if scene.gpu_sim_enabled:
            scene._gpu_apply_all()
            if self.sim.device.type == "cuda":
                scene.px.gpu_update_articulation_kinematics()
            scene._gpu_fetch_all()


def free_objects(base: Any, row: int) -> Iterator[tuple[Any, int]]:
    """Yield the dynamic actors of environment `row`, and at which place of the actor that environment stands."""
    for actor in {id(a): a for a in base.scene.actors.values()}.values():
        scenes = actor._scene_idxs.tolist()
        if actor.px_body_type == "dynamic" and row in scenes:
            yield actor, scenes.index(row)


# ---- first states ----------------------------------------------------------------------------------------------------
class _Start(Physical):
    """Changes the first state of an episode, within the task's own initialisation."""

    def __init__(self, env: Environment, strength: float, *, name: str) -> None:
        super().__init__(env, strength, name=name)
        initialize = self.sim._initialize_scenes

        def initialize_elsewhere(env_idx: Tensor, options: dict[str, Any]) -> None:
            initialize(env_idx, options)
            for row in env_idx.tolist():
                with self.only(row):
                    self.place(row, self.draws[row])

        self.sim._initialize_scenes = initialize_elsewhere

    def place(self, row: int, draws: Draws) -> None:
        """Change the state of environment `row`, the only one that is written to."""
        raise NotImplementedError


# ---- bodies ----------------------------------------------------------------------------------------------------------
class _Bodies(_Start):
    """Changes something of every free object, the same in all episodes; `close` undoes it.

    It is done where first states are set: a reset may have rebuilt the bodies just before.
    """

    needs_cpu = True

    def __init__(self, env: Environment, strength: float, *, name: str) -> None:
        super().__init__(env, strength, name=name)
        self._originals: dict[Any, Any] = {}

    def place(self, row: int, draws: Draws) -> None:
        for actor, place in free_objects(self.base, row):
            body = actor._bodies[place]
            if body not in self._originals:  # the first episode, or the reset has rebuilt it
                self._originals[body] = self.change(body)

    def close(self) -> None:
        for body, original in self._originals.items():
            self.restore(body, original)
        self._originals.clear()
        self.env.close()

    def change(self, body: Any) -> Any:
        """Change `body` and return what `restore` needs."""
        raise NotImplementedError

    def restore(self, body: Any, original: Any) -> None:
        raise NotImplementedError


class ObjectMass(_Bodies):
    """Free objects weigh 1 + `strength` times as much, inertia in proportion."""

    def change(self, body: Any) -> Any:
        original = body.mass, body.inertia
        body.mass, body.inertia = original[0] * (1 + self.strength), original[1] * (1 + self.strength)
        return original

    def restore(self, body: Any, original: Any) -> None:
        body.mass, body.inertia = original


class ObjectFriction(_Bodies):
    """Friction of free objects times 1 - `strength`; PhysX takes the mean of the two surfaces in contact."""

    def change(self, body: Any) -> Any:
        originals = [shape.physical_material for shape in body.collision_shapes]
        for shape, old in zip(body.collision_shapes, originals, strict=True):  # materials are shared: make new ones
            kept = 1 - self.strength
            shape.physical_material = sapien.physx.PhysxMaterial(
                old.static_friction * kept, old.dynamic_friction * kept, old.restitution
            )
        return originals

    def restore(self, body: Any, original: Any) -> None:
        for shape, old in zip(body.collision_shapes, original, strict=True):
            shape.physical_material = old


class StartObjects(_Start):
    """Free objects start `strength` metres away from where they would, all in the same horizontal direction."""

    def place(self, row: int, draws: Draws) -> None:
        offset = torch.tensor(self.strength * direction(draws), dtype=torch.float32, device=self.sim.device)
        for actor, place in free_objects(self.base, row):
            pose = actor.pose
            actor.set_pose(Pose.create_from_pq((pose.p[place] + offset)[None], pose.q[place][None]))


class StartJoints(_Start):
    """Each arm joint starts with further noise of standard deviation `strength` radians."""

    def place(self, row: int, draws: Draws) -> None:
        robot = self.base.agent.robot
        arm = self.base.agent.controller.controllers["arm"].active_joint_indices.cpu().numpy()
        noise = np.zeros(robot.max_dof, dtype=np.float32)
        noise[arm] = self.strength * draws.standard_normal(len(arm))
        qpos = robot.get_qpos()
        robot.set_qpos((qpos[row if len(qpos) > 1 else 0] + torch.from_numpy(noise).to(qpos))[None])


class CameraPose(_Start):
    """Cameras stand `strength` metres from where they should and are turned: 0.02 rad for each centimetre."""

    needs_cpu = True

    def __init__(self, env: Environment, strength: float, *, name: str) -> None:
        super().__init__(env, strength, name=name)
        self._places: dict[tuple[str, int], tuple[Any, sapien.Pose]] = {}

    def place(self, row: int, draws: Draws) -> None:
        for camera, sensor in self.base._sensors.items():
            lens = sensor.camera._render_cameras[row]
            move, axis = (v / np.linalg.norm(v) for v in draws.standard_normal((2, 3)))
            known, original = self._places.get((camera, row), (None, None))
            if known is not lens:  # the first time, or rebuilt
                original = lens.local_pose
                self._places[camera, row] = (lens, original)
            half = self.strength * RAD_PER_M / 2
            turn = np.concatenate([[np.cos(half)], np.sin(half) * axis])
            lens.local_pose = original * sapien.Pose(self.strength * move, turn) if self.strength else original
            sensor.camera._cached_local_pose = None


class Distractors(_Start):
    """So many cubes as `strength` says lie about in colours of their own, new ones in each episode.

    They are drawn but have no bodies: the arm and the objects pass through them, so that nothing but pictures differs.
    """

    needs_cpu = True
    most = 6
    half_size_m = 0.02
    around_m = 0.25
    """Largest distance from the world's origin in x and in y."""
    apart_m = 0.08
    """Smallest distance from free objects, centre to centre, where ten tries find such a place."""

    def __init__(self, env: Environment, strength: float, *, name: str) -> None:
        super().__init__(env, strength, name=name)
        self._there: dict[int, list[sapien.Entity]] = {}

    def place(self, row: int, draws: Draws) -> None:
        scene = self.base.scene.sub_scenes[row]
        present = scene.entities
        for old in self._there.get(row, []):
            if old in present:  # a reset may have rebuilt the scene
                scene.remove_entity(old)
        free = [actor.pose.p[at, :2].cpu().numpy() for actor, at in free_objects(self.base, row)]
        cubes = [self._cube(free, draws) for _ in range(self.most)]  # all are drawn, whatever the level
        self._there[row] = cubes[: int(self.strength)]
        for cube in self._there[row]:
            scene.add_entity(cube)

    def _cube(self, free: Sequence[np.ndarray], draws: Draws) -> sapien.Entity:
        for _ in range(10):
            x, y = draws.uniform(-self.around_m, self.around_m, 2)
            if all(np.hypot(x - at[0], y - at[1]) > self.apart_m for at in free):
                break
        angle, colour = draws.uniform(-np.pi, np.pi), draws.uniform(0, 1, 3)
        material = sapien.render.RenderMaterial()
        material.base_color = [*colour, 1.0]
        body = sapien.render.RenderBodyComponent()
        body.attach(sapien.render.RenderShapeBox([self.half_size_m] * 3, material))
        cube = sapien.Entity()
        cube.add_component(body)
        cube.pose = sapien.Pose([x, y, self.half_size_m], [np.cos(angle / 2), 0, 0, np.sin(angle / 2)])
        return cube


# ---- in mid-episode --------------------------------------------------------------------------------------------------
class _Event(Physical):
    """Something happens once in each episode, before a control step drawn from DISTURBED_AT."""

    def __init__(self, env: Environment, strength: float, *, name: str) -> None:
        super().__init__(env, strength, name=name)
        self.when = np.zeros(env.num_envs, dtype=np.int64)

    def begin(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.when[row] = self.draws[row].integers(*DISTURBED_AT)

    def before_step(self) -> None:
        now = np.flatnonzero(self.steps == self.when).tolist()
        for row in now:
            with self.only(row):
                self.happen(row, self.draws[row])
        if now:
            self.flush()

    def happen(self, row: int, draws: Draws) -> None:
        """Disturb environment `row`, the only one that is written to."""
        raise NotImplementedError


class ObjectImpulse(_Event):
    """A horizontal impulse on every free object: `strength` newton seconds for each kilogram, through its centre."""

    def happen(self, row: int, draws: Draws) -> None:
        change = torch.tensor(self.strength * direction(draws), dtype=torch.float32, device=self.sim.device)
        for actor, place in free_objects(self.base, row):
            actor.set_linear_velocity((actor.linear_velocity[place] + change)[None])


class ArmImpulse(_Event):
    """A horizontal impulse of `strength` newton seconds on the tool; every joint takes its share."""

    def happen(self, row: int, draws: Draws) -> None:
        robot, tool = self.base.agent.robot, int(self.base.agent.tcp.index[0])
        body = robot._objs[row]
        model = body.create_pinocchio_model()
        qpos = np.asarray(body.qpos, dtype=np.float64)
        change = joint_velocity_change(model, qpos, tool, body.root_pose, self.strength * direction(draws))
        qvel = robot.get_qvel()
        now = qvel[row if len(qvel) > 1 else 0]
        robot.set_qvel((now + torch.tensor(change, dtype=torch.float32).to(now))[None])


def joint_velocity_change(
    model: Any, qpos: np.ndarray, link: int, root: sapien.Pose, impulse: np.ndarray
) -> np.ndarray:
    """Return what an impulse [3], N s in the world, at the origin of `link` does to the joint velocities [J].

    M(q) dq' = J(q)^T p: with mass matrix M and Jacobian J of the link's position, here by central differences.
    """
    step = 1e-5
    columns = []
    for joint in range(len(qpos)):
        ends = []
        for sign in (1, -1):
            moved = qpos.copy()
            moved[joint] += sign * step
            model.compute_forward_kinematics(moved)
            ends.append((root * model.get_link_pose(link)).p.astype(np.float64))
        columns.append((ends[0] - ends[1]) / (2 * step))
    mass = np.asarray(model.compute_generalized_mass_matrix(qpos), dtype=np.float64)
    return np.linalg.solve(mass, np.stack(columns) @ impulse)


class GoalMoved(_Event):
    """The goal jumps by `strength` metres in a horizontal direction."""

    def happen(self, row: int, draws: Draws) -> None:
        offset = torch.tensor(self.strength * direction(draws), dtype=torch.float32, device=self.sim.device)
        for attribute in GOALS[self.task_spec.name]:
            goal = getattr(self.base, attribute)
            pose = goal.pose
            goal.set_pose(Pose.create_from_pq((pose.p[row] + offset)[None], pose.q[row][None]))
