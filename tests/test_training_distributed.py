"""Two processes train like one with a batch twice as large, and only one of them writes."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from toy_training import LIMITS, ToyPolicy, toy_batches

from robopolicy.rng import Rng
from robopolicy.training import checkpoint
from robopolicy.training.fit import fit, make_accelerator
from robopolicy.training.settings import TrainSettings
from robopolicy.types import Batch, Observation


class QuietPolicy(ToyPolicy):
    """No noise and no dropout, so that batches can be split without changing the gradient."""

    def loss(self, batch: Batch, *, generator: Rng = None) -> Tensor:
        return (self.act(batch.obs) - batch.action).square().mean()


def train(run_dir: Path, *, rank: int, joined: bool, stop_rank: int | None = None) -> None:
    torch.manual_seed(0)
    policy = QuietPolicy()
    policy.net[1].p = 0.0
    policy.norm.fit(LIMITS)
    settings = TrainSettings(num_steps=12, log_every=4, device="cpu")
    logged: list[int] = []

    def batches(start: int) -> Iterator[Batch]:
        sources = [toy_batches(start, rank=r) for r in ((0, 1) if joined else (rank,))]
        for parts in zip(*sources, strict=True):
            proprio = torch.cat([part.obs.modalities["proprio"] for part in parts])
            action, pad = torch.cat([part.action for part in parts]), torch.cat([part.is_pad for part in parts])
            yield Batch(obs=Observation(modalities={"proprio": proprio}), action=action, is_pad=pad)

    done = fit(
        policy,
        batches,
        settings,
        accelerator=make_accelerator(settings),
        run_dir=run_dir,
        config={"policy": {}},
        seed=0,
        log=lambda step, metrics: logged.append(step),
        stop=lambda: rank == stop_rank,
    )
    torch.save((done, logged, policy.state_dict()), run_dir / f"rank{rank}.pt")


def as_rank(rank: int, port: int, run_dir: Path, stop_rank: int | None) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    train(run_dir, rank=rank, joined=False, stop_rank=stop_rank)


def train_in_two(run_dir: Path, *, stop_rank: int | None = None) -> list[tuple[int, list[int], dict[str, Tensor]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_dir.mkdir()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=as_rank, args=(rank, port, run_dir, stop_rank)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(run_dir / f"rank{rank}.pt") for rank in (0, 1)]


def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    (tmp_path / "one").mkdir()
    train(tmp_path / "one", rank=0, joined=True)
    wanted = torch.load(tmp_path / "one" / "rank0.pt")[2]
    two = train_in_two(tmp_path / "two")
    assert [(done, logged) for done, logged, _ in two] == [(12, [4, 8, 12])] * 2
    for name, value in wanted.items():
        assert torch.equal(two[0][2][name], two[1][2][name]), name
        torch.testing.assert_close(two[0][2][name], value, msg=name)
    one, both = (checkpoint.read_weights(checkpoint.resolve(tmp_path / name)) for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, msg=name)


def test_when_one_process_is_asked_to_stop_both_do(tmp_path):
    two = train_in_two(tmp_path / "two", stop_rank=1)
    assert [done for done, _, _ in two] == [4, 4]  # asked at the first log
    assert checkpoint.read_config(checkpoint.resolve(tmp_path / "two"))["step"] == 4
