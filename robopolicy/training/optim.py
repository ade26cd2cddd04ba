"""AdamW and a learning rate that is a pure function of the step, so that it needs no state in a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def make_optimizer(
    policy: nn.Module, *, lr: float = 1e-3, betas: tuple[float, float] = (0.95, 0.999), weight_decay: float = 1e-6
) -> torch.optim.AdamW:
    """Return a fused AdamW over the trainable weights.

    Fused costs under half of the default on one or two CPU cores (1.6 against 3.8 ms for 1.2 M weights).
    """
    groups: Any = getattr(policy, "param_groups", None)  # a policy may give some of its weights a rate of their own
    weights = (
        groups(lr=lr, weight_decay=weight_decay) if groups else [p for p in policy.parameters() if p.requires_grad]
    )
    return torch.optim.AdamW(weights, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)


def cosine_with_warmup(step: int, *, num_steps: int, warmup_steps: int) -> float:
    """Return the factor on the learning rate at `step` (from 0): a linear rise over `warmup_steps`, then half a cosine.

    The rise takes at most half of `num_steps`, so that very short runs still train.
    """
    warmup = min(warmup_steps, num_steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, num_steps - warmup))))


def make_scheduler(
    optimizer: torch.optim.Optimizer, *, num_steps: int, warmup_steps: int = 500, start_step: int = 0
) -> LambdaLR:
    """Return the cosine schedule, standing at `start_step`."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group.get("initial_lr", group["lr"])

    def factor(step: int) -> float:
        return cosine_with_warmup(step, num_steps=num_steps, warmup_steps=warmup_steps)

    return LambdaLR(optimizer, factor, last_epoch=start_step - 1)


def optimizer_tensors(optimizer: torch.optim.Optimizer, policy: nn.Module) -> dict[str, Tensor]:
    """Return the optimiser's moments as `<weight>|<moment>`, for safetensors."""
    names = {id(p): name for name, p in policy.named_parameters()}
    return {
        f"{names[id(p)]}|{key}": value
        for group in optimizer.param_groups
        for p in group["params"]
        for key, value in optimizer.state[p].items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, policy: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set the moments that `optimizer_tensors` returned.

    Raises:
        KeyError: `tensors` belong to another policy.
    """
    names = {id(p): name for name, p in policy.named_parameters()}
    by_weight: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        weight, moment = key.rsplit("|", 1)
        by_weight.setdefault(weight, {})[moment] = value.clone()
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    if set(by_weight) != set(ordered):
        raise KeyError(f"moments of {sorted(set(by_weight) ^ set(ordered))[:3]} do not match the weights")
    state = {index: by_weight[name] for index, name in enumerate(ordered)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
