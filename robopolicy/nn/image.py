"""A small convolutional encoder for camera images: residual blocks with group norm, then spatial softmax.

Group norm rather than batch norm because the weights are averaged for evaluation (Chi et al. 2023, arXiv:2303.04137,
section 3.2); spatial softmax after Levine et al. 2016 (arXiv:1504.00702); random crops in training, the centre crop
otherwise. Here keypoints are told in coordinates of the whole image, not of the crop: in a picture of 64 x 64 a pixel
is 2 cm of table, and a crop that moved what it shows by three of them would hide where things are.

docs/rgb.md has what it costs, and what other sizes cost.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from robopolicy.rng import Rng, rand, randint

SHARPNESS = 16.0
"""What a map is multiplied with before its softmax. At 1 all keypoints of an untrained network lie in the middle of
every picture, and a policy has learned its demonstrations by heart before they begin to move."""
GAIN = 5.0
"""Of the last layer's initial weights: features of different pictures then differ by as much as states do."""
ERASED = (0.02, 0.33)
"""Area of an erased rectangle over that of the crop."""
STEM_PX = 32
"""The first layer's stride is such that its maps are at most this wide: the cost does not grow with the image."""


class ImageEncoder(nn.Module):
    """Images [B, O, C, Y, X] in [-1, 1] -> features [B, O, out_dim].

    All images of a window are cropped, erased and coloured alike, so that motion between them stays visible. Every
    second block halves the maps, the first one too: with three widths the maps of a 64 x 64 image are 29, 15 and 15
    wide.

    Args:
        shape: of an image, (C, Y, X).
        out_dim: size of the features.
        widths: channels of the stem and of each block.
        num_keypoints: maps in the spatial softmax.
        crop_fraction: side of the crop over the side of the image; 1 for no cropping.
        erase: share of the training rows in which a rectangle of one random colour covers 2 to 33 % of the crop (random
            erasing, arXiv:1708.04896).
        jitter: in training, each channel is scaled by a factor of its own, uniform in 1 - jitter to 1 + jitter.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        out_dim: int = 64,
        widths: Sequence[int] = (16, 32, 32),
        num_keypoints: int = 32,
        crop_fraction: float = 0.9,
        erase: float = 0.0,
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0.0 < crop_fraction <= 1.0:
            raise ValueError(f"crop_fraction must be in (0, 1]; got {crop_fraction}.")
        if not (0.0 <= erase <= 1.0 and 0.0 <= jitter < 1.0):
            raise ValueError(f"erase must be in [0, 1] and jitter in [0, 1); got {erase} and {jitter}.")
        self.erase, self.jitter = erase, jitter
        channels, height, width = (int(s) for s in shape)
        self.out_dim = out_dim
        self.size = (height, width)
        self.crop = (round(crop_fraction * height), round(crop_fraction * width))
        dims = [int(w) for w in widths]
        strides = [2 - number % 2 for number in range(len(dims) - 1)]
        first = max(2, -(-max(self.crop) // STEM_PX))
        self.stride = first
        for stride in strides:
            self.stride *= stride
        stem = nn.Sequential(
            nn.Conv2d(channels, dims[0], 2 * first + 1, stride=first, padding=first), _norm(dims[0]), nn.SiLU()
        )
        blocks = [_Block(i, o, stride=s) for (i, o), s in zip(itertools.pairwise(dims), strides, strict=True)]
        self.features = nn.Sequential(stem, *blocks, nn.Conv2d(dims[-1], num_keypoints, 1))
        self.features.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.out = nn.Linear(2 * num_keypoints, out_dim)
        with torch.no_grad():
            self.out.weight.mul_(GAIN)

    def forward(self, images: Tensor, *, generator: Rng = None) -> Tensor:
        steps = images.shape[1]
        if self.training:
            corners = random_corners(len(images), self.size, self.crop, generator=generator, device=images.device)
            images = cut(images, corners, self.crop)
            corners = corners.repeat_interleave(steps, dim=0)
            if self.jitter:
                images = scale_channels(images, self.jitter, generator=generator)
            if self.erase:
                images = erase_rectangles(images, self.erase, generator=generator)
        else:
            images = centre_crop(images, self.crop)
            top, left = ((have - want) // 2 for have, want in zip(self.size, self.crop, strict=True))
            corners = torch.tensor([[top, left]], device=images.device)
        images = rearrange(images, "b o c y x -> (b o) c y x").contiguous(memory_format=torch.channels_last)
        maps = self.features(images)
        points = in_whole_image(spatial_softmax(SHARPNESS * maps), corners, maps.shape[-2:], self.stride, self.size)
        return rearrange(self.out(points), "(b o) d -> b o d", o=steps)


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
    height, width = images.shape[-2:]
    return cut(
        images, random_corners(len(images), (height, width), size, generator=generator, device=images.device), size
    )


def random_corners(
    batch: int,
    image: tuple[int, int],
    size: tuple[int, int],
    *,
    generator: Rng = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return where crops of `size` begin in images of size `image`: top and left, [B, 2] int64, drawn per row."""
    # one draw per row, so that rows with their own generators stay independent
    drawn = randint(1 << 30, batch, 2, generator=generator, device=device)
    slack = torch.tensor([have - want + 1 for have, want in zip(image, size, strict=True)], device=drawn.device)
    return drawn % slack


