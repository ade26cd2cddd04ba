"""Checkpoints: whole or absent, refused when they do not fit, and never a way to run a stranger's code."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from toy_training import LIMITS, SPEC, ToyPolicy, files_up_to, run_toy, toy_policy

from robopolicy import atomic
from robopolicy.app.build import build_policy
from robopolicy.errors import CheckpointError, RobopolicyError, SpecMismatchError, TrainingError
from robopolicy.policies.diffusion import DiffusionPolicy
from robopolicy.training import checkpoint
from robopolicy.types import Observation, TaskSpec

CONFIG = {"policy": {"_target_": "toy"}, "data": {"num_episodes": 5}, "train": {"lr": 0.1}}
DIFFUSION = {
    "_target_": "robopolicy.policies.diffusion.DiffusionPolicy",
    "timing": {"_target_": "robopolicy.timing.ChunkTiming", "n_obs_steps": 2, "horizon": 4, "n_action_steps": 2},
    "network": {"_target_": "robopolicy.nn.mlp.ChunkMLP", "_partial_": True, "width": 8, "depth": 1},
    "encoder": {"_target_": "robopolicy.nn.encoder.ObservationEncoder", "_partial_": True},
    "schedule": {"_target_": "robopolicy.sampling.schedule.NoiseSchedule"},
    "sampler": {"_target_": "robopolicy.sampling.samplers.DDIMSampler", "num_inference_steps": 3},
}


def build_toy(config: Any, spec: TaskSpec) -> ToyPolicy:
    return ToyPolicy(spec)


def state_of(policy: ToyPolicy) -> checkpoint.TrainingState:
    return checkpoint.TrainingState(weights=policy.state_dict(), optimizer={"w|m": torch.ones(3)}, info={"x": [0.1]})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of three steps in checkpoints/mine, trained by nobody."""
    run_dir = tmp_path / "checkpoints" / "mine"
    run_dir.mkdir(parents=True)
    policy = toy_policy()
    for step in (10, 20, 30):
        checkpoint.save(run_dir, step=step, policy=policy, config=CONFIG, state=state_of(policy), keep=2)
    return run_dir


def test_what_is_loaded_is_what_was_saved(run_dir):
    loaded = checkpoint.load(run_dir, build_toy)
    assert (loaded.step, loaded.path.name, loaded.spec) == (30, "step_00000030", SPEC)
    assert loaded.config["data"] == {"num_episodes": 5}
    for name, value in toy_policy().state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[name], value)
    assert not loaded.policy.training
    assert not any(p.requires_grad for p in loaded.policy.parameters())


def test_training_state_round_trip_and_only_the_newest_keep_one(run_dir):
    state = checkpoint.load_training_state(run_dir / "step_00000030")
    assert state.info == {"x": [0.1]}
    assert torch.equal(state.optimizer["w|m"], torch.ones(3))
    assert checkpoint.load(run_dir / "step_00000010", build_toy).step == 10
    with pytest.raises(CheckpointError, match="no training_state"):
        checkpoint.load_training_state(run_dir / "step_00000010")


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    run_toy(tmp_path)
    kinds = {file.suffix for file in (tmp_path / "step_00000040").rglob("*") if file.is_file()}
    assert kinds == {".json", ".safetensors"}


def test_paths_that_name_a_checkpoint(run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run_dir / "step_00000020", tmp_path / "checkpoints" / "zoo" / "best")
    for path, step in {
        "checkpoints/mine": 30,
        "mine": 30,
        "mine/step_00000010": 10,
        "best": 20,
        "checkpoints/zoo/best": 20,
        str(run_dir): 30,
    }.items():
        assert checkpoint.load(path, build_toy).step == step, path
    with pytest.raises(CheckpointError, match=r"no checkpoint 'mien'. Did you mean 'mine'\? Known: best, mine"):
        checkpoint.resolve("mien")
    (tmp_path / "checkpoints" / "empty").mkdir()
    (tmp_path / "checkpoints" / "empty" / "config.yaml").write_text("a: 1")
    with pytest.raises(CheckpointError, match="empty holds no checkpoint"):
        checkpoint.resolve("empty")
    (run_dir / "last").write_text("step_00000099\n")
    with pytest.raises(CheckpointError, match=r"'step_00000099', which is not there. Known: step_00000010"):
        checkpoint.resolve("mine")


