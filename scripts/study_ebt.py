"""Energy-based policies against their controls: equal CPU time to train, the same episodes, several step counts.

    python scripts/study_ebt.py --tasks two_goal pick_cube --arms ebt mse_bc     # one process, one thread
    python scripts/study_ebt.py --uncertainty stack_cube                         # who predicts failure?
    python scripts/study_ebt.py --table                                          # the rows as Markdown

Every arm trains on the first 100 demonstrations for the same CPU time at the settings of configs/train.yaml.
`ebt_paper` is the published objective and descent on the default's network, since its own makes a handful of updates
in this time. The averaged weights of the last step act on fresh seeds, once per sampler. Rows go to docs/ebt.json;
finished ones are not run again. Demonstrations: `robopolicy collect task=<task> num_demos=100` beforehand.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from hydra import compose, initialize_config_module

from robopolicy import envs
from robopolicy.app.build import build_policy
from robopolicy.atomic import write_file
from robopolicy.data import batches, load_demonstrations
from robopolicy.envs.shifts import apply, parse_shift
from robopolicy.evaluation.rollout import evaluate
from robopolicy.evaluation.statistics import paired_difference_interval, wilson_interval
from robopolicy.evaluation.uncertainty import failure_prediction
from robopolicy.policies.actors import ChunkActor
from robopolicy.policies.base import Policy
from robopolicy.policies.planners import FreshPlanner, Planner
from robopolicy.policies.warm_start import WarmStartPlanner
from robopolicy.rng import Rng
from robopolicy.sampling.samplers import DDPMSampler
from robopolicy.training.ema import EMA
from robopolicy.training.loop import train
from robopolicy.training.optim import make_optimizer, make_scheduler
from robopolicy.types import Observation

ROWS = Path(__file__).parents[1] / "docs" / "ebt.json"
WEIGHTS = Path("checkpoints") / "study_ebt"
TASKS = ("two_goal", "pick_cube", "stack_cube", "push_cube")
FIRST_SEED = 10_000
FRESH_SEED = 20_000
"""First seed of the episodes on which failure prediction is confirmed: none of them chose a signal or its sign."""
NUM_ENVS = 25


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A policy as it is trained, and the samplers it is then evaluated with."""

    policy: str
    overrides: tuple[str, ...] = ()
    samplers: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"-": {}})
    """Name to changes of `policy.sampler`; besides kind, num_candidates, and every_tick: plan each step anew (fresh) or
    from the last chunk (warm)."""
    calls_per_step: float = 1.0
    """Forward-equivalents of one sampler step: an energy step is a forward and an input gradient, counted as 3."""


