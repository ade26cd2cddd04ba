"""Write a policy as ONNX graphs that run without Python, after checking that they act as the policy does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from robopolicy.evaluation.rollout import EvalResult
    from robopolicy.policies.base import Policy
    from robopolicy.policies.engines import Graph
    from robopolicy.training.checkpoint import LoadedPolicy
    from robopolicy.types import Environment

EXAMPLES: tuple[tuple[str, str], ...] = (
    ("robopolicy export checkpoint=pick_cube", "model.onnx and export.json in the folder onnx/ of the run's last step"),
    (
        "robopolicy export checkpoint=pick_cube policy.sampler.num_inference_steps=4 out=exported",
        "with fewer denoising steps, into another folder",
    ),
    ("robopolicy export checkpoint=pick_cube planner=rti", "also warm.onnx, which refines the plan before"),
)

FORMATS = ("onnx",)
FILES = {"act": "model.onnx", "refine": "warm.onnx", "refine_first": "warm_first.onnx", "refine_rest": "warm_rest.onnx"}
WHAT = {
    "act": "a chunk of actions from a window of observations",
    "refine": "a chunk of actions from a window of observations and a guess of it, and the first estimate",
    "refine_first": "the first step of refining a guess",
    "refine_rest": "the other steps of refining a guess",
}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Export `cfg.checkpoint`; nothing is written unless the graphs act as the policy does."""
    from rich.console import Console

    from robopolicy.errors import CheckpointError, RobopolicyError, UnknownNameError
    from robopolicy.policies.engines import build_engine
    from robopolicy.training.fit import threads

    if cfg.format not in FORMATS:
        raise UnknownNameError("export format", cfg.format, FORMATS)
    if cfg.n_observations < 1 or cfg.n_episodes < 1:
        raise RobopolicyError(
            f"Parity needs at least one observation and one episode; got n_observations={cfg.n_observations}, "
            f"n_episodes={cfg.n_episodes}."
        )
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    loaded = load(cfg)
    folder = Path(cfg.out) if cfg.out else loaded.path / cfg.format
    if folder.exists() and not (folder / "export.json").is_file():
        raise CheckpointError(f"{folder} exists and is no export; choose another folder by out=...")
    with threads(cfg.num_threads):
        engine: Any = build_engine(loaded.policy, cfg.format, max_unrolled=cfg.max_unrolled)
        parity = _parity(cfg, loaded, engine, console)
    graphs = engine.graphs
    if not {"act"} <= {graph.method for graph in graphs}:
        raise RobopolicyError(
            f"Sampling takes more than max_unrolled={cfg.max_unrolled} network calls, too many for one graph. Fewer "
            "steps, policy.sampler.num_inference_steps=10 for example, or a larger max_unrolled (minutes) would work."
        )
    files = _write(folder, cfg, loaded, graphs, parity)
    console.print(
        f"[bold]{', '.join(files)}[/]: as eager to {parity['max_abs_error']:.1e} on {parity['n_observations']} "
        f"recorded observations; {parity['n_same']} of {parity['n_episodes']} episodes end alike "
        f"({parity['n_success']['eager']} and {parity['n_success'][cfg.format]} successes)"
    )
    console.print(f"wrote [bold]{folder}[/]")
    return {"folder": str(folder), "files": files, "parity": parity}


def load(cfg: DictConfig) -> LoadedPolicy:
    """Return the policy that `cfg.checkpoint` names, on the CPU, with the changes in `cfg.policy` applied."""
    import torch

    from robopolicy.app.eval import _changes, _load

    return _load(cfg, dict(_changes(cfg.policy)), torch.device("cpu"))


def build_env(loaded: LoadedPolicy, num_envs: int) -> Environment:
    """Return the simulation that `loaded` was trained for, on the CPU.

    Raises:
        SpecMismatchError: it observes or acts otherwise.
    """
    from robopolicy.envs import make
    from robopolicy.envs.specs import ObsMode

    saved = loaded.spec
    env: Environment = make(
        saved.name,
        num_envs=num_envs,
        backend="cpu",
        control_mode=saved.action.control_mode,
        obs_mode=str(ObsMode.of(saved)),
        max_episode_steps=saved.max_episode_steps,
    )
    saved.require_same(env.task_spec, mine=f"The policy in {loaded.path}", theirs=f"task {env.task_spec.name!r}")
    return env


class Recorder:
    """A policy that keeps the calls made to it, up to `most` per method."""

    def __init__(self, policy: Policy, most: int) -> None:
        self._policy: Any = policy
        self._most = most
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_policy"], name)
        if name not in FILES:
            return value

        def call(*args: Any, generator: Any = None, **settings: Any) -> Any:
            if sum(method == name for method, _, _ in self.calls) < self._most:
                self.calls.append((name, args, settings))
            return value(*args, generator=generator, **settings)

        return call


