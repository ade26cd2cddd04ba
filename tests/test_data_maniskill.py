"""Reading ManiSkill trajectory files: what arrives, what is kept beside them, and how bad files are told apart."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from fakes import fake_spec

from robopolicy.data.maniskill import load_demonstrations
from robopolicy.errors import DataError

SPEC = fake_spec(camera=True)
STATE = fake_spec()


def write_demos(folder: Path, lengths: tuple[int, ...] = (4, 7, 5), *, with_spec: bool = True) -> Path:
    """Write a file as ManiSkill's RecordEpisode does, with seeds 10, 11, ...; return its path."""
    rng = np.random.default_rng(0)
    path = folder / "demos.h5"
    episodes = []
    with h5py.File(path, "w") as file:
        for index, length in enumerate(lengths):
            group = file.create_group(f"traj_{index}")
            group["obs/agent/qpos"] = rng.standard_normal((length + 1, 9), dtype=np.float32)
            group["obs/extra/obj_pose"] = rng.standard_normal((length + 1, 5), dtype=np.float32)
            group["obs/sensor_data/base/rgb"] = rng.integers(0, 256, (length + 1, 24, 32, 3), dtype=np.uint8)
            group["actions"] = rng.uniform(-1, 1, (length, 4)).astype(np.float32)
            group["success"] = np.arange(length) == length - 1
            episodes.append({"episode_id": index, "episode_seed": 10 + index, "control_mode": "pd_ee_delta_pos"})
    about: dict[str, Any] = {"env_info": {"env_id": "Fake-v0", "env_kwargs": {}}, "episodes": episodes}
    if with_spec:
        about["task_spec"] = SPEC.to_dict()
    path.with_suffix(".json").write_text(json.dumps(about))
    return path


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    about = json.loads(path.with_suffix(".json").read_text())
    change(about)
    path.with_suffix(".json").write_text(json.dumps(about))


def replace_field(path: Path, field: str, values: np.ndarray | None, *, episode: int = 1) -> None:
    with h5py.File(path, "r+") as file:
        del file[f"traj_{episode}/{field}"]
        if values is not None:
            file[f"traj_{episode}/{field}"] = values


def test_frames_are_the_observations_before_each_action(tmp_path: Path) -> None:
    path = write_demos(tmp_path)
    store = load_demonstrations(path)
    assert store.episode_ends.tolist() == [4, 11, 16]
    assert store.seeds.tolist() == [10, 11, 12]
    assert store.success.all()
    with h5py.File(path) as file:
        groups = [file[f"traj_{i}"] for i in range(3)]
        for name, field in {"proprio": "agent/qpos", "objects": "extra/obj_pose"}.items():
            wanted = np.concatenate([g[f"obs/{field}"][:-1] for g in groups])
            np.testing.assert_array_equal(store.modalities[name], wanted)
        images = np.concatenate([g["obs/sensor_data/base/rgb"][:-1] for g in groups])
        np.testing.assert_array_equal(store.modalities["rgb.base"], images.transpose(0, 3, 1, 2))
        np.testing.assert_array_equal(store.action, np.concatenate([g["actions"] for g in groups]))
    assert torch.equal(store.limits()["action"][1], store.action.amax(0))


def test_flags_become_columns_and_fields_keep_their_order(tmp_path: Path) -> None:
    path = write_demos(tmp_path)
    with h5py.File(path, "r+") as file:
        for index, length in enumerate((4, 7, 5)):
            file[f"traj_{index}/obs/extra/is_grasped"] = np.arange(length + 1) % 2 == 1
    modality = replace(STATE.observation["objects"], shape=(6,), fields={"extra/is_grasped": 1, "extra/obj_pose": 5})
    spec = replace(STATE, observation={**STATE.observation, "objects": modality})
    store = load_demonstrations(path, spec=spec)
    assert store.modalities["objects"][:4, 0].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert torch.equal(store.modalities["objects"][:, 1:], load_demonstrations(path).modalities["objects"])


def test_fewer_episodes(tmp_path: Path) -> None:
    store = load_demonstrations(write_demos(tmp_path), num_episodes=2)
    assert store.num_frames == 11
    assert torch.equal(store.limits()["proprio"][0], store.modalities["proprio"].amin(0))


def test_the_kept_store_is_used_until_the_file_changes(tmp_path: Path) -> None:
    path = write_demos(tmp_path)
    before = load_demonstrations(path)
    (kept,) = (tmp_path / ".cache").iterdir()
    written = (kept / "action.npy").stat().st_mtime_ns
    load_demonstrations(path)
    assert (kept / "action.npy").stat().st_mtime_ns == written
    assert not list(kept.glob("*.pkl"))
    replace_field(path, "actions", np.zeros((7, 4), dtype=np.float32))
    os.utime(path, ns=(1, 1))
    after = load_demonstrations(path)
    assert not torch.equal(before.action, after.action)
    assert len(list((tmp_path / ".cache").iterdir())) == 1


def test_a_folder_that_cannot_be_written_to_is_no_obstacle(tmp_path: Path) -> None:
    path = write_demos(tmp_path)
    (tmp_path / "file").write_text("")
    store = load_demonstrations(path, cache_dir=tmp_path / "file" / "cache")
    assert torch.equal(store.action, load_demonstrations(path).action)


