"""The safety filter keeps every limit whatever it is asked for; the Panda's kinematics are ManiSkill's."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from ideal_arm import REST, panda

from robopolicy.deploy.contract import Floats
from robopolicy.deploy.kinematics import CHAINS, find_chain
from robopolicy.deploy.limits import SafetyFilter, clamp_names
from robopolicy.deploy.observations import tool_pose
from robopolicy.deploy.robot import RobotFile
from robopolicy.errors import UnknownNameError

CHAIN = CHAINS["panda"]
DT = 0.01
STILL = np.zeros(7)


def wild_targets(rng: np.random.Generator, file: RobotFile, steps: int) -> Iterator[tuple[Floats, Floats]]:
    """Yield what no sane policy would want: far corners, reversals, jitter, false velocities, beyond the limits."""
    low, high = np.array(file.limits.position_low), np.array(file.limits.position_high)
    target, velocity = REST.copy(), STILL.copy()
    for step in range(steps):
        kind = rng.integers(5)
        if step % int(rng.integers(3, 40)) == 0:
            target = rng.uniform(low - 1.0, high + 1.0)
        if kind == 0:
            velocity = rng.normal(size=7) * 5.0
        elif kind == 1:
            velocity = STILL
        yield target + rng.normal(size=7) * 0.05 * (kind == 2), velocity


@pytest.mark.parametrize(
    ("seed", "changes"),
    [
        (0, {}),
        (1, {"safety__jerk_scale": 0.1}),
        (2, {"safety__acceleration_scale": 0.1, "safety__jerk_scale": 0.01}),
        (3, {"safety__workspace_low_m": [-0.3, -0.2, 0.1], "safety__workspace_high_m": [0.2, 0.2, 0.4]}),
        (4, {"safety__tcp_speed_m_s": 0.25}),
    ],
)
def test_no_limit_is_passed_whatever_is_wanted(seed: int, changes: dict[str, object]) -> None:
    file = panda(safety__jump_rad=100.0, safety__following_error_rad=100.0, safety__ramp_in_s=0.0, **changes)
    limits, safety = file.limits, file.safety
    rng, safe = np.random.default_rng(seed), SafetyFilter(file, CHAIN)
    safe.reset(REST)
    q, v, a = REST.copy(), STILL.copy(), STILL.copy()
    low, high = np.array(safety.workspace_low_m), np.array(safety.workspace_high_m)
    clamps, worst = 0, 0.0
    for wanted, velocity in wild_targets(rng, file, 6000):
        out = safe.step(wanted, velocity, q, DT)
        assert not out.rejected
        clamps |= out.clamped
        new_v, new_a = (out.position - q) / DT, ((out.position - q) / DT - v) / DT
        np.testing.assert_allclose(new_v, out.velocity, atol=1e-9)
        assert (out.position >= np.array(limits.position_low)).all()
        assert (out.position <= np.array(limits.position_high)).all()
        assert (abs(new_v) <= np.array(limits.velocity) * (1 + 1e-9)).all()
        assert (abs(new_a) <= np.array(limits.acceleration) * safety.acceleration_scale * (1 + 1e-6)).all()
        assert (abs(new_a - a) <= np.array(limits.jerk) * safety.jerk_scale * DT * (1 + 1e-6)).all()
        new_point = tool_pose(file, CHAIN, out.position)[:3]
        outside = max((low - new_point).max(), (new_point - high).max(), 0.0)
        worst = max(worst, outside)
        q, v, a = out.position.copy(), new_v, new_a
    assert clamps
    print(f"outside the box by at most {worst:.4f} m")
    assert worst < 0.01


def test_the_tool_keeps_its_speed_limit_within_what_acceleration_allows() -> None:
    file = panda(safety__tcp_speed_m_s=0.25, safety__ramp_in_s=0.0)
    safe, target = SafetyFilter(file, CHAIN), REST + np.array([0.6, 0.3, 0.0, 0.4, 0.0, 0.2, 0.0])
    safe.reset(REST)
    before, fastest = tool_pose(file, CHAIN, REST)[:3], 0.0
    for _ in range(400):
        out = safe.step(target, STILL, safe.last.copy(), DT)
        point = tool_pose(file, CHAIN, out.position)[:3]
        fastest, before = max(fastest, float(np.linalg.norm(point - before)) / DT), point
    assert 0.2 < fastest < 0.26
    np.testing.assert_allclose(safe.last, target, atol=1e-3)


def test_a_far_target_is_reached_without_overshoot() -> None:
    safe, target = SafetyFilter(panda(), CHAIN), REST + np.array([0.3, -0.2, 0.1, 0.2, -0.1, 0.2, 0.3])
    safe.reset(REST)
    sign = np.sign(target - REST)
    for _ in range(300):
        out = safe.step(target, STILL, safe.last.copy(), DT)
        assert (sign * (out.position - target) < 1e-4).all()
    np.testing.assert_allclose(out.position, target, atol=1e-3)


def test_a_moving_target_is_followed_without_lag() -> None:
    safe = SafetyFilter(panda(safety__ramp_in_s=0.0), CHAIN)
    safe.reset(REST)
    velocity = np.full(7, 0.4)
    for step in range(1, 40):
        out = safe.step(REST + velocity * step * DT, velocity, safe.last.copy(), DT)
    np.testing.assert_allclose(out.position, REST + velocity * 39 * DT, atol=2e-3)
    np.testing.assert_allclose(out.velocity, velocity, atol=0.02)


@pytest.mark.parametrize(
    ("reason", "wanted", "velocity", "measured"),
    [
        ("not finite", np.full(7, np.nan), STILL, REST),
        ("not finite", REST, np.full(7, np.inf), REST),
        ("not finite", REST, STILL, np.where(np.arange(7) == 3, np.nan, REST)),
        ("wrong length", np.zeros(6), STILL, REST),
        ("jump", REST + 1.6, STILL, REST),
        ("following error", REST, STILL, REST - 0.6),
    ],
)
def test_nothing_of_a_bad_command_leaves_and_the_third_one_stops(
    reason: str, wanted: Floats, velocity: Floats, measured: Floats
) -> None:
    safe = SafetyFilter(panda(), CHAIN)
    safe.reset(REST)
    for _ in range(60):
        safe.step(REST + 0.3, STILL, safe.last.copy(), DT)
    before, speed = safe.last.copy(), abs(safe._last_velocity).max()
    for count in range(1, 4):
        assert safe.why_stop == ""
        out = safe.step(wanted, velocity, measured if reason == "following error" else measured - REST + before, DT)
        assert out.rejected == reason
        assert abs(out.velocity).max() <= speed  # it brakes
        assert safe.counts.rejections[reason] == count
    assert reason in safe.why_stop
    for _ in range(100):
        out = safe.brake(DT)
    np.testing.assert_allclose(out.velocity, 0.0, atol=1e-9)
    assert abs(out.position - before).max() < 0.3


def test_the_first_command_must_be_where_the_arm_is() -> None:
    safe = SafetyFilter(panda(), CHAIN)
    safe.reset(REST)
    assert safe.step(REST, STILL, REST + 0.06, DT).rejected == "first command"
    assert safe.step(REST, STILL, REST + 0.04, DT).rejected == ""
    assert safe.step(REST, STILL, REST + 0.06, DT).rejected == ""  # later ones may lag


def test_speed_grows_after_arming() -> None:
    file = panda(safety__ramp_in_s=1.0, safety__jump_rad=3.0)
    safe = SafetyFilter(file, CHAIN)
    safe.reset(REST)
    top = np.array(file.limits.velocity)
    for step in range(100):
        out = safe.step(REST + np.array([2.0, 0, 0, 0, 0, 0, 0]), STILL, safe.last.copy(), DT)
        assert abs(out.velocity[0]) <= top[0] * (0.1 + 0.9 * step * DT) + 1e-9


def test_clamps_in_a_row_can_stop() -> None:
    safe = SafetyFilter(panda(safety__stop_after_clamps=5), CHAIN)
    safe.reset(REST)
    for _ in range(5):
        out = safe.step(REST + 0.9, STILL, safe.last.copy(), DT)
        assert clamp_names(out.clamped)
    assert "5 commands in a row were clamped" in safe.why_stop


def test_a_slower_speed_is_the_same_path_played_slower() -> None:
    target = REST + np.array([0.3, -0.2, 0.1, 0.2, -0.1, 0.2, 0.3])
    paths = []
    for speed in (1.0, 0.5):
        file = panda(safety__ramp_in_s=0.0, command__rate_hz=100.0 * speed)
        safe = SafetyFilter(file, CHAIN, speed=speed)
        safe.reset(REST)
        paths.append([safe.step(target, STILL, safe.last.copy(), DT / speed).position.copy() for _ in range(60)])
    np.testing.assert_allclose(paths[0], paths[1], atol=1e-9)


def test_the_filter_needs_no_new_memory() -> None:
    safe = SafetyFilter(panda(), CHAIN)
    safe.reset(REST)
    measured = REST.copy()
    tracemalloc.start()
    for _ in range(10):
        safe.step(REST, STILL, measured, DT)
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(2000):
        safe.step(REST, STILL, measured, DT)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 2000


def test_inverse_kinematics_finds_the_way_back() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        goal = CHAIN.forward(REST + rng.normal(size=7) * 0.05)
        position, reached = CHAIN.inverse(goal, REST)
        assert reached
        np.testing.assert_allclose(CHAIN.forward(position), goal, atol=2e-4)


def test_out_of_reach_the_arm_keeps_its_position() -> None:
    goal = CHAIN.forward(REST)
    goal[0] += 2.0
    position, reached = CHAIN.inverse(goal, REST)
    assert not reached
    np.testing.assert_array_equal(position, REST)
    assert not CHAIN.inverse(np.full(7, np.nan), REST)[1]


def test_an_unknown_chain_is_named() -> None:
    with pytest.raises(UnknownNameError, match="Known: panda"):
        find_chain("pandas")


@pytest.mark.sim
@pytest.mark.parametrize("control_mode", ["pd_ee_delta_pos", "pd_ee_delta_pose", "pd_joint_delta_pos"])
def test_targets_equal_those_of_maniskill(control_mode: str) -> None:
    """Forward kinematics to 1e-5, joint targets of random actions to 1e-3 rad (the solver's tolerance)."""
    from robopolicy.deploy.semantics import ActionConverter
    from robopolicy.envs import make

    env = make("pick_cube", num_envs=2, backend="cpu", control_mode=control_mode)
    env.reset(seed=[0, 1])
    file, action = panda(safety__workspace_low_m=[-9, -9, -9], safety__workspace_high_m=[9, 9, 9]), env.task_spec.action
    convert, generator = ActionConverter(action, file, CHAIN), torch.Generator().manual_seed(0)
    agent = env.base_env.agent
    for step in range(12):
        q = agent.robot.get_qpos().numpy().astype(float)[:, :7]
        tools = agent.tcp_pose.raw_pose.numpy()
        for row in range(2):
            np.testing.assert_allclose(tool_pose(file, CHAIN, q[row]), tools[row], atol=1e-5)
        actions = 2.4 * torch.rand(2, action.dim, generator=generator) - 1.2  # beyond the bounds, too
        actions[:, :3] *= 0.5 if step % 2 else 1.0
        env.step(actions)
        targets = agent.controller.controllers["arm"]._target_qpos.numpy()
        for row in range(2):
            found = convert(actions[row].numpy(), q[row], q[row])
            np.testing.assert_allclose(found.position, targets[row], atol=1e-3)
    env.close()


def test_a_session_compiles_nothing_once_it_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    from made_up_time import Stage
    from scripted_planner import ScriptedPlanner, pick_cube_spec, stay

    from robopolicy.deploy import kinematics, limiting

    spec = pick_cube_spec()
    streams = {"obj_pose": np.array([0.0, 0, 0, 1, 0, 0, 0]), "goal_pos": np.zeros(3)}
    on = Stage(monkeypatch, ScriptedPlanner(spec, stay(spec)), streams=streams)
    compiled = [f for m in (kinematics, limiting) for f in vars(m).values() if hasattr(f, "nopython_signatures")]
    known = lambda: {f.__name__: len(f.nopython_signatures) for f in compiled}  # noqa: E731
    before = known()
    assert before["inverse"] == 1
    on.begin()
    on.run(lambda: on.session.runner.plans >= 5)
    assert known() == before
