"""Does a calibrated warm start do as well in closed loop as the default one? On the same episodes.

    python scripts/study_calibration.py pick_cube-diffusion checkpoints/rti/stack_cube-s1

Each run is calibrated (robopolicy calibrate, seeds from 20000) and evaluated on 200 episodes, seeds 10000 and on, with
planner=rti as it is without calibration and with what was calibrated. Rows go to docs/rti_calibration.json, one per
run; a run's row is replaced. `--table` prints them. Calibrations are kept in outputs/calibration and used again; the
default's outcomes are taken from docs/rti.json where they are there, on the same episodes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from study_rti import FIRST_SEED, NUM_ENVS, environment

from robopolicy.app import calibrate, composing
from robopolicy.app.build import UNCALIBRATED, build_planner, build_policy
from robopolicy.atomic import write_file
from robopolicy.evaluation.comparison import compare_outcomes
from robopolicy.evaluation.rollout import evaluate
from robopolicy.policies.actors import ChunkActor
from robopolicy.training import checkpoint

ROWS = Path(__file__).parents[1] / "docs" / "rti_calibration.json"
KEPT = Path("outputs") / "calibration"
NUM_EPISODES = 200


def run(name: str) -> dict[str, Any]:
    """Calibrate and evaluate the checkpoint `name`; return its row."""
    folder = KEPT / Path(name).name
    if not (folder / "calibration.json").is_file():
        calibrate.run(composing.compose("calibrate", [f"checkpoint={name}", f"out={folder}"]))
    found = json.loads((folder / "calibration.json").read_text())
    kept = ("warm_start", "why", "remaining", "two_modes", "dimensions", "discrete_at_other_end")
    row: dict[str, Any] = {"run": Path(name).name, **{key: found[key] for key in kept}}
    loaded = checkpoint.load(name, build_policy)
    env = environment(loaded)
    row["default"] = _studied(row["run"])
    for arm, levels in (("default", UNCALIBRATED["timesteps"]), ("calibrated", found["warm_start"]["timesteps"])):
        if row.get(arm):
            continue
        words = ["planner=rti", f"planner.warm_start.timesteps={levels}".replace(" ", "")]
        planner = build_planner(composing.compose("eval", words).planner, loaded.policy, NUM_ENVS, loaded.path)
        result = evaluate(ChunkActor(planner, NUM_ENVS), env, seeds=range(FIRST_SEED, FIRST_SEED + NUM_EPISODES))
        row[arm] = {
            "timesteps": levels,
            "success": "".join(str(int(e.success_once)) for e in result.episodes),
            "success_at_end": "".join(str(int(bool(e.success_at_end))) for e in result.episodes),
        }
    env.close()
    return row


def _studied(run: str) -> dict[str, Any] | None:
    """Return the default's outcomes from docs/rti.json, whose episodes are the same; None if it has none."""
    for row in json.loads((ROWS.parent / "rti.json").read_text())["rows"]:
        is_default = row["arm"] == "rti" and row["disturbance"] is None and row["n"] >= NUM_EPISODES
        if is_default and row["run"] == run and row["timesteps"] == UNCALIBRATED["timesteps"]:
            outcomes = {name: row[name][:NUM_EPISODES] for name in ("success", "success_at_end")}
            return {"timesteps": row["timesteps"], **outcomes}
    return None


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| run | default | success | at the end | calibrated | success | at the end | points gained | at the end |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        cells = [row["run"]]
        for arm in ("default", "calibrated"):
            shares = [row[arm][when].count("1") / len(row[arm][when]) for when in ("success", "success_at_end")]
            cells += [str(row[arm]["timesteps"]), *(f"{share:.1%}" for share in shares)]
        for when in ("success", "success_at_end"):
            pair = compare_outcomes(*([bit == "1" for bit in row[arm][when]] for arm in ("default", "calibrated")))
            low, high = pair.interval
            cells.append(f"{100 * pair.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else []
    for name in args.runs:
        row = run(name)
        rows = [one for one in rows if one["run"] != row["run"]] + [row]
        write_file(ROWS, (json.dumps(rows, indent=2) + "\n").encode())
    if args.table or args.runs:
        print(table(rows))


if __name__ == "__main__":
    main()
