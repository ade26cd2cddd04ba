"""What every policy is: two functions, a task, a timing and a normaliser."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import torch
from einops import reduce
from torch import Tensor, nn

from robopolicy.errors import RobopolicyError, ShapeError
from robopolicy.normalize import Normalizer
from robopolicy.rng import Rng
from robopolicy.timing import ChunkTiming
from robopolicy.types import Batch, Observation, TaskSpec, check_shape


class Policy(nn.Module, abc.ABC):
    """A map from a window of observations to a chunk of actions; holds weights and statistics, never rollout state.

    Public tensors are in environment units. `forward` is `loss`, so that wrapped (distributed) policies train alike.
    Training and evaluation mode (dropout, image crops) are the caller's to set.
    """

    action_low: Tensor
    action_high: Tensor

    def __init__(self, spec: TaskSpec, *, timing: ChunkTiming, discrete_scale: float = 1.0) -> None:
        super().__init__()
        self.spec = spec
        self.timing = timing
        self.norm = Normalizer(spec, discrete_scale=discrete_scale)
        self.register_buffer("action_low", torch.tensor(spec.action.low, dtype=torch.float32), persistent=False)
        self.register_buffer("action_high", torch.tensor(spec.action.high, dtype=torch.float32), persistent=False)
        self._shapes = {name: (timing.n_obs_steps, *m.shape) for name, m in spec.observation.items()}
        self.optional: frozenset[str] = frozenset()
        """Names of the modalities that may be missing: not in the observation, or NaN in some rows."""
        self._norm_is_known_fitted = False
        self.register_load_state_dict_post_hook(_fix_norm)

    @abc.abstractmethod
    def loss(self, batch: Batch, *, generator: Rng = None) -> Tensor:
        """Return the scalar training loss on `batch`."""

    @abc.abstractmethod
    def act(self, obs: Observation, *, guess: Tensor | None = None, generator: Rng = None) -> Tensor:
        """Return the chunk [B, H, A] in environment units, starting from `guess` [B, H, A] if given."""

    def network_calls(self) -> int:
        """Return how often the network runs per chunk without a guess; one unless a method says otherwise."""
        return 1

    def diagnose(self, obs: Observation) -> Mapping[str, Tensor]:
        """Return what the policy says of each row [B] of an observation before it plans; nothing unless it can."""
        return {}

    @property
    def num_stages(self) -> int:
        """How many parts of it are trained one after the other; see `nn.staged.Staged`."""
        return max((int(part.num_stages) for part in self._staged()), default=1)

    def set_stage(self, stage: int) -> None:
        """Let the parts of `stage` learn; those trained before stay as they are, and so does the normaliser.

        Raises:
            ValueError: there is no such stage.
        """
        if not 0 <= stage < self.num_stages:
            raise ValueError(f"stage must be in [0, {self.num_stages - 1}]; got {stage}.")
        for part in self._staged():
            part.set_stage(stage)
        self.norm.is_fixed = stage > 0

    @property
    def stage(self) -> int:
        return max((int(part.stage) for part in self._staged()), default=0)

    def check_saved(self, config: Mapping[str, Any]) -> None:
        """Raise RobopolicyError if this policy would give another meaning to the weights that were trained as `config`.

        Args:
            config: the policy's config as it was saved, before anything was changed on the command line.
        """

    def check_inputs(self, obs: Observation, guess: Tensor | None = None) -> None:
        """Raise unless the state modalities of `obs`, and `guess` [B, H, A] if given, are finite and of known shape.

        Raises:
            RobopolicyError: a value is not a number, or is infinite.
            ShapeError: `guess` is no chunk of each row.
        """
        for name, shape in self._shapes.items():
            value = self._window(obs, name, shape)
            if value.is_floating_point() and not bool(value.isfinite().all()):
                wrong = ~value.isfinite()
                if name in self.optional:
                    wrong &= ~value.isnan()
                    if not bool(wrong.any()):
                        continue
                rows = wrong.flatten(1).any(dim=1).nonzero().flatten().tolist()
                raise RobopolicyError(
                    f"Observation {name!r} has values that are not finite in row{'s' * (len(rows) > 1)} "
                    f"{', '.join(map(str, rows))}; a policy can only act on finite numbers."
                )
        if guess is not None:
            check_shape("guess", guess, "B H A", B=obs.batch_size, H=self.timing.horizon, A=self.spec.action.dim)
            if not bool(guess.isfinite().all()):
                raise RobopolicyError("The guess has values that are not finite; leave it out to plan anew.")

    def forward(self, batch: Batch, *, generator: Rng = None) -> Tensor:
        return self.loss(batch, generator=generator)

    @property
    def device(self) -> torch.device:
        return self.action_low.device

    def normalized(self, obs: Observation) -> dict[str, Tensor]:
        """Return the modalities of `obs` that the task names, in network units.

        Raises:
            RobopolicyError: a modality is missing, or the normaliser was never fitted.
            ShapeError: a modality is not the window that task and timing say.
        """
        self.require_fitted()
        return {name: self.norm.encode(name, self._window(obs, name, shape)) for name, shape in self._shapes.items()}

    def clip(self, action: Tensor) -> Tensor:
        """Return `action` [..., A] within the bounds of the controller; discrete dimensions stay continuous."""
        return torch.clamp(action, self.action_low, self.action_high)

    def require_fitted(self) -> None:
        """Raise RobopolicyError unless the normaliser knows its data."""
        if not self._norm_is_known_fitted:
            if not self.norm.is_fitted:
                raise RobopolicyError(
                    "The policy's normaliser has no statistics: call `policy.norm.fit(limits)` with the limits of the "
                    "training data, or load a checkpoint."
                )
            self._norm_is_known_fitted = True

    def _staged(self) -> list[Any]:
        return [part for part in self.children() if hasattr(part, "set_stage")]

    def _window(self, obs: Observation, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in obs.modalities:
            if name in self.optional and obs.modalities:
                return torch.full((obs.batch_size, *shape), torch.nan, device=self.device)
            raise RobopolicyError(f"The policy observes {name!r}; got only {', '.join(sorted(obs.modalities))}.")
        value = obs.modalities[name]
        if value.shape[1:] != shape:
            raise ShapeError(
                f"Observation {name!r} must be [B, {', '.join(map(str, shape))}], got {tuple(value.shape)}."
            )
        return value


def mean_square(error: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the mean square of `error` [B, H, A], over the steps `counted` [B, H] bool if that is given."""
    if counted is None:
        return error.square().mean()
    weight = counted.to(error.dtype)
    return (reduce(error.square(), "b h a -> b h", "mean") * weight).sum() / weight.sum().clamp_min(1.0)


def _fix_norm(policy: Policy, _: Any) -> None:
    """Fix the normaliser of a policy whose loaded weights are of a later stage."""
    policy.norm.is_fixed = policy.stage > 0
