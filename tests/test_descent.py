"""Laws of descent on energies whose paths are known in closed form."""

from __future__ import annotations

import pytest
import torch

from robopolicy.errors import RobopolicyError
from robopolicy.sampling.descent import Descent, StepRule

FIXED = StepRule(step_size="fixed")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def bowl(centre, stiffness=1.0, offset=0.0):
    """Energy k/2 |x - centre|^2 + offset, with one centre and stiffness per row of the whole batch."""
    stiffness = torch.as_tensor(stiffness, dtype=centre.dtype).expand(len(centre))

    def energy(x, rows, scale):
        c, k = (centre, stiffness) if rows is None else (centre[rows], stiffness[rows])
        return 0.5 * k * (x - c).square().sum(dim=(1, 2)) + offset

    return energy


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_a_quadratic_is_descended_as_its_powers_say(num_steps):
    """a_k - m = (I - alpha P)^k (a_0 - m), P the Hessian."""
    root = torch.randn(6, 6, generator=seeded(0), dtype=torch.float64)
    hessian = root @ root.T / 6
    m = torch.randn(1, 2, 3, generator=seeded(1), dtype=torch.float64)
    start = torch.randn(4, 2, 3, generator=seeded(2), dtype=torch.float64)

    def energy(x, rows, scale):
        gap = (x - m).flatten(1)
        return 0.5 * torch.einsum("bi,ij,bj->b", gap, hessian, gap)

    alpha = 0.3
    end, _ = Descent(max_steps=num_steps, schedule="full")(energy, start, FIXED, alpha)
    power = torch.linalg.matrix_power(torch.eye(6, dtype=torch.float64) - alpha * hessian, num_steps)
    expected = (start - m).flatten(1) @ power.T
    torch.testing.assert_close((end - m).flatten(1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("alpha_stiffness", "settles"), [(1.9, True), (2.1, False)])
def test_descent_is_stable_below_two(alpha_stiffness, settles):
    m = torch.zeros(1, 1, 1)
    end, _ = Descent(max_steps=100, schedule="full")(bowl(m, 4.0), torch.ones(1, 1, 1), FIXED, alpha_stiffness / 4.0)
    assert (end.abs().item() < 1e-3) == settles


def test_momentum_follows_its_two_by_two_recursion():
    mu, alpha, k = 0.9, 0.2, 1.5
    rule = StepRule(step_size="fixed", momentum=mu)
    gap, move = 1.0, 0.0
    for _ in range(12):  # the gradient is taken at x + mu * move
        move = mu * move - alpha * k * (gap + mu * move)
        gap = gap + move
    centre = torch.full((1, 1, 1), 0.5, dtype=torch.float64)
    end, _ = Descent(max_steps=12, schedule="full")(bowl(centre, k), centre + 1.0, rule, alpha)
    assert end.item() - 0.5 == pytest.approx(gap, abs=1e-12)


def test_exp_of_the_energy_times_its_gradient_is_the_gradient_of_its_exp():
    rule = StepRule(step_size="exp_energy", energy_cap=100.0)
    x = torch.randn(5, 2, 3, generator=seeded(0), dtype=torch.float64)

    def energy(x, rows, scale):
        return torch.sin(x).sum(dim=(1, 2)) + 0.1 * x.square().sum(dim=(1, 2))

    moved = rule(energy, x, None, 1.0)
    there = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(energy(there, None, None).exp().sum(), there)
    torch.testing.assert_close(-moved.move.detach(), expected, rtol=1e-12, atol=1e-12)


def test_where_exp_of_the_energy_is_a_bowl_one_step_lands_from_anywhere():
    """The explanation of two-step inference: with exp(E) = k/2 |a - m|^2 + c a step of 1/k ends at m."""
    k, c = 3.0, 0.2
    m = torch.randn(1, 2, 3, generator=seeded(0), dtype=torch.float64)
    rule = StepRule(step_size="exp_energy", alpha=1 / k, energy_cap=100.0)

    def energy(x, rows, scale):
        return (k / 2 * (x - m).square().sum(dim=(1, 2)) + c).log()

    start = 5 * torch.randn(7, 2, 3, generator=seeded(1), dtype=torch.float64)
    end, _ = Descent(max_steps=1, schedule="full")(energy, start, rule, rule.alpha)
    torch.testing.assert_close(end, m.expand_as(end), rtol=0, atol=1e-12)


def test_a_mean_energy_needs_h_times_a_the_step_of_a_sum():
    centre, start = torch.zeros(2, 4, 3), torch.randn(2, 4, 3, generator=seeded(0))
    total = bowl(centre)
    by_sum, _ = Descent(max_steps=3, schedule="full")(total, start, FIXED, 0.1)
    by_mean, _ = Descent(max_steps=3, schedule="full")(lambda *a: total(*a) / 12, start, FIXED, 12 * 0.1)
    torch.testing.assert_close(by_sum, by_mean)


@pytest.mark.parametrize("schedule", ["full", "harmonic", "flow"])
def test_rows_do_not_depend_on_each_other(schedule):
    centre = torch.randn(3, 4, 2, generator=seeded(0))
    start = torch.randn(3, 4, 2, generator=seeded(1))
    rule = StepRule(step_size="exp_energy", normalise="rms_row", momentum=0.5, energy_cap=1.0)
    sampler = Descent(max_steps=5, schedule=schedule, stop="step_length", tolerance=0.05)
    changed = start.clone()
    changed[1] *= 10
    a, b = (sampler(bowl(centre), s, rule, 0.1)[0] for s in (start, changed))
    assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert not torch.equal(a[1], b[1])


def test_normalising_over_the_batch_couples_rows_as_the_published_code_does():
    centre, start = torch.zeros(2, 4, 2), torch.randn(2, 4, 2, generator=seeded(1))
    rule = StepRule(step_size="fixed", normalise="rms_batch")
    changed = start.clone()
    changed[1] *= 10
    a, b = (Descent(max_steps=1, schedule="full")(bowl(centre), s, rule, 0.1)[0] for s in (start, changed))
    assert not torch.allclose(a[0], b[0])


def test_normalising_throws_the_amplitude_away():
    """A chunk of another RMS than 1 is no point of rest: the gradient where its steps begin is not 0."""
    rule = StepRule(step_size="fixed", normalise="rms_row")
    direction = torch.randn(1, 4, 2, generator=seeded(0), dtype=torch.float64)
    direction = direction / direction.square().mean().sqrt()
    for size in (1.0, 0.4):
        centre, alpha = size * direction, 0.5
        energy = bowl(centre, 1 / alpha)  # whole steps land on the centre
        rest, _ = Descent(max_steps=30, schedule="full")(energy, direction + 0.3, rule, alpha)
        torch.testing.assert_close(rest, centre, rtol=0, atol=1e-9)
        begins, rms = rule.normalised(rest)
        gradient = rule(energy, begins, None, alpha).gradient
        torch.testing.assert_close(gradient, (begins - rest) / alpha, rtol=0, atol=1e-9)
        assert rms.item() == pytest.approx(size)
        assert (gradient.abs().max().item() < 1e-9) == (size == 1.0)


def test_harmonic_steps_keep_the_start_as_straight_paths_do():
    """With landings at clean, after k of n steps the start has the weight 1 - k/n; the last step arrives."""
    clean = torch.full((1, 2, 2), 0.7)
    start, seen = torch.randn(1, 2, 2, generator=seeded(0)), []
    Descent(max_steps=5, schedule="harmonic")(bowl(clean), start, FIXED, 1.0, record=seen.append)
    for k, x in enumerate(seen):
        torch.testing.assert_close(x, (1 - k / 5) * start + k / 5 * clean)
    assert len(seen) == 6


@pytest.mark.parametrize("num_steps", [20, 200])
def test_flow_steps_keep_the_spread_of_a_gaussian(num_steps):
    """For data N(m, s^2) the energy of x = a + sigma eps is known; the flow maps N(0, sigma_max^2) onto the data."""
    m, s, levels = 0.3, 0.2, []
    sampler = Descent(max_steps=num_steps, schedule="flow", sigma_min=0.01, sigma_max=4.0)
    ratio = (0.01 / 4.0) ** (1 / (num_steps - 1))

    def energy(x, rows, scale):
        level = 4.0 * ratio ** len(levels)
        levels.append(level)
        return (x - m).square().sum(dim=(1, 2)) / (2 * (s**2 + level**2))

    start = m + 4.0 * torch.randn(4000, 1, 1, generator=seeded(0))
    end, _ = sampler(energy, start, FIXED, 1.0)
    assert end.mean().item() == pytest.approx(m, abs=0.02)
    assert end.std().item() == pytest.approx(s, rel=0.15 if num_steps == 20 else 0.03)


@pytest.mark.parametrize("stop", ["gradient_norm", "step_length"])
def test_rows_stop_on_their_own_and_match_running_them_alone(stop):
    stiffness = torch.tensor([1.0, 0.5, 0.1])  # whole steps of 1: at once, in some steps, in many
    centre = torch.randn(3, 4, 2, generator=seeded(0))
    start = torch.randn(3, 4, 2, generator=seeded(1))
    sampler = Descent(max_steps=40, schedule="full", stop=stop, tolerance=0.01)
    together, seen = sampler(bowl(centre, stiffness), start, FIXED, 1.0)
    counts = seen.num_steps.tolist()
    assert counts[0] < counts[1] < counts[2] <= 40
    for row in range(3):
        one = slice(row, row + 1)
        alone, its = sampler(bowl(centre[one], stiffness[one]), start[one], FIXED, 1.0)
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-5)
        assert its.num_steps.item() == counts[row]
        assert its.energy.item() == pytest.approx(seen.energy[row].item(), abs=1e-5)


