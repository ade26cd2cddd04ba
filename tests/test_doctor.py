"""What `robopolicy doctor` says: the truth about this machine, with a command for what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished

Command = Callable[..., Finished]


@pytest.mark.sim
@pytest.mark.slow
def test_doctor_finds_that_the_main_job_can_run(command: Command, tmp_path: Path) -> None:
    done = command("doctor", "--json", cwd=tmp_path)
    said = json.loads(done.out)
    assert (done.code, said["ok"]) == (0, True), done.err
    found = {(check["area"], check["name"]): check for check in said["checks"]}
    assert {"software", "machine", "simulate", "render", "record", "log", "deploy"} == {area for area, _ in found}
    assert found["simulate", "on CPU"]["ok"]
    assert "steps/s" in found["simulate", "on CPU"]["found"]
    assert all(check["ok"] or check["fix"] for check in said["checks"])
    assert "This machine can collect, train and evaluate policies" in " ".join(done.err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_doctor_fails_where_nothing_can_be_simulated(command: Command, tmp_path: Path) -> None:
    broken = tmp_path / "site/sapien"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libsapien.so: cannot open shared object file')\n")
    done = command("doctor", "render=false", cwd=tmp_path, env={"PYTHONPATH": str(broken.parent)})
    assert done.code == 1
    assert "libsapien.so: cannot open shared object file" in done.out
    assert "cannot collect, train and evaluate yet (simulate: on CPU)" in " ".join(done.out.split())
    assert "scripts/setup" in done.out
    assert "Traceback" not in done.out + done.err


@pytest.mark.slow
def test_a_crash_of_a_driver_is_reported(command: Command, tmp_path: Path) -> None:
    broken = tmp_path / "site/sapien"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("import os\nos.kill(os.getpid(), 11)\n")
    done = command("doctor", "render=false", "--json", cwd=tmp_path, env={"PYTHONPATH": str(broken.parent)})
    (cpu,) = [check for check in json.loads(done.out)["checks"] if check["name"] == "on CPU"]
    assert (done.code, cpu["ok"], cpu["found"]) == (1, False, "crashed with SIGSEGV")
