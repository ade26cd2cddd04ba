"""Laws of calibration on made-up chunks, and the verb calibrate on a point mass that needs no simulator."""

from __future__ import annotations

import json

import pytest
import torch
from point_task import PointEnv, point_spec

from robopolicy.app.build import UNCALIBRATED, build_planner, build_policy
from robopolicy.app.composing import compose
from robopolicy.errors import RobopolicyError
from robopolicy.evaluation.calibration import (
    Restart,
    Rules,
    choose,
    excess,
    find_modes,
    remaining,
    spaced,
    switches,
)
from robopolicy.sampling.schedule import NoiseSchedule
from robopolicy.training import checkpoint

DIFFUSION = {
    "_target_": "robopolicy.policies.diffusion.DiffusionPolicy",
    "timing": {"_target_": "robopolicy.timing.ChunkTiming", "n_obs_steps": 2, "horizon": 8, "n_action_steps": 4},
    "network": {"_target_": "robopolicy.nn.mlp.ChunkMLP", "_partial_": True, "width": 16, "depth": 1, "cond_width": 8},
    "encoder": {"_target_": "robopolicy.nn.encoder.ObservationEncoder", "_partial_": True},
    "schedule": {"_target_": "robopolicy.sampling.schedule.NoiseSchedule", "num_train_timesteps": 20},
    "sampler": {"_target_": "robopolicy.sampling.samplers.DDIMSampler", "num_inference_steps": 2},
    "prediction": "sample",
}
FLOW = {
    **{key: value for key, value in DIFFUSION.items() if key != "schedule"},
    "_target_": "robopolicy.policies.flow.FlowPolicy",
    "sampler": {"_target_": "robopolicy.sampling.flow.FlowSampler", "num_inference_steps": 2},
}
QUICK = ("n_episodes=3", "n_observations=10", "n_samples=4")
LEVELS = [
    Restart(level=level, signal=bar**0.5, sigma=(1 - bar) ** 0.5, deterministic=False)
    for level, bar in enumerate(NoiseSchedule().alpha_bar[:80])
]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("off", [0.1, 0.5])
def test_an_error_is_what_fresh_chunks_do_not_have(off):
    fresh = 0.3 + 0.02 * randn(60, 12, 8, 2)
    same = 0.3 + 0.02 * randn(60, 8, 2, seed=1)
    assert excess(same, fresh, 0.9).max() < 0.015
    wrong = same + torch.tensor([off, 0.0])
    found = excess(wrong, fresh, 0.9)
    assert found[0] == pytest.approx(off, rel=0.1)
    assert found[1] < 0.03


def test_a_guess_in_either_mode_is_not_wrong():
    side = torch.where(torch.rand(60, 12, 1, 1, generator=torch.Generator().manual_seed(2)) < 0.5, -0.5, 0.5)
    fresh = side + 0.02 * randn(60, 12, 8, 2)
    guess = 0.5 + 0.02 * randn(60, 8, 2, seed=1)
    assert excess(guess, fresh, 0.9).max() < 0.03
    assert excess(guess - 0.5, fresh, 0.9).max() > 0.4  # between the modes


def test_modes_are_found_where_there_are_two_and_not_in_one():
    assert find_modes(0.02 * randn(40, 16, 8, 2)) == []
    side = torch.tensor([-0.5] * 12 + [0.5] * 4)[:, None, None]
    found = find_modes(side + 0.02 * randn(40, 16, 8, 2))
    assert len(found) == 40
    half_gap, spread, share = found[0]
    assert half_gap == pytest.approx(0.5 * 16**0.5, rel=0.05)  # a chunk has 16 numbers
    assert spread < 0.05
    assert share == 0.25


def test_the_least_noise_that_covers_and_forgets_is_chosen():
    error, rules = torch.tensor([0.2, 0.05]), Rules(tolerance=0.05)
    narrow, _ = choose(LEVELS, error, torch.zeros(2), [], rules)
    assert narrow.noise >= 0.2 > LEVELS[int(narrow.level) - 1].noise
    broad, why = choose(LEVELS, error, torch.tensor([0.3, 0.3]), [], rules)
    assert remaining(broad, error, torch.tensor([0.3, 0.3])) <= 0.05
    below = LEVELS[int(broad.level) - 1]
    assert remaining(below, error, torch.tensor([0.3, 0.3])) > 0.05
    assert broad.noise > narrow.noise
    assert "covering alone" in why


