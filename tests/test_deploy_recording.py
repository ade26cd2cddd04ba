"""Laws of recording: what is read is what was written, also from a file cut short; a replay gives the same actions."""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import fake_spec
from mcap.reader import make_reader
from mcap_ros2.decoder import DecoderFactory

from robopolicy.deploy import recording as module
from robopolicy.deploy.contract import Plan, Tick
from robopolicy.deploy.recording import McapRecorder, read_recording
from robopolicy.deploy.replay import replay
from robopolicy.errors import RobopolicyError
from robopolicy.rng import Rng, randn
from robopolicy.timing import ChunkTiming
from robopolicy.types import Observation

JOINTS = ("shoulder", "elbow")


def tick(index: int, **changes: Any) -> Tick:
    position = np.array([index / 7, -1.5])
    plain = Tick(
        time_s=time.monotonic(),
        index=index,
        late_s=1e-4,
        work_s=2e-4,
        phase="moving",
        measured=position,
        state_age_s=0.01,
        wanted=position + 0.1,
        sent=position + 0.05,
        sent_velocity=position * 2,
        gripper=0.08,
        action=np.array([0.5, -0.25]),
        clamped=5,
        rejected="",
    )
    return dataclasses.replace(plain, **changes)


def plan(planner: Any, generator: torch.Generator, shift: int) -> Plan:
    """A plan as the runner records it: the noise's state first."""
    state = generator.get_state().numpy().tobytes()
    values = {
        "proprio": np.random.default_rng(shift).normal(size=(2, 3)).astype(np.float32),
        "rgb.base": np.random.default_rng(shift).integers(0, 255, (2, 3, 4, 5), dtype=np.uint8),
    }
    obs = Observation(modalities={name: torch.from_numpy(value)[None] for name, value in values.items()})
    if shift == 0:
        planner.reset(None)
    chunk = planner(obs, torch.zeros(1, dtype=torch.int64), shift=torch.tensor([shift]), generator=generator)
    return Plan(
        time_s=time.monotonic(),
        observed_s=time.monotonic() - 0.02,
        inference_s=0.004,
        spread_s=0.001,
        observation=values,
        chunk=chunk[0].numpy(),
        shift=shift,
        generator_state=state,
    )


class Wanderer:
    """A planner with a past: each chunk is noise, what it sees, and the chunk before."""

    def __init__(self) -> None:
        self.spec, self.timing = fake_spec(), ChunkTiming(horizon=4, n_action_steps=2)
        self.hysteresis = 0.0
        self.diagnostics: dict[str, torch.Tensor] = {}
        self.reset()

    def __call__(self, obs: Observation, rows: torch.Tensor, *, shift: torch.Tensor, generator: Rng = None) -> Any:
        noise = randn(1, self.timing.horizon, self.spec.action.dim, generator=generator)
        self.past = 0.5 * self.past + noise + obs.modalities["proprio"].mean() + shift
        return self.past.clone()

    def reset(self, rows: torch.Tensor | None = None) -> None:
        self.past = torch.zeros(1, 1, 1)


def record(path: Path, ticks: int = 50) -> list[Plan]:
    planner, generator = Wanderer(), torch.Generator().manual_seed(3)
    with McapRecorder(path, joints=JOINTS, about={"checkpoint": "zoo", "limits": [1.5, 2]}) as recorder:
        recorder.event("start", "mode live", mode="live")
        plans = [plan(planner, generator, shift) for shift in (0, 8, 8, 0, 1)]
        for i in range(ticks):
            recorder.tick(tick(i, gripper=None, rejected="too far") if i == 7 else tick(i))
        for one in plans:
            recorder.plan(one)
    assert recorder.dropped == 0
    return plans


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    plans = record(tmp_path / "a.mcap")
    read = read_recording(tmp_path / "a.mcap")
    assert read.complete
    assert read.about == {"checkpoint": "zoo", "limits": [1.5, 2]}
    assert [event["text"] for event in read.events] == ["mode live"]
    assert [row["index"] for row in read.ticks] == list(range(50))
    assert read.ticks[7]["rejected"] == "too far"
    assert np.isnan(read.ticks[7]["gripper_m"])
    assert read.ticks[8]["gripper_m"] == 0.08
    assert np.array_equal(read.ticks[9]["sent"], tick(9).sent)
    for mine, theirs in zip(plans, read.plans, strict=True):
        assert (mine.shift, mine.generator_state, mine.time_s) == (theirs.shift, theirs.generator_state, theirs.time_s)
        assert np.array_equal(mine.chunk, theirs.chunk)
        for name, value in mine.observation.items():
            assert np.array_equal(value, theirs.observation[name])


