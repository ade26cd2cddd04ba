"""Contracts over every published checkpoint: it loads, acts as it did when it was published, and has a card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from robopolicy.app.build import build_policy
from robopolicy.training import checkpoint
from robopolicy.types import Observation

ZOO = Path(__file__).parents[1] / "checkpoints" / "zoo"
GOLDEN = Path(__file__).parent / "goldens" / "zoo.json"
NAMES = sorted(path.parent.name for path in ZOO.glob("*/policy.json"))


def first_action(name: str) -> list[float]:
    """Return the action that the policy takes first in the middle of everything it was trained to observe."""
    loaded = checkpoint.load(ZOO / name, build_policy)
    steps = loaded.policy.timing.n_obs_steps
    middle = {
        key: loaded.policy.norm.decode(key, torch.zeros(1, steps, *m.shape))
        for key, m in loaded.spec.observation.items()
        if not m.is_image
    }
    chunk = loaded.policy.act(Observation(modalities=middle), generator=torch.Generator().manual_seed(0))
    return [round(value, 4) for value in chunk[0, loaded.policy.timing.now].tolist()]


@pytest.mark.parametrize("name", NAMES)
def test_a_published_policy_acts_as_when_it_was_published(name: str) -> None:
    """A change of a network's meaning that keeps the shapes of its weights would otherwise go unseen."""
    wanted = json.loads(GOLDEN.read_text())[name]
    torch.testing.assert_close(torch.tensor(first_action(name)), torch.tensor(wanted), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_published_policy_is_small_and_says_what_it_is(name: str) -> None:
    assert (ZOO / name / "model.safetensors").stat().st_size < 5_000_000
    card = (ZOO / name / "README.md").read_text()
    assert "95 % interval" in card
    assert "`robopolicy train" in card


def test_there_is_a_published_policy() -> None:
    assert NAMES
    assert set(NAMES) == set(json.loads(GOLDEN.read_text()))
