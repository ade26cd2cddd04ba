"""What `robopolicy deploy` says to mistakes: a sentence with what is wrong and what would work; nothing moves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished
from deploy_peers import PATIENT_WORDS, StillArm, robot_data
from ideal_arm import PANDA

from robopolicy.deploy.faults import Faults
from robopolicy.deploy.robot import RobotFile
from robopolicy.deploy.sim_robot import SimRobot
from robopolicy.deploy.sim_server import RosbridgeServer

ZOO = Path(__file__).parents[1] / "checkpoints" / "zoo" / "pick_cube-diffusion"
Cli = Callable[..., Finished]


@pytest.fixture(autouse=True)
def listen_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """`check` need not listen for its two seconds to hear a robot in this process."""
    monkeypatch.setattr("robopolicy.app.deploy.CHECK_S", 1.0)
    monkeypatch.setattr("robopolicy.deploy.remote.FIRST_STATE_S", 0.5)


@pytest.fixture
def bridge() -> Iterator[Callable[..., SimRobot]]:
    """Return a function that starts an arm without physics behind a bridge in this process."""
    started: list[SimRobot] = []

    def start(**faults: Any) -> SimRobot:
        planted = Faults()
        for name, value in faults.items():
            planted.set(name, value)
        server = RosbridgeServer(port=0, faults=planted)
        arm = SimRobot(StillArm(), RobotFile.from_dict(robot_data()), server)
        server.start()
        arm.start()
        started.append(arm)
        return arm

    yield start
    for arm in started:
        arm.close()
        arm.server.close()


def words(arm: SimRobot, *more: str) -> list[str]:
    given = ["bridge.timeout_s=60", "robot.joint_states.rate_hz=20", *PATIENT_WORDS]
    return ["deploy", f"checkpoint={ZOO}", f"bridge.url={arm.server.url}", *given, *more]


@contextlib.contextmanager
def leaving_when(arm: SimRobot, enough: Callable[[dict[str, Any]], bool]) -> Iterator[None]:
    """Press Ctrl-C as soon as the heartbeat of the deployment that runs meanwhile says what is waited for."""
    pressed = threading.Event()

    def heard(message: Any) -> None:
        if not pressed.is_set() and enough(json.loads(message["data"])):
            pressed.set()
            os.kill(os.getpid(), signal.SIGINT)

    arm.server.listen("/robopolicy/status", "std_msgs/String", heard)
    yield
    assert pressed.is_set()


def test_help_shows_examples_and_every_setting(cli: Cli) -> None:
    done = cli("deploy", "--help")
    assert done.code == 0
    for shown in ("mode=live episodes=20", "checkpoint: ???", "bridge:", "speed: 1.0", "robot=panda"):
        assert shown in done.out


def test_a_checkpoint_that_fits_is_checked_without_motion(cli: Cli, bridge: Callable[..., SimRobot]) -> None:
    arm = bridge()
    done = cli(*words(arm), "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said["ok"]
    assert said["problems"] == []
    assert {stream["name"] for stream in said["streams"]} >= {"joints", "obj_pose", "goal_pos", "command"}
    assert said["robot"]["safety"]["jump_rad"] == 1.0
    assert not arm.arm.accepted


@pytest.mark.parametrize(
    ("faults", "problem"),
    [({"missing_joint": "panda_joint4"}, "panda_joint4"), ({"silent": True}, "joints:")],
)
def test_check_names_what_is_missing(
    cli: Cli, bridge: Callable[..., SimRobot], faults: dict[str, Any], problem: str
) -> None:
    done = cli(*words(bridge(**faults)), "--json")
    assert done.code == 1
    assert problem in " ".join(json.loads(done.out)["problems"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("robot.streams.obj_pose.topic=/nowhere", "/nowhere"),
        ("robot.joint_states.topics=[/joint_statez]", "/joint_statez"),
        ("robot.joint_states.rate_hz=1000", "Hz"),
    ],
)
def test_check_finds_wrong_topics_and_rates(
    cli: Cli, bridge: Callable[..., SimRobot], change: str, problem: str
) -> None:
    done = cli(*words(bridge(), change), "--json")
    assert done.code == 1
    assert problem in " ".join(json.loads(done.out)["problems"])


def test_mistakes_are_sentences(cli: Cli) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        closed = f"ws://127.0.0.1:{taken.getsockname()[1]}"
        for given, expected in (
            (["bridge.url=http://127.0.0.1:9090"], "ws://"),
            ([f"bridge.url={closed}", "bridge.timeout_s=0.5"], "bridge"),
            (["mode=lve"], "Did you mean 'live'?"),
            (["mode=live"], "arm=now"),
            (["mode=step"], "there is no terminal"),
            (["episodes=5"], "needs mode=live"),
            (["mode=live", "arm=now", "episodes=5", "bridge.url=ws://10.0.0.1:9090"], "simulated robot"),
            (
                ["robot.command.interface=forward_position", "robot.command.timeout_s=0", "mode=live", "arm=now"],
                "force",
            ),
            (["robot.command.rate_hz=30"], "rate: actions every 0.05 s need commands at 40 Hz or more"),
            (["robot.joints=[a,b]"], "limits.position_low must have one entry per joint (2); got 7"),
            (["+robot.safety.jump=1"], "Did you mean 'jump_rad'?"),
            (["robot.simulated_as=fetch"], "trained on 'panda', the file stands for 'fetch'"),
            (["checkpoint=nowhere"], "There is no checkpoint 'nowhere'"),
            (["replay=nowhere.mcap"], "nowhere.mcap"),
        ):
            done = cli("deploy", f"checkpoint={ZOO}", *given)
            assert done.code == 2, (given, done.err)
            assert expected in done.err, (given, done.err)
            assert "Traceback" not in done.err


def test_a_checkpoint_without_action_semantics_is_refused(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(ZOO, folder)
    config = json.loads((folder / "policy.json").read_text())
    for key in ("control_mode", "control_dt_s"):
        del config["task_spec"]["action"][key]
    (folder / "policy.json").write_text(json.dumps(config))
    done = cli("deploy", f"checkpoint={folder}")
    assert done.code == 2
    assert "no readable task_spec" in done.err
    assert "control_mode" in done.err


def test_shadow_moves_nothing_and_says_what_it_would_have(
    cli: Cli, bridge: Callable[..., SimRobot], empty_cwd: Path
) -> None:
    arm = bridge()
    with leaving_when(arm, lambda said: said["plans"] >= 5 and said["phase"] == "moving"):
        done = cli(*words(arm, "mode=shadow", "live=false"), "--json")
    said = json.loads(done.out)
    assert done.code == 0, done.err
    assert not arm.arm.accepted
    assert said["plans"] >= 5
    assert said["shadow_rad"]["max"] > 0.0
    assert said["effective"]["weights_sha256"]
    assert Path(said["recording"]).is_file()
    again = cli("deploy", f"checkpoint={ZOO}", f"replay={said['recording']}", "--json")
    assert again.code == 0
    assert json.loads(again.out)["num_equal"] == said["plans"]


def test_live_plays_and_leaves_the_arm_stopped(cli: Cli, bridge: Callable[..., SimRobot], empty_cwd: Path) -> None:
    arm = bridge()
    with leaving_when(arm, lambda said: said["plans"] >= 5 and len(arm.arm.accepted) > 20):
        done = cli(*words(arm, "mode=live", "arm=now", "live=false", "record=null"), "--json")
    said = json.loads(done.out)
    assert done.code == 0, done.err
    assert said["stop_reason"] == "SIGINT"
    assert arm.arm.accepted[-1].points == 1  # a trajectory to rest
    assert list(empty_cwd.iterdir()) == []


def test_a_time_ends_it_too(cli: Cli, bridge: Callable[..., SimRobot], empty_cwd: Path) -> None:
    arm = bridge()
    live = ["mode=live", "arm=now", "live=false", "record=null", "duration_s=0.5"]
    done = cli(*words(arm, *live), "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["stop_reason"] == ""
    assert [a for a in arm.arm.accepted if a.points == 1]


def test_every_robot_file_is_valid() -> None:
    import yaml

    files = sorted(PANDA.parent.glob("*.yaml"))
    assert files
    for path in files:
        assert RobotFile.from_dict(yaml.safe_load(path.read_text())).name == path.stem
