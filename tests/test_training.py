"""Laws of the training loop, on a policy small enough to check by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_training import LIMITS, ToyPolicy, files_up_to, run_toy, toy_batches

from robopolicy.errors import MissingRequirementError, TrainingError, UnknownNameError
from robopolicy.rng import Rng
from robopolicy.training import logging
from robopolicy.training.ema import EMA
from robopolicy.training.fit import fit, make_accelerator
from robopolicy.training.optim import cosine_with_warmup, make_optimizer, make_scheduler
from robopolicy.training.settings import TrainSettings
from robopolicy.types import Batch, Observation


def test_loss_falls_and_every_interval_is_logged_once(tmp_path):
    _, rows = run_toy(tmp_path, num_steps=300, lr=3e-2, log_every=50)
    assert [row["step"] for row in rows] == [50, 100, 150, 200, 250, 300]
    assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]
    assert all(row["train/samples_per_s"] > 0 and 0 < row["train/data_share"] < 1 for row in rows)


def test_logged_loss_is_the_mean_over_the_interval(tmp_path):
    _, every = run_toy(tmp_path / "a", log_every=1)
    _, tenth = run_toy(tmp_path / "b", log_every=10)
    for row in tenth:
        inside = [one["train/loss"] for one in every if row["step"] - 10 < one["step"] <= row["step"]]
        assert row["train/loss"] == pytest.approx(np.mean(inside), rel=1e-12)


def test_ema_decay_is_diffusion_policys():
    ema = EMA(nn.Linear(1, 1))
    assert ema.decay(1) == 0.0
    for n in (2, 10, 1000, 20000):  # their counter starts at 0 and is used one late: step = n - 1
        assert ema.decay(n) == pytest.approx(1 - (1 + (n - 1) / 1.0) ** -0.75)
    assert ema.decay(10**9) == 0.9999


def test_ema_follows_the_recursion_and_copies_buffers():
    source, ema = nn.BatchNorm1d(3), EMA(nn.BatchNorm1d(3), power=0.75)
    wanted = None
    for n in range(1, 6):
        with torch.no_grad():
            source.weight.copy_(torch.randn(3))
            source.running_mean.copy_(torch.randn(3))
        decay = ema.decay(n)
        wanted = source.weight.detach().clone() if n == 1 else decay * wanted + (1 - decay) * source.weight.detach()
        ema.update(source, n)
        torch.testing.assert_close(ema.policy.weight, wanted)
        torch.testing.assert_close(ema.policy.running_mean, source.running_mean)
    assert not ema.policy.weight.requires_grad


def test_learning_rate_rises_then_falls_to_zero():
    factors = [cosine_with_warmup(k, num_steps=1000, warmup_steps=100) for k in range(1001)]
    assert factors[0] == 0.01
    assert factors[99] == factors[100] == 1.0
    assert factors[550] == pytest.approx(0.5)
    assert factors[1000] == pytest.approx(0.0, abs=1e-12)
    assert cosine_with_warmup(3, num_steps=8, warmup_steps=500) == 1.0  # short runs still reach the full rate


def test_schedule_can_start_anywhere():
    def rates(start: int, count: int) -> list[float]:
        optimizer = make_optimizer(nn.Linear(1, 1), lr=0.3)
        scheduler = make_scheduler(optimizer, num_steps=50, warmup_steps=7, start_step=start)
        out = []
        for _ in range(count):
            out.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return out

    whole = rates(0, 50)
    for start in (1, 6, 7, 30):
        assert rates(start, 50 - start) == whole[start:]


def test_accumulated_gradients_are_those_of_the_joined_batch(tmp_path):
    class Plain(ToyPolicy):
        def loss(self, batch: Batch, *, generator: Rng = None) -> Tensor:
            return (self.act(batch.obs) - batch.action).square().mean()

    def joined(start: int) -> Iterator[Batch]:
        source = toy_batches(start * 2)
        while True:
            a, b = next(source), next(source)
            proprio = torch.cat([a.obs.modalities["proprio"], b.obs.modalities["proprio"]])
            action, pad = torch.cat([a.action, b.action]), torch.cat([a.is_pad, b.is_pad])
            yield Batch(obs=Observation(modalities={"proprio": proprio}), action=action, is_pad=pad)

    results = []
    for accumulate, make in ((2, toy_batches), (1, joined)):
        torch.manual_seed(0)
        policy = Plain()
        policy.net[1].p = 0.0
        policy.norm.fit(LIMITS)
        settings = TrainSettings(num_steps=5, accumulate=accumulate)
        fit(
            policy,
            make,
            settings,
            accelerator=make_accelerator(settings),
            run_dir=tmp_path / str(accumulate),
            config={},
            seed=0,
            log=lambda step, metrics: None,
        )
        results.append(policy.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], msg=name)


def test_validation_changes_nothing_in_training(tmp_path):
    plain, _ = run_toy(tmp_path / "a")
    checked, rows = run_toy(tmp_path / "b", held_out=lambda: toy_batches(10_000), validate_every=7)
    assert {row["step"] for row in rows if "val/loss" in row} == {7, 14, 21, 28, 35, 40}
    for name, value in plain.state_dict().items():
        assert torch.equal(value, checked.state_dict()[name]), name


def test_bf16_trains(tmp_path):
    policy, rows = run_toy(tmp_path, num_steps=300, lr=3e-2, log_every=100, mixed_precision="bf16")
    assert rows[-1]["train/loss"] < 0.8 * rows[0]["train/loss"]
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_loss_that_is_not_finite_names_the_step_and_spares_the_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match="Step 24: the loss is nan"):
        run_toy(tmp_path, make_batches=lambda start: toy_batches(start, spoil_at=23), save_every=7)
    assert (tmp_path / "last").read_text().strip() == "step_00000021"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_steps": 0}, "train.num_steps must be at least 1"),
        ({"lr": 0.0}, "train.lr must be positive"),
        ({"val_fraction": 1.0}, "train.val_fraction"),
        ({"betas": (0.9,)}, "train.betas"),
    ],
)
def test_settings_are_checked(change, said):
    with pytest.raises(ValueError, match=said):
        TrainSettings(**{"num_steps": 10, **change})


def test_unknown_precision_gets_a_suggestion():
    with pytest.raises(UnknownNameError, match="Did you mean 'bf16'"):
        TrainSettings(num_steps=1, mixed_precision="bf61")
    assert TrainSettings(num_steps=1, mixed_precision=False).mixed_precision == "no"  # a bare `no` in YAML


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_what_the_machine_lacks_is_said():
    with pytest.raises(MissingRequirementError, match="no CUDA device"):
        make_accelerator(TrainSettings(num_steps=1, device="cuda"))
    with pytest.raises(MissingRequirementError, match="needs a GPU"):
        make_accelerator(TrainSettings(num_steps=1, mixed_precision="fp16"))


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path):
    with logging.open_logs([], tmp_path) as log:
        for step in (10, 20, 30):
            log(step, {"train/loss": step / 3})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "train/l')  # killed while writing
    with logging.open_logs([], tmp_path, start_step=20) as log:
        log(30, {"train/loss": 0.5})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(10, 10 / 3), (20, 20 / 3), (30, 0.5)]


def test_metrics_that_cannot_be_written_say_so(tmp_path):
    with logging.jsonl(tmp_path) as log:
        log(1, {"train/loss": 0.5})
        with files_up_to(50), pytest.raises(TrainingError, match=r"Could not write .*metrics.jsonl: File too large"):
            log(2, {"train/loss": 0.5})


def test_tensorboard_gets_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with logging.open_logs(["tensorboard"], tmp_path) as log:
        log(10, {"train/loss": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 0.25)]


def test_missing_logger_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(MissingRequirementError, match=r"pip install 'robopolicy\[wandb\]'"),
        logging.open_logs(["wandb"], tmp_path),
    ):
        pass
    with pytest.raises(UnknownNameError, match="Did you mean 'wandb'"), logging.open_logs(["wand"], tmp_path):
        pass
