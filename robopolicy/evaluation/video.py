"""Films of evaluated episodes: each is replayed from its seed and its recorded actions, so it shows what was counted.

Rendering is slow without a graphics card. The replay therefore renders only every `stride`-th control step and stops a
little after the first success; the film still runs at the speed of the real robot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from robopolicy.errors import RobopolicyError
from robopolicy.evaluation.episodes import Episode
from robopolicy.types import Environment

GREEN, RED, WHITE = (52, 199, 89), (255, 69, 58), (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One replayed episode."""

    seed: int
    frames: np.ndarray
    """[F, Y, X, 3] uint8, every `stride`-th control step, the start included."""
    success_frame: int | None
    """First frame rendered at or after the first success."""
    first_success_step: int | None
    same_outcome: bool
    """The replay succeeded at the same step as the counted episode, or failed like it."""
    note: str = ""
    """Shown beside the outcome at the end."""


def record(
    env: Environment,
    episodes: Sequence[Episode],
    folder: Path,
    *,
    size_px: int = 192,
    stride: int | None = None,
    budget_s: float = 18.0,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Replay `episodes` in `env` and write `episodes.mp4`, `episodes.png` (its end) and `success.gif` into `folder`.

    Args:
        env: renders; any number of environments.
        size_px: width and height of one tile.
        stride: control steps per picture; None takes as few as can be rendered within about `budget_s`.
        on_step: called with steps done and the most that there can be.

    Returns:
        the `video` entry of eval_info.json.
    """
    hold_steps = max(2, round(0.5 / env.task_spec.action.control_dt_s))
    steps = sum(_shown_steps(episode, hold_steps) for episode in episodes)
    stride = stride or affordable_stride(env, episodes[0].seed, steps / env.num_envs, budget_s)
    fps = 1 / (env.task_spec.action.control_dt_s * stride)
    clips = replay(env, episodes, size_px=size_px, stride=stride, hold_steps=hold_steps, on_step=on_step)
    pictures = list(tiled(clips, columns=min(3, len(clips))))
    pictures += [pictures[-1]] * round(fps)  # time to see how it ended before the film starts again
    write_mp4(folder / "episodes.mp4", iter(pictures), fps=fps)
    write_png(folder / "episodes.png", pictures[-1])
    best = next((clip for clip in clips if clip.success_frame is not None), None)
    if best is not None:
        write_gif(folder / "success.gif", best, fps=fps)
    return {
        "mp4": "episodes.mp4",
        "poster": "episodes.png",
        "gif": None if best is None else "success.gif",
        "seeds": [clip.seed for clip in clips],
        "stride": stride,
        "same_outcomes": all(clip.same_outcome for clip in clips),
        "caption": f"The first {len(clips)} episodes, replayed at the speed of the robot."
        if len(clips) > 1
        else "The first episode, replayed at the speed of the robot.",
    }


def record_failures(
    env: Environment, episodes: Sequence[Episode], folder: Path, *, size_px: int = 192
) -> dict[str, Any]:
    """Replay failed `episodes` in `env`, one per environment, and write their last pictures to `folder`/failures.png.

    Nothing is rendered on the way, so this costs a wave of simulation and one picture per episode.

    Returns:
        the `failures` entry of eval_info.json.
    """
    env.reset(seed=[episode.seed for episode in episodes])
    succeeded = torch.zeros(len(episodes), dtype=torch.bool)
    for step in range(max(episode.num_steps for episode in episodes)):
        actions = torch.stack([episode.actions[min(step, episode.num_steps - 1)] for episode in episodes])
        *_, info = env.step(actions.to(env.device))
        succeeded |= info["success"].cpu()
    frames: list[list[np.ndarray]] = [[] for _ in episodes]
    _keep(env, frames, [True] * len(episodes), size_px)
    clips = [
        Clip(
            seed=episode.seed,
            frames=np.stack(frames[i]),
            success_frame=None,
            first_success_step=None,
            same_outcome=not succeeded[i],
            note="" if episode.min_distance_m is None else f", {100 * episode.min_distance_m:.1f} cm",
        )
        for i, episode in enumerate(episodes)
    ]
    write_png(folder / "failures.png", next(tiled(clips, columns=min(4, len(clips)))))
    return {
        "png": "failures.png",
        "seeds": [clip.seed for clip in clips],
        "same_outcomes": all(clip.same_outcome for clip in clips),
        "caption": "How failed episodes ended"
        + ("" if episodes[0].min_distance_m is None else ", and how near to success they came."),
    }


def affordable_stride(env: Environment, seed: int, num_steps: float, budget_s: float) -> int:
    """Return the least stride, at most 4, with which `num_steps` steps of `env` render within `budget_s`."""
    env.reset(seed=[seed] * env.num_envs)
    env.render()  # the first picture compiles shaders
    begin = time.perf_counter()
    env.render()
    needed_s = (time.perf_counter() - begin) * num_steps
    return int(np.clip(np.ceil(needed_s / budget_s), 1, 4))


def replay(
    env: Environment,
    episodes: Sequence[Episode],
    *,
    size_px: int = 192,
    stride: int = 2,
    hold_steps: int = 10,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Clip]:
    """Replay the actions of `episodes` from their seeds in `env`, `env.num_envs` at a time, and render.

    Args:
        size_px: width and height of the square pictures kept.
        stride: control steps per picture.
        hold_steps: control steps shown after the first success.
        on_step: called with the steps done and the most that there can be.
    """
    clips: list[Clip] = []
    total = sum(_shown_steps(episode, hold_steps) for episode in episodes)
    done = 0
    for start in range(0, len(episodes), env.num_envs):
        group = list(episodes[start : start + env.num_envs])
        padded = group + [group[-1]] * (env.num_envs - len(group))
        env.reset(seed=[episode.seed for episode in padded])
        steps = [_shown_steps(episode, hold_steps) for episode in group]
        frames: list[list[np.ndarray]] = [[] for _ in group]
        first: list[int | None] = [None] * len(group)
        _keep(env, frames, [True] * len(group), size_px)
        for step in range(1, max(steps) + 1):
            rows = [episode.actions[min(step, episode.num_steps) - 1] for episode in padded]
            *_, info = env.step(torch.stack(rows).to(env.device))
            for i, hit in enumerate(info["success"].tolist()[: len(group)]):
                if hit and first[i] is None and step <= steps[i]:
                    first[i] = step
            if step % stride == 0:
                _keep(env, frames, [step <= limit for limit in steps], size_px)
            done += sum(step <= limit for limit in steps)
            if on_step is not None:
                on_step(done, total)
        clips += [
            Clip(
                seed=episode.seed,
                frames=np.stack(frames[i]),
                success_frame=_frame_of(first[i], stride, len(frames[i])),
                first_success_step=first[i],
                same_outcome=first[i] == episode.first_success_step,
            )
            for i, episode in enumerate(group)
        ]
    return clips


def tiled(clips: Sequence[Clip], *, columns: int = 3) -> Iterator[np.ndarray]:
    """Yield pictures [rows * Y, columns * X, 3] with all clips side by side; shorter clips hold their last picture."""
    length = max(len(clip.frames) for clip in clips)
    rows = -(-len(clips) // columns)
    height, width = clips[0].frames.shape[1:3]
    for k in range(length):
        canvas = np.zeros((rows * height, columns * width, 3), np.uint8)
        for i, clip in enumerate(clips):
            y, x = (i // columns) * height, (i % columns) * width
            canvas[y : y + height, x : x + width] = decorate(clip, k)
        yield canvas


def decorate(clip: Clip, k: int) -> np.ndarray:
    """Return picture `k` of `clip` with its seed and, once known, its outcome: a green or a red border."""
    over = k >= len(clip.frames) - 1
    image = Image.fromarray(clip.frames[min(k, len(clip.frames) - 1)])
    draw = ImageDraw.Draw(image)
    size = image.width
    font = ImageFont.load_default(max(10, size // 17))
    text = f"seed {clip.seed}"
    colour = None
    if clip.success_frame is not None and k >= clip.success_frame:
        colour, text = GREEN, f"{text}   step {clip.first_success_step}"
    elif over and clip.success_frame is None:
        colour, text = RED, f"{text}   failed{clip.note}"
    pad = size // 32
    box = draw.textbbox((2 * pad, size - 2 * pad), text, font=font, anchor="ls")
    draw.rectangle((box[0] - pad, box[1] - pad, box[2] + pad, box[3] + pad), fill=(0, 0, 0))
    draw.text((2 * pad, size - 2 * pad), text, font=font, anchor="ls", fill=WHITE)
    if colour is not None:
        draw.rectangle((0, 0, size - 1, image.height - 1), outline=colour, width=max(2, size // 48))
    if colour == GREEN:
        _check_mark(draw, size)
    return np.asarray(image)


def write_mp4(path: Path, frames: Iterator[np.ndarray], *, fps: float) -> None:
    """Write H.264 with yuv420p and the index in front, which every browser plays.

    Raises:
        RobopolicyError: there are no frames.
    """
    first = next(frames, None)
    if first is None:
        raise RobopolicyError(f"No frames to write to {path}.")
    first = _even(first)
    writer = imageio_ffmpeg.write_frames(
        str(path),
        (first.shape[1], first.shape[0]),
        fps=fps,
        codec="libx264",
        pix_fmt_out="yuv420p",
        macro_block_size=2,
        quality=None,
        output_params=["-crf", "23", "-preset", "medium", "-movflags", "+faststart"],
        ffmpeg_log_level="error",
    )
    writer.send(None)
    try:
        writer.send(np.ascontiguousarray(first))
        for frame in frames:
            writer.send(np.ascontiguousarray(_even(frame)))
    finally:
        writer.close()


def write_png(path: Path, frame: np.ndarray) -> None:
    """Write one picture [Y, X, 3] uint8."""
    Image.fromarray(frame).save(path, optimize=True)


def write_gif(path: Path, clip: Clip, *, fps: float, hold_s: float = 1.0) -> None:
    """Write one clip as an endlessly repeating GIF, the last picture held for `hold_s`."""
    images = [
        Image.fromarray(decorate(clip, k)).quantize(128, dither=Image.Dither.NONE) for k in range(len(clip.frames))
    ]
    durations = [round(1000 / fps)] * (len(images) - 1) + [round(1000 * hold_s)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0, optimize=True)


def _shown_steps(episode: Episode, hold_steps: int) -> int:
    if episode.first_success_step is None:
        return episode.num_steps
    return min(episode.num_steps, episode.first_success_step + hold_steps)


def _frame_of(step: int | None, stride: int, num_frames: int) -> int | None:
    return None if step is None else min(-(-step // stride), num_frames - 1)


def _keep(env: Environment, frames: list[list[np.ndarray]], wanted: Sequence[bool], size_px: int) -> None:
    if not any(wanted):
        return
    pictures = env.render().cpu().numpy()
    for i, want in enumerate(wanted):
        if want:
            frames[i].append(_square(pictures[i], size_px))


def _square(picture: np.ndarray, size_px: int) -> np.ndarray:
    """Cut the middle square out of `picture` and scale it to `size_px`."""
    height, width = picture.shape[:2]
    side = min(height, width)
    y, x = (height - side) // 2, (width - side) // 2
    middle = Image.fromarray(picture[y : y + side, x : x + side])
    return np.asarray(middle.resize((size_px, size_px), Image.Resampling.LANCZOS))


def _even(frame: np.ndarray) -> np.ndarray:
    return frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]


def _check_mark(draw: ImageDraw.ImageDraw, size: int) -> None:
    right, top, unit = size - size // 14, size // 14, size / 24
    points = [(right - 3 * unit, top + 1.2 * unit), (right - 2 * unit, top + 2.2 * unit), (right, top)]
    draw.line(points, fill=GREEN, width=max(2, size // 48), joint="curve")
