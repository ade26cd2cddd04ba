"""A small convolutional encoder for camera images: residual blocks with group norm, then spatial softmax.

Group norm rather than batch norm because the weights are averaged for evaluation (Chi et al. 2023, arXiv:2303.04137,
section 3.2); spatial softmax after Levine et al. 2016 (arXiv:1504.00702); random crops in training, the centre crop
otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from robopolicy.rng import Rng, randint


class ImageEncoder(nn.Module):
    """Images [B, O, C, Y, X] in [-1, 1] -> features [B, O, out_dim].

    `crop_fraction` is the side of the crop over the side of the image; 1 switches cropping off. All images of a
    window are cropped alike, so that motion between them stays visible.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        out_dim: int = 64,
        widths: Sequence[int] = (32, 64, 128),
        num_keypoints: int = 32,
        crop_fraction: float = 0.9,
    ) -> None:
        super().__init__()
        if not 0.0 < crop_fraction <= 1.0:
            raise ValueError(f"crop_fraction must be in (0, 1]; got {crop_fraction}.")
        channels, height, width = (int(s) for s in shape)
        self.out_dim = out_dim
        self.crop = (round(crop_fraction * height), round(crop_fraction * width))
        dims = [int(w) for w in widths]
        stem = nn.Sequential(nn.Conv2d(channels, dims[0], 5, stride=2, padding=2), _norm(dims[0]), nn.SiLU())
        blocks = [_Block(i, o, stride=2) for i, o in itertools.pairwise(dims)]
        self.features = nn.Sequential(stem, _Block(dims[0], dims[0]), *blocks, nn.Conv2d(dims[-1], num_keypoints, 1))
        self.out = nn.Linear(2 * num_keypoints, out_dim)

    def forward(self, images: Tensor, *, generator: Rng = None) -> Tensor:
        images = random_crop(images, self.crop, generator) if self.training else centre_crop(images, self.crop)
        maps = self.features(rearrange(images, "b o c y x -> (b o) c y x"))
        return rearrange(self.out(spatial_softmax(maps)), "(b o) d -> b o d", o=images.shape[1])


class _Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(into, out, 3, stride=stride, padding=1),
            _norm(out),
            nn.SiLU(),
            nn.Conv2d(out, out, 3, padding=1),
            _norm(out),
        )
        same = into == out and stride == 1
        self.residual = nn.Identity() if same else nn.Conv2d(into, out, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(self.residual(x) + self.branch(x))


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, channels // 16), channels)


def spatial_softmax(maps: Tensor) -> Tensor:
    """Return where each map's mass lies: [B, K, Y, X] -> [B, 2 K], first all x, then all y, each in [-1, 1]."""
    *_, height, width = maps.shape
    weight = rearrange(maps, "b k y x -> b k (y x)").softmax(dim=-1)
    weight = rearrange(weight, "b k (y x) -> b k y x", y=height)
    x = torch.linspace(-1, 1, width, device=maps.device, dtype=weight.dtype)
    y = torch.linspace(-1, 1, height, device=maps.device, dtype=weight.dtype)
    return torch.cat([weight.sum(dim=-2) @ x, weight.sum(dim=-1) @ y], dim=-1)


def centre_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the middle [..., size] out of `images` [..., Y, X]."""
    top, left = ((have - want) // 2 for have, want in zip(images.shape[-2:], size, strict=True))
    return images[..., top : top + size[0], left : left + size[1]]


def random_crop(images: Tensor, size: tuple[int, int], generator: Rng = None) -> Tensor:
    """Cut [..., size] out of `images` [B, O, C, Y, X] at a place drawn per row."""
    device, (height, width) = images.device, images.shape[-2:]
    # one draw per row, so that rows with their own generators stay independent
    place = randint(1 << 30, len(images), 2, generator=generator, device=device)
    top, left = place[:, 0] % (height - size[0] + 1), place[:, 1] % (width - size[1] + 1)
    rows = top[:, None] + torch.arange(size[0], device=device)
    columns = left[:, None] + torch.arange(size[1], device=device)
    batch = torch.arange(len(images), device=device)
    cut = images[batch[:, None, None], :, :, rows[:, :, None], columns[:, None, :]]
    return rearrange(cut, "b y x o c -> b o c y x")
