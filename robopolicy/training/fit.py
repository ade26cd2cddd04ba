"""Puts the parts of a training run together: starts or resumes it, calls `train`, and saves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import broadcast

from robopolicy.errors import CheckpointError, MissingRequirementError
from robopolicy.policies.base import Policy
from robopolicy.training import checkpoint
from robopolicy.training.ema import EMA
from robopolicy.training.loop import Window, on_any_process, step_seed, train
from robopolicy.training.optim import load_optimizer_tensors, make_optimizer, make_scheduler, optimizer_tensors
from robopolicy.training.settings import TrainSettings
from robopolicy.training.stages import Best, Progress, stage_ends
from robopolicy.types import Batch

MakeBatches = Callable[[int], Iterator[Batch]]
"""Batches of this process from the given batch number on; batch k must not depend on where the iterator started."""
VALIDATION_BATCHES = 8


def make_accelerator(settings: TrainSettings) -> Accelerator:
    """Return the accelerator for `settings`: CUDA if there is one, else the CPU; several processes if so launched.

    Raises:
        MissingRequirementError: the device or the precision is not to be had on this machine.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise MissingRequirementError("train.device=cuda, but torch sees no CUDA device; see `robopolicy doctor`.")
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if settings.mixed_precision == "fp16" and on_cpu:
        raise MissingRequirementError("train.mixed_precision=fp16 needs a GPU; use bf16 or no on a CPU.")
    if PartialState._shared_state and PartialState().num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)  # a sweep trains several times in one process
    return Accelerator(
        mixed_precision=settings.mixed_precision, gradient_accumulation_steps=settings.accumulate, cpu=on_cpu
    )


