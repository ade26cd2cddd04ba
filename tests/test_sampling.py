"""Laws of schedules, predictions and samplers: equal to diffusers, and exact where the best network is known."""

from __future__ import annotations

import functools
import itertools
import math
from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from robopolicy.errors import UnknownNameError
from robopolicy.sampling.prediction import Prediction, clean_from, noise_from, target
from robopolicy.sampling.samplers import DDIMSampler, DDPMSampler, ddim_steps, ddpm_steps, run_steps
from robopolicy.sampling.schedule import BetaSchedule, NoiseSchedule

KINDS: tuple[Prediction, ...] = get_args(Prediction)
DIFFUSERS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
SHAPE = (5, 4, 3)


def curved_field(x, level):
    """A stand-in for a network: nonlinear in x, different at every level, outside [-1, 1] for some x."""
    return 1.3 * torch.sin(0.5 * x + 0.1 * level[:, None, None])


def gaussian_field(schedule, kind, mean, std):
    """The best network when clean chunks are N(mean, std^2); see Ho et al. 2020, eq. 7, with x_0 integrated out."""
    alpha_bar = torch.tensor(schedule.alpha_bar, dtype=torch.float64)

    def field(x, level):
        a = alpha_bar[level][:, None, None]
        variance = a * std**2 + 1 - a
        deviation = (x - a.sqrt() * mean) / variance
        clean, noise = mean + a.sqrt() * std**2 * deviation, (1 - a).sqrt() * deviation
        return target(kind, clean, noise, a.sqrt(), (1 - a).sqrt())

    return field


# --- schedule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta_schedule", get_args(BetaSchedule))
@pytest.mark.parametrize("num_train_timesteps", [10, 100])
def test_schedule_equals_diffusers(beta_schedule, num_train_timesteps):
    ours = NoiseSchedule(num_train_timesteps=num_train_timesteps, beta_schedule=beta_schedule)
    theirs = DDPMScheduler(num_train_timesteps, beta_schedule=beta_schedule)
    assert torch.equal(torch.tensor(ours.alpha_bar), theirs.alphas_cumprod)
    clean, noise = torch.randn(2, *SHAPE)
    for level in (0, num_train_timesteps // 2, num_train_timesteps - 1):
        torch.testing.assert_close(
            ours.add_noise(clean, noise, level), theirs.add_noise(clean, noise, torch.tensor([level]))
        )


def test_schedule_tables_are_a_rotation():
    signal, sigma = NoiseSchedule().tables()
    torch.testing.assert_close(signal**2 + sigma**2, torch.ones(100))
    assert (signal.diff() < 0).all()
    # the published standard deviations of the squared cosine over 100 levels
    for level, expected in {0: 0.025, 3: 0.074, 7: 0.136, 20: 0.333, 40: 0.606}.items():
        assert sigma[level].item() == pytest.approx(expected, abs=6e-4)


def test_schedule_survives_a_dictionary():
    schedule = NoiseSchedule(num_train_timesteps=37, beta_schedule="linear", beta_end=0.03)
    assert NoiseSchedule(**schedule.to_dict()) == schedule
    assert NoiseSchedule(**schedule.to_dict()).alpha_bar == schedule.alpha_bar


def test_schedule_refuses_nonsense():
    with pytest.raises(UnknownNameError, match="Did you mean 'squaredcos_cap_v2'"):
        NoiseSchedule(beta_schedule="squaredcos_cap")
    with pytest.raises(ValueError, match="num_train_timesteps"):
        NoiseSchedule(num_train_timesteps=0)


# --- predictions ----------------------------------------------------------------------------------------------------


@given(level=st.integers(0, 99), kind=st.sampled_from(KINDS), seed=st.integers(0, 1000))
def test_predictions_invert(level, kind, seed):
    schedule = NoiseSchedule()
    a = schedule.alpha_bar[level]
    clean, noise = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = schedule.add_noise(clean, noise, level)
    output = target(kind, clean, noise, torch.tensor(a).double().sqrt(), torch.tensor(1 - a).double().sqrt())
    for wanted, weights in ((clean, clean_from(kind, a)), (noise, noise_from(kind, a))):
        torch.testing.assert_close(weights.x_weight * x + weights.output_weight * output, wanted, rtol=0, atol=1e-4)


# --- equality with diffusers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_inference_steps", "spacing"), [(100, "leading"), (10, "leading"), (7, "linspace")])
def test_ddpm_equals_diffusers(kind, clip_sample, num_inference_steps, spacing):
    theirs = DDPMScheduler(
        100,
        beta_schedule="squaredcos_cap_v2",
        prediction_type=DIFFUSERS[kind],
        clip_sample=clip_sample,
        timestep_spacing=spacing,
    )
    theirs.set_timesteps(num_inference_steps)
    start = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(0))
    x, generator = start, torch.Generator().manual_seed(1)
    for t in theirs.timesteps:
        x = theirs.step(curved_field(x, t.expand(len(x))), t, x, generator=generator).prev_sample
    sampler = DDPMSampler(num_inference_steps=num_inference_steps, spacing=spacing, clip_sample=clip_sample)
    ours = sampler(curved_field, start, NoiseSchedule(), kind, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_inference_steps", "eta"), [(10, 0.0), (10, 0.7), (100, 0.0), (7, 1.0)])
def test_ddim_equals_diffusers(kind, clip_sample, num_inference_steps, eta):
    theirs = DDIMScheduler(
        100, beta_schedule="squaredcos_cap_v2", prediction_type=DIFFUSERS[kind], clip_sample=clip_sample
    )
    theirs.set_timesteps(num_inference_steps)
    start = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(0))
    x, generator = start, torch.Generator().manual_seed(1)
    for t in theirs.timesteps:
        x = theirs.step(curved_field(x, t.expand(len(x))), t, x, eta=eta, generator=generator).prev_sample
    sampler = DDIMSampler(num_inference_steps=num_inference_steps, eta=eta, clip_sample=clip_sample)
    ours = sampler(curved_field, start, NoiseSchedule(), kind, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_single_step_equals_diffusers(kind, clip_sample):
    """Each of the 100 steps from an x of its own, to single precision: nothing averages out along a chain."""
    settings = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": DIFFUSERS[kind], "clip_sample": clip_sample}
    ddpm, ddim = DDPMScheduler(100, **settings), DDIMScheduler(100, **settings)
    ddim.set_timesteps(100)
    schedule, levels = NoiseSchedule(), tuple(range(99, -1, -1))
    for ours_ddpm, ours_ddim in zip(
        ddpm_steps(schedule, kind, levels), ddim_steps(schedule, kind, levels, 0.5), strict=True
    ):
        level = ours_ddpm.level
        x, output = 2 * torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(level))
        for ours, step in ((ours_ddpm, ddpm.step), (ours_ddim, functools.partial(ddim.step, eta=0.5))):
            theirs = step(output, level, x, generator=torch.Generator().manual_seed(0)).prev_sample
            found = run_steps(
                lambda *_: output,  # noqa: B023
                x,
                [ours],
                clip=clip_sample,
                generator=torch.Generator().manual_seed(0),
            )
            torch.testing.assert_close(found, theirs, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("levels", [[22, 20, 7, 0], [50, 3], [9], [99, 60, 59, 1]])
def test_ddpm_over_any_list_equals_diffusers(levels):
    theirs = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False)
    theirs.set_timesteps(timesteps=levels)
    start = torch.randn(*SHAPE)
    x, generator = start, torch.Generator().manual_seed(1)
    for t in theirs.timesteps:
        x = theirs.step(curved_field(x, t.expand(len(x))), t, x, generator=generator).prev_sample
    sampler = DDPMSampler(clip_sample=False)
    ours = sampler(
        curved_field, start, NoiseSchedule(), "sample", generator=torch.Generator().manual_seed(1), timesteps=levels
    )
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


