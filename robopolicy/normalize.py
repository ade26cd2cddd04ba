"""Scaling between environment units and the [-1, 1] range that networks see; part of the policy and its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from robopolicy.errors import RobopolicyError
from robopolicy.types import TaskSpec

Limits = Mapping[str, tuple[Tensor, Tensor]]
"""Modality name, or `action`, to its smallest and largest values in the data, each [S]."""

CONSTANT_BELOW = 1e-4
"""A dimension that moves less than this in all the data is constant: it maps to 0 and keeps its unit scale."""


class Normalizer(nn.Module):
    """Maps each dimension's range in the data to [-1, 1] and back; images are scaled from 0..255 without statistics.

    encode(x) = scale * x + offset, with scale and offset as buffers, so that they are saved with the weights.

    Args:
        spec: the modalities and the action.
        discrete_scale: discrete action dimensions are mapped to [-discrete_scale, discrete_scale] instead. What counts
            is what was fitted: once loaded, the buffers decide.
    """

    def __init__(self, spec: TaskSpec, *, discrete_scale: float = 1.0) -> None:
        super().__init__()
        if not 0.0 < discrete_scale <= 1.0:
            raise RobopolicyError(f"discrete_scale must be in (0, 1]; got {discrete_scale}.")
        self.discrete_scale = discrete_scale
        self.is_fixed = False
        """Whether `fit` is refused: something was trained on these statistics that is not trained any more."""
        self._discrete = torch.tensor(spec.action.discrete)
        self.sizes = {n: m.shape[-1] for n, m in spec.observation.items() if not m.is_image}
        self.sizes["action"] = spec.action.dim
        self.images = {n for n, m in spec.observation.items() if m.is_image}
        for name, size in self.sizes.items():
            self.register_buffer(f"{_key(name)}_scale", torch.full((size,), torch.nan))
            self.register_buffer(f"{_key(name)}_offset", torch.full((size,), torch.nan))

    def fit(self, limits: Limits) -> None:
        """Set scale and offset from the data's `limits`.

        Raises:
            RobopolicyError: a modality is missing, has another width, or holds values that are not finite; or the
                statistics are fixed.
        """
        if self.is_fixed:
            raise RobopolicyError(
                "The normaliser is fixed: an earlier stage of this policy was trained with it and is frozen; other "
                "statistics would move it without a word."
            )
        for name, size in self.sizes.items():
            if name not in limits:
                raise RobopolicyError(f"Normaliser needs the limits of {name!r}; got only {', '.join(sorted(limits))}.")
            low, high = (side.detach().double().cpu() for side in limits[name])
            if low.shape != (size,) or not torch.isfinite(torch.stack([low, high])).all():
                raise RobopolicyError(f"Limits of {name!r} must be {size} finite numbers; got {low}, {high}.")
            constant = high - low < CONSTANT_BELOW
            scale = torch.where(constant, torch.ones_like(low), 2.0 / (high - low).clamp_min(CONSTANT_BELOW))
            if name == "action":
                scale = torch.where(self._discrete, self.discrete_scale * scale, scale)
            self.get_buffer(f"{_key(name)}_scale").copy_(scale)
            self.get_buffer(f"{_key(name)}_offset").copy_(-scale * (low + high) / 2)

    @property
    def is_fitted(self) -> bool:
        return bool(torch.isfinite(self.get_buffer("action_scale")).all())

    def encode(self, name: str, value: Tensor) -> Tensor:
        """Map `value` [..., S] of modality `name` (or `action`) from environment units to network units."""
        if name in self.images:
            return value.float() / 127.5 - 1.0
        scale, offset = self._affine(name)
        return torch.addcmul(offset, value, scale)

    def decode(self, name: str, value: Tensor) -> Tensor:
        """Invert `encode`."""
        scale, offset = self._affine(name)
        return (value - offset) / scale

    def _affine(self, name: str) -> tuple[Tensor, Tensor]:
        key = _key(name)  # getattr rather than get_buffer, which takes most of the time of a batch of one
        return getattr(self, f"{key}_scale"), getattr(self, f"{key}_offset")


def _key(name: str) -> str:
    return name.replace(".", "_")
