"""A run that is stopped, however rudely, and resumed is bit for bit the run that was never stopped."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from toy_training import run_toy

from robopolicy.errors import CheckpointError, DataError
from robopolicy.training import checkpoint, logging
from robopolicy.training.interrupt import stop_on_signals
from robopolicy.training.runs import claim, fingerprint, require_new, require_same_data

FORK = multiprocessing.get_context("fork")  # starts in milliseconds, so that there is time for many kills


def train_on(run_dir: Path, num_steps: int = 1000, signal_at: tuple[int, int] | None = None, **changes: object) -> None:
    """Train in `run_dir` from its last checkpoint, if any; leave with the exit code of the signal that stopped it.

    `signal_at`, (signal, step): the process gets this signal when that step is logged.
    """
    if signal_at is not None:  # a shell that runs the tests in the background has it ignored, and we would keep to that
        signal.signal(signal_at[0], signal.default_int_handler if signal_at[0] == signal.SIGINT else signal.SIG_DFL)
    resume_from = checkpoint.resolve(run_dir) if (run_dir / "last").exists() else None
    start = json.loads((resume_from / "policy.json").read_text())["step"] if resume_from else 0
    with claim(run_dir), stop_on_signals() as stop, logging.open_logs([], run_dir, start_step=start) as write:

        def log(step: int, metrics: Mapping[str, float]) -> None:
            write(step, metrics)
            if signal_at is not None and step == signal_at[1]:
                os.kill(os.getpid(), signal_at[0])

        run_toy(
            run_dir, num_steps=num_steps, resume_from=resume_from, stop=stop, log=log, **{"save_every": 17, **changes}
        )
    if stop():
        raise SystemExit(stop.exit_code)


def outcome(run_dir: Path) -> tuple[list[dict[str, float]], dict[str, bytes]]:
    """Return the metrics, speeds left out, and the bytes of the last checkpoint."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    curve = [{k: v for k, v in row.items() if k not in ("train/samples_per_s", "train/data_share")} for row in rows]
    last = checkpoint.resolve(run_dir)
    return curve, {str(file.relative_to(last)): file.read_bytes() for file in last.rglob("*") if file.is_file()}


def require_same_outcome(left: Path, right: Path) -> None:
    (curve, files), (other_curve, other_files) = outcome(left), outcome(right)
    assert curve == other_curve
    assert files.keys() == other_files.keys()
    assert [name for name in files if files[name] != other_files[name]] == []


def num_logged(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_killed_at_random_moments(tmp_path):
    train_on(tmp_path / "whole")
    run_dir, moments, kills = tmp_path / "killed", random.Random(time.time_ns()), 0
    for _ in range(6):
        process = FORK.Process(target=train_on, args=(run_dir,))
        process.start()
        lines = num_logged(run_dir) + moments.randint(0, 5)
        while num_logged(run_dir) < lines and process.is_alive():
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    assert kills > 0
    train_on(run_dir)
    require_same_outcome(tmp_path / "whole", run_dir)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_exit(tmp_path, number, code):
    train_on(tmp_path / "whole", 200, save_every=1000)
    process = FORK.Process(target=train_on, args=(tmp_path / "stopped", 200, (number, 60)), kwargs={"save_every": 1000})
    process.start()
    process.join()
    assert process.exitcode == code
    stopped_at = checkpoint.read_config(checkpoint.resolve(tmp_path / "stopped"))["step"]
    assert stopped_at == 61  # the one after the step in which the signal came
    train_on(tmp_path / "stopped", 200, save_every=1000)
    require_same_outcome(tmp_path / "whole", tmp_path / "stopped")


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"mixed_precision": "bf16"}, {"grad_clip": None}])
def test_stopped_after_any_step(tmp_path, changes):
    run_toy(tmp_path / "whole", **changes)
    wanted = checkpoint.load_training_state(tmp_path / "whole" / "step_00000040")
    for stop_at in (1, 10, 23) if changes else (1, 2, 9, 10, 15, 23, 39):
        run_dir, asked = tmp_path / str(stop_at), iter(range(1, 100))
        run_toy(run_dir, stop=lambda asked=asked, at=stop_at: next(asked) == at, **changes)
        halfway = checkpoint.resolve(run_dir)
        assert halfway.name == f"step_{stop_at:08d}"
        run_toy(run_dir, resume_from=halfway, **changes)
        found = checkpoint.load_training_state(checkpoint.resolve(run_dir))
        for group in ("weights", "optimizer"):
            for name, value in getattr(wanted, group).items():
                assert torch.equal(value, getattr(found, group)[name]), (stop_at, name)
        assert found.info == wanted.info


def test_other_number_of_processes_is_refused(tmp_path):
    run_toy(tmp_path)
    state = tmp_path / "step_00000040" / "training_state" / "state.json"
    state.write_text(state.read_text().replace('"num_processes": 1', '"num_processes": 4'))
    with pytest.raises(CheckpointError, match="torchrun --nproc_per_node 4"):
        run_toy(tmp_path, resume_from=tmp_path / "step_00000040")


def test_state_of_another_policy_is_refused(tmp_path):
    run_toy(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit this policy"):
        run_toy(tmp_path, resume_from=tmp_path / "step_00000040", width=9)


def test_a_run_is_not_overwritten_nor_trained_twice_at_once(tmp_path):
    run_dir = tmp_path / "new"
    require_new(run_dir)
    with claim(run_dir):
        (run_dir / "config.yaml").write_text("")
        with pytest.raises(CheckpointError, match="Another process"), claim(run_dir):
            pass
    with claim(run_dir):  # free again
        pass
    require_new(run_dir)  # an attempt that saved nothing
    (run_dir / "step_00000010").mkdir()
    with pytest.raises(CheckpointError, match=r"exists.*resume=true run=new"):
        require_new(run_dir)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match="is no run"):
        require_new(tmp_path / "other")


def test_claim_clears_what_a_kill_left(tmp_path):
    (tmp_path / ".step_00000010.tmp").mkdir()
    (tmp_path / ".last.tmp").write_text("half")
    (tmp_path / "step_00000005" / ".training_state.old").mkdir(parents=True)
    with claim(tmp_path):
        assert [p.name for p in tmp_path.rglob("*")] == ["step_00000005"]


@pytest.mark.parametrize("size", [100, 300 * 2**20])
def test_changed_demonstrations_are_noticed(tmp_path, size):
    data = tmp_path / "demos.h5"
    with open(data, "wb") as file:
        file.truncate(size)
    recorded = fingerprint(data)
    assert require_same_data(data, recorded, tmp_path) == recorded
    with open(data, "r+b") as file:
        file.seek(size - 50)
        file.write(b"x")
    with pytest.raises(DataError, match="is not the file that the run"):
        require_same_data(data, recorded, tmp_path)
