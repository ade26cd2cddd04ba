"""Contracts of every policy configuration, laws of the diffusion policy and of the actor that plays its chunks."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from einops import rearrange
from fakes import fake_batch, fake_observation, fake_spec, fit_to_bounds
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from torch import nn

import robopolicy.configs
from robopolicy.errors import RobopolicyError, ShapeError
from robopolicy.nn.encoder import ObservationEncoder
from robopolicy.nn.mlp import ChunkMLP
from robopolicy.policies.actors import ChunkActor
from robopolicy.policies.base import Policy
from robopolicy.policies.diffusion import DiffusionPolicy
from robopolicy.policies.planners import FreshPlanner
from robopolicy.sampling.samplers import DDIMSampler, DDPMSampler
from robopolicy.sampling.schedule import NoiseSchedule
from robopolicy.timing import ChunkTiming
from robopolicy.types import Batch, Observation

CONFIGS = sorted(path.stem for path in (Path(robopolicy.configs.__file__).parent / "policy").glob("*.yaml"))
SMALLER = {
    "ebt_paper": [
        *(f"policy.{part}.{key}" for part in ("network", "encoder") for key in ("width=32", "depth=2")),
        "policy.network.frame_width=32",
        "policy.sampler.max_steps=3",
    ],
    "fdp_paper": ["policy.network.network.down_dims=[16,32,64]", "policy.sampler.num_inference_steps=3"],
    "diffusion_paper": ["policy.network.down_dims=[16,32,64]", "policy.sampler.num_inference_steps=3"],
}
"""Where the published size would make the tests slow: same parts, fewer channels and steps."""


def build(name, spec):
    with initialize_config_module("robopolicy.configs", version_base=None):
        config = compose(overrides=[f"+policy={name}", *SMALLER.get(name, [])])
    torch.manual_seed(0)
    policy = instantiate(config.policy)(spec)
    fit_to_bounds(policy.norm, spec)
    return policy


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def small_policy(spec, *, horizon=8, n_action_steps=4, n_obs_steps=2, prediction="sample", **kwargs):
    torch.manual_seed(0)
    policy = DiffusionPolicy(
        spec,
        timing=ChunkTiming(n_obs_steps=n_obs_steps, horizon=horizon, n_action_steps=n_action_steps),
        network=lambda *sizes: ChunkMLP(*sizes, width=64, depth=2, cond_width=32),
        encoder=ObservationEncoder,
        schedule=NoiseSchedule(),
        prediction=prediction,
        **{"sampler": DDIMSampler(), **kwargs},
    )
    fit_to_bounds(policy.norm, spec)
    with torch.no_grad():
        for parameter in policy.network.parameters():  # some start at zero
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return policy.eval()


# --- contracts over every configuration -----------------------------------------------------------------------------


def test_the_agreed_configurations_exist():
    assert {"diffusion", "diffusion_unet", "diffusion_dit", "diffusion_paper"} <= set(CONFIGS)


@pytest.mark.parametrize("camera", [False, True], ids=["state", "rgb"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_trains_acts_and_is_saved(name, camera):
    spec = fake_spec(camera=camera)
    policy = build(name, spec)
    timing = policy.timing
    batch = fake_batch(spec, 3, timing.n_obs_steps, timing.horizon)

    learned = set()
    for stage in range(policy.num_stages):
        policy.set_stage(stage)
        policy.train()
        policy.zero_grad()
        loss = policy(batch, generator=seeded(0)[0])
        assert loss.shape == ()
        assert torch.isfinite(loss)
        loss.backward()
        for parameter_name, parameter in policy.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), parameter_name
        learned |= {parameter_name for parameter_name, p in policy.named_parameters() if p.requires_grad}
    assert learned == {parameter_name for parameter_name, _ in policy.named_parameters()}

    policy.eval()
    chunk = policy.act(batch.obs, generator=seeded(1)[0])
    assert chunk.shape == (3, timing.horizon, spec.action.dim)
    assert chunk.dtype == torch.float32
    assert not chunk.is_inference()
    assert (chunk >= torch.tensor(spec.action.low)).all()
    assert (chunk <= torch.tensor(spec.action.high)).all()

    other = build(name, spec)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other.load_state_dict(copy.deepcopy(policy.state_dict()))
    assert torch.equal(other.eval().act(batch.obs, generator=seeded(1)[0]), chunk)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_trains_and_acts_in_mixed_precision(name):
    spec = fake_spec()
    policy = build(name, spec).train()
    batch = fake_batch(spec, 3, policy.timing.n_obs_steps, policy.timing.horizon)
    full = policy(batch, generator=seeded(0)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = policy(batch, generator=seeded(0)[0])
        chunk = policy.act(batch.obs, generator=seeded(1)[0])
    assert (loss.dtype, chunk.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(loss, full, rtol=0.02, atol=0)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_names_targets_of_this_library_only(name):
    with initialize_config_module("robopolicy.configs", version_base=None):
        config = compose(overrides=[f"+policy={name}"])

    def targets(node):
        for key, value in node.items():
            if key == "_target_":
                yield value
            elif hasattr(value, "items"):
                yield from targets(value)

    assert all(target.startswith("robopolicy.") for target in targets(config.policy))


def test_the_paper_configuration_is_the_papers():
    with initialize_config_module("robopolicy.configs", version_base=None):
        policy = compose(overrides=["+policy=diffusion_paper"]).policy
    assert (policy.timing.n_obs_steps, policy.timing.horizon, policy.timing.n_action_steps) == (2, 16, 8)
    assert (policy.prediction, policy.sampler.num_inference_steps) == ("epsilon", 100)
    assert list(policy.network.down_dims) == [256, 512, 1024]


# --- laws of the diffusion policy -----------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Predicts the chunk that the observation spells out, whatever the noise; counts its calls."""

    def __init__(self, action_dim, horizon, cond_dim):
        super().__init__()
        self.action_dim, self.horizon, self.calls = action_dim, horizon, 0
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x, t, cond):
        self.calls += 1
        start = rearrange(cond[:, : self.action_dim], "b a -> b 1 a")
        return (start + 0.01 * torch.arange(self.horizon)[:, None]).expand_as(x)


