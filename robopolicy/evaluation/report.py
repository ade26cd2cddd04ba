"""One HTML file that tells what a run was trained on, how well it does and how sure that is, and how to repeat it.

The file needs nothing but itself: drawings, film and script are inside, and its content security policy forbids
requests. What a run does not have yet (held-out loss, evaluation, film) is said, with the command that makes it.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import os
import re
import shlex
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from robopolicy.errors import CheckpointError
from robopolicy.evaluation import report_tables
from robopolicy.evaluation.charts import histogram, loss_chart
from robopolicy.evaluation.failures import nearest_words
from robopolicy.evaluation.results import Evaluation, read_evaluations

MOST_VIDEO_BYTES = 30_000_000
HIDDEN = frozenset({"_target_", "_partial_", "task_spec", "limits", "command"})

TRAIN_KEYS = ("batch_size", "lr", "warmup_steps", "weight_decay", "betas", "ema_power", "mixed_precision", "seed")
"""What the report names of the training settings; all of them stand in config.yaml, which it holds as well."""


def render_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html and return its path.

    `run_dir` holds step folders, or is a published policy (with policy.json itself).

    Raises:
        CheckpointError: there is no policy in `run_dir`.
    """
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(pc=percent, ms=milliseconds, duration=duration, points=points)
    page = environment.get_template("report.html.j2").render(
        css=Markup((here / "report.css").read_text()), **context(run_dir)
    )
    path = run_dir / "report.html"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def context(run_dir: Path) -> dict[str, Any]:
    """Return all that the template shows."""
    folder = _step_folder(run_dir)
    config = json.loads((folder / "policy.json").read_text())
    metrics = _metrics(run_dir)
    evaluations = read_evaluations(run_dir)
    timing = config["timing"]
    main = _main(evaluations, timing)
    where = _as_typed(run_dir)
    return {
        "run": run_dir.resolve().name,
        "where": where,
        "written": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        "task": config["task_spec"],
        "step": config["step"],
        "control_dt_s": config["task_spec"]["action"]["control_dt_s"],
        "sections": _training_facts(config, folder, metrics),
        "loss_svg": _loss(metrics),
        "has_val": "val/loss" in metrics,
        "main": None if main is None else _shown(main, timing),
        "evaluations": [_shown(one, timing) for one in evaluations],
        "latency_svg": _latency_chart(main),
        "steps_svg": _steps_chart(main),
        "video": _video(main),
        "nearest": "" if main is None else nearest_words(main.rows),
        "failures": _failures(main),
        "landscape": _data_url("image/png", landscape) if (landscape := run_dir / "landscape.png").is_file() else None,
        "paired": report_tables.paired_table(main, evaluations),
        "robustness": report_tables.robustness(run_dir),
        "commands": _commands(config, where, evaluations),
        "config_yaml": _text(run_dir / "config.yaml"),
    }


def percent(value: float) -> str:
    """Return a percentage with one decimal where it has one: 97, 96.5."""
    return f"{value:.1f}".removesuffix(".0")


def points(value: float) -> str:
    """Return a difference in points with its sign and one decimal: +3.0, 0.0, -12.5."""
    return f"{value:+.1f}" if round(value, 1) else "0.0"


def milliseconds(value: float) -> str:
    """Return milliseconds with three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Return seconds in the unit that suits them: 0.8 s, 42 s, 3 min 5 s, 2 h 7 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _step_folder(run_dir: Path) -> Path:
    """Return the folder of the run's last policy."""
    candidates = [run_dir]
    with contextlib.suppress(OSError):
        candidates.append(run_dir / (run_dir / "last").read_text().strip())
    candidates += sorted(run_dir.glob("step_*"), reverse=True)
    for folder in candidates:
        if (folder / "policy.json").is_file():
            return folder
    raise CheckpointError(f"{run_dir} holds no checkpoint to report on (no step_*/policy.json).")


