"""From which noise level a warm start should begin, measured on rollouts.

At the control ticks of held-out episodes the chunk being played, moved on by the steps executed since (its lag), is
compared with many chunks that the policy plans anew from the same observation:

    error   how much further the moved chunk lies from the nearest fresh one than fresh ones do from each other: per
            action dimension, a quantile over observations, network units. The nearest, because a policy with several
            ways to go is not wrong in any of them; less the fresh ones' own distance, because that is no error either
    spread  standard deviation of fresh chunks at one observation, the median over observations
    modes   observations whose fresh chunks fall into two groups

Three rules then bound the noise, all of them in closed form (sampling/warm_start.py):

    cover   noise over signal is at least `margin` times the error: what the network sees there is like what it was
            trained on
    forget  what a chain of refinements keeps of its errors, share / (1 - share) times the error, is below a tolerance
    keep    the chance of a refinement to change between two modes is below a rate

The smallest noise that covers and forgets is taken, unless it does not keep. How much error a restart leaves in fact is
then measured, and decides how many network calls there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from torch import Tensor

from robopolicy.policies.actors import DiscreteEnds, ObservationWindow
from robopolicy.rng import Rng
from robopolicy.sampling.warm_start import FlowWarmStart, WarmStart, surviving_share, switch_probability
from robopolicy.types import Environment, Observation

MOST_CALLS = 5
TWO_MODES = 3.0
"""Fresh chunks fall into two groups if half the gap between them is so many times their spread."""
FLOW_TIMES = tuple(round(0.95 - 0.05 * i, 2) for i in range(19))


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What is asked of a warm start."""

    tolerance: float
    """Largest error that may remain, RMS over a chunk's steps, network units."""
    quantile: float = 0.9
    """Of the observations; the rest may be worse (a grasp, a knock)."""
    margin: float = 1.0
    most_switches: float = 0.02
    """Largest probability, per refinement, of changing between two modes."""


