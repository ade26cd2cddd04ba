"""Laws of the contract: windows, specifications, shape checks."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from fakes import fake_batch, fake_spec

from robopolicy.errors import ShapeError, SpecMismatchError, UnknownNameError
from robopolicy.types import ActionSpec, TaskSpec, check_shape


@pytest.mark.parametrize("camera", [False, True])
def test_task_spec_survives_json(camera):
    spec = fake_spec(camera=camera)
    back = TaskSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert back == spec
    assert back.differences(spec) == []
    assert back.observation["proprio"].is_image is False
    assert all(m.is_image == n.startswith("rgb.") for n, m in back.observation.items())


def test_differences_name_what_differs():
    spec = fake_spec()
    low = (-2.0, *spec.action.low[1:])
    other = dataclasses.replace(spec, action=dataclasses.replace(spec.action, low=low), robot="xarm")
    assert spec.differences(other) == [
        "robot: fake against xarm",
        "action.low: [-1.0, -1.0, -1.0, -0.5] against [-2.0, -1.0, -1.0, -0.5]",
    ]
    with pytest.raises(SpecMismatchError, match="checkpoint does not fit environment:\n  - robot: fake against xarm"):
        spec.require_same(other, mine="checkpoint", theirs="environment")


def test_a_missing_modality_is_a_difference():
    found = fake_spec(camera=True).differences(fake_spec())
    assert any(line.startswith("observation.rgb.base.shape") and "absent" in line for line in found)


def test_instruction_length_and_name_are_free():
    spec = fake_spec()
    spec.require_same(
        dataclasses.replace(spec, instruction="Other.", max_episode_steps=5, name="other"), mine="a", theirs="b"
    )


def test_action_spec_needs_one_entry_per_name():
    fields = dataclasses.asdict(fake_spec().action)
    with pytest.raises(ValueError, match=r"ActionSpec.delta must have one entry per name \(4: x0, x1, x2, gripper\)"):
        ActionSpec(**{**fields, "delta": (True,)})


def test_take_selects_rows():
    obs = fake_batch(fake_spec(camera=True), 5, 2, 8).obs
    by_mask = obs.take(torch.tensor([False, True, False, False, True]))
    by_index = obs.take(torch.tensor([1, 4]))
    assert by_mask.batch_size == 2
    for name, value in obs.modalities.items():
        assert torch.equal(by_mask.modalities[name], value[[1, 4]])
        assert torch.equal(by_index.modalities[name], value[[1, 4]])


def test_batches_move_whole():
    batch = fake_batch(fake_spec(camera=True), 2, 2, 8).to("meta")
    assert {batch.action.device.type, batch.is_pad.device.type} == {"meta"}
    assert {value.device.type for value in batch.obs.modalities.values()} == {"meta"}


def test_check_shape():
    check_shape("action", torch.zeros(3, 16, 7), "B H A", H=16, A=7)
    for wrong in (torch.zeros(3, 16, 6), torch.zeros(16, 7), torch.zeros(3, 16, 7, 1)):
        with pytest.raises(ShapeError, match=r"action must be \[B, H=16, A=7\], got \("):
            check_shape("action", wrong, "B H A", H=16, A=7)


def test_unknown_names_get_a_suggestion():
    error = UnknownNameError("task", "pick_cub", ["pick_cube", "push_t"])
    assert str(error) == "Unknown task 'pick_cub'. Did you mean 'pick_cube'? Known: pick_cube, push_t."
    assert "Did you mean" not in str(UnknownNameError("task", "zzz", ["pick_cube"]))