def test_another_spec_reads_other_fields(tmp_path: Path) -> None:
    path = write_demos(tmp_path, with_spec=False)
    assert set(load_demonstrations(path, spec=STATE).modalities) == {"proprio", "objects"}
    assert set(load_demonstrations(path, spec=SPEC).modalities) == {"proprio", "objects", "rgb.base"}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _nan(path: Path, field: str) -> None:
    with h5py.File(path, "r+") as file:
        file[f"traj_1/{field}"][2, 1] = np.nan


def _flat_observations(path: Path) -> None:
    replace_field(path, "obs", np.zeros((8, 14), dtype=np.float32))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing file": (lambda p: p.unlink(), r"demos\.h5 does not exist.*robopolicy collect"),
    "missing json": (lambda p: p.with_suffix(".json").unlink(), r"demos\.h5 lacks the file demos\.json"),
    "broken json": (lambda p: p.with_suffix(".json").write_text("{"), r"demos\.json is not readable"),
    "other json": (lambda p: p.with_suffix(".json").write_text("[]"), r"needs `env_info` and `episodes`"),
    "no episodes": (lambda p: edit_json(p, lambda a: a["episodes"].clear()), r"demos\.h5 holds no episodes"),
    "truncated": (_truncate, r"demos\.h5 is no complete HDF5 file"),
    "episode lost": (
        lambda p: edit_json(p, lambda a: a["episodes"][1].update(episode_id=77)),
        r"demos\.h5 lacks traj_77",
    ),
    "other control mode": (
        lambda p: edit_json(p, lambda a: a["episodes"][1].update(control_mode="pd_joint_pos")),
        r"episode 1: .*control_mode=pd_joint_pos.*robopolicy collect source=.*control_mode=pd_ee_delta_pos",
    ),
    "other environment": (
        lambda p: edit_json(p, lambda a: a["env_info"].update(env_id="Else-v1")),
        r"Else-v1.*Fake-v0",
    ),
    "nan observation": (
        lambda p: _nan(p, "obs/agent/qpos"),
        r"episode 1, field 'obs/agent/qpos'.*not finite at step 2",
    ),
    "inf action": (
        lambda p: replace_field(p, "actions", np.full((7, 4), np.inf, np.float32)),
        r"episode 1, field 'actions'.*not finite at step 0",
    ),
    "wide action": (
        lambda p: replace_field(p, "actions", np.zeros((7, 8), np.float32)),
        r"episode 1, field 'actions': must be \[T >= 1, 4\].*\(7, 8\)",
    ),
    "empty episode": (
        lambda p: replace_field(p, "actions", np.zeros((0, 4), np.float32)),
        r"episode 1, field 'actions': must be \[T >= 1, 4\]",
    ),
    "no actions": (lambda p: replace_field(p, "actions", None), r"episode 1, field 'actions': is missing"),
    "missing field": (
        lambda p: replace_field(p, "obs/extra/obj_pose", None),
        r"episode 1, field 'obs/extra/obj_pose': is missing.*agent/qpos",
    ),
    "wide field": (
        lambda p: replace_field(p, "obs/agent/qpos", np.zeros((8, 7), np.float32)),
        r"episode 1, field 'obs/agent/qpos': is 7 wide, wanted is 9",
    ),
    "short field": (
        lambda p: replace_field(p, "obs/agent/qpos", np.zeros((7, 9), np.float32)),
        r"episode 1, field 'obs/agent/qpos': must have 8 rows for 7 actions",
    ),
    "flat observations": (_flat_observations, r"one flat array \(obs_mode=state\).*robopolicy collect source="),
    "no observations": (lambda p: replace_field(p, "obs", None), r"no observations \(obs_mode=none\)"),
    "no pictures": (lambda p: replace_field(p, "obs/sensor_data", None), r"no such pictures.*obs_mode=rgb"),
    "other picture size": (
        lambda p: replace_field(p, "obs/sensor_data/base/rgb", np.zeros((8, 12, 32, 3), np.uint8)),
        r"field 'obs/sensor_data/base/rgb': has pictures.*\(3, 12, 32\)",
    ),
    "float pictures": (
        lambda p: replace_field(p, "obs/sensor_data/base/rgb", np.zeros((8, 24, 32, 3), np.float32)),
        r"field 'obs/sensor_data/base/rgb': is no uint8 image",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_its_episode_and_field(tmp_path: Path, case: str) -> None:
    path = write_demos(tmp_path)
    damage, message = BAD[case]
    damage(path)
    with pytest.raises(DataError, match=rf"(?s){message}"):
        load_demonstrations(path, spec=SPEC)
    assert not list(tmp_path.glob(".cache/*"))


def test_without_a_task_spec_one_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no `task_spec`.*robopolicy collect source="):
        load_demonstrations(write_demos(tmp_path, with_spec=False))


def test_actions_with_another_meaning_are_refused(tmp_path: Path) -> None:
    other = replace(SPEC, action=replace(SPEC.action, physical_high=(0.2, 0.1, 0.1, 0.04)))
    with pytest.raises(DataError, match=r"action\.physical_high"):
        load_demonstrations(write_demos(tmp_path), spec=other)
