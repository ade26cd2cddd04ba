"""Deployment without a sensor that the policy can do without: it goes on and says so; without another one it stops."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deploy_peers import StillArm, robot_data, until
from fakes import fit_to_bounds
from ideal_arm import REST, IdealArm, Memory, panda
from made_up_time import Stage
from scripted_planner import ScriptedPlanner, pick_cube_spec, stay
from torch import Tensor

from robopolicy.deploy.faults import Faults
from robopolicy.deploy.kinematics import CHAINS
from robopolicy.deploy.observations import Built, ObservationBuilder
from robopolicy.deploy.recording import McapRecorder, read_recording
from robopolicy.deploy.remote import RemoteRobot
from robopolicy.deploy.replay import replay
from robopolicy.deploy.robot import RobotFile
from robopolicy.deploy.session import Session
from robopolicy.deploy.sim_robot import SimRobot
from robopolicy.deploy.sim_server import RosbridgeServer
from robopolicy.policies.base import Policy
from robopolicy.policies.planners import FreshPlanner
from robopolicy.types import Observation

PICK = pick_cube_spec()
OBJECTS = frozenset({"objects"})
STREAMS = {"obj_pose": np.array([0.05, 0.01, 0.02, 1.0, 0.0, 0.0, 0.0]), "goal_pos": np.array([0.1, 0.0, 0.2])}


def built_from(arm: IdealArm, make: ObservationBuilder, until_s: float) -> Built | str:
    """Let the arm measure every 10 ms from where it stopped until `until_s`."""
    state = arm.state()
    now_s = 99.99 if state is None else state.arrival_s
    while now_s < until_s - 1e-9:
        now_s += 0.01
        arm.streams["obj_pose"] = np.r_[now_s, STREAMS["obj_pose"][1:]]
        arm.publish(now_s)
        made = arm.state()
        assert made is not None
        make.clock.note(made.stamp_s, made.arrival_s)
    return make(arm)


@pytest.fixture
def make() -> ObservationBuilder:
    return ObservationBuilder(PICK, panda(), CHAINS["panda"], n_obs_steps=2, period_s=0.05, optional=OBJECTS)


def test_a_silent_optional_stream_is_waited_for_then_left_out_then_taken_back(make: ObservationBuilder) -> None:
    arm = IdealArm(streams=STREAMS)
    make.start(99.0)
    built = built_from(arm, make, 100.2)
    assert isinstance(built, Built)
    assert (built.missing, set(built.arrays)) == ((), {"proprio", "objects", "goal"})
    arm.mute = {"obj_pose"}
    waits = built_from(arm, make, 100.25)
    assert isinstance(waits, Built)
    assert (waits.missing, waits.time_s) == ((), pytest.approx(100.2))  # so far it may just be late
    without = built_from(arm, make, 100.4)
    assert isinstance(without, Built)
    assert (without.missing, set(without.arrays)) == (("objects",), {"proprio", "goal"})
    assert without.time_s == pytest.approx(100.4)
    assert without.spread_s == 0.0
    arm.mute = set()
    again = built_from(arm, make, 100.41)
    assert isinstance(again, Built)
    assert again.missing == ()
    np.testing.assert_allclose(again.arrays["objects"][:, 1], 100.41, atol=1e-4)  # nothing from before the silence


def test_at_the_start_an_optional_stream_gets_the_time_to_speak(make: ObservationBuilder) -> None:
    arm = IdealArm(streams=STREAMS)
    arm.mute = {"obj_pose"}
    make.start(100.0)
    assert "nothing yet on stream 'obj_pose'" in str(built_from(arm, make, 100.05))
    built = built_from(arm, make, 100.15)
    assert isinstance(built, Built)
    assert built.missing == ("objects",)


def test_a_stream_that_a_required_modality_needs_is_required() -> None:
    both = dataclasses.replace(
        PICK,
        observation={
            **PICK.observation,
            "proprio": dataclasses.replace(
                PICK.observation["proprio"],
                shape=(32,),
                fields={**PICK.observation["proprio"].fields, "extra/obj_pose": 7},
            ),
        },
    )
    make = ObservationBuilder(both, panda(), CHAINS["panda"], n_obs_steps=2, period_s=0.05, optional=OBJECTS)
    assert make.required == {"obj_pose", "goal_pos"}


@pytest.fixture(scope="module")
def factorised() -> Policy:
    """A small factorised policy of PickCube with the weights it was born with."""
    from robopolicy.app import composing
    from robopolicy.app.build import build_policy

    small = ["policy=fdp", "policy.network.network.width=16", "policy.network.network.depth=1"]
    cfg = composing.compose("train", [*small, "policy.sampler.num_inference_steps=2"])
    torch.manual_seed(0)
    policy = build_policy(cfg.policy, PICK).eval()
    fit_to_bounds(policy.norm, PICK)
    return policy


def test_a_factorised_policy_goes_on_without_its_objects_and_it_is_said_everywhere(
    monkeypatch: pytest.MonkeyPatch, factorised: Policy, tmp_path: Path
) -> None:
    planner: Any = FreshPlanner(factorised)
    # small steps: what weights of chance would do is no matter
    monkeypatch.setattr(factorised, "clip", lambda action: (0.01 * action).clamp(-1, 1))
    recorder = McapRecorder(tmp_path / "a.mcap", joints=panda().joints, about={})
    on = Stage(monkeypatch, planner, streams=STREAMS, optional=factorised.optional)
    on.session.add_recorder(recorder)
    on.begin()
    on.run(lambda: on.session.runner.plans >= 5)
    assert on.session.snapshot()["missing"] == ""
    on.arm.mute = {"obj_pose"}
    on.run_for(1.0)
    assert not on.session.stopped.is_set()
    now = on.session.snapshot()
    assert (now["phase"], now["missing"]) == ("moving", "objects")
    assert now["diagnostics"]["missing_objects"] == 1.0
    lacking = on.session.runner.without["objects"]
    assert lacking >= 15
    on.arm.mute = set()
    on.run_for(0.3)
    assert on.session.snapshot()["missing"] == ""
    assert [text for kind, text in on.memory.events if kind == "warning"] == [
        "plans without objects",
        "objects is there again",
    ]
    summary = on.session.summary()
    assert summary["plans_without"] == {"objects": lacking}
    assert summary["diagnostics"]["missing_objects"]["max"] == 1.0
    recorder.close()
    read = read_recording(tmp_path / "a.mcap")
    assert sum(plan.missing == ("objects",) for plan in read.plans) == lacking
    assert all(plan.diagnostics["missing_objects"] == float("objects" in plan.missing) for plan in read.plans)
    again = replay(read, planner)
    assert (again.num_equal, again.num_plans) == (len(read.plans), on.session.runner.plans)


@pytest.mark.parametrize(("optional", "silent"), [(frozenset(), "obj_pose"), (frozenset({"goal"}), "obj_pose")])
def test_without_a_required_stream_the_arm_stops(
    monkeypatch: pytest.MonkeyPatch, optional: frozenset[str], silent: str
) -> None:
    on = Stage(monkeypatch, ScriptedPlanner(PICK, stay(PICK)), streams=STREAMS, optional=optional)
    on.begin()
    on.run(lambda: on.session.runner.plans >= 3)
    on.arm.mute = {silent}
    assert on.run(on.session.stopped.is_set) < 0.35
    assert silent in on.session.stop_reason


def test_a_camera_that_the_policy_can_do_without_never_blocks_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    on = Stage(monkeypatch, ScriptedPlanner(PICK, stay(PICK)), streams=STREAMS, optional=OBJECTS)
    on.arm.mute = {"obj_pose"}
    on.arm._samples["obj_pose"].clear()
    on.begin()
    on.run(lambda: on.session.runner.plans >= 3)
    assert {plan.missing for plan in on.memory.plans} == {("objects",)}


def test_streams_of_the_simulated_robot_fall_silent_and_freeze() -> None:
    data = robot_data()
    data["watchdogs"]["spread_s"] = 0.2
    file, faults = RobotFile.from_dict(data), Faults()
    server = RosbridgeServer(faults=faults)
    arm, memory = SimRobot(StillArm(), file, server), Memory()
    seen: list[float] = []

    def say(obs: Observation, call: int) -> Tensor:
        if "objects" in obs.modalities:
            seen.append(float(obs.modalities["objects"][0, -1, 2]))  # y of the object
        return stay(PICK)(obs, call)

    server.start()
    arm.start()
    robot = RemoteRobot(file, url=server.url, streams=["obj_pose", "goal_pos"])
    session = Session(robot, file, ScriptedPlanner(PICK, say), optional=OBJECTS, recorders=[memory])
    try:
        robot.connect(30.0)
        session.open()
        assert session.begin_within(30.0) == ""
        until(lambda: any(plan.missing == () for plan in memory.plans))
        faults.set("silent_stream", "obj_pose")
        until(lambda: session.runner.missing == ("objects",))
        count = session.runner.without["objects"]
        until(lambda: session.runner.without["objects"] > count + 5)
        faults.set("silent_stream", "")
        until(lambda: session.runner.missing == ())
        faults.set("frozen_stream", "obj_pose")
        arm.sim._object = arm.sim._object + np.eye(7)[1]  # type: ignore[attr-defined]
        plans = session.runner.plans
        until(lambda: session.runner.plans > plans + 10)
        assert seen[-1] == pytest.approx(0.1)  # where it was, though fresh by its stamp
        faults.set("frozen_stream", "")
        until(lambda: seen[-1] == pytest.approx(1.1))
        assert session.stop_reason == ""
        assert np.abs(arm.sim.position()[:7] - REST).max() < 3.0
    finally:
        session.close()
        robot.close()
        arm.close()
        server.close()
