"""Laws of warm starts: what survives of a guess's error, in closed form; rows, shifts, tails, refusals."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import fake_spec
from torch import Tensor

from robopolicy.errors import RobopolicyError, UnknownNameError
from robopolicy.policies.warm_start import WarmStartPlanner
from robopolicy.rng import Rng, randn
from robopolicy.sampling.samplers import run_steps
from robopolicy.sampling.schedule import NoiseSchedule
from robopolicy.sampling.warm_start import WarmStart
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
    timesteps = (3, 1, 0)
    assert surviving(WarmStart(timesteps=timesteps, stepper=stepper), 0.0) == pytest.approx(0.0, abs=1e-9)
    released = WarmStart(timesteps=timesteps, stepper="ddpm_relabel", betas="released_default")
    assert surviving(released, 0.0) == pytest.approx(0.29, abs=0.01)


@pytest.mark.parametrize("timesteps", [(7, 3, 0), (20, 10, 3, 0)])
def test_ddim_keeps_the_product_of_its_steps(timesteps: Any) -> None:
    std, share = 0.3, 1.0
    bars = [*(SCHEDULE.alpha_bar[level] for level in timesteps), 1.0]
    for here, there in itertools.pairwise(bars):
        clean, noise = math.sqrt(here) * std**2, math.sqrt(1 - here)
        share *= (math.sqrt(there) * clean + math.sqrt(1 - there) * noise) / (here * std**2 + 1 - here)
    assert surviving(WarmStart(timesteps=timesteps, stepper="ddim"), std) == pytest.approx(share, abs=1e-9)


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
