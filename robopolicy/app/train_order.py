"""Which modality should come first: each is tried alone, briefly, and judged by its loss on held-out episodes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

    from robopolicy.data import EpisodeStore
    from robopolicy.training.settings import TrainSettings

AUTO = "auto"
SHARE = 0.25
"""Of the run's steps, taken by each trial."""
MOST_STEPS = 1000
EVERYTHING = "(all of them)"


def wants_order(policy: Mapping[str, Any]) -> bool:
    """Return whether the policy's config asks for an order to be found."""
    encoder = policy.get("encoder")
    return isinstance(encoder, Mapping) and encoder.get("order") == AUTO


def choose_order(
    cfg: Mapping[str, Any],
    settings: TrainSettings,
    demos: EpisodeStore,
    held_out: EpisodeStore,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Return the policy's config with an order in place of `auto`, and print why.

    The modality from which alone the held-out chunks are best denoised comes first, all others are one set after it.

    Raises:
        RobopolicyError: there are several processes, which might choose differently.
    """
    from rich.console import Console
    from rich.table import Table

    from robopolicy.errors import RobopolicyError

    if accelerator.num_processes > 1:
        raise RobopolicyError("order=auto works in one process; find the order first, then give it to all.")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    names, steps = list(demos.spec.observation), max(1, min(MOST_STEPS, int(SHARE * settings.num_steps)))
    losses = {}
    for name in [*names, EVERYTHING]:
        with console.status(f"order: {steps} steps on {name} alone" if name != EVERYTHING else "order: the reference"):
            losses[name] = _trial(cfg, settings, demos, held_out, accelerator, [[name]] if name in names else [], steps)
    best = min(names, key=losses.__getitem__)
    table = Table(title=f"held-out loss after {steps} steps on one modality alone", title_justify="left")
    table.add_column("modality")
    table.add_column("val/loss", justify="right")
    for name in sorted(names, key=losses.__getitem__):
        table.add_row(name, f"{losses[name]:.4f}")
    table.add_row(EVERYTHING, f"{losses[EVERYTHING]:.4f}")
    console.print(table)
    rest = [name for name in names if name != best]
    console.print(
        f"order: {best} first, then {', '.join(rest) or 'nothing'}. What comes first should be what can be relied on "
        f"at run time, too: policy.encoder.order=[[{rest[0] if rest else best}]] would overrule this.",
        markup=False,
    )
    return {**cfg["policy"], "encoder": {**cfg["policy"]["encoder"], "order": [[best]]}}


def _trial(
    cfg: Mapping[str, Any],
    settings: TrainSettings,
    demos: EpisodeStore,
    held_out: EpisodeStore,
    accelerator: Accelerator,
    order: list[list[str]],
    steps: int,
) -> float:
    """Train the base of `order` alone for `steps`; return its loss on `held_out`."""
    import torch

    from robopolicy.app.build import build_policy
    from robopolicy.data import batches
    from robopolicy.training.ema import EMA
    from robopolicy.training.fit import validation_loss
    from robopolicy.training.loop import train
    from robopolicy.training.optim import make_optimizer, make_scheduler

    config = copy.deepcopy(dict(cfg["policy"]))
    config["encoder"] = {**config["encoder"], "order": order}
    torch.manual_seed(cfg["seed"])
    policy = build_policy(config, demos.spec).to(accelerator.device)
    policy.norm.fit(demos.limits())
    ema = EMA(policy, power=settings.ema_power, max_decay=settings.ema_max_decay)
    optimizer = make_optimizer(policy, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    how: Any = {key: cfg["data"][key] for key in ("action_padding", "pad_after")}
    how |= {"batch_size": settings.batch_size, "device": accelerator.device}
    train(
        policy,
        batches(demos, policy.timing, seed=cfg["seed"], **how),
        accelerator=accelerator,
        optimizer=optimizer,
        scheduler=make_scheduler(optimizer, num_steps=steps, warmup_steps=settings.warmup_steps),
        ema=ema,
        num_steps=steps,
        seed=cfg["seed"],
        grad_clip=float("inf") if settings.grad_clip is None else settings.grad_clip,
        log=lambda step, metrics: None,
        save=lambda step, window: None,
    )
    return validation_loss(ema.policy, batches(held_out, policy.timing, seed=0, **how))
