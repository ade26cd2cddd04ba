"""Laws of late plans: when which action is due, what becomes of the passed ones, and that zero latency is none."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from fakes import fake_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from point_task import LENGTH, SEEDS, PointEnv, point_spec
from torch import Tensor

from robopolicy.errors import RobopolicyError, UnknownNameError
from robopolicy.evaluation.failures import action_jerk, nearest_words
from robopolicy.evaluation.latency import (
    FixedDelay,
    LatencyActor,
    LatencyMode,
    RecordedDelay,
    planner_latency,
)
from robopolicy.evaluation.rollout import evaluate, noise_generator
from robopolicy.evaluation.statistics import Latency
from robopolicy.policies.actors import ChunkActor
from robopolicy.policies.timeline import ChunkTimeline, delay_steps
from robopolicy.rng import Rng, randn
from robopolicy.timing import ChunkTiming
from robopolicy.types import ActionSpec, Observation, TaskSpec

TIMING = ChunkTiming(n_obs_steps=2, horizon=16, n_action_steps=8)
DT = 0.05


class Scribe:
    """A planner whose actions say which one they are: 100 * (observation's step) + (steps after it), plus noise."""

    hysteresis = 0.0

    def __init__(self, spec: TaskSpec, timing: ChunkTiming = TIMING, *, noise: float = 0.0) -> None:
        self.spec, self.timing, self.noise = spec, timing, noise
        self.shifts: list[tuple[int, int]] = []
        self.diagnostics: dict[str, Tensor] = {}

    def __call__(self, obs: Observation, rows: Tensor, *, shift: Tensor, generator: Rng = None) -> Tensor:
        name = next(iter(self.spec.observation))
        step = obs.modalities[name][:, -1, 0]
        self.shifts += list(zip(rows.tolist(), shift.tolist(), strict=True))
        self.diagnostics = {"step": step.clone()}
        ahead = torch.arange(self.timing.horizon) - self.timing.now
        chunk = (100 * step[:, None] + ahead)[..., None].expand(-1, -1, self.spec.action.dim)
        return chunk + self.noise * randn(*chunk.shape, generator=generator)

    def reset(self, rows: Tensor | None = None) -> None: ...


def absolute_spec(dim: int = 1) -> TaskSpec:
    spec = point_spec()
    same = {key: (value,) * dim for key, value in (("names", "x"), ("units", "rad"))}
    limits = {
        "low": (-1e6,) * dim,
        "high": (1e6,) * dim,
        "physical_low": (-1e6,) * dim,
        "physical_high": (1e6,) * dim,
    }
    action = ActionSpec(
        **same,
        **limits,
        delta=(False,) * dim,
        discrete=(False,) * dim,
        control_mode="pd_joint_pos",
        control_dt_s=DT,
    )
    return TaskSpec(**{**vars(spec), "action": action})


def clock_frame(num_envs: int, step: int) -> dict[str, Tensor]:
    return {"proprio": torch.full((num_envs, 2), float(step))}


def played(executor: str, delay: int, *, steps: int, n_action_steps: int = 8) -> tuple[list[float], Scribe]:
    planner = Scribe(absolute_spec())
    actor = LatencyActor(
        planner,
        1,
        delays=FixedDelay(seconds=delay * DT),
        start=lambda: torch.full((1, 1), -1.0),
        executor=executor,
        n_action_steps=n_action_steps,
    )
    return [float(actor(clock_frame(1, step))) for step in range(steps)], planner


@given(st.floats(0, 10), st.floats(0.001, 1))
def test_a_plan_is_usable_at_the_first_step_after_it_is_there(seconds, dt):
    steps = delay_steps(seconds, dt)
    assert steps * dt >= seconds - 1e-6
    assert steps == 0 or (steps - 1) * dt < seconds
    assert delay_steps(0.0, dt) == 0
    assert delay_steps(7 * dt, dt) == 7


def test_async_plays_on_drops_what_has_passed_and_holds_nothing_but_the_start():
    actions, planner = played("async", 3, steps=30)
    assert actions[:3] == [-1, -1, -1]  # the first plan is being made
    assert actions[3:14] == list(range(11))  # and played from its beginning; the second is begun at step 11
    assert actions[14:22] == [1103 + i for i in range(8)]  # usable 3 steps later; begun again 8 steps after step 11
    assert actions[22:30] == [1903 + i for i in range(8)]
    assert [shift for _, shift in planner.shifts] == [8, 11, 8, 8]  # the first is without meaning


def test_async_holds_when_the_chunk_is_empty_and_begins_anew_as_soon_as_the_worker_is_free():
    actions, planner = played("async", 10, steps=50)
    assert actions[:10] == [-1] * 10
    assert actions[10:25] == list(range(15))  # all there is; the second plan is begun at step 18
    assert actions[25:28] == [14] * 3  # empty: the last target
    assert actions[28:33] == [1810 + i for i in range(5)]  # 10 of its 15 actions have passed
    assert actions[33:38] == [1814] * 5
    assert actions[38:43] == [2810 + i for i in range(5)]  # begun at step 28, when the worker was free
    assert [shift for _, shift in planner.shifts] == [8, 18, 10, 10, 10]


def test_a_latency_beyond_the_chunk_does_not_stop_the_robot_for_good():
    actions, _ = played("async", 20, steps=200)
    assert len(set(actions)) > 40


def test_sync_stands_still_and_then_plays_from_the_beginning():
    actions, planner = played("sync", 3, steps=33)
    for start in (0, 11, 22):
        held = -1 if start == 0 else 100 * (start - 11) + 7
        assert actions[start : start + 3] == [held] * 3
        assert actions[start + 3 : start + 11] == [100 * start + i for i in range(8)]
    assert [shift for _, shift in planner.shifts] == [8, 11, 11]


@pytest.mark.parametrize("executor", ["async", "sync"])
@pytest.mark.parametrize("n_action_steps", [1, 3, 8])
def test_no_latency_is_the_chunk_player_bit_for_bit(executor, n_action_steps):
    spec, num_envs = fake_spec(), 4
    frames = [{n: torch.randn(num_envs, *m.shape) for n, m in spec.observation.items()} for _ in range(40)]
    planners = [Scribe(spec, noise=1.0) for _ in range(2)]
    late = LatencyActor(
        planners[0],
        num_envs,
        delays=FixedDelay(seconds=0.0),
        start=lambda: torch.full((num_envs, 4), torch.nan),
        executor=executor,
        n_action_steps=n_action_steps,
    )
    plain = ChunkActor(planners[1], num_envs, n_action_steps=n_action_steps)
    noise = [[noise_generator(seed) for seed in range(num_envs)] for _ in range(2)]
    for step, frame in enumerate(frames):
        if step in (5, 17):
            ended = torch.tensor([False, True, step == 17, False])
            for actor in (late, plain):
                actor.reset(ended)
        assert torch.equal(late(frame, generator=noise[0]), plain(frame, generator=noise[1]))
        assert late.replanned == plain.replanned
        assert not late.held.any()
    assert planners[0].shifts == planners[1].shifts


def test_every_row_has_its_own_clock():
    class ByRow:
        def __init__(self, steps: list[int]) -> None:
            self.steps = steps

        def __call__(self, rows, first, generator):
            return [DT * self.steps[row] for row in rows.tolist()]

    def run(delays: list[int], resets: dict[int, list[int]]) -> Tensor:
        n = len(delays)
        actor = LatencyActor(
            Scribe(absolute_spec()), n, delays=ByRow(delays), start=lambda: torch.full((n, 1), -1.0), n_action_steps=5
        )
        out = []
        for step in range(40):
            if rows := [row for row, at in resets.items() if step in at]:
                ended = torch.zeros(n, dtype=torch.bool)
                ended[rows] = True
                actor.reset(ended)
            out.append(actor(clock_frame(n, step)).clone())
        return torch.cat(out, dim=1)

    delays, resets = [0, 2, 7, 13], {1: [9], 2: [3, 20], 3: []}
    together = run(delays, resets)
    for row, delay in enumerate(delays):
        assert torch.equal(together[row], run([delay], {0: resets.get(row, [])})[0])


def increments(dim: int, bound: float) -> ActionSpec:
    """`dim` increments and a gripper."""
    return ActionSpec(
        names=(*(f"d{i}" for i in range(dim)), "gripper"),
        low=(-bound,) * dim + (-1.0,),
        high=(bound,) * dim + (1.0,),
        delta=(True,) * dim + (False,),
        discrete=(False,) * dim + (True,),
        units=("m",) * (dim + 1),
        physical_low=(-bound,) * dim + (-1.0,),
        physical_high=(bound,) * dim + (1.0,),
        control_mode="pd_ee_target_delta_pos",
        control_dt_s=DT,
        delta_from="target",
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), late=st.integers(1, 14), bound=st.sampled_from([0.3, 100.0]))
def test_passed_increments_are_neither_lost_nor_doubled(seed, late, bound):
    """A robot that adds increments up nears where the plan wants it by equal shares, as fast as its bounds allow."""
    gen = torch.Generator().manual_seed(seed)
    spec = increments(2, bound)
    timeline = ChunkTimeline(spec, TIMING, 1)
    plans = [(0.5 * torch.randn(1, 16, 3, generator=gen)).clamp(-bound, bound) for _ in range(2)]
    rows, last, where = torch.tensor([0]), torch.zeros(1, 3), torch.zeros(2)

    def move(step: int) -> Tensor:
        nonlocal last, where
        last, playing = timeline.action(step, last)
        timeline.executed(last, playing)
        where = where + last[0, :2]
        return last[0]

    timeline.observe(rows, 0)
    timeline.arrive(rows, plans[0], 0)
    for step in range(4):
        assert torch.equal(move(step), plans[0][0, 1 + step])  # nothing was late
    timeline.observe(rows, 4)
    seen = where.clone()
    for step in range(4, 4 + late):
        move(step)
    timeline.arrive(rows, plans[1], 4 + late)
    owed = plans[1][0, 1 : 1 + late, :2].sum(dim=0) - (where - seen)
    share = owed / (late + 1)
    for i in range(late, 15):
        planned = plans[1][0, 1 + i, :2]
        action = move(4 + i)
        paid = torch.where(owed.abs() < share.abs(), owed, share)
        torch.testing.assert_close(action[:2], (planned + paid).clamp(-bound, bound), atol=1e-5, rtol=0)
        assert action[2] == plans[1][0, 1 + i, 2]  # the gripper does what is due now
        owed = owed - (action[:2] - planned)
        behind = seen + plans[1][0, 1 : 2 + i, :2].sum(dim=0) - where
        torch.testing.assert_close(behind, owed, atol=1e-5, rtol=0)  # nothing else is owed: no motion lost or doubled
        if bound == 100.0 and i >= 2 * late:
            torch.testing.assert_close(behind, torch.zeros(2), atol=1e-5, rtol=0)
    held = move(19)
    assert held[:2].tolist() == [0, 0]
    assert held[2] == plans[1][0, -1, 2]