def _parity(cfg: DictConfig, loaded: LoadedPolicy, engine: Any, console: Console) -> dict[str, Any]:
    """Compare graphs and policy, call by call and over whole episodes.

    Raises:
        RobopolicyError: they differ by more than `cfg.tolerance`, or end differently in too many episodes.
    """
    import torch

    from robopolicy.app.build import build_planner
    from robopolicy.errors import RobopolicyError
    from robopolicy.evaluation.progress import progress_bar
    from robopolicy.evaluation.rollout import evaluate
    from robopolicy.policies.actors import ChunkActor

    num_envs = min(cfg.n_episodes, 25)
    env = build_env(loaded, num_envs)
    recorder: Any = Recorder(loaded.policy, -(-cfg.n_observations // num_envs))
    results: dict[str, EvalResult] = {}
    for name, policy in (("eager", recorder), (cfg.format, engine)):
        actor = ChunkActor(build_planner(cfg.planner, policy, num_envs, loaded.path), num_envs)
        seeds = range(cfg.seed, cfg.seed + cfg.n_episodes)
        console.print(f"{cfg.n_episodes} episodes, {name}")
        with progress_bar(cfg.n_episodes, console=console) as show:
            results[name] = evaluate(actor, env, seeds=list(seeds), on_step=show)
    env.close()
    error, observations = 0.0, 0
    for number, (method, args, settings) in enumerate(recorder.calls):
        outputs = [
            getattr(policy, method)(*args, generator=torch.Generator().manual_seed(number), **settings)
            for policy in (loaded.policy, engine)
        ]
        pairs = zip(*((out if isinstance(out, tuple) else (out,)) for out in outputs), strict=True)
        error = max(error, *(float((one - other).abs().max()) for one, other in pairs))
        observations += len(outputs[0][0]) if isinstance(outputs[0], tuple) else len(outputs[0])
    same = [
        (one.success_once, one.success_at_end) == (other.success_once, other.success_at_end)
        for one, other in zip(results["eager"].episodes, results[cfg.format].episodes, strict=True)
    ]
    found = {
        "max_abs_error": error,
        "tolerance": cfg.tolerance,
        "n_observations": observations,
        "n_episodes": cfg.n_episodes,
        "first_seed": cfg.seed,
        "n_same": sum(same),
        "n_success": {name: result.num_success for name, result in results.items()},
        "differing_seeds": [cfg.seed + i for i, alike in enumerate(same) if not alike],
    }
    if not error <= cfg.tolerance:
        raise RobopolicyError(
            f"The graphs differ from the policy by {error:.2g} on recorded observations, more than "
            f"tolerance={cfg.tolerance:g}; nothing was written."
        )
    if len(same) - sum(same) > cfg.most_different:
        raise RobopolicyError(
            f"{len(same) - sum(same)} of {len(same)} episodes end otherwise with the graphs (seeds "
            f"{', '.join(map(str, found['differing_seeds']))}), more than most_different={cfg.most_different}; nothing "
            "was written. Contact can amplify rounding: see whether more episodes shift success."
        )
    return found


def _write(
    folder: Path, cfg: DictConfig, loaded: LoadedPolicy, graphs: list[Graph], parity: Mapping[str, Any]
) -> list[str]:
    from robopolicy import __version__, atomic
    from robopolicy.evaluation.results import sha256, versions

    described = [_described(graph) for graph in graphs]
    about = {
        "format": "robopolicy-export/1",
        "checkpoint": {
            "path": str(loaded.path),
            "step": loaded.step,
            "weights_sha256": sha256(loaded.path / "model.safetensors"),
        },
        "robopolicy_version": __version__,
        "versions": versions(),
        "timing": dict(loaded.config["timing"]),
        "task_spec": loaded.spec.to_dict(),
        "graphs": described,
        "noise": "independent standard normal numbers, drawn anew for every call",
        "units": "observations and chunks are in environment units; the chunk is clipped to the controller's bounds",
        "parity": dict(parity),
    }
    with atomic.new_folder(folder) as staged:
        for graph, row in zip(graphs, described, strict=True):
            (staged / row["file"]).write_bytes(graph.runner.model)  # type: ignore[attr-defined]
        (staged / "export.json").write_text(json.dumps(about, indent=2) + "\n")
    return [row["file"] for row in described]


def _described(graph: Graph) -> dict[str, Any]:
    return {
        "file": FILES[graph.method],
        "computes": WHAT[graph.method],
        "settings": {name: repr(value) for name, value in graph.settings.items()},
        "inputs": [{"name": name, "shape": list(shape)} for name, shape in graph.inputs.items()],
        "outputs": list(graph.outputs),
    }
