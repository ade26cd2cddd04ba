"""Which Vulkan driver SAPIEN will find on this machine, chosen before SAPIEN is imported.

SAPIEN needs a device with `descriptorBindingPartiallyBound`. A machine with an NVIDIA driver, a hardware GPU or Mesa
24.3 or newer has one. Where the installed drivers offer none (a server without GPU, Mesa 22 of Debian 12), SwiftShader,
the software renderer that ships with Chromium, is selected with `VK_ICD_FILENAMES`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

USER_VARIABLES = ("VK_ICD_FILENAMES", "VK_DRIVER_FILES")
"""Set by a user who wants a particular driver; then nothing is chosen here."""

SWIFTSHADER_ICDS = (
    "/usr/lib/chromium/vk_swiftshader_icd.json",  # Debian: chromium-common
    "/usr/lib64/chromium-browser/vk_swiftshader_icd.json",
    "/usr/lib/chromium-browser/vk_swiftshader_icd.json",
    "/opt/google/chrome/vk_swiftshader_icd.json",
    "/opt/microsoft/msedge/vk_swiftshader_icd.json",
)
INSTALL_VULKAN = "sudo apt-get install -y --no-install-recommends libvulkan1 chromium-common"
"""Software rendering on Debian and Ubuntu; SwiftShader comes with Chromium's common files."""

VULKAN_1_1 = (1 << 22) | (1 << 12)
DEVICE_TYPE_CPU = 4


@dataclass(frozen=True, kw_only=True)
class VulkanDevice:
    """One device that the Vulkan loader lists."""

    name: str
    is_cpu: bool
    is_suitable: bool
    """Has the feature that SAPIEN's renderer asks for."""


@dataclass(frozen=True, kw_only=True)
class Vulkan:
    """What was found and chosen."""

    loader: str | None
    """The loader library: the system's, or the one inside SAPIEN's wheel."""
    chosen_by: Literal["user", "system", "sapien", "swiftshader", "nobody"]
    """Whose entry names the driver: the user's variable, the system's, SAPIEN's for NVIDIA, or Chromium's."""
    devices: tuple[VulkanDevice, ...] = ()

    @property
    def is_usable(self) -> bool:
        """Whether SAPIEN can be expected to render."""
        return any(device.is_suitable for device in self.devices)


@functools.cache
def prepare_vulkan() -> Vulkan:
    """Make a usable Vulkan driver visible to SAPIEN if one is installed, and say what was found.

    Call before `sapien` is imported. Sets `VK_ICD_FILENAMES` only if the user chose no driver, those that the system
    lists do not suffice, and another does. Child processes inherit the choice.
    """
    loader = find_loader()
    if sys.platform != "linux":
        return Vulkan(
            loader=loader, chosen_by="system", devices=(VulkanDevice(name="", is_cpu=False, is_suitable=True),)
        )
    if any(os.environ.get(name) for name in USER_VARIABLES):
        return Vulkan(loader=loader, chosen_by="user", devices=list_devices(loader))
    found = Vulkan(loader=loader, chosen_by="system", devices=list_devices(loader))
    if found.is_usable:
        return found
    for icd in filter(os.path.exists, [*_nvidia_icds(), *SWIFTSHADER_ICDS]):
        os.environ["VK_ICD_FILENAMES"] = icd
        owner: Literal["sapien", "swiftshader"] = "swiftshader" if icd in SWIFTSHADER_ICDS else "sapien"
        other = Vulkan(loader=loader, chosen_by=owner, devices=list_devices(loader))
        if other.is_usable:
            return other
        del os.environ["VK_ICD_FILENAMES"]
    return Vulkan(loader=loader, chosen_by="nobody", devices=found.devices)


def has_nvidia_driver() -> bool:
    """Whether the kernel has an NVIDIA driver loaded and this process may see a GPU."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/proc/driver/nvidia/version")


def find_loader() -> str | None:
    """Return the Vulkan loader: the system's `libvulkan.so.1`, else the one in SAPIEN's wheel, else None."""
    try:
        ctypes.CDLL("libvulkan.so.1")
        return "libvulkan.so.1"
    except OSError:
        bundled = _in_sapien("libvulkan.so.1*")
        return bundled[0] if bundled else None


def _nvidia_icds() -> list[str]:
    """Return the ICD for containers that have NVIDIA's driver, but not the file that tells the loader."""
    return _in_sapien("nvidia_icd.json") if has_nvidia_driver() else []


