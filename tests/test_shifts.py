"""Perturbed environments: nothing at strength zero, nothing beyond what is asked, and the same for every N."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robopolicy.envs import make, vulkan
from robopolicy.envs.shifts import LEVELS, SHIFTS, SUITE, Shift, apply, apply_strength, parse_shift, why_not
from robopolicy.errors import RobopolicyError, UnknownNameError
from robopolicy.types import Environment, Frame, ModalitySpec, TaskSpec
from tests.fakes import fake_spec

DOCS = Path(__file__).parents[1] / "docs/shifts.md"
IN_THE_SCENE = ("camera_pose", "camera_distractors")
SIGNALS = [n for n, row in SHIFTS.items() if row.family in ("observation", "camera") and n not in IN_THE_SCENE]
PHYSICAL = [n for n, row in SHIFTS.items() if row.family in ("physics", "start", "disturbance")]
SEEDS = [3, 4, 5, 6]
STEPS = 45

sim = pytest.mark.sim
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:mani_skill")


def spec_of_everything() -> TaskSpec:
    base = fake_spec(camera=True, proprio=9, objects=8)
    observation: dict[str, ModalitySpec] = {
        **base.observation,
        "objects": ModalitySpec(shape=(8,), fields={"extra/is_grasped": 1, "extra/obj_pose": 7}),
        "goal": ModalitySpec(shape=(3,), fields={"extra/goal_pos": 3}),
    }
    return TaskSpec.from_dict({**base.to_dict(), "observation": {n: vars(m) for n, m in observation.items()}})


class Scripted:
    """Frames that follow from seed and step alone; no two are alike."""

    spec = None
    device = torch.device("cpu")

    def __init__(self, num_envs: int) -> None:
        self.task_spec, self.num_envs = spec_of_everything(), num_envs
        self.seeds, self.at = [0] * num_envs, [0] * num_envs

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Frame, dict[str, Any]]:
        rows = (options or {}).get("env_idx", range(self.num_envs))
        for row, s in zip(rows, seed, strict=True):
            self.seeds[row], self.at[row] = s, 0
        return self.frame(), {}

    def step(self, actions: Tensor) -> tuple[Frame, Tensor, Tensor, Tensor, dict[str, Any]]:
        self.at = [t + 1 for t in self.at]
        none = torch.zeros(self.num_envs)
        return self.frame(), none, none.bool(), none.bool(), {"success": none.bool()}

    def frame(self) -> Frame:
        rows = [torch.Generator().manual_seed(1000 * s + t) for s, t in zip(self.seeds, self.at, strict=True)]
        out = {}
        for name, m in self.task_spec.observation.items():
            if m.is_image:
                values = [torch.randint(1, 255, m.shape, dtype=torch.uint8, generator=g) for g in rows]
            else:
                values = [torch.randn(m.shape, generator=g) + 3 for g in rows]
            out[name] = torch.stack(values)
        if "objects" in out:
            q = out["objects"][:, 4:]
            out["objects"] = torch.cat(
                [torch.ones(len(rows), 1), out["objects"][:, 1:4], q / q.norm(dim=1)[:, None]], 1
            )
        return out


def roll(env: Environment, seeds: list[int], actions: Tensor) -> dict[str, Tensor]:
    """Return what was observed, [T + 1, N, ...] per modality."""
    frame, _ = env.reset(seed=seeds)
    frames = [frame]
    for action in actions:
        frame, *_ = env.step(action)
        frames.append(frame)
    return {name: torch.stack([f[name] for f in frames]) for name in frame}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, bool]:
    assert left.keys() == right.keys()
    return {name: torch.equal(left[name], right[name]) for name in left}


def scripted(name: str, strength: float, seeds: list[int] = SEEDS) -> dict[str, Tensor]:
    env = apply_strength(Scripted(len(seeds)), name, strength)  # type: ignore[arg-type]
    return roll(env, seeds, torch.zeros(STEPS, len(seeds), 4))


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return roll(Scripted(len(SEEDS)), SEEDS, torch.zeros(STEPS, len(SEEDS), 4))  # type: ignore[arg-type]


# ---- names and the table ---------------------------------------------------------------------------------------------
def test_a_shift_is_a_name_and_a_level() -> None:
    assert parse_shift("goal_moved:3") == Shift("goal_moved", 3)
    assert str(parse_shift("goal_moved")) == "goal_moved:2"
    with pytest.raises(UnknownNameError, match="Did you mean 'goal_moved'"):
        parse_shift("goal_move:1")
    with pytest.raises(RobopolicyError, match=r"must be 0 \(none\), 1, 2 or 3; got 4"):
        parse_shift("goal_moved:4")
    with pytest.raises(RobopolicyError, match="written name:level"):
        parse_shift("goal_moved:strong")
    env = Scripted(1)
    assert apply(env, Shift("delay_proprio", 0)) is env  # type: ignore[arg-type]


def test_the_table_is_frozen() -> None:
    """Published numbers name the suite: change a row and it is another suite, with another SUITE and another digest."""

    def digest(without: str = "") -> str:
        rows = [r for r in SHIFTS.values() if r.name != without]
        text = "\n".join(f"{r.name} {r.strengths} {r.unit} {r.kind} {r.group} {r.needs}" for r in rows)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    assert (SUITE, digest()) == ("2", "b0824451b9c1f75c")
    assert digest(without="camera_distractors") == "013f756c004d79bf"  # suite 1: its numbers are still comparable
    for row in SHIFTS.values():
        assert 0 < row.strengths[0] < row.strengths[1] < row.strengths[2]
        assert "{}" in row.what


def test_the_documentation_lists_every_shift_with_its_strengths() -> None:
    text = DOCS.read_text()
    for row in SHIFTS.values():
        strengths = ", ".join(f"{s:g}" for s in row.strengths)
        assert re.search(rf"^\| `{row.name}` \|.*\| {re.escape(strengths)}", text, re.MULTILINE), row.name


def test_what_means_nothing_for_a_task_says_why() -> None:
    state = fake_spec()
    assert why_not("camera_pose", state) == "the policy sees no camera"
    assert why_not("dropout_goal", state) == "the policy observes no `goal`"
    assert why_not("object_mass", state) == "the task has no free object"
    assert why_not("goal_moved", state) == "the task has no goal that can be moved"
    assert why_not("noise_objects", state) is why_not("action_delay", state) is None
    with pytest.raises(RobopolicyError, match="shift=goal_moved cannot be applied to task 'fake'"):
        apply(Scripted(1), Shift("goal_moved"))  # type: ignore[arg-type]


# ---- signals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_is_changed_alone_not_at_all_at_zero_and_alike_for_every_n(
    name: str, plain: dict[str, Tensor]
) -> None:
    assert all(same(scripted(name, 0.0), plain).values())
    changed = scripted(name, SHIFTS[name].strength(3))
    group = SHIFTS[name].group or "camera"
    assert [n for n, kept in same(changed, plain).items() if not kept] == ["rgb.base" if group == "camera" else group]
    alone = scripted(name, SHIFTS[name].strength(3), SEEDS[2:3])
    assert all(torch.equal(changed[n][:, 2], alone[n][:, 0]) for n in plain)


@pytest.mark.parametrize("name", SIGNALS)
def test_restarting_one_environment_leaves_the_others_alone(name: str) -> None:
    whole = scripted(name, SHIFTS[name].strength(3))
    fresh = scripted(name, SHIFTS[name].strength(3), [9])
    env = apply(Scripted(4), Shift(name, 3))  # type: ignore[arg-type]
    env.reset(seed=SEEDS)
    for _ in range(10):
        env.step(torch.zeros(4, 4))
    frame, _ = env.reset(seed=[9], options={"env_idx": [1]})
    others = [0, 2, 3]
    for t in range(12):
        for n in frame:
            assert torch.equal(frame[n][others], whole[n][10 + t, others])
            assert torch.equal(frame[n][1], fresh[n][t, 0])
        frame, *_ = env.step(torch.zeros(4, 4))


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_late_stream_shows_the_frame_of_so_many_steps_ago(steps: int, plain: dict[str, Tensor]) -> None:
    late = scripted("delay_objects", steps)["objects"]
    assert torch.equal(late[steps:], plain["objects"][:-steps])
    assert torch.equal(late[:steps], plain["objects"][:1].expand_as(late[:steps]))


def test_a_stuck_stream_repeats_one_frame_for_so_many_steps(plain: dict[str, Tensor]) -> None:
    seen, live = scripted("freeze_proprio", 12)["proprio"], plain["proprio"]
    for row in range(len(SEEDS)):
        stuck = [t for t in range(STEPS + 1) if not torch.equal(seen[t, row], live[t, row])]
        assert stuck == list(range(stuck[0], stuck[0] + 12))
        assert 6 <= stuck[0] <= 25
        assert all(torch.equal(seen[t, row], live[stuck[0] - 1, row]) for t in stuck)


def test_lost_frames_arrive_as_zeros_as_often_as_asked() -> None:
    seeds = list(range(40))
    seen = scripted("dropout_objects", 0.2, seeds)["objects"]
    lost = (seen == 0).all(dim=-1)
    assert torch.equal(lost, (seen == 0).any(dim=-1))
    assert abs(lost.float().mean() - 0.2) < 4 * (0.2 * 0.8 / lost.numel()) ** 0.5
    assert torch.equal((scripted("dropout_objects", 0.5, seeds)["objects"] == 0).all(dim=-1) & lost, lost)  # nested


def test_noise_has_the_stated_scale_spares_flags_and_keeps_rotations(plain: dict[str, Tensor]) -> None:
    seen = scripted("noise_objects", 0.01)["objects"]
    error = seen - plain["objects"]
    assert torch.equal(seen[..., 0], plain["objects"][..., 0])  # is_grasped
    assert error[..., 1:4].std() == pytest.approx(0.01, rel=0.1)
    torch.testing.assert_close(seen[..., 4:].norm(dim=-1), torch.ones(STEPS + 1, len(SEEDS)))
    turned = 2 * torch.acos((seen[..., 4:] * plain["objects"][..., 4:]).sum(-1).clamp(max=1))
    assert turned.square().mean().sqrt() == pytest.approx(0.02 * 3**0.5, rel=0.1)  # 0.02 rad about each axis
    weak = scripted("noise_objects", 0.003)["objects"] - plain["objects"]  # levels scale the same draws
    torch.testing.assert_close(error[..., 1:4] * 0.3, weak[..., 1:4], atol=1e-6, rtol=0)


def test_pictures_change_as_the_table_says(plain: dict[str, Tensor]) -> None:
    live = plain["rgb.base"].float()
    covered = scripted("camera_occlusion", 0.16)["rgb.base"]
    grey = (covered == 128).all(dim=2)
    assert abs(grey.float().mean() - 0.16) < 0.02
    assert all(bool((grey[t] & grey[0] == grey[0]).all()) for t in range(STEPS))  # one place per episode
    bright = scripted("camera_brightness", 0.4)["rgb.base"].float()
    ratio = (bright / live)[live < 180].reshape(-1)
    assert set(np.unique(ratio.sub(1).sign().numpy())) <= {-1.0, 0.0, 1.0}
    assert ratio.sub(1).abs().median() == pytest.approx(0.4, abs=0.02)
    factors = (scripted("camera_colour", 0.5)["rgb.base"].float() / live).median(dim=-1).values.median(dim=-1).values
    assert factors.std(dim=0).max() < 0.01  # over the episode
    assert 0.5 <= factors.min() < factors.max() <= 1.5
    assert (scripted("noise_camera", 8)["rgb.base"].float() - live)[(live > 40) & (live < 215)].std() == pytest.approx(
        8, rel=0.1
    )


def test_an_environment_that_resets_by_itself_is_refused() -> None:
    env = Scripted(1)
    env.auto_reset = True  # type: ignore[attr-defined]
    with pytest.raises(RobopolicyError, match="auto_reset=False"):
        apply(env, Shift("delay_proprio"))  # type: ignore[arg-type]


# ---- inside the simulation -------------------------------------------------------------------------------------------
def random_actions(steps: int, num_envs: int) -> Tensor:
    return torch.rand(steps, num_envs, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    env = make("pick_cube", num_envs=4, backend="cpu")
    out = roll(env, SEEDS, random_actions(25, 4))
    env.close()
    return out


@pytest.fixture
def shifted() -> Iterator[Callable[..., Any]]:
    """Return a function that builds pick_cube perturbed by one shift."""
    built: list[Any] = []

    def build(name: str, strength: float, *, num_envs: int = 2, **kwargs: Any) -> Any:
        built.append(apply_strength(make("pick_cube", num_envs=num_envs, backend="cpu", **kwargs), name, strength))
        return built[-1]

    yield build
    for env in built:
        env.close()


@sim
@pytest.mark.parametrize("strength", ["zero", "level 3"])
def test_all_physical_shifts_together_are_nothing_at_zero_and_alike_for_every_n(
    strength: str, reference: dict[str, Tensor]
) -> None:
    def build(num_envs: int, backend: str = "cpu") -> Environment:
        env: Environment = make("pick_cube", num_envs=num_envs, backend=backend)
        for name in (*PHYSICAL, "action_delay"):
            env = apply_strength(env, name, 0.0 if strength == "zero" else SHIFTS[name].strength(3))
        return env

    actions = random_actions(25, 4)
    together = build(4)
    seen = roll(together, SEEDS, actions)
    assert all(same(seen, roll(together, SEEDS, actions)).values())  # the second time as the first
    together.close()
    if strength == "zero":
        assert all(same(seen, reference).values())
        return
    assert not any(same(seen, reference).values())
    alone = build(1)
    roll(alone, [77], actions[:, :1])
    one = roll(alone, SEEDS[2:3], actions[:, 2:3])
    assert all(torch.equal(seen[n][:, 2], one[n][:, 0]) for n in seen)
    alone.close()
    stock = build(1, "single")  # ManiSkill's own environment
    theirs = roll(stock, SEEDS[2:3], actions[:, 2:3])
    stock.close()
    for name, value in one.items():
        torch.testing.assert_close(theirs[name], value, atol=1e-4, rtol=0)
    clean = make("pick_cube", num_envs=4, backend="cpu")  # and no trace is left for others
    assert all(same(roll(clean, SEEDS, actions), reference).values())
    clean.close()


@sim
def test_heavier_and_more_slippery_objects_are_so_and_recover(shifted: Callable[..., Any]) -> None:
    env = shifted("object_mass", 4.0)
    (body, _), base = env.base_env.cube._bodies, env.base_env
    mass, inertia = body.mass, np.array(body.inertia)
    for _ in range(2):
        env.reset(seed=[1, 2])
        assert body.mass == pytest.approx(5 * mass)
        np.testing.assert_allclose(body.inertia, 5 * inertia)
    assert base.agent.robot.links[3]._bodies[0].mass == pytest.approx(
        shifted("delay_proprio", 1).base_env.agent.robot.links[3]._bodies[0].mass
    )
    slippery = shifted("object_friction", 0.75)
    slippery.reset(seed=[1, 2])
    shapes = [b.collision_shapes[0] for b in slippery.base_env.cube._bodies]
    assert [s.physical_material.dynamic_friction for s in shapes] == pytest.approx([0.075, 0.075])
    table = slippery.base_env.table_scene.table._bodies[0].collision_shapes[0]
    assert table.physical_material.dynamic_friction == pytest.approx(0.3)
    env._originals, originals = {}, dict(env._originals)
    for changed, original in originals.items():
        env.restore(changed, original)
    assert body.mass == pytest.approx(mass)


@sim
def test_an_impulse_on_an_object_changes_its_momentum_by_what_was_asked(shifted: Callable[..., Any]) -> None:
    env = shifted("impulse_object", 0.6)
    env.reset(seed=[1, 2])
    bodies = env.base_env.cube._bodies

    def momenta() -> np.ndarray:
        return np.stack([body.mass * np.asarray(body.linear_velocity) for body in bodies])

    env.when[:] = [1, 2]
    env.steps[:] = 1
    before = momenta()
    env.before_step()
    change = momenta() - before
    assert np.linalg.norm(change[0]) == pytest.approx(0.6 * bodies[0].mass, rel=1e-5)
    assert change[0, 2] == 0
    assert not change[1].any()


@sim
def test_an_impulse_on_the_tool_does_the_work_that_mechanics_says(shifted: Callable[..., Any]) -> None:
    """From rest, an impulse p gives the energy p v / 2, with v the speed of the tool along p right after."""
    env = shifted("impulse_arm", 3.0, num_envs=1)
    env.reset(seed=[1])
    base = env.base_env
    robot = base.agent.robot._objs[0]
    robot.set_qvel(np.zeros(9, dtype=np.float32))
    base.scene._gpu_fetch_all()
    env.when[:] = env.steps[:] = 1
    env.before_step()
    energy, tool = 0.0, None
    for link in robot.links:
        turn = link.cmass_local_pose.q
        spin = (link.entity_pose * link.cmass_local_pose).to_transformation_matrix()[:3, :3].T @ link.angular_velocity
        assert turn.shape == (4,)
        energy += link.mass * np.sum(link.linear_velocity**2) / 2 + np.sum(link.inertia * spin**2) / 2
        if link.name.endswith("panda_hand_tcp"):
            tool = link
    assert tool is not None
    # the tool link is a massless frame: its centre of mass is its origin
    speed = np.asarray(tool.linear_velocity, dtype=np.float64)
    assert np.linalg.norm(speed) > 0.1
    # p points where the draw says; replay it
    draws = np.random.default_rng([1, zlib.crc32(b"impulse_arm")])
    draws.integers(8, 20)
    angle = draws.uniform(-np.pi, np.pi)
    impulse = 3.0 * np.array([np.cos(angle), np.sin(angle), 0.0])
    assert energy == pytest.approx(impulse @ speed / 2, rel=0.02)


@sim
def test_other_starts_are_as_far_off_as_asked(shifted: Callable[..., Any], reference: dict[str, Tensor]) -> None:
    frame, _ = shifted("start_objects", 0.05, num_envs=4).reset(seed=SEEDS)
    moved = frame["objects"] - reference["objects"][0]  # is_grasped, obj_pose (7), tcp_to_obj, obj_to_goal
    assert torch.equal(frame["proprio"], reference["proprio"][0])
    torch.testing.assert_close(moved[:, 1:3].norm(dim=1), torch.full((4,), 0.05))
    assert not moved[:, 3:8].any()
    frame, _ = shifted("start_joints", 0.1, num_envs=4).reset(seed=SEEDS)
    turned = (frame["proprio"] - reference["proprio"][0])[:, :9]
    assert not turned[:, 7:].any()
    assert 0.06 < turned[:, :7].square().mean().sqrt() < 0.14
    assert torch.equal(frame["objects"][:, 1:8], reference["objects"][0][:, 1:8])


@sim
def test_the_goal_moves_once_by_what_was_asked(shifted: Callable[..., Any], reference: dict[str, Tensor]) -> None:
    env = shifted("goal_moved", 0.06, num_envs=4)
    seen = roll(env, SEEDS, random_actions(25, 4))
    away = (seen["goal"] - reference["goal"]).norm(dim=-1)
    for row in range(4):
        when = int(env.when[row])
        assert 8 <= when < 20
        assert not away[: when + 1, row].any()
        torch.testing.assert_close(
            away[when + 1 :, row], torch.full_like(away[when + 1 :, row], 0.06), atol=1e-6, rtol=0
        )
    assert torch.equal(seen["proprio"], reference["proprio"])


@sim
def test_late_actions_are_the_same_actions_later(shifted: Callable[..., Any]) -> None:
    actions = random_actions(12, 2)
    hold = torch.tensor([[0.0, 0.0, 0.0, 1.0]]).expand(2, 4)  # an open gripper that stays open
    late = roll(shifted("action_delay", 2), [1, 2], actions)
    early = roll(shifted("delay_objects", 0), [1, 2], torch.cat([torch.stack([hold, hold]), actions[:-2]]))
    assert all(same(late, early).values())


@sim
@pytest.mark.skipif(not vulkan.prepare_vulkan().is_usable, reason=f"needs {vulkan.INSTALL_VULKAN}")
def test_a_camera_that_stands_elsewhere_sees_another_picture_of_the_same_scene(shifted: Callable[..., Any]) -> None:
    picture, env = "rgb.base_camera", shifted("camera_pose", 0.03, num_envs=1, obs_mode="rgb")
    away, _, again = (env.reset(seed=[seed])[0] for seed in (1, 2, 1))
    assert torch.equal(away[picture], again[picture])
    env.strength = 0.0
    back, _ = env.reset(seed=[1])
    clean = make("pick_cube", num_envs=1, backend="cpu", obs_mode="rgb")
    frame, _ = clean.reset(seed=[1])
    clean.close()
    assert torch.equal(frame[picture], back[picture])
    difference = (frame[picture].float() - away[picture].float()).abs()
    assert (difference > 8).float().mean() > 0.02
    assert torch.equal(frame["proprio"], away["proprio"])


@sim
@pytest.mark.skipif(not vulkan.prepare_vulkan().is_usable, reason=f"needs {vulkan.INSTALL_VULKAN}")
def test_distractors_change_pictures_alone_and_follow_from_the_seed(shifted: Callable[..., Any]) -> None:
    picture, actions = "rgb.base_camera", random_actions(2, 2)
    clean = make("pick_cube", num_envs=2, backend="cpu", obs_mode="rgb")
    plain = roll(clean, [1, 2], actions)
    clean.close()
    env = shifted("camera_distractors", 6, obs_mode="rgb")
    seen = roll(env, [1, 2], actions)
    assert [name for name, kept in same(seen, plain).items() if not kept] == [picture]
    differ = [(seen[picture][t].float() - plain[picture][t].float()).abs().amax(dim=1) > 8 for t in range(3)]
    assert all(0.001 < one.float().mean() < 0.1 for one in differ)  # 4 cm are three pixels of 128
    roll(env, [8, 9], actions[:1])
    assert all(same(roll(env, [1, 2], actions), seen).values())  # those of other episodes are gone
    fewer = shifted("camera_distractors", 1, obs_mode="rgb", num_envs=1)
    alone = roll(fewer, [2], actions[:, 1:])
    one = (alone[picture][0, 0].float() - plain[picture][0, 1].float()).abs().amax(dim=0) > 8
    assert one.sum() < differ[0][1].sum()
    (cube,), (same_cube, *_) = fewer._there[0], env._there[1]
    assert np.array_equal(cube.pose.p, same_cube.pose.p)


# ---- the suite -------------------------------------------------------------------------------------------------------
@sim
def test_the_suite_is_one_command_that_goes_on_where_it_was(cli: Callable[..., Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    zoo = Path(__file__).parents[1] / "checkpoints/zoo/pick_cube-diffusion"
    shutil.copytree(zoo, run, ignore=shutil.ignore_patterns("eval"))
    words = ("eval", f"checkpoint={run}", "shift=suite", "shifts=[action_delay]", "n_episodes=2", "max_episode_steps=3")
    words = (*words, "backend=cpu", "policy.sampler.num_inference_steps=1")
    done = cli(*words)
    assert done.code == 0, done.err
    (folder,) = run.glob("eval/*-suite")
    table = json.loads((folder / "robustness.json").read_text())
    assert [(c["shift"], c["level"]) for c in table["cells"]] == [("action_delay", level) for level in LEVELS]
    assert {c["n"] for c in table["cells"]} == {2}
    assert {s["shift"] for s in table["skipped"]} == {n for n, r in SHIFTS.items() if r.needs == "camera"}
    assert "| action_delay | 3 | 4 steps | 0 %" in (folder / "robustness.md").read_text()
    cells = [run / c["folder"] for c in table["cells"]]
    stamps = [(cell / "eval_info.json").stat().st_mtime_ns for cell in cells]
    settings = [json.loads((cell / "eval_info.json").read_text())["settings"]["shift"] for cell in cells]
    assert settings == ["action_delay:1", "action_delay:2", "action_delay:3"]
    shutil.rmtree(cells[1])
    assert cli(*words).code == 0
    again = [(cell / "eval_info.json").stat().st_mtime_ns for cell in cells]
    assert again[0] == stamps[0]
    assert again[2] == stamps[2]
    assert again[1] > stamps[1]
    wrong = cli(*words[:3], "shifts=[camera_pose]", *words[4:])
    assert wrong.code == 2
    assert "camera_pose means nothing for task 'pick_cube': the policy sees no camera" in wrong.err
