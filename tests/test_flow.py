"""Laws of flows: exact where the path is straight, of the right order where it is not, the right distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fakes import fake_batch, fake_observation, fake_spec, fit_to_bounds
from torch import Tensor, nn

from robopolicy.app import composing
from robopolicy.app.build import build_planner, build_policy
from robopolicy.errors import RobopolicyError, ShapeError, UnknownNameError
from robopolicy.nn.encoder import ObservationEncoder
from robopolicy.nn.mlp import ChunkMLP
from robopolicy.policies.engines import build_engine
from robopolicy.policies.flow import FlowPolicy
from robopolicy.rng import rand
from robopolicy.sampling.flow import FlowSampler, clean_from_velocity, velocity_from
from robopolicy.sampling.samplers import DDIMSampler
from robopolicy.sampling.warm_start import FlowWarmStart, WarmStart
from robopolicy.timing import ChunkTiming
from robopolicy.types import Batch, Observation

MEAN, STD = 0.3, 0.2


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def gaussian_flow(x: Tensor, time: float) -> Tensor:
    """E[clean - noise | x] when clean values are N(MEAN, STD^2): the flow takes x_0 to MEAN + STD x_0."""
    slope = (time * STD**2 - (1 - time)) / (time**2 * STD**2 + (1 - time) ** 2)
    return MEAN + slope * (x - time * MEAN)


def falling(x: Tensor, time: float) -> Tensor:
    """dx/dt = -x: ends at x_0 / e."""
    return -x


# --- samplers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["euler", "midpoint"])
@pytest.mark.parametrize(
    "steps", [{"num_inference_steps": 1}, {"num_inference_steps": 7}, {"times": (0.0, 0.1, 0.7)}, {"times": (0.6,)}]
)
def test_a_straight_path_is_followed_exactly_in_any_steps(method: Any, steps: Any) -> None:
    point = torch.tensor([[[0.5, -1.0]]])
    sampler = FlowSampler(method=method, **steps)
    clean = sampler(lambda x, time: (point - x) / (1 - time), torch.randn(4, 1, 2))
    torch.testing.assert_close(clean, point.expand_as(clean))


@pytest.mark.parametrize(
    ("method", "field", "order"),
    [("euler", falling, 1), ("midpoint", falling, 2), ("euler", gaussian_flow, 1), ("midpoint", gaussian_flow, 3)],
)
def test_halving_the_steps_divides_the_error_by_two_to_the_order(method: Any, field: Any, order: int) -> None:
    """Midpoint gains an order on Gaussian flows, a(t) x with a the slope of log std: its leading error there is
    a'' + 6 a a' + 4 a^3 = (std^2)''' / (2 std^2), and std^2 is quadratic in t on straight paths.
    """
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = MEAN + STD * start if field is gaussian_flow else start / math.e
    coarse, fine = (
        float((FlowSampler(num_inference_steps=num_steps, method=method)(field, start) - exact).abs().max())
        for num_steps in (160, 320)
    )
    assert coarse / fine == pytest.approx(2**order, rel=0.05)


def test_the_marginals_of_a_gaussian_flow_are_those_of_the_closed_form() -> None:
    start = torch.randn(200_000, generator=seeded(0)[0], dtype=torch.float64)
    end = FlowSampler(num_inference_steps=20, method="midpoint")(gaussian_flow, start)
    assert end.mean().item() == pytest.approx(MEAN, abs=2e-3)
    assert end.std().item() == pytest.approx(STD, rel=1e-2)
    for time in (0.3, 0.7):  # also on the way: x_t has mean t MEAN and variance (1 - t)^2 + t^2 STD^2
        middle = start
        for i in range(200):
            middle = middle + gaussian_flow(middle, time * i / 200) * time / 200
        assert middle.mean().item() == pytest.approx(time * MEAN, abs=5e-3)
        assert middle.std().item() == pytest.approx(math.hypot(1 - time, time * STD), rel=1e-2)


def test_the_field_is_asked_at_the_times_that_are_promised() -> None:
    for sampler in (FlowSampler(num_inference_steps=4), FlowSampler(method="midpoint", times=(0.0, 0.5, 0.8))):
        asked: list[float] = []

        def velocity(x: Tensor, time: float, asked: list[float] = asked) -> Tensor:
            asked.append(time)
            return x

        sampler(velocity, torch.zeros(1, 1, 1))
        assert tuple(asked) == sampler.evaluations
    assert sampler.evaluations == pytest.approx((0.0, 0.25, 0.5, 0.65, 0.8, 0.9))


def test_both_predictions_are_the_same_velocity() -> None:
    clean, noise, time = torch.randn(3, 2, 2), torch.randn(3, 2, 2), 0.3
    x = (1 - time) * noise + time * clean
    for kind, output in (("velocity", clean - noise), ("sample", clean)):
        velocity = velocity_from(kind, x, output, time)  # type: ignore[arg-type]
        torch.testing.assert_close(velocity, clean - noise)
        torch.testing.assert_close(clean_from_velocity(x, velocity, time), clean)


@pytest.mark.parametrize("times", [(), (0.5, 0.2), (0.0, 0.0), (-0.1, 0.5), (0.0, 1.0), (0.0, math.nan)])
def test_a_list_that_does_not_ascend_from_noise_to_clean_is_refused(times: Any) -> None:
    with pytest.raises(RobopolicyError, match=r"must ascend strictly within \[0, 1\)"):
        FlowSampler(times=times)


def test_settings_are_checked() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'midpoint'"):
        FlowSampler(method="midpiont")  # type: ignore[arg-type]
    with pytest.raises(RobopolicyError, match="at least 1; got 0"):
        FlowSampler(num_inference_steps=0)
    with pytest.raises(UnknownNameError, match="Known: sample, velocity"):
        small_policy(prediction="epsilon")
    with pytest.raises(RobopolicyError, match=r"starts at time 0; the sampler's times are \[0\.5\]"):
        small_policy(sampler=FlowSampler(times=(0.5,)))
    with pytest.raises(RobopolicyError, match="followed by a FlowSampler, not sampled by DDIMSampler"):
        small_policy(sampler=DDIMSampler())
    with pytest.raises(RobopolicyError, match="planner=rti_flow works"):
        small_policy(warm_start=WarmStart(timesteps=(7, 0)))


# --- the policy -----------------------------------------------------------------------------------------------------


def small_policy(spec: Any = None, **kwargs: Any) -> FlowPolicy:
    spec = spec or fake_spec()
    torch.manual_seed(0)
    policy = FlowPolicy(
        spec,
        timing=ChunkTiming(n_obs_steps=2, horizon=8, n_action_steps=4),
        encoder=ObservationEncoder,
        **{
            "network": lambda *sizes: ChunkMLP(*sizes, width=32, depth=2, cond_width=16),
            "sampler": FlowSampler(num_inference_steps=3),
            "warm_start": FlowWarmStart(tau=0.6),
            **kwargs,
        },
    )
    fit_to_bounds(policy.norm, spec)
    with torch.no_grad():
        for parameter in policy.network.parameters():  # some start at zero
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return policy.eval()


@pytest.mark.parametrize(
    "sampler", [FlowSampler(num_inference_steps=3), FlowSampler(times=(0.0, 0.6), method="midpoint")]
)
def test_rows_with_their_own_generators_do_not_depend_on_the_batch(sampler: FlowSampler) -> None:
    policy = small_policy(sampler=sampler)
    obs, guess = fake_observation(policy.spec, 4, 2, seeded(0)[0]), torch.rand(4, 8, 4, generator=seeded(1)[0]) - 0.5
    for given in ({}, {"guess": guess}):
        together = policy.act(obs, generator=seeded(10, 11, 12, 13), **given)
        for rows in ([2], [3, 1]):
            mine = {name: value[rows] for name, value in given.items()}
            alone = policy.act(obs.take(torch.tensor(rows)), generator=seeded(*(10 + row for row in rows)), **mine)
            torch.testing.assert_close(alone, together[rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_the_loss_is_the_error_of_the_prediction(prediction: Any) -> None:
    """A network that answers zero errs by the target's mean square, which is known for standard normal noise."""
    policy = small_policy(prediction=prediction)
    nn.init.zeros_(policy.network.out.weight)
    nn.init.zeros_(policy.network.out.bias)
    batch = fake_batch(policy.spec, 4000, 2, 8)
    clean = policy.norm.encode("action", batch.action).square().mean().item()
    expected = {"sample": clean, "velocity": 1.0 + clean}[prediction]
    assert policy.loss(batch, generator=seeded(0)[0]).item() == pytest.approx(expected, rel=0.03)