@dataclass(frozen=True, kw_only=True)
class Restart:
    """A level that a refinement may begin from."""

    level: float
    """K' of a diffusion policy, tau of a flow."""
    signal: float
    sigma: float
    deterministic: bool

    @property
    def noise(self) -> float:
        """Noise over signal."""
        return self.sigma / self.signal


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Observations of one lag with their guesses and fresh chunks, in network units."""

    lag: int
    obs: Observation
    """K windows."""
    guess: Tensor
    """[K, H, A], moved on by `lag`; its last `lag` steps are the last known one repeated."""
    fresh: Tensor
    """[K, M, H, A]."""

    @property
    def inside(self) -> slice:
        """The steps of the guess that were planned."""
        return slice(0, self.guess.shape[1] - self.lag)


@torch.no_grad()
def record(
    policy: Any,
    env: Environment,
    seeds: Sequence[int],
    *,
    counts: Mapping[int, int],
    num_samples: int,
    settings: Mapping[str, Any],
    on_step: Callable[[], None] = lambda: None,
) -> list[Samples]:
    """Roll the policy out, a chunk of `max(counts)` steps at a time, and sample what it would plan anew.

    Args:
        policy: has `act`, `norm`, `timing` and `spec`.
        env: runs one wave of `env.num_envs` episodes.
        seeds: one per environment.
        counts: lag to the number of observations wanted of it, at the least; lag 0 compares fresh chunks only.
        num_samples: fresh chunks M per observation.
        settings: of `act`.
        on_step: called after each control step.
    """
    steps, period, num = policy.spec.max_episode_steps, max(counts), env.num_envs
    generator, choose = torch.Generator().manual_seed(0), np.random.default_rng(0)
    window, ends = ObservationWindow(policy.spec, policy.timing.n_obs_steps, num), DiscreteEnds(policy.spec.action, num)
    frame, _ = env.reset(seed=list(seeds))
    found: dict[int, list[Samples]] = {lag: [] for lag in counts}
    chunk = torch.empty(0)
    for step in range(steps):
        window.push(frame)
        lag = step % period
        old = chunk
        if lag == 0:
            chunk = policy.act(window.observation, generator=generator, **settings)
        due = [(lag, chunk)] + ([(period, old)] if lag == 0 and step else [])
        for age, played in due:
            if age in counts:
                each = -(-counts[age] * period // max(1, steps - age))
                rows = torch.from_numpy(np.sort(choose.choice(num, min(num, each), replace=False)))
                guess = policy.norm.encode("action", _moved(played[rows], age))
                fresh = _fresh(policy, window.observation.take(rows), num_samples, generator, settings)
                found[age].append(Samples(lag=age, obs=window.observation.take(rows), guess=guess, fresh=fresh))
        frame, *_ = env.step(ends.round(chunk[:, policy.timing.now + lag]))
        on_step()
    return [_joined(some) for some in found.values() if some]


def _moved(chunk: Tensor, steps: int) -> Tensor:
    index = (torch.arange(chunk.shape[1]) + steps).clamp_max(chunk.shape[1] - 1)
    return chunk.index_select(1, index.to(chunk.device))


def _fresh(policy: Any, obs: Observation, num: int, generator: Rng, settings: Mapping[str, Any]) -> Tensor:
    """Return `num` fresh chunks of each row, [K, M, H, A], in network units."""
    many = Observation(modalities={n: repeat(v, "k ... -> (k m) ...", m=num) for n, v in obs.modalities.items()})
    chunks = policy.norm.encode("action", policy.act(many, generator=generator, **settings))
    return rearrange(chunks, "(k m) h a -> k m h a", m=num)


def _joined(some: Sequence[Samples]) -> Samples:
    modalities = {name: torch.cat([one.obs.modalities[name] for one in some]) for name in some[0].obs.modalities}
    return Samples(
        lag=some[0].lag,
        obs=Observation(modalities=modalities),
        guess=torch.cat([one.guess for one in some]),
        fresh=torch.cat([one.fresh for one in some]),
    )


def nearest(chunk: Tensor, fresh: Tensor) -> Tensor:
    """Return the mean square distance [K, A] of `chunk` [K, H, A] from the nearest of `fresh` [K, M, H, A]."""
    square = (fresh - chunk[:, None]).square().mean(dim=2)
    best = square.mean(dim=-1).argmin(dim=1)
    return square[torch.arange(len(square)), best]


def excess(chunk: Tensor, fresh: Tensor, quantile: float) -> Tensor:
    """Return the error [A] of chunks [K, H, A] against fresh ones [K, M, H, A]; see the module."""
    num = fresh.shape[1]
    others = [nearest(fresh[:, i], fresh[:, [j for j in range(num) if j != i]]) for i in range(num)]
    beyond = nearest(chunk, fresh).quantile(quantile, dim=0) - torch.cat(others).quantile(quantile, dim=0)
    return beyond.clamp_min(0).sqrt()


def find_modes(fresh: Tensor) -> list[tuple[float, float, float]]:
    """Return (half gap, spread, share of the smaller group) for each of K observations that has two modes.

    `fresh` [K, M, H, A] is projected on its first principal direction and cut where that separates best.
    """
    found = []
    for flat in rearrange(fresh.double(), "k m h a -> k m (h a)"):
        centred = flat - flat.mean(dim=0)
        along = (centred @ torch.linalg.svd(centred, full_matrices=False).Vh[0]).sort().values
        cuts = [
            (float(along[i:].mean() - along[:i].mean()) ** 2 * i * (len(along) - i), i)
            for i in range(2, len(along) - 1)
        ]
        if not cuts:
            continue
        i = max(cuts)[1]
        low, high = along[:i], along[i:]
        half_gap = float(high.mean() - low.mean()) / 2
        spread = float(((low - low.mean()).square().sum() + (high - high.mean()).square().sum()) / len(along)) ** 0.5
        if half_gap > max(TWO_MODES * spread, 0.1):
            found.append((half_gap, spread, min(i, len(along) - i) / len(along)))
    return found


def restarts(policy: Any, like: Any) -> list[Restart]:
    """Return the levels that `policy` may restart from with a warm start `like` this, the least noise first."""
    if isinstance(like, FlowWarmStart):
        return [Restart(level=tau, signal=tau, sigma=1 - tau, deterministic=True) for tau in FLOW_TIMES]
    exact = like.stepper == "ddim" and like.eta == 0.0
    return [
        Restart(level=level, signal=bar**0.5, sigma=(1 - bar) ** 0.5, deterministic=exact)
        for level, bar in enumerate(policy.schedule.alpha_bar)
        if bar > 0.01  # beyond is a start from noise
    ]


def with_level(like: Any, level: float, num_calls: int) -> Any:
    """Return the warm start `like` this that restarts at `level` with (about) `num_calls` network calls."""
    import dataclasses

    if isinstance(like, FlowWarmStart):
        return dataclasses.replace(like, tau=level, num_inference_steps=num_calls)
    return dataclasses.replace(like, timesteps=spaced(int(level), num_calls))


def spaced(top: int, num_calls: int) -> tuple[int, ...]:
    """Return at most `num_calls` levels from `top` down to 0, denser towards 0.

    >>> spaced(20, 4), spaced(20, 2), spaced(2, 5)
    ((20, 11, 4, 0), (20, 0), (2, 1, 0))
    """
    if top == 0 or num_calls == 1:
        return (top,) if top == 0 else (top, 0)
    shares = [(1 - i / (num_calls - 1)) ** 1.5 for i in range(num_calls)]
    return tuple(sorted({round(top * share) for share in shares}, reverse=True))


def remaining(restart: Restart, error: Tensor, spread: Tensor) -> float:
    """Return the error that a chain of refinements settles at, by the closed form: its worst dimension's."""
    left = 0.0
    for e, s in zip(error.tolist(), spread.tolist(), strict=True):
        share = surviving_share(restart.signal, restart.sigma, s, deterministic=restart.deterministic)
        left = max(left, e * share / (1 - share) if share < 1 else float("inf") * bool(e))
    return left