@pytest.mark.parametrize("delay", [1, 2, 4, 8])
def test_plans_that_overlap_do_not_ring(delay):
    """Replanning as often as can be: one plan that differs from all others is forgotten."""
    actor_steps = 60 * (delay + 1)

    class Steady(Scribe):
        def __call__(self, obs, rows, *, shift, generator=None):
            step = float(obs.modalities["proprio"][0, -1, 0])
            odd = step >= 2 * (delay + 1) and not self.shifts
            if odd:
                self.shifts.append((0, 0))
            return torch.full((1, 16, 2), 0.9 if odd else 0.2)

    spec = TaskSpec(**{**vars(point_spec()), "action": increments(1, 1.0)})
    actor = LatencyActor(
        Steady(spec, ChunkTiming(n_obs_steps=1, horizon=16, n_action_steps=1)),
        1,
        delays=FixedDelay(seconds=delay * DT),
        start=lambda: torch.zeros(1, 2),
    )
    sent = torch.cat([actor(clock_frame(1, step)) for step in range(actor_steps)])[:, 0]
    assert (sent - 0.2).abs().max() > 0.3
    torch.testing.assert_close(sent[-4:], torch.full((4,), 0.2), atol=0.01, rtol=0)


def test_without_conversion_passed_increments_are_lost():
    timeline = ChunkTimeline(increments(1, 10.0), TIMING, 1, convert=False)
    rows, last = torch.tensor([0]), torch.zeros(1, 2)
    for begin, arrive in ((0, 0), (2, 5)):
        timeline.observe(rows, begin)
        for step in range(begin, arrive):
            timeline.executed(*timeline.action(step, last))
        timeline.arrive(rows, torch.arange(16.0)[None, :, None].expand(1, 16, 2), arrive)
        if begin == 0:
            timeline.executed(*timeline.action(0, last))
    assert timeline.action(5, last)[0][0, 0] == 4.0  # index now + 3, and nothing for the three before it


