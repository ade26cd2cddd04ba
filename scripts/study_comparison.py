"""Check what `robopolicy compare` says by simulation: false alarms, power against the printed line, coverage.

    python scripts/study_comparison.py      a few minutes; prints tables, writes docs/study_comparison.json

Pairs of outcomes are drawn with a known difference: each episode is won by both policies, by one of them, or by none.
Coverage is that of Newcombe's interval, beside scipy's BCa bootstrap of the paired differences. The last part draws
training seeds: how often methods that are equal are told apart by the permutation test, and by rliable's interval of
the probability of improvement.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from robopolicy.evaluation.aggregate import compare_methods
from robopolicy.evaluation.statistics import (
    episodes_needed,
    mcnemar_exact,
    mcnemar_power,
    paired_difference_interval,
)

ALPHA = 0.05
OUT = Path(__file__).parents[1] / "docs" / "study_comparison.json"


def draw(rng: np.random.Generator, n: int, rate: float, discordance: float, gap: float, repeats: int) -> np.ndarray:
    """Return counts [repeats, 4]: both, only A, only B, neither; `rate` is the mean of the two success rates."""
    only_a, only_b = (discordance + gap) / 2, (discordance - gap) / 2
    both = rate - discordance / 2
    return rng.multinomial(n, [both, only_a, only_b, 1 - both - only_a - only_b], size=repeats)


def rejections(counts: np.ndarray) -> float:
    """Return the share of `counts` that the exact test calls different."""
    pairs = Counter(map(tuple, counts[:, 1:3].tolist()))
    return sum(k for (a, b), k in pairs.items() if mcnemar_exact(a, b) <= ALPHA) / len(counts)


def false_alarms(rng: np.random.Generator, repeats: int) -> list[dict[str, Any]]:
    """Equal policies: how often the test calls them different."""
    rows = []
    for n in (25, 50, 100, 200, 500):
        for discordance in (0.04, 0.1, 0.2, 0.4):
            counts = draw(rng, n, 0.75, discordance, 0.0, repeats)
            exact = mcnemar_power(n, discordance=discordance, gap=0.0)
            rows.append({"n": n, "discordance": discordance, "rejected": rejections(counts), "enumerated": exact})
    return rows


def power(rng: np.random.Generator, repeats: int) -> list[dict[str, Any]]:
    """Policies that differ: how often the test finds it with the number of episodes that the power line names."""
    rows = []
    for gap in (0.05, 0.1, 0.2):
        for discordance in sorted({d for d in (gap, 0.1, 0.2, 0.4) if d >= gap}):
            n = episodes_needed(discordance=discordance, gap=gap)
            counts = draw(rng, n, 0.7, discordance, gap, repeats)
            line = mcnemar_power(n, discordance=discordance, gap=gap)
            rows.append({"gap": gap, "discordance": discordance, "n": n, "found": rejections(counts), "line": line})
    return rows


def coverage(rng: np.random.Generator, repeats: int) -> list[dict[str, Any]]:
    """How often the interval holds the true difference, and how wide it is."""
    rows = []
    for n in (25, 50, 100, 200):
        for rate, discordance, gap in ((0.5, 0.3, 0.0), (0.8, 0.2, 0.1), (0.9, 0.1, 0.05), (0.95, 0.06, 0.0)):
            tables = Counter(map(tuple, draw(rng, n, rate, discordance, gap, repeats).tolist()))
            row: dict[str, Any] = {"n": n, "rate": rate, "discordance": discordance, "gap": gap}
            for name, interval in (("newcombe", paired_difference_interval), ("bca", bca(rng))):
                sides = {table: interval(*table) for table in tables}
                held = sum(k for table, k in tables.items() if sides[table][0] <= gap <= sides[table][1])
                width = sum(k * (sides[table][1] - sides[table][0]) for table, k in tables.items())
                row |= {f"{name}_coverage": held / repeats, f"{name}_width": width / repeats}
            rows.append(row)
    return rows


def bca(rng: np.random.Generator) -> Any:
    """Return scipy's BCa bootstrap of the mean paired difference, as a function of the four counts."""
    known: dict[tuple[int, int, int], tuple[float, float]] = {}

    def interval(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
        key = (only_a, only_b, both + neither)
        if key not in known:
            values = np.repeat([1.0, -1.0, 0.0], key)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no interval where all differences are equal
                found = bootstrap((values,), np.mean, n_resamples=999, method="BCa", rng=rng).confidence_interval
            mean = float(values.mean())
            known[key] = (mean, mean) if np.isnan(found.low) else (float(found.low), float(found.high))
        return known[key]

    return interval


def training_seeds(rng: np.random.Generator, repeats: int) -> list[dict[str, Any]]:
    """Equal methods over a few training seeds: how often each criterion calls them different."""
    rows = []
    for num_seeds, num_tasks in ((2, 1), (3, 1), (5, 1), (3, 4)):
        by_test = by_interval = 0
        for _ in range(repeats):
            rates = np.clip(rng.normal(0.8, 0.05, size=(2, num_seeds, num_tasks)), 0, 1)
            scores = rng.binomial(100, rates) / 100
            (pair,) = compare_methods({"a": scores[0], "b": scores[1]}, num_resamples=200).pairs
            by_test += pair.p_value <= ALPHA
            by_interval += not pair.improvement_interval[0] <= 0.5 <= pair.improvement_interval[1]
        rows.append(
            {
                "training_seeds": num_seeds,
                "tasks": num_tasks,
                "permutation_test": by_test / repeats,
                "improvement_interval": by_interval / repeats,
            }
        )
    return rows


STUDIES = {
    "false_alarms": (false_alarms, 100_000),
    "power": (power, 100_000),
    "coverage": (coverage, 100_000),
    "training_seeds": (training_seeds, 200),
}
"""What is studied, and how often at most: a bootstrap in each repeat takes its time."""


def table(rows: list[dict[str, Any]]) -> str:
    """Return `rows` as a Markdown table."""
    lines = ["| " + " | ".join(rows[0]) + " |", "| " + " | ".join("---" for _ in rows[0]) + " |"]
    for row in rows:
        lines.append("| " + " | ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=2000, help="simulated comparisons per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=STUDIES, help="run one part and leave the results of the others as they are")
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(OUT.read_text()) if args.only else {"alpha": ALPHA}
    for name, (study, most) in STUDIES.items():
        if args.only in (None, name):
            repeats = min(args.repeats, most)
            rows = study(np.random.default_rng(args.seed), repeats)
            result[name] = {"repeats": repeats, "seed": args.seed, "rows": rows}
            print(f"\n{name}, {repeats} repeats\n\n{table(rows)}", flush=True)
            OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
