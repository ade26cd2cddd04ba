"""Laws of the engines: every engine acts as the policy does, on the same noise, row by row."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from fakes import fake_observation, fake_spec, fit_to_bounds
from torch import nn

from robopolicy.errors import MissingRequirementError, RobopolicyError, ShapeError
from robopolicy.nn import graphs
from robopolicy.nn.encoder import ObservationEncoder
from robopolicy.nn.image import ImageEncoder
from robopolicy.nn.mlp import ChunkMLP
from robopolicy.nn.unet import ChunkUNet
from robopolicy.policies import engines
from robopolicy.policies.actors import ChunkActor
from robopolicy.policies.diffusion import DiffusionPolicy
from robopolicy.policies.engines import GraphEngine, build_engine
from robopolicy.policies.planners import FreshPlanner
from robopolicy.policies.warm_start import WarmStartPlanner
from robopolicy.rng import NoiseTape, randn
from robopolicy.sampling.samplers import DDIMSampler, DDPMSampler
from robopolicy.sampling.schedule import NoiseSchedule
from robopolicy.sampling.warm_start import WarmStart
from robopolicy.timing import ChunkTiming
from robopolicy.types import Observation

pytest.importorskip("onnxruntime")

TIMING = ChunkTiming(n_obs_steps=2, horizon=8, n_action_steps=4)
WARM = WarmStart(timesteps=(9, 0))
MLP = partial(ChunkMLP, width=16, depth=1, cond_width=8, time_dim=8)
UNET = partial(ChunkUNet, down_dims=(8,), num_groups=2, time_dim=8)


def make_policy(*, camera: bool = False, network=MLP, seed: int = 0) -> DiffusionPolicy:
    spec = fake_spec(camera=camera)
    torch.manual_seed(seed)
    policy = DiffusionPolicy(
        spec,
        timing=TIMING,
        network=network,
        encoder=partial(ObservationEncoder, image=partial(ImageEncoder, out_dim=6, widths=(8, 8), num_keypoints=4)),
        schedule=NoiseSchedule(num_train_timesteps=20),
        sampler=DDPMSampler(num_inference_steps=3),
        warm_start=WARM,
    )
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fit_to_bounds(policy.norm, spec)
    return policy.eval()


def observe(policy: DiffusionPolicy, rows: int, seed: int = 0) -> Observation:
    return fake_observation(policy.spec, rows, TIMING.n_obs_steps, torch.Generator().manual_seed(seed))


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    return make_policy()


@pytest.fixture(scope="module")
def engine(policy):
    return build_engine(policy, "onnx", num_threads=1)


def test_eager_is_the_policy_itself(policy):
    assert build_engine(policy, "eager") is policy


@pytest.mark.parametrize("rows", [1, 3])
def test_a_graph_sees_the_noise_that_eager_sees(policy, engine, rows):
    obs = observe(policy, rows)
    chunk = engine.act(obs, generator=noise(1))
    torch.testing.assert_close(chunk, policy.act(obs, generator=noise(1)), atol=1e-5, rtol=0)
    assert not torch.allclose(chunk, engine.act(obs, generator=noise(2)), atol=1e-3)
    each = [noise(seed) for seed in range(rows)]
    again = [noise(seed) for seed in range(rows)]
    torch.testing.assert_close(engine.act(obs, generator=each), policy.act(obs, generator=again), atol=1e-5, rtol=0)


def test_noise_is_drawn_as_often_as_by_eager(policy, engine):
    """After a call both have used up equally much of their generator."""
    first, second = noise(), noise()
    policy.act(observe(policy, 1), generator=first)
    engine.act(observe(policy, 1), generator=second)
    assert torch.equal(first.get_state(), second.get_state())


def test_windows_of_one_repeated_frame_are_read_right(policy, engine):
    """A new episode's window is one frame expanded, so its strides are not those of a usual one."""
    frames = observe(policy, 1).modalities
    obs = Observation(modalities={name: value[:, :1].expand(-1, 2, -1) for name, value in frames.items()})
    torch.testing.assert_close(
        engine.act(obs, generator=noise()), policy.act(obs, generator=noise()), atol=1e-5, rtol=0
    )


def test_a_row_does_not_depend_on_its_neighbours(policy, engine):
    obs = observe(policy, 3)
    together = engine.act(obs, generator=[noise(seed) for seed in range(3)])
    alone = engine.act(obs.take(torch.tensor([2])), generator=[noise(2)])
    assert torch.equal(alone, together[2:])


def test_a_guess_is_refined_as_by_the_policy(policy, engine):
    obs, guess = observe(policy, 2), policy.act(observe(policy, 2, seed=5), generator=noise())
    for method in ("refine", "refine_first"):
        found, wanted = (getattr(p, method)(obs, guess, generator=noise(3)) for p in (engine, policy))
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    x, cond, _ = policy.refine_first(obs, guess, generator=noise(3))
    assert "refine_rest" in {graph.method for graph in engine.graphs}  # not to be captured at a tick that is due
    torch.testing.assert_close(
        engine.refine_rest(x, cond, generator=noise(4)),
        policy.refine_rest(x, cond, generator=noise(4)),
        atol=1e-5,
        rtol=0,
    )
    by_keyword = engine.act(obs, guess=guess, generator=noise(3))
    torch.testing.assert_close(by_keyword, policy.act(obs, guess=guess, generator=noise(3)), atol=1e-5, rtol=0)


