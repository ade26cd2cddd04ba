"""Laws of warm starts: what survives of a guess's error, in closed form; rows, shifts, tails, refusals."""

from __future__ import annotations

import itertools
import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import fake_observation, fake_spec, fit_to_bounds
from torch import Tensor

from robopolicy.errors import RobopolicyError, UnknownNameError
from robopolicy.nn.encoder import ObservationEncoder
from robopolicy.nn.mlp import ChunkMLP
from robopolicy.policies.actors import ChunkActor
from robopolicy.policies.diffusion import DiffusionPolicy
from robopolicy.policies.warm_start import WarmStartPlanner
from robopolicy.rng import Rng, randn
from robopolicy.sampling.samplers import DDPMSampler, run_steps
from robopolicy.sampling.schedule import NoiseSchedule
from robopolicy.sampling.warm_start import WarmStart, surviving_share, switch_probability
from robopolicy.timing import ChunkTiming
from robopolicy.types import Observation

SCHEDULE = NoiseSchedule()
MEAN = 0.1
TIMING = ChunkTiming(n_obs_steps=2, horizon=8, n_action_steps=4)


def noise_of(std: float) -> Any:
    """The best network, predicting noise, when clean values are N(MEAN, std^2): rti's fake network."""
    bars = torch.tensor(SCHEDULE.alpha_bar, dtype=torch.float64)

    def field(x: Tensor, level: Tensor) -> Tensor:
        bar = bars[level][:, None, None]
        return (1 - bar).sqrt() * (x - bar.sqrt() * MEAN) / (bar * std**2 + 1 - bar)

    return field


def surviving(warm: WarmStart, std: float, deviation: float = 0.3) -> float:
    """The share of a start's deviation that is left at the end, the chain's own noise switched off."""
    bar = warm.schedule(SCHEDULE).alpha_bar[warm.timesteps[0]]
    steps = [step._replace(noise_std=0.0) for step in warm.steps(SCHEDULE, "epsilon")]
    ends = []
    for off in (0.0, deviation):
        start = torch.full((1, 1, 1), bar**0.5 * MEAN + off, dtype=torch.float64)
        ends.append(float(run_steps(noise_of(std), start, steps, clip=False)))
    return (ends[1] - ends[0]) / deviation


@pytest.mark.parametrize("timesteps", [(3, 0), (3, 1, 0), (7, 5, 3, 1, 0), (20, 0), tuple(range(20, -1, -1))])
@pytest.mark.parametrize("std", [0.05, 0.3, 1.0])
def test_the_posterior_keeps_the_share_of_the_closed_form_whatever_the_list(timesteps: Any, std: float) -> None:
    bar = SCHEDULE.alpha_bar[timesteps[0]]
    share = bar**0.5 * std**2 / (bar * std**2 + 1 - bar)
    assert surviving(WarmStart(timesteps=timesteps), std) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize(
    ("top", "std", "share"), [(3, 0.05, 0.315), (7, 0.05, 0.118), (20, 0.05, 0.021), (3, 0.3, 0.945), (20, 0.3, 0.445)]
)
def test_few_steps_correct_narrow_directions_and_keep_broad_ones(top: int, std: float, share: float) -> None:
    assert surviving(WarmStart(timesteps=(top, 0)), std) == pytest.approx(share, abs=6e-4)


@pytest.mark.parametrize(
    ("timesteps", "share"), [((3, 1, 0), 0.434), ((7, 5, 3, 1, 0), 0.272), (tuple(range(20, -1, -1)), 0.021)]
)
def test_relabelling_keeps_more_than_the_posterior(timesteps: Any, share: float) -> None:
    relabelled = surviving(WarmStart(timesteps=timesteps, stepper="ddpm_relabel"), 0.05)
    assert relabelled == pytest.approx(share, abs=6e-4)
    assert relabelled >= surviving(WarmStart(timesteps=timesteps), 0.05) - 1e-12


@pytest.mark.parametrize("stepper", ["ddpm_posterior", "ddpm_relabel"])
def test_a_point_mass_forgets_every_error_with_its_own_betas_and_not_with_the_released_ones(stepper: Any) -> None:
    for timesteps, share in (((2, 1, 0), 0.27), ((3, 1, 0), 0.29), ((5, 3, 1, 0), 0.24), ((7, 5, 3, 1, 0), 0.21)):
        assert surviving(WarmStart(timesteps=timesteps, stepper=stepper), 0.0) == pytest.approx(0.0, abs=1e-9)
        released = WarmStart(timesteps=timesteps, stepper="ddpm_relabel", betas="released_default")
        assert surviving(released, 0.0) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("timesteps", [(7, 3, 0), (20, 10, 3, 0)])
