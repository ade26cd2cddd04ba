"""Run folders with evaluations of the point task: real files, made in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from point_task import HomingActor, PointEnv, info_of, point_spec, run_point
from safetensors.torch import save_file

from robopolicy.atomic import new_folder
from robopolicy.evaluation.results import write_results
from robopolicy.evaluation.rollout import actor_latency
from robopolicy.evaluation.video import record, record_failures


def make_run(root: Path, *, name: str = "run <1>", steps: tuple[int, ...] = (100,), losses: bool = True) -> Path:
    """Return a run folder with a policy of each step, and the losses of training if wanted."""
    run = root / name
    for step in steps:
        folder = run / f"step_{step:08d}"
        folder.mkdir(parents=True)
        save_file({"w": torch.zeros(30, 40), "b": torch.zeros(5)}, folder / "model.safetensors")
        policy = {
            "format": "robopolicy/1",
            "step": step,
            "task_spec": point_spec().to_dict(),
            "timing": {"n_obs_steps": 2, "horizon": 16, "n_action_steps": 8},
            "policy": {"_target_": "robopolicy.policies.diffusion.DiffusionPolicy", "prediction": "sample"},
            "data": {"path": "demos/point.h5", "seeds": [*range(40), *range(50, 60)]},
            "train": {"lr": 1e-3, "batch_size": 128, "command": ["robopolicy", "train", "task=point"]},
        }
        (folder / "policy.json").write_text(json.dumps(policy))
    (run / "last").write_text(f"step_{steps[-1]:08d}\n")
    if losses:
        rows = [{"step": 10 * k, "train/loss": 1 / k, "train/samples_per_s": 5000.0} for k in range(1, 90)]
        rows += [{"step": 100 * k, "val/loss": 2 / k} for k in range(1, 9)]
        cut_short = '{"step": 99'
        (run / "metrics.jsonl").write_text("\n".join([*map(json.dumps, rows), cut_short]))
    return run


def add_evaluation(
    run: Path,
    name: str,
    *,
    step: int = 100,
    n: int = 12,
    seeds: Sequence[int] | None = None,
    film: bool = False,
    lame_above: float = 0.3,
    task: str = "point",
    changes: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """Evaluate an actor that stands still where x > `lame_above`; return the folder.

    Args:
        changes: to the top level of eval_info.json.
        settings: added to those in eval_info.json.
    """
    chosen = list(range(10000, 10000 + n)) if seeds is None else list(seeds)
    result = run_point(4, chosen, lame_above=lame_above)
    with new_folder(run / "eval" / name) as staged:
        video = record(PointEnv(1), result.episodes[:4], staged, size_px=48) if film else None
        failed = [episode for episode in result.episodes if not episode.success_once]
        failures = record_failures(PointEnv(len(failed)), failed, staged, size_px=48) if film else None
        info = info_of(
            result,
            {
                "weights_sha256": "a" * 64,
                "task": task,
                "seeds": chosen,
                "noise_seed": 0,
                "max_episode_steps": 20,
                "n_action_steps": 8,
                "policy_overrides": {},
                **settings,
            },
            checkpoint={"path": f"step_{step}", "step": step, "weights_sha256": "a" * 64},
            latency_batch_1=actor_latency(HomingActor(1), {"proprio": torch.zeros(1, 2)}, num_calls=30),
            video=video,
            failures=failures,
        )
        write_results(staged, {**info, **(changes or {})}, result)
    return run / "eval" / name
