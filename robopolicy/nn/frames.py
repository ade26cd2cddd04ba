"""The networks of EBT-Policy (arXiv:2510.27545): one token per observed frame, one per action, an energy for output.

Published sizes: encoder of 8 blocks, width 256, 3.2 M parameters; energy network of 8 blocks, 5.4 M. For GPUs:
nn/energy.py has the networks that train on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from robopolicy.nn.energy import Readout, attention, check_readout, energy_head, log_scale, read_energy
from robopolicy.nn.image import ImageEncoder
from robopolicy.rng import Rng
from robopolicy.types import ModalitySpec


class RMSNorm(nn.Module):
    """x / RMS(x) times a gain, written out so that it can be derived twice."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps) * self.gain


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys.

    `cross`: keys and values come from elsewhere, already projected to 2 width.
    """

    def __init__(self, width: int, num_heads: int, dropout: float, *, cross: bool = False) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads={num_heads}; got {width}.")
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = None if cross else nn.Linear(width, 2 * width, bias=False)
        self.norm_query, self.norm_key = RMSNorm(width // num_heads), RMSNorm(width // num_heads)
        self.project = nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor, mask: Tensor | None = None, key_value: Tensor | None = None) -> Tensor:
        """h [B, T, W], key_value [B, S, 2 W], mask [T, S] added to the scores -> [B, T, W]."""
        if self.key_value is not None:
            key_value = self.key_value(h)
        assert key_value is not None
        q = rearrange(self.query(h), "b t (n d) -> b n t d", n=self.num_heads)
        k, v = rearrange(key_value, "b s (two n d) -> two b n s d", two=2, n=self.num_heads)
        dropout = self.dropout if self.training else 0.0
        mixed = attention(self.norm_query(q), self.norm_key(k), v, mask, dropout)
        projected: Tensor = self.project(rearrange(mixed, "b n t d -> b t (n d)"))
        return projected


def feed_forward(width: int) -> nn.Module:
    """Return the published blocks' feed-forward part, no wider inside than outside."""
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))


def sine_positions(length: int, width: int) -> Tensor:
    """Return [length, width] sines and cosines of the positions (Vaswani et al. 2017)."""
    half = width // 2
    angle = torch.arange(length)[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def causal(rows: int, columns: int) -> Tensor:
    """Return the mask [rows, columns] with which row i sees column j only if i >= j."""
    late = torch.arange(rows)[:, None] < torch.arange(columns)
    return torch.zeros(rows, columns).masked_fill(late, -torch.inf)


class FrameEncoder(nn.Module):
    """One token per frame from all its modalities, then pre-norm blocks in which a frame sees itself and earlier ones.

    Args:
        observation: the task's modalities, `TaskSpec.observation`.
        n_obs_steps: length O of the window.
        image: factory of the image encoder, called with the image's shape (C, Y, X); has `out_dim`.
    """

    mask: Tensor

    def __init__(
        self,
        observation: Mapping[str, ModalitySpec],
        n_obs_steps: int,
        *,
        width: int = 256,
        depth: int = 8,
        num_heads: int = 4,
        dropout: float = 0.3,
        image: Callable[[Sequence[int]], ImageEncoder] = ImageEncoder,
    ) -> None:
        super().__init__()
        self.states = tuple(name for name, spec in observation.items() if not spec.is_image)
        self.images = tuple(name for name, spec in observation.items() if spec.is_image)
        image_nets = {name.replace(".", "_"): image(observation[name].shape) for name in self.images}
        self.image_nets = nn.ModuleDict(image_nets)
        size = sum(observation[name].shape[-1] for name in self.states)
        size += sum(net.out_dim for net in image_nets.values())
        self.into = nn.Linear(size, width)
        self.position = nn.Parameter(0.02 * torch.randn(n_obs_steps, width))
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(2 * depth + 1))
        self.mixers = nn.ModuleList(Attention(width, num_heads, dropout) for _ in range(depth))
        self.mlps = nn.ModuleList(feed_forward(width) for _ in range(depth))
        self.register_buffer("mask", causal(n_obs_steps, n_obs_steps), persistent=False)
        self.out_dim = n_obs_steps * width

    def forward(self, modalities: Mapping[str, Tensor], *, generator: Rng = None) -> Tensor:
        """Return [B, O width], frame after frame, from normalised `modalities` [B, O, ...]."""
        parts = [modalities[name] for name in self.states]
        for name in self.images:
            parts.append(self.image_nets[name.replace(".", "_")](modalities[name], generator=generator))
        h = self.into(torch.cat(parts, dim=-1)) + self.position
        for i, (mix, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            h = h + mix(self.norms[2 * i](h), self.mask)
            h = h + mlp(self.norms[2 * i + 1](h))
        return rearrange(self.norms[-1](h), "b o w -> b (o w)")


class FrameEnergyTransformer(nn.Module):
    """Actions attend to each other and to the frames that are not later than they are; the energy is a mean of outputs.

    Args:
        frame_width: of the encoder's tokens; `cond` [B, O frame_width] holds them one after the other.

    Raises:
        ValueError: `cond_dim` is no multiple of `frame_width`.
    """

    positions: Tensor
    mask: Tensor

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        cond_dim: int,
        *,
        frame_width: int = 256,
        width: int = 256,
        depth: int = 8,
        num_heads: int = 4,
        dropout: float = 0.3,
        readout: Readout = "mean",
        scale_input: bool = False,
    ) -> None:
        super().__init__()
        check_readout(readout)
        if cond_dim % frame_width:
            raise ValueError(
                f"frame_width={frame_width} must divide the encoder's {cond_dim} features into frames: use a "
                "FrameEncoder of that width."
            )
        self.readout: Readout = readout
        self.frame_width, self.width = frame_width, width
        self.into = nn.Sequential(nn.Linear(action_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.scale = nn.Linear(1, width, bias=False) if scale_input else None
        self.key_value = nn.Linear(frame_width, depth * 2 * width, bias=False)  # of every block, at once
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(3 * depth + 1))
        self.selves = nn.ModuleList(Attention(width, num_heads, dropout) for _ in range(depth))
        self.crosses = nn.ModuleList(Attention(width, num_heads, dropout, cross=True) for _ in range(depth))
        self.mlps = nn.ModuleList(feed_forward(width) for _ in range(depth))
        self.out = energy_head(readout, width, action_dim)
        self.register_buffer("positions", sine_positions(horizon, width), persistent=False)
        self.register_buffer("mask", causal(horizon, cond_dim // frame_width), persistent=False)

    def context(self, cond: Tensor) -> Tensor:
        """cond [B, O frame_width] -> keys and values of every block, [B, O, depth 2 width]."""
        context: Tensor = self.key_value(rearrange(cond, "b (o w) -> b o w", w=self.frame_width))
        return context

    def forward(self, x: Tensor, context: Tensor, scale: Tensor | None = None) -> Tensor:
        """x [B, H, A], context [B, O, depth 2 width], scale [B] -> [B]."""
        h = self.into(x) + self.positions
        if self.scale is not None:
            h = h + self.scale(log_scale(x, scale))[:, None]
        seen = context.split(2 * self.width, dim=-1)
        for i, (mix, look, mlp) in enumerate(zip(self.selves, self.crosses, self.mlps, strict=True)):
            h = h + mix(self.norms[3 * i](h))
            h = h + look(self.norms[3 * i + 1](h), self.mask, seen[i])
            h = h + mlp(self.norms[3 * i + 2](h))
        return read_energy(self.readout, x, self.out(self.norms[-1](h)))