def test_a_plan_for_a_robot_that_stood_still_is_played_from_its_beginning():
    timeline = ChunkTimeline(increments(1, 1.0), TIMING, 1)
    rows, last = torch.tensor([0]), torch.tensor([[0.0, 1.0]])
    timeline.observe(rows, 0)
    for step in range(6):
        action, playing = timeline.action(step, last)
        timeline.executed(action, playing)
        assert action.tolist() == [[0.0, 1.0]]
        assert not playing.any()
    timeline.arrive(rows, torch.linspace(-1, 1, 16)[None, :, None].expand(1, 16, 2), 6)
    assert torch.equal(timeline.action(6, last)[0][0, 0], torch.linspace(-1, 1, 16)[1])


@pytest.mark.parametrize("text", ["frozen", "measured", "fixed_ms:50", "fixed_ms=50", "fixed_ms:0", "fixed_ms:2.5"])
def test_latency_settings_have_one_spelling(text):
    assert str(LatencyMode.parse(text)) == text.replace("=", ":")


def test_latency_settings_that_mean_nothing_are_refused():
    for text in ("slow", "50", "frozen:3"):
        with pytest.raises(UnknownNameError, match="fixed_ms:50"):
            LatencyMode.parse(text)
    for text in ("fixed_ms", "fixed_ms:-1", "fixed_ms:fast"):
        with pytest.raises(RobopolicyError, match="needs milliseconds"):
            LatencyMode.parse(text)
    with pytest.raises(UnknownNameError, match="executor"):
        LatencyActor(Scribe(absolute_spec()), 1, delays=FixedDelay(seconds=0), start=lambda: None, executor="eager")