def oracle_policy(spec, **kwargs):
    policy = DiffusionPolicy(
        spec,
        timing=ChunkTiming(n_obs_steps=1, horizon=8, n_action_steps=4),
        encoder=ObservationEncoder,
        schedule=NoiseSchedule(),
        prediction="sample",
        **{"network": Oracle, "sampler": DDIMSampler(), **kwargs},
    )
    fit_to_bounds(policy.norm, spec)
    return policy.eval()


def test_chunks_come_out_in_environment_units():
    spec = fake_spec()
    policy = oracle_policy(spec)
    state = torch.tensor([[0.3, -0.6, 0.9, 1.2]])  # normalised by 3
    obs = Observation(modalities={"proprio": torch.zeros(1, 1, 9), "objects": torch.zeros(1, 1, 5)})
    obs.modalities["proprio"][:, 0, :4] = state
    network_units = state / 3 + 0.01 * torch.arange(8)[:, None]
    low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
    torch.testing.assert_close(policy.act(obs)[0], low + (network_units + 1) / 2 * (high - low))
    assert policy.network.calls == 10


def test_the_observation_is_encoded_once_per_act():
    policy = small_policy(fake_spec())
    calls = []
    policy.encoder.register_forward_hook(lambda *_: calls.append(1))
    policy.act(fake_observation(policy.spec, 2, 2, seeded(0)[0]))
    assert len(calls) == 1


