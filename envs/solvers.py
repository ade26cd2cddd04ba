"""ManiSkill's motion-planning solvers as sources of joint-space plans.

A solver drives a stock environment in `pd_joint_pos`; here its commands are written down as a `Plan` and nothing else
is kept, so that the same plan can be played back under any controller and observed in any way (playback.py).
"""

from __future__ import annotations

import ctypes
import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from robopolicy.errors import RobopolicyError, UnknownNameError

SOLVERS: dict[str, str] = {
    "DrawTriangle-v1": "solveDrawTriangle",
    "LiftPegUpright-v1": "solveLiftPegUpright",
    "PegInsertionSide-v1": "solvePegInsertionSide",
    "PickCube-v1": "solvePickCube",
    "PlaceSphere-v1": "solvePlaceSphere",
    "PlugCharger-v1": "solvePlugCharger",
    "PullCube-v1": "solvePullCube",
    "PullCubeTool-v1": "solvePullCubeTool",
    "PushCube-v1": "solvePushCube",
    "StackCube-v1": "solveStackCube",
    "StackPyramid-v1": "solveStackPyramid",
    "TwoGoalReach-v1": "two_goal:solve",
}
"""Environment id to the function that solves it: of `mani_skill.examples.motionplanning.panda.solutions`, or of the
module of ours that stands before the colon."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a solver commanded, one row per control step of its own slow execution."""

    qpos: np.ndarray
    """[T, J] float64 arm joint targets, rad."""
    gripper: np.ndarray
    """[T, G] float64 gripper commands in action units (G is 0 for robots without a gripper)."""
    success: bool
    """Whether the solver's own execution ended in success."""

    def __len__(self) -> int:
        return len(self.qpos)


class PlanningFailed(RobopolicyError):
    """The solver found no motion for this seed; another seed may work."""


def solver_for(env_id: str) -> Callable[..., Any]:
    """Return the solver of `env_id`.

    Raises:
        UnknownNameError: no solver exists; the message lists the environments that have one.
    """
    if env_id not in SOLVERS:
        raise UnknownNameError("environment with a motion-planning solver", env_id, SOLVERS)
    ours, _, name = SOLVERS[env_id].rpartition(":")
    if ours:
        return getattr(importlib.import_module(f".{ours}", __package__), name)
    repair_mplib()
    solutions = importlib.import_module("mani_skill.examples.motionplanning.panda.solutions")
    return getattr(solutions, name)


def make_plan(env: Any, solve: Callable[..., Any], seed: int) -> Plan:
    """Run `solve` on `env` (stock, one scene, `pd_joint_pos`) from the initial state of `seed` and record its commands.

    Raises:
        PlanningFailed: the solver gave up, raised, or commanded nothing.
    """
    _seed_planners(seed)
    recorder = _CommandRecorder(env)
    try:
        result = solve(recorder, seed=seed, debug=False, vis=False)
    except Exception as error:  # solvers raise whatever their planner raises; every kind means "no motion found"
        raise PlanningFailed(f"solver raised {type(error).__name__}: {error}") from error
    if isinstance(result, int) or not recorder.actions:
        raise PlanningFailed("solver found no path")
    actions = np.stack(recorder.actions).astype(np.float64)
    arm_dim = env.unwrapped.agent.controller.controllers["arm"].single_action_space.shape[0]
    success = bool(env.unwrapped.evaluate()["success"].item())
    return Plan(qpos=actions[:, :arm_dim], gripper=actions[:, arm_dim:], success=success)


class _CommandRecorder:
    """Looks like the environment to a solver; steps physics without observation, reward and success of each step.

    Resets rebuild the scene: contacts of the episode before would otherwise leave traces in the last digits.
    """

    def __init__(self, env: Any) -> None:
        self.unwrapped = env.unwrapped
        self.actions: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, **_: Any) -> Any:
        self.actions.clear()
        return self.unwrapped.reset(seed=seed, options={"reconfigure": True})

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.actions.append(np.asarray(action).copy())
        self.unwrapped._step_action(np.asarray(action, dtype=np.float32))
        self.unwrapped._elapsed_steps += 1
        return {}, 0.0, False, False, {}


def repair_mplib() -> None:
    """Make mplib 0.1 usable with numpy 2, in this process only.

    mplib 0.1 was built with a pybind11 that calls PyArray_CopyInto through slot 82 of numpy's C function table; numpy 2
    left only its alias in slot 50, so that building a planner jumps to address zero. Filling the empty slot with the
    alias repairs it; a filled slot is left alone. Source: pybind11/numpy.h, `npy_api` ("NumPy 2 removed 82").
    """
    if int(np.__version__.split(".")[0]) < 2:
        return
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule = importlib.import_module("numpy._core.multiarray")._ARRAY_API
    table = ctypes.cast(get_pointer(capsule, None), ctypes.POINTER(ctypes.c_void_p))
    if not table[82]:
        table[82] = table[50]


def _seed_planners(seed: int) -> None:
    """Pin what planners draw: numpy, and C's `rand` behind mplib's inverse kinematics (OMPL's RRT cannot be seeded)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    ctypes.CDLL(None).srand(seed % 2**32)
