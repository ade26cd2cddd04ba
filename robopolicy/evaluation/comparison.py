"""Policies compared on the same episodes: who wins which seeds, how sure that is, how many episodes would be needed.

Two evaluations are comparable if every episode of one is also an episode of the other: same task, seeds, length,
simulator and conditions (latency, shift). Then the test is the exact McNemar test of the pairs, and the interval that
of Newcombe; pairs where both succeed or both fail say nothing about the difference, which is why few episodes suffice.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from robopolicy.errors import RobopolicyError
from robopolicy.evaluation.results import FORMAT, Evaluation, read_evaluation
from robopolicy.evaluation.statistics import (
    detectable_gap,
    episodes_needed,
    holm,
    mcnemar_exact,
    paired_difference_interval,
)

Outcome = Literal["success", "success_at_end"]
Verdict = Literal["a", "b", "open", "identical"]
SAME_EPISODE = ("success", "success_at_end", "first_success_step", "num_steps", "sum_reward", "max_reward")
"""What must agree for two episodes to be called identical; wherever both evaluations have it."""
METHODS = {
    "test": "exact McNemar, two-sided",
    "interval": "Newcombe for paired proportions (1998, method 10)",
    "correction": "Holm",
}


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two outcomes of each of n episodes, counted."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def n(self) -> int:
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def rate_a(self) -> float:
        return (self.both + self.only_a) / self.n

    @property
    def rate_b(self) -> float:
        return (self.both + self.only_b) / self.n

    @property
    def discordance(self) -> float:
        """Share of episodes in which just one succeeds."""
        return (self.only_a + self.only_b) / self.n

    @property
    def difference(self) -> float:
        """Success rate of b less that of a."""
        return (self.only_b - self.only_a) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Newcombe's 95 % interval of `difference`."""
        return paired_difference_interval(self.both, self.only_b, self.only_a, self.neither)

    @property
    def p_value(self) -> float:
        """Of the exact McNemar test."""
        return mcnemar_exact(self.only_a, self.only_b)


def compare_outcomes(a: Sequence[bool], b: Sequence[bool]) -> Paired:
    """Count the pairs of `a` and `b`, outcomes of the same episodes in the same order.

    Raises:
        ValueError: they are not equally long, or empty.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"compare_outcomes needs as many outcomes of a as of b; got {len(a)} and {len(b)}.")
    pairs = [(bool(one), bool(two)) for one, two in zip(a, b, strict=True)]
    return Paired(
        both=pairs.count((True, True)),
        only_a=pairs.count((True, False)),
        only_b=pairs.count((False, True)),
        neither=pairs.count((False, False)),
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Evaluation `b` against evaluation `a`."""

    a: str
    b: str
    paired: Paired
    p_holm: float
    """Corrected for all pairs that were compared together."""
    num_identical: int
    """Episodes that agree in everything that was recorded of them, not in the outcome alone."""
    seeds_only_a: tuple[int, ...]
    seeds_only_b: tuple[int, ...]
    verdict: Verdict
    """Which one is significantly better, if any; `identical` if every episode is."""
    gap: float
    episodes_needed: int
    """Paired episodes that would show a true difference of `gap` with probability `power`."""
    detectable_gap: float | None
    """True difference that these episodes would have shown with that probability."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types: rates in percent, differences in points."""
        low, high = self.paired.interval
        return {
            "a": self.a,
            "b": self.b,
            "n_episodes": self.paired.n,
            "both_succeed": self.paired.both,
            "only_a_succeeds": self.paired.only_a,
            "only_b_succeeds": self.paired.only_b,
            "neither_succeeds": self.paired.neither,
            "identical_episodes": self.num_identical,
            "difference_points": 100 * self.paired.difference,
            "difference_points_ci95": [100 * low, 100 * high],
            "p_mcnemar": self.paired.p_value,
            "p_holm": self.p_holm,
            "better": {"a": self.a, "b": self.b}.get(self.verdict),
            "identical": self.verdict == "identical",
            "seeds_only_a": list(self.seeds_only_a),
            "seeds_only_b": list(self.seeds_only_b),
            "pc_discordant": 100 * self.paired.discordance,
            "gap_points": 100 * self.gap,
            "n_episodes_for_gap": self.episodes_needed,
            "detectable_gap_points": None if self.detectable_gap is None else 100 * self.detectable_gap,
        }