# --- laws with a known network --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sampler", [DDPMSampler(), DDPMSampler(num_inference_steps=7), DDIMSampler(), DDIMSampler(eta=1.0)]
)
def test_exact_when_all_data_is_one_point(kind, sampler):
    point = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64).expand(*SHAPE)
    schedule = NoiseSchedule()
    start = torch.randn(*SHAPE, dtype=torch.float64)
    clean = sampler(gaussian_field(schedule, kind, point, 0.0), start, schedule, kind)
    torch.testing.assert_close(clean, point, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "levels", [[3, 1, 0], [3, 2, 1, 0], [3], [7, 5, 3, 1, 0], [7, 0], [20, 11, 4, 0], [*range(20, -1, -1)]]
)
@pytest.mark.parametrize("std", [0.05, 0.3])
def test_posterior_keeps_the_known_share_of_the_start(kind, levels, std):
    """Without fresh noise, the share sqrt(a) std^2 / v of the start's deviation survives, whatever the list below."""
    schedule, mean = NoiseSchedule(), 0.2
    a = schedule.alpha_bar[levels[0]]
    deviation = torch.linspace(-0.3, 0.3, math.prod(SHAPE), dtype=torch.float64).reshape(SHAPE)
    quiet = [step._replace(noise_std=0.0) for step in ddpm_steps(schedule, kind, tuple(levels))]
    end = run_steps(gaussian_field(schedule, kind, mean, std), a**0.5 * mean + deviation, quiet, clip=False)
    share = a**0.5 * std**2 / (a * std**2 + 1 - a)
    torch.testing.assert_close(end - mean, share * deviation, rtol=0, atol=1e-9)
    published = {
        (3, 0.05): 0.315,
        (7, 0.05): 0.118,
        (20, 0.05): 0.021,
        (3, 0.3): 0.945,
        (7, 0.3): 0.834,
        (20, 0.3): 0.445,
    }
    assert share == pytest.approx(published[levels[0], std], abs=6e-4)