@pytest.mark.parametrize("camera", [False, True], ids=["state", "rgb"])
@pytest.mark.parametrize("sampler", [DDIMSampler(), DDPMSampler(num_inference_steps=10)])
def test_rows_with_their_own_generators_do_not_depend_on_the_batch(sampler, camera):
    spec = fake_spec(camera=camera)
    policy = small_policy(spec, sampler=sampler)
    obs = fake_observation(spec, 5, 2, seeded(0)[0])
    together = policy.act(obs, generator=seeded(10, 11, 12, 13, 14))
    for rows in ([2], [4, 1]):
        alone = policy.act(obs.take(torch.tensor(rows)), generator=seeded(*(10 + row for row in rows)))
        torch.testing.assert_close(alone, together[rows], rtol=0, atol=1e-5)


def test_one_seed_gives_one_chunk_and_one_loss():
    spec = fake_spec(camera=True)
    policy = small_policy(spec)
    batch = fake_batch(spec, 3, 2, 8)
    for result in (policy.act, policy.loss):
        argument = batch.obs if result == policy.act else batch
        policy.train(result == policy.loss)
        assert torch.equal(result(argument, generator=seeded(3)[0]), result(argument, generator=seeded(3)[0]))
        assert not torch.equal(result(argument, generator=seeded(3)[0]), result(argument, generator=seeded(4)[0]))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_the_loss_is_the_error_of_the_prediction(prediction):
    """A network that answers zero errs by the target's mean square, which is known for standard normal noise."""
    spec = fake_spec()
    policy = small_policy(spec, prediction=prediction)
    nn.init.zeros_(policy.network.out.weight)
    nn.init.zeros_(policy.network.out.bias)
    batch = fake_batch(spec, 4000, 2, 8)
    clean = policy.norm.encode("action", batch.action).square().mean().item()
    alpha_bar = sum(policy.schedule.alpha_bar) / 100
    expected = {"epsilon": 1.0, "sample": clean, "v": alpha_bar + (1 - alpha_bar) * clean}[prediction]
    assert policy.loss(batch, generator=seeded(0)[0]).item() == pytest.approx(expected, rel=0.03)


def test_padding_counts_only_where_asked():
    spec = fake_spec()
    batch = fake_batch(spec, 6, 2, 8)
    changed = dataclasses.replace(batch, action=torch.where(batch.is_pad[..., None], 0.0, batch.action))
    everything, inside = (small_policy(spec, prediction="sample", loss_on_padding=flag) for flag in (True, False))

    def error(policy, batch):
        nn.init.zeros_(policy.network.out.weight)
        nn.init.zeros_(policy.network.out.bias)
        return policy.loss(batch, generator=seeded(0)[0])

    torch.testing.assert_close(error(inside, changed), error(inside, batch))
    assert not torch.isclose(error(everything, changed), error(everything, batch))
    square = everything.norm.encode("action", batch.action).square()
    torch.testing.assert_close(error(everything, batch), square.mean())
    torch.testing.assert_close(error(inside, batch), square[:, :-2].mean())
    nothing = dataclasses.replace(batch, is_pad=torch.ones_like(batch.is_pad))
    assert error(inside, nothing) == 0


def test_wrong_observations_are_named():
    spec = fake_spec()
    policy = small_policy(spec)
    good = fake_observation(spec, 2, 2, seeded(0)[0])
    with pytest.raises(RobopolicyError, match="observes 'objects'; got only proprio"):
        policy.act(Observation(modalities={"proprio": good.modalities["proprio"]}))
    with pytest.raises(ShapeError, match=r"'proprio' must be \[B, 2, 9\], got \(2, 3, 9\)"):
        policy.act(Observation(modalities={**good.modalities, "proprio": torch.zeros(2, 3, 9)}))
    with pytest.raises(ShapeError, match=r"action must be \[B, H=8, A=4\]"):
        policy.loss(fake_batch(spec, 2, 2, 9))


