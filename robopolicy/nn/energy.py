"""Networks that give a chunk of actions an energy, and what their outputs have to do with it.

Only gradients of the energy are ever used, so everything here is smooth (SiLU, norms with eps), attention is written
out (fused kernels have no second derivative) and nothing is changed in place. `context` is worked out once per
observation; an energy step costs one forward pass of the rest and its gradient.

    read-out   energy                                                    its gradient at first
    mean       mean over the H x A outputs (as EBT-Policy has it)        0
    sum        sum over them; alpha_mean = H A alpha_sum                 0
    product    |x|^2 / 2 - <x, f(x)>, f the outputs                      x

With `product` one step of size 1 goes to `f + J^T x`: the outputs are the chunk itself, not the way to it, and an
energy learns about as fast as a network that predicts clean chunks (docs/ebt.md).
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from robopolicy.errors import UnknownNameError
from robopolicy.nn.layers import modulated_norm, zero_

Readout = Literal["mean", "sum", "product"]


class EnergyNetwork(Protocol):
    """What an energy policy asks of its network."""

    def context(self, cond: Tensor) -> Tensor:
        """Return what the energy needs of the observations `cond` [B, D]: a tensor [B, ...], rows pickable."""

    def __call__(self, x: Tensor, context: Tensor, scale: Tensor | None = None) -> Tensor:
        """x [B, H, A], context [B, ...], scale [B] (the RMS that x was divided by, if it was) -> energies [B]."""


def check_readout(kind: str) -> None:
    """Raise UnknownNameError unless `kind` is one of the three."""
    if kind not in get_args(Readout):
        raise UnknownNameError("energy read-out", kind, get_args(Readout))


def read_energy(kind: Readout, x: Tensor, outputs: Tensor) -> Tensor:
    """Return the energies [B] of chunks `x` from the network's `outputs`, both [B, ...] of one shape."""
    outputs, x = _full(outputs).flatten(1), _full(x).flatten(1)
    if kind == "product":
        return (x * (0.5 * x - outputs)).sum(dim=-1)
    return outputs.mean(dim=-1) if kind == "mean" else outputs.sum(dim=-1)


def energy_head(kind: Readout, width: int, out_dim: int) -> nn.Module:
    """Return the layers from hidden `width` to `out_dim` outputs; the last starts at zero.

    A sum of outputs needs a bend before its last layer and no bias in it: what adds a constant has no gradient.
    """
    if kind == "product":
        return zero_(nn.Linear(width, out_dim))
    last = nn.Linear(width, out_dim, bias=False)
    nn.init.zeros_(last.weight)
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), last)


class EnergyMLP(nn.Module):
    """The energy of the flattened chunk from a residual MLP, scaled and shifted by the observation (FiLM).

    The body of ChunkMLP without its noise level. About 1.6 M parameters at the default.
    """

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        cond_dim: int,
        *,
        width: int = 384,
        depth: int = 3,
        cond_width: int = 192,
        readout: Readout = "product",
        scale_input: bool = False,
    ) -> None:
        super().__init__()
        check_readout(readout)
        self.readout: Readout = readout
        self.width, self.depth = width, depth
        self.cond = nn.Sequential(
            nn.Linear(cond_dim, cond_width), nn.SiLU(), nn.Linear(cond_width, cond_width), nn.SiLU()
        )
        self.film = nn.Linear(cond_width, 2 * (depth + 1) * width)
        self.seen = nn.Linear(cond_dim, width)
        self.into = nn.Linear(horizon * action_dim, width, bias=False)
        self.scale = nn.Linear(1, width, bias=False) if scale_input else None
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.second = nn.ModuleList(zero_(nn.Linear(width, width)) for _ in range(depth))
        self.out = energy_head(readout, width, horizon * action_dim)

    def context(self, cond: Tensor) -> Tensor:
        """cond [B, D] -> gains, shifts and the observation's share of the input, [B, (2 (depth + 1) + 1) width]."""
        return torch.cat([self.film(self.cond(cond)), self.seen(cond)], dim=-1)

    def forward(self, x: Tensor, context: Tensor, scale: Tensor | None = None) -> Tensor:
        """x [B, H, A], context [B, ...], scale [B] -> [B]."""
        parts = context.split(self.width, dim=-1)
        gains, shifts, h = parts[: self.depth + 1], parts[self.depth + 1 : -1], parts[-1]
        flat = rearrange(x, "b h a -> b (h a)")
        h = h + self.into(flat)
        if self.scale is not None:
            h = h + self.scale(log_scale(x, scale))
        for i, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            h = h + second(F.silu(first(modulated_norm(h, 1 + gains[i], shifts[i]))))
        return read_energy(self.readout, flat, self.out(modulated_norm(h, 1 + gains[-1], shifts[-1])))


