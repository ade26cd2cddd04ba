"""Puts the parts of a training run together: starts or resumes it, calls `train`, and saves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from robopolicy.errors import CheckpointError, MissingRequirementError
from robopolicy.policies.base import Policy
from robopolicy.training import checkpoint
from robopolicy.training.ema import EMA
from robopolicy.training.loop import Window, step_seed, train
from robopolicy.training.optim import load_optimizer_tensors, make_optimizer, make_scheduler, optimizer_tensors
from robopolicy.training.settings import TrainSettings
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

    Args:
        policy: freshly built from `seed`, normaliser fitted.
        config: `policy`, `data` and `train` of policy.json.
        held_out: batches of held-out episodes, always the same ones, for val/loss.

    Raises:
        CheckpointError: `resume_from` has no training state, or was trained by another number of processes.
        TrainingError: the loss is not finite or a checkpoint cannot be written.
    """
    policy.to(accelerator.device)
    ema = EMA(policy, power=settings.ema_power, max_decay=settings.ema_max_decay)
    if settings.compile:
        policy.compile()
    optimizer = make_optimizer(policy, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    start_step, window = 0, Window()
    if resume_from is not None:
        start_step, window = _restore(resume_from, policy, ema, optimizer, accelerator)
    wrapped, prepared = accelerator.prepare(policy, optimizer)

    def save(step: int, window: Window) -> None:
        if accelerator.is_main_process:
            info: dict[str, Any] = {"step": step, "num_processes": accelerator.num_processes, "window": window.rows}
            if accelerator.scaler is not None:
                info["grad_scaler"] = accelerator.scaler.state_dict()
            moments = optimizer_tensors(optimizer, policy)
            state = checkpoint.TrainingState(weights=policy.state_dict(), optimizer=moments, info=info)
            averaged: Any = ema.policy
            checkpoint.save(run_dir, step=step, policy=averaged, config=config, state=state, keep=settings.keep)
        accelerator.wait_for_everyone()

    def validate() -> Mapping[str, float]:
        if held_out is None or not accelerator.is_main_process:
            return {}
        return {"val/loss": validation_loss(ema.policy, held_out())}

    return train(
        wrapped,
        make_batches(start_step * settings.accumulate),
        accelerator=accelerator,
        optimizer=prepared,
        scheduler=make_scheduler(
            optimizer, num_steps=settings.num_steps, warmup_steps=settings.warmup_steps, start_step=start_step
        ),
        ema=ema,
        num_steps=settings.num_steps,
        start_step=start_step,
        window=window,
        seed=seed,
        grad_clip=float("inf") if settings.grad_clip is None else settings.grad_clip,
        log=log,
        log_every=settings.log_every,
        save=save,
        save_every=settings.save_every,
        validate=validate if held_out is not None else None,
        validate_every=settings.validate_every,
        tick=tick,
        stop=stop,
    )


@torch.no_grad()
def validation_loss(policy: torch.nn.Module, batches: Iterator[Batch]) -> float:
    """Return the mean loss over the first few batches, with the same random numbers each time it is asked."""
    losses = []
    for index, batch in zip(range(VALIDATION_BATCHES), batches, strict=False):
        torch.manual_seed(step_seed(0, index, 0))
        losses.append(policy(batch))
    return float(torch.stack(losses).mean())


def _restore(
    folder: Path, policy: Policy, ema: EMA, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> tuple[int, Window]:
    """Load `folder` into policy, average and optimiser; return steps done and the losses that were not yet logged."""
    state = checkpoint.load_training_state(folder)
    info = state.info
    if info.get("num_processes") != accelerator.num_processes:
        wanted = info.get("num_processes")
        raise CheckpointError(
            f"{folder} was trained by {wanted} processes, this is {accelerator.num_processes}; go on with "
            f"`torchrun --nproc_per_node {wanted} -m robopolicy train resume=true ...`."
        )
    try:
        policy.load_state_dict(dict(state.weights))
        ema.policy.load_state_dict(checkpoint.read_weights(folder))
        load_optimizer_tensors(optimizer, policy, state.optimizer)
        window = Window((float(loss), float(grad_norm)) for loss, grad_norm in info["window"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(info["grad_scaler"])
        return int(info["step"]), window
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'training_state'} does not fit this policy: {error}") from error


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Use `number` CPU threads for the tensors of this block (None: as many as torch likes)."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
