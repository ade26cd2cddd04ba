"""A progress bar for evaluations: episodes, success so far, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from robopolicy.evaluation.rollout import Progress as EvalProgress


@contextmanager
def progress_bar(n_episodes: int, *, console: Console | None = None) -> Iterator[Callable[[EvalProgress], None]]:
    """Show a bar on stderr for `n_episodes`; yields the function to pass to `evaluate` as `on_step`."""
    columns = (
        TextColumn("[bold]evaluating"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[started]}/{task.fields[wanted]} episodes"),
        TextColumn("[green]{task.fields[success]} succeeded"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = console or Console(stderr=True)
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("evaluating", total=None, started=0, wanted=n_episodes, success=0)

        def show(state: EvalProgress) -> None:
            bar.update(
                task,
                completed=state.steps_done,
                total=state.steps_total,
                started=state.episodes_started,
                success=state.num_success,
            )

        yield show