def test_ros_tools_read_it_as_ros_messages(tmp_path: Path) -> None:
    record(tmp_path / "a.mcap")
    with (tmp_path / "a.mcap").open("rb") as file:
        reader = make_reader(file, decoder_factories=[DecoderFactory()])
        assert reader.get_header().profile == "ros2"
        seen = {}
        for schema, channel, message, ros in reader.iter_decoded_messages():
            assert schema is not None
            seen[channel.topic] = (schema.name, ros)
            assert abs(message.log_time / 1e9 - time.time()) < 60
    name, state = seen["/robopolicy/sent"]
    assert name == "sensor_msgs/msg/JointState"
    assert list(state.name) == list(JOINTS)
    assert abs(state.header.stamp.sec - time.time()) < 60
    name, picture = seen["/robopolicy/rgb/base"]
    assert (name, picture.encoding, picture.height, picture.width) == ("sensor_msgs/msg/Image", "rgb8", 4, 5)


def test_a_file_cut_short_gives_what_was_written_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.05)
    path = tmp_path / "a.mcap"
    recorder = McapRecorder(path, joints=JOINTS, about={})
    for i in range(20):
        recorder.tick(tick(i))
    deadline = time.monotonic() + 60
    while len(read_recording(path).ticks) < 20:  # on the disk although nobody closed the file
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not read_recording(path).complete
    recorder.close()
    whole = path.read_bytes()
    for length in np.random.default_rng(0).integers(200, len(whole), 40):
        path.write_bytes(whole[:length])
        try:
            assert len(read_recording(path).ticks) <= 20
        except RobopolicyError as error:  # cut before the metadata
            assert "recording" in str(error) or "recorded" in str(error)  # noqa: PT017


def test_a_replay_gives_the_same_actions_and_another_policy_does_not(tmp_path: Path) -> None:
    record(tmp_path / "a.mcap")
    read = read_recording(tmp_path / "a.mcap")
    same = replay(read, Wanderer())
    assert (same.num_plans, same.num_equal, same.max_difference) == (5, 5, 0.0)

    class Another(Wanderer):
        def reset(self, rows: torch.Tensor | None = None) -> None:
            self.past = torch.full((1, 1, 1), 0.25)

    other = replay(read, Another())
    assert other.num_equal == 0
    assert 0.1 < other.max_difference < 0.3


def test_a_slow_disk_drops_records_and_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUE_RECORDS", 10)
    recorder = McapRecorder(tmp_path / "a.mcap", joints=JOINTS, about={})
    stuck = threading.Event()
    recorder._put(lambda: (stuck.wait(120), None)[1])
    for i in range(200):  # would wait for two minutes if it waited at all
        recorder.tick(tick(i))
    assert recorder.dropped >= 189
    stuck.set()
    recorder.close()
    assert len(read_recording(recorder.path).ticks) == 200 - recorder.dropped


def test_the_size_is_bounded_and_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    recorder = McapRecorder(path, joints=JOINTS, about={}, max_bytes=1)
    for i in range(5):
        recorder.tick(tick(i))
    recorder.close()
    assert recorder.dropped == 5
    with pytest.raises(RobopolicyError, match="never overwrites"):
        McapRecorder(path, joints=JOINTS, about={})


@pytest.mark.parametrize("content", [b"", b"not a recording at all", b"\x89MCAP0\r\n"])
def test_what_is_no_recording_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.mcap"
    path.write_bytes(content)
    with pytest.raises(RobopolicyError, match=r"x\.mcap"):
        read_recording(path)
    with pytest.raises(RobopolicyError, match=r"absent\.mcap"):
        read_recording(tmp_path / "absent.mcap")
