"""Laws of factorised diffusion: what a residual stack may change, when it changes nothing, what is gained at best."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import torch
from fakes import fake_batch, fake_observation, fake_spec, fit_to_bounds
from torch import nn

from robopolicy.errors import RobopolicyError, UnknownNameError
from robopolicy.nn.composed import ComposedEncoder, ComposedNetwork, GuidedEncoder, GuidedNetwork, modality_sets
from robopolicy.nn.dit import ChunkDiT
from robopolicy.nn.encoder import ObservationEncoder
from robopolicy.nn.image import ImageEncoder
from robopolicy.nn.layers import BlockNetwork, ahead, zero_
from robopolicy.nn.mlp import ChunkMLP
from robopolicy.nn.screen import ModalityScreen
from robopolicy.nn.unet import ChunkUNet
from robopolicy.policies.diffusion import DiffusionPolicy
from robopolicy.policies.engines import build_engine
from robopolicy.policies.planners import FreshPlanner
from robopolicy.policies.warm_start import WarmStartPlanner
from robopolicy.sampling.samplers import DDIMSampler
from robopolicy.sampling.schedule import NoiseSchedule
from robopolicy.sampling.warm_start import WarmStart
from robopolicy.timing import ChunkTiming
from robopolicy.types import Observation

BATCH, HORIZON, ACTION = 6, 8, 3
NETWORKS = {
    "mlp": partial(ChunkMLP, width=32, depth=2, cond_width=16, time_dim=16),
    "unet": partial(ChunkUNet, down_dims=(16, 32), num_groups=4, time_dim=16),
    "dit": partial(ChunkDiT, width=32, depth=2, num_heads=2, time_dim=16),
}
WIDTHS = (1, 5, 9)
LEVELS = torch.tensor([0, 1, 17, 50, 98, 99])


def randomise(module: nn.Module, seed: int = 0, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def composed(name: str, composition: str = "block", *, widths=WIDTHS, stage: int = 1) -> ComposedNetwork:
    """A network whose first stack is trained and whose others are new."""
    torch.manual_seed(0)
    net = ComposedNetwork(ACTION, HORIZON, widths, network=NETWORKS[name], composition=composition)
    randomise(net.networks[0])
    net.set_stage(stage)
    return net.eval()


def inputs(widths=WIDTHS, weight: float = 1.0):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, HORIZON, ACTION, generator=generator)
    cond = torch.randn(BATCH, sum(widths), generator=generator)
    cond[:, : widths[0]] = weight
    return x, LEVELS, cond


def base_alone(net: ComposedNetwork, x, t, cond):
    first = net._splits[0]
    return net.networks[0](x, t, cond[:, first : first + net._splits[1]])


ways = pytest.mark.parametrize("composition", ["block", "output", "both"])
every = pytest.mark.parametrize("name", NETWORKS)


# --- the start of the second stage ----------------------------------------------------------------------------------


@ways
@every
def test_a_new_residual_changes_nothing_at_all(name, composition):
    net = composed(name, composition)
    assert torch.equal(net(*inputs()), base_alone(net, *inputs()))
    more = composed(name, composition, widths=(2, 5, 9, 11), stage=1)
    randomise(more.networks[1], 3)
    randomise(more.injections if composition != "output" else more.networks[1], 4)
    x, t, cond = inputs((2, 5, 9, 11))
    before = more(x, t, cond)
    assert not torch.equal(before, base_alone(more, x, t, cond))
    more.set_stage(2)
    if composition != "output":  # a third stack, as new as the second was
        for layer in more.injections[1]:
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    assert torch.equal(more(x, t, cond), before)


@every
def test_gradients_reach_the_zero_layers_first(name):
    net = composed(name).train()
    x, t, cond = inputs()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for step in (1, 2):
        optimizer.zero_grad()
        (net(x, t, cond) - x).square().mean().backward()
        assert all(p.grad is None for p in net.networks[0].parameters())
        assert all(layer.weight.grad.abs().sum() > 0 for layer in net.injections[0])
        reached = [p.grad.abs().sum() > 0 for p in net.networks[1].parameters()]
        assert any(reached) == (step == 2)
        optimizer.step()


@every
def test_a_base_whose_head_says_nothing_silences_blocks_alone(name):
    """Whatever enters the stream leaves by the frozen head; `both` has a way around it."""
    for composition in ("block", "both"):
        net = composed(name, composition)
        randomise(net, 5)
        for parameter in net.networks[0].out.parameters():
            nn.init.zeros_(parameter)
        out = net(*inputs())
        assert bool(out.any()) == (composition == "both")


# --- the residual weight --------------------------------------------------------------------------------------------


@ways
@every
def test_weight_zero_is_the_base_bit_for_bit_row_by_row(name, composition):
    net = composed(name, composition)
    randomise(net, 5)
    x, t, cond = inputs()
    cond[::2, 0] = 0.0
    out, base = net(x, t, cond), base_alone(net, x, t, cond)
    assert torch.equal(out[::2], base[::2])
    assert not any(torch.allclose(a, b) for a, b in zip(out[1::2], base[1::2], strict=True))


@every
def test_the_output_is_affine_in_the_weight_and_the_blocks_are_not(name):
    for composition in ("output", "block", "both"):
        net = composed(name, composition)
        randomise(net, 5, 0.3)
        with torch.no_grad():
            none, half, one = (net(*inputs(weight=w)) for w in (0.0, 0.5, 1.0))
        is_affine = torch.allclose(half, (none + one) / 2, rtol=1e-4, atol=1e-5)
        assert is_affine == (composition == "output")


# --- what flows where -----------------------------------------------------------------------------------------------


@every
def test_the_residual_never_sees_the_base(name):
    net = composed(name)
    randomise(net, 5)
    seen: list[torch.Tensor] = []
    for layer in net.injections[0]:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    out = net(*inputs())
    before = list(seen)
    seen.clear()
    with torch.no_grad():
        for parameter in net.networks[0].parameters():
            parameter.zero_()
    assert not torch.equal(net(*inputs()), out)
    assert len(before) == len(seen) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, seen, strict=True))


def test_the_base_does_not_see_the_residuals_observations_until_it_has_learned():
    net = composed("mlp")
    x, t, cond = inputs()
    other = cond.clone()
    other[:, 1 + WIDTHS[1] :] += 1.0
    assert torch.equal(net(x, t, other), net(x, t, cond))


def test_a_skip_of_the_unet_carries_the_residual_once():
    net = composed("unet")
    unet = net.networks[0]
    randomise(net.networks[1], 5)
    for layer in net.injections[0]:
        nn.init.eye_(layer.weight[..., 0])
    inside, skips = [], []
    handle = unet.up[0].first.register_forward_pre_hook(lambda _, args: skips.append(args[0][:, 32:]))
    x, t, cond = inputs()
    weights, *rest = net.condition(t, cond)
    own, part = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    added, _ = net._additions(x, weights, [part])
    assert len(added) == 2 * 2 + 2 + 2  # two levels down, the middle, one level up
    following = iter(added)

    def after(h):
        inside.append((h, h + next(following)))
        return inside[-1][1]

    unet.trunk(x, *own, after=after)
    handle.remove()
    blocks_down = 4
    alone, together = inside[blocks_down - 1]
    assert torch.equal(skips[0], together)
    torch.testing.assert_close(together - alone, added[blocks_down - 1])


@every
@ways
def test_levels_worked_out_ahead_change_nothing(name, composition):
    net = composed(name, composition)
    randomise(net, 5)
    x, _, cond = inputs()
    with torch.no_grad():
        for level, apply in zip([3, 98], ahead(net, [3, 98], cond), strict=True):
            wanted = net(x, torch.full((BATCH,), level), cond)
            torch.testing.assert_close(apply(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_sum_of_policies_is_a_weighted_mean_that_trains_one_after_the_other():
    net = composed("mlp", "sum")
    randomise(net, 5)
    x, t, cond = inputs(weight=0.5)
    first, second = base_alone(net, x, t, cond), net.networks[1](x, t, cond[:, 6:])
    torch.testing.assert_close(net(x, t, cond), (first + 0.5 * second) / 1.5)
    assert torch.equal(net.train()(x, t, cond), second)


# --- what is gained at best: x ~ N(0, 1), y = x + noise -------------------------------------------------------------


class Linear(BlockNetwork):
    """out = x * a + cond . b: with the right weights the best there is, where all is Gaussian."""

    def __init__(self, action_dim, horizon, cond_dim):
        super().__init__()
        self.out = nn.Linear(1 + cond_dim, 1, bias=False)

    def condition(self, t, cond):
        return (cond,)

    def trunk(self, x, *condition, after=None):
        return torch.cat([x[:, 0], condition[0]], dim=-1)

    def head(self, h, *condition):
        return self.out(h)[:, None]

    def injections(self):
        return []


def fit_linear(layer: nn.Linear, features: torch.Tensor, wanted: torch.Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.lstsq(features.double(), wanted.double()[:, None]).solution.T)


def error(prediction: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((prediction.flatten() - wanted).double().square().mean())


@pytest.mark.parametrize(
    ("alpha_bar", "joint", "alone"), [(0.9, 0.500, 0.643), (0.5, 0.100, 0.167), (0.1, 0.0122, 0.0217)]
)
def test_the_gaussian_law_and_its_negative_controls(alpha_bar, joint, alone):
    draw = partial(torch.randn, 400_000, generator=torch.Generator().manual_seed(0))
    clean, noise = draw(), draw()
    y_p, y_q = clean + 0.5 * draw(), clean + 0.5 * draw()
    x = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise
    k, precision = alpha_bar / (1 - alpha_bar), 1 / 0.25
    assert k / (1 + k + 2 * precision) == pytest.approx(joint, rel=0.01)
    assert k / (1 + k + precision) == pytest.approx(alone, rel=0.01)

    def factorised(*residual_sees: torch.Tensor) -> tuple[float, float]:
        """Train both stages to their optimum; return the errors of the base and of the whole."""
        widths = (1, 1, len(residual_sees))
        net = ComposedNetwork(1, 1, widths, network=Linear, composition="output").eval()
        cond = torch.stack([torch.ones_like(x), y_p, *residual_sees], dim=-1)
        fit_linear(net.networks[0].out, torch.stack([x, y_p], dim=-1), noise)
        t = torch.zeros(len(x), dtype=torch.int64)
        with torch.no_grad():
            base = net(x[:, None, None], t, cond).flatten()
            net.set_stage(1)
            assert torch.equal(net(x[:, None, None], t, cond).flatten(), base)
            fit_linear(net.networks[1].out, torch.stack([x, *residual_sees], dim=-1), noise - base)
            return error(base, noise), error(net(x[:, None, None], t, cond), noise)

    base, whole = factorised(y_p, y_q)
    assert base == pytest.approx(alone, rel=0.02)
    assert whole == pytest.approx(joint, rel=0.02)  # the least squares of joint conditioning
    _, blind = factorised(y_q)  # a residual that does not see y_p
    assert blind > 1.02 * whole
    if alpha_bar == 0.5:
        assert blind == pytest.approx(0.130, rel=0.03)
        parts = []
        for given in ((y_p,), (y_q,), ()):
            layer = nn.Linear(1 + len(given), 1, bias=False)
            features = torch.stack([x, *given], dim=-1)
            fit_linear(layer, features, noise)
            parts.append(layer(features).flatten().detach())
        added = error(parts[0] + parts[1] - parts[2], noise)
        assert added == pytest.approx(0.277, rel=0.03)
        assert added > base  # worse than the base alone: y_p and y_q are not independent given x


# --- as a policy ----------------------------------------------------------------------------------------------------

TIMING = ChunkTiming(n_obs_steps=2, horizon=8, n_action_steps=4)


def make_policy(*, camera=False, stage=1, network="mlp", composition="block", **encoder) -> DiffusionPolicy:
    spec = fake_spec(camera=camera)
    torch.manual_seed(0)
    small = partial(ObservationEncoder, image=partial(ImageEncoder, out_dim=6, widths=(8, 8), num_keypoints=4))
    policy = DiffusionPolicy(
        spec,
        timing=TIMING,
        network=partial(ComposedNetwork, network=NETWORKS[network], composition=composition),
        encoder=partial(ComposedEncoder, encoder=small, **{"screen": partial(ModalityScreen, dropout=0.3), **encoder}),
        schedule=NoiseSchedule(num_train_timesteps=20),
        sampler=DDIMSampler(num_inference_steps=3),
    )
    fit_to_bounds(policy.norm, spec)
    randomise(policy)
    policy.set_stage(stage)
    return policy.eval()


def observe(policy, rows=BATCH, seed=0):
    return fake_observation(policy.spec, rows, TIMING.n_obs_steps, torch.Generator().manual_seed(seed))


def changed(obs, **values):
    return Observation(modalities={**obs.modalities, **values})


def act(policy, obs):
    return policy.act(obs, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("camera", [False, True])
@pytest.mark.parametrize("missing", ["base", "null"])
def test_what_is_missing_does_not_matter(camera, missing):
    policy = make_policy(camera=camera, missing=missing)
    obs = observe(policy)
    full = act(policy, obs)
    assert not torch.equal(act(policy, changed(obs, objects=obs.modalities["objects"] + 1)), full)
    gone = {name: value for name, value in obs.modalities.items() if name == "proprio"}
    without = act(policy, Observation(modalities=gone))
    assert not torch.allclose(without, full)
    marked = changed(obs, objects=torch.full_like(obs.modalities["objects"], torch.nan))
    if not camera:
        assert torch.equal(act(policy, marked), without)
    policy.set_stage(0)
    base = act(policy, obs)
    assert torch.equal(without, base) == (missing == "base")


def test_rows_lose_their_modalities_one_by_one():
    policy = make_policy()
    obs = observe(policy)
    objects = obs.modalities["objects"].clone()
    objects[2] = torch.nan
    objects[4, 0, 3] = torch.nan  # one number is enough
    some, full = act(policy, changed(obs, objects=objects)), act(policy, obs)
    policy.set_stage(0)
    base, lost = act(policy, obs), torch.tensor([False, False, True, False, True, False])
    torch.testing.assert_close(some[~lost], full[~lost])
    torch.testing.assert_close(some[lost], base[lost])


def test_a_missing_set_silences_every_stack_that_sees_it():
    policy = make_policy(camera=True, order=[["proprio"], ["objects"]], stage=2)
    obs = policy.normalized(observe(policy, 3))
    for name, weights in (("objects", [0.0, 0.0]), ("rgb.base", [1.0, 0.0])):
        for cumulative in (True, False):
            policy.encoder.cumulative = cumulative
            gone = {**obs, name: torch.full_like(obs[name], torch.nan)}
            wanted = weights if cumulative else [float(name != "objects"), float(name != "rgb.base")]
            assert policy.encoder(gone)[:, :2].tolist() == [wanted] * 3
    assert policy.encoder(obs)[:, :2].tolist() == [[1.0, 1.0]] * 3


def test_what_comes_first_must_be_there_and_infinity_is_no_absence():
    policy = make_policy()
    obs = observe(policy)
    with pytest.raises(RobopolicyError, match="observes 'proprio'"):
        policy.act(Observation(modalities={"objects": obs.modalities["objects"]}))
    with pytest.raises(RobopolicyError, match="'proprio' has values that are not finite"):
        policy.act(changed(obs, proprio=obs.modalities["proprio"] * torch.nan))
    with pytest.raises(RobopolicyError, match="'objects' has values that are not finite"):
        policy.act(changed(obs, objects=obs.modalities["objects"] / 0))
    believing = make_policy(screen=None)
    with pytest.raises(RobopolicyError, match="'objects' has values that are not finite"):
        believing.act(changed(obs, objects=obs.modalities["objects"] * torch.nan))


def test_residual_weight_of_the_run():
    policy = make_policy(residual_weight=0.0)
    obs = observe(policy)
    policy.set_stage(0)
    base = act(policy, obs)
    policy.set_stage(1)
    assert torch.equal(act(policy, obs), base)
    assert not torch.equal(act(make_policy(residual_weight=0.5), obs), base)


def test_training_drops_as_often_as_told_and_only_what_may_be_missing():
    policy = make_policy().train()
    obs = policy.normalized(observe(policy, 2000))
    found = policy.encoder.screen(obs, generator=torch.Generator().manual_seed(0))
    assert not found["proprio"].isnan().any()
    dropped = found["objects"].isnan().flatten(1)
    assert (dropped.any(dim=1) == dropped.all(dim=1)).all()
    assert 0.26 < dropped.all(dim=1).float().mean() < 0.34
    assert not policy.eval().encoder.screen(obs)["objects"].isnan().any()
    loss = policy.train().loss(fake_batch(policy.spec, 8, 2, 8), generator=torch.Generator().manual_seed(0))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.requires_grad)


def test_noise_is_where_and_as_much_as_told_in_training_alone():
    policy = make_policy(screen=partial(ModalityScreen, noise={"proprio": 0.1}))
    screen, obs = policy.encoder.screen, policy.normalized(observe(policy, 2000))
    assert torch.equal(screen(obs)["proprio"], obs["proprio"])
    screen.train()
    found = screen(obs, generator=torch.Generator().manual_seed(0))
    added = found["proprio"] - obs["proprio"]
    assert 0.097 < added.std() < 0.103
    assert added.mean().abs() < 0.005
    assert torch.equal(found["objects"], obs["objects"])
    clean = obs["proprio"].flatten(1).double().sum(dim=0)
    torch.testing.assert_close(screen.total[: len(clean)], clean)  # what doubt compares with is not noisy
    for wrong in ({"proprio": -0.1}, {"torque": 0.1}):
        with pytest.raises(ValueError, match="noise must be of some of"):
            make_policy(screen=partial(ModalityScreen, noise=wrong))


def test_three_sets_and_a_joint_one():
    policy = make_policy(camera=True, order=[["rgb.base"], ["proprio"]], stage=2)
    assert policy.encoder.sets == [("rgb.base",), ("proprio",), ("objects",)]
    assert [e.states for e in policy.encoder.encoders] == [(), ("proprio",), ("proprio", "objects")]
    assert policy.num_stages == 3
    alone = make_policy(camera=True, order=[["rgb.base"], ["proprio"]], stage=2, cumulative=False)
    assert [(e.states, e.images) for e in alone.encoder.encoders][1] == (("proprio",), ())
    joint = make_policy(order=[], stage=0, screen=None)
    plain = DiffusionPolicy(
        joint.spec,
        timing=TIMING,
        network=NETWORKS["mlp"],
        encoder=ObservationEncoder,
        schedule=joint.schedule,
        sampler=joint.sampler,
    )
    fit_to_bounds(plain.norm, plain.spec)
    plain.network.load_state_dict(joint.network.networks[0].state_dict())
    assert torch.equal(act(plain.eval(), observe(joint)), act(joint, observe(joint)))
    with pytest.raises(ValueError, match="each named once; got"):
        modality_sets(joint.spec.observation, [["proprio"], ["proprio"]])
    with pytest.raises(ValueError, match="residual_weight must be one number, or 1"):
        make_policy(residual_weight=[1.0, 2.0])
    with pytest.raises(UnknownNameError, match="composition"):
        make_policy(composition="blocks")


def test_what_no_outer_sensor_measures_comes_first():
    robot, seen = (fake_spec().observation[name] for name in ("proprio", "objects"))
    assert modality_sets({"objects": seen, "goal": seen, "proprio": robot}, None) == [("goal", "proprio"), ("objects",)]
    assert modality_sets(fake_spec(camera=True).observation, None) == [("proprio",), ("objects", "rgb.base")]
    assert modality_sets({"proprio": robot, "goal": seen}, None) == [("proprio",), ("goal",)]
    with pytest.raises(ValueError, match="order must be sets of some of objects, each named once; got"):
        modality_sets({"objects": seen}, None)


def test_weights_know_their_stage_and_their_order():
    policy = make_policy()
    fresh = make_policy(stage=0)
    fresh.load_state_dict(copy.deepcopy(policy.state_dict()))
    assert (fresh.stage, fresh.network.stage, fresh.encoder.stage) == (1, 1, 1)
    assert torch.equal(act(fresh, observe(policy)), act(policy, observe(policy)))
    with pytest.raises(RobopolicyError, match="normaliser is fixed"):
        fit_to_bounds(fresh.norm, fresh.spec)
    with pytest.raises(RuntimeError, match="the order cannot be changed"):
        make_policy(order=[["objects"]]).load_state_dict(policy.state_dict())
    with pytest.raises(ValueError, match=r"stage must be in \[0, 1\]; got 2"):
        policy.set_stage(2)


def test_an_engine_also_does_without():
    pytest.importorskip("onnxruntime")
    policy = make_policy()
    engine = build_engine(policy, "onnx", num_threads=1)
    obs = observe(policy, 3)
    marked = obs.modalities["objects"].clone()
    marked[1] = torch.nan
    for some in (obs, changed(obs, objects=marked)):
        torch.testing.assert_close(act(engine, some), act(policy, some), rtol=0, atol=1e-4)


# --- doubt ----------------------------------------------------------------------------------------------------------


def test_doubt_finds_streams_that_contradict_the_robot():
    """Objects tell where the hand is, seen from them: as soon as the hand has moved, a frozen stream is wrong."""
    spec = fake_spec(proprio=3, objects=6)
    screen = ModalityScreen(spec.observation, 2, optional=["objects"], doubt_above=4.0)
    generator = torch.Generator().manual_seed(0)

    def windows(rows):
        start = 0.5 * torch.randn(rows, 1, 3, generator=generator)
        hand = torch.cat([start, start + 0.2 * torch.randn(rows, 1, 3, generator=generator)], dim=1)
        cube = 0.5 * torch.randn(rows, 1, 3, generator=generator).expand(-1, 2, -1)
        return {"proprio": hand, "objects": torch.cat([cube, cube - hand], dim=-1)}

    screen.train()
    for _ in range(20):
        screen(windows(500))
    screen.eval()
    clean, broken = windows(1000), windows(1000)
    usual = screen.doubts(clean)["objects"]
    assert usual.square().mean().sqrt() == pytest.approx(1.0, abs=0.1)
    assert (usual > 4).float().mean() < 0.001
    frozen = {**clean, "objects": clean["objects"][:, :1].expand(-1, 2, -1)}
    for wrong in (frozen, {**clean, "objects": broken["objects"]}):
        assert (screen.doubts(wrong)["objects"] > 4).float().mean() > 0.95
    assert (screen(frozen)["objects"].isnan().flatten(1).all(dim=1)).float().mean() > 0.95
    assert not screen(clean)["objects"][usual <= 4].isnan().any()
    again = ModalityScreen(spec.observation, 2, optional=["objects"], doubt_above=4.0)
    again.load_state_dict(screen.state_dict())
    torch.testing.assert_close(again.eval().doubts(clean)["objects"], usual)


def test_planners_say_what_was_missing_and_how_doubtful_it_was():
    policy = make_policy()
    obs = observe(policy, 2)
    objects = obs.modalities["objects"].clone()
    objects[1] = torch.nan
    for planner in (FreshPlanner(policy), WarmStartPlanner(policy, 2, warm_start=WarmStart(timesteps=(9, 0)))):
        planner(changed(obs, objects=objects), torch.arange(2), shift=torch.zeros(2, dtype=torch.int64))
        assert planner.diagnostics["missing_objects"].tolist() == [0.0, 1.0]
        assert planner.diagnostics["doubt_objects"].isnan().tolist() == [False, True]


# --- guidance -------------------------------------------------------------------------------------------------------


def test_guidance_of_one_is_the_policy_and_of_zero_is_blind():
    spec = fake_spec()
    encoder = GuidedEncoder(spec.observation, 2, optional=["objects"]).eval()
    network = GuidedNetwork(ACTION, HORIZON, encoder.out_dim, network=NETWORKS["mlp"], scale=1.0).eval()
    randomise(network)
    modalities = observe(make_policy()).modalities
    x, t, _ = inputs()
    cond = encoder(modalities)
    plain = network.network(x, t, ObservationEncoder.forward(encoder, modalities))
    torch.testing.assert_close(network(x, t, cond), plain)
    network.scale = 0.0
    other = {**modalities, "objects": modalities["objects"] + 1}
    assert torch.equal(network(x, t, encoder(other)), network(x, t, cond))
    network.scale = 2.0
    blind = network.network(x, t, ObservationEncoder.forward(encoder, encoder.without(modalities)))
    torch.testing.assert_close(network(x, t, cond), 2 * plain - blind, rtol=1e-4, atol=1e-5)
    assert torch.equal(
        network.train()(x, t, encoder.train()(modalities)), network.eval().network(x, t, encoder(modalities))
    )


def test_layers_that_start_at_zero_are_all_there():
    for name, net in ((n, composed(n)) for n in NETWORKS):
        layers = list(itertools.chain(*net.injections))
        assert len(layers) == {"mlp": 2, "dit": 2, "unet": 8}[name]
        assert not any(p.any() for layer in layers for p in layer.parameters())
    assert not zero_(nn.Conv1d(2, 2, 1)).weight.any()
