"""Parts shared by the denoising networks."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn

NUM_TABLE_LEVELS = 1000
"""Integer levels below this are looked up; schedules have 100 of them."""

MOST_ROWS_AHEAD = 512
"""Rows (levels times batch) that are worked out ahead at once: beyond this one product gains nothing more."""


Layer = TypeVar("Layer", nn.Linear, nn.Conv1d)

After = Callable[[Tensor], Tensor]
"""The stream after a block -> the stream to go on with, of the same shape."""


class ChunkNetwork(nn.Module, abc.ABC):
    """A denoiser in two parts: what follows from level and observation alone, and what needs the chunk.

    The first part's weights (37 % of the default MLP's) need not be read anew at every denoising step.
    """

    @abc.abstractmethod
    def condition(self, t: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
        """t [B], cond [B, D] -> tensors of [B, ...] for `denoise`."""

    @abc.abstractmethod
    def denoise(self, x: Tensor, *condition: Tensor) -> Tensor:
        """x [B, H, A] and what `condition` returned -> [B, H, A]."""

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """x [B, H, A], t [B], cond [B, D] -> [B, H, A]."""
        return self.denoise(x, *self.condition(t, cond))

    def ahead(self, levels: Tensor, cond: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield for each of `levels` [K] the map x -> `self(x, level, cond)`; many levels share one product."""
        batch = len(cond)
        for some in levels.split(max(1, MOST_ROWS_AHEAD // batch)):
            level = repeat(some, "k -> (k b)", b=batch)
            together = self.condition(level, repeat(cond, "b d -> (k b) d", k=len(some)))
            for parts in zip(*(part.split(batch) for part in together), strict=True):
                yield functools.partial(_apply, self.denoise, parts)


class BlockNetwork(ChunkNetwork):
    """A denoiser in blocks around one stream of activations, which another network may add to after every block."""

    HEAD: ClassVar[tuple[str, ...]] = ("out",)
    """Names of the modules that only `head` uses."""

    @abc.abstractmethod
    def trunk(self, x: Tensor, *condition: Tensor, after: After | None = None) -> Tensor:
        """x [B, H, A] and what `condition` returned -> the stream after the last block.

        Args:
            after: called with the stream after every block, in order; its result goes on instead.
        """

    @abc.abstractmethod
    def head(self, h: Tensor, *condition: Tensor) -> Tensor:
        """The stream after the last block -> [B, H, A]."""

    @abc.abstractmethod
    def injections(self) -> list[nn.Module]:
        """Return a new layer per block, from this stream to one of the same shape, that outputs zeros at first."""

    def drop_head(self) -> None:
        """Remove the weights that only `head` uses; `trunk` is what remains."""
        for name in self.HEAD:
            setattr(self, name, nn.Identity())

    def denoise(self, x: Tensor, *condition: Tensor) -> Tensor:
        """x [B, H, A] and what `condition` returned -> [B, H, A]."""
        return self.head(self.trunk(x, *condition), *condition)


def ahead(
    network: Callable[[Tensor, Tensor, Tensor], Tensor], levels: Sequence[float], cond: Tensor
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield for each of `levels` the map x -> network(x, level, cond), at little cost each where the network allows."""
    rows = torch.tensor(levels, device=cond.device)
    if isinstance(network, ChunkNetwork):
        yield from network.ahead(rows, cond)
    else:
        for row in rows:
            yield functools.partial(_call, network, row.expand(len(cond)), cond)


def _apply(denoise: Callable[..., Tensor], parts: Sequence[Tensor], x: Tensor) -> Tensor:
    return denoise(x, *parts)


def _call(network: Callable[..., Tensor], t: Tensor, cond: Tensor, x: Tensor) -> Tensor:
    return network(x, t, cond)


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of a noise level, [B] -> [B, dim] (Vaswani et al. 2017, frequencies 1 to 1/10000).

    Integer levels are read from a table; float levels are computed, so a time in [0, 1] should be scaled up first.
    """

    frequencies: Tensor
    table: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"The embedding's width must be even and at least 4; got {dim}.")
        half = dim // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half) / (half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        levels = torch.arange(NUM_TABLE_LEVELS, dtype=torch.float32)
        self.register_buffer("table", self._waves(levels), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        if t.is_floating_point():
            return self._waves(t)
        return F.embedding(t, self.table)

    def _waves(self, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


def zero_(layer: Layer) -> Layer:
    """Set `layer` to output zeros at first, so that a residual branch starts as the identity; return it."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def modulated_norm(h: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Return layer norm of `h` [..., W] without weights of its own, times `gain`, plus `shift`."""
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:]), gain)
