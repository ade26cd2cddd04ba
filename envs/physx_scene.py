"""ManiSkill's scene over many PhysX CPU scenes: state through `PhysxCpuBatch`, pictures from one renderer per scene."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sapien
import sapien.physx as physx
import torch
from mani_skill.envs.scene import ManiSkillScene
from torch import Tensor

from .physx_cpu_system import Buffer, PhysxCpuBatch


class BatchedScene(ManiSkillScene):
    """A `ManiSkillScene` that takes ManiSkill's batched ("GPU") branches although its sub-scenes are on the CPU."""

    px: PhysxCpuBatch

    def __init__(self, sub_scenes: Sequence[sapien.Scene], **settings: Any) -> None:
        super().__init__(list(sub_scenes), **settings)
        self.px = PhysxCpuBatch([scene.physx_system for scene in sub_scenes])
        self.gpu_sim_enabled = True

    def renew(self, scenes: Tensor) -> None:
        """Move everything in `scenes` [N] bool into fresh PhysX scenes, about 0.4 ms each.

        A PhysX scene remembers: contact pairs keep their manifolds, and freed pair numbers come back in another order,
        which changes the next episode in the last bits. Bodies remember how long they have been at rest, which decides
        when they fall asleep. In a fresh scene, awake, an episode depends on its first state alone.
        """
        for i in scenes.nonzero().flatten().tolist():
            old = self.sub_scenes[i]
            system = physx.PhysxCpuSystem()
            system.timestep = self.px.timestep
            new = sapien.Scene([system, old.render_system] if self.can_render() else [system])
            entities = old.entities
            for entity in entities:
                old.remove_entity(entity)
            for entity in entities:
                new.add_entity(entity)
            for body in system.rigid_dynamic_components:
                if not body.kinematic:
                    body.wake_up()
            self.sub_scenes[i] = new
            self.px.replace_system(i, system)

    def _gpu_apply_all(self) -> None:
        self.px.apply_state()

    def _gpu_fetch_all(self) -> None:
        self.px.fetch()

    def add_camera(self, *args: Any, **kwargs: Any) -> Any:
        """Add one camera per sub-scene, mounted as on the CPU: it follows its entity, not a GPU buffer."""
        self.gpu_sim_enabled = False
        try:
            camera = super().add_camera(*args, **kwargs)
        finally:
            self.gpu_sim_enabled = True
        camera.camera_group = CameraGroup(camera._render_cameras)
        return camera

    def update_render(self, update_sensors: bool = True, update_human_render_cameras: bool = True) -> None:
        for scene in self.sub_scenes:
            scene.update_render()


class CameraGroup:
    """The same camera in every sub-scene, behind the surface of SAPIEN's camera groups."""

    def __init__(self, cameras: Sequence[Any]) -> None:
        self._cameras = list(cameras)

    def take_picture(self) -> None:
        for camera in self._cameras:
            camera.take_picture()

    def get_picture_cuda(self, name: str) -> Buffer:
        """Return texture `name` of all scenes, [N, Y, X, C]."""
        return Buffer(self._stack(name))

    def get_cuda_pictures(self, names: Sequence[str]) -> list[Buffer]:
        return [Buffer(self._stack(name)) for name in names]

    def _stack(self, name: str) -> Tensor:
        return torch.stack([torch.as_tensor(camera.get_picture(name)) for camera in self._cameras])
