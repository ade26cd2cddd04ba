"""Laws of training windows: padding, coverage, and batches that depend on their number alone."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from fakes import fake_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from robopolicy.data.store import EpisodeStore
from robopolicy.data.windows import ActionPadding, batches, find_windows, gather
from robopolicy.errors import DataError
from robopolicy.timing import ChunkTiming
from robopolicy.types import Batch

SPEC = fake_spec(camera=True)


def made_store(lengths: list[int]) -> EpisodeStore:
    """A store in which every frame can be told from every other: values are 1 + the frame's index."""
    frames = torch.arange(1.0, sum(lengths) + 1)
    modalities = {
        name: (frames.view(-1, *[1] * len(m.shape)) % 256).to(torch.uint8).expand(-1, *m.shape).contiguous()
        if m.is_image
        else frames[:, None].repeat(1, *m.shape)
        for name, m in SPEC.observation.items()
    }
    ends = torch.tensor(lengths).cumsum(0)
    return EpisodeStore(
        spec=SPEC,
        modalities=modalities,
        action=frames[:, None].repeat(1, SPEC.action.dim),
        episode_ends=ends,
        seeds=torch.arange(len(lengths)),
        success=torch.ones(len(lengths), dtype=torch.bool),
    )


@st.composite
def timings(draw: st.DrawFn) -> ChunkTiming:
    n_obs_steps = draw(st.integers(1, 4))
    horizon = draw(st.integers(n_obs_steps, 12))
    n_action_steps = draw(st.integers(1, horizon - n_obs_steps + 1))
    return ChunkTiming(n_obs_steps=n_obs_steps, horizon=horizon, n_action_steps=n_action_steps)


LENGTHS = st.lists(st.integers(1, 25), min_size=1, max_size=5)


def naive_windows(
    lengths: list[int], timing: ChunkTiming, padding: ActionPadding, pad_after: int
) -> list[tuple[list[float], list[list[float]], list[bool]]]:
    """Return (observed frames, actions, padded) of every window, in the plainest way."""
    out = []
    begin = 0
    for length in lengths:
        last = max(length - timing.horizon + pad_after, 0)
        for start in range(-(timing.n_obs_steps - 1), last + 1):
            steps = range(start, start + timing.horizon)
            values = [1.0 + begin + min(max(step, 0), length - 1) for step in steps]
            padded = [not 0 <= step < length for step in steps]
            actions = []
            for value, outside in zip(values, padded, strict=True):
                moves = 0.0 if outside and padding == "hold" else value
                actions.append([moves] * (SPEC.action.dim - 1) + [value])  # the gripper, last, is absolute
            out.append((values[: timing.n_obs_steps], actions, padded))
        begin += length
    return out


@settings(deadline=None, max_examples=60)
@given(LENGTHS, timings(), st.sampled_from(["hold", "repeat"]), st.data())
def test_windows_are_those_of_a_naive_loop(
    lengths: list[int], timing: ChunkTiming, padding: ActionPadding, data: st.DataObject
) -> None:
    store = made_store(lengths)
    pad_after = data.draw(st.integers(0, timing.horizon - 1))
    windows = find_windows(store.episode_ends, timing, pad_after=pad_after)
    got = gather(store, windows, torch.arange(len(windows)), timing, action_padding=padding)
    wanted = naive_windows(lengths, timing, padding, pad_after)
    assert len(windows) == len(wanted)
    assert got.action.tolist() == [actions for _, actions, _ in wanted]
    assert got.is_pad.tolist() == [padded for _, _, padded in wanted]
    for name, value in got.obs.modalities.items():
        flat = value.reshape(*value.shape[:2], -1)
        seen = [[frame % 256 if name.startswith("rgb") else frame for frame in frames] for frames, _, _ in wanted]
        assert flat[..., 0].tolist() == seen
        assert (flat == flat[..., :1]).all()


@settings(deadline=None, max_examples=60)
@given(LENGTHS, timings())
def test_every_step_is_in_a_window_and_no_window_crosses_episodes(lengths: list[int], timing: ChunkTiming) -> None:
    store = made_store(lengths)
    windows = find_windows(store.episode_ends, timing)
    batch = gather(store, windows, torch.arange(len(windows)), timing, action_padding="repeat")
    seen = batch.action[..., 0][~batch.is_pad]
    assert set(seen.tolist()) == set(range(1, sum(lengths) + 1))
    episode_of = torch.bucketize(batch.action[..., 0] - 1, store.episode_ends.float(), right=True)
    assert (episode_of == episode_of[:, :1]).all()


