"""Choose from how much noise planner=rti refines a policy's plans, by measurements on held-out episodes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from robopolicy.evaluation.calibration import Samples
    from robopolicy.training.checkpoint import LoadedPolicy

EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "robopolicy calibrate checkpoint=pick_cube",
        "calibration.json and its picture beside the run's last step, where planner=rti finds it",
    ),
    ("robopolicy calibrate checkpoint=pick_cube tolerance=0.02 out=looked_at", "only to look: into another folder"),
    ("robopolicy calibrate checkpoint=my_flow planner=rti_flow", "tau and steps of a flow"),
)

FORMAT = "robopolicy-calibration/1"


def run(cfg: DictConfig) -> dict[str, Any]:
    """Calibrate `cfg.checkpoint` and write calibration.json and calibration.png."""
    from rich.console import Console

    from robopolicy import atomic
    from robopolicy.app.export import load
    from robopolicy.evaluation import calibration, results
    from robopolicy.evaluation.calibration_plot import plot
    from robopolicy.training.fit import threads

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    _require_sensible(cfg)
    loaded = load(cfg)
    planner = _planner(cfg, loaded)
    seeds = list(range(cfg.seed, cfg.seed + cfg.n_episodes))
    _require_unseen(seeds, loaded)
    rules = {name: float(cfg[name]) for name in ("tolerance", "quantile", "margin", "most_switches")}
    with threads(cfg.num_threads):
        samples = _recorded(cfg, loaded, planner.timing.n_action_steps, seeds, console)
        with console.status("choosing"):
            found = calibration.calibrate(
                loaded.policy,
                planner.warm_start,
                samples,
                planner.timing.n_action_steps,
                calibration.Rules(**rules),
            )
    result = {
        "format": FORMAT,
        "checkpoint": {"path": str(loaded.path), "step": loaded.step},
        "weights_sha256": results.sha256(loaded.path / "model.safetensors"),
        "task": loaded.spec.name,
        **found,
        "rules": rules,
        "seeds": seeds,
        "n_samples": cfg.n_samples,
    }
    folder = Path(cfg.out) if cfg.out else loaded.path
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_file(folder / "calibration.png", plot(result))
    atomic.write_file(folder / "calibration.json", (json.dumps(result, indent=2) + "\n").encode())
    _say(console, result, loaded, folder)
    return {"folder": str(folder), **result}


def _require_sensible(cfg: DictConfig) -> None:
    """Raise RobopolicyError unless the settings can be followed."""
    from robopolicy.errors import RobopolicyError

    for name, low, high in (("tolerance", 0, 2), ("quantile", 0, 1), ("margin", 0, 100), ("most_switches", 0, 1)):
        if not (isinstance(cfg[name], int | float) and low < cfg[name] < high):
            raise RobopolicyError(f"{name} must be a number between {low} and {high}; got {cfg[name]}.")
    for name, least in (("n_episodes", 1), ("n_observations", 10), ("n_samples", 4)):
        if not (isinstance(cfg[name], int) and cfg[name] >= least):
            raise RobopolicyError(f"{name} must be a whole number, at least {least}; got {cfg[name]}.")


def _require_unseen(seeds: list[int], loaded: LoadedPolicy) -> None:
    from robopolicy.app.eval import demonstration_seeds
    from robopolicy.evaluation.results import require_disjoint

    require_disjoint(seeds, demonstration_seeds(loaded.config))


def _planner(cfg: DictConfig, loaded: LoadedPolicy) -> Any:
    """Return the planner to calibrate, which must have a warm start that restarts from a noised guess.

    Raises:
        RobopolicyError: it has none, or one whose noise is none of the rules'.
    """
    from omegaconf import OmegaConf

    from robopolicy.app.build import build_planner
    from robopolicy.errors import RobopolicyError
    from robopolicy.sampling.warm_start import FlowWarmStart, WarmStart

    plain: Any = OmegaConf.to_container(cfg.planner, resolve=True)
    if isinstance(plain.get("warm_start"), Mapping):  # whatever it would be otherwise is what is to be found out
        sought = {"timesteps": [0], "tau": 0.5, "num_inference_steps": 1}
        plain["warm_start"] |= {name: value for name, value in sought.items() if name in plain["warm_start"]}
    planner: Any = build_planner(plain, loaded.policy, 1, loaded.path)
    warm_start = getattr(planner, "warm_start", None)
    if not isinstance(warm_start, WarmStart | FlowWarmStart):
        raise RobopolicyError(
            f"{type(planner).__name__} of {type(loaded.policy).__name__} has no noise level to calibrate: "
            "planner=rti calibrates a diffusion policy, planner=rti_flow a flow."
        )
    if warm_start.start not in ("renoise", "renoise_tail"):
        raise RobopolicyError(
            f"start={warm_start.start} puts no noise on a guess that could cover its error; "
            "planner.warm_start.start=renoise can be calibrated."
        )
    return planner


def _recorded(cfg: DictConfig, loaded: LoadedPolicy, lag: int, seeds: list[int], console: Console) -> list[Samples]:
    """Roll the policy out and return what it would have planned anew."""
    from rich.progress import Progress

    from robopolicy.app.export import build_env
    from robopolicy.evaluation.calibration import record

    longest = max(lag, loaded.policy.timing.n_action_steps)
    lags = sorted({0, lag, *(2**i for i in range(8) if 2**i < longest), longest})
    counts = {one: cfg.n_observations if one == lag else -(-cfg.n_observations // 3) for one in lags}
    env = build_env(loaded, cfg.n_episodes)
    console.print(f"{cfg.n_episodes} episodes; fresh chunks by {_full_sampler(loaded.policy)[1]}")
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("episodes", total=loaded.spec.max_episode_steps)
        samples = record(
            loaded.policy,
            env,
            seeds,
            counts=counts,
            num_samples=cfg.n_samples,
            settings=_full_sampler(loaded.policy)[0],
            on_step=lambda: bar.advance(task),
        )
    env.close()
    return samples


def _full_sampler(policy: Any) -> tuple[dict[str, Any], str]:
    """Return the settings that make `policy` sample in full, and what that is in words."""
    from robopolicy.sampling.samplers import DDPMSampler

    schedule = getattr(policy, "schedule", None)
    if schedule is None:
        return {}, f"the policy's own sampler, {policy.network_calls()} network calls"
    return {
        "sampler": DDPMSampler(num_inference_steps=schedule.num_train_timesteps)
    }, f"DDPM, {schedule.num_train_timesteps} network calls"


def _say(console: Console, result: Mapping[str, Any], loaded: LoadedPolicy, folder: Path) -> None:
    from rich.table import Table

    table = Table(title=f"guesses of lag {result['lag']}, network units", title_justify="left")
    for column in ("dimension", "error", "spread", "surviving share"):
        table.add_column(column, justify="left" if column == "dimension" else "right")
    for row in result["dimensions"]:
        table.add_row(row["name"], *(f"{row[key]:.4f}" for key in ("error", "spread", "surviving_share")))
    console.print(table)
    table = Table(title="network calls and the error that stays", title_justify="left")
    for column in ("calls", "", "measured"):
        table.add_column(column, justify="left" if not column else "right")
    for row in result["lists"]:
        table.add_row(str(row["network_calls"]), _words(row["warm_start"]), f"{row['measured']:.4f}")
    console.print(table)
    calls = next(row["network_calls"] for row in result["lists"] if row["warm_start"] == result["warm_start"])
    console.print(f"[bold]{_words(result['warm_start'])}[/]: {result['why']}.")
    modes, ends = result["two_modes"], result["discrete_at_other_end"]
    console.print(
        f"Measured, {result['remaining']['measured']:.3f} stays after one refinement; tolerance "
        f"{result['rules']['tolerance']:g}. Two ways to go at {modes['observations']} of {modes['of']} observations."
        + (
            ""
            if ends is None
            else f" Gripper at the other end than fresh plans at {ends['guess']:.1%} of the guesses' "
            f"steps, {ends['refined']:.1%} after refining."
        )
    )
    own = loaded.policy.network_calls()
    console.print(f"It costs {calls} network call{'s' * (calls > 1)} per tick, a plan from noise {own}.")
    console.print(f"wrote [bold]{folder / 'calibration.json'}[/] and calibration.png")
    if folder == loaded.path:
        planner = "rti_flow" if "tau" in result["warm_start"] else "rti"
        console.print(f"next: robopolicy eval checkpoint={loaded.path} planner={planner}")
    else:
        given = " ".join(f"planner.warm_start.{name}={value}" for name, value in result["warm_start"].items())
        console.print(f"planners look beside the checkpoint; to try it: {given.replace(', ', ',')}")


def _words(warm_start: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in warm_start.items())
