"""Compare the batched CPU simulation with ManiSkill's own CPU simulation, for every task and control mode.

Both run the same random episodes: same seeds, same actions. An episode is equal if observations and rewards stay within
the tolerance, and success agrees, at every step. Writes one JSON file; about 10 minutes for everything.

With `against=alone` every row of a batch of 16 is compared with the same episode in a batch of 1 instead: observation,
reward and every number of `info`, to the last bit.

    python scripts/check_batched_equality.py out=docs/batched_cpu_equality.json
    python scripts/check_batched_equality.py against=alone modes=pd_joint_delta_pos,pd_ee_delta_pose
    python scripts/check_batched_equality.py tasks=PickCube-v1,StackCube-v1 modes=pd_ee_delta_pos episodes=4
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robopolicy.envs import TASKS, load_maniskill
from robopolicy.envs.batched_cpu import make_batched
from robopolicy.envs.rendering import inert_materials
from robopolicy.errors import RobopolicyError

TOLERANCE = 1e-4


def control_modes(env_id: str) -> list[str]:
    """Return the control modes that ManiSkill offers for the robot of `env_id`."""
    env = make_batched(env_id, 1, obs_mode="state")
    modes = list(env.agent.supported_control_modes)
    env.close()
    return modes


def random_actions(env: Any, steps: int, seed: int) -> Tensor:
    """Return actions [T, N, A]: uniform over bounded spaces, small moves about the first pose if absolute."""
    generator = torch.Generator().manual_seed(seed)
    width = env.single_action_space.shape[0]
    actions = torch.rand(steps, env.num_envs, width, generator=generator) * 2 - 1
    mode = env.agent.control_mode
    arm = getattr(env.agent.controller, "controllers", {"arm": env.agent.controller})["arm"]
    if mode in ("pd_joint_pos", "pd_joint_pos_vel"):
        joints = arm.qpos.shape[1]
        actions[..., :joints] = arm.qpos + 0.2 * actions[..., :joints]
    if mode == "pd_ee_pose":
        pose = arm.ee_pose_at_base
        actions[..., :3] = pose.p + 0.1 * actions[..., :3]
        turn = torch.tensor([torch.pi, 0.0, 0.0])
        actions[..., 3:6] = turn + 0.2 * actions[..., 3:6]
    return actions


def compare(env_id: str, mode: str, *, episodes: int, steps: int) -> dict[str, Any]:
    """Run `episodes` episodes of `steps` steps both ways; return one row of the table."""
    import gymnasium

    settings = {"obs_mode": "state", "control_mode": mode}
    seeds = list(range(1000, 1000 + episodes))
    batch = make_batched(env_id, episodes, **settings)
    mine = [(batch.reset(seed=seeds)[0].clone(), torch.zeros(episodes), torch.zeros(episodes, dtype=torch.bool))]
    actions = random_actions(batch, steps, seed=7)
    for t in range(steps):
        obs, reward, _, _, info = batch.step(actions[t])
        mine.append((obs.clone(), reward.clone(), info["success"].clone()))
    batch.close()
    with inert_materials():
        stock = gymnasium.make(env_id, sim_backend="physx_cpu", render_backend="none", **settings).unwrapped
        off = torch.zeros(steps + 1, episodes)
        for i, seed in enumerate(seeds):
            # in a new scene: a PhysX scene that has seen episodes continues a little differently, ManiSkill's own too
            obs, _ = stock.reset(seed=seed, options={"reconfigure": True})
            off[0, i] = (obs[0] - mine[0][0][i]).abs().max()
            for t in range(steps):
                obs, reward, _, _, info = stock.step(actions[t, i])
                their = mine[t + 1]
                off[t + 1, i] = max((obs[0] - their[0][i]).abs().max().item(), abs(float(reward) - float(their[1][i])))
                off[t + 1, i] += float(bool(info["success"]) != bool(their[2][i]))
        stock.close()
    equal = (off <= TOLERANCE).all(0)
    return {
        "task": env_id,
        "control_mode": mode,
        "episodes": episodes,
        "equal": int(equal.sum()),
        "initial_difference": float(off[0].max()),
        "median_difference": float(off.max(0).values.median()),
        "worst_difference": float(off.max()),
        "first_unequal_steps": [int(t) for t in (off > TOLERANCE).float().argmax(0)[~equal]],
    }


def rollout(env: Any, seeds: list[int], actions: Tensor) -> Tensor:
    """Return all that `env` tells of episodes from `seeds` [N] with `actions` [T, N, A], as [T + 1, N, X] float64."""
    obs, info = env.reset(seed=seeds)
    steps = [(obs, torch.zeros(len(obs)), info)]
    for action in actions:
        obs, reward, _, _, info = env.step(action)
        steps.append((obs.clone(), reward.clone(), info))
    names = sorted(name for name, value in info.items() if isinstance(value, Tensor))
    return torch.stack(
        [
            torch.cat([x.double().reshape(len(seeds), -1) for x in (obs, reward, *(info[n] for n in names))], dim=1)
            for obs, reward, info in steps
        ]
    )


def compare_alone(env_id: str, mode: str, *, episodes: int, steps: int) -> dict[str, Any]:
    """Run `episodes` episodes in one batch and one by one; return one row of the table."""
    settings, seeds = {"obs_mode": "state", "control_mode": mode}, list(range(1000, 1000 + episodes))
    batch, single = make_batched(env_id, episodes, **settings), make_batched(env_id, 1, **settings)
    batch.reset(seed=seeds)
    actions = random_actions(batch, steps, seed=7)
    together = rollout(batch, seeds, actions)
    off = torch.stack(
        [
            (rollout(single, [seed], actions[:, i : i + 1])[:, 0] - together[:, i]).abs().amax()
            for i, seed in enumerate(seeds)
        ]
    )
    batch.close()
    single.close()
    return {
        "task": env_id,
        "control_mode": mode,
        "episodes": episodes,
        "equal": int((off == 0).sum()),
        "worst_difference": float(off.max()),
    }


def main(arguments: list[str]) -> int:
    options = dict(argument.split("=", 1) for argument in arguments)
    torch.set_num_threads(1)
    load_maniskill()
    tasks = options["tasks"].split(",") if "tasks" in options else [task.env_id for task in TASKS.values()]
    alone = options.get("against") == "alone"
    episodes, steps = int(options.get("episodes", 16 if alone else 20)), int(options.get("steps", 50))
    rows = []
    for env_id in tasks:
        for mode in options["modes"].split(",") if "modes" in options else control_modes(env_id):
            try:
                row = (compare_alone if alone else compare)(env_id, mode, episodes=episodes, steps=steps)
            except RobopolicyError as error:  # PushT's robot lists a mode that ManiSkill's controllers cannot run
                rows.append({"task": env_id, "control_mode": mode, "not_implemented_in_maniskill": str(error)})
                print(f"{env_id:22s} {mode:28s} {error}", flush=True)
                continue
            rows.append(row)
            rest = ("initial_difference", "median_difference", "worst_difference", "first_unequal_steps")
            found = "  ".join(f"{name} {row[name]}" for name in rest if name in row)
            print(f"{env_id:22s} {mode:28s} equal {row['equal']:3d}/{episodes}  {found}", flush=True)
    if "out" in options:
        text = json.dumps({"tolerance": 0.0 if alone else TOLERANCE, "steps": steps, "rows": rows}, indent=1)
        Path(options["out"]).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