def test_ddpm_draws_from_the_gaussian():
    """The best network of N(m, s^2) gives mean m and a smaller spread: the posterior takes its clean chunk for certain.

    The spread is worked out from Ho et al.'s betas: each step scales the deviation and adds the posterior variance.
    """
    schedule, mean, std = NoiseSchedule(), 0.3, 0.2
    bars = torch.tensor(schedule.alpha_bar, dtype=torch.float64)
    variance = 1.0
    for t in range(99, -1, -1):
        bar, before = bars[t], bars[t - 1] if t else torch.tensor(1.0)
        beta = 1 - bar / before
        slope = before.sqrt() * beta / (1 - bar) * bar.sqrt() * std**2 / (bar * std**2 + 1 - bar)
        slope = slope + (1 - beta).sqrt() * (1 - before) / (1 - bar)
        variance = slope**2 * variance + (1 - before) / (1 - bar) * beta
    assert 0.9 * std < variance**0.5 < std
    start = torch.randn(4000, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampler = DDPMSampler(clip_sample=False)
    field = gaussian_field(schedule, "epsilon", mean, std)
    samples = sampler(field, start, schedule, "epsilon", generator=torch.Generator().manual_seed(1))
    assert samples.mean().item() == pytest.approx(mean, abs=4 * std / 4000**0.5)
    assert samples.std().item() == pytest.approx(float(variance**0.5), rel=4 / 8000**0.5)


@pytest.mark.parametrize("sampler", [DDPMSampler(num_inference_steps=10), DDIMSampler(eta=0.5)])
def test_rows_with_their_own_generators_are_independent(sampler):
    start = torch.randn(*SHAPE)

    def sample(rows):
        generators = [torch.Generator().manual_seed(100 + row) for row in rows]
        return sampler(curved_field, start[rows], NoiseSchedule(), "epsilon", generator=generators)

    together = sample([0, 1, 2, 3, 4])
    for rows in ([3], [4, 0], [1, 2, 3]):
        torch.testing.assert_close(sample(rows), together[rows], rtol=0, atol=1e-5)


def test_sampler_leaves_the_start_alone():
    start = torch.randn(*SHAPE)
    before = start.clone()
    for sampler in (DDPMSampler(), DDIMSampler()):
        for kind in KINDS:
            sampler(lambda x, level: x, start, NoiseSchedule(), kind)
    assert torch.equal(start, before)


def test_clipping_bounds_the_chunk():
    for sampler in (DDPMSampler(num_inference_steps=5), DDIMSampler(num_inference_steps=5)):
        clean = sampler(lambda x, level: 9 * x, torch.randn(*SHAPE), NoiseSchedule(), "sample")
        assert clean.abs().max() <= 1.0


# --- timesteps ------------------------------------------------------------------------------------------------------


def test_timesteps_of_each_spacing():
    schedule = NoiseSchedule()
    assert DDIMSampler().timesteps(schedule) == tuple(range(90, -1, -10))
    assert DDIMSampler(spacing="trailing").timesteps(schedule) == tuple(range(99, 0, -10))
    assert DDIMSampler(spacing="linspace").timesteps(schedule) == tuple(range(99, -1, -11))
    assert DDPMSampler().timesteps(schedule) == tuple(range(99, -1, -1))


@given(
    sampler=st.sampled_from([DDPMSampler, DDIMSampler]),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    n=st.integers(1, 50),
    num_train_timesteps=st.integers(50, 130),
)
def test_timesteps_always_descend(sampler, spacing, n, num_train_timesteps):
    levels = sampler(num_inference_steps=n, spacing=spacing).timesteps(
        NoiseSchedule(num_train_timesteps=num_train_timesteps)
    )
    assert len(levels) >= n
    assert all(a > b for a, b in itertools.pairwise(levels))


@pytest.mark.parametrize("levels", [[], [3, 3], [1, 5], [100, 3], [4, -1]])
@pytest.mark.parametrize("sampler", [DDPMSampler(), DDIMSampler()])
def test_bad_timesteps_are_refused(sampler, levels):
    with pytest.raises(ValueError, match="descend strictly"):
        sampler(curved_field, torch.randn(*SHAPE), NoiseSchedule(), "epsilon", timesteps=levels)


def test_samplers_refuse_nonsense():
    with pytest.raises(ValueError, match="num_inference_steps"):
        DDIMSampler(num_inference_steps=0)
    with pytest.raises(ValueError, match="eta"):
        DDIMSampler(eta=2.0)
    with pytest.raises(UnknownNameError, match="Did you mean 'leading'"):
        DDPMSampler(spacing="leadng")
    with pytest.raises(UnknownNameError, match="Did you mean 'epsilon'"):
        DDPMSampler()(curved_field, torch.randn(*SHAPE), NoiseSchedule(), "epsilom")
