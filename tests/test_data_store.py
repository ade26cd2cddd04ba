"""Laws of the episode store on disk: what comes back, how big it may be, what happens to broken ones."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import fake_spec

from robopolicy.data.store import EpisodeStore
from robopolicy.data.windows import batches
from robopolicy.errors import DataError
from robopolicy.timing import ChunkTiming

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_data.py"


def random_store(lengths: list[int], *, seed: int = 0) -> EpisodeStore:
    spec = fake_spec(camera=True)
    generator = torch.Generator().manual_seed(seed)
    frames = sum(lengths)
    modalities = {
        name: torch.randint(0, 256, (frames, *m.shape), dtype=torch.uint8, generator=generator)
        if m.is_image
        else torch.randn(frames, *m.shape, generator=generator)
        for name, m in spec.observation.items()
    }
    return EpisodeStore(
        spec=spec,
        modalities=modalities,
        action=torch.rand(frames, spec.action.dim, generator=generator),
        episode_ends=torch.tensor(lengths).cumsum(0),
        seeds=torch.arange(len(lengths)) + 5,
        success=torch.arange(len(lengths)) % 2 == 0,
    )


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_saved_comes_back(tmp_path: Path, in_memory: bool) -> None:
    store = random_store([4, 9, 1])
    store.save(tmp_path / "store")
    back = EpisodeStore.open(tmp_path / "store", in_memory=in_memory)
    assert back.spec == store.spec
    for name, value in store.modalities.items():
        assert torch.equal(back.modalities[name], value)
    for name in ("action", "episode_ends", "seeds", "success"):
        assert torch.equal(getattr(back, name), getattr(store, name))
    for name, (low, high) in store.limits().items():
        assert torch.equal(back.limits()[name][0], low)
        assert torch.equal(back.limits()[name][1], high)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store"]


def test_memory_mapped_batches_equal_those_from_memory(tmp_path: Path) -> None:
    random_store([30, 22, 41]).save(tmp_path / "store")
    stores = [EpisodeStore.open(tmp_path / "store", in_memory=in_memory) for in_memory in (True, False)]
    streams = [batches(store, ChunkTiming(), batch_size=16, seed=1) for store in stores]
    for left, right in itertools.islice(zip(*streams, strict=True), 12):
        assert torch.equal(left.action, right.action)
        for name, value in left.obs.modalities.items():
            assert torch.equal(value, right.obs.modalities[name])


def test_writing_to_a_mapped_store_leaves_the_files_alone(tmp_path: Path) -> None:
    store = random_store([6])
    store.save(tmp_path / "store")
    EpisodeStore.open(tmp_path / "store", in_memory=False).action.zero_()
    assert torch.equal(EpisodeStore.open(tmp_path / "store").action, store.action)


def test_first_episodes_have_their_own_limits() -> None:
    store = random_store([5, 6, 7])
    part = store.first(2)
    assert part.episode_ends.tolist() == [5, 11]
    assert part.seeds.tolist() == [5, 6]
    for name, (low, high) in part.limits().items():
        values = part.action if name == "action" else part.modalities[name]
        assert torch.equal(low, values[:11].amin(0))
        assert torch.equal(high, values[:11].amax(0))
    assert "rgb.base" not in part.limits()


@pytest.mark.parametrize("count", [0, 4])
def test_more_episodes_than_there_are_is_an_error(count: int) -> None:
    with pytest.raises(DataError, match=r"\[1, 3\]"):
        random_store([5, 6, 7]).first(count)


def test_an_interrupted_save_leaves_nothing_under_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        random_store([5]).save(tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["no meta", "other format", "short array", "pickle", "no array"])
def test_a_damaged_store_is_refused(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "store"
    random_store([5, 6]).save(folder)
    if damage == "no meta":
        (folder / "meta.json").unlink()
    elif damage == "other format":
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps(meta | {"format": "robopolicy-episodes/99"}))
    elif damage == "short array":
        data = (folder / "action.npy").read_bytes()
        (folder / "action.npy").write_bytes(data[: len(data) // 2])
    elif damage == "pickle":
        np.save(folder / "action.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        (folder / "proprio.npy").unlink()
    with pytest.raises(DataError, match="store"):
        EpisodeStore.open(folder)


def test_wrong_shapes_are_refused() -> None:
    store = random_store([5, 6])
    with pytest.raises(DataError, match="proprio"):
        EpisodeStore(**{**vars(store), "modalities": {**store.modalities, "proprio": torch.zeros(11, 2)}})
    with pytest.raises(DataError, match="episode_ends"):
        EpisodeStore(**{**vars(store), "episode_ends": torch.tensor([5, 5, 11])})


@pytest.mark.slow
def test_a_million_frames_open_quickly_in_little_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--only=large", "--json", f"--folder={tmp_path}"],
        capture_output=True,
        text=True,
        check=True,
    )
    large = json.loads(done.stdout)["large"]
    assert large["frames"] == 1_000_000
    assert large["open_s"] < 5
    assert large["resident_mb"] - large["imported_mb"] < 250  # what was imported depends on the build of torch