def test_a_policy_without_statistics_refuses_to_act():
    spec = fake_spec()
    policy = small_policy(spec)
    blank = DiffusionPolicy(
        spec,
        timing=policy.timing,
        network=ChunkMLP,
        encoder=ObservationEncoder,
        schedule=NoiseSchedule(),
        sampler=DDIMSampler(),
    )
    obs = fake_observation(spec, 2, 2, seeded(0)[0])
    with pytest.raises(RobopolicyError, match="no statistics"):
        blank.act(obs)
    fit_to_bounds(blank.norm, spec)
    assert blank.act(obs).isfinite().all()


def test_settings_are_checked_at_construction():
    with pytest.raises(RobopolicyError, match="Did you mean 'epsilon'"):
        small_policy(fake_spec(), prediction="epsilom")
    with pytest.raises(RobopolicyError, match="descend strictly"):
        small_policy(fake_spec(), warm_start_timesteps=[1, 3])


# --- guesses --------------------------------------------------------------------------------------------------------


def test_a_guess_is_refused_unless_levels_are_set():
    policy = small_policy(fake_spec())
    with pytest.raises(RobopolicyError, match=r"cannot use a guess.*WarmStart"):
        policy.act(fake_observation(policy.spec, 2, 2, seeded(0)[0]), guess=torch.zeros(2, 8, 4))


def test_a_guess_is_noised_to_its_level_and_denoised_from_there():
    """With a network that returns its input, what comes back is the noised guess: its mean and spread are known."""

    class Echo(Oracle):
        def forward(self, x, t, cond):
            self.seen = [*getattr(self, "seen", []), (int(t[0]), x)]
            return x

    spec, size = fake_spec(), 4000
    policy = oracle_policy(spec, network=Echo, sampler=DDPMSampler(), warm_start_timesteps=[7, 3, 0])
    low, high = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
    guess = (low + 0.75 * (high - low)).expand(size, 8, 4)  # 0.5 in network units
    policy.act(fake_observation(spec, size, 1, seeded(0)[0]), guess=guess, generator=seeded(1)[0])
    levels, inputs = zip(*policy.network.seen, strict=True)
    assert levels == (7, 3, 0)
    alpha_bar = policy.schedule.alpha_bar[7]
    assert inputs[0].mean().item() == pytest.approx(0.5 * alpha_bar**0.5, abs=1e-3)
    assert inputs[0].std().item() == pytest.approx((1 - alpha_bar) ** 0.5, rel=1e-2)


def test_few_low_levels_stay_near_the_guess():
    spec = fake_spec()
    policy = small_policy(spec, warm_start_timesteps=[0], prediction="epsilon", sampler=DDPMSampler())
    nn.init.zeros_(policy.network.out.weight)
    nn.init.zeros_(policy.network.out.bias)
    guess = 0.4 * torch.ones(3, 8, 4)
    obs = fake_observation(spec, 3, 2, seeded(0)[0])
    chunk = policy.act(obs, guess=guess, generator=seeded(0)[0])
    sigma = (1 - policy.schedule.alpha_bar[0]) ** 0.5
    assert 0 < (chunk - guess).abs().max() < 6 * sigma
    with pytest.raises(ShapeError, match=r"guess must be \[B=3, H=8, A=4\]"):
        policy.act(obs, guess=guess[:2])


# --- actors ---------------------------------------------------------------------------------------------------------


class Clock(Policy):
    """A policy without weights: action h of a chunk is the newest time seen, shifted to when h will be executed.

    The second action dimension is the mean of the window of times, the last (a gripper) a continuous number.
    """

    def __init__(self, spec, timing):
        super().__init__(spec, timing=timing)
        self.batch_sizes = []

    def loss(self, batch: Batch, *, generator=None):
        raise NotImplementedError

    def act(self, obs, *, guess=None, generator=None):
        window = obs.modalities["proprio"][..., 0]
        self.batch_sizes.append(len(window))
        times = window[:, -1:] + torch.arange(self.timing.horizon) - self.timing.now
        noise = torch.zeros(len(window))
        if generator is not None:
            noise = torch.stack([torch.rand((), generator=g) for g in generator])
        columns = [times, window.mean(dim=1, keepdim=True).expand_as(times), noise[:, None].expand_as(times), times % 2]
        return torch.stack(columns, dim=-1)


