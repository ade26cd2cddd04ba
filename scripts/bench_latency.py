"""Measure the engines on the published PickCube policy and put the table into docs/latency_engines.md.

    python scripts/bench_latency.py                  # 25 rounds of 20 ticks, about 15 minutes on an idle machine
    python scripts/bench_latency.py rounds=5 success_episodes=0

Further words are settings of `robopolicy bench latency`. A DDPM-100 chain is no single graph by default, because
exporting it takes minutes; `max_unrolled=100 engines=[onnx]` measures it so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
STEM = DOCS / "latency_engines"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
DEFAULTS = ("rounds=25", "ticks=20", "success_episodes=100")


def table(result: dict[str, Any]) -> str:
    """Return the rows of a result as markdown."""
    machine = result["machine"]
    lines = [
        f"{machine['cpu']}, {result['threads']} of {machine['num_cpus']} cores used, torch "
        f"{result['versions']['torch']}; {result['rounds']} rounds of {result['ticks_per_round']} ticks.",
        "",
        "| engine | sampler | calls | median ms | p95 | p99 | first tick | tick / bare | policy / bare | x eager | "
        "x DDPM-100 | success |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ratios = [row["over_bare_calls"], row["policy_over_bare_calls"], row["faster_than_eager"]]
        numbers = [row["median_ms"], row["p95_ms"], row["p99_ms"], row["first_tick_ms"], *ratios]
        cells = [f"{row['network_calls']:.3g}", *("" if n is None else f"{n:.2f}" for n in numbers)]
        faster, success = row["faster_than_ddpm_100"], row["success"]
        cells.append("" if faster is None else f"{faster:.1f}")
        cells.append("" if success is None else f"{success['n_success']}/{success['n_episodes']}")
        lines.append(f"| {row['engine']} | {row['sampler']} | {' | '.join(cells)} |")
    bare = "; ".join(f"{row['engine']} {row['sampler']} {row['median_ms']:.2f} ms" for row in result["floors"])
    return "\n".join([*lines, "", f"Bare network calls: {bare}.", ""])


def main(settings: list[str]) -> None:
    command = [sys.executable, "-m", "robopolicy", "bench", "latency", f"out={STEM}", *DEFAULTS, *settings]
    given = {word.partition("=")[0] for word in settings}
    command = [word for word in command if word not in DEFAULTS or word.partition("=")[0] not in given]
    subprocess.run(command, check=True)
    result = json.loads(STEM.with_suffix(".json").read_text())
    page = STEM.with_suffix(".md")
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(before + BEGIN + table(result) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main(sys.argv[1:])