COUNTS = (1, 2, 4, 8, 20)
ENERGY_STEPS = {f"{n} steps": {"max_steps": n} for n in COUNTS}
FLOW_STEPS = {f"{n} steps": {"num_inference_steps": n} for n in COUNTS}
SCORE = ("policy.objective.kind=score", "policy.rule.step_size=fixed", "policy.sampler.schedule=flow")
ARMS = {
    "ebt": Arm(
        policy="ebt",
        samplers={
            **ENERGY_STEPS,
            "stops by itself": {"max_steps": 8, "stop": "step_length", "tolerance": 0.03},
            "best of 5, 4 steps": {"max_steps": 4, "num_candidates": 5},
            **{f"{n} steps, every tick": {"max_steps": n, "every_tick": "fresh"} for n in (1, 2, 4)},
            "2 steps from the last chunk": {"warm_steps": 2, "every_tick": "warm"},
            "1 step from the last chunk": {"warm_steps": 1, "every_tick": "warm"},
        },
        calls_per_step=3.0,
    ),
    "ebt_paper": Arm(
        policy="ebt",
        overrides=(
            "policy.network.readout=mean",
            "policy.objective.kind=mse_all_steps",
            "policy.objective.min_steps=6",
            "policy.objective.max_steps=10",
            "policy.objective.graph=momentum_path",
            "policy.objective.train_noise=cosine",
            "policy.objective.alpha_jitter=1.5",
            "policy.rule.step_size=exp_energy",
            "policy.rule.alpha=1000",
            "policy.rule.momentum=0.9",
            "policy.rule.normalise=rms_row",
        ),
        samplers=ENERGY_STEPS,
        calls_per_step=3.0,
    ),
    "diffusion": Arm(
        policy="diffusion",
        samplers={
            "DDPM-100": {"kind": "ddpm", "num_inference_steps": 100},
            **{f"DDIM-{n}": {"num_inference_steps": n} for n in (10, 9, 7, 4)},
        },
    ),
    "flow": Arm(
        policy="flow",
        samplers={
            **FLOW_STEPS,
            **{f"{n} midpoint steps": {"num_inference_steps": n, "method": "midpoint"} for n in (2, 4)},
            "2 late steps": {"num_inference_steps": 2, "times": (0.0, 0.7)},
            "4 late steps": {"num_inference_steps": 4, "times": (0.0, 0.5, 0.8, 0.95)},
            "4 later steps": {"num_inference_steps": 4, "times": (0.0, 0.7, 0.9, 0.98)},
        },
    ),
    "flow_velocity": Arm(
        policy="flow", overrides=("policy.prediction=velocity",), samplers={"8 steps": {"num_inference_steps": 8}}
    ),
    "ebt_score": Arm(
        policy="ebt",
        overrides=(*SCORE, "policy.objective.sigma_max=2"),
        samplers={
            **{f"{n} steps": {"max_steps": n} for n in (4, 8, 20)},
            "best of 5, 8 steps": {"max_steps": 8, "num_candidates": 5},
        },
        calls_per_step=3.0,
    ),
    "ebt_infonce": Arm(
        policy="ebt",
        overrides=("policy.objective.kind=infonce", "policy.rule.step_size=fixed"),
        samplers={
            **{f"{n} steps": {"max_steps": n} for n in (4, 20)},
            "best of 5, 20 steps": {"max_steps": 20, "num_candidates": 5},
        },
        calls_per_step=3.0,
    ),
    "ebt_mse": Arm(  # the published objective alone, on the default's descent
        policy="ebt",
        overrides=(
            "policy.objective.kind=mse_all_steps",
            "policy.objective.min_steps=2",
            "policy.objective.max_steps=2",
        ),
        samplers={f"{n} steps": {"max_steps": n} for n in (2, 4)},
        calls_per_step=3.0,
    ),
    "ebt_transformer": Arm(policy="ebt_transformer", samplers={"4 steps": {"max_steps": 4}}, calls_per_step=3.0),
    "mse_bc": Arm(policy="mse_bc"),
}


PAIRS = (
    (("ebt", "4 steps"), ("diffusion", "DDIM-9")),
    (("ebt", "4 steps"), ("flow", "8 steps")),
    (("flow", "8 steps"), ("diffusion", "DDPM-100")),
    (("flow", "8 steps"), ("mse_bc", "-")),
    (("ebt", "best of 5, 4 steps"), ("ebt", "4 steps")),
    (("ebt", "1 step from the last chunk"), ("ebt", "1 steps, every tick")),
    (("ebt", "2 steps from the last chunk"), ("ebt", "2 steps, every tick")),
    (("ebt", "2 steps from the last chunk"), ("ebt", "4 steps")),
    (("ebt_score", "best of 5, 8 steps"), ("ebt_score", "8 steps")),
)
"""Arms and samplers whose paired difference is asked for."""

EARLY_PLANS = 3
"""Plans of an episode, 24 control steps, from which its end is foretold: most failures come later."""


