"""A picture of what an energy policy sees: its energy on a plane of chunks, and descents across it.

Several descents start from noise. The plane holds the solution of the first, its start, and the solution that lies
farthest from it: another mode where there is one. Other paths are shown as their shadows on it.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor

from robopolicy.atomic import write_file
from robopolicy.rng import Rng
from robopolicy.types import Observation

NUM_DESCENTS = 16
GRID = 61
MARGIN = 0.5
"""Share of the span of what is shown that is added on each side."""
LEAST_SPAN = 2.0
"""Of a picture whose descents all end in one point, before the margin; distances are norms over the whole chunk."""


class Descends(Protocol):
    """A policy that finds chunks by descent on an energy: EnergyPolicy."""

    def descent_path(
        self, obs: Observation, *, generator: Rng = None
    ) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]: ...


def save_landscape(policy: Descends, obs: Observation, path: Path, *, generator: Rng = None) -> Path:
    """Draw the landscape of the first observation of `obs` [B, O, ...] to `path` (PNG); return `path`.

    Needs NUM_DESCENTS descents and GRID^2 energies: about a second on a CPU.
    """
    write_file(path, draw_landscape(policy, obs, generator=generator))
    return path


def draw_landscape(policy: Descends, obs: Observation, *, generator: Rng = None) -> bytes:
    """Return the PNG that `save_landscape` writes."""
    one = obs.take(torch.zeros(NUM_DESCENTS, dtype=torch.int64))
    iterates, _ = policy.descent_path(one, generator=generator)
    _, energy = policy.descent_path(obs.take(torch.zeros(1, dtype=torch.int64)), generator=generator)
    paths = rearrange(torch.stack(iterates), "k n h a -> n k (h a)").float().cpu()
    origin, axes = plane(paths)
    flat = (paths - origin) @ axes.T  # [N, K, 2]
    u, v = (_range(flat[..., i], flat[:, -1, i]) for i in (0, 1))
    mesh = torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)
    chunks = rearrange(origin + mesh @ axes, "y x (h a) -> (y x) h a", h=iterates[0].shape[1])
    levels = rearrange(energy(chunks.to(iterates[0].device)).float().cpu(), "(y x) -> y x", y=GRID)
    along = torch.stack([energy(x).float().cpu() for x in iterates])  # [K, N]
    return _draw(u, v, levels, flat, along)


def plane(paths: Tensor) -> tuple[Tensor, Tensor]:
    """Return a point [D] and two orthonormal directions [2, D] of the plane to show, from `paths` [N, K, D].

    The point is the first path's end; the directions lead to the farthest other end and to the first path's start.
    """
    ends = paths[:, -1]
    away = ends[(ends - ends[0]).norm(dim=-1).argmax()] - ends[0]
    back = paths[0, 0] - ends[0]
    if away.norm() < 1e-3 * back.norm():  # all descents end alike: any other direction will do
        away = paths[-1, 0] - ends[0]
    first = away / away.norm().clamp_min(1e-12)
    back = back - (back @ first) * first
    return ends[0], torch.stack([first, back / back.norm().clamp_min(1e-12)])


def _range(points: Tensor, ends: Tensor) -> Tensor:
    """Return GRID coordinates that span all ends and, from its first landing on, the first path, with a margin."""
    shown = torch.cat([points[0, 1:], ends])
    low, high = shown.min(), shown.max()
    pad = MARGIN * (high - low).clamp_min(LEAST_SPAN)
    return torch.linspace(float(low - pad), float(high + pad), GRID)


def _draw(u: Tensor, v: Tensor, levels: Tensor, flat: Tensor, along: Tensor) -> bytes:
    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    bounds = np.quantile(levels.numpy(), np.linspace(0, 0.97, 24) ** 1.3)
    bounds = np.unique(bounds)
    if len(bounds) > 1:
        filled = left.contourf(u, v, levels, levels=bounds, cmap="viridis", extend="both")
        figure.colorbar(filled, ax=left, label="energy")
    for row in range(len(flat) - 1, -1, -1):
        main = row == 0
        left.plot(
            *flat[row].T,
            color="white",
            alpha=1.0 if main else 0.35,
            linewidth=1.8 if main else 0.8,
            marker="o",
            markersize=4 if main else 2,
        )
        right.plot(along[:, row], color="#f59e0b" if main else "#8a8f98", linewidth=1.8 if main else 0.8)
    left.plot(*flat[:, -1].T, linestyle="", marker="*", markersize=9, color="#f59e0b", label="solutions")
    left.set_xlim(float(u[0]), float(u[-1]))
    left.set_ylim(float(v[0]), float(v[-1]))
    left.set_xlabel("towards the farthest other solution")
    left.set_ylabel("towards the start of the bold descent")
    left.legend(loc="upper right", framealpha=0.6)
    right.set_xlabel("energy step")
    right.set_ylabel("energy")
    right.set_title("along each descent", fontsize="medium")
    left.set_title(f"{len(flat)} descents of one observation", fontsize="medium")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
