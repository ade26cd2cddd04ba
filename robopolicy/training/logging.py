"""Where metrics go: always to metrics.jsonl, to wandb or TensorBoard on request, and to a progress bar on the terminal.

One line of metrics.jsonl is {"step": <steps done>, <name>: <number>, ...}. Names: train/loss and train/grad_norm (means
since the line before), train/lr, train/samples_per_s, train/data_share (share of the time spent on making batches),
val/loss (held-out episodes, averaged weights).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from robopolicy import atomic
from robopolicy.errors import MissingRequirementError, TrainingError, UnknownNameError

Log = Callable[[int, Mapping[str, float]], None]
PLAIN_EVERY_S = 20.0
"""Without a terminal a line of progress appears this often."""


@contextlib.contextmanager
def jsonl(run_dir: Path, *, start_step: int = 0, config: Mapping[str, Any] | None = None) -> Iterator[Log]:
    """Append to `run_dir`/metrics.jsonl, after dropping what was logged past `start_step`."""
    path = run_dir / "metrics.jsonl"
    kept = [line for line in _rows(path) if line["step"] <= start_step]
    try:
        atomic.write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        file = open(path, "a", buffering=1)  # noqa: SIM115
    except OSError as error:
        raise _no_room(path, error) from error

    def log(step: int, metrics: Mapping[str, float]) -> None:
        try:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        except OSError as error:
            raise _no_room(path, error) from error

    try:
        yield log
    finally:
        with contextlib.suppress(OSError):  # what could not be written was reported by `log`
            file.close()


@contextlib.contextmanager
def wandb(run_dir: Path, *, start_step: int = 0, config: Mapping[str, Any] | None = None) -> Iterator[Log]:
    """Log to Weights & Biases under project `robopolicy`; offline unless WANDB_MODE says otherwise."""
    module = _require("wandb")
    run = module.init(
        project=os.environ.get("WANDB_PROJECT", "robopolicy"),
        name=run_dir.name,
        id=re.sub(r"[^\w-]", "-", run_dir.name),
        resume="allow",
        dir=str(run_dir),
        mode=os.environ.get("WANDB_MODE", "offline"),
        config=dict(config or {}),
    )
    try:
        yield lambda step, metrics: run.log(dict(metrics), step=step)
    finally:
        run.finish()


@contextlib.contextmanager
def tensorboard(run_dir: Path, *, start_step: int = 0, config: Mapping[str, Any] | None = None) -> Iterator[Log]:
    """Log to `run_dir`/tensorboard; watch with `tensorboard --logdir checkpoints`."""
    _require("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    try:
        yield log
    finally:
        writer.close()


LOGGERS = {"jsonl": jsonl, "wandb": wandb, "tensorboard": tensorboard}


@contextlib.contextmanager
def open_logs(
    names: Sequence[str], run_dir: Path, *, start_step: int = 0, config: Mapping[str, Any] | None = None
) -> Iterator[Log]:
    """Yield one function that logs to metrics.jsonl and to each of `names` (`wandb`, `tensorboard`).

    Raises:
        UnknownNameError: a name is not in LOGGERS.
        MissingRequirementError: its package is not installed; says the command.
        TrainingError: while open, metrics.jsonl cannot be written.
    """
    require_loggers(names)
    with contextlib.ExitStack() as stack:
        chosen = dict.fromkeys(["jsonl", *names])
        logs = [stack.enter_context(LOGGERS[n](run_dir, start_step=start_step, config=config)) for n in chosen]

        def log(step: int, metrics: Mapping[str, float]) -> None:
            for one in logs:
                one(step, metrics)

        yield log


def require_loggers(names: Sequence[str]) -> None:
    """Raise UnknownNameError or MissingRequirementError unless `names` can be logged to."""
    for name in names:
        if name not in LOGGERS:
            raise UnknownNameError("logger", name, LOGGERS)
        if name != "jsonl":
            _require(name)


class TrainingBar:
    """Steps done, loss, samples per second and time left: a bar on a terminal, otherwise a line now and then."""

    def __init__(self, num_steps: int, start_step: int = 0, *, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._num_steps, self._start_step = num_steps, start_step
        self._begun_s = self._shown_s = time.monotonic()
        self._said = "starting"
        self._bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=4,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=num_steps, completed=start_step, said=self._said)

    def __enter__(self) -> TrainingBar:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take over the newest loss and speed."""
        if "train/loss" in metrics:
            self._said = f"loss {metrics['train/loss']:.4f}  {metrics['train/samples_per_s']:,.0f} samples/s"

    def tick(self, done: int) -> None:
        """Show `done` steps; costs next to nothing when called often."""
        now_s = time.monotonic()
        if self._console.is_terminal:
            if now_s - self._shown_s > 0.1 or done == self._num_steps:
                self._shown_s = now_s
                self._bar.update(self._task, completed=done, said=self._said)
        elif now_s - self._shown_s > PLAIN_EVERY_S:
            self._shown_s = now_s
            left_s = (now_s - self._begun_s) / (done - self._start_step) * (self._num_steps - done)
            print(f"step {done}/{self._num_steps}  {self._said}  {left_s:.0f} s left", file=sys.stderr, flush=True)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Return the readable lines of `path`; a crash may have cut the last one off."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def _no_room(path: Path, error: OSError) -> TrainingError:
    return TrainingError(
        f"Could not write {path}: {error.strerror or error}. Checkpoints are intact; once there is room, go on with: "
        f"robopolicy train resume=true run={path.parent.name}"
    )


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingRequirementError(
            f"logger={package} needs the package {package}: pip install 'robopolicy[{package}]'"
        ) from error
