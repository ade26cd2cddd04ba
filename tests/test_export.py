"""The verbs export and bench latency, on a point mass that needs no simulator."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from point_task import PointEnv, point_spec

from robopolicy.app.build import build_policy
from robopolicy.errors import RobopolicyError
from robopolicy.rng import NoiseTape
from robopolicy.training import checkpoint
from robopolicy.types import Observation

onnxruntime = pytest.importorskip("onnxruntime")

POLICY = {
    "_target_": "robopolicy.policies.diffusion.DiffusionPolicy",
    "timing": {"_target_": "robopolicy.timing.ChunkTiming", "n_obs_steps": 2, "horizon": 8, "n_action_steps": 4},
    "network": {"_target_": "robopolicy.nn.mlp.ChunkMLP", "_partial_": True, "width": 16, "depth": 1, "cond_width": 8},
    "encoder": {"_target_": "robopolicy.nn.encoder.ObservationEncoder", "_partial_": True},
    "schedule": {"_target_": "robopolicy.sampling.schedule.NoiseSchedule"},
    "sampler": {"_target_": "robopolicy.sampling.samplers.DDIMSampler", "num_inference_steps": 2},
    "prediction": "sample",
}


@pytest.fixture
def step(tmp_path, monkeypatch):
    """Return a step folder whose policy knows nothing, and put the point mass in place of the simulator."""
    torch.manual_seed(0)
    policy = build_policy(POLICY, point_spec())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    policy.norm.fit({name: (-torch.ones(2), torch.ones(2)) for name in ("proprio", "action")})
    for module in ("export", "bench_latency"):
        monkeypatch.setattr(f"robopolicy.app.{module}.build_env", lambda loaded, num_envs: PointEnv(num_envs))
    return checkpoint.save(tmp_path / "run", step=1, policy=policy, config={"policy": POLICY, "data": {}, "train": {}})


def test_the_files_alone_act_as_the_policy(cli, step):
    done = cli("export", f"checkpoint={step}", "planner=rti", "n_episodes=3", "n_observations=6", "--json")
    assert done.code == 0, done.err
    parity = json.loads(done.out)["parity"]
    assert parity["n_same"] == parity["n_episodes"] == 3
    assert parity["max_abs_error"] < 1e-5
    folder = step / "onnx"
    about = json.loads((folder / "export.json").read_text())
    assert [graph["file"] for graph in about["graphs"]] == ["model.onnx", "warm.onnx"]
    assert about["checkpoint"]["step"] == 1
    policy = checkpoint.load(step, build_policy).policy
    generator = torch.Generator().manual_seed(0)
    for graph in about["graphs"]:
        inputs = {i["name"]: torch.randn(i["shape"], generator=generator) / 3 for i in graph["inputs"]}
        session = onnxruntime.InferenceSession(folder / graph["file"])
        chunk, *_ = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        obs = Observation(modalities={"proprio": inputs["proprio"]})
        tape = NoiseTape(inputs["noise"])
        if "guess" in inputs:
            planner = build_rti(policy, step)
            wanted, _ = policy.refine(obs, inputs["guess"], warm_start=planner.warm_start, generator=tape)
        else:
            wanted = policy.act(obs, generator=tape)
        np.testing.assert_allclose(chunk, wanted.numpy(), atol=1e-5)


def build_rti(policy, folder):
    from robopolicy.app import composing
    from robopolicy.app.build import build_planner

    return build_planner(composing.compose("bench", []).planner, policy, 1, folder)


def test_nothing_is_written_when_parity_fails(cli, step):
    done = cli("export", f"checkpoint={step}", "n_episodes=2", "tolerance=-1")
    assert done.code == 2
    assert "differ from the policy by" in done.err
    assert "nothing was written" in done.err
    assert not (step / "onnx").exists()


def test_other_outcomes_are_refused(cli, step, monkeypatch):
    """A graph that is right on recorded observations may still be wrong on those that it leads to."""
    from robopolicy.app import export
    from robopolicy.evaluation import rollout

    def evaluate(actor, env, *, seeds, **more):
        result = rollout_evaluate(actor, env, seeds=seeds, **more)
        if isinstance(actor._planner._policy, export.Recorder):
            return result
        other = dataclasses.replace(result.episodes[0], success_once=not result.episodes[0].success_once)
        return dataclasses.replace(result, episodes=(other, *result.episodes[1:]))

    rollout_evaluate = rollout.evaluate
    monkeypatch.setattr(rollout, "evaluate", evaluate)
    done = cli("export", f"checkpoint={step}", "n_episodes=3", "n_observations=3")
    assert done.code == 2
    assert "1 of 3 episodes end otherwise with the graphs (seeds 20000)" in done.err
    assert cli("export", f"checkpoint={step}", "n_episodes=3", "n_observations=3", "most_different=1").code == 0


def test_a_folder_of_something_else_is_left_alone(cli, step, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    done = cli("export", f"checkpoint={step}", f"out={tmp_path / 'mine'}")
    assert done.code == 2
    assert "is no export" in done.err
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"


def test_a_chain_too_long_for_one_graph_is_said(cli, step):
    done = cli("export", f"checkpoint={step}", "n_episodes=1", "max_unrolled=1")
    assert done.code == 2
    assert "more than max_unrolled=1 network calls" in done.err


def test_bench_latency_compares_with_bare_calls(cli, step, tmp_path):
    out = tmp_path / "latency"
    done = cli(
        "bench", "latency", f"checkpoint={step}", "engines=[eager,onnx]", "samplers=[ddim_2,rti_2]",
        "rounds=2", "ticks=3", "success_episodes=4", f"out={out}", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result == json.loads(out.with_suffix(".json").read_text())
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [(row["engine"], row["sampler"]) for row in result["rows"]] == [
        (engine, sampler) for engine in ("eager", "onnx") for sampler in ("ddim_2", "rti_2")
    ]
    for row in result["rows"]:
        assert row["n_ticks"] == 6
        assert 0 < row["policy_ms"] <= row["median_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["over_bare_calls"] >= row["policy_over_bare_calls"] > 0
        assert row["success"]["n_episodes"] == 4
        assert row["faster_than_ddpm_100"] is None
    assert [row["network_calls"] for row in result["rows"]] == [2, 2, 2, 2]


def test_adaptive_ticks_count_their_calls(cli, step):
    done = cli(
        "bench", "latency", f"checkpoint={step}", "engines=[eager]", "samplers=[rti_adaptive]", "rounds=1", "ticks=4",
        "accept_below=1e9", "resample_above=1e9", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows"][0]["network_calls"] == 1


def test_bench_times_more_calls_than_a_low_start_has_levels(cli, step):
    done = cli(
        "bench", "latency", f"checkpoint={step}", "engines=[eager]", "samplers=[rti_5]", "rounds=1", "ticks=3",
        "planner.warm_start.timesteps=[1,0]", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["rows"][0]["network_calls"] == 5


def test_bench_refuses_samplers_that_do_not_exist(cli, step):
    done = cli("bench", "latency", f"checkpoint={step}", "engines=[eager]", "samplers=[euler_3]")
    assert done.code == 2
    assert "Unknown sampler 'euler_3'" in done.err


def test_real_time_without_the_right_to_it_is_said(monkeypatch):
    import os

    from robopolicy.app.bench_latency import real_time

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse, raising=False)
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: 0, raising=False)
    monkeypatch.setattr(os, "sched_getparam", lambda _: None, raising=False)
    monkeypatch.setattr(os, "sched_param", lambda priority: priority, raising=False)
    monkeypatch.setattr(os, "SCHED_FIFO", 1, raising=False)
    with pytest.raises(RobopolicyError, match="needs the right to real-time scheduling"), real_time():
        pytest.fail("entered")
