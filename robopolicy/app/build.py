"""Builds policies and planners from configs, only from parts of this library: a policy.json may come from a stranger.

Hydra calls whatever `_target_` names, so a config could run any function of any installed package. Every target is
therefore resolved first and must be a class or function that is defined (not merely imported) in one of PARTS; nothing
outside them is imported on the way, and nothing in them touches files, processes or the network.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from robopolicy.errors import RobopolicyError
from robopolicy.evaluation.results import sha256
from robopolicy.policies.base import Policy
from robopolicy.policies.planners import Planner
from robopolicy.types import TaskSpec

PARTS = ("robopolicy.policies", "robopolicy.nn", "robopolicy.sampling", "robopolicy.timing")
"""Where a policy config may take its parts from; these and the modules inside them."""

UNCALIBRATED = {"timesteps": [20, 10, 3, 0], "tau": 0.6, "num_inference_steps": 3}
"""What a warm start's settings that are null become for a checkpoint that was not calibrated; see docs/rti.md."""


def build_policy(config: Mapping[str, Any] | DictConfig, spec: TaskSpec) -> Policy:
    """Return the policy that `config` (a choice of configs/policy) describes, for the task `spec`.

    Raises:
        RobopolicyError: a target is no part of the library, or a constructor refuses its arguments; names the key.
    """
    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else config
    if not isinstance(plain, dict) or "_target_" not in plain:
        raise RobopolicyError(f"A policy config needs a _target_, the class to build; got {plain!r:.200}.")
    for key, value in _leaves(plain, "policy"):
        if key.endswith("._target_"):
            found = _require_part(key, value)
            if key == "policy._target_" and not (isinstance(found, type) and issubclass(found, Policy)):
                raise RobopolicyError(
                    f"{key}={value!r} is no policy; it must be a class derived from {Policy.__name__}."
                )
        elif isinstance(value, str) and "${" in value:
            raise RobopolicyError(f"{key}={value!r} is not resolved; a policy config must hold plain values.")
    try:
        factory = instantiate({**plain, "_partial_": True}, _convert_="all")
        policy = factory(spec)
    except InstantiationException as error:
        where = str(error).partition("full_key: ")[2].strip()
        raise RobopolicyError(f"policy{f'.{where}' if where else ''}: {error.__cause__ or error}") from error
    except (TypeError, ValueError) as error:
        raise RobopolicyError(f"policy: {error}") from error
    assert isinstance(policy, Policy)
    return policy


def build_planner(config: Mapping[str, Any] | DictConfig, policy: Policy, num_envs: int, folder: Path) -> Planner:
    """Return the planner that `config` (a choice of configs/planner) describes.

    What is null in its warm start is filled in by `folder`/calibration.json where there is one, else by UNCALIBRATED.

    Args:
        policy: what plans; an engine around a policy will do.
        num_envs: environments that it will plan for.
        folder: of the checkpoint, for what a planner keeps beside the weights.

    Raises:
        RobopolicyError: a target is no part of the library, or a constructor refuses its arguments; names the key. Or
            the calibration cannot be read, or is of other weights.
    """
    plain = resolve_planner(config, folder)
    for key, value in _leaves(plain, "planner"):
        if key.endswith("._target_"):
            _require_part(key, value)
    try:
        planner: Planner = instantiate({**plain, "_partial_": True}, _convert_="all")(policy, num_envs)
    except InstantiationException as error:
        where = str(error).partition("full_key: ")[2].strip()
        raise RobopolicyError(f"planner{f'.{where}' if where else ''}: {error.__cause__ or error}") from error
    except (TypeError, ValueError) as error:
        raise RobopolicyError(f"planner: {error}") from error
    if hasattr(planner, "warm_start"):
        refining: Any = policy
        refining.resolve_warm_start(planner.warm_start)  # fails here rather than at the second action
    return planner


def resolve_planner(config: Mapping[str, Any] | DictConfig, folder: Path) -> dict[str, Any]:
    """Return `config` as plain values, with what calibration decides filled in: all that decides how it plans."""
    plain = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
    if not isinstance(plain, dict) or "_target_" not in plain:
        raise RobopolicyError(f"A planner config needs a _target_, the class to build; got {plain!r:.200}.")
    warm_start = plain.get("warm_start")
    if isinstance(warm_start, Mapping):
        missing = [name for name in UNCALIBRATED if name in warm_start and warm_start[name] is None]
        if missing:
            known = _calibration(folder)
            plain["warm_start"] = {**warm_start, **{name: known.get(name, UNCALIBRATED[name]) for name in missing}}
    return plain  # type: ignore[return-value]


def _calibration(folder: Path) -> dict[str, Any]:
    """Return the warm start that was calibrated for the weights in `folder`; nothing if none was.

    Raises:
        RobopolicyError: calibration.json cannot be read, or is of other weights.
    """
    file = folder / "calibration.json"
    if not file.is_file():
        return {}
    without = "planner.warm_start.timesteps=[20,10,3,0] (a flow: tau=0.6) does without"
    try:
        found = json.loads(file.read_bytes())
        warm_start, weights = dict(found["warm_start"]), str(found["weights_sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise RobopolicyError(
            f"{file} cannot be read: {error!r}. `robopolicy calibrate` writes it anew; {without}."
        ) from error
    if weights != sha256(folder / "model.safetensors"):
        raise RobopolicyError(
            f"{file} was made for other weights than those in {folder / 'model.safetensors'}. `robopolicy calibrate "
            f"checkpoint={folder}` makes it anew; {without}."
        )
    return warm_start


def _require_part(key: str, target: Any) -> type | FunctionType:
    """Return what `target` names; raise RobopolicyError unless it is a class or function defined in PARTS."""
    found = _locate(target) if isinstance(target, str) and _inside(target) else None
    if not (isinstance(found, type | FunctionType) and _inside(found.__module__)):
        raise RobopolicyError(
            f"{key}={target!r} is refused: a policy is built only from classes and functions that are defined in "
            f"{', '.join(PARTS)}."
        )
    return found


def _locate(name: str) -> Any:
    """Return what the dotted `name` means, or None; imports modules inside PARTS only."""
    words = name.split(".")
    found: Any = None
    for used in range(1, len(words) + 1):
        module = ".".join(words[:used])
        if module != "robopolicy" and not _inside(module):
            return None
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            break
    else:
        return found
    for word in words[used - 1 :]:
        found = getattr(found, word, None)
    return found


def _inside(name: str) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in PARTS)


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{path}[{index}]")
    else:
        yield path, tree