def test_a_row_that_stops_early_on_harmonic_steps_ends_at_its_landing():
    clean = torch.full((2, 2, 2), 0.7)
    start = torch.randn(2, 2, 2, generator=seeded(0))
    sampler = Descent(max_steps=10, schedule="harmonic", stop="step_length", tolerance=1e-3)
    end, seen = sampler(bowl(clean), start, FIXED, 1.0)
    torch.testing.assert_close(end, clean)
    assert seen.num_steps.tolist() == [2, 2]  # the second landing equals the first


def test_the_energy_after_one_step_is_the_baseline():
    """A free offset per observation is in the energy, not in its drop."""
    centre, start = torch.zeros(2, 3, 1), torch.ones(2, 3, 1)
    offset = torch.tensor([0.0, 100.0])
    _, seen = Descent(max_steps=4, schedule="full")(lambda *a: bowl(centre)(*a) + offset, start, FIXED, 0.5)
    assert (seen.energy[1] - seen.energy[0]).item() == pytest.approx(100.0)
    assert seen.energy_drop[0].item() == pytest.approx(seen.energy_drop[1].item(), abs=1e-4)
    # x halves at each step: energies at 1, 1/2, 1/4, 1/8 of 3 ones
    assert seen.energy_drop[0].item() == pytest.approx(1.5 * (1 / 4 - 1 / 64), abs=1e-4)
    assert seen.gradient_norm[0].item() == pytest.approx(3**0.5 / 8)
    assert seen.to_rows()[0]["num_steps"] == 4


def test_the_caller_may_be_without_gradients_and_gets_none_back():
    centre, start = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    with torch.no_grad():
        without, _ = Descent()(bowl(centre), start, FIXED, 0.5)
    within, _ = Descent()(bowl(centre), start, FIXED, 0.5)
    assert torch.equal(without, within)
    assert not within.requires_grad
    assert not start.requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepRule(step_size="learnt"), "Did you mean 'learned'"),
        (lambda: StepRule(normalise="rms"), "Unknown normalisation"),
        (lambda: StepRule(alpha=0.0), "alpha must be positive"),
        (lambda: StepRule(temperature=-1.0), "temperature must be positive"),
        (lambda: StepRule(momentum=1.0), r"momentum must be in \[0, 1\)"),
        (lambda: Descent(schedule="half"), "Unknown descent schedule"),
        (lambda: Descent(stop="never"), "Unknown stopping rule"),
        (lambda: Descent(max_steps=0), "max_steps must be at least 1"),
        (lambda: Descent(warm_noise=-0.1), "warm_noise must not be negative"),
        (lambda: Descent(sigma_min=3.0), "0 < sigma_min < sigma_max"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises((ValueError, RobopolicyError), match=message):
        make()
