"""Plain behaviour cloning: one forward pass from observation to chunk, fitted by squared error.

The control without which nothing can be said for a generative policy: same encoder, size and data, and no way to keep
two modes apart. If it ties, the generative part added nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robopolicy.errors import RobopolicyError
from robopolicy.policies.base import Policy, mean_square
from robopolicy.rng import Rng
from robopolicy.timing import ChunkTiming
from robopolicy.types import Batch, Observation, TaskSpec, check_shape


class RegressionPolicy(Policy):
    """Answers with the mean chunk given the observation.

    Args:
        spec: what is observed and commanded.
        timing: lengths of window, chunk and execution.
        network: factory (action_dim, horizon, cond_dim) -> net(x [B, H, A], level [B], cond [B, D]) -> [B, H, A]; that
            of a diffusion policy, called at x = 0 and level 0, so that sizes are comparable.
        encoder: factory (observation specs, n_obs_steps) -> module with `out_dim`, modalities -> [B, D].
        loss_on_padding: also fit the repeated actions that hang over an episode's ends.
    """

    def __init__(
        self,
        spec: TaskSpec,
        *,
        timing: ChunkTiming,
        network: Callable[[int, int, int], nn.Module],
        encoder: Callable[..., nn.Module],
        loss_on_padding: bool = True,
    ) -> None:
        super().__init__(spec, timing=timing)
        self.loss_on_padding = loss_on_padding
        self.encoder = encoder(spec.observation, timing.n_obs_steps)
        self.network = network(spec.action.dim, timing.horizon, int(self.encoder.out_dim))  # type: ignore[arg-type]

    def loss(self, batch: Batch, *, generator: Rng = None) -> Tensor:
        """Return the mean squared error of the chunk, in network units."""
        check_shape("action", batch.action, "B H A", H=self.timing.horizon, A=self.spec.action.dim)
        cond = self.encoder(self.normalized(batch.obs), generator=generator)
        error = self._chunk(cond).float() - self.norm.encode("action", batch.action)
        return mean_square(error, None if self.loss_on_padding else ~batch.is_pad)

    def act(self, obs: Observation, *, guess: Tensor | None = None, generator: Rng = None) -> Tensor:
        """Return the chunk [B, H, A]; no noise is drawn.

        Raises:
            RobopolicyError: a guess is given; one forward pass has no use for it.
        """
        if guess is not None:
            raise RobopolicyError("A regression policy cannot use a guess: it finds each chunk in one pass.")
        self.check_inputs(obs)
        with torch.inference_mode():
            chunk = self.norm.decode("action", self._chunk(self.encoder(self.normalized(obs))).float())
            chunk = self.clip(chunk)
        return chunk.clone()

    def _chunk(self, cond: Tensor) -> Tensor:
        """cond [B, D] -> [B, H, A]."""
        blank = cond.new_zeros(len(cond), self.timing.horizon, self.spec.action.dim)
        level = torch.zeros(len(cond), dtype=torch.int64, device=cond.device)
        chunk: Tensor = self.network(blank, level, cond)
        return chunk