def read_saved(path: Path) -> Evaluation:
    """Read an evaluation folder, or an `eval_info.json` wherever it lies; alone, it tells successes and rewards.

    Raises:
        RobopolicyError: unreadable, or not written by `robopolicy eval`.
    """
    folder = path if path.is_dir() else path.parent
    if (path.is_dir() or path.name == "eval_info.json") and (folder / "episodes.jsonl").is_file():
        return read_evaluation(folder)
    file = path / "eval_info.json" if path.is_dir() else path
    try:
        info = json.loads(file.read_text())
        found = info.get("format")
        metrics, seeds = (info["per_task"][0]["metrics"], info["settings"]["seeds"]) if found == FORMAT else ({}, [])
    except (OSError, ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
        raise RobopolicyError(f"{file} is not a readable evaluation: {error!r}") from error
    if found != FORMAT:
        raise RobopolicyError(f"{file} has format {found!r}; expected {FORMAT!r}, as `robopolicy eval` writes it.")
    columns = {"success": "successes", "sum_reward": "sum_rewards", "max_reward": "max_rewards"}
    rows = [
        {"episode_ix": i, "seed": seed, **{name: metrics[column][i] for name, column in columns.items()}}
        for i, seed in enumerate(seeds)
    ]
    return Evaluation(folder=folder, info=info, rows=rows)


def conditions(one: Evaluation) -> dict[str, Any]:
    """Return all that must be equal for two evaluations to be of the same episodes."""
    settings, task, versions = one.info["settings"], one.info.get("task_spec", {}), one.info.get("versions", {})
    shift = settings.get("shift")
    found = {
        "task": settings.get("task") or task.get("name"),
        "env_id": task.get("env_id"),
        "robot": task.get("robot"),
        "control_dt_s": (task.get("action") or {}).get("control_dt_s"),
        "seeds": tuple(row["seed"] for row in one.rows),
        "max_episode_steps": settings.get("max_episode_steps") or task.get("max_episode_steps"),
        "latency": settings.get("latency") or "frozen",
        "shift": shift,
        "backend": one.info.get("backend"),
        "mani_skill": versions.get("mani_skill"),
        "sapien": versions.get("sapien"),
    }
    return {**found, "shift_suite": settings.get("shift_suite")} if shift else found


def differences(a: Evaluation, b: Evaluation) -> dict[str, tuple[Any, Any]]:
    """Return condition to its two values, for those that differ."""
    left, right = conditions(a), conditions(b)
    keys = dict.fromkeys([*left, *right])
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def require_comparable(evaluations: Mapping[str, Evaluation], *, per_task: bool = False) -> None:
    """Make sure that all evaluations are of the same episodes; with `per_task`, those of the same task.

    Raises:
        RobopolicyError: they are not; says what differs and how.
    """
    first: dict[Any, tuple[str, Evaluation]] = {}
    for name, one in evaluations.items():
        known, reference = first.setdefault(conditions(one)["task"] if per_task else None, (name, one))
        if found := differences(reference, one):
            lines = "\n".join(f"  - {key}: {_short(x)} against {_short(y)}" for key, (x, y) in found.items())
            raise RobopolicyError(f"{known} and {name} are not of the same episodes and cannot be compared:\n{lines}")


def compare_evaluations(
    evaluations: Mapping[str, Evaluation],
    *,
    baseline: str | None = None,
    outcome: Outcome = "success",
    alpha: float = 0.05,
    gap: float = 0.05,
    power: float = 0.8,
) -> list[Comparison]:
    """Compare every pair of `evaluations`, or each with `baseline`.

    Args:
        evaluations: name to evaluation, two or more.
        outcome: which success counts; `success` is at any step.
        alpha: level of the tests, all of them together.
        gap: difference whose number of episodes is worked out, a fraction.
        power: probability with which it should be found.

    Raises:
        RobopolicyError: they are not of the same episodes, or `outcome` was not measured.
    """
    require_comparable(evaluations)
    outcomes = {name: _outcomes(name, one, outcome) for name, one in evaluations.items()}
    names = list(evaluations)
    pairs = (
        [(baseline, name) for name in names if name != baseline] if baseline else [*itertools.combinations(names, 2)]
    )
    counts = [compare_outcomes(outcomes[a], outcomes[b]) for a, b in pairs]
    corrected = holm([paired.p_value for paired in counts])
    level = alpha / len(pairs)  # Holm is at least as strong as this
    found = []
    for (a, b), paired, p in zip(pairs, counts, corrected, strict=True):
        identical = _num_identical(evaluations[a], evaluations[b])
        seeds = [row["seed"] for row in evaluations[a].rows]
        lost = [seed for seed, x, y in zip(seeds, outcomes[a], outcomes[b], strict=True) if x and not y]
        won = [seed for seed, x, y in zip(seeds, outcomes[a], outcomes[b], strict=True) if y and not x]
        found.append(
            Comparison(
                a=a,
                b=b,
                paired=paired,
                p_holm=p,
                num_identical=identical,
                seeds_only_a=tuple(lost),
                seeds_only_b=tuple(won),
                verdict=_verdict(paired, p, alpha, identical),
                gap=gap,
                episodes_needed=episodes_needed(discordance=paired.discordance, gap=gap, alpha=level, power=power),
                detectable_gap=detectable_gap(paired.n, discordance=paired.discordance, alpha=level, power=power),
            )
        )
    return found


def _outcomes(name: str, one: Evaluation, outcome: Outcome) -> list[bool]:
    found = [row.get(outcome) for row in one.rows]
    if any(value is None for value in found):
        raise RobopolicyError(
            f"{name} has no {outcome}: it was evaluated with stop_on_success=true, or only its eval_info.json is here."
        )
    return [bool(value) for value in found]


def _num_identical(a: Evaluation, b: Evaluation) -> int:
    def same(x: Mapping[str, Any], y: Mapping[str, Any]) -> bool:
        return all(x[key] == y[key] for key in SAME_EPISODE if key in x and key in y)

    return sum(same(x, y) for x, y in zip(a.rows, b.rows, strict=True))


def _verdict(paired: Paired, p_value: float, alpha: float, num_identical: int) -> Verdict:
    if num_identical == paired.n:
        return "identical"
    if p_value > alpha:
        return "open"
    return "b" if paired.difference > 0 else "a"


def _short(value: Any) -> str:
    """Write a condition for a message; many seeds as first to last and how many."""
    if isinstance(value, tuple):
        return f"{value[0]} to {value[-1]} ({len(value)})" if len(value) > 4 else ", ".join(map(str, value))
    return "none" if value is None else str(value)


def score_matrices(
    methods: Mapping[str, Sequence[Evaluation]], outcome: Outcome = "success"
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the tasks, and method to success rates [training seeds, tasks].

    Raises:
        RobopolicyError: a method lacks a task, has more training seeds in one task than in another, or has one twice.
    """
    tasks = list(dict.fromkeys(str(conditions(one)["task"]) for ones in methods.values() for one in ones))
    matrices = {}
    for name, ones in methods.items():
        columns: dict[str, list[float]] = {task: [] for task in tasks}
        for one in ones:
            columns[str(conditions(one)["task"])].append(float(np.mean(_outcomes(name, one, outcome))))
        sizes = {task: len(column) for task, column in columns.items()}
        if len(set(sizes.values())) > 1:
            counted = ", ".join(f"{task} {size}" for task, size in sizes.items())
            raise RobopolicyError(f"Method {name!r} needs as many training seeds in each task; it has {counted}.")
        if len({one.folder for one in ones}) < len(ones):
            raise RobopolicyError(f"Method {name!r} names an evaluation twice; training seeds must be different runs.")
        matrices[name] = np.array(list(columns.values())).T
    return tasks, matrices


def what_differs(a: Evaluation, b: Evaluation) -> list[str]:
    """Return what was changed from `a` to `b` among the settings that may differ, one phrase each."""
    fixed = {"seeds", "task", "shift", "shift_suite", "latency", "max_episode_steps"}
    known = (a.info["settings"].keys() & b.info["settings"].keys()) - fixed  # an older evaluation has fewer
    left, right = _choices(a), _choices(b)
    found = []
    for key in dict.fromkeys([*left, *right]):
        x, y = left.get(key), right.get(key)
        if x != y and key.partition(".")[0] in known:
            found.append("the weights" if key == "weights_sha256" else f"{key} {_short(x)} -> {_short(y)}")
    return found


def _choices(one: Evaluation) -> dict[str, Any]:
    """Return dotted setting to value, with what the command line changed in the policy in force."""
    settings = {key: value for key, value in one.info["settings"].items() if key != "policy_overrides"}
    return dict(_flat(settings)) | dict(one.info["settings"].get("policy_overrides") or {})


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