class Disagreeing(FreshPlanner):
    """Adds the spread of further samples to what the policy says of its plans, and keeps what it said of early ones."""

    def __init__(self, policy: Policy, num_samples: int = 4) -> None:
        super().__init__(policy)
        self._acting, self._count = policy, num_samples
        self._spread: torch.Tensor | None = None
        self._early: list[list[Mapping[str, torch.Tensor]]] = []

    @property
    def diagnostics(self) -> Mapping[str, torch.Tensor]:
        said = dict(super().diagnostics)
        if self._spread is not None:
            said["disagreement"] = self._spread
        return said

    def reset(self, rows: torch.Tensor | None = None) -> None:
        self._early.append([])

    def __call__(
        self, obs: Observation, rows: torch.Tensor, *, shift: torch.Tensor, generator: Rng = None
    ) -> torch.Tensor:
        others = torch.stack([self._acting.act(obs) for _ in range(self._count)])
        self._spread = others.std(dim=0).mean(dim=(1, 2))
        chunk = super().__call__(obs, rows, shift=shift, generator=generator)
        if len(self._early[-1]) < EARLY_PLANS:
            self._early[-1].append(self.diagnostics)
        return chunk

    def early(self, episodes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return `episodes` with the means over their first EARLY_PLANS plans for diagnostics."""
        waves = [wave for wave in self._early if wave]
        columns = {
            name: torch.cat([torch.stack([said[name].float() for said in wave]).mean(dim=0) for wave in waves]).tolist()
            for name in waves[0][0]
        }
        return [
            {"success": row["success"], "diagnostics": {name: values[i] for name, values in columns.items()}}
            for i, row in enumerate(episodes)
        ]


def fit(task: str, arm: Arm, cpu_s: float, seed: int) -> tuple[Policy, dict[str, Any]]:
    """Train an arm for about `cpu_s` CPU seconds; return its averaged policy and what training took."""
    with initialize_config_module("robopolicy.configs", version_base="1.3"):
        cfg = compose("train", [f"task={task}", f"policy={arm.policy}", *arm.overrides])
    store = load_demonstrations(Path("demos") / task / "pd_ee_delta_pos.state.h5", num_episodes=100)
    torch.manual_seed(seed)
    policy = build_policy(cfg.policy, store.spec)
    policy.norm.fit(store.limits())
    settings, accelerator = cfg.train, Accelerator(cpu=True)

    def run(target: Policy, num_steps: int) -> tuple[EMA, float, list[float]]:
        ema = EMA(target, power=settings.ema_power, max_decay=settings.ema_max_decay)
        optimizer = make_optimizer(
            target, lr=settings.lr, betas=tuple(settings.betas), weight_decay=settings.weight_decay
        )
        losses: list[float] = []
        begin = time.process_time()
        train(
            target,
            batches(store, target.timing, batch_size=settings.batch_size, seed=seed),
            accelerator=accelerator,
            optimizer=optimizer,
            scheduler=make_scheduler(optimizer, num_steps=num_steps, warmup_steps=settings.warmup_steps),
            ema=ema,
            num_steps=num_steps,
            seed=seed,
            grad_clip=settings.grad_clip,
            log=lambda step, metrics: losses.append(metrics["train/loss"]),
            save=lambda step, window: None,
        )
        return ema, time.process_time() - begin, losses

    run(copy.deepcopy(policy), 3)
    trial = max(5, min(40, int(cpu_s / 20 / max(run(copy.deepcopy(policy), 2)[1] / 2, 1e-3))))
    per_step = run(copy.deepcopy(policy), trial)[1] / trial
    num_steps = max(10, int(cpu_s / per_step))
    ema, spent, losses = run(policy, num_steps)
    trained: Any = ema.policy
    return trained, {
        "num_steps": num_steps,
        "train_cpu_s": round(spent, 1),
        "step_ms": round(1e3 * spent / num_steps, 2),
        "train_loss": losses[-1],
        "parameters": sum(p.numel() for p in policy.parameters()),
        "num_skipped": int(getattr(policy, "num_skipped", 0)),
    }


def trained(task: str, name: str, cpu_s: float, seed: int) -> tuple[Policy, dict[str, Any]]:
    """Return an arm's averaged policy, from the last run with the same settings if there was one."""
    folder = WEIGHTS / f"{task}-{name}-{cpu_s:g}s-{seed}"
    arm = ARMS[name]
    if (folder / "facts.json").is_file():
        with initialize_config_module("robopolicy.configs", version_base="1.3"):
            cfg = compose("train", [f"task={task}", f"policy={arm.policy}", *arm.overrides])
        store = load_demonstrations(Path("demos") / task / "pd_ee_delta_pos.state.h5", num_episodes=1)
        policy = build_policy(cfg.policy, store.spec)
        policy.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        return policy.eval(), json.loads((folder / "facts.json").read_text())
    policy, facts = fit(task, arm, cpu_s, seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(policy.state_dict(), folder / "weights.pt")
    write_file(folder / "facts.json", json.dumps(facts).encode())
    return policy, facts


def set_up(policy: Any, changes: Mapping[str, Any]) -> tuple[Planner, int]:
    """Change how the policy acts in place; return its planner, and the steps executed per plan."""
    changes = dict(changes)
    policy.num_candidates = changes.pop("num_candidates", 1)
    every_tick = changes.pop("every_tick", None)
    if changes.pop("kind", None) == "ddpm":
        policy.sampler = DDPMSampler(**changes)
    elif changes:
        policy.sampler = dataclasses.replace(policy.sampler, **changes)
    if every_tick == "warm":
        return WarmStartPlanner(policy, NUM_ENVS, hysteresis=0.1), 1
    return FreshPlanner(policy), 1 if every_tick else policy.timing.n_action_steps


def interleaved_ms(calls: Mapping[str, Callable[[], object]], rounds: int = 30) -> dict[str, float]:
    """Return the median milliseconds of each call, all taking turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn >= 3:
                times[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def measure(
    task: str,
    policy: Policy,
    n_episodes: int,
    planner: Planner,
    shift: str = "clean",
    first_seed: int = FIRST_SEED,
    n_action_steps: int | None = None,
) -> dict[str, Any]:
    """Evaluate `policy` on the study's seeds, perturbed by `shift`; return its outcomes."""
    env = envs.make(task, num_envs=NUM_ENVS, backend="cpu", max_episode_steps=policy.spec.max_episode_steps)
    if shift != "clean":
        env = apply(env, parse_shift(shift))
    goals: list[torch.Tensor] = []
    step = env.step

    def noted(action: torch.Tensor) -> Any:
        result = step(action)
        if "goal_index" in result[4]:
            goals.append(result[4]["goal_index"].clone())
        return result

    env.step = noted  # type: ignore[method-assign]
    result = evaluate(
        ChunkActor(planner, NUM_ENVS, n_action_steps=n_action_steps),
        env,
        seeds=range(first_seed, first_seed + n_episodes),
    )
    env.close()
    row: dict[str, Any] = {
        "n_episodes": n_episodes,
        "success_once": result.success_once,
        "ci95": [round(side, 4) for side in result.interval],
        "success_at_end": result.success_at_end,
        "failed_seeds": [e.seed for e in result.episodes if not e.success_once],
    }
    if goals:
        at_end = torch.stack(goals).reshape(-1, policy.spec.max_episode_steps, NUM_ENVS)[:, -1].flatten()[:n_episodes]
        row["goals"] = [int((at_end == goal).sum()) for goal in (0, 1)]
    said = [episode.diagnostics for episode in result.episodes]
    counted = next((name for name in ("network_calls", "num_steps") if said and name in said[0]), None)
    if counted:
        row["mean_steps"] = round(statistics.fmean(float(one[counted] or 0) for one in said), 3)
    row["episodes"] = [{"success": e.success_once, "diagnostics": dict(e.diagnostics)} for e in result.episodes]
    return row


def study(
    task: str, name: str, labels: Sequence[str], *, cpu_s: float, seed: int, n_episodes: int, shift: str = "clean"
) -> None:
    """Train an arm on a task and evaluate it with each of the samplers `labels`, where it has them; append its rows."""
    arm = ARMS[name]
    key = {"task": task, "arm": name, "cpu_s": cpu_s, "seed": seed, "shift": shift}
    todo = [label for label in labels if label in arm.samplers and not _finished({**key, "sampler": label})]
    if not todo:
        return
    policy, facts = trained(task, name, cpu_s, seed)
    for label in todo:
        acting: Any = copy.deepcopy(policy)
        planner, n_action_steps = set_up(acting, arm.samplers[label])
        begin = time.process_time()
        row = measure(task, acting, n_episodes, planner, shift, n_action_steps=n_action_steps)
        calls = row.pop("mean_steps", None) or acting.network_calls()
        row["network_calls"] = round(calls * getattr(acting, "num_candidates", 1), 2)
        row["forward_equivalents"] = round(arm.calls_per_step * row["network_calls"], 2)
        row["n_action_steps"] = n_action_steps
        row["failure_prediction"] = failure_prediction(row.pop("episodes"))
        _append({**key, "sampler": label, **row, **facts, "eval_cpu_s": round(time.process_time() - begin, 1)})


def timing(task: str, names: Sequence[str], cpu_s: float, seed: int) -> None:
    """Measure one `act` at batch 1 of every arm and sampler, interleaved; add the milliseconds to their rows."""
    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        policy, _ = trained(task, name, cpu_s, seed)
        for label, changes in ARMS[name].samplers.items():
            acting: Any = copy.deepcopy(policy)
            set_up(acting, changes)
            obs = Observation(
                modalities={
                    key: torch.zeros(1, acting.timing.n_obs_steps, *m.shape)
                    for key, m in acting.spec.observation.items()
                }
            )
            guess = acting.act(obs) if changes.get("every_tick") == "warm" else None
            given = {} if guess is None else {"guess": guess}
            calls[f"{name} {label}"] = functools.partial(acting.act, obs, **given)
    found = interleaved_ms(calls)
    rows = _read()
    rows["act_ms_batch1"] = {"task": task, "median_ms": {label: round(ms, 3) for label, ms in found.items()}}
    _write(rows)


def uncertainty(task: str, shifts: Sequence[str], *, cpu_s: float, seed: int, n_episodes: int) -> None:
    """Ask which signal of the default policy tells failures: on clean episodes and on perturbed ones together."""
    policy, _ = trained(task, "ebt", cpu_s, seed)
    pooled: dict[str, list[dict[str, Any]]] = {"whole_episode": [], "first_plans": []}
    for shift in ("clean", *shifts):
        planner = Disagreeing(policy)
        row = measure(task, policy, n_episodes, planner, shift, FRESH_SEED)
        parts = {"whole_episode": row["episodes"], "first_plans": planner.early(row["episodes"])}
        found = {name: failure_prediction(episodes) for name, episodes in parts.items()}
        for name, episodes in parts.items():
            pooled[name] += episodes
        rows = _read()
        mine = rows.setdefault("uncertainty", {}).setdefault(task, {})
        mine[shift] = {"n_episodes": n_episodes, "success_once": row["success_once"], **found}
        mine["pooled"] = {name: failure_prediction(episodes) for name, episodes in pooled.items()}
        _write(rows)
        print(task, shift, json.dumps(mine[shift]), flush=True)


def table(shift: str = "clean") -> str:
    """Return the rows as Markdown, one table per task."""
    rows, lines = _read(), []
    times = rows.get("act_ms_batch1", {}).get("median_ms", {})
    for task in TASKS:
        mine = [row for row in rows["rows"] if row["task"] == task and row.get("shift", "clean") == shift]
        if not mine:
            continue
        lines += [
            f"**{task}**, {mine[0]['n_episodes']} episodes per training seed",
            "",
            "| arm | sampler | success | 95 % | n | at end | goals left / right | against DDPM-100, points "
            "| against MSE-BC, points | updates | forwards per plan / action | ms per plan / action |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, arm in ARMS.items():
            for label in arm.samplers:
                same = [row for row in mine if (row["arm"], row["sampler"]) == (name, label)]
                if same:
                    against = [
                        _difference(same, mine, *other) for other in (("diffusion", "DDPM-100"), ("mse_bc", "-"))
                    ]
                    lines.append(_line(name, label, same, against, times.get(f"{name} {label}")))
        lines.append("")
    return "\n".join(lines)


def pairs_table() -> str:
    """Return the paired differences of PAIRS as Markdown: one row per pair, one column per task."""
    rows = [row for row in _read()["rows"] if row.get("shift", "clean") == "clean"]
    lines = [f"| pair | {' | '.join(TASKS)} |", "|---" * (len(TASKS) + 1) + "|"]
    for first, second in PAIRS:
        cells = []
        for task in TASKS:
            mine = [row for row in rows if row["task"] == task]
            same = [row for row in mine if (row["arm"], row["sampler"]) == first]
            cells.append(_difference(same, mine, *second))
        lines.append(f"| {', '.join(first)} - {', '.join(second)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def uncertainty_table() -> str:
    """Return the AUROCs as Markdown: one row per signal, two columns per condition."""
    lines = []
    for task, conditions in _read().get("uncertainty", {}).items():
        names = [name for name in conditions if name != "pooled" and conditions[name].get("whole_episode")]
        columns = [(name, part) for name in names for part in ("whole_episode", "first_plans")]
        heads = [f"{name}, {part.replace('_', ' ')}" for name, part in columns]
        failed = ", ".join(f"{name} {1 - conditions[name]['success_once']:.0%}" for name in names)
        lines += [
            f"**{task}**, failed: {failed}",
            "",
            f"| signal | {' | '.join(heads)} |",
            "|---" * (len(heads) + 1) + "|",
        ]
        for signal in ("energy_drop", "gradient_norm", "disagreement", "energy", "num_steps"):
            cells = []
            for name, part in columns:
                found = conditions[name][part].get(signal)
                cells.append("-" if found is None else "{:.2f} ({:.2f}-{:.2f})".format(found["auroc"], *found["ci95"]))
            lines.append(f"| {signal} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _difference(same: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], arm: str, sampler: str) -> str:
    """Return the paired difference of success to another arm's rows of the same training seeds, with its interval."""
    counts = [0, 0, 0, 0]
    for row in same:
        other = [r for r in rows if (r["arm"], r["sampler"], r["seed"]) == (arm, sampler, row["seed"])]
        if not other or other[0] is row:
            continue
        mine, theirs = set(row["failed_seeds"]), set(other[0]["failed_seeds"])
        found = (len(theirs - mine), len(mine - theirs), len(mine & theirs))  # only mine, only theirs, neither
        counts = [a + b for a, b in zip(counts, (row["n_episodes"] - sum(found), *found), strict=True)]
    if not any(counts):
        return "-"
    low, high = paired_difference_interval(*counts)
    return f"{100 * (counts[1] - counts[2]) / sum(counts):+.0f} ({100 * low:+.0f} to {100 * high:+.0f})"


def _line(name: str, label: str, same: Sequence[Mapping[str, Any]], against: Sequence[str], ms: float | None) -> str:
    n = sum(row["n_episodes"] for row in same)
    hits = round(sum(row["success_once"] * row["n_episodes"] for row in same))
    low, high = wilson_interval(hits, n)
    at_end = sum(row["success_at_end"] * row["n_episodes"] for row in same) / n
    goals = "-"
    if "goals" in same[0]:
        left, right = (sum(row["goals"][i] for row in same) / n for i in (0, 1))
        goals = f"{left:.0%} / {right:.0%}"
    forwards = statistics.fmean(row["forward_equivalents"] for row in same)
    per_plan = same[0].get("n_action_steps", 8)
    cost = f"{forwards:.3g} / {forwards / per_plan:.2g}"
    time_ms = "-" if ms is None else f"{ms:.2f} / {ms / per_plan:.2f}"
    return (
        f"| {name} | {label} | {hits / n:.1%} | {low:.0%}-{high:.0%} | {n} | {at_end:.1%} | {goals} | "
        f"{against[0]} | {against[1]} | {', '.join(str(row['num_steps']) for row in same)} | {cost} | {time_ms} |"
    )


def _read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ROWS.read_text()) if ROWS.exists() else {"rows": []}
    return found


def _write(rows: Mapping[str, Any]) -> None:
    write_file(ROWS, (json.dumps(rows, indent=1) + "\n").encode())


def _append(row: dict[str, Any]) -> None:
    rows = _read()
    rows["rows"].append(row)
    _write(rows)
    shown = (
        "task",
        "arm",
        "sampler",
        "shift",
        "success_once",
        "success_at_end",
        "goals",
        "network_calls",
        "num_steps",
        "step_ms",
        "eval_cpu_s",
    )
    print(json.dumps({name: row[name] for name in shown if name in row}), flush=True)


def _finished(key: Mapping[str, Any]) -> bool:
    rows = [{"shift": "clean", **row} for row in _read()["rows"]]
    return any(all(row.get(name) == value for name, value in key.items()) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=[], choices=TASKS)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--samplers", nargs="*", help="only these, where an arm has them; all if not given")
    parser.add_argument("--cpu-s", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--shift", default="clean", help="a perturbation, as eval's shift=")
    parser.add_argument("--uncertainty", metavar="TASK")
    parser.add_argument("--shifts", nargs="*", default=[], help="perturbations for --uncertainty, as eval's shift=")
    parser.add_argument("--timing", metavar="TASK", help="milliseconds per act of the trained arms of a task")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for task in args.tasks:
        for name in args.arms:
            labels = args.samplers or list(ARMS[name].samplers)
            study(task, name, labels, cpu_s=args.cpu_s, seed=args.seed, n_episodes=args.episodes, shift=args.shift)
    if args.timing:
        timing(args.timing, args.arms, args.cpu_s, args.seed)
    if args.uncertainty:
        uncertainty(args.uncertainty, args.shifts, cpu_s=args.cpu_s, seed=args.seed, n_episodes=args.episodes)
    if args.table:
        print(table(args.shift))
        print(pairs_table())
        print(uncertainty_table())


if __name__ == "__main__":
    main()
