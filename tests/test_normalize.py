"""Laws of the normaliser: it inverts, it fills [-1, 1], and constant dimensions do no harm."""

from __future__ import annotations

import pytest
import torch
from fakes import fake_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from robopolicy.errors import RobopolicyError
from robopolicy.normalize import CONSTANT_BELOW, Normalizer

SPEC = fake_spec(camera=True, action_dim=2, proprio=3, objects=1)
NUMBER = st.floats(-50, 50, width=32)
RANGE = st.tuples(NUMBER, st.floats(2**-7, 100, width=32))


def fitted(*ranges: tuple[float, float]) -> Normalizer:
    """A normaliser whose `proprio` has these (low, extent); objects and actions are in [0, 2]."""
    low = torch.tensor([low for low, _ in ranges], dtype=torch.float64)
    extent = torch.tensor([extent for _, extent in ranges], dtype=torch.float64)
    norm = Normalizer(SPEC)
    norm.fit(
        {
            "proprio": (low, low + extent),
            "objects": (torch.zeros(1), torch.full((1,), 2.0)),
            "action": (torch.zeros(2), torch.full((2,), 2.0)),
        }
    )
    return norm


@settings(deadline=None)
@given(ranges=st.tuples(RANGE, RANGE, RANGE), share=st.lists(st.floats(-0.5, 1.5, width=32), min_size=3, max_size=3))
def test_decode_inverts_encode(ranges, share):
    norm = fitted(*ranges)
    low, extent = (torch.tensor(column) for column in zip(*ranges, strict=True))
    value = low + torch.tensor(share) * extent
    tolerance = 1e-5 * (low.abs() + extent).max().item()
    torch.testing.assert_close(norm.decode("proprio", norm.encode("proprio", value)), value, rtol=0, atol=tolerance)


@settings(deadline=None)
@given(ranges=st.tuples(RANGE, RANGE, RANGE))
def test_limits_become_minus_one_and_one(ranges):
    norm = fitted(*ranges)
    low, extent = (torch.tensor(column) for column in zip(*ranges, strict=True))
    for value, expected in ((low, -1.0), (low + extent, 1.0), (low + extent / 2, 0.0)):
        tolerance = 1e-5 * (1 + (low.abs() / extent).max().item())
        torch.testing.assert_close(norm.encode("proprio", value), torch.full((3,), expected), rtol=0, atol=tolerance)


@settings(deadline=None)
@given(value=NUMBER, extent=st.floats(0, CONSTANT_BELOW / 2), off=st.floats(-1, 1, width=32))
def test_constant_dimensions_map_to_zero_and_keep_their_scale(value, extent, off):
    norm = fitted((value, extent), (0.0, 1.0), (0.0, 1.0))
    encoded = norm.encode("proprio", torch.tensor([value, 0.5, 0.5]))
    assert encoded[0].abs() < 1e-4
    # what was never seen to move is not blown up when it does
    moved = norm.encode("proprio", torch.tensor([value + off, 0.5, 0.5]))
    assert moved[0].item() == pytest.approx(off, abs=2e-4)
    assert norm.decode("proprio", moved)[0].item() == pytest.approx(value + off, abs=2e-4)


def test_images_need_no_statistics():
    image = torch.tensor([0, 255], dtype=torch.uint8)
    assert torch.equal(Normalizer(SPEC).encode("rgb.base", image), torch.tensor([-1.0, 1.0]))


def test_statistics_travel_with_the_weights():
    norm, other = fitted((1.0, 2.0), (3.0, 4.0), (0.0, 0.0)), Normalizer(SPEC)
    assert norm.is_fitted
    assert not other.is_fitted
    other.load_state_dict(norm.state_dict())
    assert other.is_fitted
    value = torch.randn(7, 2, 3)
    assert torch.equal(other.encode("proprio", value), norm.encode("proprio", value))


@pytest.mark.parametrize(
    ("name", "limits", "message"),
    [
        ("objects", None, "needs the limits of 'objects'"),
        ("objects", (torch.zeros(2), torch.ones(2)), "'objects' must be 1 finite"),
        ("action", (torch.zeros(2), torch.tensor([1.0, torch.nan])), "'action' must be 2 finite"),
        ("action", (torch.zeros(2), torch.tensor([1.0, torch.inf])), "'action' must be 2 finite"),
    ],
)
def test_bad_limits_are_refused(name, limits, message):
    good = {n: (torch.zeros(s), torch.ones(s)) for n, s in Normalizer(SPEC).sizes.items()}
    changed = {n: v for n, v in {**good, name: limits}.items() if v is not None}
    with pytest.raises(RobopolicyError, match=message):
        Normalizer(SPEC).fit(changed)
