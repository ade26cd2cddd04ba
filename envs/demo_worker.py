"""Makes one demonstration at a time: plans it (or reads it from a file), plays it back, keeps it if it succeeds.

`serve` is the body of a worker process: it takes keys from a pipe, writes the journal, and answers with what became of
each.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from robopolicy.errors import RobopolicyError

from .backends import building
from .demo_files import Attempt, Episode, Journal, leaves, read_all, read_tree, stack
from .playback import ActionOutOfRange, ArmCommand, PlanPlayer, Shortening
from .rendering import inert_materials, load_maniskill, require_rendering
from .solvers import Plan, PlanningFailed, make_plan, solver_for
from .specs import ObsMode, build_stock

CLIP_TOLERANCE = 1e-5
"""Rounding by which an action may exceed its bounds; it is then set to the bound."""

MOST_TIMES_LONGER = 3
"""A playback that takes this many times the steps of its plan is stuck."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a worker must know; equal recipes make equal demonstrations."""

    env_id: str
    control_mode: str
    obs_mode: str
    shortening: Shortening
    source: str | None = None
    """A ManiSkill trajectory file whose episodes are replayed; None to plan."""
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the environment, `robot_uids` of a source file for example."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """How an episode begins."""

    seed: int
    reset_kwargs: Mapping[str, Any]
    env_state: Mapping[str, Any] | None = None


class Rejected(Exception):
    """This attempt is no demonstration; the message is the reason that is counted."""


class Demonstrator:
    """The two environments of a worker: one in which a motion is found, one in which it is played and recorded."""

    def __init__(self, recipe: Recipe) -> None:
        load_maniskill()
        self.recipe = recipe
        observed = ObsMode.parse(recipe.obs_mode)
        pictures = require_rendering() if observed.pictures else "none"
        common = {"reward_mode": "none", "sim_backend": "physx_cpu", "num_envs": 1, **recipe.env_kwargs}
        with building(rendered=observed.pictures, observed=observed.pictures):
            self.env = build_stock(
                recipe.env_id,
                **observed.settings,
                control_mode=recipe.control_mode,
                render_backend=pictures,
                **common,
            )
        self.rendered = observed.pictures
        self.file: h5py.File | None = None
        planning_mode = "pd_joint_pos"
        if recipe.source is None:
            self.solve = solver_for(recipe.env_id)
        else:
            self.file = h5py.File(recipe.source, "r")
            self.episodes = json.loads(Path(recipe.source).with_suffix(".json").read_text())["episodes"]
            planning_mode = self.episodes[0]["control_mode"]
        with building(rendered=False):
            self.planner = build_stock(
                recipe.env_id, obs_mode="none", control_mode=planning_mode, render_backend="none", **common
            )

    def demonstrate(self, key: int) -> Episode:
        """Return the demonstration of seed `key`, or of episode `key` of the source file.

        Raises:
            Rejected: there is none, with the reason.
        """
        if self.file is None:
            start = Start(seed=key, reset_kwargs={"seed": key, "options": {}})
            return self._play_gently(start, self._plan(start))
        start, actions = self._read_source(key)
        if self.planner.control_mode == self.recipe.control_mode:
            recorded = self.file[f"traj_{self.episodes[key]['episode_id']}"]
            if self.rendered and _tells_all(recorded, len(actions)):
                return self.photograph(start, recorded)
            return self.play(start, actions, self.recipe.shortening)
        return self._play_gently(start, self._trace(start, actions))

    def _play_gently(self, start: Start, plan: Plan) -> Episode:
        """Play `plan` with the first level of shortening that succeeds; the last one's reason is raised."""
        *faster, last = self.recipe.shortening.levels()
        for options in faster:
            with contextlib.suppress(Rejected):
                return self.play(start, plan, options)
        return self.play(start, plan, last)

    def play(self, start: Start, motion: Plan | np.ndarray, options: Shortening) -> Episode:
        """Execute `motion` (a plan, or actions [T, A] as they are) from `start` and return what was seen.

        Raises:
            Rejected: no lasting success, or an action that is not finite or out of range.
        """
        obs = self._reset(start)
        observations, states = [_to_numpy(obs)], [_to_numpy(self.env.get_state_dict())]
        actions: list[np.ndarray] = []
        outcomes: dict[str, list[bool]] = {"terminated": [], "truncated": [], "success": []}
        commands = _Commands(self.env, motion, options)
        streak = 0
        while streak <= options.hold_steps:
            if commands.exhausted:
                raise Rejected("no lasting success")
            action = self._checked(commands.next())
            obs, _, terminated, truncated, info = self.env.step(action)
            actions.append(action)
            observations.append(_to_numpy(obs))
            states.append(_to_numpy(self.env.get_state_dict()))
            outcomes["terminated"].append(bool(terminated.item()))
            outcomes["truncated"].append(bool(np.asarray(truncated).item()))
            for name in ("success", "fail"):
                if name in info:
                    outcomes.setdefault(name, []).append(bool(info[name].item()))
            streak = streak + 1 if outcomes["success"][-1] else 0
        episode = Episode(
            seed=start.seed,
            reset_kwargs=start.reset_kwargs,
            obs=stack(observations),
            env_states=stack(states),
            actions=np.stack(actions),
            outcomes={name: np.array(values, dtype=bool) for name, values in outcomes.items()},
            plan_steps=len(motion),
        )
        if not all(np.isfinite(v).all() for _, v in leaves(episode.obs) if v.dtype.kind == "f"):
            raise Rejected("observation not finite")
        return episode

    def photograph(self, start: Start, recorded: h5py.Group) -> Episode:
        """Return the recorded episode with pictures of its states; nothing is simulated anew, all else stays as it was.

        Raises:
            Rejected: the recorded episode is no success.
        """
        outcomes = {n: recorded[n][:] for n in ("terminated", "truncated", "success", "fail") if n in recorded}
        if not outcomes["success"][-1]:
            raise Rejected("source fails")
        self._reset(start)
        pictures = []
        for step in range(len(outcomes["success"]) + 1):
            self.env.set_state_dict(read_tree(recorded["env_states"], step))
            seen = _to_numpy(self.env.get_obs())
            pictures.append({name: seen[name] for name in ("sensor_param", "sensor_data")})
        return Episode(
            seed=start.seed,
            reset_kwargs=start.reset_kwargs,
            obs={**{name: read_all(recorded["obs"][name]) for name in ("agent", "extra")}, **stack(pictures)},
            env_states=read_all(recorded["env_states"]),
            actions=recorded["actions"][:].astype(np.float32),
            outcomes=outcomes,
            plan_steps=len(recorded["actions"]),
        )

    def _plan(self, start: Start) -> Plan:
        try:
            with inert_materials():
                plan = make_plan(self.planner, self.solve, start.seed)
        except PlanningFailed as error:
            raise Rejected("no motion found") from error
        if not plan.success:
            raise Rejected("solver's motion fails")
        return plan

    def _trace(self, start: Start, actions: np.ndarray) -> Plan:
        """Return the joint targets that `actions` [T, A] of the source's controller set, step by step."""
        env = self.planner
        with inert_materials():
            env.reset(**_anew(start))
        _set_state(env, start)
        arm = env.agent.controller.controllers["arm"]
        width = arm.single_action_space.shape[0]
        targets = []
        for action in actions:
            env._step_action(action)
            env._elapsed_steps += 1
            reached = arm._target_qpos if getattr(arm, "_target_qpos", None) is not None else arm.qpos
            targets.append(np.asarray(reached[0].cpu(), dtype=np.float64))
        return Plan(qpos=np.stack(targets), gripper=actions[:, width:].astype(np.float64), success=True)

    def _reset(self, start: Start) -> Any:
        with building(rendered=self.rendered, observed=self.rendered):
            obs, _ = self.env.reset(**_anew(start))
        return obs if start.env_state is None else _set_state(self.env, start)

    def _checked(self, action: np.ndarray) -> np.ndarray:
        """Return `action` [A] float32 within the bounds of the controller."""
        space = self.env.single_action_space
        if not np.isfinite(action).all():
            raise Rejected("action not finite")
        if (action < space.low - CLIP_TOLERANCE).any() or (action > space.high + CLIP_TOLERANCE).any():
            raise Rejected("action out of range")
        return np.clip(action.astype(np.float32), space.low, space.high)

    def _read_source(self, key: int) -> tuple[Start, np.ndarray]:
        assert self.file is not None
        about = self.episodes[key]
        group = self.file[f"traj_{about['episode_id']}"]
        reset = dict(about.get("reset_kwargs", {}))
        seed = reset.get("seed", about.get("episode_seed"))
        seed = seed[0] if isinstance(seed, list) else seed
        reset["seed"] = 0 if seed is None else int(seed)
        state = read_tree(group["env_states"], 0) if isinstance(group.get("env_states"), h5py.Group) else None
        return Start(seed=reset["seed"], reset_kwargs=reset, env_state=state), group["actions"][:].astype(np.float32)