def test_padding_counts_only_where_asked() -> None:
    batch = fake_batch(fake_spec(), 6, 2, 8)
    losses = {}
    for flag in (True, False):
        policy = small_policy(prediction="sample", loss_on_padding=flag)
        nn.init.zeros_(policy.network.out.weight)
        nn.init.zeros_(policy.network.out.bias)
        losses[flag] = policy.loss(batch, generator=seeded(0)[0])
    square = policy.norm.encode("action", batch.action).square()
    torch.testing.assert_close(losses[True], square.mean())
    torch.testing.assert_close(losses[False], square.mean(dim=-1)[~batch.is_pad].mean())


def test_a_guess_is_noised_to_its_time_and_followed_from_there() -> None:
    """A network that predicts the guess's own noised value shows what it was given: its mean and spread are known."""
    seen: list[tuple[float, Tensor]] = []

    class Echo(nn.Module):
        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, level: Tensor, cond: Tensor) -> Tensor:
            seen.append((float(level[0]), x))
            return x

    size = 4000
    policy = small_policy(network=Echo, prediction="sample", warm_start=FlowWarmStart(tau=0.6, num_inference_steps=2))
    low, high = policy.action_low, policy.action_high
    guess = (low + 0.75 * (high - low)).expand(size, 8, 4)  # 0.5 in network units
    policy.act(fake_observation(policy.spec, size, 2, seeded(0)[0]), guess=guess, generator=seeded(1)[0])
    assert [level for level, _ in seen] == pytest.approx([40.0, 20.0])  # the share of noise, in percent
    assert seen[0][1].mean().item() == pytest.approx(0.6 * 0.5, abs=5e-3)
    assert seen[0][1].std().item() == pytest.approx(0.4, rel=1e-2)


