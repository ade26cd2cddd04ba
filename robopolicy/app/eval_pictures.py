"""The pictures that an evaluation leaves: its first episodes as a film, and how failed ones ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress

from robopolicy.evaluation.rollout import EvalResult
from robopolicy.evaluation.video import record, record_failures
from robopolicy.types import Environment


def film(
    cfg: DictConfig,
    build: Callable[..., Environment],
    result: EvalResult,
    folder: Path,
    backend: str,
    console: Console,
) -> dict[str, Any]:
    """Replay the first episodes in what `build(num_envs=...)` gives and write the film into `folder`."""
    episodes = result.episodes[: cfg.video_episodes]
    begin = time.perf_counter()
    tiles = len(episodes) if backend == "cuda" else 1  # one by one on a CPU: no picture is drawn of a finished episode
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("rendering", total=None)
        env = build(num_envs=tiles)
        video = record(
            env,
            episodes,
            folder,
            size_px=cfg.video_tile_px,
            stride=cfg.video_stride,
            on_step=lambda done, total: bar.update(task, completed=done, total=total),
        )
        env.close()
    return {**video, "seconds": time.perf_counter() - begin}


def failure_sheet(
    cfg: DictConfig, build: Callable[..., Environment], result: EvalResult, folder: Path, console: Console
) -> dict[str, Any] | None:
    """Replay failed episodes and write how they ended into `folder`; None where none failed."""
    failed = [episode for episode in result.episodes if not episode.success_once][: cfg.failures_most]
    if not failed:
        return None
    with console.status(f"replaying {len(failed)} failed episodes"):
        env = build(num_envs=len(failed))
        sheet = record_failures(env, failed, folder, size_px=cfg.video_tile_px)
        env.close()
    return sheet