def test_ddim_keeps_the_product_of_its_steps(timesteps: Any) -> None:
    std, share = 0.3, 1.0
    bars = [*(SCHEDULE.alpha_bar[level] for level in timesteps), 1.0]
    for here, there in itertools.pairwise(bars):
        clean, noise = math.sqrt(here) * std**2, math.sqrt(1 - here)
        share *= (math.sqrt(there) * clean + math.sqrt(1 - there) * noise) / (here * std**2 + 1 - here)
    assert surviving(WarmStart(timesteps=timesteps, stepper="ddim"), std) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("std", [0.0, 0.05, 0.3])
def test_surviving_share_is_what_survives(std: float) -> None:
    """Of a guess's error, which a start scales by the signal first."""
    for top in (3, 20):
        bar = SCHEDULE.alpha_bar[top]
        signal, sigma = bar**0.5, (1 - bar) ** 0.5
        kept = signal * surviving(WarmStart(timesteps=(top, 1, 0)), std)
        assert surviving_share(signal, sigma, std) == pytest.approx(kept, abs=1e-9)
        if std > 0.1:  # then a hundred levels are fine steps
            fine = WarmStart(timesteps=tuple(range(top, -1, -1)), stepper="ddim")
            limit = surviving_share(signal, sigma, std, deterministic=True)
            assert limit == pytest.approx(signal * surviving(fine, std), rel=0.02)


def ticks(warm: WarmStart, std: float, *, rows: int, num: int, noise: bool) -> Tensor:
    """The chunks [rows, 1, 1] after `num` refinements in a row at one observation."""
    generator = torch.Generator().manual_seed(0)
    steps = warm.steps(SCHEDULE, "epsilon")
    if not noise:
        steps = tuple(step._replace(noise_std=0.0) for step in steps)
    x = torch.full((rows, 1, 1), MEAN + 2 * std, dtype=torch.float64)
    for _ in range(num):
        x = run_steps(
            noise_of(std), warm.begin(x, SCHEDULE, generator=generator), steps, clip=False, generator=generator
        )
    return x


@pytest.mark.parametrize("top", [3, 20])
def test_ticks_at_one_observation_are_biased_by_a_raw_start_alone(top: int) -> None:
    std, signal = 0.3, SCHEDULE.alpha_bar[top] ** 0.5
    bias = signal * std**2 / (1 + signal - signal * std**2)
    for start, wanted in (("raw", MEAN * (1 + bias)), ("scaled", MEAN)):
        warm = WarmStart(timesteps=(top, 1, 0), start=start)  # type: ignore[arg-type]
        settled = ticks(warm, std, rows=1, num=400, noise=False)
        assert float(settled) == pytest.approx(wanted, abs=1e-6)


def test_renoised_ticks_keep_most_of_the_spread_and_raw_ones_less() -> None:
    std = 0.3
    for start, low, high in (("renoise", 0.73, 0.94), ("raw", 0.40, 0.83)):
        warm = WarmStart(timesteps=(20, 10, 3, 0), start=start)  # type: ignore[arg-type]
        found = ticks(warm, std, rows=4000, num=60, noise=True)
        assert low - 0.03 <= float(found.std()) / std <= high + 0.03
        if start == "renoise":
            assert float(found.mean()) == pytest.approx(MEAN, abs=0.015)


SWITCHES = [(7, 2e-4, 0.0), (15, 0.047, 8e-4), (20, 0.115, 0.014), (28, 0.225, 0.097), (40, 0.343, 0.253)]


@pytest.mark.parametrize(("top", "renoised", "raw"), SWITCHES)
def test_how_often_a_refinement_changes_between_two_modes(top: int, renoised: float, raw: float) -> None:
    bar = SCHEDULE.alpha_bar[top]
    at = bar**0.5, (1 - bar) ** 0.5
    assert switch_probability(*at, 0.5, 0.02) == pytest.approx(renoised, abs=1e-3)
    assert switch_probability(*at, 0.5, 0.02, start="raw") == pytest.approx(raw, abs=6e-4)