@pytest.mark.parametrize("tau", [0.2, 0.6, 0.9])
def test_of_a_guesss_error_the_closed_form_share_survives(tau: float) -> None:
    """With the exact velocity an error e of a guess leaves tau STD / std(x_tau) of itself."""
    warm = FlowWarmStart(tau=tau, num_inference_steps=400)
    ends = []
    for error in (0.0, 0.1):
        guess = torch.full((1, 1, 1), MEAN + error, dtype=torch.float64)
        ends.append(FlowSampler(times=warm.times)(gaussian_flow, warm.begin(guess, generator=seeded(0)[0])))
    share = tau * STD / math.hypot(1 - tau, tau * STD)
    assert float(ends[1] - ends[0]) / 0.1 == pytest.approx(share, rel=0.01)


def test_refining_in_two_halves_is_refining_at_once() -> None:
    policy = small_policy(prediction="sample")
    obs, guess = fake_observation(policy.spec, 2, 2, seeded(0)[0]), torch.zeros(2, 8, 4)
    chunk, estimate = policy.refine(obs, guess, generator=seeded(5)[0])
    x, cond, first = policy.refine_first(obs, guess, generator=seeded(5)[0])
    assert torch.equal(first, estimate)
    assert torch.equal(policy.refine_rest(x, cond), chunk)
    alone = FlowWarmStart(tau=0.6, num_inference_steps=1)  # one step from tau to 1 ends at the estimate
    torch.testing.assert_close(*policy.refine(obs, guess, warm_start=alone, generator=seeded(5)[0]))


def test_wrong_inputs_are_named() -> None:
    policy = small_policy(warm_start=None)
    obs = fake_observation(policy.spec, 3, 2, seeded(0)[0])
    with pytest.raises(RobopolicyError, match="from a time on, not from a noise level: planner=rti_flow works"):
        policy.act(obs, guess=torch.zeros(3, 8, 4))
    with pytest.raises(ShapeError, match=r"guess must be \[B=3, H=8, A=4\]"):
        policy.act(obs, guess=torch.zeros(2, 8, 4), warm_start=FlowWarmStart(tau=0.5))
    obs.modalities["proprio"][1] = torch.nan
    with pytest.raises(RobopolicyError, match="'proprio' has values that are not finite in row 1"):
        policy.act(obs)
    with pytest.raises(RobopolicyError, match="The weights predict 'sample'; this policy takes them for 'velocity'"):
        policy.check_saved({"prediction": "sample"})
    policy.check_saved({})