def test_recorded_times_are_drawn_per_episode_and_leave_the_noise_alone():
    first = Latency(seconds=(1.0, 2.0), batch_size=1, num_dropped=0)
    later = Latency(seconds=tuple(np.linspace(0.1, 0.2, 50)), batch_size=1, num_dropped=0)

    def drawn(seeds: list[int]) -> list[list[float]]:
        delays, noise = RecordedDelay(first, later), [noise_generator(seed) for seed in seeds]
        before = [generator.get_state() for generator in noise]
        rows, yes = torch.arange(len(seeds)), torch.ones(len(seeds), dtype=torch.bool)
        out = [delays(rows, yes, noise), *(delays(rows, ~yes, noise) for _ in range(20))]
        assert all(torch.equal(a, g.get_state()) for a, g in zip(before, noise, strict=True))
        return np.array(out).T.tolist()

    three = drawn([4, 5, 6])
    assert three[1:] == drawn([5, 6])
    assert three[0] != three[1]
    for times in three:
        assert times[0] in first.seconds
        assert set(times[1:]) <= set(later.seconds)
        assert len(set(times)) > 10


def homing(num_envs: int, **kwargs) -> LatencyActor | ChunkActor:
    class Homing(Scribe):
        """Walks from where it is to the origin, .1 per step and coordinate."""

        def __call__(self, obs, rows, *, shift, generator=None):
            super().__call__(obs, rows, shift=shift, generator=generator)
            self.diagnostics = {"distance": obs.modalities["proprio"][:, -1].norm(dim=-1)}
            left = -10 * obs.modalities["proprio"][:, -1]
            ahead = (torch.arange(16) - self.timing.now).clamp(min=0)[:, None]
            plan = (left[:, None] - left[:, None].sign() * ahead).clamp(-1, 1)
            return torch.where(left[:, None].abs() > ahead, plan, 0.0)

    planner = Homing(point_spec())
    if not kwargs:
        return ChunkActor(planner, num_envs)
    return LatencyActor(planner, num_envs, start=lambda: torch.zeros(num_envs, 2), **kwargs)


