"""Flow matching policy (Lipman et al. 2023, arXiv:2210.02747; of action chunks: pi_0, arXiv:2410.24164).

The network and encoder are those of a diffusion policy; the path from noise to chunk is a straight line, and a chunk is
found by following the learned velocity. Names, and the paper's, in sampling/flow.py; how a guess is refined in
sampling/warm_start.py (`FlowWarmStart`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from robopolicy.errors import RobopolicyError
from robopolicy.nn.layers import ahead
from robopolicy.nn.screen import ModalityScreen
from robopolicy.policies.base import Policy, mean_square
from robopolicy.rng import Rng, rand, randn
from robopolicy.sampling.flow import (
    FlowPrediction,
    FlowSampler,
    Velocity,
    check_flow_prediction,
    clean_from_velocity,
    velocity_from,
)
from robopolicy.sampling.warm_start import FlowWarmStart
from robopolicy.timing import ChunkTiming
from robopolicy.types import Batch, Observation, TaskSpec, check_shape

LEVELS = 100.0
"""A network is told the share of noise, 1 - t, as a level from 0 (clean) to LEVELS: what embeddings are made for."""


class FlowPolicy(Policy):
    """Samples chunks by following a flow, from pure noise or from a guess.

    Args:
        spec: what is observed and commanded.
        timing: lengths of window, chunk and execution.
        network: factory (action_dim, horizon, cond_dim) -> net(x [B, H, A], level [B] float, cond [B, D]) -> [B, H, A].
        encoder: factory (observation specs, n_obs_steps) -> module with `out_dim`, modalities -> [B, D]; one for
            several stacks as for DiffusionPolicy.
        sampler: how a chunk is generated from the velocity; starts at time 0.
        prediction: what the network's output means.
        loss_on_padding: also fit the repeated actions that hang over an episode's ends.
        warm_start: how a guess is refined where `act` is not told otherwise. None refuses guesses unless it is told.
        discrete_scale: where discrete action dimensions (a gripper) lie in network units, as for DiffusionPolicy.

    `act` clips to the bounds of the action; discrete dimensions stay continuous in it.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        timing: ChunkTiming,
        network: Callable[[int, int, int], nn.Module],
        encoder: Callable[..., nn.Module],
        sampler: FlowSampler,
        prediction: FlowPrediction = "velocity",
        loss_on_padding: bool = True,
        warm_start: FlowWarmStart | None = None,
        discrete_scale: float = 1.0,
    ) -> None:
        super().__init__(spec, timing=timing, discrete_scale=discrete_scale)
        check_flow_prediction(prediction)
        _check_sampler(sampler)
        self.sampler = sampler
        self.prediction: FlowPrediction = prediction
        self.loss_on_padding = loss_on_padding
        self.warm_start = warm_start
        if warm_start is not None:
            self.resolve_warm_start()
        self.encoder = encoder(spec.observation, timing.n_obs_steps)
        widths: Any = getattr(self.encoder, "widths", self.encoder.out_dim)
        self.network = network(spec.action.dim, timing.horizon, widths)
        self.optional = frozenset(getattr(self.encoder, "optional", ()))

    def loss(self, batch: Batch, *, generator: Rng = None) -> Tensor:
        """Return the mean squared error of the prediction at times drawn uniformly, in network units."""
        check_shape("action", batch.action, "B H A", H=self.timing.horizon, A=self.spec.action.dim)
        device = batch.action.device
        cond = self.encoder(self.normalized(batch.obs), generator=generator)
        clean = self.norm.encode("action", batch.action)
        time = rand(len(clean), 1, 1, generator=generator, device=device)
        noise = randn(*clean.shape, generator=generator, device=device)
        output = self.network(torch.lerp(noise, clean, time), _level(rearrange(time, "b 1 1 -> b")), cond)
        wanted = clean if self.prediction == "sample" else clean - noise
        return mean_square(output.float() - wanted, None if self.loss_on_padding else ~batch.is_pad)

    def act(
        self,
        obs: Observation,
        *,
        guess: Tensor | None = None,
        warm_start: FlowWarmStart | None = None,
        sampler: FlowSampler | None = None,
        generator: Rng = None,
    ) -> Tensor:
        """Return the chunk [B, H, A]; with one generator per row, rows do not depend on their neighbours.

        Args:
            guess: [B, H, A] in environment units, what is expected to come out; see `refine`.
            warm_start: with a guess, how it is refined.
            sampler: instead of the policy's own, where there is no guess.

        Raises:
            RobopolicyError: a guess is given, but nothing says how to refine it; an observation is not finite; the
                sampler does not start at time 0.
        """
        if guess is not None:
            return self.refine(obs, guess, warm_start=warm_start, generator=generator)[0]
        if not torch.compiler.is_compiling():
            self.check_inputs(obs)
        sampler = sampler or self.sampler
        _check_sampler(sampler)
        with torch.inference_mode():
            cond = self.encoder(self.normalized(obs))
            start = randn(len(cond), self.timing.horizon, self.spec.action.dim, generator=generator, device=self.device)
            chunk = sampler(self._velocity(sampler.evaluations, cond), start)
            chunk = self.clip(self.norm.decode("action", chunk))
        return chunk.clone()  # outside inference mode: an ordinary tensor, fit to be a training target

    def refine(
        self, obs: Observation, guess: Tensor, *, warm_start: FlowWarmStart | None = None, generator: Rng = None
    ) -> tuple[Tensor, Tensor]:
        """Return the chunk [B, H, A] that the flow reaches from `guess` [B, H, A], and its first estimate of it.

        The first estimate [B, H, A] is the clean chunk predicted at time tau; if it is far from the guess, the guess is
        stale.

        Raises:
            RobopolicyError: neither `warm_start` nor the policy's own is set; an input is not finite.
            ShapeError: `guess` is no chunk of each row.
        """
        x, cond, estimate = self.refine_first(obs, guess, warm_start=warm_start, generator=generator)
        return self.refine_rest(x, cond, warm_start=warm_start), estimate

    def refine_first(
        self, obs: Observation, guess: Tensor, *, warm_start: FlowWarmStart | None = None, generator: Rng = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do `refine`'s first step alone, one network call; return what `refine_rest` takes, and the first estimate.

        Returns:
            Chunk at the second time [B, H, A] in network units, encoded observation [B, D], first estimate [B, H, A].
        """
        warm_start = self.resolve_warm_start(warm_start)
        if not torch.compiler.is_compiling():
            self.check_inputs(obs, guess)
        with torch.inference_mode():
            cond = self.encoder(self.normalized(obs))
            x = warm_start.begin(self.norm.encode("action", guess), generator=generator)
            time, *later = *warm_start.times, 1.0
            velocity = self._velocity([time], cond)(x, time)
            estimate = self.clip(self.norm.decode("action", clean_from_velocity(x, velocity, time)))
            x = torch.add(x, velocity, alpha=later[0] - time)
        return x.clone(), cond.clone(), estimate.clone()

    def refine_rest(
        self, x: Tensor, cond: Tensor, *, warm_start: FlowWarmStart | None = None, generator: Rng = None
    ) -> Tensor:
        """Return `refine`'s chunk [B, H, A] by the remaining steps from what `refine_first` returned; draws nothing."""
        later = self.resolve_warm_start(warm_start).times[1:]
        with torch.inference_mode():
            if later:
                sampler = FlowSampler(times=later)
                x = sampler(self._velocity(sampler.evaluations, cond), x)
            chunk = self.clip(self.norm.decode("action", x))
        return chunk.clone()

    def resolve_warm_start(self, asked: Any = None) -> FlowWarmStart:
        """Return what refines a guess: `asked`, else the policy's own; raise RobopolicyError if it cannot."""
        found = asked or self.warm_start
        if not isinstance(found, FlowWarmStart):
            raise RobopolicyError(
                "A flow refines a guess from a time on, not from a noise level: planner=rti_flow works, or "
                f"FlowWarmStart(tau=0.6, num_inference_steps=3) for example; got {found}."
            )
        return found

    def diagnose(self, obs: Observation) -> dict[str, Tensor]:
        """Return which modalities of each row [B] count as missing, and how doubtful they are; see `nn.screen`."""
        screen = getattr(self.encoder, "screen", None)
        if not isinstance(screen, ModalityScreen):
            return {}
        with torch.no_grad():
            return screen.report(self.normalized(obs))

    def network_calls(self, sampler: FlowSampler | None = None) -> int:
        """Return how often the network runs per chunk without a guess."""
        return len((sampler or self.sampler).evaluations)

    def check_saved(self, config: Mapping[str, Any]) -> None:
        """Raise RobopolicyError if the weights saved with `config` predict something else than this expects."""
        if (prediction := config.get("prediction", "velocity")) != self.prediction:
            raise RobopolicyError(
                f"The weights predict {prediction!r}; this policy takes them for {self.prediction!r}."
            )

    def _velocity(self, times: Sequence[float], cond: Tensor) -> Velocity:
        """Return the velocity given `cond` [B, D], to be asked at `times` in their order."""
        networks = ahead(self.network, [LEVELS * (1.0 - time) for time in times], cond)

        def velocity(x: Tensor, time: float) -> Tensor:
            return velocity_from(self.prediction, x, next(networks)(x).to(x.dtype), time)

        return velocity


def _level(time: Tensor) -> Tensor:
    return LEVELS * (1.0 - time)


def _check_sampler(sampler: Any) -> None:
    if not isinstance(sampler, FlowSampler):
        raise RobopolicyError(f"A flow is followed by a FlowSampler, not sampled by {type(sampler).__name__}.")
    if sampler.steps[0][0] != 0.0:
        raise RobopolicyError(
            f"A chunk from pure noise starts at time 0; the sampler's times are {list(sampler.times or ())}."
        )