@pytest.mark.parametrize("top", [20, 40])
def test_a_chain_between_two_modes_changes_as_often_as_the_law_says(top: int) -> None:
    half_gap, std, bars = 0.5, 0.02, torch.tensor(SCHEDULE.alpha_bar, dtype=torch.float64)

    def field(x: Tensor, level: Tensor) -> Tensor:  # the noise that two Gaussians at -half_gap and half_gap ask for
        bar = bars[level][:, None, None]
        variance = bar * std**2 + 1 - bar
        ends = [(x - sign * bar.sqrt() * half_gap) / variance for sign in (-1, 1)]
        weight = torch.sigmoid(2 * bar.sqrt() * half_gap * x / variance)
        return (1 - bar).sqrt() * ((1 - weight) * ends[0] + weight * ends[1])

    generator = torch.Generator().manual_seed(0)
    warm = WarmStart(timesteps=tuple(range(top, -1, -1)))
    guess = -half_gap + std * torch.randn(10_000, 1, 1, generator=generator, dtype=torch.float64)
    start = warm.begin(guess, SCHEDULE, generator=generator)
    found = run_steps(field, start, warm.steps(SCHEDULE, "epsilon"), clip=False, generator=generator)
    bar = SCHEDULE.alpha_bar[top]
    law = switch_probability(bar**0.5, (1 - bar) ** 0.5, half_gap, std)
    assert float((found > 0).double().mean()) == pytest.approx(law, abs=0.02)


def test_a_gripper_changes_ends_in_few_steps_if_it_is_scaled() -> None:
    bar = SCHEDULE.alpha_bar[3]
    at = bar**0.5, (1 - bar) ** 0.5
    assert switch_probability(*at, 0.1, 0.005, weight=0.99, start="raw") == pytest.approx(0.72, abs=0.01)
    assert 0.45 < switch_probability(*at, 0.1, 0.005, weight=0.99) < 0.86
    for start in ("raw", "renoise"):
        assert switch_probability(*at, 1.0, 0.005, weight=0.99, start=start) < 1e-12  # type: ignore[arg-type]


def test_starts_are_what_they_say() -> None:
    guess, seeded = torch.full((1, 8, 2), 0.5), lambda: torch.Generator().manual_seed(0)
    bar, noise = SCHEDULE.alpha_bar[20], randn(1, 8, 2, generator=seeded())
    starts = {
        name: WarmStart(timesteps=(20, 0), start=name).begin(guess, SCHEDULE, generator=seeded())  # type: ignore[arg-type]
        for name in ("raw", "scaled", "renoise", "renoise_tail", "noise")
    }
    assert torch.equal(starts["raw"], guess)
    torch.testing.assert_close(starts["scaled"], bar**0.5 * guess)
    torch.testing.assert_close(starts["renoise"], bar**0.5 * guess + (1 - bar) ** 0.5 * noise)
    torch.testing.assert_close(starts["renoise_tail"][:, 0], starts["renoise"][:, 0])
    torch.testing.assert_close(
        starts["renoise_tail"][:, -1], bar**0.5 * guess[:, -1] + 2 * (1 - bar) ** 0.5 * noise[:, -1]
    )
    assert torch.equal(starts["noise"], noise)


@pytest.mark.parametrize("timesteps", [(), (3, 1), (0, 3), (3, 3, 0)])
def test_a_list_must_descend_to_zero(timesteps: Any) -> None:
    with pytest.raises(RobopolicyError, match="end at 0"):
        WarmStart(timesteps=timesteps)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(RobopolicyError, match="highest level is 99"):
        WarmStart(timesteps=(150, 0)).check(SCHEDULE)
    with pytest.raises(UnknownNameError, match="renoise"):
        WarmStart(timesteps=(3, 0), start="renois")  # type: ignore[arg-type]
    with pytest.raises(RobopolicyError, match="planner=fresh"):
        WarmStartPlanner(SimpleNamespace(spec=fake_spec(), timing=TIMING), 1)  # type: ignore[arg-type]


class Clock:
    """A row-wise policy: a full chunk is the time it sees, counted on; refining adds noise to the guess."""

    def __init__(self) -> None:
        self.spec, self.timing = fake_spec(), TIMING
        self.device = torch.device("cpu")
        self.warm_start = WarmStart(timesteps=(3, 1, 0))
        self.norm = SimpleNamespace(encode=lambda _, x: x, decode=lambda _, x: x)
        self.guesses: list[Tensor] = []

    def clip(self, action: Tensor) -> Tensor:
        return action

    def diagnose(self, obs: Observation) -> dict[str, Tensor]:
        return {}

    def network_calls(self, sampler: Any = None) -> int:
        return 10

    def act(self, obs: Observation, *, generator: Rng = None) -> Tensor:
        now = obs.modalities["proprio"][:, -1, :1, None]
        steps = torch.arange(self.timing.horizon) - self.timing.now
        chunk = (now + steps[:, None]).expand(-1, -1, self.spec.action.dim)
        return chunk + 0.01 * randn(*chunk.shape, generator=generator)

    def refine(self, obs: Observation, guess: Tensor, *, generator: Rng = None) -> tuple[Tensor, Tensor]:
        self.guesses.append(guess.clone())
        return guess + 0.01 * randn(*guess.shape, generator=generator), guess