def cut(images: Tensor, corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut [..., size] out of `images` [B, O, C, Y, X], from `corners` [B, 2] on."""
    device = images.device
    rows = corners[:, :1] + torch.arange(size[0], device=device)
    columns = corners[:, 1:] + torch.arange(size[1], device=device)
    batch = torch.arange(len(images), device=device)
    pieces = images[batch[:, None, None], :, :, rows[:, :, None], columns[:, None, :]]
    return rearrange(pieces, "b y x o c -> b o c y x")


def scale_channels(images: Tensor, size: float, *, generator: Rng = None) -> Tensor:
    """Return `images` [B, O, C, Y, X] in [-1, 1], channels scaled from black by 1 - size to 1 + size in each row."""
    drawn = rand(len(images), images.shape[2], generator=generator, device=images.device)
    factors = rearrange(1 + size * (2 * drawn - 1), "b c -> b 1 c 1 1")
    return ((images + 1) * factors - 1).clamp(-1, 1)


def erase_rectangles(images: Tensor, share: float, *, generator: Rng = None) -> Tensor:
    """Return `images` [B, O, C, Y, X] in [-1, 1] with a rectangle of one colour in a `share` of the rows.

    Random erasing (Zhong et al. 2017, arXiv:1708.04896): sides between 3 to 10 and 10 to 3, here one colour and always
    whole inside the image.
    """
    batch, _, channels, height, width = images.shape
    drawn = rand(batch, 5 + channels, generator=generator, device=images.device)
    chosen, area, ratio, top, left = drawn[:, :5].unbind(dim=1)
    area = ERASED[0] + (ERASED[1] - ERASED[0]) * area
    ratio = (10 / 3) ** (2 * ratio - 1)
    tall, wide = (height * (area * ratio).sqrt()).clamp(max=height), (width * (area / ratio).sqrt()).clamp(max=width)
    top, left = top * (height - tall), left * (width - wide)
    y = torch.arange(height, device=images.device) + 0.5
    x = torch.arange(width, device=images.device) + 0.5
    rows = (y >= top[:, None]) & (y < (top + tall)[:, None]) & (chosen < share)[:, None]
    columns = (x >= left[:, None]) & (x < (left + wide)[:, None])
    inside = rearrange(rows, "b y -> b 1 1 y 1") & rearrange(columns, "b x -> b 1 1 1 x")
    return torch.where(inside, rearrange(2 * drawn[:, 5:] - 1, "b c -> b 1 c 1 1"), images)


def in_whole_image(points: Tensor, corners: Tensor, maps: Sequence[int], stride: int, image: tuple[int, int]) -> Tensor:
    """Return keypoints of feature maps as places in the whole image, in [-1, 1]: [B, 2 K], first all x, then all y.

    Cell i of a map is centred on pixel `stride` i of the crop.

    Args:
        points: [B, 2 K], as `spatial_softmax` returns them.
        corners: [B, 2] or [1, 2], top and left of the crop.
        maps: height and width of the maps.
        image: height and width of the whole image.
    """
    x, y = points.chunk(2, dim=-1)
    top, left = corners[:, :1], corners[:, 1:]
    x = (2 * left + stride * (maps[1] - 1) * (x + 1)) / (image[1] - 1) - 1
    y = (2 * top + stride * (maps[0] - 1) * (y + 1)) / (image[0] - 1) - 1
    return torch.cat([x, y], dim=-1)
