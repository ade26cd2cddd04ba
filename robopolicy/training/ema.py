"""Exponential moving average of the weights, with Diffusion Policy's warm-up: the policy that acts is the averaged one.

    decay(n) = min(max_decay, 1 - n ** -power)    for the n-th update, n = 1, 2, ...

With power 0.75 the decay is .968 after 100 updates, .994 after 1,000 and .999 after 10,000. `torch.optim.swa_utils` has
the same averaging, but counts updates in a tensor that must be read back from the device at each step; here the decay
is a function of the step, so the average needs no state beside its weights.
Source: EMAModel of github.com/real-stanford/diffusion_policy (inv_gamma 1, power 0.75, max_value 0.9999).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA:
    """Holds `policy`, the averaged copy: frozen, in evaluation mode, on the same device as the original.

    Weights of the original that do not learn are in the copy as they are.
    """

    def __init__(self, policy: nn.Module, *, power: float = 0.75, max_decay: float = 0.9999) -> None:
        if not (0 < power <= 1 and 0 <= max_decay <= 1):
            raise ValueError(f"EMA needs 0 < power <= 1 and 0 <= max_decay <= 1; got {power} and {max_decay}.")
        self.policy = copy.deepcopy(policy).eval().requires_grad_(False)
        self.power = power
        self.max_decay = max_decay
        self._names = {name for name, weight in policy.named_parameters() if weight.requires_grad}
        self._averaged = self._learning(self.policy)

    def decay(self, update: int) -> float:
        """Return the share of the old average that stays at the `update`-th update (the first is 1: nothing stays)."""
        return min(self.max_decay, 1.0 - update**-self.power)

    @torch.no_grad()
    def update(self, policy: nn.Module, update: int) -> None:
        """Move the average towards the weights of `policy`; `update` counts from 1. Buffers are copied."""
        torch._foreach_lerp_(self._averaged, self._learning(policy), 1.0 - self.decay(update))
        for mine, theirs in zip(self.policy.buffers(), policy.buffers(), strict=True):
            mine.copy_(theirs)

    def _learning(self, policy: nn.Module) -> list[Tensor]:
        return [weight for name, weight in policy.named_parameters() if name in self._names]
