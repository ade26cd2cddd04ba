"""How observation windows and action chunks lie on the time axis (Diffusion Policy's names and meanings)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ChunkTiming:
    """`horizon` actions are predicted from `n_obs_steps` observations; `n_action_steps` of them are executed.

    Chunk index 0 belongs to the oldest observation of the window, so execution starts at `now = n_obs_steps - 1`.
    Source: Chi et al., Diffusion Policy, arXiv:2303.04137, section 2.3.
    """

    n_obs_steps: int = 2
    horizon: int = 16
    n_action_steps: int = 8

    def __post_init__(self) -> None:
        if self.n_obs_steps < 1:
            raise ValueError(f"n_obs_steps must be at least 1; got {self.n_obs_steps}.")
        most = self.horizon - self.now
        if not 1 <= self.n_action_steps <= most:
            raise ValueError(
                f"n_action_steps must be in [1, {most}] for horizon={self.horizon}, n_obs_steps={self.n_obs_steps}; "
                f"got {self.n_action_steps}."
            )

    @property
    def now(self) -> int:
        """Index in the chunk of the action for the newest observation."""
        return self.n_obs_steps - 1