def test_each_setting_has_its_graph_and_it_is_captured_once(policy):
    engine = build_engine(policy, "onnx", num_threads=1)
    obs = observe(policy, 1)
    for sampler in (DDIMSampler(num_inference_steps=1), DDIMSampler(num_inference_steps=2)) * 2:
        found = engine.act(obs, sampler=sampler, generator=noise())
        torch.testing.assert_close(found, policy.act(obs, sampler=sampler, generator=noise()), atol=1e-5, rtol=0)
    assert len(engine.graphs) == 2


def test_a_long_chain_runs_by_the_networks_graph(policy):
    engine = GraphEngine(policy, "onnx", num_threads=1, max_unrolled=2)
    obs = observe(policy, 2)
    assert engine.capture("act", obs) is None
    found = engine.act(obs, generator=noise())
    torch.testing.assert_close(found, policy.act(obs, generator=noise()), atol=1e-5, rtol=0)
    assert engine.graphs == []


@pytest.mark.parametrize("options", [{"camera": True}, {"network": UNET}], ids=["camera", "unet"])
def test_cameras_and_convolutions_are_captured_too(options):
    policy = make_policy(**options)
    obs = observe(policy, 1)
    found = build_engine(policy, "onnx", num_threads=1).act(obs, generator=noise())
    torch.testing.assert_close(found, policy.act(obs, generator=noise()), atol=1e-4, rtol=0)


def test_planners_and_actors_take_an_engine_for_a_policy(policy, engine):
    frames = [
        {name: value[:, 0] for name, value in observe(policy, 2, seed=seed).modalities.items()} for seed in range(6)
    ]

    def play(planner):
        actor = ChunkActor(planner, 2)
        each = [noise(7), noise(8)]
        return torch.stack([actor(frame, generator=each) for frame in frames])

    for make in (FreshPlanner, WarmStartPlanner):
        torch.testing.assert_close(play(make(engine, 2)), play(make(policy, 2)), atol=1e-4, rtol=0)


def test_bad_input_is_refused_as_by_the_policy(policy, engine):
    obs = observe(policy, 2)
    bad = dict(obs.modalities)
    bad["objects"] = bad["objects"].clone()
    bad["objects"][1, 0, 0] = torch.nan
    with pytest.raises(RobopolicyError, match="'objects' has values that are not finite in row 1"):
        engine.act(Observation(modalities=bad))
    with pytest.raises(ShapeError, match="objects"):
        engine.act(Observation(modalities={**obs.modalities, "objects": obs.modalities["objects"][..., 1:]}))
    with pytest.raises(RobopolicyError, match="observes 'objects'; got only proprio"):
        engine.act(Observation(modalities={"proprio": obs.modalities["proprio"]}))
    with pytest.raises(ShapeError, match="guess"):
        engine.refine(obs, torch.zeros(2, 7, 4))


def test_what_cannot_be_built_is_said(policy, monkeypatch):
    with pytest.raises(RobopolicyError, match="Did you mean 'onnx'"):
        build_engine(policy, "onx")
    with pytest.raises(RobopolicyError, match=r"policy\.eval"):
        build_engine(make_policy().train(), "onnx")
    monkeypatch.setattr(graphs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingRequirementError, match=r"robopolicy\[export\]"):
        build_engine(policy, "onnx")


def test_without_a_compiler_compile_is_refused(policy, monkeypatch):
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(MissingRequirementError, match=r"apt-get install g\+\+"):
        build_engine(policy, "compile")


def test_a_policy_that_branches_on_values_is_refused(policy):
    class Branching(DiffusionPolicy):
        def act(self, obs, *, generator=None):
            chunk = super().act(obs, generator=generator)
            return chunk if bool(chunk.sum() > 0) else -chunk

    branching = make_policy()
    branching.__class__ = Branching
    with pytest.raises(RobopolicyError, match=r"cannot capture Branching\.act .*engine=eager works"):
        build_engine(branching, "onnx").act(observe(policy, 1))


def test_a_graph_that_computes_something_else_is_never_used(monkeypatch):
    class Lies:
        def __call__(self, *inputs):
            return (inputs[0] + 1,)

    monkeypatch.setitem(graphs.BACKENDS, "onnx", lambda *_: Lies())
    with pytest.raises(RobopolicyError, match=r"computes it wrongly: it differs from eager by 1"):
        graphs.build_graph(
            "onnx", nn.Identity(), [torch.zeros(2)], what="it", names=["x"], outputs=["y"], num_threads=1
        )


def test_noise_on_a_tape_is_played_in_order():
    tape = NoiseTape()
    recorded = [randn(2, 3, generator=tape), randn(2, 3, generator=tape)]
    again = NoiseTape(torch.stack(recorded))
    assert all(torch.equal(randn(2, 3, generator=again), one) for one in recorded)


@pytest.mark.slow
def test_compiled_code_acts_as_the_policy_does(policy):
    try:
        engine = build_engine(policy, "compile")
    except MissingRequirementError as error:
        pytest.skip(str(error))
    obs = observe(policy, 2)
    expanded = {name: value[:, :1].expand(-1, 2, -1) for name, value in obs.modalities.items()}
    for window in (obs, Observation(modalities=expanded)):
        found = engine.act(window, sampler=DDPMSampler(num_inference_steps=2), generator=noise())
        wanted = policy.act(window, sampler=DDPMSampler(num_inference_steps=2), generator=noise())
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(16, 4), (8, 2), (5, 3), (16, 7)])
def test_noise_drawn_at_once_is_that_drawn_one_after_the_other(shape):
    for generator in (lambda: noise(), lambda: [noise()]):
        found = engines._draw((3, 1, *shape), 1, generator())
        given = generator()
        assert torch.equal(found, torch.stack([randn(1, *shape, generator=given) for _ in range(3)]))
