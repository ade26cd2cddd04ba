"""Energy-based policies: a chunk of actions is found by a few gradient steps on a learned energy.

EBT-Policy (arXiv:2510.27545) after Energy-Based Transformers (arXiv:2507.02092), its objective and others.

    here              paper
    chunk             a, horizon x action
    energy            E(a, o); nothing in the loss is one: energies are shaped through the step they produce
    objective.kind    `mse_all_steps` is the published one

The published objective starts from noise that has nothing to do with the target, so the best it can do is the mean of
all actions seen with an observation: two ways round an obstacle become one through it. `denoise`, our default, starts
from the noised target instead, at noise levels from almost none to pure noise, and asks one step to undo it: the energy
keeps a valley per mode. The energy is told no noise level; it has to see it in the chunk.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from robopolicy.errors import RobopolicyError, UnknownNameError
from robopolicy.policies.base import Policy, mean_square
from robopolicy.rng import Rng, rand, randint, randn
from robopolicy.sampling.descent import CandidateDiagnostics, Descent, Diagnostics, Energy, StepRule
from robopolicy.sampling.objective import UNROLLED, Objective
from robopolicy.timing import ChunkTiming
from robopolicy.types import Batch, Observation, TaskSpec, check_shape

ReplanSignal = Literal["gradient_norm", "energy_drop"]


class EnergyPolicy(Policy):
    """Finds chunks by descent on an energy of (observation, chunk), from noise or from a guess.

    Args:
        spec: what is observed and commanded.
        timing: lengths of window, chunk and execution.
        network: factory (action_dim, horizon, cond_dim) -> EnergyNetwork (nn/energy.py).
        encoder: factory (observation specs, n_obs_steps) -> module with `out_dim`, modalities -> [B, D].
        objective: what is minimised.
        rule: how one energy step moves, in training and after.
        sampler: how many steps a chunk takes, and when a row stops.
        num_candidates: starts per observation; the chunk of lowest energy is returned, and how far they disagree.
        replan_above: a row whose `replan_signal` after a descent from a guess is above this is planned anew from noise.
            None: never. The scale is the network's own; evaluation/uncertainty.py finds a value.
        replan_signal: `gradient_norm` or `energy_drop`, see Diagnostics.
        loss_on_padding: also fit the repeated actions that hang over an episode's ends.

    `act` needs gradients with respect to the chunk and enables them by itself, so that callers may be in `no_grad` or
    `inference_mode`; weights are never touched. What it saw of each row is kept in `last_diagnostics`.
    """

    num_skipped: Tensor

    def __init__(
        self,
        spec: TaskSpec,
        *,
        timing: ChunkTiming,
        network: Callable[[int, int, int], nn.Module],
        encoder: Callable[..., nn.Module],
        objective: Objective,
        rule: StepRule,
        sampler: Descent,
        num_candidates: int = 1,
        replan_above: float | None = None,
        replan_signal: ReplanSignal = "gradient_norm",
        loss_on_padding: bool = True,
    ) -> None:
        super().__init__(spec, timing=timing)
        if num_candidates < 1:
            raise ValueError(f"num_candidates must be at least 1; got {num_candidates}.")
        if num_candidates > 1 and objective.kind in ("mse_all_steps", "mse_last_step"):
            raise ValueError(
                f"num_candidates={num_candidates} picks by energy, but {objective.kind} gives all starts one end: "
                "use the objective denoise, score or infonce."
            )
        if replan_signal not in get_args(ReplanSignal):
            raise UnknownNameError("replan signal", replan_signal, get_args(ReplanSignal))
        if rule.step_size == "learned" and objective.kind not in UNROLLED:
            raise ValueError(f"{objective.kind} takes no energy steps, so it cannot learn their size: use fixed.")
        self.objective = objective
        self.rule = rule
        self.sampler = sampler
        self.num_candidates = num_candidates
        self.replan_above = replan_above
        self.replan_signal: ReplanSignal = replan_signal
        self.loss_on_padding = loss_on_padding
        self.encoder = encoder(spec.observation, timing.n_obs_steps)
        self.network = network(spec.action.dim, timing.horizon, int(self.encoder.out_dim))  # type: ignore[arg-type]
        self.log_alpha: nn.Parameter | None = None
        if rule.step_size == "learned":
            self.log_alpha = nn.Parameter(torch.tensor(rule.alpha).log())
        self.register_buffer("num_skipped", torch.zeros((), dtype=torch.int64))
        self.last_diagnostics: Diagnostics | None = None
        """Of the rows of the last `act`; None before."""

    # --- training ---------------------------------------------------------------------------------------------------

    def param_groups(self, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimiser's groups: a learned step size has none of the weight decay and a rate of its own.

        Its logarithm is learned at 3 lr, which for the step size itself is EBT's 3 alpha lr.
        """
        weights = [p for name, p in self.named_parameters() if name != "log_alpha" and p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": weights, "lr": lr, "weight_decay": weight_decay}]
        if self.log_alpha is not None:
            groups.append({"params": [self.log_alpha], "lr": 3.0 * lr, "weight_decay": 0.0})
        return groups

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: torch compiles no second derivatives."""
        raise RobopolicyError(
            "An energy policy learns through second derivatives, which torch.compile lacks: use train.compile=false."
        )

    def loss(self, batch: Batch, *, generator: Rng = None) -> Tensor:
        """Return the objective in network units; a batch whose loss is not finite is skipped and counted.

        A skipped batch gives a loss of zero with zero gradients; `num_skipped` says how many there were.
        """
        horizon, action_dim = self.timing.horizon, self.spec.action.dim
        check_shape("action", batch.action, "B H A", H=horizon, A=action_dim)
        with torch.enable_grad():
            cond = self.encoder(self.normalized(batch.obs), generator=generator)
            clean = self.norm.encode("action", batch.action)
            context = self.network.context(cond)  # type: ignore[operator]
            counted = None if self.loss_on_padding else ~batch.is_pad
            kind = self.objective.kind
            if kind == "score":
                loss = self._score_loss(clean, context, counted, generator)
            elif kind == "infonce":
                loss = self._infonce_loss(clean, context, generator)
            else:
                loss = self._unrolled_loss(clean, context, counted, generator)
        if not bool(torch.isfinite(loss)):
            self.num_skipped += 1
            warnings.warn("The loss of a batch is not finite; it is skipped.", RuntimeWarning, stacklevel=2)
            loss = torch.stack([p.sum() * 0.0 for p in self.parameters()]).sum()
        return loss

    def _unrolled_loss(self, clean: Tensor, context: Tensor, counted: Tensor | None, generator: Rng) -> Tensor:
        objective, size = self.objective, len(clean)
        steps = objective.min_steps
        if objective.max_steps > steps:
            source = generator[0] if isinstance(generator, Sequence) else generator
            steps += int(randint(objective.max_steps - steps + 1, 1, generator=source))
        x = self._corrupted(clean, generator) if objective.kind == "denoise" else _noise_like(clean, generator)
        alpha: Tensor | float = self._alpha()
        if objective.alpha_jitter > 1:
            low, high = 1.0 / objective.alpha_jitter, objective.alpha_jitter
            alpha = alpha * (low + (high - low) * rand(size, 1, 1, generator=generator, device=clean.device))
        move: Tensor | None = None
        errors = []
        for k in range(steps):
            last = k == steps - 1
            x, move = self._detached(x, move)
            x, scale = self.rule.normalised(x)
            if std := objective.noise_std(k, steps):
                x = x + std * _noise_like(clean, generator)
            derived = last or objective.graph != "truncated_last"
            moved = self.rule(
                self._energy(context if derived else context.detach()),
                x,
                move,
                alpha,
                scale=scale,
                create_graph=derived,
            )
            x, move = moved.x + moved.move, moved.move
            if last or objective.on_all_steps:
                errors.append(mean_square(x.float() - clean, counted))
        return torch.stack(errors).mean()

    def _detached(self, x: Tensor, move: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Cut the graph between steps where the objective says so."""
        if self.objective.graph == "full_bptt":
            return x, move
        keep_move = self.objective.graph == "momentum_path" or move is None
        return x.detach(), move if keep_move else move.detach()  # type: ignore[union-attr]

    def _corrupted(self, clean: Tensor, generator: Rng) -> Tensor:
        """Return the target with noise of a log-uniform level; `pure_share` of the rows are noise alone."""
        size, objective = len(clean), self.objective
        draw = rand(size, 2, 1, generator=generator, device=clean.device)
        sigma = objective.sigma_min * (objective.sigma_max / objective.sigma_min) ** draw[:, :1]
        pure = draw[:, 1:] < objective.pure_share
        noise = _noise_like(clean, generator)
        kept = clean * (1 - sigma) if objective.corruption == "interpolate" else clean
        return torch.where(pure, noise, torch.addcmul(kept, sigma, noise))

    def _score_loss(self, clean: Tensor, context: Tensor, counted: Tensor | None, generator: Rng) -> Tensor:
        objective = self.objective
        draw = rand(len(clean), 1, 1, generator=generator, device=clean.device)
        sigma = objective.sigma_min * (objective.sigma_max / objective.sigma_min) ** draw
        noise = _noise_like(clean, generator)
        moved = self.rule(self._energy(context), torch.addcmul(clean, sigma, noise), None, 1.0, create_graph=True)
        return mean_square(sigma * moved.gradient.float() - noise, counted)

    def _infonce_loss(self, clean: Tensor, context: Tensor, generator: Rng) -> Tensor:
        """The target's share of exp(-E) among `num_negatives` others: half noise, half own iterates from there."""
        count, size = self.objective.num_negatives, len(clean)
        others = randn(size, count, *clean.shape[1:], generator=generator, device=clean.device)
        own = rearrange(others[:, count // 2 :], "b n h a -> (b n) h a")
        repeated = context.detach().repeat_interleave(count - count // 2, dim=0)
        move: Tensor | None = None
        for _ in range(self.objective.max_steps):
            own, scale = self.rule.normalised(own)
            moved = self.rule(self._energy(repeated), own, move, self._alpha(), scale=scale)
            own, move = (moved.x + moved.move).detach(), moved.move.detach()
        near = rearrange(own, "(b n) h a -> b n h a", b=size)
        candidates = torch.cat([clean[:, None], others[:, : count // 2], near], dim=1)
        flat = rearrange(candidates, "b n h a -> (b n) h a")
        energy = self._energy(context.repeat_interleave(count + 1, dim=0))(flat, None, None)
        share = F.log_softmax(-rearrange(energy, "(b n) -> b n", b=size), dim=1)[:, 0]
        return -share.mean()

    # --- acting -----------------------------------------------------------------------------------------------------

    def act(self, obs: Observation, *, guess: Tensor | None = None, generator: Rng = None) -> Tensor:
        """Return the chunk [B, H, A]; with one generator per row, rows do not depend on their neighbours.

        A guess [B, H, A] in environment units is where the descent starts, after `sampler.warm_noise`.
        """
        return self.act_with_diagnostics(obs, guess=guess, generator=generator)[0]

    def act_with_diagnostics(
        self, obs: Observation, *, guess: Tensor | None = None, generator: Rng = None
    ) -> tuple[Tensor, Diagnostics]:
        """Return `act`'s chunk and what the descent knew of each row; see Diagnostics."""
        self.check_inputs(obs, guess)
        with torch.inference_mode(False), torch.no_grad():
            obs = Observation(modalities={name: _ordinary(value) for name, value in obs.modalities.items()})
            context = self._context(obs)
            if guess is None:
                x, seen = self._from_noise(context, generator)
            else:
                x, seen = self._from_guess(context, _ordinary(guess), generator)
            self.last_diagnostics = seen
            return self.clip(self.norm.decode("action", x)), seen

    @property
    def warm_start(self) -> Descent:
        """What decides how a guess is refined; `num_calls` are its energy steps."""
        return self.sampler

    def refine(
        self, obs: Observation, guess: Tensor, *, warm_start: Any = None, generator: Rng = None
    ) -> tuple[Tensor, Tensor]:
        """Return the chunk that a descent from `guess` finds and, in place of a first estimate, the same chunk.

        What a WarmStartPlanner calls; how the guess is noised and refined is the sampler's to say, so `warm_start` must
        be None.
        """
        self.resolve_warm_start(warm_start)
        chunk = self.act(obs, guess=guess, generator=generator)
        return chunk, chunk

    def resolve_warm_start(self, asked: Any = None) -> Descent:
        """Return what refines a guess, the sampler; raise RobopolicyError if something else is `asked`."""
        if asked is not None:
            raise RobopolicyError(
                "An energy policy descends from its guess as policy.sampler says: set planner.warm_start=null."
            )
        return self.sampler

    def network_calls(self, sampler: Any = None) -> int:
        """Return how many energy steps a chunk from noise takes at most; each is one forward and one input gradient."""
        return (sampler or self.sampler).max_steps * self.num_candidates

    def descent_path(
        self, obs: Observation, *, generator: Rng = None
    ) -> tuple[list[Tensor], Callable[[Tensor], Tensor]]:
        """Return the iterates [B, H, A] of a descent from noise, in network units, and the energy they descend on.

        The energy takes chunks [B, H, A] in network units; of a single observation it takes any number of them.
        """
        path: list[Tensor] = []
        with torch.inference_mode(False), torch.no_grad():
            context = self._context(obs)
            self.sampler(
                self._energy(context),
                self._noise(len(context), generator),
                self.rule,
                self._alpha(),
                record=path.append,
            )

        def energy(x: Tensor) -> Tensor:
            with torch.no_grad():
                x, scale = self.rule.normalised(x)
                return self._energy(context.expand(len(x), *context.shape[1:]))(x, None, scale)

        return path, energy

    def _context(self, obs: Observation) -> Tensor:
        context: Tensor = self.network.context(self.encoder(self.normalized(obs)))  # type: ignore[operator]
        return context

    def _from_noise(self, context: Tensor, generator: Rng) -> tuple[Tensor, Diagnostics]:
        count = self.num_candidates
        if count == 1:
            return self.sampler(self._energy(context), self._noise(len(context), generator), self.rule, self._alpha())
        starts = rearrange(self._noise(len(context), generator, count), "b n h a -> (b n) h a")
        repeated = context.repeat_interleave(count, dim=0)
        x, seen = self.sampler(self._energy(repeated), starts, self.rule, self._alpha())
        at_end, scale = self.rule.normalised(x)
        ends = self._energy(repeated)(at_end, None, scale)
        ends = torch.where(torch.isfinite(ends), ends, torch.inf)
        best = rearrange(ends, "(b n) -> b n", n=count).argmin(dim=1)
        rows = best + count * torch.arange(len(context), device=best.device)
        spread = rearrange(x, "(b n) h a -> b n (h a)", n=count).std(dim=1).mean(dim=1)
        chosen = {name: value[rows] for name, value in vars(seen).items()}
        return x[rows], CandidateDiagnostics(**chosen, disagreement=spread)

    def _from_guess(self, context: Tensor, guess: Tensor, generator: Rng) -> tuple[Tensor, Diagnostics]:
        noise = self._noise(len(context), generator) / self.sampler.start_scale
        start = self.norm.encode("action", guess) + self.sampler.warm_noise * noise
        x, seen = self.sampler(self._energy(context), start, self.rule, self._alpha(), warm=True)
        if self.replan_above is None:
            return x, seen
        again = vars(seen)[self.replan_signal] > self.replan_above
        if not bool(again.any()):
            return x, seen
        fresh, anew = self.sampler(self._energy(context), self.sampler.start_scale * noise, self.rule, self._alpha())
        steps = {"num_steps": torch.where(again, seen.num_steps + anew.num_steps, seen.num_steps)}
        merged = {name: torch.where(again, vars(anew)[name], value) for name, value in vars(seen).items()}
        return torch.where(again[:, None, None], fresh, x), Diagnostics(**{**merged, **steps})

    def _noise(self, size: int, generator: Rng, *more: int) -> Tensor:
        shape = (size, *more, self.timing.horizon, self.spec.action.dim)
        return self.sampler.start_scale * randn(*shape, generator=generator, device=self.device)

    def _alpha(self) -> Tensor | float:
        return self.rule.alpha if self.log_alpha is None else self.log_alpha.exp()

    def _energy(self, context: Tensor) -> Energy:
        """Return the energy given the observations' `context` [B, ...]."""

        def energy(x: Tensor, rows: Tensor | None, scale: Tensor | None) -> Tensor:
            value: Tensor = self.network(x, context if rows is None else context[rows], scale)
            return value

        return energy


def _noise_like(value: Tensor, generator: Rng) -> Tensor:
    return randn(*value.shape, generator=generator, device=value.device)


def _ordinary(value: Tensor) -> Tensor:
    """Return `value`, copied if it was made in inference mode, where nothing can be derived."""
    return value.clone() if value.is_inference() else value
