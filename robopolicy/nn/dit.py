"""A diffusion transformer over action tokens, one token per step of the chunk, with adaLN-zero conditioning.

Peebles and Xie 2023 (arXiv:2212.09748): level and observation make the scale, shift and gate of every block; gates and
the output start at zero, so each block starts as the identity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from robopolicy.nn.layers import After, BlockNetwork, SinusoidalEmbedding, modulated_norm, zero_


class ChunkDiT(BlockNetwork):
    """Denoiser in which every action of the chunk attends to every other.

    Raises:
        ValueError: `width` is no multiple of `num_heads`.
    """

    HEAD = ("modulation", "out")

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        cond_dim: int,
        *,
        width: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        time_dim: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads={num_heads}; got {width}.")
        self.time = SinusoidalEmbedding(time_dim)
        self.cond = nn.Sequential(nn.Linear(time_dim + cond_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.into = nn.Linear(action_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(horizon, width))
        self.blocks = nn.ModuleList(_Block(width, num_heads, dropout) for _ in range(depth))
        self.modulation = zero_(nn.Linear(width, 2 * width))
        self.out = zero_(nn.Linear(width, action_dim))

    def condition(self, t: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
        """t [B], cond [B, D] -> modulation of each block [B, 6 W], then of the output [B, 2 W]."""
        c = self.cond(torch.cat([self.time(t), cond], dim=-1))
        layers = [block.get_submodule("modulation") for block in self.blocks]
        return tuple(layer(c) for layer in (*layers, self.modulation))

    def trunk(self, x: Tensor, *condition: Tensor, after: After | None = None) -> Tensor:
        """x [B, H, A] and what `condition` returned -> the tokens after the last block [B, H, W]."""
        h = self.into(x) + self.position
        for block, modulation in zip(self.blocks, condition[:-1], strict=True):
            h = block(h, modulation)
            if after is not None:
                h = after(h)
        return h

    def head(self, h: Tensor, *condition: Tensor) -> Tensor:
        """The tokens after the last block [B, H, W] -> [B, H, A]."""
        scale, shift = rearrange(condition[-1], "b (two w) -> two b 1 w", two=2)
        return self.out(modulated_norm(h, 1 + scale, shift))

    def injections(self) -> list[nn.Module]:
        width = self.into.out_features
        return [zero_(nn.Linear(width, width)) for _ in self.blocks]


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.modulation = zero_(nn.Linear(width, 6 * width))
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        """h [B, H, W], modulation [B, 6 W] -> [B, H, W]."""
        scale1, shift1, gate1, scale2, shift2, gate2 = rearrange(modulation, "b (six w) -> six b 1 w", six=6)
        q, k, v = rearrange(
            self.qkv(modulated_norm(h, 1 + scale1, shift1)),
            "b h (three n d) -> three b n h d",
            three=3,
            n=self.num_heads,
        )
        mixed = rearrange(F.scaled_dot_product_attention(q, k, v), "b n h d -> b h (n d)")
        h = torch.addcmul(h, gate1, self.project(mixed))
        return torch.addcmul(h, gate2, self.mlp(modulated_norm(h, 1 + scale2, shift2)))
