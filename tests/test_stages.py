"""Laws of training in stages: what an early stage leaves stays as it is, and stopping anywhere changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from fakes import fake_batch, fake_spec, fit_to_bounds
from omegaconf import OmegaConf

from robopolicy.app import composing
from robopolicy.app.train_order import choose_order, wants_order
from robopolicy.data import EpisodeStore
from robopolicy.errors import RobopolicyError
from robopolicy.nn.composed import ComposedEncoder, ComposedNetwork
from robopolicy.nn.encoder import ObservationEncoder
from robopolicy.nn.mlp import ChunkMLP
from robopolicy.nn.screen import ModalityScreen
from robopolicy.policies.diffusion import DiffusionPolicy
from robopolicy.sampling.samplers import DDIMSampler
from robopolicy.sampling.schedule import NoiseSchedule
from robopolicy.timing import ChunkTiming
from robopolicy.training import checkpoint
from robopolicy.training.fit import fit, make_accelerator
from robopolicy.training.optim import make_optimizer
from robopolicy.training.settings import TrainSettings
from robopolicy.training.stages import Progress, stage_ends
from robopolicy.types import Batch

SPEC = fake_spec()
TIMING = ChunkTiming(n_obs_steps=2, horizon=4, n_action_steps=2)
MLP = partial(ChunkMLP, width=16, depth=2, cond_width=8, time_dim=8, dropout=0.1)


def build(order=(("proprio",),), composition="block") -> DiffusionPolicy:
    torch.manual_seed(0)
    policy = DiffusionPolicy(
        SPEC,
        timing=TIMING,
        network=partial(ComposedNetwork, network=MLP, composition=composition),
        encoder=partial(
            ComposedEncoder,
            order=order,
            encoder=partial(ObservationEncoder, state_width=8),
            screen=partial(ModalityScreen, dropout=0.2),
        ),
        schedule=NoiseSchedule(num_train_timesteps=20),
        sampler=DDIMSampler(num_inference_steps=2),
    )
    fit_to_bounds(policy.norm, SPEC)
    return policy


def batches(start: int = 0) -> Iterator[Batch]:
    while True:
        yield fake_batch(SPEC, 8, 2, 4, seed=start)
        start += 1


def run(run_dir: Path, policy: DiffusionPolicy | None = None, **changes):
    """Train; return the policy, what was logged, and how many steps were done."""
    policy, rows = policy or build(), []
    options = {name: changes.pop(name) for name in ("resume_from", "stop", "held_out") if name in changes}
    settings = TrainSettings(
        **{"num_steps": 24, "warmup_steps": 3, "log_every": 5, "save_every": 10, "keep": 100, "lr": 1e-2}
        | {"stages": (1,) * (policy.num_stages)}
        | changes
    )
    done = fit(
        policy,
        batches,
        settings,
        accelerator=make_accelerator(settings),
        run_dir=run_dir,
        config={"policy": {}, "data": {}, "train": {}},
        seed=3,
        log=lambda step, metrics: rows.append({"step": step, **metrics}),
        **options,
    )
    return policy, rows, done


def tensors(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return checkpoint.read_weights(run_dir / f"step_{step:08d}")


def is_base(name: str) -> bool:
    return name.startswith(("network.networks.0", "encoder.encoders.0"))


def held_out_with(losses, monkeypatch):
    """Let the held-out losses be these, one after the other."""
    following = iter(losses)
    monkeypatch.setattr("robopolicy.training.fit.validation_loss", lambda policy, batches: next(following))
    return lambda: iter(())


@pytest.mark.parametrize("composition", ["block", "output", "both", "sum"])
def test_the_base_is_the_average_of_its_stage_and_stays_it(tmp_path, composition):
    policy, _, done = run(tmp_path, build(composition=composition), num_steps=108, stages=(8, 100), save_every=50)
    assert done == 108
    base = {name: value for name, value in tensors(tmp_path, 8).items() if is_base(name)}
    assert len(base) > 10
    early = checkpoint.load_training_state(tmp_path / "step_00000008").weights
    assert any(not torch.equal(value, early[name]) for name, value in base.items())  # the average is not the weights
    for step in (50, 108):
        averaged, weights = (
            tensors(tmp_path, step),
            checkpoint.load_training_state(tmp_path / f"step_{step:08d}").weights,
        )
        for name, value in base.items():
            assert torch.equal(averaged[name], value), (step, name)
            assert torch.equal(weights[name], value), (step, name)
    state = checkpoint.load_training_state(tmp_path / "step_00000108")
    assert not any(is_base(name) for name in state.optimizer)
    moved = {n for n, v in tensors(tmp_path, 108).items() if not torch.equal(v, tensors(tmp_path, 50)[n])}
    assert moved
    assert not any(is_base(name) for name in moved)
    assert any(name.startswith("network.networks.1") for name in moved)
    assert [n for n, v in tensors(tmp_path, 108).items() if n.startswith("norm.")] != []
    assert policy.stage == 1


def test_the_second_stage_starts_equal_to_the_average_of_the_first(tmp_path):
    run(tmp_path, num_steps=12, stages=(1, 1), save_every=6)
    first, second = build(), build()
    first.load_state_dict(tensors(tmp_path, 6))
    second.load_state_dict(tensors(tmp_path, 6))
    second.set_stage(1)
    obs = fake_batch(SPEC, 5, 2, 4).obs
    chunks = [p.eval().act(obs, generator=torch.Generator().manual_seed(0)) for p in (first, second)]
    assert torch.equal(*chunks)


@pytest.mark.parametrize("changes", [{}, {"order": [["objects"], ["proprio"]]}])
def test_stopped_anywhere_and_resumed(tmp_path, changes):
    policy = partial(build, **changes)
    run(tmp_path / "whole", policy())
    wanted = checkpoint.load_training_state(tmp_path / "whole" / "step_00000024")
    for stop_at in (3, 12, 13):
        run_dir, asked = tmp_path / str(stop_at), iter(range(1, 100))
        _, _, done = run(run_dir, policy(), stop=lambda asked=asked, at=stop_at: next(asked) == at)
        assert done == stop_at
        _, _, done = run(run_dir, policy(), resume_from=checkpoint.resolve(run_dir))
        assert done == 24
        found = checkpoint.load_training_state(checkpoint.resolve(run_dir))
        for group in ("weights", "optimizer"):
            mine, theirs = getattr(wanted, group), getattr(found, group)
            assert mine.keys() == theirs.keys()
            assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == [], stop_at
        assert found.info == wanted.info
        last = tensors(tmp_path / "whole", 24)
        assert all(torch.equal(value, last[name]) for name, value in tensors(run_dir, 24).items())


def test_a_base_that_gets_worse_ends_early_and_leaves_its_best(tmp_path, monkeypatch):
    losses = [0.5, 0.3, 0.4, 0.35, *[0.9] * 20]
    held_out = held_out_with(losses, monkeypatch)
    policy, rows, done = run(tmp_path, held_out=held_out, validate_every=2, early_stop=2, save_every=1)
    assert done == 24
    assert [row["step"] for row in rows if "train/lr" in row] == [5, 8, 10, 15, 20, 24]
    best, base = tensors(tmp_path, 4), tensors(tmp_path, 24)
    assert all(torch.equal(best[name], value) for name, value in base.items() if is_base(name))
    assert checkpoint.load_training_state(tmp_path / "step_00000008").info["stages"] == {
        "stage": 0,
        "start": 0,
        "best_loss": 0.3,
        "worse": 2,
        "over": True,
    }
    assert checkpoint.load_training_state(tmp_path / "step_00000009").info["stages"]["start"] == 8
    assert policy.stage == 1


@pytest.mark.parametrize("stop_at", [5, 7, 8, 9])
def test_an_early_end_survives_being_stopped(tmp_path, monkeypatch, stop_at):
    losses = [0.5, 0.3, 0.4, 0.35, *[0.9] * 20]
    options = {"validate_every": 2, "early_stop": 2}
    run(tmp_path / "whole", held_out=held_out_with(losses, monkeypatch), **options)
    asked = iter(range(1, 100))
    run_dir = tmp_path / "stopped"
    held_out = held_out_with(losses, monkeypatch)
    assert run(run_dir, held_out=held_out, stop=lambda: next(asked) == stop_at, **options)[2] == stop_at
    run(run_dir, held_out=held_out, resume_from=checkpoint.resolve(run_dir), **options)
    last = tensors(tmp_path / "whole", 24)
    assert all(torch.equal(value, last[name]) for name, value in tensors(run_dir, 24).items())


def test_without_held_out_episodes_or_patience_a_stage_goes_on_to_its_end(tmp_path, monkeypatch):
    held_out = held_out_with([0.1, *[0.9] * 30], monkeypatch)
    run(tmp_path, held_out=held_out, validate_every=2, early_stop=None, save_every=1)
    assert checkpoint.load_training_state(tmp_path / "step_00000013").info["stages"]["start"] == 12


def test_where_stages_end():
    assert stage_ends(100, 1, None) == [100]
    assert stage_ends(100, 3, None) == [5, 10, 100]
    assert stage_ends(8, 3, None) == [1, 2, 8]
    assert stage_ends(100, 2, (0.4, 0.6)) == stage_ends(100, 2, (2, 3)) == [40, 100]
    with pytest.raises(RobopolicyError, match=r"one share per stage of the policy, 1; got 2"):
        stage_ends(100, 1, (0.4, 0.6))
    with pytest.raises(RobopolicyError, match="without a step"):
        stage_ends(1, 2, None)
    with pytest.raises(ValueError, match="positive shares"):
        TrainSettings(num_steps=1, stages=(0.0, 1.0))
    with pytest.raises(ValueError, match="early_stop must be at least 1"):
        TrainSettings(num_steps=1, early_stop=0)


def test_progress_counts_validations_since_the_best():
    progress = Progress()
    for loss, worse, over in [(0.5, 0, False), (0.6, 1, False), (0.4, 0, False), (0.4, 1, False), (0.7, 2, True)]:
        progress = progress.judged(loss, patience=2)
        assert (progress.worse, progress.over) == (worse, over)
        assert Progress.from_info({"stages": progress.to_info()}) == progress
    assert progress.next(9) == Progress(stage=1, start=9)
    assert Progress.from_info({}) == Progress()


def test_only_what_learns_is_given_to_the_optimiser():
    policy = build()
    for stage in (0, 1):
        policy.set_stage(stage)
        held = {id(p) for group in make_optimizer(policy).param_groups for p in group["params"]}
        names = {name for name, p in policy.named_parameters() if id(p) in held}
        assert all(is_base(name) == (stage == 0) for name in names)
        assert policy.train().network.networks[0].training == (stage == 0)
        assert policy.encoder.encoders[0].training == (stage == 0)


def test_an_order_is_found_by_held_out_loss(tmp_path, monkeypatch, capsys):
    """Actions follow from the objects alone: these must come first."""
    demos, held_out = store_of(40, seed=0), store_of(8, seed=1)
    config = composing.compose("train", ["policy=fdp", "policy.network.network.width=32", "policy.encoder.order=auto"])
    cfg = OmegaConf.to_container(config, resolve=True)
    assert wants_order(cfg["policy"])
    settings = TrainSettings(num_steps=200, batch_size=64, lr=3e-3, warmup_steps=5)
    chosen = choose_order(cfg, settings, demos, held_out, make_accelerator(settings))
    assert chosen["encoder"]["order"] == [["objects"]]
    assert chosen["network"] == cfg["policy"]["network"]
    assert not wants_order(chosen)
    said = capsys.readouterr().err
    assert "order: objects first, then proprio." in said
    assert said.count("0.") >= 3


def store_of(num_episodes: int, *, seed: int) -> EpisodeStore:
    """Episodes of 20 steps whose actions are four numbers of the objects, which stay; proprioception is noise."""
    draw = torch.Generator().manual_seed(seed)
    objects = (2 * torch.rand(num_episodes, 5, generator=draw) - 1).repeat_interleave(20, dim=0)
    return EpisodeStore(
        spec=SPEC,
        modalities={"proprio": 2 * torch.rand(len(objects), 9, generator=draw) - 1, "objects": objects},
        action=torch.clamp(objects[:, :4], torch.tensor(SPEC.action.low), torch.tensor(SPEC.action.high)),
        episode_ends=torch.arange(20, len(objects) + 1, 20),
        seeds=torch.arange(num_episodes),
        success=torch.ones(num_episodes, dtype=torch.bool),
    )
