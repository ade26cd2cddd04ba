"""The few places where ManiSkill itself has to know that its batched code may run on the CPU.

Each patch leaves every other simulation alone: it looks whether the scene is a `BatchedScene` and otherwise calls the
original. They are installed once, when the first batched environment is made, and only into the versions they were
written for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.agents.controllers.base_controller import BaseController
from mani_skill.agents.controllers.pd_ee_pose import PDEEPosController
from mani_skill.agents.robots.panda.panda import Panda
from mani_skill.utils.structs.actor import Actor
from mani_skill.utils.structs.articulation import Articulation
from mani_skill.utils.structs.articulation_joint import ArticulationJoint
from mani_skill.utils.structs.base import PhysxRigidBodyComponentStruct
from mani_skill.utils.structs.link import Link
from mani_skill.utils.structs.pose import Pose
from torch import Tensor

from robopolicy.errors import MissingRequirementError

from .physx_controllers import end_effector_at_base, set_end_effector_action
from .physx_grasp import is_grasping
from .physx_scene import BatchedScene

TESTED = {"mani_skill": ("3.0.1", "3.1"), "sapien": ("3.0.3", "3.1")}
"""Package to the first version these patches fit and the first that they may not fit."""


def require_versions() -> None:
    """Raise MissingRequirementError unless ManiSkill and SAPIEN are versions that the batched CPU simulation fits."""
    for package, (first, after) in TESTED.items():
        found = version(package)
        if not _numbers(first) <= _numbers(found) < _numbers(after):
            raise MissingRequirementError(
                f"The batched CPU simulation patches {package} and fits {first} <= version < {after}; {found} is "
                f"installed. Install a fitting one with: pip install '{package}>={first},<{after}', or use backend "
                "'single' or 'cuda'."
            )


@functools.cache
def install() -> None:
    """Patch ManiSkill, once per process.

    Raises:
        MissingRequirementError: a version these patches were not written for.
    """
    require_versions()
    # Where a body or articulation stands in the buffers: SAPIEN's CPU components refuse to tell a GPU index.
    _replace_cached(PhysxRigidBodyComponentStruct, "_body_data_index", lambda s: s.px.body_rows(s._bodies))
    _replace_cached(Articulation, "_data_index", lambda s: s.px.articulation_rows(s._objs))
    _replace_cached(ArticulationJoint, "_data_index", lambda s: s.px.articulation_rows(s._physx_articulations))
    # Velocities of links are read only if somebody reads them, which ManiSkill does through this property. (It also
    # stores the buffer's name at construction, and only for objects on a PhysxGpuSystem.)
    _replace_property(PhysxRigidBodyComponentStruct, "_body_data", lambda s: s.px.body_data(s._bodies))
    # Poses without ManiSkill's conversions, the same numbers in a third of the time; hidden actors keep their pose,
    # since they are hidden by visibility.
    _replace_property(Link, "pose", _body_pose)
    _replace_property(Actor, "pose", _actor_pose, _set_actor_pose)
    # The GPU simulation hides an actor by moving it away; scenes on the CPU have real visibility.
    _replace_method(Actor, "hide_visual", functools.partial(_set_visible, visible=False))
    _replace_method(Actor, "show_visual", functools.partial(_set_visible, visible=True))
    # On the GPU one Newton step replaces inverse kinematics; here the CPU's solver runs for the whole batch.
    _replace_method(PDEEPosController, "set_action", set_end_effector_action)
    # ... and it starts from SAPIEN's own pose of the link, equal to the last bit to the CPU simulation's.
    _replace_property(PDEEPosController, "ee_pose_at_base", end_effector_at_base)
    # Drive targets stand in the buffers at once, without four index operations to find that no robot is left out.
    for name, buffer in _TARGETS.items():
        _replace_method(Articulation, name, functools.partial(_set_joint_targets, buffer=buffer))
    # The same arithmetic without what is the same at every step.
    _replace_method(BaseController, "_clip_and_scale_action", _clip_and_scale)
    # The same test of the same forces, compiled: it was a third of everything a step does beside PhysX.
    _replace_method(Panda, "is_grasping", is_grasping)


def _is_batched(thing: Any) -> bool:
    return isinstance(thing.scene, BatchedScene)


def _replace_cached(owner: type, name: str, batched: Callable[[Any], Any]) -> None:
    original: cached_property[Any] = vars(owner)[name]

    def value(self: Any) -> Any:
        return batched(self) if _is_batched(self) else original.func(self)

    replacement = cached_property(value)
    replacement.__set_name__(owner, name)
    setattr(owner, name, replacement)


def _replace_property(
    owner: type, name: str, read: Callable[[Any], Any], write: Callable[[Any, Any], bool] | None = None
) -> None:
    """Replace a property's getter, and its setter if `write` is given; `write` returns false to use the original."""
    original: property = vars(owner)[name]

    def getter(self: Any) -> Any:
        return read(self) if _is_batched(self) else original.fget(self)  # type: ignore[misc]

    def setter(self: Any, value: Any) -> None:
        if write is None or not _is_batched(self) or not write(self, value):
            original.fset(self, value)  # type: ignore[misc]

    setattr(owner, name, property(getter, setter if original.fset is not None else None, doc=original.__doc__))


def _replace_method(owner: type, name: str, batched: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (batched if _is_batched(self) else original)(self, *args, **kwargs)

    setattr(owner, name, method)


def _body_pose(self: Any) -> Pose:
    return Pose(self.px.body_poses.index_select(0, self._body_data_index))


def _actor_pose(self: Any) -> Pose:
    return self.initial_pose if self.px_body_type == "static" else _body_pose(self)


def _set_actor_pose(self: Any, value: Any) -> bool:
    if not self.hidden:
        return False
    self.hidden = False  # else ManiSkill would set aside the pose until the actor is shown
    try:
        self.pose = value
    finally:
        self.hidden = True
    return True


_TARGETS = {
    "set_joint_drive_targets": "cuda_articulation_target_qpos",
    "set_joint_drive_velocity_targets": "cuda_articulation_target_qvel",
}


def _set_joint_targets(self: Any, targets: Any, joints: Any = None, joint_indices: Any = None, *, buffer: str) -> None:
    chosen = joint_indices if joints is None else joints
    places = self.__dict__.setdefault("_target_places", {})
    if id(chosen) not in places:  # the list itself is kept, too: its id belongs to nothing else
        places[id(chosen)] = (*(x.numpy() for x in self.get_joint_target_indices(chosen)), chosen)
    rows, columns, _ = places[id(chosen)]
    mask = self.scene._reset_mask
    if not mask.all():
        inside = mask[self._scene_idxs].numpy()
        rows, columns = rows[inside], columns[inside]
    getattr(self.px, buffer).torch().numpy()[rows, columns] = np.asarray(targets)


def _clip_and_scale(self: Any, action: Tensor) -> Tensor:
    if "_scale" not in self.__dict__:
        low, high = self.action_space_low, self.action_space_high
        self._scale = 0.5 * (high + low), 0.5 * (high - low)
    middle, half = self._scale
    return middle + half * torch.clip(action, -1, 1)


def _set_visible(self: Any, *, visible: bool) -> None:
    assert not self.has_collision_shapes
    for entity in self._objs:
        body = entity.find_component_by_type(sapien.render.RenderBodyComponent)
        if body is not None:
            body.visibility = float(visible)
    self.hidden = not visible


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in text.split(".")[:3])
