"""Perturbations of what arrives: observations that are lost, stuck, noisy or late, pictures, and actions that are late.

They need no simulator and work on any `Environment`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robopolicy.types import Environment, Frame, ModalitySpec

from .holding import hold_action
from .shifts_wrapper import Shifted

FREEZE_FROM = (5, 25)
"""Control step at which a stream stops, drawn per episode; the last value is excluded."""
RAD_PER_M = 2.0
"""Angles are disturbed by so many radians for each metre of noise: 1 cm goes with 0.02 rad, about a degree."""
NOISE_RATE_HZ = 10.0
"""Noise of a velocity over that of its position, as if it were the difference of two readings 0.1 s apart."""


def modalities_of(env: Environment, group: str) -> tuple[str, ...]:
    """Return the modalities that `group` means: itself, or all of `rgb.<camera>` for `camera`."""
    names = env.task_spec.observation
    return tuple(n for n in names if n == group or (group == "camera" and n.startswith("rgb.")))


class _Stream(Shifted):
    """Perturbs the modalities of one group."""

    def __init__(self, env: Environment, strength: float, *, name: str, group: str) -> None:
        super().__init__(env, strength, name=name)
        self.modalities = modalities_of(env, group)


class _Remembering(_Stream):
    """Shows what was there before, so that every picture must be drawn."""

    def skip_pictures(self, skip: bool) -> None:
        skips = getattr(self.env, "skip_pictures", None)
        if skips is not None:
            skips(skip and not any(name.startswith("rgb.") for name in self.modalities))


class Dropout(_Stream):
    """Each frame of the stream is lost with probability `strength`, and arrives as zeros (black)."""

    def show(self, name: str, value: Tensor, rows: Sequence[int], *, fresh: bool) -> Tensor:
        out = value[list(rows)]
        lost = [self.draws[row].random() < self.strength for row in rows]
        out[torch.tensor(lost)] = 0
        return out


class Freeze(_Remembering):
    """The stream stops for `strength` control steps, once in an episode: its last frame is repeated."""

    def __init__(self, env: Environment, strength: float, *, name: str, group: str) -> None:
        super().__init__(env, strength, name=name, group=group)
        self._from = np.zeros(env.num_envs, dtype=np.int64)

    def begin(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._from[row] = self.draws[row].integers(*FREEZE_FROM)

    def show(self, name: str, value: Tensor, rows: Sequence[int], *, fresh: bool) -> Tensor:
        out = value[list(rows)]
        since = self.steps[list(rows)] - self._from[list(rows)]
        stuck = torch.from_numpy((since > 0) & (since <= self.strength))
        if not fresh and bool(stuck.any()):
            out[stuck] = self._shown[name][list(rows)][stuck]
        return out


class Delay(_Remembering):
    """The stream shows what was there `strength` control steps ago; before that, the first frame."""

    def __init__(self, env: Environment, strength: float, *, name: str, group: str) -> None:
        super().__init__(env, strength, name=name, group=group)
        self._past: dict[str, Tensor] = {}

    def show(self, name: str, value: Tensor, rows: Sequence[int], *, fresh: bool) -> Tensor:
        chosen = list(rows)
        if name not in self._past:
            self._past[name] = value.expand(int(self.strength) + 1, *value.shape).clone()
        if fresh:
            self._past[name][:, chosen] = value[chosen]
        else:  # every row moves on
            self._past[name] = torch.cat([self._past[name][1:], value[None]])
        return self._past[name][0, chosen]


class Noise(_Stream):
    """White Gaussian noise on every frame: `strength` metres on lengths, angles and velocities in proportion."""

    def __init__(self, env: Environment, strength: float, *, name: str, group: str) -> None:
        super().__init__(env, strength, name=name, group=group)
        specs = env.task_spec.observation
        self._scale = {m: noise_scale(specs[m]) for m in self.modalities}
        self._quaternions = {m: _quaternions(specs[m]) for m in self.modalities}

    def show(self, name: str, value: Tensor, rows: Sequence[int], *, fresh: bool) -> Tensor:
        out = value[list(rows)]
        if self.strength == 0:  # renormalising would touch the last digit
            return out
        scale = self._scale[name]
        noise = np.stack([self.draws[row].standard_normal(len(scale)) * scale for row in rows])
        out = out + torch.from_numpy((self.strength * noise).astype(np.float32)).to(out.device)
        for first in self._quaternions[name]:
            part = out[:, first : first + 4]
            out[:, first : first + 4] = part / part.norm(dim=1, keepdim=True)
        return out


def noise_scale(spec: ModalitySpec) -> np.ndarray:
    """Return the noise [S] of each dimension for one metre of noise: 0 for flags, which are true or false."""
    parts = []
    for field, width in spec.fields.items():
        leaf = field.rpartition("/")[2]
        if width == 1 and leaf.startswith("is_"):
            part = np.zeros(width)
        elif leaf == "qpos" or "controller" in field:
            part = np.full(width, RAD_PER_M)
            part[7:] = 0.1 if leaf == "qpos" else RAD_PER_M  # fingers move by centimetres
        elif leaf == "qvel":
            part = np.full(width, RAD_PER_M * NOISE_RATE_HZ)
            part[7:] = 0.1 * NOISE_RATE_HZ
        elif leaf.endswith("pose"):
            part = np.array([1.0, 1.0, 1.0] + [RAD_PER_M / 2] * (width - 3))
        elif leaf.endswith("vel"):
            part = np.full(width, NOISE_RATE_HZ)
        else:
            part = np.ones(width)
        parts.append(part)
    return np.concatenate(parts)


def _quaternions(spec: ModalitySpec) -> list[int]:
    """Return where the quaternions of a modality begin."""
    found, at = [], 0
    for field, width in spec.fields.items():
        if field.endswith("pose") and width == 7:
            found.append(at + 3)
        at += width
    return found


class _Picture(_Stream):
    """Changes the pictures of all cameras in a way that stays the same throughout an episode."""

    def __init__(self, env: Environment, strength: float, *, name: str) -> None:
        super().__init__(env, strength, name=name, group="camera")
        self._drawn = np.zeros((env.num_envs, 3))

    def begin(self, rows: Sequence[int]) -> None:
        for row in rows:
            self._drawn[row] = self.draws[row].uniform(-1, 1, 3)

    def show(self, name: str, value: Tensor, rows: Sequence[int], *, fresh: bool) -> Tensor:
        out = value[list(rows)]
        for i, row in enumerate(rows):
            out[i] = self.paint(out[i], self._drawn[row], row)
        return out

    def paint(self, picture: Tensor, drawn: np.ndarray, row: int) -> Tensor:
        """Return the changed `picture` [C, Y, X] uint8; `drawn` [3] is uniform in [-1, 1], one draw per episode."""
        raise NotImplementedError


class Occlusion(_Picture):
    """A grey square covers the part `strength` of the picture."""

    def paint(self, picture: Tensor, drawn: np.ndarray, row: int) -> Tensor:
        _, height, width = picture.shape
        side = [round(length * self.strength**0.5) for length in (height, width)]
        y, x = (round((length - s) * (d + 1) / 2) for length, s, d in zip((height, width), side, drawn, strict=False))
        picture[:, y : y + side[0], x : x + side[1]] = 128
        return picture


class Brightness(_Picture):
    """All channels times 1 + `strength` or 1 - `strength`, by a coin."""

    def paint(self, picture: Tensor, drawn: np.ndarray, row: int) -> Tensor:
        return _scaled(picture, np.full(3, 1 + self.strength * (1 if drawn[0] > 0 else -1)))


class Colour(_Picture):
    """Each channel times its own factor, uniform in 1 - `strength` to 1 + `strength`."""

    def paint(self, picture: Tensor, drawn: np.ndarray, row: int) -> Tensor:
        return _scaled(picture, 1 + self.strength * drawn)


class PictureNoise(_Picture):
    """White Gaussian noise of `strength` grey levels of 255, new in every frame."""

    def paint(self, picture: Tensor, drawn: np.ndarray, row: int) -> Tensor:
        noise = self.draws[row].standard_normal(tuple(picture.shape), dtype=np.float32)
        out = picture.float() + self.strength * torch.from_numpy(noise).to(picture.device)
        return out.round().clamp(0, 255).to(torch.uint8)


def _scaled(picture: Tensor, factors: np.ndarray) -> Tensor:
    by = torch.tensor(factors, dtype=torch.float32, device=picture.device)[:, None, None]
    return (picture.float() * by).round().clamp(0, 255).to(torch.uint8)


class ActionDelay(Shifted):
    """What is commanded reaches the robot `strength` control steps later; until then it holds its place."""

    def __init__(self, env: Environment, strength: float, *, name: str) -> None:
        super().__init__(env, strength, name=name)
        self._queue: Tensor | None = None

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frame, dict[str, Any]]:
        frame, info = super().reset(seed=seed, options=options)
        rows = self._rows((options or {}).get("env_idx"))
        hold = hold_action(self.env)
        if self._queue is None:
            self._queue = hold.expand(int(self.strength), *hold.shape).clone()
        self._queue[:, rows] = hold[rows]
        return frame, info

    def command(self, actions: Tensor) -> Tensor:
        if self.strength == 0 or self._queue is None:
            return actions
        late = self._queue[0]
        self._queue = torch.cat([self._queue[1:], actions[None].to(late)])
        return late
