"""Laws of the energy-based policy and of its control; contracts of their configurations are in test_policies.py."""

from __future__ import annotations

import gc

import pytest
import torch
from fakes import fake_batch, fake_observation, fake_spec, fit_to_bounds
from torch import nn

from robopolicy.errors import RobopolicyError, ShapeError
from robopolicy.nn.encoder import ObservationEncoder
from robopolicy.nn.energy import EnergyMLP, EnergyTransformer
from robopolicy.nn.frames import FrameEncoder, FrameEnergyTransformer
from robopolicy.nn.mlp import ChunkMLP
from robopolicy.policies.ebt import EnergyPolicy
from robopolicy.policies.regression import RegressionPolicy
from robopolicy.policies.warm_start import WarmStartPlanner
from robopolicy.sampling.descent import Descent, StepRule
from robopolicy.sampling.objective import Objective
from robopolicy.timing import ChunkTiming
from robopolicy.training.optim import load_optimizer_tensors, make_optimizer, make_scheduler, optimizer_tensors
from robopolicy.types import Batch, Observation

NETWORKS = {
    "mlp": lambda *sizes, **kw: EnergyMLP(*sizes, width=32, depth=2, cond_width=16, **kw),
    "transformer": lambda *sizes, **kw: EnergyTransformer(*sizes, width=16, depth=2, num_heads=2, patch=2, **kw),
    "frames": lambda *sizes, **kw: FrameEnergyTransformer(
        *sizes, frame_width=sizes[2] // 2, width=16, depth=1, num_heads=2, dropout=0.0, **kw
    ),
}
FIXED = StepRule(step_size="fixed")


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def policy_of(spec=None, *, network="mlp", head_at_zero=False, network_args=None, **kwargs):
    """A small policy with weights away from zero, in evaluation mode."""
    spec = spec or fake_spec()
    torch.manual_seed(0)
    parts = {
        "objective": Objective(),
        "rule": StepRule(),
        "sampler": Descent(),
        "encoder": ObservationEncoder,
        **kwargs,
    }
    policy = EnergyPolicy(
        spec,
        timing=ChunkTiming(n_obs_steps=2, horizon=8, n_action_steps=4),
        network=lambda *sizes: NETWORKS[network](*sizes, **(network_args or {})),
        **parts,
    )
    fit_to_bounds(policy.norm, spec)
    if not head_at_zero:
        with torch.no_grad():
            for parameter in policy.network.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return policy.eval()


# --- what the objectives learn --------------------------------------------------------------------------------------


def line_policy(**kwargs):
    """One action dimension, chunk of one, one observed number."""
    spec = fake_spec(action_dim=1, proprio=1, objects=1)
    torch.manual_seed(kwargs.pop("seed", 0))
    policy = EnergyPolicy(
        spec,
        timing=ChunkTiming(n_obs_steps=1, horizon=1, n_action_steps=1),
        network=lambda *sizes: EnergyMLP(*sizes, width=32, depth=1, cond_width=16),
        encoder=ObservationEncoder,
        **{"rule": StepRule(), "sampler": Descent(max_steps=20), **kwargs},
    )
    bounds = torch.tensor([-1.0]), torch.tensor([1.0])
    # actions of this spec are bounded by -0.5 and 1.5: network units are the value minus 0.5
    policy.norm.fit({"proprio": bounds, "objects": bounds, "action": (torch.tensor([-0.5]), torch.tensor([1.5]))})
    return policy


def line_batch(action, seen):
    size = len(action)
    obs = Observation(modalities={"proprio": seen.reshape(size, 1, 1), "objects": torch.zeros(size, 1, 1)})
    return Batch(obs=obs, action=0.5 + action.reshape(size, 1, 1), is_pad=torch.zeros(size, 1, dtype=torch.bool))


def fit_line(policy, draw, *, steps=500, size=256, lr=3e-3):
    optimizer = torch.optim.Adam(policy.param_groups(lr=lr, weight_decay=0.0), lr=lr)
    rng = seeded(0)[0]
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        policy.loss(line_batch(*draw(size, rng)), generator=rng).backward()
        optimizer.step()
        decay.step()
    return policy.eval()


