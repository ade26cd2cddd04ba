"""Fit a policy to demonstrations; stops and resumes at any step without changing the result."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator
    from omegaconf import DictConfig

    from robopolicy.data import EpisodeStore
    from robopolicy.training.settings import TrainSettings

EXAMPLES: tuple[tuple[str, str], ...] = (
    ("robopolicy train task=pick_cube", "the default diffusion policy, from demos/pick_cube into checkpoints/"),
    (
        "robopolicy train -m task=push_cube policy=diffusion_unet train.lr=3e-4 seed=1,2,3",
        "another network on another task, once per seed",
    ),
    (
        "robopolicy train policy=fdp policy.encoder.order=auto train.val_fraction=0.1",
        "a factorised policy: finds which modality to build on, then the others add to it",
    ),
    (
        "robopolicy train resume=true run=pick_cube-diffusion-s1",
        "go on after Ctrl-C, kill or power loss; the result is that of an uninterrupted run",
    ),
)

ORDER_HELD_OUT = 0.1
"""Share of the episodes that an order is judged by where train.val_fraction holds out none."""


def run(cfg: DictConfig) -> dict[str, Any] | int:
    """Train as `cfg` says; return what was written, or the exit code of the signal that stopped it."""
    from omegaconf import OmegaConf

    from robopolicy.app import run_config
    from robopolicy.errors import RobopolicyError
    from robopolicy.training import runs
    from robopolicy.training.fit import make_accelerator, threads
    from robopolicy.training.logging import require_loggers
    from robopolicy.training.settings import TrainSettings

    run_dir, resume = run_config.run_folder(cfg), bool(cfg.resume)
    if resume:
        cfg = run_config.resumed(cfg, run_dir, run_config.overrides())
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    plain |= {"run": run_dir.name, "checkpoints_dir": str(run_dir.parent), "resume": False}
    plain["logger"] = [plain["logger"]] if isinstance(plain["logger"], str) else plain["logger"] or []
    plain.setdefault("command", shlex.join(["robopolicy", "train", *run_config.overrides()]))
    try:
        settings = TrainSettings(**plain["train"])
    except (TypeError, ValueError) as error:
        raise RobopolicyError(str(error)) from error
    require_loggers(plain["logger"])
    accelerator = make_accelerator(settings)
    if accelerator.is_main_process and not resume:
        runs.require_new(run_dir)
    with threads(settings.num_threads):
        return _train(plain, settings, accelerator, run_dir)


def _train(
    cfg: dict[str, Any], settings: TrainSettings, accelerator: Accelerator, run_dir: Path
) -> dict[str, Any] | int:
    """Read the demonstrations, build the policy, fit it, and say what to do next."""
    import torch

    from robopolicy.app.build import build_policy
    from robopolicy.app.train_order import choose_order, wants_order
    from robopolicy.data import batches
    from robopolicy.training import checkpoint
    from robopolicy.training.fit import fit
    from robopolicy.training.interrupt import stop_on_signals
    from robopolicy.training.stages import stage_ends

    last = checkpoint.resolve(run_dir) if (run_dir / "last").exists() else None
    earlier: dict[str, Any] = checkpoint.read_config(last) if last else {"step": 0, "data": {}}
    demos, held_out, about = _demonstrations(cfg, settings, run_dir, recorded=earlier["data"].get("fingerprint"))
    if wants_order(cfg["policy"]):
        known = (demos, held_out) if held_out is not None else _split(demos, ORDER_HELD_OUT)
        assert known[1] is not None
        cfg["policy"] = choose_order(cfg, settings, known[0], known[1], accelerator)
    torch.manual_seed(cfg["seed"])
    policy = build_policy(cfg["policy"], demos.spec)
    policy.norm.fit(demos.limits())
    ends = stage_ends(settings.num_steps, policy.num_stages, settings.stages)
    ours = {key: cfg["data"][key] for key in ("action_padding", "pad_after")}
    ours |= {"batch_size": settings.batch_size, "device": accelerator.device}
    trained = cfg["train"] | {"seed": cfg["seed"], "command": cfg["command"]}
    spread = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}

    if accelerator.is_main_process:
        size = sum(p.numel() for p in policy.parameters()) / 1e6
        where = f"cpu, {torch.get_num_threads()} thread(s)" if accelerator.device.type == "cpu" else accelerator.device
        stages = f" Stages end at steps {', '.join(map(str, ends))}, or earlier." if len(ends) > 1 else ""
        data = f"{demos.num_episodes} episodes, {demos.num_frames:,} frames"
        print(f"{run_dir}: {data}, {size:.2f} M weights, on {where}.{stages}")
    began_s = time.perf_counter()
    with stop_on_signals() as stop, _Reports(cfg, settings, run_dir, earlier["step"], accelerator) as reports:
        done = fit(
            policy,
            lambda start: batches(demos, policy.timing, seed=cfg["seed"], start_step=start, **ours, **spread),
            settings,
            accelerator=accelerator,
            run_dir=run_dir,
            config={"policy": cfg["policy"], "data": about, "train": trained},
            seed=cfg["seed"],
            log=reports.log,
            resume_from=last,
            held_out=None if held_out is None else lambda: batches(held_out, policy.timing, seed=0, **ours),
            tick=reports.tick,
            stop=stop,
        )
    if accelerator.is_main_process:
        samples = (done - earlier["step"]) * settings.batch_size * settings.accumulate * accelerator.num_processes
        _say(cfg, settings, done, reports.loss, samples=samples, took_s=time.perf_counter() - began_s)
    if stop():
        return stop.exit_code
    return {"run": str(run_dir), "checkpoint": str(run_dir / f"step_{done:08d}"), "step": done, "loss": reports.loss}


class _Reports(contextlib.ExitStack):
    """The run folder while it is written to: lock, config, metrics and progress bar; on the main process only."""

    def __init__(
        self, cfg: dict[str, Any], settings: TrainSettings, run_dir: Path, start_step: int, accelerator: Accelerator
    ) -> None:
        from robopolicy.app import run_config
        from robopolicy.training import runs
        from robopolicy.training.logging import TrainingBar, open_logs

        super().__init__()
        self.loss = float("nan")
        self._bar, self._log = None, None
        if accelerator.is_main_process:
            self.enter_context(runs.claim(run_dir))
            run_config.save(cfg, run_dir)
            self._log = self.enter_context(open_logs(cfg["logger"], run_dir, start_step=start_step, config=cfg))
            self._bar = self.enter_context(TrainingBar(settings.num_steps, start_step))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass metrics on."""
        self.loss = metrics.get("train/loss", self.loss)
        if self._log is not None and self._bar is not None:
            self._log(step, metrics)
            self._bar.log(step, metrics)

    def tick(self, done: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.tick(done)


def _demonstrations(
    cfg: dict[str, Any], settings: TrainSettings, run_dir: Path, *, recorded: str | None
) -> tuple[EpisodeStore, EpisodeStore | None, dict[str, Any]]:
    """Return the episodes to train on, those held out, and `data` of policy.json.

    Raises:
        RobopolicyError: there are no demonstrations, they are of another task or control mode, or not those with the
            fingerprint `recorded`.
    """
    from robopolicy.app import run_config
    from robopolicy.data import load_demonstrations
    from robopolicy.errors import DataError
    from robopolicy.training import runs

    task = cfg["task"]
    path = Path(cfg["data"]["path"] or f"demos/{task['name']}/{task['control_mode']}.{task['obs_mode']}.h5")
    if not path.is_file():
        get = run_config.collect_command(cfg, run_config.overrides())
        hint = "" if cfg["data"]["path"] else f" Collect them with: {get}"
        raise DataError(f"There are no demonstrations at {path}.{hint}")
    fingerprint = runs.require_same_data(path, recorded, run_dir)
    store = load_demonstrations(path, spec=None, num_episodes=cfg["data"]["num_episodes"])
    found = {"task": store.spec.name, "task.control_mode": store.spec.action.control_mode}
    for (key, there), wanted in zip(found.items(), (task["name"], task["control_mode"]), strict=True):
        if there != wanted:
            raise DataError(f"{path} holds demonstrations of {key}={there}; this run is for {key}={wanted}.")
    train, held_out = _split(store, settings.val_fraction)
    about = {
        "path": str(path),
        "fingerprint": fingerprint,
        "num_episodes": train.num_episodes,
        "num_frames": train.num_frames,
        "num_held_out_episodes": held_out.num_episodes if held_out is not None else 0,
        "seeds": store.seeds[store.seeds >= 0].tolist(),
    }
    return train, held_out, about


def _split(store: EpisodeStore, fraction: float) -> tuple[EpisodeStore, EpisodeStore | None]:
    """Return the episodes to train on and the last `fraction` of all, at least one; none for 0."""
    from robopolicy.errors import RobopolicyError

    if fraction == 0:
        return store, None
    kept = store.num_episodes - max(1, round(fraction * store.num_episodes))
    if kept < 1:
        raise RobopolicyError(
            f"train.val_fraction={fraction} leaves none of {store.num_episodes} episodes to train on."
        )
    frame = int(store.episode_ends[kept - 1])
    held_out = dataclasses.replace(
        store,
        modalities={name: value[frame:] for name, value in store.modalities.items()},
        action=store.action[frame:],
        episode_ends=store.episode_ends[kept:] - frame,
        seeds=store.seeds[kept:],
        success=store.success[kept:],
        stored_limits=None,
    )
    return store.first(kept), held_out


def _say(cfg: dict[str, Any], settings: TrainSettings, done: int, loss: float, *, samples: int, took_s: float) -> None:
    """Print what was written and what to type next."""
    from robopolicy.app import run_config

    run_dir = Path(cfg["checkpoints_dir"]) / cfg["run"]
    if done < settings.num_steps:
        print(f"Stopped and saved at step {done:,} of {settings.num_steps:,} in {run_dir}. To go on:")
        print(f"  {run_config.resume_command(cfg)}")
        return
    if samples <= 0:
        print(f"The run {run_dir} is complete: {done:,} steps.")
    else:
        rate = samples / took_s
        print(f"Trained to step {done:,} in {took_s:.0f} s ({rate:,.0f} samples/s); last loss {loss:.4f}.")
        print(f"Wrote {run_dir / f'step_{done:08d}'} (policy), {run_dir / 'metrics.jsonl'}.")
    print(f"Next: {shlex.join(['robopolicy', 'eval', f'checkpoint={run_dir}'])}")