def test_two_modes_limit_the_noise():
    modes, rules = [(0.5, 0.02, 0.5)], Rules(tolerance=0.05)
    free, _ = choose(LEVELS, torch.tensor([0.6]), torch.zeros(1), [], rules)
    kept, why = choose(LEVELS, torch.tensor([0.6]), torch.zeros(1), modes, rules)
    assert switches(free, modes) > rules.most_switches >= switches(kept, modes)
    assert switches(LEVELS[int(kept.level) + 1], modes) > rules.most_switches
    assert "two modes would change" in why


def test_lists_end_at_zero_and_are_denser_there():
    assert spaced(20, 4) == (20, 11, 4, 0)
    assert spaced(2, 5) == (2, 1, 0)
    assert spaced(0, 3) == (0,)
    assert spaced(7, 1) == (7, 0)


def save(folder, config):
    torch.manual_seed(0)
    policy = build_policy(config, point_spec())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    policy.norm.fit({name: (-torch.ones(2), torch.ones(2)) for name in ("proprio", "action")})
    return checkpoint.save(folder, step=1, policy=policy, config={"policy": config, "data": {}, "train": {}})


@pytest.fixture
def step(tmp_path, monkeypatch):
    monkeypatch.setattr("robopolicy.app.export.build_env", lambda loaded, num_envs: PointEnv(num_envs))
    return save(tmp_path / "run", DIFFUSION)


def planner(step, name="rti", *words):
    loaded = checkpoint.load(step, build_policy)
    return build_planner(compose("eval", [f"planner={name}", *words]).planner, loaded.policy, 1, loaded.path)


def test_what_is_calibrated_is_used_by_the_planner(cli, step):
    with pytest.raises(RobopolicyError, match=f"level {UNCALIBRATED['timesteps'][0]} lies beyond"):
        planner(step)  # what there is without calibration is for schedules of a hundred levels
    done = cli("calibrate", f"checkpoint={step}", *QUICK, "--json")
    assert done.code == 0, done.err
    found = json.loads((step / "calibration.json").read_text())
    assert json.loads(done.out)["warm_start"] == found["warm_start"]
    levels = found["warm_start"]["timesteps"]
    assert levels[-1] == 0
    assert list(planner(step).warm_start.timesteps) == levels
    assert list(planner(step, "rti", "planner.warm_start.timesteps=[9,0]").warm_start.timesteps) == [9, 0]
    assert (step / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert [row["lag"] for row in found["lags"]] == [0, 1, 2, 4]
    assert [row["name"] for row in found["dimensions"]] == ["x", "y"]
    assert found["why"] in " ".join(done.err.split())
    again = cli("calibrate", f"checkpoint={step}", *QUICK)
    assert again.code == 0, again.err
    assert json.loads((step / "calibration.json").read_text()) == found  # the old one does not decide, nor does chance


def test_a_calibration_of_other_weights_is_refused(cli, step, tmp_path):
    other = tmp_path / "looked"
    assert cli("calibrate", f"checkpoint={step}", f"out={other}", *QUICK).code == 0
    assert not (step / "calibration.json").exists()
    assert planner(step, "rti", "planner.warm_start.timesteps=[9,0]").warm_start.num_calls == 2
    found = json.loads((other / "calibration.json").read_text())
    (step / "calibration.json").write_text(json.dumps({**found, "weights_sha256": "0" * 64}))
    with pytest.raises(RobopolicyError, match="made for other weights"):
        planner(step)
    assert planner(step, "rti", "planner.warm_start.timesteps=[9,0]") is not None
    (step / "calibration.json").write_text("{")
    with pytest.raises(RobopolicyError, match="cannot be read"):
        planner(step)


def test_a_flow_is_calibrated_too(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("robopolicy.app.export.build_env", lambda loaded, num_envs: PointEnv(num_envs))
    step = save(tmp_path / "flow", FLOW)
    done = cli("calibrate", f"checkpoint={step}", "planner=rti_flow", *QUICK)
    assert done.code == 0, done.err
    found = json.loads((step / "calibration.json").read_text())["warm_start"]
    used = planner(step, "rti_flow").warm_start
    assert {"tau": used.tau, "num_inference_steps": used.num_inference_steps} == found


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("tolerance=5", "tolerance must be a number between 0 and 2; got 5"),
        ("n_samples=1", "n_samples must be a whole number, at least 4; got 1"),
        ("planner=fresh", "planner=rti calibrates a diffusion policy"),
        ("planner.warm_start.start=raw", "renoise can be calibrated"),
        ("planner=rti_flow", "FlowWarmStart"),
    ],
)
def test_what_cannot_be_calibrated_is_said(cli, step, word, message):
    done = cli("calibrate", f"checkpoint={step}", word)
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert not (step / "calibration.json").exists()