class _Commands:
    """The next action, from a plan that adapts or from actions that are repeated as they are."""

    def __init__(self, env: Any, motion: Plan | np.ndarray, shortening: Shortening) -> None:
        self._player = PlanPlayer(motion, ArmCommand(env), shortening) if isinstance(motion, Plan) else None
        self._actions = iter(motion) if not isinstance(motion, Plan) else iter(())
        self._left = shortening.extra_steps if isinstance(motion, Plan) else len(motion)
        self._most = MOST_TIMES_LONGER * len(motion) + shortening.extra_steps

    @property
    def exhausted(self) -> bool:
        return self._left == 0 or self._most == 0

    def next(self) -> np.ndarray:
        self._most -= 1
        if self._player is None:
            self._left -= 1
            return np.asarray(next(self._actions))
        self._left -= self._player.finished
        try:
            return self._player.action()
        except ActionOutOfRange as error:
            raise Rejected("action out of range") from error


def serve(connection: Connection, recipe: Recipe, journal_folder: str) -> None:
    """Answer keys with Attempts until the other end closes; a string answer is an error that ends the collection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # solvers print their troubles
        try:
            demonstrator, journal = Demonstrator(recipe), Journal(Path(journal_folder))
            connection.send("ready")
            gc.freeze()  # rebuilding a scene collects garbage; without what stands by now that is eight times faster
            while True:
                key = connection.recv()
                try:
                    attempt = journal.keep(key, demonstrator.demonstrate(key))
                except Rejected as rejection:
                    attempt = Attempt(key=key, reason=str(rejection))
                    journal.reject(attempt)
                connection.send(attempt)
        except (EOFError, ConnectionError):  # the parent has gone, or needs no more
            return
        except RobopolicyError as error:  # by its text: not every error can be pickled
            connection.send(RobopolicyError(str(error)))
        except Exception as error:
            with contextlib.suppress(OSError):
                connection.send(RuntimeError(f"{type(error).__name__}: {error}"))
            raise


def _tells_all(recorded: h5py.Group, num_actions: int) -> bool:
    """Whether an episode holds its outcome and every state and observation, so that only pictures are missing."""
    obs, states = recorded.get("obs"), recorded.get("env_states")
    if not isinstance(obs, h5py.Group) or not isinstance(states, h5py.Group):
        return False
    if not {"terminated", "truncated", "success"} <= set(recorded) or not {"agent", "extra"} <= set(obs):
        return False
    return all(len(v) == num_actions + 1 for g in (obs["agent"], obs["extra"], states) for _, v in leaves(read_all(g)))


def _anew(start: Start) -> dict[str, Any]:
    """Return reset arguments that rebuild the scene, so that no contact or contact flag of the last episode is left."""
    return {**start.reset_kwargs, "options": {**(start.reset_kwargs.get("options") or {}), "reconfigure": True}}


def _set_state(env: Any, start: Start) -> Any:
    """Put `env` into the first state of a recorded episode and return the observation there."""
    if start.env_state is not None:
        env.set_state_dict(start.env_state)
        env.agent.controller.reset()
    return env.get_obs()


def _to_numpy(tree: Any) -> Any:
    """Return row 0 of every leaf of a batch of one, as numpy arrays."""
    if isinstance(tree, Mapping):
        return {key: _to_numpy(value) for key, value in tree.items()}
    return np.array(tree[0].cpu() if isinstance(tree, torch.Tensor) else tree[0])
