"""The layers of the library, read from its imports; the tables say which folder may import what."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYER = {
    "types": 0,
    "errors": 0,
    "timing": 0,
    "rng": 0,
    "normalize": 0,
    "atomic": 0,
    "configs": 0,
    "nn": 1,
    "sampling": 1,
    "policies": 2,
    "rewards": 2,
    "data": 2,
    "training": 3,
    "evaluation": 3,
    "rl": 3,
    "deploy": 3,
    "app": 4,
    "__main__": 5,
}
SIBLINGS = {"rl": {"training", "evaluation"}}
"""Within layers 1 to 4 the parts do not know each other, except these."""

ONLY_IN = {
    "hydra": "robopolicy.app",
    "omegaconf": "robopolicy.app",
    "mani_skill": "robopolicy.envs",
    "sapien": "robopolicy.envs",
    "wandb": "robopolicy.training.logging",
    "websockets": "robopolicy.deploy",
    "diffusers": "robopolicy.sampling",
}
NEVER = {"envs", "configs", "scripts", "tests"}
"""Folders of the repository that are packaged under other names; imported directly they would be second copies."""


def module_name(path: Path) -> str:
    """Return the dotted name under which `path` is installed."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("robopolicy", *parts) if parts[0] == "envs" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, *, is_package: bool) -> set[str]:
    """Return the full name of all that `source` imports, inside functions and TYPE_CHECKING blocks too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return found


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Return, in words, each import of `source` that the tables forbid."""
    found = []
    own = module.split(".")[1] if "." in module else ""
    for name in sorted(imports(source, module, is_package=is_package)):
        top, _, rest = name.partition(".")
        part = rest.split(".")[0]
        if top in NEVER:
            found.append(f"{module} imports {name}: use robopolicy.{name}")
        elif top in ONLY_IN and not f"{module}.".startswith(f"{ONLY_IN[top]}."):
            found.append(f"{module} imports {name}: {top} belongs in {ONLY_IN[top]} alone")
        elif top == "robopolicy" and part != own and not _may_import(own, part):
            found.append(f"{module} imports {name}: {own or 'robopolicy'} may not import {part}")
        elif own == part == "policies" and not _is_shared_policy_import(module, name):
            found.append(f"{module} imports {name}: a policy imports base and no other policy")
    return found


def _may_import(own: str, part: str) -> bool:
    """Say whether a module of the folder `own` may import from `part`; names of neither folder nor module are free."""
    if part not in LAYER:
        return part != "envs" or own == "app"
    if own == "envs":
        return LAYER[part] == 0
    mine, theirs = LAYER.get(own, 0), LAYER[part]
    return theirs < mine or mine == theirs == 0 or part in SIBLINGS.get(own, set())


def _is_shared_policy_import(module: str, name: str) -> bool:
    mine, theirs = module.split(".")[2:3], name.split(".")[2]
    return mine in ([], ["actors"]) or theirs in {"base", *mine}


SOURCES = sorted([*(ROOT / "robopolicy").rglob("*.py"), *(ROOT / "envs").rglob("*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_layers(path: Path) -> None:
    assert violations(path.read_text(), module_name(path), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("robopolicy.training.loop", "import wandb"),
        ("robopolicy.nn.mlp", "from robopolicy.policies import base"),
        ("robopolicy.nn.mlp", "from robopolicy.sampling.schedule import NoiseSchedule"),
        ("robopolicy.nn.mlp", "from ..sampling import schedule"),
        ("robopolicy.data.store", "def f():\n    from robopolicy.rewards import progress"),
        ("robopolicy.evaluation.rollout", "from robopolicy import envs"),
        ("robopolicy.evaluation.rollout", "import robopolicy.training.loop"),
        ("robopolicy.training.checkpoint", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import omegaconf"),
        ("robopolicy.envs.tasks", "from robopolicy.policies.base import Policy"),
        ("robopolicy.app.train", "import mani_skill.envs"),
        ("robopolicy.app.train", "from envs import make"),
        ("robopolicy.types", "from robopolicy.nn import mlp"),
        ("robopolicy.policies.flow", "from robopolicy.policies.diffusion import DiffusionPolicy"),
        ("robopolicy.policies.flow", "from .diffusion import DiffusionPolicy"),
        ("robopolicy.app.eval", "import importlib\nimportlib.import_module('sapien')"),
    ],
)
def test_a_planted_import_is_caught(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("robopolicy.rl.ppo", "from robopolicy.training import ema"),
        ("robopolicy.envs.tasks", "from robopolicy.types import TaskSpec\nfrom . import rendering\nimport sapien"),
        ("robopolicy.policies.flow", "from robopolicy.policies.base import Policy\nfrom robopolicy.nn import mlp"),
        ("robopolicy.policies.actors", "from .base import Policy"),
        ("robopolicy.app.train", "from robopolicy import envs\nimport hydra"),
        ("robopolicy.normalize", "from robopolicy.types import TaskSpec"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_every_part_has_a_layer() -> None:
    top = {path.stem if path.is_file() else path.name for path in (ROOT / "robopolicy").iterdir()}
    parts = {name for name in top if not name.startswith((".", "__pycache__"))} - {"__init__", "py"}
    assert parts <= LAYER.keys()


def test_names_in_all_exist() -> None:
    for path in SOURCES:
        if "__all__" in path.read_text():
            module = importlib.import_module(module_name(path))
            missing = [name for name in module.__all__ if not hasattr(module, name)]
            assert not missing, f"{module.__name__}.__all__ lists {missing}"
            assert len(set(module.__all__)) == len(module.__all__)
