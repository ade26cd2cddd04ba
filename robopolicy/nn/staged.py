"""Modules whose parts are trained one after the other, what is trained staying as it is from then on."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Staged(nn.Module, abc.ABC):
    """Has stacks 0, 1, ...; in stage k, stack k learns, those before it are frozen, those after it are not used.

    Frozen means: no gradients, and evaluation mode even where the rest trains (no dropout, no random crops). The stage
    travels with the weights.
    """

    stage_reached: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("stage_reached", torch.tensor(0))
        self._stage = 0

    @abc.abstractmethod
    def stacks(self) -> Sequence[Sequence[nn.Module]]:
        """Return the modules that learn in each stage."""

    @property
    def num_stages(self) -> int:
        return len(self.stacks())

    @property
    def stage(self) -> int:
        return self._stage

    def set_stage(self, stage: int) -> None:
        """Let stack `stage` learn and freeze all others."""
        if not 0 <= stage < self.num_stages:
            raise ValueError(f"stage must be in [0, {self.num_stages - 1}]; got {stage}.")
        self._stage = stage
        self.stage_reached.fill_(stage)
        for index, modules in enumerate(self.stacks()):
            for module in modules:
                module.requires_grad_(index == stage)
        self.train(self.training)

    def train(self, mode: bool = True) -> Staged:
        super().train(mode)
        for modules in self.stacks()[: self._stage]:
            for module in modules:
                module.eval()
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._stage = int(self.stage_reached)
        self.train(self.training)