class EnergyTransformer(nn.Module):
    """The energy of a chunk from tokens of `patch` actions that attend to each other, with adaLN-zero conditioning.

    The base EBT's network (arXiv:2507.02092): a diffusion transformer (Peebles and Xie 2023) without noise level and
    with an energy for output. One token per action is usual; on a CPU few wide tokens are several times faster.

    Raises:
        ValueError: `width` is no multiple of `num_heads`, or the horizon none of `patch`.
    """

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        cond_dim: int,
        *,
        width: int = 128,
        depth: int = 3,
        num_heads: int = 4,
        mlp_ratio: float = 4.0,
        patch: int = 4,
        readout: Readout = "product",
        scale_input: bool = False,
    ) -> None:
        super().__init__()
        check_readout(readout)
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads={num_heads}; got {width}.")
        if patch < 1 or horizon % patch:
            raise ValueError(f"patch must divide the horizon of {horizon} actions; got {patch}.")
        self.readout: Readout = readout
        self.width, self.patch = width, patch
        self.cond = nn.Sequential(nn.Linear(cond_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.modulation = zero_(nn.Linear(width, (6 * depth + 2) * width))  # every block's and the output's, at once
        self.seen = nn.Linear(cond_dim, width)
        self.position = nn.Parameter(0.02 * torch.randn(horizon // patch, width))
        self.into = nn.Linear(action_dim * patch, width, bias=False)
        self.scale = nn.Linear(1, width, bias=False) if scale_input else None
        self.blocks = nn.ModuleList(_AdaptiveBlock(width, num_heads, int(mlp_ratio * width)) for _ in range(depth))
        self.out = energy_head(readout, width, action_dim * patch)

    def context(self, cond: Tensor) -> Tensor:
        """cond [B, D] -> modulations and the observation's share of the input, [B, 6 depth + 3, width]."""
        flat = torch.cat([self.modulation(self.cond(cond)), self.seen(cond)], dim=-1)
        return rearrange(flat, "b (k w) -> b k w", w=self.width)

    def forward(self, x: Tensor, context: Tensor, scale: Tensor | None = None) -> Tensor:
        """x [B, H, A], context [B, 6 depth + 3, width], scale [B] -> [B]."""
        patches = rearrange(x, "b (t p) a -> b t (p a)", p=self.patch)
        h = self.into(patches) + (self.position + context[:, -1:])
        if self.scale is not None:
            h = h + self.scale(log_scale(x, scale))[:, None]
        for i, block in enumerate(self.blocks):
            h = block(h, context[:, 6 * i : 6 * i + 6])
        gain, shift = context[:, -3:-1].split(1, dim=1)
        return read_energy(self.readout, patches, self.out(modulated_norm(h, 1 + gain, shift)))


class _AdaptiveBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        """h [B, T, W], modulation [B, 6, W] -> [B, T, W]."""
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.split(1, dim=1)
        q, k, v = rearrange(
            self.qkv(modulated_norm(h, 1 + scale1, shift1)),
            "b t (three n d) -> three b n t d",
            three=3,
            n=self.num_heads,
        )
        mixed = rearrange(attention(q, k, v), "b n t d -> b t (n d)")
        h = torch.addcmul(h, gate1, self.project(mixed))
        return torch.addcmul(h, gate2, self.mlp(modulated_norm(h, 1 + scale2, shift2)))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Return softmax(q k^T / sqrt(d) + mask) v for [B, N, T, D]; written out, so that it can be derived twice."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
    return torch.matmul(F.dropout(weights, dropout) if dropout else weights, v)


def _full(x: Tensor) -> Tensor:
    """Return `x` in at least float32: an energy is a sum of many small terms."""
    return x if x.dtype == torch.float64 else x.float()


def log_scale(x: Tensor, scale: Tensor | None) -> Tensor:
    """Return log `scale` [B] as a feature [B, 1]; 0 where `x` [B, ...] was not rescaled."""
    return x.new_zeros(len(x), 1) if scale is None else scale.log()[:, None]