def _metrics(run_dir: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Return metric name to its steps and values; a line cut short by a crash is skipped."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in _text(run_dir / "metrics.jsonl").splitlines():
        with contextlib.suppress(ValueError, KeyError, AttributeError):
            row = json.loads(line)
            step = row.pop("step")
            for name, value in row.items():
                if isinstance(value, int | float):
                    steps, values = found.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(value)
    return found


def _main(evaluations: Sequence[Evaluation], timing: Mapping[str, Any]) -> Evaluation | None:
    """Return the evaluation in the headline: of the last step, as trained, with the most episodes; never the best."""

    def rank(one: Evaluation) -> tuple[Any, ...]:
        usual = not report_tables.notes(one.info["settings"], timing)
        return (one.info["checkpoint"].get("step") or 0, usual, one.info["overall"]["n_episodes"], one.name)

    return max(evaluations, key=rank, default=None)


def _shown(one: Evaluation, timing: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation with the parts of its time and a line about its settings worked out."""
    info = one.info
    time = info["time"]
    parts = [("simulation", time["simulation_s"]), ("policy", time["policy_s"]), ("reset", time["reset_s"])]
    parts.append(("other", time["other_s"]))
    total = sum(seconds for _, seconds in parts) or 1.0
    settings = info["settings"]
    seeds = settings.get("seeds", [])
    notes = [f"step {info['checkpoint'].get('step')}", f"seeds {_ranges(seeds)}"]
    notes += report_tables.notes(settings, timing)
    return {
        **info,
        "name": one.name,
        "rows": one.rows,
        "note": ", ".join(notes),
        "film": film if (film := _film_file(one)) and (one.folder / film).is_file() else None,
        "columns": report_tables.episode_columns(one.rows),
        "parts": [(name, seconds, 100 * seconds / total) for name, seconds in parts],
    }


def _loss(metrics: Mapping[str, Any]) -> Markup | None:
    train = metrics.get("train/loss")
    if train is None or not any(np.isfinite(v) and v > 0 for v in train[1]):
        return None
    return Markup(loss_chart(train, metrics.get("val/loss")))


def _latency_chart(main: Evaluation | None) -> Markup | None:
    for key in ("latency_batch_1", "latency"):
        measured = main.info.get(key) if main else None
        if measured and measured["num_calls"]:
            marks = [("median", measured["median_ms"]), ("p95", measured["p95_ms"])]
            label = f"ms per action chunk, batch {measured['batch_size']}"
            return Markup(histogram(measured["calls_ms"], xlabel=label, ylabel="calls", marks=marks))
    return None


def _steps_chart(main: Evaluation | None) -> Markup | None:
    steps = [row["first_success_step"] for row in main.rows if row["first_success_step"] is not None] if main else []
    if len(steps) < 2:
        return None
    marks = [("median", float(np.median(steps)))]
    return Markup(histogram(steps, xlabel="control steps to first success", ylabel="episodes", marks=marks))


def _video(main: Evaluation | None) -> dict[str, Any] | None:
    video = main.info.get("video") if main else None
    if main is None or not video:
        return None
    film = main.folder / video["mp4"]
    if not film.is_file():
        return None
    poster = main.folder / video["poster"]
    small = film.stat().st_size <= MOST_VIDEO_BYTES
    return {
        **video,
        "file": f"eval/{main.name}/{video['mp4']}",
        "data": _data_url("video/mp4", film) if small else None,
        "poster_data": _data_url("image/png", poster) if poster.is_file() else None,
    }


def _film_file(one: Evaluation) -> str | None:
    return (one.info.get("video") or {}).get("mp4")


def _failures(main: Evaluation | None) -> dict[str, Any] | None:
    """Return the picture of how failed episodes ended, if the headline's evaluation has one."""
    failures = main.info.get("failures") if main else None
    if main is None or not failures or not (main.folder / failures["png"]).is_file():
        return None
    return {**failures, "data": _data_url("image/png", main.folder / failures["png"])}


def _training_facts(config: Mapping[str, Any], folder: Path, metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return titled lists of (name, value): task, data, policy, training."""
    task, timing, policy = config["task_spec"], config["timing"], config["policy"]
    action = task["action"]
    seen = ", ".join(f"{n} [{', '.join(map(str, m['shape']))}]" for n, m in task["observation"].items())
    task_facts = [
        ("environment", task["env_id"]),
        ("robot", task["robot"]),
        ("control mode", f"{action['control_mode']}, {1 / action['control_dt_s']:g} Hz"),
        ("observations", seen),
        ("actions", ", ".join(action["names"])),
        ("episode", f"at most {task['max_episode_steps']} steps"),
    ]
    size = num_parameters(folder / "model.safetensors")
    policy_facts = [
        ("class", str(policy.get("_target_", "unknown")).rpartition(".")[2]),
        ("parameters", "unknown" if size is None else f"{size / 1e6:.2f} million"),
        ("window", f"{timing['n_obs_steps']} observations"),
        ("chunk", f"{timing['horizon']} predicted, {timing['n_action_steps']} executed"),
        *_facts({key: value for key, value in policy.items() if key != "timing"}),
    ]
    train_facts = [("steps", f"{config['step']:,}")]
    for name, label, digits in (
        ("train/loss", "last training loss", 4),
        ("val/loss", "last held-out loss", 4),
        ("train/samples_per_s", "samples per second (median)", 3),
    ):
        if name in metrics:
            values = metrics[name][1]
            value = float(np.median(values)) if "per_s" in name else values[-1]
            train_facts.append((label, f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}"))
    settings = config.get("train") or {}
    train_facts += _facts(settings, TRAIN_KEYS) or _facts(settings)
    return [
        {"title": "Task", "facts": task_facts},
        {"title": "Demonstrations", "facts": _facts(config.get("data") or {}), "missing": "The checkpoint names none."},
        {"title": "Policy", "facts": policy_facts},
        {"title": "Training", "facts": train_facts},
    ]


def num_parameters(weights: Path) -> int | None:
    """Count the numbers in a safetensors file from its header alone; None if it cannot be read."""
    try:
        with weights.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        return sum(int(np.prod(t["shape"])) for name, t in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, struct.error):
        return None


def _facts(tree: Mapping[str, Any], keys: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Return settings as (name, value), one per top-level key; absent values are left out.

    Args:
        keys: which to show, in this order; all if None.
    """
    wanted = tree if keys is None else [key for key in keys if key in tree]
    return [(key.replace("_", " "), _value(tree[key])) for key in wanted if key not in HIDDEN and tree[key] is not None]


def _value(value: Any) -> str:
    """Write a setting: a part of a policy as `Class: width 384, depth 3`, many whole numbers as ranges."""
    if isinstance(value, Mapping):
        inner = ", ".join(f"{name} {text}" for name, text in _facts(value))
        name = str(value.get("_target_", "")).rpartition(".")[2]
        return ": ".join(part for part in (name, inner) if part)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return f"{_ranges(value)} ({len(value)})" if len(value) > 4 else ", ".join(map(str, value))
        return ", ".join(_value(item) for item in value)
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32,}", value):
        return f"{value[:12]}…"  # a digest
    return str(value)


def _ranges(numbers: Sequence[int]) -> str:
    """Write 3, 4, 5, 9 as 3-5, 9; beyond a few ranges only the ends."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(runs) > 6:
        return f"{runs[0][0]} to {runs[-1][1]}, not all"
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _commands(config: Mapping[str, Any], where: str, evaluations: Sequence[Evaluation]) -> list[str]:
    recorded = [(config.get(part) or {}).get("command") for part in ("data", "train")]
    commands = [command if isinstance(command, str) else shlex.join(command) for command in recorded if command]
    commands += [one.info["command"] for one in evaluations]
    return [*dict.fromkeys(commands), f"robopolicy report run={where}"]


def _as_typed(run_dir: Path) -> str:
    """Return the path that a user in the current folder would type."""
    absolute = run_dir.resolve()
    here = Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(run_dir)


def _data_url(kind: str, path: Path) -> Markup:
    return Markup(f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
