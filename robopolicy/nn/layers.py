"""Parts shared by the denoising networks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_TABLE_LEVELS = 1000
"""Integer levels below this are looked up; schedules have 100 of them."""


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


def zero_(layer: nn.Linear) -> nn.Linear:
    """Set `layer` to output zeros at first, so that a residual branch starts as the identity; return it."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def modulated_norm(h: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """Return layer norm of `h` [..., W] without weights of its own, times `gain`, plus `shift`."""
    return torch.addcmul(shift, F.layer_norm(h, h.shape[-1:]), gain)
