"""Errors say what would work, and cross process borders whole."""

from __future__ import annotations

import pickle

import pytest

from robopolicy.errors import CheckpointError, RobopolicyError, SpecMismatchError, UnknownNameError


def test_an_unknown_name_gets_the_nearest_one_and_the_list() -> None:
    error = UnknownNameError("task", "pick_cub", ["push_cube", "pick_cube"])
    assert str(error) == "Unknown task 'pick_cub'. Did you mean 'pick_cube'? Known: pick_cube, push_cube."
    assert str(UnknownNameError("task", "zzz", ["pick_cube"])) == "Unknown task 'zzz'. Known: pick_cube."
    assert str(UnknownNameError("task", "zzz", [])) == "Unknown task 'zzz'. Known: none."


@pytest.mark.parametrize(
    "error",
    [
        RobopolicyError("plain"),
        CheckpointError("lost"),
        UnknownNameError("task", "pick_cub", ["pick_cube"]),
        SpecMismatchError("left", "right", ["a: 1 against 2"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error: RobopolicyError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
