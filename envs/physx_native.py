"""SAPIEN's own C++ methods, called from compiled code: no Python's global lock, no Python call per object.

SAPIEN's method `System.step` keeps the lock: two threads that call it take turns and are no faster than one. The C++
methods behind it and others are exported by SAPIEN's own library, and pybind11 hands out an object's address to those
who know its type (`_pybind11_conduit_v1_`). Calling one with the other from compiled code needs no lock. Scenes share
nothing, so each gives the same numbers to the last bit. Where the library exports less (not on Linux), the same is done
through Python.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
import sapien
from numba import types
from numpy.typing import NDArray

_STEP = "_ZN6sapien5physx14PhysxSystemCpu4stepEv"
_SET_TARGET = "_ZN6sapien5physx22PhysxArticulationJoint22setDriveTargetPositionEf"
_SET_TARGET_VELOCITY = "_ZN6sapien5physx22PhysxArticulationJoint22setDriveTargetVelocityEf"
_GET_POSE = "_ZNK6sapien6Entity7getPoseEv"
_TYPE_INFO = "_ZTIN6sapien5physx14PhysxSystemCpuE"
_ABI = b"system_libstdcpp_gxx_abi_1xxx_use_cxx11_abi_1"
"""pybind11's name for how SAPIEN was built; with another one the addresses are not handed out."""
SYSTEM = b"N6sapien5physx14PhysxSystemCpuE"
JOINT = b"N6sapien5physx22PhysxArticulationJointE"
ENTITY = b"N6sapien6EntityE"
"""Classes, as C++ names them."""

Compiled = Any


@functools.cache
def advance_without_lock() -> Compiled | None:
    """Return compiled (addresses [K] int64, count) -> None, or None where SAPIEN's library lacks what it needs.

    It advances the systems at `addresses` by `count` time steps each.
    """
    step = _external(_STEP, types.void(types.intp))
    if step is None:
        return None

    @numba.njit(nogil=True)
    def advance(addresses: NDArray[np.int64], count: int) -> None:
        for address in addresses:
            for _ in range(count):
                step(address)

    return advance


@functools.cache
def drive_setter(velocity: bool) -> Compiled | None:
    """Return compiled (addresses [A, D] int64, values [A, D] float32, wanted [A] bool) -> None, or None.

    It sets the drive targets (positions, or velocities) of the joints at `addresses`, where these are not 0.
    """
    set_target = _external(_SET_TARGET_VELOCITY if velocity else _SET_TARGET, types.void(types.intp, types.float32))
    if set_target is None:
        return None

    @numba.njit(nogil=True)
    def set_targets(addresses: NDArray[np.int64], values: NDArray[np.float32], wanted: NDArray[np.bool_]) -> None:
        for a in range(addresses.shape[0]):
            for k in range(addresses.shape[1]):
                if wanted[a] and addresses[a, k] != 0:
                    set_target(addresses[a, k], values[a, k])

    return set_targets


@functools.cache
def _pose_reader() -> Compiled | None:
    """Return compiled (addresses [K] int64, out [K, 7] float32) -> None, or None: writes the poses of entities."""
    get_pose = _external(_GET_POSE, types.void(types.intp, types.intp))  # a struct of 28 bytes is returned by address
    if get_pose is None:
        return None

    @numba.njit(nogil=True)
    def read(addresses: NDArray[np.int64], out: NDArray[np.float32]) -> None:
        pose = np.empty(7, np.float32)  # quaternion, position
        for i in range(len(addresses)):
            get_pose(pose.ctypes.data, addresses[i])
            for k in range(7):
                out[i, k] = pose[(k + 4) % 7]

    return read


class EntityPoses:
    """The poses of `entities`, as SAPIEN tells them, to the last bit."""

    def __init__(self, entities: Sequence[Any]) -> None:
        self._entities = list(entities)  # which keeps the addresses valid
        self._read = _pose_reader()
        if self._read is not None:
            self._addresses = addresses(self._entities, ENTITY)
            if not np.array_equal(self.read(), self._ask()):
                self._read = None  # poses are laid out in another way

    def read(self) -> NDArray[np.float32]:
        """Return the poses [K, 7], as ManiSkill writes them."""
        if self._read is None:
            return self._ask()
        out = np.empty((len(self._entities), 7), np.float32)
        self._read(self._addresses, out)
        return out

    def _ask(self) -> NDArray[np.float32]:
        poses = [entity.pose for entity in self._entities]
        return np.concatenate([part for pose in poses for part in (pose.p, pose.q)]).reshape(-1, 7)


def addresses(objects: Sequence[Any], kind: bytes) -> NDArray[np.int64]:
    """Return where the C++ objects behind `objects` of class `kind` are; valid as long as they live."""
    api = ctypes.pythonapi
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    info, _ = _type_info(kind)
    key = api.PyCapsule_New(ctypes.addressof(info), b"St9type_info", None)
    found = []
    for thing in objects:
        capsule = thing._pybind11_conduit_v1_(_ABI, key, b"raw_pointer_ephemeral")
        found.append(api.PyCapsule_GetPointer(capsule, kind))
    return np.array(found, np.int64)


@functools.cache
def _type_info(kind: bytes) -> tuple[Any, Any]:
    """Return a `std::type_info` of class `kind`, and its name to keep; such objects are equal if their names are."""
    name = ctypes.create_string_buffer(kind)
    table = ctypes.c_void_p.in_dll(_require_library(), _TYPE_INFO).value
    return (ctypes.c_void_p * 2)(table, ctypes.addressof(name)), name


def _external(name: str, signature: Any) -> Any | None:
    library = _library()
    if library is None or not all(hasattr(library, symbol) for symbol in (name, _TYPE_INFO)):
        return None
    llvmlite.binding.load_library_permanently(library._name)
    return types.ExternalFunction(name, signature)


@functools.cache
def _library() -> ctypes.CDLL | None:
    files = sorted((Path(sapien.__file__).parent.parent / "sapien.libs").glob("libsapien*.so*"))
    return ctypes.CDLL(str(files[0])) if files else None


def _require_library() -> ctypes.CDLL:
    library = _library()
    assert library is not None
    return library
