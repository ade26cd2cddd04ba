"""What may be concluded from n episodes: a success rate, the difference of two, how many would be needed; latencies.

Fractions in [0, 1] throughout. Pairs are two outcomes of one seed; `discordant` are those in which just one succeeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom, binomtest


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Wilson score interval of a success rate as fractions in [0, 1] (Wilson, 1927; through scipy).

    It stays inside [0, 1] and keeps a width at 0 and at n successes, where the textbook normal interval collapses.

    Raises:
        ValueError: `n` is not positive, or `successes` is not in [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson_interval needs 0 <= successes <= n and n >= 1; got {successes} of {n}.")
    interval = binomtest(int(successes), int(n)).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Return the two-sided p-value of the exact McNemar test (McNemar, 1947; the binomial test of scipy).

    Under no difference, each episode in which just one of the two succeeds falls to either side like a coin. The test
    is never too eager: where there is no difference, it finds one in at most `alpha` of all cases.

    Args:
        only_a: episodes in which A alone succeeded.
        only_b: episodes in which B alone succeeded.
    """
    discordant = only_a + only_b
    return float(binomtest(int(only_a), int(discordant), 0.5).pvalue) if discordant else 1.0


def paired_difference_interval(
    both: int, only_a: int, only_b: int, neither: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return Newcombe's interval of rate(A) - rate(B) over the same episodes (method 10 of Stat. Med. 17, 2635, 1998).

    It joins the Wilson intervals of the two rates, which are scipy's, by the correlation phi of the pairs. scipy and
    statsmodels have no interval for paired rates but the bootstrap, and that has no width where no episode differs and
    covers too little where few do (docs/comparison.md).

    Raises:
        ValueError: a count is negative or all are zero.
    """
    n = both + only_a + only_b + neither
    if n < 1 or min(both, only_a, only_b, neither) < 0:
        raise ValueError(
            f"paired_difference_interval needs counts, not all zero; got {(both, only_a, only_b, neither)}."
        )
    successes_a, successes_b = both + only_a, both + only_b
    rate_a, rate_b = successes_a / n, successes_b / n
    low_a, high_a = wilson_interval(successes_a, n, confidence)
    low_b, high_b = wilson_interval(successes_b, n, confidence)
    margins = successes_a * (n - successes_a) * successes_b * (n - successes_b)
    product = both * neither - only_a * only_b
    corrected = max(0.0, product - n / 2) if product > 0 else product
    phi = corrected / math.sqrt(margins) if margins else 0.0
    down_a, up_a, down_b, up_b = rate_a - low_a, high_a - rate_a, rate_b - low_b, high_b - rate_b
    below = math.sqrt(max(0.0, down_a**2 - 2 * phi * down_a * up_b + up_b**2))
    above = math.sqrt(max(0.0, down_b**2 - 2 * phi * down_b * up_a + up_a**2))
    return max(-1.0, rate_a - rate_b - below), min(1.0, rate_a - rate_b + above)


def mcnemar_power(n: int, *, discordance: float, gap: float, alpha: float = 0.05) -> float:
    """Return the probability that the exact McNemar test rejects, by enumeration of what `n` episodes may give.

    The number of discordant episodes is binomial, and so is A's share of them; no approximation is made.

    Args:
        discordance: share of episodes in which just one of the two succeeds.
        gap: true difference of the success rates, at most `discordance`.

    Raises:
        ValueError: `gap` is larger than `discordance`, or one is outside [0, 1].
    """
    if not 0 <= abs(gap) <= discordance <= 1:
        raise ValueError(f"mcnemar_power needs |gap| <= discordance <= 1; got gap={gap}, discordance={discordance}.")
    if discordance < 1e-12:  # scipy overflows near the smallest numbers
        return 0.0
    least, most = binom.ppf([1e-12, 1 - 1e-12], n, discordance)
    discordant = np.arange(int(least), int(most) + 1)
    critical = binom.ppf(alpha / 2, discordant, 0.5)
    critical -= binom.cdf(critical, discordant, 0.5) > alpha / 2  # the largest count on one side that rejects; -1: none
    share = (1 + gap / discordance) / 2
    rejects = binom.cdf(critical, discordant, share) + binom.sf(discordant - critical - 1, discordant, share)
    return float(np.sum(binom.pmf(discordant, n, discordance) * rejects))


def episodes_needed(*, discordance: float, gap: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Return the number of paired episodes with which the exact McNemar test finds `gap` with probability `power`.

    `discordance` is raised to `gap` where it is smaller: a gap needs at least as many discordant episodes.
    """
    if not (0 < gap <= 1 and 0 < power < 1):
        raise ValueError(f"episodes_needed needs 0 < gap <= 1 and 0 < power < 1; got gap={gap}, power={power}.")

    def enough(n: int) -> bool:
        return mcnemar_power(n, discordance=max(discordance, gap), gap=gap, alpha=alpha) >= power

    high = 8
    while not enough(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def detectable_gap(n: int, *, discordance: float, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """Return the smallest true gap that `n` paired episodes find with probability `power`; None if they find none."""

    def excess(gap: float) -> float:
        return mcnemar_power(n, discordance=max(discordance, gap), gap=gap, alpha=alpha) - power

    return float(brentq(excess, 0.0, 1.0, xtol=1e-6)) if excess(1.0) >= 0 else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, so that all of them together err in at most `alpha` (Holm, 1979)."""
    if len(p_values) < 2:
        return [float(p) for p in p_values]
    from statsmodels.stats.multitest import multipletests  # takes a second to import

    return [float(p) for p in multipletests(p_values, method="holm")[1]]


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds that each call took, after the first `num_dropped` calls were left out as warm-up."""

    seconds: tuple[float, ...]
    batch_size: int
    """Environments answered by one call; a robot feels the latency at batch 1."""
    num_dropped: int

    @property
    def median_s(self) -> float:
        return float(np.median(self.seconds)) if self.seconds else float("nan")

    @property
    def p95_s(self) -> float:
        return float(np.percentile(self.seconds, 95)) if self.seconds else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types; milliseconds, and None where no call was left to measure."""
        known = bool(self.seconds)
        return {
            "batch_size": self.batch_size,
            "num_calls": len(self.seconds),
            "num_warmup_dropped": self.num_dropped,
            "median_ms": 1e3 * self.median_s if known else None,
            "p95_ms": 1e3 * self.p95_s if known else None,
            "calls_ms": [round(1e3 * s, 4) for s in self.seconds],
        }


def drop_warmup(seconds: Sequence[float], *, batch_size: int, num_warmup: int) -> Latency:
    """Leave out the first `num_warmup` calls (allocation, caches, compilation)."""
    dropped = min(num_warmup, len(seconds))
    return Latency(seconds=tuple(seconds[dropped:]), batch_size=batch_size, num_dropped=dropped)
