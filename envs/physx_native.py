"""Steps PhysX scenes without Python's global lock, so that threads really run side by side.

SAPIEN's method `System.step` keeps the lock: two threads that call it take turns and are no faster than one. The C++
method behind it is exported by SAPIEN's own library, and pybind11 hands out the object's address to those who know its
type (`_pybind11_conduit_v1_`). Calling one with the other from compiled code needs no lock. Scenes share nothing, so
each gives the same numbers to the last bit.
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
"""`sapien::physx::PhysxSystemCpu::step()`."""
_TYPE_INFO = "_ZTIN6sapien5physx14PhysxSystemCpuE"
_ABI = b"system_libstdcpp_gxx_abi_1xxx_use_cxx11_abi_1"
"""pybind11's name for how SAPIEN was built; with another one the addresses are not handed out."""

Advance = Any
"""Compiled (addresses [K] int64, count) -> None: advance the scenes at `addresses` by `count` time steps each."""


@functools.cache
def advance_without_lock() -> Advance | None:
    """Return the compiled stepper, or None where SAPIEN's library does not export what it needs (not on Linux)."""
    library = _library()
    if library is None or not hasattr(library, _STEP):
        return None
    llvmlite.binding.load_library_permanently(library._name)
    step = types.ExternalFunction(_STEP, types.void(types.intp))

    @numba.njit(nogil=True)
    def advance(addresses: NDArray[np.int64], count: int) -> None:
        for address in addresses:
            for _ in range(count):
                step(address)

    return advance


def addresses(systems: Sequence[Any]) -> NDArray[np.int64]:
    """Return where the C++ objects of `systems` (`PhysxCpuSystem`) are; valid as long as the systems live."""
    library = _library()
    assert library is not None
    api = ctypes.pythonapi
    api.PyCapsule_New.restype = ctypes.py_object
    api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    kind = ctypes.addressof(ctypes.c_void_p.in_dll(library, _TYPE_INFO))
    key = api.PyCapsule_New(kind, b"St9type_info", None)
    found = []
    for system in systems:
        capsule = system._pybind11_conduit_v1_(_ABI, key, b"raw_pointer_ephemeral")
        found.append(api.PyCapsule_GetPointer(capsule, _TYPE_INFO[4:].encode()))
    return np.array(found, np.int64)


@functools.cache
def _library() -> ctypes.CDLL | None:
    files = sorted((Path(sapien.__file__).parent.parent / "sapien.libs").glob("libsapien*.so*"))
    return ctypes.CDLL(str(files[0])) if files else None
