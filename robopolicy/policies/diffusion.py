"""Diffusion Policy (Chi et al. 2023; https://arxiv.org/abs/2303.04137): denoise a chunk of actions given observations.

    here           paper
    chunk [H, A]   A_t, T_p = horizon steps
    level t        denoising iteration k
    noise          epsilon^k
    cond           O_t, T_o = n_obs_steps observations

The observation is encoded once per `act`, not once per denoising step. A guess is refined by a warm start, see
sampling/warm_start.py; who keeps guesses from one plan to the next is policies/warm_start.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from robopolicy.errors import RobopolicyError
from robopolicy.nn.layers import ahead
from robopolicy.nn.screen import ModalityScreen
from robopolicy.policies.base import Policy, mean_square
from robopolicy.rng import Rng, randint, randn
from robopolicy.sampling.prediction import Prediction, check_prediction, target
from robopolicy.sampling.samplers import Sampler, Step, combine, run_steps
from robopolicy.sampling.schedule import NoiseSchedule
from robopolicy.sampling.warm_start import WarmStart
from robopolicy.timing import ChunkTiming
from robopolicy.types import Batch, Observation, TaskSpec, check_shape


class DiffusionPolicy(Policy):
    """Samples chunks by denoising, from pure noise or from a guess.

    Args:
        spec: what is observed and commanded.
        timing: lengths of window, chunk and execution.
        network: factory (action_dim, horizon, cond_dim) -> net(x [B, H, A], level [B], cond [B, D]) -> [B, H, A].
        encoder: factory (observation specs, n_obs_steps) -> module with `out_dim`, modalities -> [B, D]. An encoder
            for several stacks has `widths`, which the network's factory gets for cond_dim; see nn/composed.py.
        schedule: the noise levels that the network is trained on.
        sampler: how a chunk is generated from the network.
        prediction: what the network's output means.
        loss_on_padding: also fit the repeated actions that hang over an episode's ends, as Diffusion Policy does.
        warm_start: how a guess is refined where `act` is not told otherwise. None refuses guesses unless it is told.
        warm_start_timesteps: its levels alone, as older checkpoints have them.
        discrete_scale: where discrete action dimensions (a gripper) lie in network units: 1 puts the ends of their
            range at -1 and 1; 0.1 at -0.1 and 0.1, from where the few steps of a warm start can still change ends.

    `act` clips to the bounds of the action; discrete dimensions (a gripper) stay continuous in it and are rounded to
    an end of their range by whoever executes them.
    """

    signal: Tensor
    sigma: Tensor

    def __init__(
        self,
        spec: TaskSpec,
        *,
        timing: ChunkTiming,
        network: Callable[[int, int, int], nn.Module],
        encoder: Callable[..., nn.Module],
        schedule: NoiseSchedule,
        sampler: Sampler,
        prediction: Prediction = "epsilon",
        loss_on_padding: bool = True,
        warm_start: WarmStart | None = None,
        warm_start_timesteps: Sequence[int] | None = None,
        discrete_scale: float = 1.0,
    ) -> None:
        super().__init__(spec, timing=timing, discrete_scale=discrete_scale)
        check_prediction(prediction)
        sampler.timesteps(schedule)  # fails here rather than at the first action
        self.schedule = schedule
        self.sampler = sampler
        self.prediction: Prediction = prediction
        self.loss_on_padding = loss_on_padding
        if warm_start is None and warm_start_timesteps is not None:
            warm_start = WarmStart(timesteps=tuple(warm_start_timesteps))
        if warm_start is not None:
            warm_start.check(schedule)
        self.warm_start = warm_start
        self.encoder = encoder(spec.observation, timing.n_obs_steps)
        widths: Any = getattr(self.encoder, "widths", self.encoder.out_dim)
        self.network = network(spec.action.dim, timing.horizon, widths)
        self.optional = frozenset(getattr(self.encoder, "optional", ()))
        signal, sigma = schedule.tables()
        self.register_buffer("signal", signal, persistent=False)
        self.register_buffer("sigma", sigma, persistent=False)

    def loss(self, batch: Batch, *, generator: Rng = None) -> Tensor:
        """Return the mean squared error of the prediction at levels drawn uniformly, in network units."""
        horizon, action_dim = self.timing.horizon, self.spec.action.dim
        check_shape("action", batch.action, "B H A", H=horizon, A=action_dim)
        device, size = batch.action.device, len(batch.action)
        cond = self.encoder(self.normalized(batch.obs), generator=generator)
        clean = self.norm.encode("action", batch.action)
        level = randint(self.schedule.num_train_timesteps, size, generator=generator, device=device)
        noise = randn(*clean.shape, generator=generator, device=device)
        signal = rearrange(self.signal[level], "b -> b 1 1")
        sigma = rearrange(self.sigma[level], "b -> b 1 1")
        output = self.network(torch.addcmul(sigma * noise, signal, clean), level, cond)
        wanted = target(self.prediction, clean, noise, signal, sigma)
        if self.loss_on_padding:
            return F.mse_loss(output, wanted)
        return mean_square(output - wanted, ~batch.is_pad)

    def act(
        self,
        obs: Observation,
        *,
        guess: Tensor | None = None,
        warm_start: WarmStart | None = None,
        sampler: Sampler | None = None,
        generator: Rng = None,
    ) -> Tensor:
        """Return the chunk [B, H, A]; with one generator per row, rows do not depend on their neighbours.

        Args:
            guess: [B, H, A] in environment units, what is expected to come out; see `refine`.
            warm_start: with a guess, how it is refined. Without one it still says whose betas are used.
            sampler: instead of the policy's own, where there is no guess.

        Raises:
            RobopolicyError: a guess is given, but nothing says how to refine it; an observation is not finite.
        """
        if guess is not None:
            return self.refine(obs, guess, warm_start=warm_start, generator=generator)[0]
        if not torch.compiler.is_compiling():
            self.check_inputs(obs)
        sampler = sampler or self.sampler
        schedule = self.schedule if warm_start is None else warm_start.schedule(self.schedule)
        with torch.inference_mode():
            cond = self.encoder(self.normalized(obs))
            start = randn(len(cond), self.timing.horizon, self.spec.action.dim, generator=generator, device=self.device)
            networks = ahead(self.network, sampler.timesteps(schedule), cond)
            chunk = sampler(lambda x, level: next(networks)(x), start, schedule, self.prediction, generator=generator)
            chunk = self.clip(self.norm.decode("action", chunk))
        return chunk.clone()  # outside inference mode: an ordinary tensor, fit to be a training target

    def refine(
        self, obs: Observation, guess: Tensor, *, warm_start: WarmStart | None = None, generator: Rng = None
    ) -> tuple[Tensor, Tensor]:
        """Return the chunk [B, H, A] denoised from `guess` [B, H, A], and the network's first estimate of it.

        The first estimate [B, H, A] is the clean chunk predicted at level K'; if it is far from the guess,
        the guess is stale.

        Raises:
            RobopolicyError: neither `warm_start` nor the policy's own is set; an input is not finite.
            ShapeError: `guess` is no chunk of each row.
        """
        warm_start = self.resolve_warm_start(warm_start)
        if not torch.compiler.is_compiling():
            self.check_inputs(obs, guess)
        with torch.inference_mode():
            cond = self.encoder(self.normalized(obs))
            steps = warm_start.steps(self.schedule, self.prediction)
            x = warm_start.begin(self.norm.encode("action", guess), self.schedule, generator=generator)
            chunk, estimate = self._denoise(x, cond, steps, warm_start.clip_sample, generator)
            chunk, estimate = (self.clip(self.norm.decode("action", value)) for value in (chunk, estimate))
        return chunk.clone(), estimate.clone()

    def refine_first(
        self, obs: Observation, guess: Tensor, *, warm_start: WarmStart | None = None, generator: Rng = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do `refine`'s first step alone, one network call; return what `refine_rest` takes, and the first estimate.

        Returns:
            Chain at the second level [B, H, A] in network units, encoded observation [B, D], first estimate [B, H, A].
        """
        warm_start = self.resolve_warm_start(warm_start)
        if not torch.compiler.is_compiling():
            self.check_inputs(obs, guess)
        with torch.inference_mode():
            cond = self.encoder(self.normalized(obs))
            steps = warm_start.steps(self.schedule, self.prediction)[:1]
            x = warm_start.begin(self.norm.encode("action", guess), self.schedule, generator=generator)
            x, estimate = self._denoise(x, cond, steps, warm_start.clip_sample, generator)
            estimate = self.clip(self.norm.decode("action", estimate))
        return x.clone(), cond.clone(), estimate.clone()

    def refine_rest(
        self, x: Tensor, cond: Tensor, *, warm_start: WarmStart | None = None, generator: Rng = None
    ) -> Tensor:
        """Return `refine`'s chunk [B, H, A] by the remaining steps, from what `refine_first` returned."""
        warm_start = self.resolve_warm_start(warm_start)
        steps = warm_start.steps(self.schedule, self.prediction)[1:]
        with torch.inference_mode():
            if steps:
                x, _ = self._denoise(x, cond, steps, warm_start.clip_sample, generator)
            chunk = self.clip(self.norm.decode("action", x))
        return chunk.clone()

    def resolve_warm_start(self, asked: Any = None) -> WarmStart:
        """Return what refines a guess: `asked`, else the policy's own; raise RobopolicyError if it cannot."""
        found = asked or self.warm_start
        if not isinstance(found, WarmStart):
            raise RobopolicyError(
                f"This policy cannot use a guess without a warm start that says how to refine it, "
                f"WarmStart(timesteps=[7, 3, 0]) for example (planner=rti has one); got {found}."
            )
        found.check(self.schedule)
        return found

    def diagnose(self, obs: Observation) -> dict[str, Tensor]:
        """Return which modalities of each row [B] count as missing, and how doubtful they are; see `nn.screen`."""
        screen = getattr(self.encoder, "screen", None)
        if not isinstance(screen, ModalityScreen):
            return {}
        with torch.no_grad():
            return screen.report(self.normalized(obs))

    def network_calls(self, sampler: Sampler | None = None) -> int:
        """Return how often the network runs per chunk without a guess."""
        return len((sampler or self.sampler).timesteps(self.schedule))

    def check_saved(self, config: Mapping[str, Any]) -> None:
        """Raise RobopolicyError if the weights saved with `config` were trained on other noise than this expects."""
        saved = {key: value for key, value in (config.get("schedule") or {}).items() if key != "_target_"}
        schedule = NoiseSchedule(**saved)
        if schedule != self.schedule and schedule.alpha_bar != self.schedule.alpha_bar:
            raise RobopolicyError(
                f"The weights were trained on the noise schedule {schedule.to_dict()}, this policy is built with "
                f"{self.schedule.to_dict()}; a network means nothing on another schedule than its own."
            )
        if (prediction := config.get("prediction", "epsilon")) != self.prediction:
            raise RobopolicyError(
                f"The weights predict {prediction!r}; this policy takes them for {self.prediction!r}."
            )

    def _denoise(
        self, x: Tensor, cond: Tensor, steps: Sequence[Step], clip: bool, generator: Rng
    ) -> tuple[Tensor, Tensor]:
        """Return the end of the chain and the clean chunk predicted by its first step, both [B, H, A]."""
        networks = ahead(self.network, [step.level for step in steps], cond)
        first: list[Tensor] = []

        def field(x: Tensor, level: Tensor) -> Tensor:
            output = next(networks)(x)
            if not first:
                first.append(combine(steps[0].clean, x, output.to(x.dtype)))
            return output

        end = run_steps(field, x, steps, clip=clip, generator=generator)
        return end, first[0]
