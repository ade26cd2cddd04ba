"""The shell scripts: they parse, they say plainly what is missing, and a second run costs nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ["scripts/setup", "scripts/demo", "scripts/test", ".ci/run"]


def run(*words: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_may_be_run(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert run("bash", "-n", ROOT / script).returncode == 0


def test_ci_runs_the_tests_and_nothing_else() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines == ["#!/usr/bin/env bash", 'exec "$(dirname "$0")/../scripts/test"']


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what scripts/setup reads, without .venv."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_setup_refuses_a_python_that_does_not_do(checkout: Path) -> None:
    done = run(checkout / "scripts/setup", PYTHON="/bin/false")
    assert done.returncode == 1
    assert "PYTHON=/bin/false is no Python 3.11 or 3.12" in done.stderr
    assert not (checkout / ".venv").exists()


def test_setup_says_so_where_there_is_no_python(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "env", "sed", "tr", "sort", "paste", "mktemp"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    done = run(checkout / "scripts/setup", PATH=str(tools))
    assert done.returncode == 1
    assert "Python 3.11 or 3.12 with venv is missing" in done.stderr


def test_setup_check_fails_before_setup(checkout: Path) -> None:
    assert run(checkout / "scripts/setup", "--check").returncode == 1


@pytest.mark.skipif(run("./scripts/setup", "--check").returncode != 0, reason="this environment was not made by setup")
def test_a_second_setup_is_silent_and_quick() -> None:
    started = time.monotonic()
    done = run("./scripts/setup")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - started < 60  # a set-up from nothing takes minutes
