"""Laws of chunk timing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robopolicy.timing import ChunkTiming


@given(n_obs_steps=st.integers(-2, 6), horizon=st.integers(0, 20), n_action_steps=st.integers(-2, 22))
def test_valid_timings_are_those_whose_actions_lie_in_the_chunk(n_obs_steps, horizon, n_action_steps):
    executed = range(n_obs_steps - 1, n_obs_steps - 1 + n_action_steps)
    valid = n_obs_steps >= 1 and n_action_steps >= 1 and executed.stop <= horizon
    if valid:
        timing = ChunkTiming(n_obs_steps=n_obs_steps, horizon=horizon, n_action_steps=n_action_steps)
        assert timing.now == executed.start
    else:
        with pytest.raises(ValueError, match="must be"):
            ChunkTiming(n_obs_steps=n_obs_steps, horizon=horizon, n_action_steps=n_action_steps)


def test_defaults_are_diffusion_policys():
    timing = ChunkTiming()
    assert (timing.n_obs_steps, timing.horizon, timing.n_action_steps, timing.now) == (2, 16, 8, 1)


def test_the_error_says_what_would_work():
    with pytest.raises(ValueError, match=r"in \[1, 15\] for horizon=16, n_obs_steps=2; got 16"):
        ChunkTiming(n_action_steps=16)
