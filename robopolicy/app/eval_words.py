"""What an evaluation is called, how it is repeated, and what is said of it at the end."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from robopolicy.app.cli import configs_folder

if TYPE_CHECKING:
    from rich.console import Console

    from robopolicy.evaluation.results import Evaluation

MOST_SEEDS_SHOWN = 20
FREE_CHOICES = {"latency": "frozen", "executor": "async", "shift": None, "engine": "eager"}
"""Settings whose value joins the folder's name when it is not the default given here."""


def default_name(cfg: DictConfig, step: int | None, changes: Mapping[str, Any]) -> str:
    """Return a folder name that tells evaluations of one run apart: step, episodes, seed, and what was changed."""
    parts = [f"step_{step or 0:08d}"]
    parts += [f"n{cfg.n_episodes}", f"s{cfg.seed}"] if cfg.episode is None else ["n1", f"s{cfg.seed + cfg.episode}"]
    for key in ("n_action_steps", "max_episode_steps"):
        if cfg[key]:
            parts.append(f"{key}_{cfg[key]}")
    if cfg.noise_seed:
        parts.append(f"noise_{cfg.noise_seed}")
    if cfg.stop_on_success:
        parts.append("stop")
    parts += [f"{key}_{cfg[key]}" for key, usual in FREE_CHOICES.items() if cfg[key] != usual]
    parts += [word.removeprefix("planner=").removeprefix("planner.") for word in _planner_words(cfg)]
    parts += [f"{key.rpartition('.')[2]}_{value}" for key, value in changes.items()]
    return "-".join(re.sub(r"[^\w.+-]+", "_", part) for part in parts)


def repeating_command(cfg: DictConfig) -> str:
    """Return the line that repeats this evaluation: all settings that are not the default."""
    file = OmegaConf.to_container(OmegaConf.load(configs_folder() / "eval.yaml"))
    default = dict(_leaves(file))
    words = []
    for key, value in _leaves({key: value for key, value in _plain(cfg).items() if key != "planner"}):
        if key not in default:
            words.append(f"+{key}={value}")
        elif value != default[key] or key == "n_episodes":
            words.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return shlex.join(["robopolicy", "eval", *words, *_planner_words(cfg)])


def say(console: Console, info: Mapping[str, Any], folder: Path, earlier: Evaluation | None, now: Evaluation) -> None:
    """Print the result, where it is, and what to do next."""
    from rich.markup import escape

    from robopolicy.evaluation.failures import nearest_words
    from robopolicy.evaluation.report import duration, milliseconds, percent

    top, time_s, at_1 = info["overall"], info["time"], info["latency_batch_1"]
    low, high = top["pc_success_ci95"]
    console.print(
        f"[bold]{percent(top['pc_success'])} % success[/] ({top['n_success']} of {top['n_episodes']}), "
        f"95 % interval {percent(low)} to {percent(high)} %"
    )
    if top["pc_success_at_end"] is not None:
        console.print(f"still successful at the end: {percent(top['pc_success_at_end'])} %")
    if at_1["num_calls"]:
        console.print(
            f"one action chunk: {milliseconds(at_1['median_ms'])} ms (p95 {milliseconds(at_1['p95_ms'])} ms) "
            f"at batch 1 on {info['device']}"
        )
    console.print(
        f"took {duration(top['eval_s'])}: simulation {duration(time_s['simulation_s'])}, policy "
        f"{duration(time_s['policy_s'])}, reset {duration(time_s['reset_s'])}; "
        f"{time_s['env_steps_per_s']:,.0f} steps/s"
    )
    if info["settings"]["latency"] != "frozen":
        console.print(
            f"latency {info['settings']['latency']}, executor {info['settings']['executor']}: per episode "
            f"{top['avg_num_replans']:.1f} plans and {top['avg_num_hold_steps']:.1f} of "
            f"{info['settings']['max_episode_steps']} control steps without an action to play"
        )
    for signal, found in info["failure_prediction"].items():
        low, high = found["ci95"]
        if low < high:  # the same of all episodes tells nothing
            console.print(
                f"{signal} predicts failure with AUROC {found['auroc']:.2f} (95 % interval {low:.2f} to {high:.2f})"
            )
    if failed := info["failed_seeds"]:
        more = ", ..." if len(failed) > MOST_SEEDS_SHOWN else ""
        console.print(f"failed seeds: {', '.join(map(str, failed[:MOST_SEEDS_SHOWN]))}{more}")
    if nearest := nearest_words(now.rows):
        console.print(nearest)
    if earlier is not None:
        old = {row["seed"]: row["success"] for row in earlier.rows}
        other = [row["seed"] for row in now.rows if old.get(row["seed"], row["success"]) != row["success"]]
        console.print(f"replaces an earlier evaluation of that name; other outcome for {len(other)} of its seeds")
    if info["video"] and not info["video"]["same_outcomes"]:
        console.print("[yellow]some replays in the film ended otherwise than the counted episodes")
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    console.print(f"wrote [bold]{escape(str(folder))}[/]: {names}")
    console.print(f"next: robopolicy report run={escape(str(folder.parent.parent))}")


def _planner_words(cfg: DictConfig) -> list[str]:
    """Return what to type for the planner of `cfg`; nothing for the default one."""
    choice = HydraConfig.get().runtime.choices.get("planner", "fresh") if HydraConfig.initialized() else "fresh"
    file = configs_folder() / "planner" / f"{choice}.yaml"
    default = dict(_leaves(OmegaConf.to_container(OmegaConf.load(file)))) if file.is_file() else {}
    words = [f"planner={choice}"] if choice != "fresh" else []
    return words + [f"planner.{key}={v}" for key, v in _leaves(_plain(cfg.planner)) if v != default.get(key)]


def _plain(cfg: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
