"""Does a policy know when it will fail? Diagnostics of its plans against the outcomes of its episodes.

A signal is good if failed episodes have higher values than successful ones: AUROC, the chance that of a failed and a
successful episode, drawn at random, the failed one has the higher value (ties count half). 0.5 is a coin, and below
means that the sign is wrong. Intervals are bootstrapped over episodes, since plans of one episode are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from robopolicy.errors import RobopolicyError

MIN_FAILURES = 5
"""Below so many failures (or successes) an AUROC says nothing; none is given."""


def auroc(scores: Sequence[float], failed: Sequence[bool]) -> float:
    """Return the probability that a failure scores above a success (Mann-Whitney's U over the number of pairs).

    Raises:
        RobopolicyError: the two differ in length, a score is not finite, or all episodes ended alike.
    """
    values, failures = np.asarray(scores, dtype=float), np.asarray(failed, dtype=bool)
    if values.shape != failures.shape or not np.isfinite(values).all():
        raise RobopolicyError(
            f"AUROC needs one finite score per outcome; got {len(values)} scores for {len(failures)} outcomes."
        )
    if not (failures.any() and (~failures).any()):
        raise RobopolicyError(
            f"AUROC needs failures and successes; got {int(failures.sum())} of {len(failures)} failed."
        )
    return float(_auroc(values[None], failures[None])[0])


def auroc_interval(
    scores: Sequence[float], failed: Sequence[bool], *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of `auroc` over episodes, leaving out resamples that all ended alike."""
    auroc(scores, failed)  # checks
    values, failures = np.asarray(scores, dtype=float), np.asarray(failed, dtype=bool)
    rows = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    drawn = failures[rows]
    mixed = drawn.any(axis=1) & ~drawn.all(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(_auroc(values[rows][mixed], drawn[mixed]), [tail, 1 - tail])
    return float(low), float(high)


def failure_prediction(
    episodes: Sequence[Mapping[str, Any]], *, resamples: int = 2000, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Return per signal how well it tells failed episodes from successful ones.

    Args:
        episodes: rows of episodes.jsonl: `success` and `diagnostics`, the mean of each signal over the episode's plans.

    Returns:
        `{signal: {"auroc", "ci95", "n", "n_failed"}}`, the best signal first; none for a signal that some episode
        lacks, nor where fewer than MIN_FAILURES failed or succeeded.
    """
    failed = [not row["success"] for row in episodes]
    if min(sum(failed), len(failed) - sum(failed)) < MIN_FAILURES:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for name in episodes[0].get("diagnostics") or {}:
        scores = [(row.get("diagnostics") or {}).get(name) for row in episodes]
        known = [float(score) for score in scores if score is not None and np.isfinite(score)]
        if len(known) < len(failed):
            continue
        low, high = auroc_interval(known, failed, resamples=resamples, seed=seed)
        found[name] = {
            "auroc": round(auroc(known, failed), 4),
            "ci95": [round(low, 4), round(high, 4)],
            "n": len(failed),
            "n_failed": sum(failed),
        }
    return dict(sorted(found.items(), key=lambda item: -item[1]["auroc"]))


def replan_threshold(scores: Sequence[float], failed: Sequence[bool], *, false_alarms: float = 0.05) -> float:
    """Return the value that only `false_alarms` of the successful episodes exceed: for `policy.replan_above`."""
    if not 0 < false_alarms < 1:
        raise ValueError(f"false_alarms must be in (0, 1); got {false_alarms}.")
    good = [score for score, bad in zip(scores, failed, strict=True) if not bad]
    if not good:
        raise RobopolicyError("A threshold needs successful episodes; none of these succeeded.")
    return float(np.quantile(good, 1 - false_alarms))


def _auroc(values: np.ndarray, failed: np.ndarray) -> np.ndarray:
    """values, failed [R, N] -> [R]."""
    ranks = rankdata(values, axis=1)
    positives = failed.sum(axis=1)
    above = np.where(failed, ranks, 0.0).sum(axis=1) - positives * (positives + 1) / 2
    fraction: np.ndarray = above / (positives * (values.shape[1] - positives))
    return fraction
