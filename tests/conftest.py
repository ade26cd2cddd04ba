"""What every test needs: one thread per process, a Vulkan driver chosen before SAPIEN is imported, an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; child processes inherit it

import hypothesis
import torch

from robopolicy.envs.vulkan import prepare_vulkan

torch.set_num_threads(1)
hypothesis.settings.register_profile("robopolicy", deadline=None)  # how long an example takes is the machine's affair
hypothesis.settings.load_profile("robopolicy")
prepare_vulkan()


@dataclass(frozen=True, kw_only=True)
class Finished:
    """What a command left: exit code and output."""

    code: int
    out: str
    err: str


@pytest.fixture
def empty_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test in an empty folder and return it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Return a function that runs the command line in this process: `cli("train", "seed=1")`."""
    from robopolicy.app.cli import main

    def run(*words: str) -> Finished:
        capsys.readouterr()
        code = main(words)
        return Finished(code=code, out=(read := capsys.readouterr()).out, err=read.err)

    return run


@pytest.fixture(scope="session")
def command() -> Callable[..., Finished]:
    """Return a function that runs the command line in its own process: `command("train", "seed=1", cwd=tmp_path)`."""

    def run(*words: str, cwd: Path, timeout_s: float = 300, env: dict[str, str] | None = None) -> Finished:
        done = subprocess.run(
            [sys.executable, "-m", "robopolicy", *words],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        return Finished(code=done.returncode, out=done.stdout, err=done.stderr)

    return run
