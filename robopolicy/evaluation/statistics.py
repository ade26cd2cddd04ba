"""What may be concluded from n episodes: success with its interval, latencies as median and 95th percentile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest


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
