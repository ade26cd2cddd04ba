"""Diffusion Policy's conditional 1-D UNet: convolutions along the chunk, level and observation by FiLM.

Chi et al. 2023 (arXiv:2303.04137), section 3.1, after Janner et al. 2022 (arXiv:2205.09991). Two residual blocks per
resolution, Mish, group norm; the finest skip is unused, as in the original.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from robopolicy.nn.layers import After, BlockNetwork, SinusoidalEmbedding, zero_


class ChunkUNet(BlockNetwork):
    """Denoiser that halves the chunk's time axis once per entry of `down_dims` after the first.

    Raises:
        ValueError: `horizon` cannot be halved that often, or a width is no multiple of `num_groups`.
    """

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        cond_dim: int,
        *,
        down_dims: Sequence[int] = (256, 512, 1024),
        kernel_size: int = 5,
        num_groups: int = 8,
        time_dim: int = 256,
    ) -> None:
        super().__init__()
        dims = [int(d) for d in down_dims]
        if not dims or horizon % 2 ** (len(dims) - 1):
            raise ValueError(
                f"horizon must be a multiple of {2 ** (len(dims) - 1)} for {len(dims)} down_dims; got {horizon}."
            )
        if wrong := [d for d in dims if d % num_groups]:
            raise ValueError(f"down_dims must be multiples of num_groups={num_groups}; got {wrong}.")

        def stage(into: int, out: int) -> _Stage:
            return _Stage(into, out, time_dim + cond_dim, kernel_size, num_groups)

        self.time = nn.Sequential(
            SinusoidalEmbedding(time_dim),
            nn.Linear(time_dim, 4 * time_dim),
            nn.Mish(),
            nn.Linear(4 * time_dim, time_dim),
        )
        pairs = list(zip([action_dim, *dims[:-1]], dims, strict=True))
        self.down = nn.ModuleList(stage(i, o) for i, o in pairs)
        self.shrink = nn.ModuleList(nn.Conv1d(d, d, 3, stride=2, padding=1) for d in dims[:-1])
        self.middle = stage(dims[-1], dims[-1])
        self.up = nn.ModuleList(stage(2 * o, i) for i, o in reversed(pairs[1:]))
        self.grow = nn.ModuleList(nn.ConvTranspose1d(d, d, 4, stride=2, padding=1) for d in reversed(dims[:-1]))
        self.out = nn.Sequential(
            _ConvBlock(dims[0], dims[0], kernel_size, num_groups), nn.Conv1d(dims[0], action_dim, 1)
        )

    def condition(self, t: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
        """t [B], cond [B, D] -> scale and shift of each residual block [B, 2 C], in the order of use."""
        c = torch.cat([self.time(t), cond], dim=-1)
        return tuple(block.film(c) for stage in self._stages() for block in (stage.first, stage.second))

    def trunk(self, x: Tensor, *condition: Tensor, after: After | None = None) -> Tensor:
        """x [B, H, A] and what `condition` returned -> the stream after the last block [B, C, H].

        What `after` makes of the second block of a resolution is also its skip.
        """
        films = iter(condition)
        h = rearrange(x, "b h a -> b a h")
        skips: list[Tensor] = []
        for i, down in enumerate(self.down):
            h = down(h, next(films), next(films), after)
            skips.append(h)
            if i < len(self.shrink):
                h = self.shrink[i](h)
        h = self.middle(h, next(films), next(films), after)
        for i, up in enumerate(self.up):
            h = h if i == 0 else self.grow[i - 1](h)
            h = up(torch.cat([h, skips.pop()], dim=1), next(films), next(films), after)
        return h

    def head(self, h: Tensor, *condition: Tensor) -> Tensor:
        """The stream after the last block [B, C, H] -> [B, H, A]."""
        h = self.grow[-1](h) if len(self.grow) else h
        return rearrange(self.out(h), "b a h -> b h a")

    def drop_head(self) -> None:
        super().drop_head()
        if len(self.grow):
            self.grow[-1] = nn.Identity()

    def injections(self) -> list[nn.Module]:
        widths = [stage.second.width for stage in self._stages() for _ in range(2)]
        return [zero_(nn.Conv1d(width, width, 1)) for width in widths]

    def _stages(self) -> Iterator[_Stage]:
        yield from itertools.chain(self.down, [self.middle], self.up)


class _ConvBlock(nn.Sequential):
    def __init__(self, into: int, out: int, kernel_size: int, num_groups: int) -> None:
        super().__init__(
            nn.Conv1d(into, out, kernel_size, padding=kernel_size // 2), nn.GroupNorm(num_groups, out), nn.Mish()
        )


class _Stage(nn.Module):
    """The two residual blocks of one resolution."""

    def __init__(self, into: int, out: int, cond_dim: int, kernel_size: int, num_groups: int) -> None:
        super().__init__()
        self.first = _FilmBlock(into, out, cond_dim, kernel_size, num_groups)
        self.second = _FilmBlock(out, out, cond_dim, kernel_size, num_groups)

    def forward(self, x: Tensor, film1: Tensor, film2: Tensor, after: After | None = None) -> Tensor:
        """x [B, C, H], each block's scale and shift [B, 2 C'] -> [B, C', H]."""
        for block, film in ((self.first, film1), (self.second, film2)):
            x = block(x, film)
            if after is not None:
                x = after(x)
        return x


class _FilmBlock(nn.Module):
    """Two convolutions with a scale and shift per channel between them, and a residual path."""

    def __init__(self, into: int, out: int, cond_dim: int, kernel_size: int, num_groups: int) -> None:
        super().__init__()
        self.width = out
        self.first = _ConvBlock(into, out, kernel_size, num_groups)
        self.second = _ConvBlock(out, out, kernel_size, num_groups)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, 2 * out))
        self.residual = nn.Conv1d(into, out, 1) if into != out else nn.Identity()

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """x [B, C, H], scale and shift [B, 2 C'] -> [B, C', H]."""
        scale, shift = rearrange(film, "b (two c) -> two b c 1", two=2)
        return self.second(torch.addcmul(shift, self.first(x), scale)) + self.residual(x)
