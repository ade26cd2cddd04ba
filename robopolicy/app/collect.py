"""Make demonstrations by motion planning, or replay a trajectory file, and keep the successful ones."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from robopolicy.envs.demonstrations import Progress

EXAMPLES: tuple[tuple[str, str], ...] = (
    ("robopolicy collect task=pick_cube", "100 demonstrations of the task, about a minute on two cores"),
    (
        "robopolicy collect task=stack_cube num_demos=400 control_mode=pd_joint_delta_pos",
        "more of them, with joint increments as actions; the same command goes on after an interruption",
    ),
    (
        "robopolicy collect task=pick_cube_rgb source=demos/pick_cube/pd_ee_delta_pos.state.h5",
        "camera pictures of demonstrations that are there already; nothing is planned or simulated again",
    ),
    (
        "robopolicy collect task=pick_cube source=my_demos.h5",
        "your own ManiSkill trajectories, replayed with the observations and actions that training wants",
    ),
)

PLAIN_EVERY_S = 10.0
"""Without a terminal a line of progress appears this often."""


def run(cfg: DictConfig) -> Mapping[str, Any]:
    """Collect what `cfg` asks for; return the file and its counts."""
    from rich.console import Console

    from robopolicy.envs.demonstrations import collect, require_solver, summary
    from robopolicy.envs.playback import Shortening
    from robopolicy.errors import RobopolicyError

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if cfg.source is None:
        require_solver(cfg.task.name)
    try:
        shortening = Shortening(**cfg.shortening)
    except (TypeError, ValueError) as error:
        raise RobopolicyError(str(error)) from error
    began_s = time.monotonic()
    with _progress(console) as show:
        try:
            path = collect(
                cfg.task.name,
                num_demos=cfg.num_demos,
                out_dir=cfg.out_dir,
                control_mode=cfg.control_mode,
                obs_mode=cfg.obs_mode,
                max_episode_steps=cfg.task.max_episode_steps,
                num_workers=cfg.num_workers,
                seed=cfg.seed,
                shortening=shortening,
                source=cfg.source,
                overwrite=cfg.overwrite,
                on_progress=show,
            )
        except KeyboardInterrupt:
            console.print("Stopped; every finished attempt is kept. The same command goes on from here.")
            raise
    counts = summary(path)
    made = show.made
    _say(cfg, path, counts, made, time.monotonic() - began_s, console)
    return {"path": str(path), **counts}


class _Show:
    """What is called after every attempt; remembers whether any were made."""

    def __init__(self, draw: Callable[[Progress], None]) -> None:
        self.draw, self.made = draw, 0

    def __call__(self, progress: Progress) -> None:
        self.made = progress.tally.kept - progress.resumed
        self.draw(progress)


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[_Show]:
    """Show a bar on stderr (a line now and then where that is no terminal)."""
    if not console.is_terminal:
        yield _Show(_plain(console))
        return
    from rich import progress

    columns = (
        progress.TextColumn("[bold]collecting"),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TextColumn("[green]{task.fields[rate]}[/] of attempts kept"),
        progress.TextColumn("{task.fields[speed]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("collecting", total=None, rate="-", speed="starting")
        began_s = time.monotonic()

        def draw(state: Progress) -> None:
            made = state.tally.kept - state.resumed
            bar.update(
                task,
                completed=min(state.tally.kept, state.num_demos),
                total=state.num_demos,
                rate=f"{state.tally.keep_rate:.0%}" if state.tally.attempts else "-",
                speed=f"{made / max(time.monotonic() - began_s, 1e-3):.1f}/s" if made else "starting",
            )

        yield _Show(draw)


def _plain(console: Console) -> Callable[[Progress], None]:
    began_s: float | None = None
    shown_s = time.monotonic()

    def draw(state: Progress) -> None:
        nonlocal began_s, shown_s
        now_s, made = time.monotonic(), state.tally.kept - state.resumed
        if made and began_s is None:
            began_s = now_s  # with the first demonstration, when the workers have started
        elif made > 1 and began_s is not None and now_s - shown_s > PLAIN_EVERY_S:
            shown_s = now_s
            left_s = (now_s - began_s) / (made - 1) * (state.num_demos - state.tally.kept)
            console.print(
                f"{state.tally.kept}/{state.num_demos} demonstrations, {state.tally.keep_rate:.0%} of attempts kept, "
                f"about {left_s:.0f} s left"
            )

    return draw


def _say(cfg: DictConfig, path: Path, counts: Mapping[str, Any], made: int, took_s: float, console: Console) -> None:
    """Print what was kept and rejected, where it is, and what to type next."""
    rejected = ", ".join(f"{reason}: {count}" for reason, count in counts["rejected"].items())
    speed = f" in {took_s:.0f} s ({took_s / made:.2f} s each)" if made else ", all of them there already"
    lines = [
        ("kept", f"{counts['kept']} of {counts['attempts']} attempts{speed}"),
        ("rejected", rejected or "none"),
        ("length", f"{counts['median_steps']:.0f} steps in the median, {counts['median_plan_steps']:.0f} as planned"),
        ("file", f"{path} ({path.stat().st_size / 1e6:.1f} MB) and {path.with_suffix('.json').name}"),
        ("next", _train_command(cfg, path)),
    ]
    for name, text in lines:
        console.print(f"  [bold]{name:<9}[/] {text}")


def _train_command(cfg: DictConfig, path: Path) -> str:
    from robopolicy.app.run_config import task_words
    from robopolicy.envs.tasks import find_task

    words = ["robopolicy", "train", *task_words({"name": cfg.task.name, "obs_mode": cfg.obs_mode})]
    if cfg.control_mode != find_task(cfg.task.name).control_mode:
        words.append(f"task.control_mode={cfg.control_mode}")
    if cfg.out_dir != "demos":
        words.append(f"data.path={path}")
    return shlex.join(words)