def two_modes(size, rng):
    return torch.randint(0, 2, (size,), generator=rng) - 0.5, torch.zeros(size)


def one_slope(size, rng):
    seen = 2 * torch.rand(size, generator=rng) - 1
    return 0.5 * seen + 0.1 * torch.randn(size, generator=rng), seen


def answers(policy, seen, generator):
    return policy.act(line_batch(torch.zeros(len(seen)), seen).obs, generator=generator)[:, 0, 0] - 0.5


def test_the_published_objective_answers_with_the_mean_of_two_modes():
    objective = Objective(kind="mse_all_steps", min_steps=2, max_steps=2)
    policy = line_policy(objective=objective, sampler=Descent(max_steps=2, schedule="full"))
    policy = fit_line(policy, two_modes, steps=300)
    found = answers(policy, torch.zeros(1000), seeded(1)[0])
    assert found.abs().max() < 0.1
    assert found.std() < 0.02


def test_the_default_keeps_both_modes():
    policy = fit_line(line_policy(objective=Objective()), two_modes)
    for num_steps in (4, 20):
        policy.sampler = Descent(max_steps=num_steps)
        found = answers(policy, torch.zeros(1000), seeded(1)[0])
        for mode in (-0.5, 0.5):
            assert ((found - mode).abs() < 0.25).float().mean() >= 0.3


OBJECTIVES = {
    "mse_all_steps": {
        "objective": Objective(kind="mse_all_steps", min_steps=2, max_steps=2),
        "sampler": Descent(max_steps=2, schedule="full"),
    },
    "mse_last_step": {
        "objective": Objective(kind="mse_last_step", min_steps=2, max_steps=2, graph="full_bptt"),
        "sampler": Descent(max_steps=2, schedule="full"),
    },
    "denoise": {"objective": Objective(), "sampler": Descent(max_steps=20, schedule="harmonic")},
    "score": {
        "objective": Objective(kind="score", sigma_min=0.1),
        "rule": StepRule(step_size="fixed", alpha=0.02),
        "sampler": Descent(max_steps=100, schedule="full"),
    },
    "infonce": {
        "objective": Objective(kind="infonce", num_negatives=8),
        "rule": StepRule(step_size="fixed", alpha=0.01),
        "sampler": Descent(max_steps=100, schedule="full"),
    },
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_every_objective_reaches_the_mean_of_one_mode(kind):
    """a = o/2 + noise: over many starts, the answers average to E[a | o] within 5 % of its spread."""
    policy = fit_line(line_policy(**OBJECTIVES[kind]), one_slope, steps=400, size=128)
    seen = torch.linspace(-0.9, 0.9, 7)
    found = answers(policy, seen.repeat_interleave(300), seeded(1)[0]).reshape(7, 300).mean(dim=1)
    error = (found - 0.5 * seen).square().mean().sqrt()
    assert error < 0.05 * (0.5 * seen).std()


# --- derivatives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readout", ["mean", "product"])
@pytest.mark.parametrize("network", NETWORKS)
def test_second_derivatives_are_right(network, readout):
    torch.manual_seed(0)
    net = NETWORKS[network](2, 2, 4, readout=readout).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, dtype=torch.float64))
    context = net.context(torch.randn(2, 4, dtype=torch.float64)).detach()
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: net(x, context), x)


def test_the_loss_reaches_the_weights_through_the_gradient_alone():
    """With the inner step's graph kept the weights learn; cut, nothing does (what a lost create_graph would do)."""
    policy = policy_of()
    batch = fake_batch(policy.spec, 4, 2, 8)
    policy.loss(batch, generator=seeded(0)[0]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.network.into.parameters())
    clean = policy.norm.encode("action", batch.action)
    context = policy.network.context(policy.encoder(policy.normalized(batch.obs)))
    moved = policy.rule(policy._energy(context), torch.randn_like(clean), None, 1.0)
    cut = (moved.x + moved.move - clean).square().mean()
    weights = list(policy.network.parameters())
    assert all(grad is None for grad in torch.autograd.grad(cut, weights, allow_unused=True))