def test_frozen_and_no_latency_give_the_same_rows():
    frozen = evaluate(homing(5), PointEnv(5), seeds=SEEDS)
    none = evaluate(homing(5, delays=FixedDelay(seconds=0)), PointEnv(5), seeds=SEEDS)
    rows = [[episode.to_row(i) for i, episode in enumerate(result.episodes)] for result in (frozen, none)]
    assert rows[0] == rows[1]
    assert all(torch.equal(a.actions, b.actions) for a, b in zip(frozen.episodes, none.episodes, strict=True))
    assert rows[0][0]["num_replans"] == -(-LENGTH // 8)
    assert rows[0][0]["inference_ms_mean"] == 0


@pytest.mark.parametrize("executor", ["async", "sync"])
def test_latency_costs_time_and_the_outcome_depends_on_the_seed_alone(executor):
    def run(num_envs: int, ms: float):
        actor = homing(num_envs, delays=FixedDelay(seconds=ms / 1e3), executor=executor)
        return evaluate(actor, PointEnv(num_envs), seeds=SEEDS).episodes

    runs = {ms: run(5, ms) for ms in (0, 100, 300)}
    assert [e.to_row(0) for e in run(23, 100)] == [e.to_row(0) for e in runs[100]]
    for early, late in itertools.pairwise(runs.values()):
        for a, b in zip(early, late, strict=True):
            assert (a.first_success_step or 99) <= (b.first_success_step or 99)
    for episode in runs[300]:
        assert set(episode.inference_ms) == {300.0}
        assert episode.num_hold_steps >= 6
        assert episode.to_row(0)["inference_ms_p95"] == pytest.approx(300)
        start = torch.rand(2, generator=torch.Generator().manual_seed(episode.seed)) * 2 - 1
        assert episode.diagnostics["distance"] <= float(start.norm()) + 1e-6
    for frozen, late in zip(runs[0], runs[300], strict=True):
        start = torch.rand(2, generator=torch.Generator().manual_seed(frozen.seed)) * 2 - 1
        if start.norm() > 0.1 and (frozen.first_success_step or 99) <= 8:  # the first plan, played from its beginning
            assert late.first_success_step == frozen.first_success_step + 6


def test_rows_tell_the_smallest_distance_where_the_task_does():
    class Measuring(PointEnv):
        def step(self, actions):
            frame, reward, *ends, info = super().step(actions)
            return frame, reward, *ends, {**info, "distance": self.where.norm(dim=-1)}

    for env, known in ((Measuring(4), True), (PointEnv(4), False)):
        for episode in evaluate(homing(4), env, seeds=SEEDS[:4]).episodes:
            assert episode.min_distance_m == (pytest.approx(-episode.max_reward) if known else None)
            assert episode.actions.untyped_storage().nbytes() == 4 * episode.actions.numel(), "keeps its wave alive"


def test_a_near_miss_is_told_from_a_far_one():
    def rows(*near_m: float | None, success: bool) -> list[dict[str, float | bool | None]]:
        return [{"success": success, "min_distance_m": value} for value in near_m]

    won, failed = rows(0.0981, 0.0990, 0.0999, success=True), rows(0.1005, 0.1032, 0.136, success=False)
    said = "Failed episodes came within 10.3 cm of the goal in the median"
    assert nearest_words(won + failed) == f"{said}, successful ones within 9.9 cm."
    assert nearest_words(failed) == f"{said}."
    assert nearest_words(won) == nearest_words([]) == nearest_words(rows(None, success=False)) == ""


def test_jerk_is_the_third_difference_of_position():
    spec = increments(1, 2.0)
    t = torch.arange(10.0)
    for velocity, wanted in ((t * 0 + 1, 0.0), (0.1 * t, 0.0), (0.1 * t**2, 0.2 / 2)):
        still = torch.stack([velocity, (-1.0) ** t], dim=1)  # the gripper does not count
        assert action_jerk(still, spec) == pytest.approx(wanted, abs=1e-7)
    absolute = absolute_spec().action
    assert action_jerk(t[:, None] ** 3, absolute) == pytest.approx(6e-6)
    assert action_jerk(t[:2, None], absolute) == 0.0


def test_planning_is_timed_for_one_environment_first_plans_apart():
    class Warm(Scribe):
        def __call__(self, obs, rows, *, shift, generator=None):
            assert len(rows) == obs.batch_size == 1
            self.calls.append(self.known)
            self.known = True
            return super().__call__(obs, rows, shift=shift, generator=generator)

        def reset(self, rows=None):
            self.known = False

    planner = Warm(absolute_spec())
    planner.calls, planner.known = [], False
    first, later = planner_latency(planner, clock_frame(6, 0), num_calls=7, num_warmup_calls=2)
    assert planner.calls == [False, True] * 9
    assert (len(first.seconds), len(later.seconds), later.batch_size) == (7, 7, 1)
    assert all(seconds > 0 for seconds in later.seconds)


@pytest.mark.sim
@pytest.mark.parametrize("control_mode", ["pd_ee_delta_pos", "pd_joint_pos", "pd_joint_vel"])
def test_the_hold_action_keeps_the_robot_where_it_is(control_mode):
    from robopolicy.envs import make
    from robopolicy.envs.holding import hold_action

    env = make("push_cube", num_envs=2, backend="cpu", control_mode=control_mode)
    frame, _ = env.reset(seed=3)
    for _ in range(10):
        after, *_ = env.step(hold_action(env))
    width = 9  # joint positions come first
    torch.testing.assert_close(after["proprio"][:, :width], frame["proprio"][:, :width], atol=1e-4, rtol=0)
    env.close()


@pytest.mark.sim
def test_a_controller_without_a_readable_present_value_is_refused():
    from robopolicy.envs import make
    from robopolicy.envs.holding import hold_action

    env = make("push_cube", num_envs=1, backend="cpu", control_mode="pd_ee_pose")
    env.reset(seed=3)
    with pytest.raises(RobopolicyError, match="PDEEPoseController"):
        hold_action(env)
    env.close()
