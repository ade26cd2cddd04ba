"""What is installed is what the folders hold, also where the user has folders of the same names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = {"robopolicy": "robopolicy", "envs": "robopolicy.envs", "configs": "robopolicy.configs"}


def packages_in(folder: str) -> set[str]:
    return {
        ".".join([MAPPED[folder], *path.parent.relative_to(ROOT / folder).parts])
        for path in (ROOT / folder).rglob("__init__.py")
    }


def test_the_packages_listed_are_the_folders() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert set(listed) == set().union(*map(packages_in, MAPPED))
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("folder", MAPPED)
def test_every_folder_with_code_or_configs_is_a_package(folder: str) -> None:
    holding = {path.parent for pattern in ("*.py", "*.yaml") for path in (ROOT / folder).rglob(pattern)}
    assert [path for path in holding if not (path / "__init__.py").exists()] == []


REQUIREMENTS = [
    *PROJECT["project"]["dependencies"],
    *[
        line
        for lines in PROJECT["project"]["optional-dependencies"].values()
        for line in lines
        if "robopolicy[" not in line
    ],
]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("line", REQUIREMENTS)
def test_requirements_are_pinned_within_their_range(line: str) -> None:
    requirement = Requirement(line)
    pin = {plain(name): version for name, version in PINS.items()}[plain(requirement.name)]
    assert requirement.specifier.contains(Version(pin))


def test_every_pin_is_exact_and_public() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(PINS)
    assert not [line for line in lines if "+" in line]  # a local label such as +cpu would exclude the CUDA build


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy and unpacked alone: a folder with `robopolicy` and nothing else of ours."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for folder in MAPPED:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", source / "dist", source], check=True)
    (wheel,) = (source / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    return site


def test_the_wheel_holds_every_file(installed: Path) -> None:
    for folder, package in MAPPED.items():
        target = installed.joinpath(*package.split("."))
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (target / path.relative_to(ROOT / folder)).is_file(), path
    assert not {"envs", "configs", "tests", "scripts"} & {path.name for path in installed.iterdir()}


def test_an_installed_wheel_runs_beside_a_users_own_folders(installed: Path, tmp_path: Path) -> None:
    for name in ("envs", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the decoy was imported')\n")
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def run(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    show = "import robopolicy.envs.tasks as t, robopolicy.app.cli as c; print(t.__file__, c.__file__, *t.TASKS)"
    where = run("-c", show)
    assert where.count(str(installed)) == 2
    assert "pick_cube" in where
    assert "task=" in run("-m", "robopolicy", "train", "--help")
    assert "max_episode_steps" in run("-m", "robopolicy", "train", "task=push_cube", "--cfg")
