"""From a window of normalised modalities to one conditioning vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from robopolicy.nn.image import ImageEncoder
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
    """

    def __init__(
        self,
        observation: Mapping[str, ModalitySpec],
        n_obs_steps: int,
        *,
        use: Sequence[str] | None = None,
        state_width: int | None = None,
        image: Callable[[Sequence[int]], ImageEncoder] = ImageEncoder,
    ) -> None:
        super().__init__()
        names = list(observation) if use is None else list(use)
        if not names or not set(names) <= set(observation):
            raise ValueError(
                f"Modalities to use must be some of {', '.join(observation)}; got {', '.join(names) or None}."
            )
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
        self.out_dim = sum(widths.values()) + n_obs_steps * image_width

    def forward(self, modalities: Mapping[str, Tensor], *, generator: Rng = None) -> Tensor:
        """Return [B, out_dim] from normalised `modalities` [B, O, ...]; `generator` places crops in training."""
        parts = []
        if self.state_nets:
            for name in self.states:
                parts.append(self.state_nets[_key(name)](rearrange(modalities[name], "b o s -> b (o s)")))
        elif self.states:
            windows = torch.cat([modalities[name] for name in self.states], dim=-1)
            parts.append(rearrange(windows, "b o s -> b (o s)"))
        for name in self.images:
            features = self.image_nets[_key(name)](modalities[name], generator=generator)
            parts.append(rearrange(features, "b o d -> b (o d)"))
        return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]


def _key(name: str) -> str:
    return name.replace(".", "_")