def switches(restart: Restart, modes: Sequence[tuple[float, float, float]]) -> float:
    """Return the mean probability of changing between two modes per refinement; 0 where there are none."""
    if not modes:
        return 0.0
    each = [
        switch_probability(restart.signal, restart.sigma, half_gap, spread, weight=share)
        for half_gap, spread, share in modes
    ]
    return float(np.mean(each))


@torch.no_grad()
def measured(policy: Any, samples: Samples, warm_start: Any, dims: Tensor, quantile: float) -> tuple[float, Tensor]:
    """Return the error that refining the guesses leaves, its worst dimension's, and the refined chunks [K, H, A]."""
    guess = policy.norm.decode("action", samples.guess)
    noise = torch.Generator().manual_seed(0)
    chunk, _ = policy.refine(samples.obs, guess, warm_start=warm_start, generator=noise)
    chunk = policy.norm.encode("action", chunk)
    kept = samples.inside
    return float(excess(chunk[:, kept, dims], samples.fresh[:, :, kept, dims], quantile).max()), chunk


def choose(
    levels: Sequence[Restart], error: Tensor, spread: Tensor, modes: Sequence[tuple[float, float, float]], rules: Rules
) -> tuple[Restart, str]:
    """Return the restart that the rules ask for, and why, in words."""
    wanted = rules.margin * float(error.max())
    covers = next((one for one in levels if one.noise >= wanted), levels[-1])
    forgets = next((one for one in levels if remaining(one, error, spread) <= rules.tolerance), levels[-1])
    chosen = max(covers, forgets, key=lambda one: one.noise)
    why = (
        f"guesses are off by {float(error.max()):.3f} at the {rules.quantile:.0%} quantile, which noise over signal of "
        f"{chosen.noise:.3f} covers; {remaining(chosen, error, spread):.3f} of it stays by the closed form"
    )
    if chosen.noise > covers.noise:
        why += f" (covering alone would need {covers.noise:.3f})"
    if switches(chosen, modes) > rules.most_switches:
        keeping = [one for one in levels if switches(one, modes) <= rules.most_switches]
        kept = keeping[-1] if keeping else levels[0]
        why += (
            f"; but two modes would change with a probability of {switches(chosen, modes):.3f} per tick, more than "
            f"most_switches={rules.most_switches:g}, so it restarts from less noise, {kept.noise:.3f}, and "
            f"{remaining(kept, error, spread):.3f} stays"
        )
        chosen = kept
    return chosen, why


