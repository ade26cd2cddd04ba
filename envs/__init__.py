"""Simulated tasks: `make` builds a batch of environments, `task_spec` describes one without building it.

Importing this package imports neither SAPIEN nor ManiSkill; `load_maniskill` does, with a Vulkan driver chosen first.
"""

from .backends import BACKENDS, default_backend
from .rendering import load_maniskill, prepare_vulkan, render_backend
from .specs import require_assets, task_spec
from .tasks import TASKS, Task, find_task
from .vector import SimVectorEnv, make

__all__ = [
    "BACKENDS",
    "TASKS",
    "SimVectorEnv",
    "Task",
    "default_backend",
    "find_task",
    "load_maniskill",
    "make",
    "prepare_vulkan",
    "render_backend",
    "require_assets",
    "task_spec",
]