def test_a_head_at_zero_leaves_the_start_and_still_learns():
    policy = policy_of(head_at_zero=True, network_args={"readout": "mean"}, sampler=Descent(max_steps=1))
    batch = fake_batch(policy.spec, 3, 2, 8)
    path, _ = policy.descent_path(batch.obs, generator=seeded(1)[0])
    assert torch.equal(path[0], path[1])
    policy.loss(batch, generator=seeded(0)[0]).backward()
    assert policy.network.out[-1].weight.grad.abs().sum() > 0


GRAPHS = {
    "per_step_detach": {},
    "momentum_path": {},
    "truncated_last": {"kind": "mse_last_step"},
    "full_bptt": {"kind": "mse_last_step"},
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_graph_modes_derive_what_they_say(graph):
    """The loss is the same in every mode that counts the same steps; how far back it reaches is not."""
    kind = GRAPHS[graph].get("kind", "mse_all_steps")
    rule = StepRule(momentum=0.5)
    results = []
    for mode in (graph, "full_bptt"):
        objective = Objective(kind=kind, min_steps=3, max_steps=3, graph=mode)
        policy = policy_of(objective=objective, rule=rule)
        loss = policy.loss(fake_batch(policy.spec, 4, 2, 8), generator=seeded(0)[0])
        loss.backward()
        results.append((loss.detach(), policy.network.into.weight.grad.clone()))
    (loss, grad), (full_loss, full_grad) = results
    torch.testing.assert_close(loss, full_loss)
    assert torch.allclose(grad, full_grad) == (graph == "full_bptt")


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", ["mse_all_steps", "denoise", "score", "infonce"])
def test_every_weight_learns_from_every_objective(network, kind):
    rule = FIXED if kind in ("score", "infonce") else StepRule()
    policy = policy_of(network=network, objective=Objective(kind=kind, max_steps=2), rule=rule).train()
    loss = policy(fake_batch(policy.spec, 3, 2, 8), generator=seeded(0)[0])
    loss.backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert policy.num_skipped == 0


def test_compiling_is_refused_in_words():
    with pytest.raises(RobopolicyError, match=r"use train\.compile=false"):
        policy_of().compile()


def test_a_batch_that_is_not_finite_is_skipped_and_counted():
    policy = policy_of().train()
    batch = fake_batch(policy.spec, 3, 2, 8)
    batch.action[0, 0, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="is skipped"):
        loss = policy(batch, generator=seeded(0)[0])
    loss.backward()
    assert loss == 0
    assert policy.num_skipped == 1
    assert all(p.grad.abs().sum() == 0 for p in policy.parameters())


def test_a_learned_step_size_has_a_rate_of_its_own_and_survives_a_checkpoint():
    policy = policy_of()
    optimizer = make_optimizer(policy, lr=1e-3, weight_decay=0.1)
    weights, alpha = optimizer.param_groups
    assert (alpha["params"], alpha["lr"], alpha["weight_decay"]) == ([policy.log_alpha], 3e-3, 0.0)
    assert len(weights["params"]) == len(list(policy.parameters())) - 1
    scheduler = make_scheduler(optimizer, num_steps=10, warmup_steps=2)
    assert scheduler.get_last_lr() == pytest.approx([0.5e-3, 1.5e-3])
    before = policy.log_alpha.item()
    policy(fake_batch(policy.spec, 4, 2, 8)).backward()
    optimizer.step()
    assert policy.log_alpha.item() != before
    other = make_optimizer(policy, lr=1e-3, weight_decay=0.1)
    load_optimizer_tensors(other, policy, optimizer_tensors(optimizer, policy))
    moment = optimizer.state[policy.log_alpha]["exp_avg"]
    assert torch.equal(other.state[policy.log_alpha]["exp_avg"], moment)
    assert other.param_groups[1]["lr"] == 3e-3


# --- acting ---------------------------------------------------------------------------------------------------------


def test_the_caller_may_be_without_gradients_or_in_inference_mode():
    policy = policy_of(sampler=Descent(stop="step_length"))
    obs = fake_observation(policy.spec, 3, 2, seeded(0)[0])
    frozen = [p.requires_grad for p in policy.parameters()]
    chunk = policy.act(obs, generator=seeded(1)[0])
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            same = Observation(modalities={name: value * 1.0 for name, value in obs.modalities.items()})
            assert torch.equal(policy.act(same, generator=seeded(1)[0]), chunk)
            policy.act(same, guess=chunk * 1.0, generator=seeded(1)[0])
    assert not chunk.requires_grad
    assert not chunk.is_inference()
    assert [p.requires_grad for p in policy.parameters()] == frozen
    assert all(p.grad is None for p in policy.parameters())


def test_calls_leave_nothing_behind():
    policy = policy_of()
    obs = fake_observation(policy.spec, 2, 2, seeded(0)[0])

    def tensors():
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    policy.act(obs)
    before = tensors()
    for _ in range(100):
        policy.act(obs)
    assert tensors() <= before


def test_the_observation_is_encoded_once_per_act():
    policy = policy_of(sampler=Descent(max_steps=7))
    encoded, asked = [], []
    policy.encoder.register_forward_hook(lambda *_: encoded.append(1))
    policy.network.register_forward_hook(lambda *_: asked.append(1))
    policy.act(fake_observation(policy.spec, 2, 2, seeded(0)[0]))
    assert (len(encoded), len(asked)) == (1, 7)
    assert policy.network_calls() == 7


@pytest.mark.parametrize("network", NETWORKS)
def test_rows_with_their_own_generators_do_not_depend_on_the_batch(network):
    policy = policy_of(network=network, sampler=Descent(stop="step_length", tolerance=0.1), num_candidates=2)
    obs = fake_observation(policy.spec, 4, 2, seeded(0)[0])
    together = policy.act(obs, generator=seeded(10, 11, 12, 13))
    changed = {name: torch.cat([v[:1], 2 * v[1:2], v[2:]]) for name, v in obs.modalities.items()}
    again = policy.act(Observation(modalities=changed), generator=seeded(10, 11, 12, 13))
    assert torch.equal(again[[0, 2, 3]], together[[0, 2, 3]])
    for rows in ([2], [3, 1]):
        alone = policy.act(obs.take(torch.tensor(rows)), generator=seeded(*(10 + row for row in rows)))
        torch.testing.assert_close(alone, together[rows], rtol=0, atol=1e-5)


def test_what_a_descent_saw_is_kept_per_row():
    policy = policy_of(sampler=Descent(max_steps=5))
    obs = fake_observation(policy.spec, 3, 2, seeded(0)[0])
    assert policy.last_diagnostics is None
    chunk, seen = policy.act_with_diagnostics(obs, generator=seeded(1)[0])
    assert policy.last_diagnostics is seen
    assert {tuple(value.shape) for value in vars(seen).values()} == {(3,)}
    assert seen.num_steps.tolist() == [5, 5, 5]
    assert torch.equal(policy.act(obs, generator=seeded(1)[0]), chunk)


def test_a_guess_is_where_the_descent_starts():
    """An energy without slope leaves its start: what comes back is the guess plus the noise it was given."""
    settings = {"network_args": {"readout": "mean"}, "head_at_zero": True}
    policy = policy_of(sampler=Descent(warm_noise=0.0), **settings)
    obs = fake_observation(policy.spec, 2, 2, seeded(0)[0])
    guess = torch.full((2, 8, 4), 0.25)
    torch.testing.assert_close(policy.act(obs, guess=guess), guess)
    policy = policy_of(sampler=Descent(warm_noise=0.1, warm_steps=3), **settings)
    chunk, estimate = policy.refine(obs.take(torch.arange(2).repeat(500)), guess.repeat(500, 1, 1))
    assert (chunk - 0.25).std().item() == pytest.approx(0.1, rel=0.05)  # bounds of width 2: network units are its own
    assert torch.equal(chunk, estimate)
    assert policy.last_diagnostics.num_steps.unique().tolist() == [3]
    with pytest.raises(ShapeError, match=r"guess must be \[B=2, H=8, A=4\]"):
        policy.act(obs, guess=guess[:1])


def test_a_warm_start_planner_drives_it():
    policy = policy_of(sampler=Descent(max_steps=5, warm_steps=2))
    planner = WarmStartPlanner(policy, 3)
    obs, rows, shift = (
        fake_observation(policy.spec, 3, 2, seeded(0)[0]),
        torch.arange(3),
        torch.ones(3, dtype=torch.int64),
    )
    for calls in (5, 2, 2):
        chunk = planner(obs, rows, shift=shift, generator=seeded(1, 2, 3))
        assert chunk.shape == (3, 8, 4)
        assert planner.diagnostics["network_calls"].tolist() == [calls] * 3
    planner.reset(torch.tensor([True, False, False]))
    planner(obs, rows, shift=shift, generator=seeded(1, 2, 3))
    assert planner.diagnostics["network_calls"].tolist() == [5, 2, 2]
    with pytest.raises(RobopolicyError, match=r"planner\.warm_start=null"):
        policy.refine(obs, chunk, warm_start=Descent())


@pytest.mark.parametrize("signal", ["gradient_norm", "energy_drop"])
def test_an_unsure_row_is_planned_anew(signal):
    policy = policy_of(sampler=Descent(warm_steps=3), replan_signal=signal)
    obs = fake_observation(policy.spec, 4, 2, seeded(0)[0])
    guess = torch.zeros(4, 8, 4)
    warm, seen = policy.act_with_diagnostics(obs, guess=guess, generator=seeded(1)[0])
    fresh = policy.act(obs, generator=seeded(1)[0])
    signals = getattr(seen, signal)
    policy.replan_above = signals.sort().values[1].item()  # two rows are above
    unsure = signals > policy.replan_above
    mixed, again = policy.act_with_diagnostics(obs, guess=guess, generator=seeded(1)[0])
    assert unsure.sum() == 2
    torch.testing.assert_close(mixed, torch.where(unsure[:, None, None], fresh, warm))
    assert again.num_steps.tolist() == [3 + 4 * int(row) for row in unsure]


def test_of_several_candidates_the_lowest_energy_acts():
    """With a two-valley energy every single start ends in its own valley, five starts in the deeper one."""

    class Valleys(nn.Module):
        def __init__(self, *sizes):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def context(self, cond):
            return cond

        def forward(self, x, context, scale=None):
            depths = torch.stack([0.1 - 8 * (x - 0.5).square(), -8 * (x + 0.5).square()])
            return -depths.logsumexp(dim=0).sum(dim=(1, 2)) + 0 * self.weight

    spec = fake_spec(action_dim=1)
    timing = ChunkTiming(n_obs_steps=1, horizon=1, n_action_steps=1)
    rule = StepRule(step_size="fixed", alpha=0.05)
    parts = {"network": Valleys, "encoder": ObservationEncoder, "objective": Objective(), "rule": rule}
    sampler = Descent(max_steps=40, schedule="full")
    shares = []
    for count in (1, 5):
        policy = EnergyPolicy(spec, timing=timing, sampler=sampler, num_candidates=count, **parts)
        fit_to_bounds(policy.norm, spec)
        obs = fake_observation(spec, 400, 1, seeded(0)[0])
        right = (policy.act(obs, generator=seeded(1)[0]) - 0.5) > 0
        shares.append(right.float().mean().item())
    assert 0.4 < shares[0] < 0.6
    assert policy.last_diagnostics.disagreement.mean() > 0.3  # five starts seldom end in one valley
    assert shares[1] == pytest.approx(1 - (1 - shares[0]) ** 5, abs=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(kind="mse"), "Unknown objective"),
        (lambda: Objective(graph="detach"), "Unknown graph mode"),
        (lambda: Objective(train_noise="linear"), "Unknown train noise"),
        (lambda: Objective(min_steps=3, max_steps=2), "min_steps"),
        (lambda: Objective(kind="mse_all_steps", graph="truncated_last"), "truncated_last derives the last step only"),
        (lambda: Objective(alpha_jitter=0.5), "alpha_jitter must be at least 1"),
        (lambda: Objective(sigma_min=0.0), "0 < sigma_min"),
        (lambda: Objective(pure_share=1.5), r"pure_share must be in \[0, 1\]"),
        (lambda: Objective(corruption="replace"), "Unknown corruption"),
        (lambda: Objective(sigma_max=2.0), "interpolate is pure noise at sigma 1"),
        (lambda: Objective(num_negatives=1), "num_negatives must be at least 2"),
        (lambda: policy_of(num_candidates=0), "num_candidates must be at least 1"),
        (lambda: policy_of(num_candidates=4, objective=Objective(kind="mse_all_steps")), "picks by energy"),
        (lambda: policy_of(replan_signal="energy"), "Unknown replan signal"),
        (lambda: policy_of(objective=Objective(kind="score")), "cannot learn their size: use fixed"),
        (lambda: EnergyMLP(4, 8, 6, readout="average"), "Unknown energy read-out"),
        (lambda: EnergyTransformer(4, 8, 6, patch=3), "patch must divide the horizon of 8"),
        (lambda: EnergyTransformer(4, 8, 6, width=30), "multiple of num_heads"),
        (lambda: FrameEnergyTransformer(4, 8, 100, frame_width=64), "frame_width=64 must divide"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises((ValueError, RobopolicyError), match=message):
        make()


def test_a_frame_sees_itself_and_earlier_ones():
    spec = fake_spec()
    torch.manual_seed(0)
    encoder = FrameEncoder(spec.observation, 3, width=16, depth=2, num_heads=2).eval()
    seen = dict(fake_observation(spec, 2, 3, seeded(0)[0]).modalities)
    before = encoder(seen).reshape(2, 3, 16)
    seen["objects"] = seen["objects"].clone()
    seen["objects"][:, 1] += 1.0
    after = encoder(seen).reshape(2, 3, 16)
    assert torch.equal(before[:, 0], after[:, 0])
    assert not torch.allclose(before[:, 1], after[:, 1])
    assert not torch.allclose(before[:, 2], after[:, 2])


@pytest.mark.parametrize("network", NETWORKS)
def test_the_rms_can_be_told(network):
    """A network with `scale_input` tells two chunks apart that differ in amplitude alone, after both were divided."""
    torch.manual_seed(0)
    x, scale = torch.randn(2, 8, 4), torch.tensor([0.5, 2.0])
    for told in (False, True):
        net = NETWORKS[network](4, 8, 6, scale_input=told)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        context = net.context(torch.randn(2, 6))
        same = torch.equal(net(x, context, scale), net(x, context, torch.ones(2)))
        assert same != told


# --- the control ----------------------------------------------------------------------------------------------------


def test_regression_answers_with_the_mean_whatever_the_noise():
    spec = fake_spec()
    torch.manual_seed(0)
    policy = RegressionPolicy(
        spec,
        timing=ChunkTiming(n_obs_steps=2, horizon=8, n_action_steps=4),
        network=lambda *sizes: ChunkMLP(*sizes, width=32, depth=1, cond_width=16),
        encoder=ObservationEncoder,
    )
    fit_to_bounds(policy.norm, spec)
    two = fake_batch(spec, 2, 2, 8)
    one_window = {name: value[:1].expand_as(value) for name, value in two.obs.modalities.items()}
    batch = Batch(obs=Observation(modalities=one_window), action=two.action, is_pad=two.is_pad)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        policy(batch).backward()
        optimizer.step()
    policy.eval()
    chunks = [policy.act(batch.obs, generator=seeded(seed)[0]) for seed in (0, 1)]
    assert torch.equal(*chunks)
    torch.testing.assert_close(chunks[0], two.action.mean(dim=0).expand_as(two.action), rtol=0, atol=0.01)
    with pytest.raises(RobopolicyError, match="cannot use a guess"):
        policy.act(batch.obs, guess=two.action)
