"""Diffusion Policy (Chi et al. 2023; https://arxiv.org/abs/2303.04137): denoise a chunk of actions given observations.

    here           paper
    chunk [H, A]   A_t, T_p = horizon steps
    level t        denoising iteration k
    noise          epsilon^k
    cond           O_t, T_o = n_obs_steps observations

The observation is encoded once per `act`, not once per denoising step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from robopolicy.errors import RobopolicyError
from robopolicy.policies.base import Policy
from robopolicy.rng import Rng, randint, randn
from robopolicy.sampling.prediction import Prediction, check_prediction, target
from robopolicy.sampling.samplers import Sampler, check_timesteps
from robopolicy.sampling.schedule import NoiseSchedule
from robopolicy.timing import ChunkTiming
from robopolicy.types import Batch, Observation, TaskSpec, check_shape


class DiffusionPolicy(Policy):
    """Samples chunks by denoising, from pure noise or from a guess.

    Args:
        spec: what is observed and commanded.
        timing: lengths of window, chunk and execution.
        network: factory (action_dim, horizon, cond_dim) -> net(x [B, H, A], level [B], cond [B, D]) -> [B, H, A].
        encoder: factory (observation specs, n_obs_steps) -> module with `out_dim`, modalities -> [B, D].
        schedule: the noise levels that the network is trained on.
        sampler: how a chunk is generated from the network.
        prediction: what the network's output means.
        loss_on_padding: also fit the repeated actions that hang over an episode's ends, as Diffusion Policy does.
        warm_start_timesteps: descending levels to denoise through when `act` is given a guess: it is brought to the
            first of them with fresh noise. None refuses guesses.

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
        warm_start_timesteps: Sequence[int] | None = None,
    ) -> None:
        super().__init__(spec, timing=timing)
        check_prediction(prediction)
        sampler.timesteps(schedule)  # fails here rather than at the first action
        self.schedule = schedule
        self.sampler = sampler
        self.prediction: Prediction = prediction
        self.loss_on_padding = loss_on_padding
        self.warm_start_timesteps: tuple[int, ...] | None = None
        if warm_start_timesteps is not None:
            self.warm_start_timesteps = check_timesteps(schedule, warm_start_timesteps)
        self.encoder = encoder(spec.observation, timing.n_obs_steps)
        self.network = network(spec.action.dim, timing.horizon, int(self.encoder.out_dim))  # type: ignore[arg-type]
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
        error = reduce((output - wanted).square(), "b h a -> b h", "mean")
        inside = (~batch.is_pad).to(error.dtype)
        return (error * inside).sum() / inside.sum().clamp_min(1.0)

    def act(self, obs: Observation, *, guess: Tensor | None = None, generator: Rng = None) -> Tensor:
        """Return the chunk [B, H, A]; with one generator per row, rows do not depend on their neighbours.

        Raises:
            RobopolicyError: a guess is given but `warm_start_timesteps` is None.
        """
        with torch.inference_mode():
            cond = self.encoder(self.normalized(obs))
            start, timesteps = self._start(len(cond), guess, generator)
            chunk = self.sampler(
                lambda x, level: self.network(x, level, cond),
                start,
                self.schedule,
                self.prediction,
                generator=generator,
                timesteps=timesteps,
            )
            chunk = self.clip(self.norm.decode("action", chunk))
        return chunk.clone()  # outside inference mode: an ordinary tensor, fit to be a training target

    def _start(self, size: int, guess: Tensor | None, generator: Rng) -> tuple[Tensor, Sequence[int] | None]:
        """Return where denoising starts, [B, H, A], and through which levels it goes (None: the sampler's own)."""
        horizon, action_dim = self.timing.horizon, self.spec.action.dim
        noise = randn(size, horizon, action_dim, generator=generator, device=self.device)
        if guess is None:
            return noise, None
        if self.warm_start_timesteps is None:
            raise RobopolicyError(
                "This policy cannot use a guess: it was built with warm_start_timesteps=None; set it to the descending "
                "noise levels to denoise a guess through, for example [7, 5, 3, 1, 0]."
            )
        check_shape("guess", guess, "B H A", B=size, H=horizon, A=action_dim)
        clean = self.norm.encode("action", guess)
        return self.schedule.add_noise(clean, noise, self.warm_start_timesteps[0]), self.warm_start_timesteps
