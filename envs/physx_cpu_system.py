"""Many PhysX CPU scenes behind the surface of SAPIEN's PhysX GPU system.

ManiSkill's batched code talks to `PhysxGpuSystem`: flat buffers for all bodies and articulations, `gpu_fetch_*` to fill
them, `gpu_apply_*` to write them back, contact queries. `PhysxCpuBatch` offers the same names over one `PhysxCpuSystem`
per environment. Reading costs one `pack()` per scene, which returns the state of all its bodies in one block of bytes;
link poses follow from joint positions by compiled kinematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import sapien
import sapien.physx as physx
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import physx_kinematics as kinematics
from .physx_contacts import ContactReader, ImpulseQuery
from .physx_native import JOINT, SYSTEM, addresses, advance_without_lock, drive_setter
from .physx_packs import BODY, Packs
from .physx_threads import WorkerPool, worker_pool

_POSE_TOLERANCE = 2e-5
_PARTS_PER_THREAD = 4
"""Scenes are handed out in this many parts per thread: a part that takes longer is made up for by the others."""


class Buffer:
    """A tensor that answers to `torch()` as SAPIEN's CUDA arrays do."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def torch(self) -> Tensor:
        return self._tensor


class PhysxCpuBatch:
    """The scenes `systems`, one per environment, as one system; names without underscore follow `PhysxGpuSystem`."""

    def __init__(self, systems: Sequence[physx.PhysxCpuSystem], pool: WorkerPool | None = None) -> None:
        self.systems = list(systems)
        self._pool = pool or worker_pool()
        self._initialised = False
        self._contacts = ContactReader(self.systems)
        self._advance = advance_without_lock()
        self._addresses: NDArray[np.int64] | None = None

    @property
    def timestep(self) -> float:
        return self.systems[0].timestep

    @timestep.setter
    def timestep(self, value: float) -> None:
        for system in self.systems:
            system.timestep = value

    def get_timestep(self) -> float:
        return self.timestep

    def set_timestep(self, value: float) -> None:
        self.timestep = value

    @property
    def rigid_dynamic_components(self) -> list[Any]:
        return [body for system in self.systems for body in system.rigid_dynamic_components]

    @property
    def rigid_static_components(self) -> list[Any]:
        return [body for system in self.systems for body in system.rigid_static_components]

    @property
    def articulation_link_components(self) -> list[Any]:
        return [link for system in self.systems for link in system.articulation_link_components]

    # ---- set-up ------------------------------------------------------------------------------------------------------
    def gpu_init(self) -> None:
        """Lay out the buffers once all scenes are built, and read the first state."""
        self._bodies: list[Any] = []
        self._articulations: list[Any] = []
        self._scene_of_body: list[int] = []
        self._scene_of_articulation: list[int] = []
        for scene, system in enumerate(self.systems):
            roots = [link.articulation for link in system.articulation_link_components if link.is_root]
            self._bodies += system.rigid_dynamic_components
            self._articulations += roots
            self._scene_of_body += [scene] * len(system.rigid_dynamic_components)
            self._scene_of_articulation += [scene] * len(roots)
        self._kinematic = np.array([body.kinematic for body in self._bodies], bool)
        self._table = kinematics.ArticulationTable(self._articulations, len(self._bodies))
        self._allocate()
        self._initialised = True
        self._calibrate()

    def _allocate(self) -> None:
        count, bodies = len(self._articulations), len(self._bodies) + len(self._table.parent)
        self._dof = np.array([a.dof for a in self._articulations], np.int64)
        width = int(self._dof.max(initial=0))

        def zeros(*shape: int) -> tuple[NDArray[np.float32], Buffer]:
            array = np.zeros(shape, np.float32)
            return array, Buffer(torch.from_numpy(array))

        self._body, self.cuda_rigid_body_data = zeros(bodies, BODY)
        self._force, self.cuda_rigid_body_force = zeros(bodies, 4)
        self._torque, self.cuda_rigid_body_torque = zeros(bodies, 4)
        self._qpos, self.cuda_articulation_qpos = zeros(count, width)
        self._qvel, self.cuda_articulation_qvel = zeros(count, width)
        self._qacc, self.cuda_articulation_qacc = zeros(count, width)
        self._qf, self.cuda_articulation_qf = zeros(count, width)
        self._target, self.cuda_articulation_target_qpos = zeros(count, width)
        self._target_velocity, self.cuda_articulation_target_qvel = zeros(count, width)
        self._packs = Packs(self.systems, self._dof)
        self.body_poses = self.cuda_rigid_body_data.torch()[:, :7]
        self._seen = {name: getattr(self, name).copy() for name in ("_body", "_qpos", "_qvel", "_qf")}
        self._seen_target = np.zeros_like(self._target)
        self._seen_target_velocity = np.zeros_like(self._target)
        self._joints = [list(a.active_joints) for a in self._articulations]
        self._driven = np.array(
            [
                any(float(np.max(j.stiffness)) != 0 or float(np.max(j.damping)) != 0 for j in joints)
                for joints in self._joints
            ],
            bool,
        )
        self._set_targets = {velocity: drive_setter(velocity) for velocity in (False, True)}
        self._joint_addresses = np.zeros((count, width), np.int64)
        if self._set_targets[False] is not None:
            for a, joints in enumerate(self._joints):
                self._joint_addresses[a, : len(joints)] = addresses(joints, JOINT)
        self._forced = np.zeros(len(self.systems), bool)
        rows = {body: i for i, body in enumerate(self._bodies)}
        for a, articulation in enumerate(self._articulations):
            for k, link in enumerate(articulation.links):
                rows[link] = int(self._table.row[self._table.first_link[a] + k])
        self._row_of_body = rows
        self._row_of_articulation = {articulation: i for i, articulation in enumerate(self._articulations)}

    def _calibrate(self) -> None:
        """Find the sign of each link's quaternion, and make sure that packs and kinematics agree with SAPIEN."""
        for articulation in self._articulations:
            articulation.set_qpos(articulation.qpos)  # links stand at the origin until a joint is set
        self._target[:], self._target_velocity[:] = self._packs.targets()
        self._seen_target[:], self._seen_target_velocity[:] = self._target, self._target_velocity
        self.fetch()
        table, links = self._table, [link for a in self._articulations for link in a.links]
        true = np.array([kinematics.pose_numbers(x.entity_pose) for x in [*self._bodies, *links]], np.float64).reshape(
            -1, 7
        )
        mine = self._body[:, :7].astype(np.float64)
        table.sign[:] = np.where((mine[table.row, 3:] * true[table.row, 3:]).sum(1) < 0, -1.0, 1.0)
        mine[table.row, 3:] *= table.sign[:, None]
        worst = np.abs(mine - true).max(initial=0)
        joints = [np.abs(self._qpos[i, : a.dof] - a.qpos).max(initial=0) for i, a in enumerate(self._articulations)]
        if worst > _POSE_TOLERANCE or max(joints, default=0) > _POSE_TOLERANCE:
            raise RuntimeError(
                f"Poses read in one block differ from SAPIEN's own by {max(worst, *joints):.2g}: "
                "the layout of PhysxCpuSystem.pack() is not the one of SAPIEN 3.0.3."
            )
        self.fetch()

    def body_rows(self, bodies: Sequence[Any]) -> Tensor:
        """Return where `bodies` (components) stand in `cuda_rigid_body_data`, [K] int64."""
        return torch.tensor([self._row_of_body[body] for body in bodies])

    def articulation_rows(self, articulations: Sequence[Any]) -> Tensor:
        """Return where `articulations` stand in the articulation buffers, [K] int32 as ManiSkill combines it."""
        return torch.tensor([self._row_of_articulation[a] for a in articulations], dtype=torch.int32)

    # ---- reading -----------------------------------------------------------------------------------------------------
    def fetch(self) -> None:
        """Read the state of all scenes into the buffers; for velocities of links see `body_data`."""
        self._packs.read(self._table, self._body, self._qpos, self._qvel)
        for name, seen in self._seen.items():
            np.copyto(seen, getattr(self, name))

    def body_data(self, bodies: Sequence[Any]) -> Tensor:
        """Return `cuda_rigid_body_data` [bodies, 13], with the velocities of `bodies` filled in.

        Those of actors and of root links are always there; other links are asked one by one, when somebody wants them.
        """
        for body in bodies:
            if isinstance(body, physx.PhysxArticulationLinkComponent) and not body.is_root:
                row = self._row_of_body[body]
                self._body[row, 7:10], self._body[row, 10:] = body.linear_velocity, body.angular_velocity
                self._seen["_body"][row, 7:] = self._body[row, 7:]
        return self.cuda_rigid_body_data.torch()

    def gpu_fetch_rigid_dynamic_data(self) -> None:
        self.fetch()

    def gpu_fetch_articulation_qpos(self) -> None:
        self.fetch()

    gpu_fetch_articulation_link_pose = gpu_fetch_articulation_qpos
    gpu_fetch_articulation_link_velocity = gpu_fetch_articulation_qpos
    gpu_fetch_articulation_qvel = gpu_fetch_articulation_qpos

    def gpu_fetch_articulation_qacc(self) -> None:
        for i, articulation in enumerate(self._articulations):
            self._qacc[i, : articulation.dof] = articulation.qacc

    def gpu_fetch_articulation_target_qpos(self) -> None:
        """Nothing to do: targets change only through this object."""

    def gpu_fetch_articulation_target_qvel(self) -> None:
        """Nothing to do: targets change only through this object."""

    def gpu_fetch_articulation_link_incoming_joint_forces(self) -> None:
        width = max((len(a.links) for a in self._articulations), default=0)
        forces = np.zeros((len(self._articulations), width, 6), np.float32)
        for i, articulation in enumerate(self._articulations):
            forces[i, : len(articulation.links)] = articulation.get_link_incoming_joint_forces()
        self.cuda_articulation_link_incoming_joint_forces = Buffer(torch.from_numpy(forces))

    # ---- writing -----------------------------------------------------------------------------------------------------
    def force_writing(self, scenes: Tensor) -> None:
        """Make the next `apply_state` write all of `scenes` [N] bool, changed or not, and forget their contacts."""
        self._forced |= scenes.numpy()
        self._contacts.forget(self._forced)

    def apply_state(self) -> None:
        """Write what differs from the last reading, and all of the scenes named by `force_writing`."""
        self.gpu_apply_rigid_dynamic_data()
        self.gpu_apply_articulation_qpos()
        self.gpu_apply_articulation_qvel()
        self.gpu_apply_articulation_qf()
        self.gpu_apply_articulation_root_pose()
        self.gpu_apply_articulation_root_velocity()
        self._forced[:] = False

    def _changed(self, name: str, rows: slice | NDArray[np.int64], columns: slice, scenes: list[int]) -> list[int]:
        now, before = getattr(self, name)[rows, columns], self._seen[name][rows, columns]
        different = (now != before).any(1)
        if self._forced.any():
            different |= self._forced[scenes]
        return np.nonzero(different)[0].tolist()

    def gpu_apply_rigid_dynamic_data(self) -> None:
        rows = slice(0, len(self._bodies))
        for i in self._changed("_body", rows, slice(0, 7), self._scene_of_body):
            self._bodies[i].entity.pose = sapien.Pose(self._body[i, :3], self._body[i, 3:7])
        for i in self._changed("_body", rows, slice(7, 13), self._scene_of_body):
            if not self._kinematic[i]:
                self._bodies[i].linear_velocity = self._body[i, 7:10]
                self._bodies[i].angular_velocity = self._body[i, 10:13]

    def gpu_apply_rigid_dynamic_force(self) -> None:
        """Push each body's centre of mass by `cuda_rigid_body_force` [bodies, :3], in newtons, during the next step."""
        for i in np.nonzero(self._force[: len(self._bodies), :3].any(1))[0].tolist():
            body = self._bodies[i]
            body.add_force_at_point(force=self._force[i, :3], point=(body.pose * body.cmass_local_pose).p)
        self._force[:] = 0

    def _apply_joints(self, name: str, setter: str) -> None:
        for i in self._changed(name, slice(None), slice(None), self._scene_of_articulation):
            articulation = self._articulations[i]
            getattr(articulation, setter)(getattr(self, name)[i, : articulation.dof])

    def gpu_apply_articulation_qpos(self) -> None:
        self._apply_joints("_qpos", "set_qpos")

    def gpu_apply_articulation_qvel(self) -> None:
        self._apply_joints("_qvel", "set_qvel")

    def gpu_apply_articulation_qf(self) -> None:
        self._apply_joints("_qf", "set_qf")

    def gpu_apply_articulation_root_pose(self) -> None:
        for i in self._changed("_body", self._table.root_row, slice(0, 7), self._scene_of_articulation):
            row = self._body[self._table.root_row[i]]
            self._articulations[i].root_pose = sapien.Pose(row[:3], row[3:7])

    def gpu_apply_articulation_root_velocity(self) -> None:
        for i in self._changed("_body", self._table.root_row, slice(7, 13), self._scene_of_articulation):
            row = self._body[self._table.root_row[i]]
            self._articulations[i].set_root_linear_velocity(row[7:10])
            self._articulations[i].set_root_angular_velocity(row[10:13])

    def gpu_apply_articulation_target_position(self) -> None:
        """Set every drive's target, as ManiSkill's CPU controllers do at each step (it keeps the robot awake)."""
        self._apply_targets(self._target, self._seen_target, velocity=False)

    def gpu_apply_articulation_target_velocity(self) -> None:
        self._apply_targets(self._target_velocity, self._seen_target_velocity, velocity=True)

    def _apply_targets(self, target: NDArray[np.float32], seen: NDArray[np.float32], *, velocity: bool) -> None:
        wanted = (target != seen).any(1) | self._driven
        set_targets = self._set_targets[velocity]
        if set_targets is not None:
            set_targets(self._joint_addresses, target, wanted)
        else:
            name = "set_drive_velocity_target" if velocity else "set_drive_target"
            for i in np.nonzero(wanted)[0].tolist():
                for joint, value in zip(self._joints[i], target[i].tolist(), strict=False):
                    getattr(joint, name)(value)
        np.copyto(seen, target)

    def gpu_update_articulation_kinematics(self) -> None:
        """Nothing to do: SAPIEN's CPU articulations move their links as soon as a joint is set."""

    def sync_poses_gpu_to_cpu(self) -> None:
        """Nothing to do: the scenes are on the CPU."""

    # ---- stepping ----------------------------------------------------------------------------------------------------
    def replace_system(self, scene: int, system: physx.PhysxCpuSystem) -> None:
        """Simulate environment `scene` by `system` from now on."""
        self.systems[scene] = system
        self._addresses = None

    def step(self) -> None:
        """Advance every scene by one time step."""
        self.step_many(1)

    def step_many(self, count: int) -> None:
        """Advance every scene by `count` time steps; scenes are spread over the threads."""
        self._contacts.forget_all()
        if self._advance is None:
            for system in self.systems:
                for _ in range(count):
                    system.step()
            return
        if self._addresses is None:
            self._addresses = addresses(self.systems, SYSTEM)
        where, advance = self._addresses, self._advance
        size = max(1, len(where) // (_PARTS_PER_THREAD * self._pool.size))
        parts = [where[i : i + size] for i in range(0, len(where), size)]
        self._pool.map(lambda part: advance(part, count), parts)

    # ---- contacts ----------------------------------------------------------------------------------------------------
    def get_contacts(self) -> list[Any]:
        """Return the contacts of all scenes."""
        return [contact for system in self.systems for contact in system.get_contacts()]

    def gpu_create_contact_pair_impulse_query(self, pairs: Sequence[tuple[Any, Any]]) -> ImpulseQuery:
        return self._contacts.watch_pairs(pairs)

    def gpu_create_contact_body_impulse_query(self, bodies: Sequence[Any]) -> ImpulseQuery:
        return self._contacts.watch_bodies(bodies)

    def gpu_query_contact_pair_impulses(self, query: ImpulseQuery) -> None:
        self._contacts.read(query)

    def gpu_query_contact_body_impulses(self, query: ImpulseQuery) -> None:
        self._contacts.read(query)