def frame(spec, times):
    """Observations that hold the given time per environment."""
    n = len(times)
    proprio = torch.tensor(times, dtype=torch.float32)[:, None].expand(n, spec.observation["proprio"].shape[0])
    return {"proprio": proprio, "objects": torch.zeros(n, *spec.observation["objects"].shape)}


@pytest.mark.parametrize(("n_obs_steps", "n_action_steps"), [(1, 1), (1, 8), (2, 1), (2, 4), (3, 5)])
def test_actions_are_executed_when_they_were_meant(n_obs_steps, n_action_steps):
    spec = fake_spec()
    policy = Clock(spec, ChunkTiming(n_obs_steps=n_obs_steps, horizon=8, n_action_steps=n_action_steps))
    actor = ChunkActor(FreshPlanner(policy), 2)
    for t in range(20):
        action = actor(frame(spec, [t, 100 + t]))
        assert action[:, 0].tolist() == [t, 100 + t]
        assert actor.replanned == (t % n_action_steps == 0)


def test_the_window_starts_filled_with_the_first_frame():
    spec = fake_spec()
    actor = ChunkActor(FreshPlanner(Clock(spec, ChunkTiming(n_obs_steps=3, horizon=8, n_action_steps=1))), 1)
    means = [actor(frame(spec, [t]))[0, 1].item() for t in (6, 12, 18, 24)]
    assert means == pytest.approx([6, (6 + 6 + 12) / 3, 12, 18])


def test_interleaved_resets_give_the_actions_of_separate_rollouts():
    """Three environments end at different times; each acts as if it were alone, window, chunk and noise included."""
    spec = fake_spec()
    policy = Clock(spec, ChunkTiming(n_obs_steps=2, horizon=8, n_action_steps=3))
    resets = {0: [5, 6], 1: [], 2: [4, 11]}  # before these steps
    steps = 15

    def alone(env):
        generator, actions = seeded(env), []
        for t in range(steps):
            if t == 0 or t in resets[env]:
                actor = ChunkActor(FreshPlanner(policy), 1)  # an episode of its own: nothing can be left over
            actions.append(actor(frame(spec, [100 * env + t]), generator=generator)[0])
        return torch.stack(actions)

    actor, generators = ChunkActor(FreshPlanner(policy), 3), seeded(0, 1, 2)
    together = []
    for t in range(steps):
        rows = torch.tensor([t in resets[env] for env in range(3)])
        if rows.any():
            actor.reset(rows)
        together.append(actor(frame(spec, [100 * env + t for env in range(3)]), generator=generators))
    for env in range(3):
        assert torch.equal(torch.stack(together)[:, env], alone(env))


def test_only_rows_that_ran_out_are_planned():
    spec = fake_spec()
    policy = Clock(spec, ChunkTiming(n_obs_steps=2, horizon=8, n_action_steps=4))
    actor = ChunkActor(FreshPlanner(policy), 3)
    actor(frame(spec, [0, 0, 0]))
    actor(frame(spec, [1, 1, 1]))
    actor.reset(torch.tensor([False, True, False]))
    for t in range(2, 6):
        actor(frame(spec, [t, t, t]))
    assert policy.batch_sizes == [3, 1, 2]  # the third: rows 0 and 2 at t=4; row 1 again only at t=6


