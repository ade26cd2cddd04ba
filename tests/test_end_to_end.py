"""The main job on a tiny budget, through the command line alone: collect, train, kill, resume, eval, report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished
from safetensors.numpy import load_file

Command = Callable[..., Finished]

TRAIN = (
    "task=push_cube",
    "policy.network.width=32",
    "policy.network.depth=1",
    "train.num_steps=300",
    "train.batch_size=32",
    "train.save_every=50",
    "train.log_every=10",
    "train.warmup_steps=10",
)


def checked(done: Finished) -> Finished:
    assert done.code == 0, done.err
    return done


def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def kill_once_saved(words: tuple[str, ...], *, cwd: Path, run: Path) -> None:
    """Start training, and kill the process without warning once it has saved its first checkpoint."""
    child = subprocess.Popen(
        [sys.executable, "-m", "robopolicy", "train", *words],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 180
    while not (run / "last").exists():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint within 180 s"
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


@pytest.mark.sim
@pytest.mark.slow
def test_collect_train_kill_resume_eval_report(command: Command, tmp_path: Path) -> None:
    checked(command("collect", "task=push_cube", "num_demos=4", cwd=tmp_path))
    assert (tmp_path / "demos/push_cube/pd_ee_delta_pos.state.h5").is_file()

    whole, cut = tmp_path / "checkpoints/whole", tmp_path / "checkpoints/cut"
    checked(command("train", *TRAIN, "run=whole", cwd=tmp_path))
    kill_once_saved((*TRAIN, "run=cut"), cwd=tmp_path, run=cut)
    assert (cut / "last").read_text().strip() != "step_00000300", "the run was over before it could be killed"
    refused = command("train", *TRAIN, "run=cut", cwd=tmp_path)
    assert refused.code == 2
    assert "resume=true" in refused.err
    checked(command("train", "run=cut", "resume=true", cwd=tmp_path))
    assert losses(cut) == losses(whole)
    weights = [load_file(run / "step_00000300/model.safetensors") for run in (whole, cut)]
    assert {name: value.tobytes() for name, value in weights[0].items()} == {
        name: value.tobytes() for name, value in weights[1].items()
    }

    ask = ("eval", "checkpoint=cut", "n_episodes=2", "max_episode_steps=10", "name=tiny", "--json")
    result = json.loads(checked(command(*ask, cwd=tmp_path)).out)
    assert result["n_episodes"] == 2
    low, high = result["pc_success_ci95"]
    assert 0 <= low <= result["pc_success"] <= high <= 100
    assert (cut / "eval/tiny/eval_info.json").is_file()

    checked(command("report", "run=cut", cwd=tmp_path))
    page = (cut / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "push_cube" in page
