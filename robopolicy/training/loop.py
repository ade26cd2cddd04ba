"""The training loop, for every policy that is trained by the loss on a batch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robopolicy.errors import TrainingError
from robopolicy.training.ema import EMA
from robopolicy.types import Batch


def train(
    policy: nn.Module,
    batches: Iterator[Batch],
    *,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    ema: EMA,
    num_steps: int,
    log: Callable[[int, Mapping[str, float]], None],
    save: Callable[[int, Window], None],
    start_step: int = 0,
    first_step: int = 0,
    window: Window | None = None,
    seed: int = 0,
    grad_clip: float = 1.0,
    log_every: int = 50,
    save_every: int = 1000,
    validate: Callable[[], Mapping[str, float]] | None = None,
    validate_every: int = 1000,
    tick: Callable[[int], None] = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
    enough: Callable[[], bool] | None = None,
) -> int:
    """Fit `policy` in place, its average in `ema` with it; return how many steps are done.

    Every random number of step k comes from `step_seed(seed, k, rank)`, and batch k from k as well, so weights, moments
    and `window` (the losses since the last log) are all the state there is: a run that stops after any step and goes on
    is bit for bit the run that never stopped. `optimizer` and `policy` are as `accelerator.prepare` returned them,
    `batches` starts at batch `start_step * accelerator.gradient_accumulation_steps`.

    Args:
        first_step: where the average began: steps are counted from there for its decay.
        log: called with steps done and metrics, on every process, each `log_every` steps and after the last.
        save: called with steps done and the unlogged losses each `save_every` steps, at the end and on `stop`.
        validate: returns metrics of held-out data; may draw random numbers.
        tick: called after each step (progress bar).
        stop: asked after each step; with several processes each `log_every` steps, all stop when one should.
        enough: asked after each validation, on every process; if so, this is the last step. It is saved like any other.

    Raises:
        TrainingError: loss or gradient is not finite; names the step. Such weights are never saved.
    """
    bare = accelerator.unwrap_model(policy)
    window = window or Window()
    policy.train()
    for step in range(start_step, num_steps):
        window.begin()
        torch.manual_seed(step_seed(seed, step, accelerator.process_index))
        losses = []
        for _ in range(accelerator.gradient_accumulation_steps):
            with accelerator.accumulate(policy):
                loss = policy(window.fetch(batches))
                accelerator.backward(loss)
                losses.append(loss.detach())
        grad_norm = accelerator.clip_grad_norm_(policy.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        lr = float(scheduler.get_last_lr()[0])
        scheduler.step()
        done = step + 1
        ema.update(bare, done - first_step)
        window.end(torch.stack(losses).mean(), grad_norm)
        tick(done)

        checking = validate is not None and (done % validate_every == 0 or done == num_steps)
        checked = validate() if validate is not None and checking else {}
        last = done == num_steps or (checking and enough is not None and enough())
        at_log = done % log_every == 0 or last
        stopping = (at_log or accelerator.num_processes == 1) and on_any_process(accelerator, stop())
        saving = stopping or done % save_every == 0 or last
        if at_log or saving:
            window.settle(accelerator, done)
        if at_log:
            log(done, {**window.summary(accelerator.num_processes), "train/lr": lr})
            window = Window()
        if checking:
            log(done, checked)
        if saving:
            save(done, window)
        if stopping or last:
            return done
    return max(num_steps, start_step)


class Window:
    """What happened since the last log: losses and gradient norms, kept on their device until somebody needs them."""

    def __init__(self, rows: Iterable[tuple[float, float]] = ()) -> None:
        self.rows = list(rows)
        """Loss and gradient norm of each step, averaged over the processes; what a checkpoint must keep."""
        self._fresh: list[Tensor] = []
        self._samples = 0
        self._data_s = 0.0
        self._busy_s = 0.0
        self._begun_s = time.perf_counter()

    def begin(self) -> None:
        """Start the clock of a step."""
        self._begun_s = time.perf_counter()

    def fetch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch and count the time it took."""
        asked_s = time.perf_counter()
        batch = next(batches)
        self._data_s += time.perf_counter() - asked_s
        self._samples += len(batch.action)
        return batch

    def end(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Note a finished step, without waiting for the device."""
        self._fresh.append(torch.stack([loss.float(), grad_norm.float()]))
        self._busy_s += time.perf_counter() - self._begun_s

    def settle(self, accelerator: Accelerator, done: int) -> None:
        """Bring the numbers to the CPU, averaged over the processes.

        Raises:
            TrainingError: a loss or gradient is not finite (but fp16 skips infinite gradients by itself).
        """
        waited_s = time.perf_counter()
        fresh = accelerator.reduce(torch.stack(self._fresh), reduction="mean").tolist() if self._fresh else []
        self._busy_s += time.perf_counter() - waited_s  # on an accelerator the steps end here
        for step, (loss, grad_norm) in enumerate(fresh, start=done - len(fresh) + 1):
            if not (math.isfinite(loss) and (math.isfinite(grad_norm) or accelerator.scaler is not None)):
                raise TrainingError(
                    f"Step {step}: the loss is {loss}, the gradient norm {grad_norm}; training cannot go on. "
                    "The last checkpoint is from before and intact. A lower train.lr or train.grad_clip usually helps; "
                    "data that is not finite or far out of range is the other common cause."
                )
        self.rows += [(loss, grad_norm) for loss, grad_norm in fresh]
        self._fresh = []

    def summary(self, num_processes: int) -> dict[str, float]:
        """Return the means over the settled steps, and the speed of all processes together."""
        loss, grad_norm = (sum(column) / len(column) for column in zip(*self.rows, strict=True))
        return {
            "train/loss": loss,
            "train/grad_norm": grad_norm,
            "train/samples_per_s": num_processes * self._samples / max(self._busy_s, 1e-9),
            "train/data_share": self._data_s / max(self._busy_s, 1e-9),
        }


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the 64-bit seed of all random numbers of `step` on process `rank`."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def on_any_process(accelerator: Accelerator, flag: bool) -> bool:
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum").item())
