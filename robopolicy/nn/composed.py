"""Networks made of stacks that see more and more of the observation: factorised diffusion policies and their controls.

FDP (arXiv:2509.16830) fixes an order of the modalities. A base stack sees the first set; each further, residual stack
sees that set and all before it, and adds what they change. Stack k is trained in stage k, with those before it frozen.

    here                   paper
    stack 0, base          eps(x, t, y_p), observations that come first
    stack k > 0            eps_res(x, t, y), y all observations up to set k
    injection              Z_i, a layer that starts at zero

The sum of scores, log p(x | y) = log p(x | y_p) + log p(y_q | x, y_p) up to a constant, differentiated by x, makes the
residual's target a difference of two noise predictions. Noise, v and clean chunk follow from each other by an affine
map with the coefficients of the level (sampling/prediction.py), so a residual of one is, but for a factor, a residual
of another, and the composition needs no prediction of a certain kind.

    composition    stack k > 0 acts on the output                        in the residual weight w
    output         output + w * stack_k(x)                               affine
    block          after every block i of the base: h + w * Z_i(h_k)     not linear: w is no strength of guidance
    both           as block, and on the output as well                   not linear
    sum            (output_0 + sum of w_k output_k) / (1 + sum of w_k)   separately trained policies (arXiv:2503.12466)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from robopolicy.errors import UnknownNameError
from robopolicy.nn.encoder import ObservationEncoder
from robopolicy.nn.layers import BlockNetwork, ChunkNetwork, zero_
from robopolicy.nn.screen import ModalityScreen, missing_rows
from robopolicy.nn.staged import Staged
from robopolicy.rng import Rng
from robopolicy.types import ModalitySpec

Composition = Literal["output", "block", "both", "sum"]
Missing = Literal["base", "null"]
ALWAYS_KNOWN = ("proprio", "goal")
"""Modalities that do not depend on a sensor outside the robot."""


class ComposedEncoder(Staged):
    """Encodes the observation for each stack of a `ComposedNetwork`, each with an encoder of its own.

    Args:
        observation: the task's modalities, `TaskSpec.observation`.
        n_obs_steps: length O of the window.
        order: sets of modalities, the first prioritised. Modalities that are not named are a last set; no set at all
            is joint conditioning, one stack that sees everything. None puts first what no outer sensor measures:
            `proprio`, and `goal` where the task tells one and has more than these.
        encoder: factory of a stack's encoder, called with `use` and `optional`.
        screen: factory, see `ObservationEncoder`. With one, all modalities but the first set's may be missing.
        residual_weight: w at run time, one for all residual stacks or one for each; training always has 1.
        missing: what happens where something is missing: `base` leaves out the stacks that would see it (w = 0), so
            that nothing need have been learned for it; `null` relies on null tokens, learned by the screen's dropout.
        cumulative: each stack also sees the sets before its own; otherwise its own alone.
    """

    order: Tensor
    residual_weight: Tensor

    def __init__(
        self,
        observation: Mapping[str, ModalitySpec],
        n_obs_steps: int,
        *,
        order: Sequence[Sequence[str]] | None = None,
        encoder: Callable[..., ObservationEncoder] = ObservationEncoder,
        screen: Callable[..., ModalityScreen] | None = None,
        residual_weight: float | Sequence[float] = 1.0,
        missing: Missing = "base",
        cumulative: bool = True,
    ) -> None:
        super().__init__()
        self.sets = modality_sets(observation, order)
        if missing not in get_args(Missing):
            raise UnknownNameError("missing", missing, get_args(Missing))
        self.missing = missing
        self.cumulative = cumulative
        later = [name for some in self.sets[1:] for name in some]
        self.optional = tuple(later) if screen is not None else ()
        num_residuals = len(self.sets) - 1
        many = [residual_weight] * num_residuals if isinstance(residual_weight, int | float) else list(residual_weight)
        if len(many) != num_residuals:
            raise ValueError(f"residual_weight must be one number, or {num_residuals} of them; got {len(many)}.")
        self.register_buffer("residual_weight", torch.tensor([float(w) for w in many]), persistent=False)
        self.screen = screen(observation, n_obs_steps, optional=self.optional) if screen is not None else None
        self.encoders = nn.ModuleList()
        for k, own in enumerate(self.sets):
            use = [name for some in self.sets[:k] for name in some] + list(own) if cumulative else list(own)
            use = [name for name in observation if name in use]
            self.encoders.append(
                encoder(observation, n_obs_steps, use=use, optional=[n for n in use if n in self.optional])
            )
        self.widths = (num_residuals, *(int(e.out_dim) for e in self.encoders))  # type: ignore[arg-type]
        self.out_dim = sum(self.widths)
        place = {name: k for k, some in enumerate(self.sets) for name in some}
        self.register_buffer("order", torch.tensor([place[name] for name in observation]))
        self.set_stage(0)

    def stacks(self) -> Sequence[Sequence[nn.Module]]:
        return [[encoder] for encoder in self.encoders]

    def forward(self, modalities: Mapping[str, Tensor], *, generator: Rng = None) -> Tensor:
        """Return [B, D]: the weight of each residual stack, then what each stack up to the stage sees."""
        if self.screen is not None:
            modalities = self.screen(modalities, generator=generator)
        active = list(self.encoders)[: self.stage + 1]
        parts = [encoder(modalities, generator=generator) for encoder in active]
        return torch.cat([self._weights(modalities, parts[0]), *parts], dim=-1)

    def _weights(self, modalities: Mapping[str, Tensor], like: Tensor) -> Tensor:
        if self.training:
            return like.new_ones(len(like), len(self.sets) - 1)
        weights = self.residual_weight.to(like.dtype).expand(len(like), -1)
        if self.missing == "null" or not self.optional or len(self.sets) == 1:
            return weights
        gone = [torch.stack([missing_rows(modalities[n]) for n in some]).any(dim=0) for some in self.sets[1:]]
        if self.cumulative:  # a stack sees the sets before its own, too
            gone = list(itertools.accumulate(gone, torch.logical_or))
        return torch.where(torch.stack(gone, dim=-1), 0.0, weights)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        saved = state_dict.get(f"{prefix}order")
        if saved is not None and not torch.equal(saved.cpu(), self.order.cpu()):
            errors: list[str] = args[4] if len(args) > 4 else kwargs["error_msgs"]
            errors.append(
                f"the modalities were put in the sets {saved.tolist()} when the weights were trained, here in "
                f"{self.order.tolist()}: the order cannot be changed"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class ComposedNetwork(Staged, ChunkNetwork):
    """A base stack and residual stacks of the same architecture, for a `ComposedEncoder`.

    Args:
        widths: `ComposedEncoder.widths`.
        network: factory (action_dim, horizon, cond_dim) of a stack.
        composition: how residual stacks act, see the module's table. With one stack it has no meaning.
    """

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        widths: Sequence[int],
        *,
        network: Callable[[int, int, int], BlockNetwork],
        composition: Composition = "block",
    ) -> None:
        super().__init__()
        if composition not in get_args(Composition):
            raise UnknownNameError("composition", composition, get_args(Composition))
        if isinstance(widths, int):
            raise ValueError("A ComposedNetwork needs an encoder that encodes for several stacks, ComposedEncoder.")
        self.composition = composition
        self._splits = tuple(widths)
        self.networks = nn.ModuleList(network(action_dim, horizon, width) for width in widths[1:])
        self.injections = nn.ModuleList()
        for stack in list(self.networks)[1:]:
            assert isinstance(stack, BlockNetwork)
            if composition in ("block", "both"):
                self.injections.append(nn.ModuleList(stack.injections()))
            if composition == "block":
                stack.drop_head()
            elif composition in ("output", "both"):
                last: Any = getattr(stack, stack.HEAD[-1])
                tail: Any = last[-1] if isinstance(last, nn.Sequential) else last
                zero_(tail)
        self.set_stage(0)

    def stacks(self) -> Sequence[Sequence[nn.Module]]:
        modules: list[list[nn.Module]] = [[network] for network in self.networks]
        for own, injections in zip(modules[1:], self.injections, strict=False):
            own.append(injections)
        return modules

    def condition(self, t: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
        """t [B], cond [B, D] -> weights [B, K - 1] of the residual stacks, then each stack's own tensors."""
        used = self._splits[: self.stage + 2]
        weights, *parts = cond[:, : sum(used)].split(used, dim=-1)
        found = [weights]
        for network, part in zip(self._active(), parts, strict=True):
            found += network.condition(t, part)
        return tuple(found)

    def denoise(self, x: Tensor, *condition: Tensor) -> Tensor:
        """x [B, H, A] and what `condition` returned -> [B, H, A]."""
        weights, *rest = condition
        base, *residuals = self._active()
        size = len(rest) // (1 + len(residuals))
        own, *parts = (rest[begin : begin + size] for begin in range(0, len(rest), size))
        if self.composition == "sum":
            return self._sum(x, weights, [own, *parts])
        if self.composition == "output":
            out = base.denoise(x, *own)
            for k, (stack, part) in enumerate(zip(residuals, parts, strict=True)):
                out = out + _by_row(weights[:, k], out) * stack.denoise(x, *part)
            return out
        if not residuals:
            return base.denoise(x, *own)
        added, last = self._additions(x, weights, parts)
        following = iter(added)
        out = base.head(base.trunk(x, *own, after=lambda h: h + next(following)), *own)
        return out if last is None else out + last

    def _additions(
        self, x: Tensor, weights: Tensor, parts: Sequence[Sequence[Tensor]]
    ) -> tuple[list[Tensor], Tensor | None]:
        """Return what is added to the base's stream after each block, and to its output, whatever the base does."""
        together: list[Tensor] = []
        last = None
        for k, (stack, part) in enumerate(zip(self._active()[1:], parts, strict=True)):
            seen: list[Tensor] = []
            end = stack.trunk(x, *part, after=lambda h, seen=seen: seen.append(h) or h)  # type: ignore[misc]
            layers: Any = self.injections[k]
            added = [_by_row(weights[:, k], h) * layer(h) for layer, h in zip(layers, seen, strict=True)]
            together = [a + b for a, b in zip(together, added, strict=True)] if together else added
            if self.composition == "both":
                out = _by_row(weights[:, k], x) * stack.head(end, *part)
                last = out if last is None else last + out
        return together, last

    def _sum(self, x: Tensor, weights: Tensor, parts: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return the mean of the outputs, weighted; in training the learning stack's alone."""
        if self.training:
            return self._active()[-1].denoise(x, *parts[-1])
        outputs = [stack.denoise(x, *part) for stack, part in zip(self._active(), parts, strict=True)]
        total, norm = outputs[0], torch.ones_like(x[:, :1, :1])
        for k, output in enumerate(outputs[1:]):
            weight = _by_row(weights[:, k], output)
            total, norm = total + weight * output, norm + weight
        return total / norm

    def _active(self) -> list[BlockNetwork]:
        """Return the stacks up to the present stage."""
        return list(self.networks)[: self.stage + 1]  # type: ignore[return-value]


class GuidedEncoder(ObservationEncoder):
    """For a `GuidedNetwork`: at run time also encodes the observation with all its optional modalities missing."""

    def forward(self, modalities: Mapping[str, Tensor], *, generator: Rng = None) -> Tensor:
        """Return [B, out_dim] in training, else [B, 2 out_dim]."""
        seen = super().forward(modalities, generator=generator)
        return seen if self.training else torch.cat([seen, super().forward(self.without(modalities))], dim=-1)


class GuidedNetwork(ChunkNetwork):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598): unseen + scale * (seen - unseen).

    Args:
        network: factory (action_dim, horizon, cond_dim) of the one network, which is run on both observations.
        scale: 1 uses the observation as it is, 0 ignores the optional modalities.
    """

    def __init__(
        self,
        action_dim: int,
        horizon: int,
        cond_dim: int,
        *,
        network: Callable[[int, int, int], ChunkNetwork],
        scale: float = 1.5,
    ) -> None:
        super().__init__()
        self.network = network(action_dim, horizon, cond_dim)
        self.scale = scale
        self._cond_dim = cond_dim

    def condition(self, t: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
        """t [B], cond [B, D] or, with the unseen half, [B, 2 D]."""
        return tuple(part for half in cond.split(self._cond_dim, dim=-1) for part in self.network.condition(t, half))

    def denoise(self, x: Tensor, *condition: Tensor) -> Tensor:
        """x [B, H, A] and what `condition` returned -> [B, H, A]."""
        if self.training:
            return self.network.denoise(x, *condition)
        half = len(condition) // 2
        both = [torch.cat(pair) for pair in zip(condition[:half], condition[half:], strict=True)]
        seen, unseen = self.network.denoise(torch.cat([x, x]), *both).chunk(2)
        return unseen + self.scale * (seen - unseen)


def modality_sets(
    observation: Mapping[str, ModalitySpec], order: Sequence[Sequence[str]] | None
) -> list[tuple[str, ...]]:
    """Return `order` with the modalities that it does not name as a last set.

    Raises:
        ValueError: a modality is unknown or named twice, or a set is empty.
    """
    if order is None:
        known = [name for name in observation if name in ALWAYS_KNOWN]
        order = [known if len(known) < len(observation) else known[:1]]
    sets = [tuple(some) for some in order]
    named = [name for some in sets for name in some]
    if len(named) != len(set(named)) or not set(named) <= set(observation) or not all(sets):
        raise ValueError(
            f"order must be sets of some of {', '.join(observation)}, each named once; got {[list(s) for s in sets]}."
        )
    rest = tuple(name for name in observation if name not in named)
    return [*sets, rest] if rest else sets


def _by_row(weight: Tensor, like: Tensor) -> Tensor:
    """Return `weight` [B] with as many axes as `like` [B, ...]."""
    return weight.view(-1, *[1] * (like.ndim - 1))