def seen(*times: float) -> Observation:
    """Windows whose proprio tells the time."""
    modalities = {}
    for name, modality in fake_spec().observation.items():
        value = torch.zeros(len(times), TIMING.n_obs_steps, *modality.shape)
        modalities[name] = value if name != "proprio" else value + torch.tensor(times)[:, None, None]
    return Observation(modalities=modalities)


def plan(planner: WarmStartPlanner, rows: list[int], shifts: list[int], times: list[float], generators: Any) -> Tensor:
    given = [generators[row] for row in rows]
    return planner(seen(*times), torch.tensor(rows), shift=torch.tensor(shifts), generator=given)


def test_rows_of_mixed_ages_plan_as_each_would_alone() -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    both, noise = WarmStartPlanner(Clock(), 2), generators()  # type: ignore[arg-type]
    together = [plan(both, [0, 1], [0, 0], [0.0, 5.0], noise), plan(both, [0, 1], [1, 3], [1.0, 8.0], noise)]
    both.reset(torch.tensor([False, True]))
    together.append(plan(both, [0, 1], [2, 7], [3.0, 0.0], noise))
    assert both.diagnostics["warm"].tolist() == [1, 0]
    assert both.diagnostics["network_calls"].tolist() == [3, 10]
    for row, times, shifts in ((0, (0.0, 1.0, 3.0), (0, 1, 2)), (1, (5.0, 8.0, 0.0), (0, 3, 7))):
        alone, own = WarmStartPlanner(Clock(), 2), generators()  # type: ignore[arg-type]
        for i, (now, shift) in enumerate(zip(times, shifts, strict=True)):
            if row == 1 and i == 2:
                alone.reset()
            assert torch.equal(plan(alone, [row], [shift], [now], own)[0], together[i][row])


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_a_guess_is_moved_by_the_steps_that_passed(shift: int) -> None:
    policy, noise = Clock(), [torch.Generator().manual_seed(0)]
    planner = WarmStartPlanner(policy, 1, tail_delta="repeat")  # type: ignore[arg-type]
    first = plan(planner, [0], [0], [0.0], noise)
    plan(planner, [0], [shift], [float(shift)], noise)
    kept = TIMING.horizon - shift
    assert torch.equal(policy.guesses[0][:, :kept], first[:, shift:])
    assert torch.equal(policy.guesses[0][:, kept:], first[:, -1:].expand(-1, shift, -1))


def test_tails_of_increments_end_the_motion_and_discrete_ones_repeat() -> None:
    policy, noise = Clock(), [torch.Generator().manual_seed(0)]
    planner = WarmStartPlanner(policy, 1)  # type: ignore[arg-type]
    first = plan(planner, [0], [0], [0.0], noise)
    plan(planner, [0], [2], [2.0], noise)
    action = policy.spec.action
    for dim, (is_delta, discrete) in enumerate(zip(action.delta, action.discrete, strict=True)):
        wanted = torch.zeros(2) if is_delta and not discrete else first[0, -1, dim].expand(2)
        assert torch.equal(policy.guesses[0][0, -2:, dim], wanted)


def test_a_guess_too_old_is_planned_anew() -> None:
    planner, noise = WarmStartPlanner(Clock(), 1, max_shift=4), [torch.Generator().manual_seed(0)]  # type: ignore[arg-type]
    plan(planner, [0], [0], [0.0], noise)
    plan(planner, [0], [5], [5.0], noise)
    assert planner.diagnostics["resampled"].tolist() == [1]
    assert planner.totals["network_calls"] == 20


class Time(Clock):
    """Its action is the time, and refining leaves a guess as it is: what is executed shows where a guess is."""

    def act(self, obs: Observation, *, generator: Rng = None) -> Tensor:
        now = obs.modalities["proprio"][:, -1, :1, None]
        steps = torch.arange(self.timing.horizon) - self.timing.now
        return (now + steps[:, None]).expand(-1, -1, self.spec.action.dim)

    def refine(self, obs: Observation, guess: Tensor, *, generator: Rng = None) -> tuple[Tensor, Tensor]:
        return guess, guess


