"""A goal that keeps moving, always to where the task itself could have put it: who reaches more of them in time?

    python scripts/study_chase.py            # every arm, one process; finished rows are not run again
    python scripts/study_chase.py --table    # the rows as Markdown, with paired differences

PickCube with the published policy. After 40 control steps (2 s) the goal is drawn anew from the task's own region, and
so again every `period` steps, 8 times. A goal counts as reached if the task was solved (cube within 2.5 cm, arm still)
before the next one came. `shift=goal_moved` cannot ask this with large moves: 20 cm in a horizontal direction
usually ends outside everything that demonstrations showed. Rows go to docs/rti_chase.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mani_skill.utils.structs.pose import Pose
from scipy import stats
from study_rti import FIRST_SEED, NUM_ENVS, Arm, environment, load, planner, rti
from torch import Tensor

from robopolicy.atomic import write_file
from robopolicy.envs.shifts_physical import Physical
from robopolicy.evaluation.rollout import evaluate
from robopolicy.policies.actors import ChunkActor
from robopolicy.types import Environment, Frame

ROWS = Path(__file__).parents[1] / "docs" / "rti_chase.json"
RUN = "pick_cube-diffusion"
NUM_EPISODES = 100
NUM_GOALS = 8
FIRST_STEP = 40
PERIODS = (20, 12)
ARMS = {
    "DDPM-100, chunk 8": Arm(ddpm=100, steps=8),
    "DDIM-4, chunk 8": Arm(ddim=4, steps=8),
    "DDIM-4, chunk 4": Arm(ddim=4, steps=4),
    "DDIM-4, chunk 1": Arm(ddim=4),
    "rti": rti(),
    "rti_paper": Arm(planner="rti_paper"),
    "rti [0], 1 call": rti(0),
    "DDIM-1, chunk 1": Arm(ddim=1),
}


class Chase(Physical):
    """PickCube whose goal jumps within the task's own region every `strength` control steps."""

    def __init__(self, env: Environment, period: int) -> None:
        super().__init__(env, period, name="chase")
        self.reached: list[np.ndarray] = []
        """Of each wave [N, NUM_GOALS], steps from the goal's appearance to success, 0 if it was not reached."""

    def begin(self, rows: Sequence[int]) -> None:
        self.reached.append(np.zeros((self.num_envs, NUM_GOALS), dtype=np.int64))

    def before_step(self) -> None:
        since = int(self.steps[0]) - FIRST_STEP
        if since < 0 or since % int(self.strength):
            return
        task, half = self.base, self.base.cube_spawn_half_size
        for row, draws in enumerate(self.draws):
            x, y = draws.uniform(-half, half, size=2) + task.cube_spawn_center
            z = draws.uniform(0.0, task.max_goal_height) + task.cube_half_size
            with self.only(row):
                task.goal_site.set_pose(Pose.create_from_pq(torch.tensor([[x, y, z]], dtype=torch.float32)))
        self.flush()

    def step(self, actions: Tensor) -> tuple[Frame, Tensor, Tensor, Tensor, dict[str, Any]]:
        since = int(self.steps[0]) - FIRST_STEP
        out = super().step(actions)
        if since >= 0:
            goal, waited = divmod(since, int(self.strength))
            first = out[-1]["success"].numpy() & (self.reached[-1][:, goal] == 0)
            self.reached[-1][first, goal] = waited + 1
        return out


def run(name: str, period: int) -> dict[str, Any]:
    """Evaluate one arm; return its row."""
    loaded = load(RUN)
    steps = FIRST_STEP + NUM_GOALS * period
    env = environment(loaded, steps)
    chase = Chase(env, period)
    arm = ARMS[name]
    plans, settings = planner(arm, loaded)
    every = arm.steps if arm.planner is None else plans.timing.n_action_steps
    begin = time.process_time()
    actor = ChunkActor(plans, NUM_ENVS, n_action_steps=every)
    evaluate(actor, chase, seeds=range(FIRST_SEED, FIRST_SEED + NUM_EPISODES), max_episode_steps=steps)
    env.close()
    reached = np.concatenate(chase.reached)
    return {
        "arm": name,
        "period": period,
        **settings,
        "n_action_steps": every,
        "n": NUM_EPISODES,
        "reached": "".join(str(int(count)) for count in (reached > 0).sum(axis=1)),
        "median_steps": float(np.median(reached[reached > 0])),
        "cpu_s": round(time.process_time() - begin, 1),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as Markdown: share of goals reached, paired differences with t intervals over episodes."""
    head = "| arm | new goal every | goals reached | 95 % | difference to the first, points | steps to a goal |"
    out = [head, "|" + "---|" * 6]
    for period in PERIODS:
        same = [row for row in rows if row["period"] == period]
        base = _shares(same[0]) if same else None
        for row in same:
            shares = _shares(row)
            low, high = _interval(shares)
            gap = shares - base
            a, b = _interval(gap)
            out.append(
                f"| {row['arm']} | {period} steps | {shares.mean():.1%} | {low:.1%} to {high:.1%} | "
                + ("-" if row is same[0] else f"{100 * gap.mean():+.1f} ({100 * a:+.1f} to {100 * b:+.1f})")
                + f" | {row['median_steps']:.0f} |"
            )
    return "\n".join(out)


def _shares(row: Mapping[str, Any]) -> np.ndarray:
    return np.array([int(digit) for digit in row["reached"]]) / NUM_GOALS


def _interval(values: np.ndarray) -> tuple[float, float]:
    if np.ptp(values) == 0.0:
        return float(values[0]), float(values[0])
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else []
    if args.table:
        print(table(rows))
        return
    done = {(row["arm"], row["period"]) for row in rows}
    for period in PERIODS:
        for name in ARMS:
            if (name, period) in done:
                continue
            rows.append(run(name, period))
            lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
            write_file(ROWS, f"[\n{lines}\n]\n".encode())
            print(table(rows[-1:]).splitlines()[-1], rows[-1]["cpu_s"], flush=True)


if __name__ == "__main__":
    main()
