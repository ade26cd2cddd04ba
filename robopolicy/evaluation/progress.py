"""A progress bar for evaluations: episodes, success so far, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from robopolicy.evaluation.rollout import Progress as EvalProgress

PLAIN_EVERY_S = 20.0
"""Without a terminal a line of progress appears this often."""


@contextmanager
def progress_bar(n_episodes: int, *, console: Console | None = None) -> Iterator[Callable[[EvalProgress], None]]:
    """Show a bar on stderr for `n_episodes` (a line now and then where that is no terminal).

    Yields the function to pass to `evaluate` as `on_step`.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _plain(n_episodes, console)
        return
    columns = (
        TextColumn("[bold]evaluating"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[started]}/{task.fields[wanted]} episodes"),
        TextColumn("[green]{task.fields[success]} succeeded"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
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


def _plain(n_episodes: int, console: Console) -> Callable[[EvalProgress], None]:
    begun_s = shown_s = time.monotonic()

    def show(state: EvalProgress) -> None:
        nonlocal shown_s
        now_s = time.monotonic()
        if now_s - shown_s > PLAIN_EVERY_S:
            shown_s = now_s
            left_s = (now_s - begun_s) / state.steps_done * (state.steps_total - state.steps_done)
            console.print(
                f"episodes {state.episodes_started}/{n_episodes}  {state.num_success} succeeded  {left_s:.0f} s left"
            )

    return show