@pytest.mark.parametrize("n_action_steps", [1, 2, 4])
def test_the_action_of_each_step_is_executed_at_it(n_action_steps: int) -> None:
    planner = WarmStartPlanner(Time(), 2, tail_delta="extrapolate", n_action_steps=n_action_steps)  # type: ignore[arg-type]
    actor = ChunkActor(planner, 2)
    for step in range(12):
        frame = {name: value[:, -1] for name, value in seen(float(step), float(step)).modalities.items()}
        assert actor(frame)[:, :-1].unique().tolist() == [step]  # the last dimension is a gripper
    assert planner.totals["fresh"] == 2


def real_policy() -> DiffusionPolicy:
    torch.manual_seed(0)
    policy = DiffusionPolicy(
        fake_spec(),
        timing=TIMING,
        network=partial(ChunkMLP, width=16, depth=1, cond_width=8),
        encoder=ObservationEncoder,
        schedule=NoiseSchedule(num_train_timesteps=20),
        sampler=DDPMSampler(num_inference_steps=5),
        warm_start=WarmStart(timesteps=(9, 4, 0)),
    )
    for parameter in policy.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    fit_to_bounds(policy.norm, policy.spec)
    return policy.eval().requires_grad_(False)


def test_interleaved_resets_of_a_real_network_equal_separate_rollouts() -> None:
    policy, source = real_policy(), torch.Generator().manual_seed(0)
    frames = [
        {n: v[:, 0] for n, v in fake_observation(policy.spec, 3, 2, source).modalities.items()} for _ in range(12)
    ]
    starts = {0: (0, 5), 1: (0, 3, 9), 2: (0,)}  # steps at which each row's episodes begin

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(row) for row in range(3)]

    together, noise, played = ChunkActor(WarmStartPlanner(policy, 3), 3), generators(), []
    for step, frame in enumerate(frames):
        together.reset(torch.tensor([step in starts[row] for row in range(3)]))
        played.append(together(frame, generator=noise))
    for row, own in enumerate(generators()):
        alone = ChunkActor(WarmStartPlanner(policy, 1), 1)
        for step, frame in enumerate(frames):
            if step in starts[row]:
                alone.reset()
            action = alone({name: value[row : row + 1] for name, value in frame.items()}, generator=[own])
            torch.testing.assert_close(action[0], played[step][row], atol=1e-5, rtol=0)


def test_network_calls_are_counted_as_they_are_made() -> None:
    policy, source = real_policy(), torch.Generator().manual_seed(0)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    policy.network.denoise = lambda *given, _denoise=policy.network.denoise: (count(), _denoise(*given))[1]  # type: ignore[union-attr]
    planner = WarmStartPlanner(policy, 1)
    for step in range(6):
        if step == 4:
            planner.reset()
        obs = fake_observation(policy.spec, 1, 2, source)
        planner(obs, torch.tensor([0]), shift=torch.tensor([1]), generator=source)
    assert calls == planner.totals["network_calls"] == 2 * 5 + 4 * 3
    assert planner.totals["warm"] == 4


def test_weights_of_another_schedule_are_refused() -> None:
    policy = real_policy()
    for other in (
        {"num_train_timesteps": 100},
        {"beta_schedule": "linear"},
        {"beta_schedule": "linear", "beta_end": 0.1},
    ):
        with pytest.raises(RobopolicyError, match="trained on the noise schedule"):
            policy.check_saved({"schedule": {"num_train_timesteps": 20, **other}, "prediction": "epsilon"})
    policy.check_saved({"schedule": {"num_train_timesteps": 20}})


def test_a_callers_chunk_survives_the_next_plan() -> None:
    """Planners hand out what they go on from, and never write into it."""
    planner, noise = WarmStartPlanner(Clock(), 2), [torch.Generator().manual_seed(i) for i in range(2)]  # type: ignore[arg-type]
    first = plan(planner, [0, 1], [0, 0], [0.0, 0.0], noise)
    kept = first.clone()
    for rows in ([0], [0, 1], [1]):
        plan(planner, rows, [1] * len(rows), [1.0] * len(rows), noise)
        assert torch.equal(first, kept)


def test_disagreement_is_told_of_warm_rows_alone() -> None:
    planner, noise = WarmStartPlanner(Clock(), 2), [torch.Generator().manual_seed(i) for i in range(2)]  # type: ignore[arg-type]
    plan(planner, [0], [0], [0.0], noise)
    plan(planner, [0, 1], [1, 1], [1.0, 1.0], noise)
    said = planner.diagnostics
    assert set(said) == {"network_calls", "warm", "resampled", "disagreement"}
    assert said["disagreement"].isnan().tolist() == [False, True]
    assert float(said["disagreement"][0]) == 0.0  # Clock's first estimate is its guess