def calibrate(policy: Any, like: Any, samples: Sequence[Samples], lag: int, rules: Rules) -> dict[str, Any]:
    """Choose a warm start `like` this for guesses of `lag`; return it with its evidence, in plain values.

    The entry `warm_start` holds the settings that were chosen.
    """
    action = policy.spec.action
    dims = torch.tensor([i for i in range(action.dim) if not action.discrete[i]])
    at = next(one for one in samples if one.lag == lag)
    error, spread = _error(at, dims, rules.quantile), _spread(at, dims)
    modes = [mode for one in samples for mode in find_modes(one.fresh[..., dims])]
    levels = restarts(policy, like)
    chosen, why = choose(levels, error, spread, modes, rules)
    lists = []
    for num_calls in range(1, MOST_CALLS + 1):
        warm = with_level(like, chosen.level, num_calls)
        if warm.num_calls == num_calls:
            left, chunk = measured(policy, at, warm, dims, rules.quantile)
            lists.append((left, warm, chunk))
    enough = next((one for one in lists if one[0] <= rules.tolerance), min(lists, key=lambda one: one[0]))
    left, warm, chunk = enough
    share = [
        surviving_share(chosen.signal, chosen.sigma, s, deterministic=chosen.deterministic) for s in spread.tolist()
    ]
    return {
        "warm_start": _settings(warm),
        "why": why,
        "lag": lag,
        "noise_over_signal": chosen.noise,
        "remaining": {"law": remaining(chosen, error, spread), "measured": left},
        "switches": switches(chosen, modes),
        "two_modes": {"observations": len(modes), "of": sum(len(one.guess) for one in samples)},
        "dimensions": [
            {"name": action.names[int(dim)], "error": float(e), "spread": float(s), "surviving_share": share[i]}
            for i, (dim, e, s) in enumerate(zip(dims, error, spread, strict=True))
        ],
        "discrete_at_other_end": _other_end(policy, at, chunk),
        "lags": [_lag(one, dims, rules.quantile) for one in samples],
        "levels": [
            {
                "level": one.level,
                "noise_over_signal": one.noise,
                "law": remaining(one, error, spread),
                "measured": measured(policy, at, with_level(like, one.level, 3), dims, rules.quantile)[0],
                "switches": switches(one, modes),
            }
            for one in _some(levels, chosen)
        ],
        "lists": [{"warm_start": _settings(one), "network_calls": one.num_calls, "measured": e} for e, one, _ in lists],
    }


def _error(samples: Samples, dims: Tensor, quantile: float) -> Tensor:
    kept = samples.inside
    return excess(samples.guess[:, kept, dims], samples.fresh[:, :, kept, dims], quantile)


def _spread(samples: Samples, dims: Tensor) -> Tensor:
    """Return the standard deviation [A] of fresh chunks at one observation, the median over observations."""
    return samples.fresh[..., dims].var(dim=1).mean(dim=1).median(dim=0).values.sqrt()


def _lag(samples: Samples, dims: Tensor, quantile: float) -> dict[str, Any]:
    error = _error(samples, dims, quantile)
    return {
        "lag": samples.lag,
        "n_observations": len(samples.guess),
        "error": error.tolist(),
        "median_error": _error(samples, dims, 0.5).tolist(),
        "spread": _spread(samples, dims).tolist(),
    }


def _other_end(policy: Any, samples: Samples, refined: Tensor) -> dict[str, float] | None:
    """Return the share of planned steps whose discrete dimensions are at another end than most fresh chunks'."""
    dims = torch.tensor([i for i, discrete in enumerate(policy.spec.action.discrete) if discrete])
    if not len(dims):
        return None
    kept = samples.inside
    wanted = samples.fresh[:, :, kept, dims].sign().mean(dim=1).sign()
    shares = [float((chunk[:, kept, dims].sign() != wanted).float().mean()) for chunk in (samples.guess, refined)]
    return {"guess": shares[0], "refined": shares[1]}


def _some(levels: Sequence[Restart], chosen: Restart) -> list[Restart]:
    """Return about a dozen of `levels`, evenly spread in noise, with the chosen one among them."""
    wanted = np.geomspace(levels[0].noise, levels[-1].noise, 12)
    near = {min(range(len(levels)), key=lambda i: abs(levels[i].noise - one)) for one in wanted}
    return [levels[i] for i in sorted(near | {levels.index(chosen)})]


def _settings(warm_start: WarmStart | FlowWarmStart) -> dict[str, Any]:
    """Return what calibration decides of a warm start."""
    if isinstance(warm_start, FlowWarmStart):
        return {"tau": warm_start.tau, "num_inference_steps": warm_start.num_inference_steps}
    return {"timesteps": list(warm_start.timesteps)}
