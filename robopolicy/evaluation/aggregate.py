"""Methods over several training seeds and tasks: interquartile mean, intervals, probability of improvement.

Estimators and stratified bootstrap are rliable's (Agarwal et al., 2021; https://arxiv.org/abs/2108.13264): within each
task the training seeds are drawn again. With few training seeds such intervals are too narrow, so whether a difference
is called significant is left to a permutation test (scipy) of the training seeds' mean scores, which is exact at any
number of them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from robopolicy.errors import RobopolicyError
from robopolicy.evaluation.statistics import holm

NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class MethodScore:
    """A method's success over its training seeds and tasks, as fractions."""

    name: str
    scores: np.ndarray
    """[training seeds, tasks]"""
    mean: float
    iqm: float
    """Interquartile mean: of the middle half of all runs."""
    iqm_interval: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types, rates in percent."""
        return {
            "name": self.name,
            "num_training_seeds": self.scores.shape[0],
            "num_tasks": self.scores.shape[1],
            "pc_success": (100 * self.scores).tolist(),
            "pc_mean": 100 * self.mean,
            "pc_iqm": 100 * self.iqm,
            "pc_iqm_ci95": [100 * side for side in self.iqm_interval],
        }


@dataclass(frozen=True, kw_only=True)
class MethodPair:
    """Method `b` against method `a`."""

    a: str
    b: str
    difference: float
    """Mean success of b less that of a, a fraction."""
    improvement: float
    """Probability that a run of b scores higher than one of a, ties counted half; averaged over tasks."""
    improvement_interval: tuple[float, float]
    p_value: float
    p_holm: float
    smallest_p: float
    """What the test could say at most with so many training seeds."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types; the difference in points."""
        return {
            "a": self.a,
            "b": self.b,
            "difference_points": 100 * self.difference,
            "probability_of_improvement": self.improvement,
            "probability_of_improvement_ci95": list(self.improvement_interval),
            "p_permutation": self.p_value,
            "p_holm": self.p_holm,
            "smallest_p": self.smallest_p,
        }


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """All methods, and every pair that was compared."""

    methods: tuple[MethodScore, ...]
    pairs: tuple[MethodPair, ...]


def compare_methods(
    scores: Mapping[str, np.ndarray],
    *,
    baseline: str | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Aggregate:
    """Aggregate each method's scores, and compare the methods pair by pair, or each with `baseline`.

    Args:
        scores: method to success rates [training seeds, tasks]; the same tasks in the same order for all.

    Raises:
        RobopolicyError: a method has fewer than two training seeds, or another number of tasks.
    """
    matrices = {name: np.asarray(matrix, float) for name, matrix in scores.items()}
    if len({matrix.shape[1] for matrix in matrices.values()}) > 1:
        raise RobopolicyError("Methods can be compared on the same tasks only.")
    if few := [name for name, matrix in matrices.items() if len(matrix) < 2]:
        raise RobopolicyError(f"An aggregate needs at least two training seeds of each method; {few[0]!r} has one.")
    pairs = [(baseline, name) for name in matrices if name != baseline] if baseline else None
    pairs = pairs or list(itertools.combinations(matrices, 2))
    methods = _methods(matrices, num_resamples, seed)
    improvements = _improvements(matrices, pairs, num_resamples, seed)
    p_values = [_permutation_p(matrices[a], matrices[b], seed) for a, b in pairs]
    means = {method.name: method.mean for method in methods}
    return Aggregate(
        methods=methods,
        pairs=tuple(
            MethodPair(
                a=a,
                b=b,
                difference=means[b] - means[a],
                improvement=improvements[a, b][0],
                improvement_interval=improvements[a, b][1],
                p_value=p,
                p_holm=corrected,
                smallest_p=smallest_p(len(matrices[a]), len(matrices[b])),
            )
            for (a, b), p, corrected in zip(pairs, p_values, holm(p_values), strict=True)
        ),
    )


def smallest_p(num_a: int, num_b: int) -> float:
    """Return the p-value of the permutation test if every run of one method beats every run of the other."""
    return min(1.0, 2 / math.comb(num_a + num_b, num_a))


def _methods(matrices: Mapping[str, np.ndarray], num_resamples: int, seed: int) -> tuple[MethodScore, ...]:
    library, metrics = _rliable()

    def iqm(matrix: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(matrix)])

    with _numpy_seed(seed):
        points, intervals = library.get_interval_estimates(dict(matrices), iqm, reps=num_resamples)
    return tuple(
        MethodScore(
            name=name,
            scores=matrix,
            mean=float(matrix.mean()),
            iqm=float(points[name][0]),
            iqm_interval=_sides(intervals[name]),
        )
        for name, matrix in matrices.items()
    )


def _improvements(
    matrices: Mapping[str, np.ndarray], pairs: Sequence[tuple[str, str]], num_resamples: int, seed: int
) -> dict[tuple[str, str], tuple[float, tuple[float, float]]]:
    """Return pair (a, b) to the probability that b improves on a, with its interval."""
    library, metrics = _rliable()

    scores = {pair: (matrices[pair[1]], matrices[pair[0]]) for pair in pairs}
    with _numpy_seed(seed):
        points, intervals = library.get_interval_estimates(
            scores, metrics.probability_of_improvement, reps=num_resamples
        )
    return {pair: (float(points[pair]), _sides(intervals[pair])) for pair in pairs}


def _permutation_p(a: np.ndarray, b: np.ndarray, seed: int) -> float:
    """Return the two-sided p-value for equal means of the training seeds' mean scores; exact up to 9,999 splits."""
    from scipy.stats import permutation_test

    def difference(x: np.ndarray, y: np.ndarray, axis: int = -1) -> Any:
        return np.mean(y, axis=axis) - np.mean(x, axis=axis)

    rows = (a.mean(axis=1), b.mean(axis=1))
    rng = np.random.default_rng(seed)
    return float(permutation_test(rows, difference, vectorized=True, n_resamples=9999, rng=rng).pvalue)


def _rliable() -> tuple[Any, Any]:
    """Return rliable's `library` and `metrics`.

    They import absl, whose log handler closes the stream that was standard error at the time as soon as logging is set
    up anew (Hydra's sweeps do). The process's own standard error it leaves alone.
    """
    import absl.logging
    from rliable import library, metrics  # imports pandas: a second

    absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__
    return library, metrics


@contextlib.contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Seed numpy's global generator for the block: rliable resamples with that one, whatever it is given."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def _sides(interval: np.ndarray) -> tuple[float, float]:
    low, high = np.asarray(interval).ravel()
    return float(low), float(high)
