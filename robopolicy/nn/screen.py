"""Which modalities of an observation are to be believed: absent ones, dropped ones, ones that contradict the rest.

A missing modality is a row of NaN. Whoever knows that a sensor is dead or too old writes NaN; in training some are
dropped at random, so that a network learns what to do then; and at run time `doubt` finds streams that have frozen,
jumped or turned into noise, without being told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from robopolicy.rng import Rng, randint, randn
from robopolicy.types import ModalitySpec

RESOLUTION = 0.01
"""Share of a dimension's half range below which a contradiction is not worth noting."""


def missing_rows(value: Tensor) -> Tensor:
    """Return which rows of a window [B, O, ...] have values that are NaN, [B] bool."""
    return value.isnan().flatten(1).any(dim=1)


def mark_missing(value: Tensor, rows: Tensor) -> Tensor:
    """Return `value` [B, O, ...] with the rows [B] bool filled with NaN."""
    return torch.where(rows.view(-1, *[1] * (value.ndim - 1)), torch.nan, value)


class ModalityScreen(nn.Module):
    """Marks modalities as missing, row by row.

    `doubt` of a modality: the window is predicted linearly from the trusted modalities' window, as in all the training
    data, and the error is measured by the covariance of the errors there (Mahalanobis), in units of its root mean
    square: 1 is usual. The moments are gathered while training; images are neither judged nor asked.

    Args:
        observation: the task's modalities.
        n_obs_steps: length O of the window.
        optional: names of the modalities that may be missing; the others are trusted.
        dropout: probability with which each optional modality of each training row is dropped.
        noise: name of a state modality to the standard deviation of white noise on it in training, in half ranges. With
            some on `proprio`, demonstrations cannot be told from each other by the joint angles they began with.
        doubt_above: at run time a modality with more doubt counts as missing; None believes everything.
    """

    count: Tensor
    total: Tensor
    products: Tensor

    def __init__(
        self,
        observation: Mapping[str, ModalitySpec],
        n_obs_steps: int,
        *,
        optional: Sequence[str],
        dropout: float = 0.0,
        noise: Mapping[str, float] | None = None,
        doubt_above: float | None = None,
    ) -> None:
        super().__init__()
        if not set(optional) <= set(observation):
            raise ValueError(f"optional must be some of {', '.join(observation)}; got {', '.join(optional)}.")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1); got {dropout}.")
        noise = dict(noise or {})
        states = [name for name, modality in observation.items() if not modality.is_image]
        if not set(noise) <= set(states) or not all(size >= 0.0 for size in noise.values()):
            raise ValueError(f"noise must be of some of {', '.join(states)} and not negative; got {noise}.")
        if doubt_above is not None and not doubt_above > 0.0:
            raise ValueError(f"doubt_above must be positive; got {doubt_above}.")
        self.optional = tuple(optional)
        self.dropout = dropout
        self.noise = noise
        self.doubt_above = doubt_above
        self.trusted = tuple(name for name in states if name not in optional)
        self.judged = tuple(name for name in states if name in optional) if self.trusted else ()
        widths = {name: n_obs_steps * observation[name].shape[-1] for name in states}
        sizes = [sum(widths[name] for name in self.trusted), *(widths[name] for name in self.judged)]
        self._ends = torch.tensor(sizes).cumsum(0).tolist()
        dim = self._ends[-1]
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(dim, dtype=torch.float64))
        self.register_buffer("products", torch.zeros(dim, dim, dtype=torch.float64))
        for name in self.judged:  # worked out from the three above, whenever evaluation begins
            self.register_buffer(f"{name}_predict", torch.zeros(widths[name], sizes[0]), persistent=False)
            self.register_buffer(f"{name}_offset", torch.zeros(widths[name]), persistent=False)
            self.register_buffer(f"{name}_whiten", torch.zeros(widths[name], widths[name]), persistent=False)

    def forward(self, modalities: Mapping[str, Tensor], *, generator: Rng = None) -> dict[str, Tensor]:
        """Return normalised `modalities` [B, O, ...] with NaN in the rows that are not to be believed."""
        found = dict(modalities)
        if self.training:
            self._gather(found)
            self._disturb(found, generator)
        elif self.doubt_above is not None:
            for name, doubt in self.doubts(found).items():
                found[name] = mark_missing(found[name], doubt > self.doubt_above)
        return found

    def doubts(self, modalities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return for each judged modality its rows' doubt [B]; NaN where the modality or a trusted one is missing."""
        if not self.judged:
            return {}
        trusted = _flat(modalities, self.trusted)
        found = {}
        for name in self.judged:
            predict, offset, whiten = (getattr(self, f"{name}_{part}") for part in ("predict", "offset", "whiten"))
            error = _flat(modalities, [name]) - offset - trusted @ predict.T
            found[name] = (error @ whiten.T).square().mean(dim=-1).sqrt()
        return found

    def report(self, modalities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return of each row [B] `missing_<name>`, 0 or 1, and `doubt_<name>` where it is judged."""
        found = self(modalities)
        said = {f"missing_{name}": missing_rows(found[name]).float() for name in self.optional}
        return said | {f"doubt_{name}": doubt for name, doubt in self.doubts(modalities).items()}

    def train(self, mode: bool = True) -> ModalityScreen:
        super().train(mode)
        if not mode:
            self._work_out()
        return self

    def _disturb(self, found: dict[str, Tensor], generator: Rng) -> None:
        """Drop some rows of what may be missing and add the noise, in place."""
        batch, device = len(next(iter(found.values()))), next(iter(found.values())).device
        if self.dropout:
            drawn = randint(1 << 24, batch, len(self.optional), generator=generator, device=device)
            for column, name in enumerate(self.optional):
                found[name] = mark_missing(found[name], drawn[:, column] < self.dropout * (1 << 24))
        for name, size in self.noise.items():
            if size:
                found[name] = found[name] + size * randn(*found[name].shape, generator=generator, device=device)

    @torch.no_grad()
    def _gather(self, modalities: Mapping[str, Tensor]) -> None:
        """Add a batch to the moments, leaving out rows where something is missing."""
        if not self.judged:
            return
        rows = _flat(modalities, (*self.trusted, *self.judged)).double()
        there = ~rows.isnan().any(dim=1)
        rows = torch.where(there[:, None], rows, 0.0)
        self.count += there.sum()
        self.total += rows.sum(dim=0)
        self.products += rows.T @ rows

    @torch.no_grad()
    def _work_out(self) -> None:
        """Find how the judged modalities follow from the trusted ones, and how well."""
        if float(self.count) < 2:
            return
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        first = self._ends[0]
        trusted = covariance[:first, :first]
        ridge = trusted + RESOLUTION**2 * torch.eye(first, device=mean.device)
        for name, begin, end in zip(self.judged, self._ends, self._ends[1:], strict=False):
            cross = covariance[begin:end, :first]
            predict = torch.linalg.solve(ridge, cross.T).T
            left = covariance[begin:end, begin:end] - predict @ (2 * cross.T - trusted @ predict.T)
            left = (left + left.T) / 2 + RESOLUTION**2 * torch.eye(end - begin, device=mean.device)
            values, vectors = torch.linalg.eigh(left)
            getattr(self, f"{name}_predict").copy_(predict)
            getattr(self, f"{name}_offset").copy_(mean[begin:end] - predict @ mean[:first])
            values = values.clamp_min(RESOLUTION**2)
            usual = (1 - RESOLUTION**2 / values).mean().clamp_min(1 / len(values))  # of the mean square, in the data
            getattr(self, f"{name}_whiten").copy_(vectors.T / (values * usual).sqrt()[:, None])


def _flat(modalities: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Return the windows of `names` side by side, [B, sum of O S]."""
    return torch.cat([rearrange(modalities[name], "b o s -> b (o s)") for name in names], dim=-1)
