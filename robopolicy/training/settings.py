"""How a policy is trained: every number that changes the result, checked together before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robopolicy.errors import UnknownNameError

PRECISIONS = ("no", "bf16", "fp16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The `train` group of configs/train.yaml, whose comments say what each setting does."""

    num_steps: int
    batch_size: int = 128
    lr: float = 1e-3
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: float = 1e-6
    warmup_steps: int = 500
    grad_clip: float | None = 1.0
    accumulate: int = 1
    ema_power: float = 0.75
    ema_max_decay: float = 0.9999
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = 1
    compile: bool = False
    val_fraction: float = 0.0
    validate_every: int = 1000
    log_every: int = 50
    save_every: int = 2000
    keep: int = 2
    stages: tuple[float, ...] | None = None
    early_stop: int | None = 3

    def __post_init__(self) -> None:
        if self.mixed_precision is False:  # YAML reads a bare `no` as false
            object.__setattr__(self, "mixed_precision", "no")
        if self.mixed_precision not in PRECISIONS:
            raise UnknownNameError("train.mixed_precision", str(self.mixed_precision), PRECISIONS)
        if self.device not in DEVICES:
            raise UnknownNameError("train.device", str(self.device), DEVICES)
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.stages is not None:
            object.__setattr__(self, "stages", tuple(self.stages))
            if not self.stages or not all(share > 0 for share in self.stages):
                raise ValueError(f"train.stages must be positive shares of num_steps; got {list(self.stages)}.")
        at_least_one = ("num_steps", "batch_size", "accumulate", "validate_every", "log_every", "save_every", "keep")
        for name in (*at_least_one, *(n for n in ("num_threads", "early_stop") if getattr(self, n) is not None)):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("lr", "grad_clip"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"train.{name} must be positive; got {getattr(self, name)}.")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"train.val_fraction must be in [0, 1); got {self.val_fraction}.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas must be two numbers in [0, 1); got {list(self.betas)}.")