def test_resets_with_a_real_policy_equal_separate_rollouts():
    spec = fake_spec(camera=True)
    policy = small_policy(spec)
    frames = [{n: v[:, 0] for n, v in fake_observation(spec, 2, 1, seeded(t)[0]).modalities.items()} for t in range(7)]

    def rollout(rows, new_actor_at=None):
        actor, generators = ChunkActor(FreshPlanner(policy), len(rows)), seeded(*rows)
        actions = []
        for t, now in enumerate(frames):
            if t == new_actor_at:
                actor = ChunkActor(FreshPlanner(policy), len(rows))
            elif t == 3 and len(rows) > 1:
                actor.reset(torch.tensor([row == 1 for row in rows]))
            actions.append(actor({n: v[rows] for n, v in now.items()}, generator=generators))
        return torch.stack(actions)

    together = rollout([0, 1])
    for row, new_actor_at in ((0, None), (1, 3)):
        torch.testing.assert_close(rollout([row], new_actor_at)[:, 0], together[:, row], rtol=0, atol=1e-5)


def test_discrete_dimensions_go_to_an_end_of_their_range():
    spec = fake_spec()
    actor = ChunkActor(FreshPlanner(Clock(spec, ChunkTiming(n_obs_steps=1, horizon=8, n_action_steps=8))), 1)
    grips = [actor(frame(spec, [t]))[0, 3].item() for t in range(4)]
    assert grips == [-0.5, 1.5, -0.5, 1.5]  # from 0 and 1; the middle of the range is 0.5


def test_fewer_steps_per_chunk_can_be_executed():
    spec = fake_spec()
    policy = Clock(spec, ChunkTiming(n_obs_steps=2, horizon=8, n_action_steps=6))
    actor = ChunkActor(FreshPlanner(policy), 1, n_action_steps=1)
    for t in range(4):
        assert actor(frame(spec, [t]))[0, 0] == t
        assert actor.replanned
    with pytest.raises(ValueError, match=r"n_action_steps must be in \[1, 7\]"):
        ChunkActor(FreshPlanner(policy), 1, n_action_steps=8)


# --- it learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prediction", "sampler"), [("sample", DDIMSampler()), ("epsilon", DDPMSampler())])
def test_it_learns_both_ways_round_an_obstacle(prediction, sampler):
    """Demonstrations pass left or right, scaled by what is seen: chunks must be one or the other, never the mean."""
    spec = fake_spec(action_dim=2, proprio=1, objects=1)
    timing = ChunkTiming(n_obs_steps=1, horizon=4, n_action_steps=4)
    torch.manual_seed(0)
    policy = DiffusionPolicy(
        spec,
        timing=timing,
        network=lambda *sizes: ChunkMLP(*sizes, width=96, depth=2, cond_width=64),
        encoder=ObservationEncoder,
        schedule=NoiseSchedule(),
        sampler=sampler,
        prediction=prediction,
    )
    bounds = torch.tensor(spec.action.low), torch.tensor(spec.action.high)
    constant = torch.zeros(1), torch.zeros(1)
    policy.norm.fit({"proprio": (torch.tensor([0.7]), torch.tensor([1.3])), "objects": constant, "action": bounds})
    path = torch.tensor([0.3, 0.7, 0.7, 0.3])
    rng = seeded(0)[0]

    def demonstrations(size):
        side = 2.0 * torch.randint(0, 2, (size, 1), generator=rng) - 1
        width = 1 + 0.3 * (2 * torch.rand(size, 1, generator=rng) - 1)
        action = torch.stack([side * width * path, torch.full((size, 4), 0.5)], dim=-1)
        seen = {"proprio": width[:, None], "objects": torch.zeros(size, 1, 1)}
        return Batch(obs=Observation(modalities=seen), action=action, is_pad=torch.zeros(size, 4, dtype=torch.bool))

    steps = 500
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        policy(demonstrations(128), generator=rng).backward()
        optimizer.step()
        schedule.step()

    policy.eval()
    held_out = demonstrations(400)
    chunk = policy.act(held_out.obs, generator=rng)
    side = chunk[..., 0].mean(dim=1).sign()
    wanted = side[:, None] * held_out.obs.modalities["proprio"][:, 0] * path
    error = (chunk[..., 0] - wanted).abs().amax(dim=1)
    assert 0.3 < (side > 0).float().mean() < 0.7
    assert (error < 0.15).float().mean() > 0.9