def fit(
    policy: Policy,
    make_batches: MakeBatches,
    settings: TrainSettings,
    *,
    accelerator: Accelerator,
    run_dir: Path,
    config: Mapping[str, Any],
    seed: int,
    log: Callable[[int, Mapping[str, float]], None],
    resume_from: Path | None = None,
    held_out: Callable[[], Iterator[Batch]] | None = None,
    tick: Callable[[int], None] = lambda done: None,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train `policy` into `run_dir`, from the start or from the step folder `resume_from`; return the steps done.

    A policy with several stages goes through them one after the other, see `training.stages`.

    Args:
        policy: freshly built from `seed`, normaliser fitted.
        config: `policy`, `data` and `train` of policy.json.
        held_out: batches of held-out episodes, always the same ones, for val/loss.

    Raises:
        CheckpointError: `resume_from` has no training state, or was trained by another number of processes.
        TrainingError: the loss is not finite or a checkpoint cannot be written.
    """
    policy.to(accelerator.device)
    if settings.compile:
        policy.compile()
    ends = stage_ends(settings.num_steps, policy.num_stages, settings.stages)
    saved = None if resume_from is None else _saved(resume_from, accelerator)
    progress = Progress() if saved is None else Progress.from_info(saved.info)
    stopped = False

    def stopping() -> bool:
        nonlocal stopped
        stopped = stop()
        return stopped

    while True:
        stage = _Stage(policy, settings, accelerator, progress, ends, run_dir, config, held_out)
        if saved is not None and resume_from is not None:
            stage.restore(resume_from, saved)
            saved = None
        done = stage.train(make_batches, seed=seed, log=log, tick=tick, stop=stopping)
        if stage.is_last or not stage.is_over(done) or on_any_process(accelerator, stopped):
            return done
        progress = stage.leave(done)


class _Stage:
    """One stage of training: its optimiser, its average, and how far it has come."""

    def __init__(
        self,
        policy: Policy,
        settings: TrainSettings,
        accelerator: Accelerator,
        progress: Progress,
        ends: Sequence[int],
        run_dir: Path,
        config: Mapping[str, Any],
        held_out: Callable[[], Iterator[Batch]] | None,
    ) -> None:
        self.policy, self.settings, self.accelerator = policy, settings, accelerator
        self.progress, self.ends = progress, ends
        self.run_dir, self.config, self.held_out = run_dir, config, held_out
        self.best: Best = {}
        self.done, self.window = progress.start, Window()
        policy.set_stage(progress.stage)
        self.ema = EMA(policy, power=settings.ema_power, max_decay=settings.ema_max_decay)
        self.optimizer = make_optimizer(
            policy, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )

    @property
    def is_last(self) -> bool:
        return self.progress.stage == len(self.ends) - 1

    @property
    def end(self) -> int:
        return self.ends[self.progress.stage]

    @property
    def patience(self) -> int | None:
        """Validations without improvement after which the stage is over; None if it has to go on to its end."""
        return None if self.is_last or self.held_out is None else self.settings.early_stop

    def is_over(self, done: int) -> bool:
        return done >= self.end or self.progress.over

    def restore(self, folder: Path, state: checkpoint.TrainingState) -> None:
        """Load what was saved in this stage; `folder` holds the average.

        Raises:
            CheckpointError: it is of another policy.
        """
        try:
            self.policy.load_state_dict(dict(state.weights))
            self.ema.policy.load_state_dict(checkpoint.read_weights(folder))
            load_optimizer_tensors(self.optimizer, self.policy, state.optimizer)
            self.window = Window((float(loss), float(grad_norm)) for loss, grad_norm in state.info["window"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state.info["grad_scaler"])
            self.best, self.done = dict(state.best), int(state.info["step"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / 'training_state'} does not fit this policy: {error}") from error

    def train(
        self,
        make_batches: MakeBatches,
        *,
        seed: int,
        log: Callable[[int, Mapping[str, float]], None],
        tick: Callable[[int], None],
        stop: Callable[[], bool],
    ) -> int:
        """Train until the stage is over or `stop`; return the steps done."""
        settings = self.settings
        if self.is_over(self.done):
            return self.done
        wrapped, prepared = self.accelerator.prepare(self.policy, self.optimizer)
        start = self.progress.start
        return train(
            wrapped,
            make_batches(self.done * settings.accumulate),
            accelerator=self.accelerator,
            optimizer=prepared,
            scheduler=make_scheduler(
                self.optimizer,
                num_steps=self.end - start,
                warmup_steps=settings.warmup_steps,
                start_step=self.done - start,
            ),
            ema=self.ema,
            num_steps=self.end,
            start_step=self.done,
            first_step=start,
            window=self.window,
            seed=seed,
            grad_clip=float("inf") if settings.grad_clip is None else settings.grad_clip,
            log=log,
            log_every=settings.log_every,
            save=self.save,
            save_every=settings.save_every,
            validate=self.validate if self.held_out is not None else None,
            validate_every=settings.validate_every,
            tick=tick,
            stop=stop,
            enough=(lambda: self.progress.over) if self.patience is not None else None,
        )

    def save(self, step: int, window: Window) -> None:
        """Write a checkpoint."""
        accelerator = self.accelerator
        if accelerator.is_main_process:
            info: dict[str, Any] = {"step": step, "num_processes": accelerator.num_processes, "window": window.rows}
            if len(self.ends) > 1:
                info["stages"] = self.progress.to_info()
            if accelerator.scaler is not None:
                info["grad_scaler"] = accelerator.scaler.state_dict()
            moments = optimizer_tensors(self.optimizer, self.policy)
            state = checkpoint.TrainingState(
                weights=self.policy.state_dict(), optimizer=moments, info=info, best=self.best
            )
            averaged: Any = self.ema.policy
            keep = self.settings.keep
            checkpoint.save(self.run_dir, step=step, policy=averaged, config=self.config, state=state, keep=keep)
        accelerator.wait_for_everyone()

    def validate(self) -> Mapping[str, float]:
        """Return the loss of the averaged policy on held-out batches, and note it where the stage may end early."""
        assert self.held_out is not None
        main = self.accelerator.is_main_process
        loss = validation_loss(self.ema.policy, self.held_out()) if main else 0.0
        if self.patience is not None:
            loss = float(broadcast(torch.tensor(loss, dtype=torch.float64, device=self.accelerator.device)))
            self.progress = self.progress.judged(loss, patience=self.patience)
            if self.progress.worse == 0:
                self.best = {n: value.detach().clone() for n, value in self.ema.policy.state_dict().items()}
        return {"val/loss": loss} if main else {}

    def leave(self, done: int) -> Progress:
        """Give the policy the weights that this stage leaves: the best averaged ones, or the last."""
        wrapped: Any = self.policy
        self.accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        self.policy.load_state_dict(self.best or self.ema.policy.state_dict())
        return self.progress.next(done)


@torch.no_grad()
def validation_loss(policy: torch.nn.Module, batches: Iterator[Batch]) -> float:
    """Return the mean loss over the first few batches, with the same random numbers each time it is asked."""
    losses = []
    for index, batch in zip(range(VALIDATION_BATCHES), batches, strict=False):
        torch.manual_seed(step_seed(0, index, 0))
        losses.append(policy(batch))
    return float(torch.stack(losses).mean())


def _saved(folder: Path, accelerator: Accelerator) -> checkpoint.TrainingState:
    """Return the training state in `folder`.

    Raises:
        CheckpointError: it was trained by another number of processes.
    """
    state = checkpoint.load_training_state(folder)
    wanted = state.info.get("num_processes")
    if wanted != accelerator.num_processes:
        raise CheckpointError(
            f"{folder} was trained by {wanted} processes, this is {accelerator.num_processes}; go on with "
            f"`torchrun --nproc_per_node {wanted} -m robopolicy train resume=true ...`."
        )
    return state


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Use `number` CPU threads for the tensors of this block (None: as many as torch likes)."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