def test_every_step_is_the_present_of_a_window() -> None:
    timing, store = ChunkTiming(n_obs_steps=2, horizon=8, n_action_steps=4), made_store([5, 9, 20])
    windows = find_windows(store.episode_ends, timing)
    batch = gather(store, windows, torch.arange(len(windows)), timing, action_padding="repeat")
    present = batch.action[:, timing.now, 0][~batch.is_pad[:, timing.now]]
    assert sorted(present.tolist()) == list(range(1, 35))


def test_windows_match_diffusion_policys_count() -> None:
    """Reference: Diffusion Policy's create_indices gives L - H + pad_before + pad_after + 1 windows per episode."""
    lengths, timing = [30, 41, 100], ChunkTiming(n_obs_steps=2, horizon=16, n_action_steps=8)
    windows = find_windows(torch.tensor(lengths).cumsum(0), timing, pad_after=timing.n_action_steps - 1)
    assert len(windows) == sum(length - 16 + 1 + 7 + 1 for length in lengths)


def assert_equal(left: Batch, right: Batch) -> None:
    assert torch.equal(left.action, right.action)
    assert torch.equal(left.is_pad, right.is_pad)
    assert left.obs.modalities.keys() == right.obs.modalities.keys()
    for name, value in left.obs.modalities.items():
        assert torch.equal(value, right.obs.modalities[name])


@pytest.mark.parametrize("start", [1, 7, 23])
def test_batch_k_does_not_depend_on_where_the_iteration_began(start: int) -> None:
    store, timing = made_store([20, 30, 7]), ChunkTiming(n_obs_steps=2, horizon=8, n_action_steps=4)
    through = list(itertools.islice(batches(store, timing, batch_size=16, seed=3), 30))
    later = list(itertools.islice(batches(store, timing, batch_size=16, seed=3, start_step=start), 30 - start))
    for left, right in zip(through[start:], later, strict=True):
        assert_equal(left, right)


@settings(deadline=None, max_examples=20)
@given(batch_size=st.integers(1, 40), world_size=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_each_epoch_shows_every_window_once(batch_size: int, world_size: int, seed: int) -> None:
    store, timing = made_store([6, 9]), ChunkTiming(n_obs_steps=1, horizon=4, n_action_steps=2)
    count = len(find_windows(store.episode_ends, timing))
    ranks = [
        batches(store, timing, batch_size=batch_size, seed=seed, rank=r, world_size=world_size)
        for r in range(world_size)
    ]
    steps = -(-3 * count // (batch_size * world_size))
    first = [float(x) for _ in range(steps) for rank in ranks for x in next(rank).action[:, 0, 0]]
    windows = find_windows(store.episode_ends, timing)
    every = sorted(gather(store, windows, torch.arange(count), timing).action[:, 0, 0].tolist())
    for epoch in range(3):
        assert sorted(first[epoch * count : (epoch + 1) * count]) == every


def test_seeds_and_epochs_shuffle_differently() -> None:
    store, timing = made_store([60]), ChunkTiming(n_obs_steps=1, horizon=1, n_action_steps=1)
    orders = {
        (seed, epoch): tuple(
            next(batches(store, timing, batch_size=60, seed=seed, start_step=epoch)).action[:, 0, 0].tolist()
        )
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9


def test_batches_do_not_share_memory_with_the_store() -> None:
    store, timing = made_store([20]), ChunkTiming(n_obs_steps=2, horizon=8, n_action_steps=4)
    before = store.action.clone()
    batch = next(batches(store, timing, batch_size=8, seed=0))
    batch.action.zero_()
    batch.obs.modalities["proprio"].zero_()
    assert torch.equal(store.action, before)
    assert store.modalities["proprio"].min() > 0


def test_hold_reads_what_an_increment_is_from_the_action_spec() -> None:
    absolute = replace(SPEC, action=replace(SPEC.action, delta=(False, True, False, False)))
    store = replace(made_store([3]), spec=absolute)
    timing = ChunkTiming(n_obs_steps=1, horizon=6, n_action_steps=1)
    action = next(batches(store, timing, batch_size=1, seed=0)).action[0]
    np.testing.assert_array_equal(action[3:], [[3.0, 0.0, 3.0, 3.0]] * 3)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"start_step": -1}, "start_step"),
        ({"action_padding": "zero"}, "hold"),
        ({"pad_after": 8}, "pad_after"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, object], word: str) -> None:
    store, timing = made_store([20]), ChunkTiming(n_obs_steps=2, horizon=8, n_action_steps=4)
    with pytest.raises(DataError, match=word):
        batches(store, timing, **{"batch_size": 4, "seed": 0, **arguments})  # type: ignore[arg-type]