def _in_sapien(pattern: str) -> list[str]:
    """Return what matches in SAPIEN's `vulkan_library` folder, without importing SAPIEN."""
    spec = importlib.util.find_spec("sapien")
    folders = spec.submodule_search_locations if spec is not None else None
    return sorted(str(path) for path in Path(folders[0], "vulkan_library").glob(pattern)) if folders else []


def list_devices(loader: str | None) -> tuple[VulkanDevice, ...]:
    """Ask the loader for its devices, with the drivers that the environment selects now; none on any failure."""
    if loader is None:
        return ()
    try:
        library = ctypes.CDLL(loader)
    except OSError:
        return ()
    application = _ApplicationInfo(s_type=0, api_version=VULKAN_1_1)
    create = _InstanceCreateInfo(s_type=1, application=ctypes.addressof(application))
    instance = ctypes.c_void_p()
    if library.vkCreateInstance(ctypes.byref(create), None, ctypes.byref(instance)) != 0:
        return ()
    try:
        count = ctypes.c_uint32()
        library.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
        handles = (ctypes.c_void_p * count.value)()
        library.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), handles)
        return tuple(_describe(library, ctypes.c_void_p(handle)) for handle in handles)
    finally:
        library.vkDestroyInstance(instance, None)


def _describe(library: ctypes.CDLL, handle: ctypes.c_void_p) -> VulkanDevice:
    properties = _Properties()
    library.vkGetPhysicalDeviceProperties(handle, ctypes.byref(properties))
    suitable = False
    if properties.api_version >= VULKAN_1_1:
        indexing = _DescriptorIndexingFeatures(s_type=1000161001)
        features = _Features2(s_type=1000059000, next=ctypes.addressof(indexing))
        library.vkGetPhysicalDeviceFeatures2(handle, ctypes.byref(features))
        suitable = bool(indexing.descriptor_binding_partially_bound)
    name = properties.name.decode(errors="replace")
    return VulkanDevice(name=name, is_cpu=properties.device_type == DEVICE_TYPE_CPU, is_suitable=suitable)


class _ApplicationInfo(ctypes.Structure):  # VkApplicationInfo
    _fields_ = (
        ("s_type", ctypes.c_int32),
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("version", ctypes.c_uint32),
        ("engine", ctypes.c_char_p),
        ("engine_version", ctypes.c_uint32),
        ("api_version", ctypes.c_uint32),
    )


class _InstanceCreateInfo(ctypes.Structure):  # VkInstanceCreateInfo
    _fields_ = (
        ("s_type", ctypes.c_int32),
        ("next", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("application", ctypes.c_void_p),
        ("layer_count", ctypes.c_uint32),
        ("layers", ctypes.c_void_p),
        ("extension_count", ctypes.c_uint32),
        ("extensions", ctypes.c_void_p),
    )


class _Properties(ctypes.Structure):  # VkPhysicalDeviceProperties; its limits follow and are not read
    _fields_ = (
        ("api_version", ctypes.c_uint32),
        ("driver_version", ctypes.c_uint32),
        ("vendor", ctypes.c_uint32),
        ("device", ctypes.c_uint32),
        ("device_type", ctypes.c_uint32),
        ("name", ctypes.c_char * 256),
        ("rest", ctypes.c_uint64 * 128),
    )


class _Features2(ctypes.Structure):  # VkPhysicalDeviceFeatures2
    _fields_ = (("s_type", ctypes.c_int32), ("next", ctypes.c_void_p), ("features", ctypes.c_uint32 * 55))


class _DescriptorIndexingFeatures(ctypes.Structure):  # VkPhysicalDeviceDescriptorIndexingFeatures
    _fields_ = (
        ("s_type", ctypes.c_int32),
        ("next", ctypes.c_void_p),
        ("before", ctypes.c_uint32 * 17),
        ("descriptor_binding_partially_bound", ctypes.c_uint32),
        ("after", ctypes.c_uint32 * 2),
    )