def edited(run_dir: Path, **changes: Any) -> Path:
    """Change keys of the last policy.json (None removes one); return its folder."""
    folder = checkpoint.resolve(run_dir)
    config = json.loads((folder / "policy.json").read_text()) | changes
    (folder / "policy.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "robopolicy/9"}, "format 'robopolicy/9'; this version reads 'robopolicy/1'"),
        ({"task_spec": None}, "incomplete: task_spec"),
        ({"task_spec": {"name": "x"}}, "no readable task_spec"),
        ({"policy": [1]}, "incomplete: policy"),
        ({"policy": {"_target_": "x", "width": "${oc.env:HOME}"}}, "interpolations"),
        ({"timing": {"n_obs_steps": 3, "horizon": 8, "n_action_steps": 2}}, "contradicts itself"),
    ],
)
def test_other_formats_are_refused(run_dir, changes, said):
    with pytest.raises(CheckpointError, match=said):
        checkpoint.load(edited(run_dir, **changes), build_toy)


@pytest.mark.parametrize("name", ["model.safetensors", "policy.json"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "absent"])
def test_damaged_files_are_named(run_dir, name, damage):
    file = checkpoint.resolve(run_dir) / name
    whole = file.read_bytes()
    if damage == "absent" and name == "model.safetensors":
        file.unlink()
    elif damage != "absent":
        file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"\x80\x04garbage")
    else:
        pytest.skip("a folder without policy.json is no checkpoint")
    with pytest.raises(CheckpointError, match=name):
        checkpoint.load(run_dir, build_toy)


def test_weights_of_another_network_are_refused(run_dir):
    with pytest.raises(CheckpointError, match=r"model.safetensors does not fit its policy.json"):
        checkpoint.load(run_dir, lambda config, spec: ToyPolicy(spec, width=9))


def test_another_task_is_refused_with_the_difference(run_dir):
    other = TaskSpec.from_dict(
        {**SPEC.to_dict(), "action": {**SPEC.to_dict()["action"], "control_mode": "pd_joint_pos"}}
    )
    with pytest.raises(SpecMismatchError, match=r"action.control_mode: pd_ee_delta_pos against pd_joint_pos"):
        checkpoint.load(run_dir, build_toy, spec=other)
    assert checkpoint.load(run_dir, build_toy, spec=SPEC).spec == SPEC


def test_disk_full_while_saving_leaves_the_last_checkpoint(run_dir):
    policy = toy_policy()
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    with files_up_to(600), pytest.raises(TrainingError, match=r"Could not save step 40 .*last good .*step_00000030"):
        checkpoint.save(run_dir, step=40, policy=policy, config=CONFIG, state=state_of(policy), keep=2)
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before
    assert not list(run_dir.rglob(".*"))
    assert checkpoint.load(run_dir, build_toy).step == 30


def test_training_on_a_full_disk_stops_with_a_message(tmp_path):
    run_toy(tmp_path, num_steps=15)
    size = max(file.stat().st_size for file in (tmp_path / "step_00000015").rglob("*") if file.is_file())
    with files_up_to(size - 1), pytest.raises(TrainingError, match=r"File too large.*step_00000015"):
        run_toy(tmp_path, num_steps=30, resume_from=tmp_path / "step_00000015")
    assert checkpoint.load(tmp_path, build_toy).step == 15


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "last"
    atomic.write_file(file, b"old")
    with files_up_to(10), pytest.raises(OSError, match="File too large"):
        atomic.write_file(file, b"x" * 1000)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("last", b"old")]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(FileNotFoundError), atomic.new_folder(tmp_path / "step") as new:
        atomic.write_synced(new / "absent" / "a", b"1")
    assert list(tmp_path.iterdir()) == []
    for text in (b"1", b"2"):
        with atomic.new_folder(tmp_path / "step") as new:
            atomic.write_synced(new / "a", text)
            assert not (tmp_path / "step" / "a").exists() or (tmp_path / "step" / "a").read_bytes() != text
        assert [p.name for p in tmp_path.iterdir()] == ["step"]
        assert (tmp_path / "step" / "a").read_bytes() == text


