"""From a window of normalised modalities to one conditioning vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from robopolicy.nn.image import ImageEncoder
from robopolicy.nn.screen import ModalityScreen, mark_missing, missing_rows
from robopolicy.rng import Rng
from robopolicy.types import ModalitySpec


class ObservationEncoder(nn.Module):
    """Concatenates every modality's window; images pass through a network of their own first.

    Args:
        observation: the task's modalities, `TaskSpec.observation`.
        n_obs_steps: length O of the window.
        use: names of the modalities to use; None uses all.
        state_width: if set, each state modality's window passes through an MLP of this width and output size.
        image: factory of the image encoder, called with the image's shape (C, Y, X); has `out_dim`.
        image_steps: how many images of a window are looked at, the newest ones; None for all. Images cost as many
            times more than everything else, and `proprio` tells the motion.
        optional: names of the modalities that may be missing in some rows, where they are NaN. Each has a column at
            the end that is 1 where it is missing and all else of it is 0: the weights of that column in the layer that
            follows are a learned null token.
        prioritised: instead of `optional`, names of the modalities that are always there, `rgb` for all cameras; all
            others are optional.
        screen: decides what counts as missing, `ModalityScreen` for example; called with (observation, n_obs_steps,
            optional=...). None believes everything that is no NaN.
    """

    def __init__(
        self,
        observation: Mapping[str, ModalitySpec],
        n_obs_steps: int,
        *,
        use: Sequence[str] | None = None,
        state_width: int | None = None,
        image: Callable[[Sequence[int]], ImageEncoder] = ImageEncoder,
        image_steps: int | None = 1,
        optional: Sequence[str] = (),
        prioritised: Sequence[str] | None = None,
        screen: Callable[..., ModalityScreen] | None = None,
    ) -> None:
        super().__init__()
        names = list(observation) if use is None else list(use)
        if not names or not set(names) <= set(observation):
            raise ValueError(
                f"Modalities to use must be some of {', '.join(observation)}; got {', '.join(names) or None}."
            )
        if prioritised is not None:
            optional = [n for n in names if n not in prioritised and n.partition(".")[0] not in prioritised]
        if not set(optional) <= set(observation):
            raise ValueError(f"optional must be some of {', '.join(observation)}; got {', '.join(optional)}.")
        self.image_steps = n_obs_steps if image_steps is None else image_steps
        if not 1 <= self.image_steps <= n_obs_steps:
            raise ValueError(f"image_steps must be in [1, {n_obs_steps}], the length of the window; got {image_steps}.")
        self.optional = tuple(name for name in optional if name in names)
        self.screen = screen(observation, n_obs_steps, optional=self.optional) if screen is not None else None
        self.states = tuple(name for name in names if not observation[name].is_image)
        self.images = tuple(name for name in names if observation[name].is_image)
        widths = {name: n_obs_steps * observation[name].shape[-1] for name in self.states}
        self.state_nets = nn.ModuleDict()
        if state_width is not None:
            for name in self.states:
                self.state_nets[_key(name)] = nn.Sequential(
                    nn.Linear(widths[name], state_width), nn.SiLU(), nn.Linear(state_width, state_width)
                )
                widths[name] = state_width
        image_nets = {_key(name): image(observation[name].shape) for name in self.images}
        self.image_nets = nn.ModuleDict(image_nets)
        image_width = sum(net.out_dim for net in image_nets.values())
        self.out_dim = sum(widths.values()) + self.image_steps * image_width + len(self.optional)

    def forward(self, modalities: Mapping[str, Tensor], *, generator: Rng = None) -> Tensor:
        """Return [B, out_dim] from normalised `modalities` [B, O, ...]; `generator` places crops in training."""
        if self.screen is not None:
            modalities = self.screen(modalities, generator=generator)
        missing = {name: missing_rows(modalities[name]) for name in self.optional}
        if missing:
            modalities = {n: _blank(v, missing[n]) if n in missing else v for n, v in modalities.items()}
        parts = []
        if self.state_nets:
            for name in self.states:
                features = self.state_nets[_key(name)](rearrange(modalities[name], "b o s -> b (o s)"))
                parts.append(_blank(features, missing[name]) if name in missing else features)
        elif self.states:
            windows = torch.cat([modalities[name] for name in self.states], dim=-1)
            parts.append(rearrange(windows, "b o s -> b (o s)"))
        for name in self.images:
            features = self.image_nets[_key(name)](modalities[name][:, -self.image_steps :], generator=generator)
            features = _blank(features, missing[name]) if name in missing else features
            parts.append(rearrange(features, "b o d -> b (o d)"))
        if missing:
            parts.append(torch.stack(list(missing.values()), dim=-1).to(parts[0].dtype))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]

    def without(self, modalities: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `modalities` with all optional ones missing in every row."""
        rows = torch.ones(len(next(iter(modalities.values()))), dtype=torch.bool)
        return {n: mark_missing(v, rows.to(v.device)) if n in self.optional else v for n, v in modalities.items()}


def _blank(value: Tensor, rows: Tensor) -> Tensor:
    """Return `value` [B, ...] with zeros in `rows` [B] bool."""
    return torch.where(rows.view(-1, *[1] * (value.ndim - 1)), 0.0, value)


def _key(name: str) -> str:
    return name.replace(".", "_")
