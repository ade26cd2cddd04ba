"""The contract between the parts: what is observed, what is commanded, what a task is.

Axes, here and everywhere: B batch, N environments, O observation steps, H horizon (steps of an action chunk), S width
of a modality, A action dimensions, C Y X image. Public tensors are in environment units; a policy normalises by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from robopolicy.errors import ShapeError, SpecMismatchError

Frame = Mapping[str, Tensor]
"""One observation of N environments: modality name to [N, S] float32, or [N, C, Y, X] uint8 for `rgb.<camera>`."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A window of `O` consecutive observations, oldest first, one entry per modality."""

    modalities: Mapping[str, Tensor]
    """`proprio`, `objects`, ...: [B, O, S] float32, environment units; `rgb.<camera>`: [B, O, C, Y, X] uint8."""

    @property
    def batch_size(self) -> int:
        return len(next(iter(self.modalities.values())))

    def take(self, rows: Tensor) -> Observation:
        """Return the rows selected by `rows`, [B] bool or [K] int."""
        return Observation(modalities={name: value[rows] for name, value in self.modalities.items()})

    def to(self, device: torch.device | str) -> Observation:
        return Observation(modalities={n: v.to(device, non_blocking=True) for n, v in self.modalities.items()})


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Training windows: what was seen, what was done, and which of the actions lie outside the episode."""

    obs: Observation
    action: Tensor
    """[B, H, A] float32; index `n_obs_steps - 1` is the action taken at the newest observation."""
    is_pad: Tensor
    """[B, H] bool, true where the window hangs over the start or the end of its episode."""

    def to(self, device: torch.device | str) -> Batch:
        return Batch(obs=self.obs.to(device), action=self.action.to(device), is_pad=self.is_pad.to(device))


@dataclass(frozen=True, kw_only=True)
class ModalitySpec:
    """One modality of a single observation and where its values stand in ManiSkill's nested observation."""

    shape: tuple[int, ...]
    """(S,) for state, (C, Y, X) for a camera."""
    fields: Mapping[str, int]
    """`agent/qpos`-like paths in order, each with its width; concatenated they make the modality."""
    dtype: Literal["float32", "uint8"] = "float32"

    @property
    def is_image(self) -> bool:
        return self.dtype == "uint8"


@dataclass(frozen=True, kw_only=True)
class ActionSpec:
    """What each action dimension means; never inferred from how many there are."""

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    """Bounds of what the controller accepts, in action units (normalised controllers: -1 and 1)."""
    delta: tuple[bool, ...]
    """True where the value is an increment: zero means stay."""
    discrete: tuple[bool, ...]
    """True where only the ends of the range are meant (an open or closed gripper)."""
    units: tuple[str, ...]
    """Unit of the physical quantity: `m`, `rad`, `rad/s`."""
    physical_low: tuple[float, ...]
    physical_high: tuple[float, ...]
    """What `low` and `high` become at the controller, in `units`."""
    control_mode: str
    """ManiSkill's name of the controller, `pd_ee_delta_pos` for example."""
    control_dt_s: float
    delta_from: Literal["measured", "target", "none"] = "none"
    """What an increment is added to: the measured state or the previous target."""
    frame: str = "base"
    """Frame of Cartesian dimensions."""

    def __post_init__(self) -> None:
        for field in ("low", "high", "delta", "discrete", "units", "physical_low", "physical_high"):
            if len(getattr(self, field)) != len(self.names):
                raise ValueError(
                    f"ActionSpec.{field} must have one entry per name ({len(self.names)}: {', '.join(self.names)}); "
                    f"got {len(getattr(self, field))}."
                )

    @property
    def dim(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """Everything a policy must know of its task; travels inside every data set and every checkpoint."""

    name: str
    env_id: str
    robot: str
    instruction: str
    max_episode_steps: int
    observation: Mapping[str, ModalitySpec]
    action: ActionSpec

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskSpec:
        """Rebuild what `to_dict` wrote (JSON turns tuples into lists)."""
        tuples: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data["action"].items()}
        observation = {
            name: ModalitySpec(shape=tuple(m["shape"]), fields=dict(m["fields"]), dtype=m["dtype"])
            for name, m in data["observation"].items()
        }
        return cls(**{**data, "observation": observation, "action": ActionSpec(**tuples)})

    def differences(self, other: TaskSpec) -> list[str]:
        """Say in words where `other` observes or acts differently; instruction and episode length may differ."""
        mine, theirs = _flatten(self.to_dict()), _flatten(other.to_dict())
        free = {"instruction", "max_episode_steps", "name"}
        keys = [key for key in dict.fromkeys([*mine, *theirs]) if key not in free and mine.get(key) != theirs.get(key)]
        return [f"{key}: {mine.get(key, 'absent')} against {theirs.get(key, 'absent')}" for key in keys]

    def require_same(self, other: TaskSpec, *, mine: str, theirs: str) -> None:
        """Raise SpecMismatchError, naming `mine` and `theirs`, unless both observe and act alike."""
        if found := self.differences(other):
            raise SpecMismatchError(mine, theirs, found)


class Environment(Protocol):
    """A batch of N simulated environments behind gymnasium's vector call signatures, as torch tensors on one device."""

    spec: Any
    task_spec: TaskSpec
    num_envs: int

    @property
    def device(self) -> torch.device: ...

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frame, dict[str, Any]]:
        """Start new episodes, one seed each: the first state depends on the seed alone, not on N or the neighbours.

        `options["env_idx"]`, [K] int: only these environments.
        """

    def step(self, actions: Tensor) -> tuple[Frame, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Apply `actions` [N, A]; return frame, reward [N], terminated [N], truncated [N], info with `success` [N]."""

    def render(self) -> Tensor:
        """Return one picture per environment, [N, Y, X, 3] uint8."""

    def close(self) -> None: ...


def check_shape(what: str, value: Tensor, axes: str, **sizes: int) -> None:
    """Raise ShapeError unless `value` has the shape spelled by `axes`; axes without a size may have any.

    >>> check_shape("action", torch.zeros(64, 16, 7), "B H A", H=16, A=7)
    """
    names = axes.split()
    fits = value.ndim == len(names) and all(sizes.get(n, s) == s for n, s in zip(names, value.shape, strict=True))
    if not fits:
        wanted = ", ".join(f"{name}={sizes[name]}" if name in sizes else name for name in names)
        raise ShapeError(f"{what} must be [{wanted}], got {tuple(value.shape)}.")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= _flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = list(value) if isinstance(value, tuple) else value
    return out