def test_uniform_numbers_are_uniform_and_rows_their_own() -> None:
    many = rand(100_000, generator=seeded(0)[0])
    assert (float(many.min()) >= 0.0, float(many.max()) < 1.0) == (True, True)
    assert many.mean().item() == pytest.approx(0.5, abs=5e-3)
    assert many.var().item() == pytest.approx(1 / 12, rel=0.02)
    assert torch.equal(rand(2, 3, generator=seeded(1, 2))[1], rand(1, 3, generator=seeded(2))[0])


# --- planners and engines -------------------------------------------------------------------------------------------


def test_planners_take_the_policies_that_they_were_made_for(tmp_path: Any) -> None:
    spec = fake_spec()

    def planned(policy: str, planner: str) -> Any:
        cfg = composing.compose("eval", [f"planner={planner}", "checkpoint=x"])
        made = build_policy(composing.compose("train", [f"policy={policy}"]).policy, spec)
        fit_to_bounds(made.norm, spec)
        return build_planner(cfg.planner, made.eval(), 2, tmp_path), made

    planner, policy = planned("flow", "rti_flow")
    obs, rows, shift = fake_observation(spec, 2, 2, seeded(0)[0]), torch.arange(2), torch.tensor([0, 1])
    calls = []
    for _ in range(2):
        assert planner(obs, rows, shift=shift, generator=seeded(1, 2)).shape == (2, 16, 4)
        calls.append(planner.diagnostics["network_calls"].tolist())
    assert calls == [[policy.network_calls()] * 2, [3.0] * 2]
    with pytest.raises(RobopolicyError, match="planner=rti_flow works"):
        planned("flow", "rti")
    with pytest.raises(
        RobopolicyError, match=r"WarmStart\(timesteps=\[7, 3, 0\]\) for example \(planner=rti has one\)"
    ):
        planned("diffusion", "rti_flow")
    with pytest.raises(RobopolicyError, match=r"set planner\.warm_start=null"):
        planned("ebt", "rti_flow")


def test_a_graph_of_it_acts_as_it_does() -> None:
    policy = small_policy(sampler=FlowSampler(num_inference_steps=2, method="midpoint"), prediction="sample")
    engine: Any = build_engine(policy, "onnx", num_threads=1)
    obs, guess = fake_observation(policy.spec, 2, 2, seeded(0)[0]), torch.zeros(2, 8, 4)
    for given in ({}, {"guess": guess}):
        graph = engine.act(obs, generator=seeded(1, 2), **given)
        torch.testing.assert_close(graph, policy.act(obs, generator=seeded(1, 2), **given), rtol=0, atol=1e-5)


# --- it learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_it_learns_two_modes_and_keeps_them_apart(prediction: Any) -> None:
    """One action, scaled by what is seen, to either side: answers must be one or the other, never the mean."""
    spec = fake_spec(action_dim=1, proprio=1, objects=1)
    torch.manual_seed(0)
    policy = FlowPolicy(
        spec,
        timing=ChunkTiming(n_obs_steps=1, horizon=1, n_action_steps=1),
        network=lambda *sizes: ChunkMLP(*sizes, width=64, depth=1, cond_width=32),
        encoder=ObservationEncoder,
        sampler=FlowSampler(num_inference_steps=20),
        prediction=prediction,
    )
    bounds = torch.tensor([-1.0]), torch.tensor([1.0])
    low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
    policy.norm.fit({"proprio": bounds, "objects": bounds, "action": (low, high)})
    rng = seeded(0)[0]

    def demonstrations(size: int) -> tuple[Batch, Tensor]:
        seen = 0.4 + 0.2 * torch.rand(size, generator=rng)
        side = 2.0 * torch.randint(0, 2, (size,), generator=rng) - 1
        action = policy.norm.decode("action", (side * seen).reshape(size, 1, 1))
        obs = Observation(modalities={"proprio": seen.reshape(size, 1, 1), "objects": torch.zeros(size, 1, 1)})
        return Batch(obs=obs, action=action, is_pad=torch.zeros(size, 1, dtype=torch.bool)), seen

    steps = 250
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        policy(demonstrations(128)[0], generator=rng).backward()
        optimizer.step()
        decay.step()

    batch, seen = demonstrations(500)
    found = policy.eval().norm.encode("action", policy.act(batch.obs, generator=rng)).flatten()
    assert 0.3 < (found > 0).float().mean() < 0.7
    assert ((found.abs() - seen).abs() < 0.15).float().mean() > 0.85
