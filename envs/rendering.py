"""Loading SAPIEN and ManiSkill quietly, and pictures from whatever Vulkan device the machine has, or none.

State observations never touch Vulkan: scenes that are not rendered are built with inert stand-ins for materials and
visual shapes, on every machine, so training and evaluation behave alike with and without a graphics driver.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from robopolicy.errors import MissingRequirementError

from .shaders import fast_shaders
from .vulkan import INSTALL_VULKAN, Vulkan, prepare_vulkan

__all__ = [
    "inert_materials",
    "load_maniskill",
    "prepare_vulkan",
    "quiet_drivers",
    "render_backend",
    "renders_in_software",
    "require_rendering",
]

SOFTWARE = "software"
"""Our name in ManiSkill's table of render backends for the device that is no CUDA device."""

_KEPT: list[Any] = []
"""Keeps SAPIEN's table of devices alive."""

DRIVER_NOISE = re.compile(
    rb"third_party/swiftshader/.*(WARNING|UNSUPPORTED)|Failed to find (system libvulkan|Vulkan ICD|glvnd)"
)
STAND_INS = re.compile(r"RenderMaterial$|RenderTexture(2D)?$|RenderShape")


@functools.cache
def load_maniskill() -> Vulkan:
    """Import SAPIEN and ManiSkill with a usable Vulkan driver and without their warnings; about 3 s, once a process.

    Also makes ManiSkill refuse to prompt for downloads (it would wait on stdin, then exit the process).
    """
    vulkan = prepare_vulkan()
    os.environ.setdefault("MS_RENDERER_LOG_LEVEL", "error")
    with quiet_drivers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import gymnasium
        import sapien

        # Drivers complain when the first device appears, and again after the last one is gone.
        _KEPT.append(sapien.Device("cpu"))
        import mani_skill.envs  # noqa: F401 (registers the environments)
        from mani_skill.utils import download_asset

        from . import two_goal  # noqa: F401 (registers ours)

    gymnasium.logger.min_level = max(gymnasium.logger.min_level, gymnasium.logger.ERROR)
    logging.getLogger("mani_skill ").setLevel(logging.ERROR)  # the space is in ManiSkill's own name
    download_asset.prompt_yes_no = _refuse_download
    _guard_push_t()
    return vulkan


@functools.cache
def render_backend() -> str | None:
    """Return ManiSkill's name of the device that renders here: `sapien_cuda`, `software`, or None where nothing can."""
    vulkan = load_maniskill()
    if not vulkan.is_usable:
        return None
    import sapien
    from mani_skill.envs.utils.system import backend

    hardware = sorted({os.path.basename(os.path.realpath(path)) for path in glob.glob("/sys/class/drm/card*/device")})
    with quiet_drivers():
        for name in ("cuda", *(f"pci:{slot}" for slot in hardware if ":" in slot), "pci:0"):
            try:
                device = sapien.Device(name)
            except RuntimeError:  # no such device
                continue
            if device.can_render():
                # ManiSkill splits names at the colon; through its own table a name with a colon arrives whole.
                if name == "cuda":
                    return "sapien_cuda"
                backend.render_backend_name_mapping[SOFTWARE] = name
                if any(d.is_cpu for d in vulkan.devices):
                    _use_fast_shaders()
                return SOFTWARE
    return None


def renders_in_software() -> bool:
    """Whether pictures are drawn by the processor."""
    return render_backend() == SOFTWARE and any(device.is_cpu for device in load_maniskill().devices)


def require_rendering() -> str:
    """Return `render_backend()`.

    Raises:
        MissingRequirementError: nothing can render here; names the command that installs a driver.
    """
    backend = render_backend()
    if backend is None:
        raise MissingRequirementError(
            "Rendering needs a Vulkan driver that SAPIEN can use, and this machine has none. "
            f"On Debian or Ubuntu: {INSTALL_VULKAN}\n"
            "State observations (obs_mode=state, no video) work without."
        )
    return backend


@contextlib.contextmanager
def inert_materials() -> Iterator[None]:
    """Within the block, SAPIEN's materials and visual shapes are empty objects, so that no Vulkan device is needed.

    For building scenes with `render_backend="none"`, where ManiSkill makes them and throws them away. Not for threads.
    """
    load_maniskill()
    import sapien.render

    replaced: list[tuple[Any, str, Any]] = []
    modules = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] in ("sapien", "mani_skill")]
    for name in filter(STAND_INS.match, dir(sapien.render)):
        real = getattr(sapien.render, name)
        replaced += [(module, name, real) for module in modules if vars(module).get(name) is real]
    stand_ins = {name: type(name, (_Inert,), {}) for name in {name for _, name, _ in replaced}}
    for module, name, _ in replaced:
        setattr(module, name, stand_ins[name])
    try:
        yield
    finally:
        for module, name, real in replaced:
            setattr(module, name, real)


@contextlib.contextmanager
def quiet_drivers() -> Iterator[None]:
    """Drop the known noise that drivers write straight to file descriptor 2; all else appears when the block ends."""
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, ValueError, AttributeError):  # no stderr at all
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            for line in held:
                if not DRIVER_NOISE.search(line):
                    os.write(2, line)


class _Inert:
    """Accepts what a material or a visual shape accepts, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def _use_fast_shaders() -> None:
    import sapien
    from sapien.pysapien import render

    folder = fast_shaders(Path(sapien.__file__).parent / "vulkan_shader", sapien.__version__)
    render._internal_set_shader_search_path(str(folder))


def _refuse_download(message: str) -> bool:
    raise MissingRequirementError(
        f"{message.split(' Would you')[0]} Download them with: python -m mani_skill.utils.download_asset <name>"
    )


def _guard_push_t() -> None:
    """Let PushT's table keep its texture where it has no visual shape to repaint."""
    from mani_skill.envs.tasks.tabletop import push_t

    table = push_t.WhiteTableSceneBuilder
    paint = table.build

    def build(self: Any) -> None:
        if self.scene.can_render():
            paint(self)
        else:
            super(table, self).build()

    table.build = build