def test_a_diffusion_policy_acts_the_same_after_a_round_trip(tmp_path):
    policy = build_policy(DIFFUSION, SPEC).eval()
    assert isinstance(policy, DiffusionPolicy)
    policy.norm.fit(LIMITS)
    checkpoint.save(tmp_path, step=1, policy=policy, config={**CONFIG, "policy": DIFFUSION})
    loaded = checkpoint.load(tmp_path, build_policy)
    obs = Observation(modalities={"proprio": torch.rand(5, 2, 3)})
    chunks = [p.act(obs, generator=torch.Generator().manual_seed(0)) for p in (policy, loaded.policy)]
    assert torch.equal(*chunks)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "posix.system",
        "builtins.eval",
        "subprocess.Popen",
        "hydra.utils.get_method",
        "torch.load",
        "robopolicy.training.checkpoint.os.system",
        "robopolicy.policies.base.torch.load",
        "robopolicy.policies.base.abc.os.system",
        "robopolicy.training.atomic.write_synced",
        "robopolicy.app.cli.main",
        "robopolicy.policies.base.Policy.load_state_dict",
        "robopolicy.policies",
        "robopolicy.policies.nothing",
        "robopolicy.policies_of_a_stranger.run",
        "",
        None,
        7,
    ],
)
@pytest.mark.parametrize("where", [(), ("network",), ("encoder", "image"), ("list",)])
def test_configs_cannot_call_what_is_not_ours(target, where, tmp_path):
    witness = tmp_path / "ran"
    evil = {"_target_": target, "_args_": [f"touch {witness}"]}
    config = copy.deepcopy(DIFFUSION)
    if where == ():
        config |= evil
    elif where == ("list",):
        config["network"] = {**config["network"], "extra": [1, {"deep": [evil]}]}  # type: ignore[dict-item]
    else:
        place = config
        for key in where[:-1]:
            place = place[key]  # type: ignore[assignment]
        place[where[-1]] = evil  # type: ignore[assignment]
    with pytest.raises(RobopolicyError, match="is refused"):
        build_policy(config, SPEC)
    assert not witness.exists()


def test_interpolations_in_a_checkpoint_are_refused(monkeypatch):
    monkeypatch.setenv("SECRET", "8")
    config = {**DIFFUSION, "network": {**DIFFUSION["network"], "width": "${oc.env:SECRET}"}}  # type: ignore[dict-item]
    with pytest.raises(RobopolicyError, match="is not resolved"):
        build_policy(config, SPEC)


def test_the_library_s_mistakes_in_a_config_are_explained():
    wrong = copy.deepcopy(DIFFUSION)
    wrong["timing"]["n_action_steps"] = 99  # type: ignore[index]
    with pytest.raises(RobopolicyError, match=r"policy.timing: n_action_steps must be in \[1, 3\]"):
        build_policy(wrong, SPEC)
    with pytest.raises(RobopolicyError, match="unexpected keyword argument 'netwrk'"):
        build_policy({**DIFFUSION, "netwrk": 1}, SPEC)
    with pytest.raises(RobopolicyError, match="is no policy"):
        build_policy({"_target_": "robopolicy.timing.ChunkTiming"}, SPEC)
    with pytest.raises(RobopolicyError, match="needs a _target_"):
        build_policy({}, SPEC)


def test_a_config_of_the_command_line_may_hold_interpolations():
    config = OmegaConf.create({"size": 16, "policy": {**DIFFUSION, "network": {**DIFFUSION["network"]}}})  # type: ignore[dict-item]
    config.policy.network.width = "${size}"
    assert isinstance(build_policy(config.policy, SPEC), DiffusionPolicy)
