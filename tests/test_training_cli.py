"""The verb `train`, from demonstrations on disk to a run folder, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from toy_training import SPEC

from robopolicy.app.build import build_policy
from robopolicy.training import checkpoint
from robopolicy.types import TaskSpec

SMALL = (
    "policy.network.width=8",
    "policy.network.depth=1",
    "train.num_steps=12",
    "train.log_every=4",
    "train.batch_size=8",
)


def write_demonstrations(path: Path, *, num_episodes: int = 6, seed: int = 0, task: str = "pick_cube") -> None:
    """Write random episodes of 20 steps in ManiSkill's format."""
    numbers = np.random.default_rng(seed)
    spec = TaskSpec.from_dict({**SPEC.to_dict(), "name": task})
    path.parent.mkdir(parents=True, exist_ok=True)
    episodes = [
        {"episode_id": i, "episode_seed": 100 + i, "control_mode": "pd_ee_delta_pos", "elapsed_steps": 20}
        for i in range(num_episodes)
    ]
    with h5py.File(path, "w") as file:
        for episode in episodes:
            group = file.create_group(f"traj_{episode['episode_id']}")
            group["actions"] = numbers.uniform(-1, 1, (20, 2)).astype(np.float32)
            group["obs/agent/qpos"] = numbers.uniform(-1, 1, (21, 3)).astype(np.float32)
            group["success"] = np.arange(20) == 19
    about = {"env_info": {"env_id": spec.env_id}, "episodes": episodes, "task_spec": spec.to_dict()}
    path.with_suffix(".json").write_text(json.dumps(about))


@pytest.fixture
def demos(empty_cwd: Path) -> Path:
    """Demonstrations where `train` looks for them, in an otherwise empty folder."""
    path = empty_cwd / "demos" / "pick_cube" / "pd_ee_delta_pos.state.h5"
    write_demonstrations(path)
    return path


def test_train_writes_a_policy_that_can_be_loaded(demos, cli):
    done = cli("train", "seed=4", "train.val_fraction=0.3", "train.validate_every=6", *SMALL)
    assert done.code == 0, done.err
    assert "robopolicy eval checkpoint=checkpoints/pick_cube-diffusion-s4" in done.out
    assert "4 episodes, 80 frames" in done.out
    loaded = checkpoint.load("pick_cube-diffusion-s4", build_policy)
    assert loaded.step == 12
    data = loaded.config["data"]
    assert (data["num_episodes"], data["num_held_out_episodes"], data["seeds"]) == (4, 2, list(range(100, 106)))
    assert "train.num_steps=12" in loaded.config["train"]["command"]
    rows = [
        json.loads(line) for line in Path("checkpoints/pick_cube-diffusion-s4/metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows if "train/loss" in row] == [4, 8, 12]
    assert [row["step"] for row in rows if "val/loss" in row] == [6, 12]


def test_same_seed_same_weights_other_seed_others(demos, cli):
    for run, seed in {"a": 1, "b": 1, "c": 2}.items():
        assert cli("train", f"run={run}", f"seed={seed}", *SMALL).code == 0
    a, b, c = (checkpoint.read_weights(checkpoint.resolve(run)) for run in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_a_run_is_not_overwritten_and_resumes_with_its_own_settings(demos, cli):
    assert cli("train", "run=mine", *SMALL).code == 0
    before = Path("checkpoints/mine/step_00000012/model.safetensors").read_bytes()
    again = cli("train", "run=mine", *SMALL)
    assert again.code == 2
    assert "`resume=true run=mine` goes on with it" in again.err
    other = cli("train", "run=mine", "resume=true", "train.lr=0.5", "policy=diffusion_unet", "train.num_steps=12")
    assert other.code == 2
    assert "train.lr: 0.001 in the run, 0.5 asked for" in other.err
    assert "policy.network._target_: robopolicy.nn.mlp.ChunkMLP in the run" in other.err
    assert "num_steps" not in other.err
    complete = cli("train", "run=mine", "resume=true", "train.keep=1")
    assert complete.code == 0
    assert "is complete: 12 steps" in complete.out
    assert Path("checkpoints/mine/step_00000012/model.safetensors").read_bytes() == before
    missing = cli("train", "run=mime", "resume=true")
    assert missing.code == 2
    assert "Did you mean 'mine'" in missing.err


def test_resumed_after_a_lost_end_is_the_same_run(demos, cli):
    for run in ("whole", "cut"):
        assert cli("train", f"run={run}", "train.save_every=5", "train.keep=9", *SMALL).code == 0
    cut = Path("checkpoints/cut")
    (cut / "last").write_text("step_00000005\n")  # as after a power cut: newer steps were not yet named
    done = cli("train", "run=cut", "resume=true")
    assert done.code == 0, done.err
    whole = Path("checkpoints/whole")
    for file in ("model.safetensors", "training_state/weights.safetensors", "training_state/optimizer.safetensors"):
        left, right = (run / "step_00000012" / file for run in (whole, cut))
        assert left.read_bytes() == right.read_bytes(), file
    losses = [
        [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (whole, cut)
    ]
    assert losses[0] == losses[1]


def test_resuming_on_other_demonstrations_is_refused(demos, cli):
    assert cli("train", "run=mine", *SMALL).code == 0
    write_demonstrations(demos, seed=1)
    changed = cli("train", "run=mine", "resume=true")
    assert changed.code == 2
    assert "is not the file that the run" in changed.err


def test_demonstrations_may_move(demos, cli):
    assert cli("train", "run=mine", *SMALL).code == 0
    Path("moved").mkdir()
    for suffix in (".h5", ".json"):
        os.rename(demos.with_suffix(suffix), Path("moved/demos").with_suffix(suffix))
    assert cli("train", "run=mine", "resume=true", "data.path=moved/demos.h5").code == 0


def test_what_is_missing_or_wrong_is_said(demos, cli):
    absent = cli("train", "task=push_cube")
    assert absent.code == 2
    assert "robopolicy collect task=push_cube" in absent.err
    write_demonstrations(demos, task="stack_cube")
    other = cli("train")
    assert other.code == 2
    assert "task=stack_cube" in other.err
    assert not Path("checkpoints").exists()
    assert "train.lr must be positive" in cli("train", "train.lr=-1").err
    write_demonstrations(demos)
    assert "leaves none of 6 episodes" in cli("train", "train.val_fraction=0.99").err
