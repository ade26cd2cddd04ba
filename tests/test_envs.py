"""The task table, specifications, the vector environment, rendering: laws for every task on the backends at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from robopolicy import envs
from robopolicy.envs import TASKS, Task, make, task_spec, vulkan
from robopolicy.envs.backends import building, why_no_cuda
from robopolicy.envs.rendering import quiet_drivers
from robopolicy.envs.shaders import fast_shaders
from robopolicy.envs.specs import _sample_scene, control_modes, flatten_observation
from robopolicy.envs.vector import SimVectorEnv
from robopolicy.errors import MissingRequirementError, RobopolicyError, ShapeError, UnknownNameError
from robopolicy.types import Frame, TaskSpec

SEEDS = [5, 11]
CONFIGS = Path(__file__).parents[1] / "configs/task"
CAMERAS = ("pick_cube_rgb", "push_cube_rgb")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mani_skill")

needs_vulkan = pytest.mark.skipif(not vulkan.prepare_vulkan().is_usable, reason=f"needs {vulkan.INSTALL_VULKAN}")


@pytest.fixture(scope="module", params=list(TASKS))
def batch(request: pytest.FixtureRequest) -> Iterator[SimVectorEnv]:
    """Two environments of every task, after `reset(seed=SEEDS)`."""
    env = make(request.param, num_envs=2, backend="cpu")
    env.reset(seed=SEEDS)
    yield env
    env.close()


@pytest.fixture(scope="module")
def pushing() -> Iterator[SimVectorEnv]:
    env = make("push_cube", num_envs=3, backend="cpu")
    yield env
    env.close()


def zeros(env: SimVectorEnv) -> torch.Tensor:
    return torch.zeros(env.num_envs, env.task_spec.action.dim)


def assert_same(left: Frame, right: Frame, *, atol: float = 0.0) -> None:
    assert set(left) == set(right)
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], rtol=0.0, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def rows_of(frame: Frame, rows: list[int]) -> Frame:
    return {name: value[rows] for name, value in frame.items()}


# ---- the table -----------------------------------------------------------------------------------------------------
def test_tasks_are_found_by_name_or_suggested() -> None:
    assert all(envs.find_task(name).name == name for name in TASKS)
    with pytest.raises(UnknownNameError, match=r"'pick_cub'.*Did you mean 'pick_cube'"):
        envs.find_task("pick_cub")


def test_a_field_in_no_modality_or_in_two_is_an_error() -> None:
    task = Task(name="t", env_id="T-v1", instruction="", max_episode_steps=1, objects=("extra/a",), goal=("extra/a",))
    with pytest.raises(RobopolicyError, match="objects and goal"):
        task.modality_of("extra/a")
    with pytest.raises(RobopolicyError, match="no modality"):
        task.modality_of("extra/ab")


@pytest.mark.parametrize("name", sorted({*TASKS, *(path.stem for path in CONFIGS.glob("*.yaml"))} - {*CAMERAS}))
def test_a_task_has_a_config_that_says_what_the_table_says(name: str) -> None:
    task = TASKS[name]
    assert yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) == {
        "name": name,
        "control_mode": task.control_mode,
        "obs_mode": "state",
        "max_episode_steps": task.max_episode_steps,
    }


@pytest.mark.parametrize("name", CAMERAS)
def test_a_shortcut_to_cameras_is_its_task_with_pictures(name: str) -> None:
    assert yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) == {
        "defaults": [name.removesuffix("_rgb"), "_self_"],
        "obs_mode": "rgb64",
    }


# ---- every task ----------------------------------------------------------------------------------------------------
@pytest.mark.sim
def test_every_state_field_lands_in_exactly_one_modality(batch: SimVectorEnv) -> None:
    base = batch.base_env
    raw = flatten_observation(base.get_obs(base.get_info()))
    placed = [field for modality in batch.task_spec.observation.values() for field in modality.fields]
    assert sorted(placed) == sorted(raw)
    frame, _ = batch.reset(seed=SEEDS)
    raw = flatten_observation(base.get_obs(base.get_info()))
    for name, modality in batch.task_spec.observation.items():
        assert frame[name].shape == (2, *modality.shape)
        assert frame[name].dtype == torch.float32
        parts = frame[name].split(list(modality.fields.values()), dim=-1)
        for field, part in zip(modality.fields, parts, strict=True):
            torch.testing.assert_close(part, raw[field].float().reshape(2, -1), msg=lambda m, f=field: f"{f}: {m}")


@pytest.mark.sim
def test_moving_the_objects_changes_objects_and_neither_goal_nor_proprio(batch: SimVectorEnv) -> None:
    from mani_skill.utils.structs import Pose

    env = _sample_scene(batch.task.env_id)
    with building(rendered=False):
        env.reset(seed=SEEDS[0])
    fields = flatten_observation(env.get_obs(env.get_info()))
    for actor in {id(a): a for a in env.scene.actors.values() if a.px_body_type == "dynamic"}.values():
        actor.set_pose(Pose.create_from_pq(actor.pose.p + torch.tensor([0.03, 0.02, 0.01]), actor.pose.q))
    moved = flatten_observation(env.get_obs(env.get_info()))
    changed = {batch.task.modality_of(path) for path in fields if not torch.equal(fields[path], moved[path])}
    assert changed == ({"objects"} if batch.task.objects else set())


@pytest.mark.sim
def test_the_first_state_is_that_of_maniskill_with_the_same_seed(batch: SimVectorEnv) -> None:
    together, info = batch.reset(seed=SEEDS)
    assert info["episode_seed"].tolist() == SEEDS
    stock = make(batch.task.name, backend="single")
    original = _sample_scene(batch.task.env_id)
    for row, seed in enumerate(SEEDS):
        alone, _ = stock.reset(seed=seed)
        assert_same(alone, rows_of(together, [row]), atol=1e-5)
        with building(rendered=False):
            raw = flatten_observation(original.reset(seed=seed)[0])
        for name, modality in batch.task_spec.observation.items():
            values = torch.cat([raw[path].float().reshape(1, -1) for path in modality.fields], dim=-1)
            torch.testing.assert_close(alone[name], values, rtol=0, atol=1e-6)
    swapped, _ = batch.reset(seed=SEEDS[::-1])
    assert_same(rows_of(swapped, [1, 0]), together)
    stock.close()


@pytest.mark.sim
def test_an_episode_runs_and_is_what_the_specification_says(batch: SimVectorEnv) -> None:
    spec = batch.task_spec
    assert spec == task_spec(batch.task.name)
    assert TaskSpec.from_dict(json.loads(json.dumps(spec.to_dict(), allow_nan=False))) == spec
    assert batch.single_action_space.shape == (spec.action.dim,)
    batch.reset(seed=SEEDS)
    frame, reward, terminated, truncated, info = batch.step(zeros(batch))
    assert frame.keys() == spec.observation.keys()
    assert all(torch.isfinite(value).all() for value in frame.values())
    assert reward.shape == terminated.shape == truncated.shape == info["success"].shape == (2,)
    assert (reward.dtype, terminated.dtype, truncated.dtype) == (torch.float32, torch.bool, torch.bool)
    assert info["elapsed_steps"].tolist() == [1, 1]
    with np.errstate(all="raise"):
        assert batch.single_observation_space.contains({name: value[0].numpy() for name, value in frame.items()})


# ---- actions -------------------------------------------------------------------------------------------------------
@pytest.mark.sim
@pytest.mark.parametrize("name", ["pick_cube", "push_t"])
def test_action_bounds_become_the_stated_physical_values_in_every_control_mode(name: str) -> None:
    env = _sample_scene(TASKS[name].env_id)
    modes = control_modes(env)
    assert len(modes) >= 11
    for mode in modes:
        spec = task_spec(name, control_mode=mode).action
        assert (spec.control_mode, spec.control_dt_s) == (mode, 0.05)
        assert len(set(spec.names)) == spec.dim == env.agent.single_action_space.shape[0]
        np.testing.assert_allclose(spec.low, env.agent.single_action_space.low)
        np.testing.assert_allclose(spec.high, env.agent.single_action_space.high)
        for bounds, physical in ((spec.low, spec.physical_low), (spec.high, spec.physical_high)):
            for i in range(spec.dim):
                action = torch.zeros(1, spec.dim)
                action[0, i] = bounds[i]
                parts = env.agent.controller.action_mapping.items()
                inside = torch.cat(
                    [env.agent.controller.controllers[u]._preprocess_action(action[:, a:b]) for u, (a, b) in parts], 1
                )
                assert inside[0, i].item() == pytest.approx(physical[i], abs=1e-6), (mode, spec.names[i])
        assert spec.discrete == tuple(n == "gripper" for n in spec.names)
        assert (spec.delta_from == "none") == (
            not any(d and "vel" not in n for d, n in zip(spec.delta, spec.names, strict=True))
        )
        assert ("target" in mode) == (spec.delta_from == "target")


@pytest.mark.sim
@pytest.mark.parametrize("mode", ["pd_ee_delta_pos", "pd_ee_target_delta_pose", "pd_joint_delta_pos", "pd_joint_vel"])
def test_zero_in_every_increment_means_stay(mode: str) -> None:
    env = make("pick_cube", backend="single", control_mode=mode)
    assert all(env.task_spec.action.delta[:-1])
    before, _ = env.reset(seed=0)
    for _ in range(5):
        after, *_ = env.step(torch.tensor([[0.0] * (env.task_spec.action.dim - 1) + [1.0]]))
    tool = slice(18, 21)
    assert (after["proprio"][:, tool] - before["proprio"][:, tool]).norm() < 0.01
    env.close()


@pytest.mark.sim
def test_a_mode_whose_frame_maniskill_does_not_implement_is_not_offered() -> None:
    assert "pd_ee_delta_pose_align" in _sample_scene("PushT-v1").agent.supported_control_modes
    with pytest.raises(UnknownNameError, match="control mode of panda_stick in task push_t"):
        task_spec("push_t", control_mode="pd_ee_delta_pose_align")


# ---- episodes ------------------------------------------------------------------------------------------------------
@pytest.mark.sim
def test_success_terminates_and_restarts_nothing_without_auto_reset(pushing: SimVectorEnv) -> None:
    from mani_skill.utils.structs import Pose

    pushing.reset(seed=0)
    base = pushing.base_env
    cube = base.obj.pose.p.clone()
    cube[1, :2] = base.goal_region.pose.p[1, :2]
    base.obj.set_pose(Pose.create_from_pq(cube, base.obj.pose.q))
    base.scene._gpu_apply_all()
    for step in (1, 2):
        _, _, terminated, truncated, info = pushing.step(zeros(pushing))
        assert terminated.tolist() == info["success"].tolist() == [False, True, False]
        assert not truncated.any()
        assert info["elapsed_steps"].tolist() == [step] * 3


@pytest.mark.sim
def test_steps_beyond_the_limit_stay_truncated() -> None:
    env = make("push_cube", num_envs=2, backend="cpu", max_episode_steps=2)
    env.reset(seed=0)
    assert [env.step(zeros(env))[3].tolist() for _ in range(3)] == [[False] * 2, [True] * 2, [True] * 2]
    env.close()


@pytest.mark.sim
def test_auto_reset_restarts_the_finished_and_leaves_the_others_alone() -> None:
    kwargs: dict[str, Any] = {"num_envs": 3, "backend": "cpu", "control_mode": "pd_ee_target_delta_pos"}
    auto = make("push_cube", **kwargs, auto_reset=True, max_episode_steps=4)
    plain = make("push_cube", **kwargs)
    action = torch.tensor([[0.5, 0.2, -0.1, 1.0]]).expand(3, 4)
    runs = []
    for env in (auto, plain, auto):
        env.reset(seed=20)
        env.step(action)
        start, _ = env.reset(seed=7, options={"env_idx": [1]})
        runs.append([start, *(env.step(action) for _ in range(4))])
    first, second, again = runs
    assert_same(first[0], second[0])
    for left, right in zip(first[1:3], second[1:3], strict=True):  # nothing ends yet
        assert_same(left[0], right[0])
    frame, _, _, truncated, info = first[3]
    assert truncated.tolist() == [True, False, True]
    assert info["_final_observation"].tolist() == [True, False, True]
    assert_same(info["final_observation"], second[3][0])
    assert info["final_info"]["elapsed_steps"].tolist() == [4, 3, 4]
    assert info["elapsed_steps"].tolist() == [0, 3, 0]
    assert_same(rows_of(frame, [1]), rows_of(second[3][0], [1]))
    assert (frame["objects"][[0, 2]] - second[3][0]["objects"][[0, 2]]).abs().amax(-1).min() > 1e-3
    assert first[4][3].tolist() == [False, True, False]
    assert_same(rows_of(first[4][4]["final_observation"], [1]), rows_of(second[4][0], [1]))
    for left, right in zip(first[1:], again[1:], strict=True):  # unseeded restarts follow from the last seed
        assert_same(left[0], right[0])
    auto.close()
    plain.close()


@pytest.mark.sim
def test_a_partial_reset_gives_the_same_state_as_a_full_one(pushing: SimVectorEnv) -> None:
    full, _ = pushing.reset(seed=[1, 2, 3])
    pushing.reset(seed=[4, 5, 6])
    later, *_ = pushing.step(zeros(pushing))
    partial, info = pushing.reset(seed=[3, 1], options={"env_idx": torch.tensor([2, 0])})
    assert_same(rows_of(partial, [0, 2]), rows_of(full, [0, 2]))
    assert_same(rows_of(partial, [1]), rows_of(later, [1]))
    assert info["episode_seed"].tolist() == [1, -1, 3]
    assert info["elapsed_steps"].tolist() == [0, 1, 0]


@pytest.mark.sim
def test_unseeded_episodes_differ_between_environments_and_resets() -> None:
    env = make("peg_insertion_side", num_envs=2, backend="cpu", seed=3)
    frames = [env.reset()[0] for _ in range(2)]
    states = torch.cat([frame["objects"][:, :2] for frame in frames])
    assert len(states.unique(dim=0)) == 4
    with pytest.raises(RobopolicyError, match="shapes of task 'peg_insertion_side' follow the seed"):
        env.reset(seed=1, options={"env_idx": [0]})
    kept = env.base_env.peg_half_sizes.clone()
    env.reset(options={"env_idx": [0]})
    torch.testing.assert_close(env.base_env.peg_half_sizes, kept)
    env.close()


@pytest.mark.sim
def test_wrong_calls_say_what_was_expected(pushing: SimVectorEnv) -> None:
    pushing.reset(seed=0)
    with pytest.raises(ShapeError, match=r"actions must be \[N=3, A=4\], got \(3, 5\)"):
        pushing.step(torch.zeros(3, 5))
    bad = zeros(pushing)
    bad[1, 2], bad[2, 0] = torch.nan, torch.inf
    with pytest.raises(RobopolicyError, match=r"environments \[1, 2\] are not finite"):
        pushing.step(bad)
    with pytest.raises(ShapeError, match=r"one number per environment to reset \(3\); got 2"):
        pushing.reset(seed=[1, 2])
    with pytest.raises(RobopolicyError, match=r"Seeds must lie in 0\.\."):
        pushing.reset(seed=-1)
    with pytest.raises(ShapeError, match=r"within 0\.\.2; got \[3\]"):
        pushing.reset(options={"env_idx": [3]})
    with pytest.raises(RobopolicyError, match="render=True" if vulkan.prepare_vulkan().is_usable else "Vulkan"):
        pushing.render()


@pytest.mark.sim
def test_wrong_settings_say_what_would_work() -> None:
    for kwargs, message in [
        ({"backend": "gpu"}, "simulation backend 'gpu'"),
        ({"control_mode": "pd_ee_delta_po"}, "Did you mean 'pd_ee_delta_pos'"),
        ({"obs_mode": "depth"}, "observation mode 'depth'.*Known: rgb, rgb64, state"),
        ({"num_envs": 0}, "num_envs must be at least 1"),
        ({"num_envs": 2, "backend": "single"}, "Use backend 'cpu'"),
    ]:
        with pytest.raises(RobopolicyError, match=message):
            make("pick_cube", **kwargs)
    env = make("pick_cube", backend="single")
    with pytest.raises(RobopolicyError, match="before the first step"):
        env.step(zeros(env))
    env.close()
    env.close()
    with pytest.raises(RobopolicyError, match="pick_cube environment is closed"):
        env.reset()


@pytest.mark.sim
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_cuda_is_refused_and_auto_is_cpu() -> None:
    assert envs.default_backend() == "cpu"
    assert "no CUDA device" in (why_no_cuda() or "")
    with pytest.raises(MissingRequirementError, match="Use backend 'cpu'"):
        make("pick_cube", backend="cuda")


@pytest.mark.gpu
@pytest.mark.sim
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_simulation_starts_where_the_cpu_simulation_starts() -> None:
    on_gpu, on_cpu = (make("push_cube", num_envs=2, backend=backend) for backend in ("cuda", "single"))
    together, _ = on_gpu.reset(seed=SEEDS)
    for row, seed in enumerate(SEEDS):
        alone, _ = on_cpu.reset(seed=seed)
        assert_same(rows_of({k: v.cpu() for k, v in together.items()}, [row]), alone, atol=1e-4)


# ---- what the machine lacks ----------------------------------------------------------------------------------------
@pytest.mark.sim
def test_missing_assets_are_an_error_with_the_command_and_no_question(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    envs.load_maniskill()
    from mani_skill.utils import assets, download_asset

    monkeypatch.setattr(assets.DATA_SOURCES["ycb"], "output_dir", tmp_path)
    task = Task(name="pick_ycb", env_id="PickSingleYCB-v1", instruction="Pick it up.", max_episode_steps=100)
    monkeypatch.setitem(TASKS, task.name, task)
    with pytest.raises(MissingRequirementError, match=r"python -m mani_skill\.utils\.download_asset ycb"):
        make("pick_ycb", backend="single")
    with pytest.raises(MissingRequirementError, match="download_asset"):
        download_asset.prompt_yes_no("Robot anymal_c has assets. Would you like to download them now?")
    with pytest.raises(UnknownNameError, match="Did you mean 'PickCube-v1'"):
        envs.require_assets("PickCube-v2")


@pytest.mark.sim
def test_state_observations_need_no_vulkan_and_nothing_is_printed() -> None:
    """In its own process, whose only Vulkan driver does not exist."""
    script = """
        import sys
        import torch
        from robopolicy import envs
        from robopolicy.errors import MissingRequirementError

        assert not {"sapien", "mani_skill"} & set(sys.modules)
        assert not envs.prepare_vulkan().is_usable
        for name, backend in (("pick_cube", "single"), ("push_t", "cpu"), ("peg_insertion_side", "cpu")):
            env = envs.make(name, backend=backend, num_envs=1)
            env.reset(seed=0)
            env.step(torch.zeros(1, env.task_spec.action.dim))
            env.close()
        assert envs.task_spec("pick_cube", obs_mode="rgb").observation["rgb.base_camera"].shape == (3, 128, 128)
        assert envs.render_backend() is None
        for settings in ({"render": True}, {"obs_mode": "rgb"}):
            try:
                envs.make("pick_cube", backend="single", **settings)
            except MissingRequirementError as error:
                assert envs.vulkan.INSTALL_VULKAN in str(error)
            else:
                raise AssertionError(settings)
    """
    environment = {**os.environ, "VK_ICD_FILENAMES": "/nonexistent.json"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


GOOD = (vulkan.VulkanDevice(name="good", is_cpu=True, is_suitable=True),)
OLD = (vulkan.VulkanDevice(name="old", is_cpu=True, is_suitable=False),)


@pytest.mark.skipif(sys.platform != "linux", reason="drivers are chosen on Linux")
@pytest.mark.parametrize(
    ("user", "nvidia", "installed", "software", "chosen_by"),
    [
        ("mine.json", True, OLD, GOOD, "user"),
        (None, True, GOOD, GOOD, "system"),
        (None, True, OLD, GOOD, "sapien"),
        (None, False, GOOD, GOOD, "system"),
        (None, False, OLD, GOOD, "swiftshader"),
        (None, False, (), GOOD, "swiftshader"),
        (None, False, OLD, (), "nobody"),
        (None, False, (), None, "nobody"),
    ],
)
def test_a_vulkan_driver_is_chosen_only_where_needed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    user: str | None,
    nvidia: bool,
    installed: tuple[vulkan.VulkanDevice, ...],
    software: tuple[vulkan.VulkanDevice, ...] | None,
    chosen_by: str,
) -> None:
    icd = tmp_path / "software.json"
    if software is not None:
        icd.touch()
    monkeypatch.setattr(vulkan, "SWIFTSHADER_ICDS", (str(tmp_path / "absent.json"), str(icd)))
    monkeypatch.setattr(vulkan, "has_nvidia_driver", lambda: nvidia)
    monkeypatch.setattr(
        vulkan,
        "list_devices",
        lambda loader: (
            installed
            if (chosen := os.environ.get("VK_ICD_FILENAMES")) is None
            else software
            if chosen == str(icd)
            else GOOD
        ),
    )
    for name in vulkan.USER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if user is not None:
        monkeypatch.setenv("VK_DRIVER_FILES", user)
    found = vulkan.prepare_vulkan.__wrapped__()
    selected = os.environ.pop("VK_ICD_FILENAMES", None)
    assert found.chosen_by == chosen_by
    by_sapien = vulkan._in_sapien("nvidia_icd.json")[0]
    assert selected == {"swiftshader": str(icd), "sapien": by_sapien}.get(chosen_by)
    assert found.is_usable == (chosen_by in ("system", "sapien", "swiftshader"))


def test_driver_noise_is_dropped_and_all_else_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_drivers():
        os.write(2, b"../../third_party/swiftshader/src/Vulkan/libVulkan.cpp:3965 WARNING: UNSUPPORTED: sType = 1\n")
        os.write(2, b"segmentation fault is near\n")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "segmentation fault is near\n"


def test_fast_shaders_keep_everything_but_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec("sapien")
    assert found is not None
    assert found.submodule_search_locations is not None
    original = Path(found.submodule_search_locations[0]) / "vulkan_shader"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copy = fast_shaders(original, "1.2.3")
    assert copy == fast_shaders(original, "1.2.3")
    assert [path.name for path in (tmp_path / "robopolicy").iterdir()] == [copy.name]
    for path in (path for pack in ("minimal", "default") for path in (original / pack).iterdir()):
        before, after = path.read_text().splitlines(), (copy / pack_of(path)).read_text().splitlines()
        assert not any("samplerBRDFLUT" in line for line in after)
        kept = [line for line in before if "samplerBRDFLUT" not in line]
        assert [line for line in after if "exp2(-9.28" not in line] == kept
        assert len(after) >= len(before) - 1


def pack_of(path: Path) -> Path:
    return Path(path.parent.name) / path.name


# ---- pictures ------------------------------------------------------------------------------------------------------
@needs_vulkan
@pytest.mark.sim
def test_pictures_show_the_rows_asked_for_and_follow_the_state() -> None:
    env = make("push_cube", num_envs=3, backend="cpu", render=True, render_size=64)
    env.reset(seed=0)
    pictures = env.render()
    assert (pictures.shape, pictures.dtype) == ((3, 64, 64, 3), torch.uint8)
    assert pictures.float().std() > 10
    assert torch.equal(env.render(rows=[2, 0]), pictures[[2, 0]])
    assert not torch.equal(pictures[0], pictures[1])
    env.step(torch.ones(3, 4))
    assert not torch.equal(env.render(rows=[0]), pictures[:1])
    single = make("push_cube", backend="single", render=True, render_size=64)
    single.reset(seed=2)
    assert torch.equal(single.render()[0], pictures[2])
    env.close()
    single.close()


@needs_vulkan
@pytest.mark.sim
def test_camera_observations_are_what_the_specification_says() -> None:
    env = make("stack_cube", num_envs=2, backend="cpu", obs_mode="rgb")
    spec = env.task_spec
    assert list(spec.observation) == ["proprio", "rgb.base_camera", "rgb.hand_camera"]
    frame, _ = env.reset(seed=0)
    assert {name: tuple(value.shape[1:]) for name, value in frame.items()} == {
        n: m.shape for n, m in spec.observation.items()
    }
    for name in ("rgb.base_camera", "rgb.hand_camera"):
        assert frame[name].dtype == torch.uint8
        assert frame[name].float().std() > 10
        assert not torch.equal(frame[name][0], frame[name][1])
    state = make("stack_cube", num_envs=2, backend="cpu")
    assert_same({"proprio": frame["proprio"]}, {"proprio": state.reset(seed=0)[0]["proprio"]})
    assert spec.differences(state.task_spec)
    env.close()
    state.close()
