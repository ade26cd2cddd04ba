"""From the words after `robopolicy compare` to evaluations of the same episodes."""

from __future__ import annotations

import glob
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape

from robopolicy.app import composing
from robopolicy.envs import default_backend
from robopolicy.errors import CheckpointError, RobopolicyError, UnknownNameError
from robopolicy.evaluation.comparison import conditions, read_saved, require_comparable
from robopolicy.evaluation.results import Evaluation, read_evaluations, run_folder
from robopolicy.training import checkpoint


@dataclass(frozen=True, kw_only=True)
class Source:
    """One word: a saved evaluation, or a checkpoint whose evaluations are to be looked through."""

    word: str
    fixed: Evaluation | None = None
    checkpoint: Path | None = None
    """Folder of policy.json."""
    candidates: tuple[Evaluation, ...] = ()
    """Of the checkpoint: as it was trained first, newest first."""


def parse_policies(words: Sequence[str], baseline: str | None) -> tuple[dict[str, list[str]], str | None]:
    """Return name to the paths of each policy, and the baseline's name; a baseline that is not among them joins them.

    A word is a path, several ones with commas between (training seeds), or either of them after `name:`; a path may
    have wildcards, which a shell does not see behind a name.

    Raises:
        RobopolicyError: a word names no path.
    """
    words = [str(word) for word in words]
    parsed = [_parse(word) for word in words]
    names = [name for name, _ in parsed]
    if baseline is not None and baseline not in {*words, *names}:
        words.insert(0, baseline)
        parsed.insert(0, _parse(baseline))
    labels = _labels(parsed)
    policies = {label: paths for label, (_, paths) in zip(labels, parsed, strict=True)}
    for label, word, (name, _) in zip(labels, words, parsed, strict=True):
        if baseline is not None and baseline in (word, name):
            return policies, label
    return policies, None


def find_evaluations(
    policies: Mapping[str, list[str]], cfg: DictConfig, console: Console
) -> dict[str, list[Evaluation]]:
    """Return name to evaluations, all of the same episodes (within each task), made where missing if `cfg.evaluate`.

    Raises:
        RobopolicyError: there is no such thing, or no evaluation in common; says the commands that would make them.
    """
    sources = {name: [_source(word, cfg) for word in paths] for name, paths in policies.items()}
    everything = [source for ones in sources.values() for source in ones]
    chosen: dict[str, Evaluation] = {}
    for task in dict.fromkeys(_task(source) for source in everything):
        chosen |= _choose([source for source in everything if _task(source) == task], cfg, console)
    return {name: [chosen[source.word] for source in ones] for name, ones in sources.items()}


def _choose(sources: Sequence[Source], cfg: DictConfig, console: Console) -> dict[str, Evaluation]:
    """Return word to evaluation for the sources of one task."""
    fixed = {source.word: source.fixed for source in sources if source.fixed is not None}
    require_comparable(fixed)
    open_ones = [source for source in sources if source.fixed is None]
    wanted = _wanted(list(fixed.values()), open_ones)
    found, missing = dict(fixed), []
    for source in open_ones:
        match = next((one for one in source.candidates if wanted and conditions(one) == conditions(wanted)), None)
        if match is None:
            missing.append(source)
        else:
            found[source.word] = match
            console.print(f"[dim]{escape(source.word)}: {escape(str(match.folder))}")
    if missing and not cfg.evaluate:
        calls = [shlex.join(["robopolicy", "eval", *_overrides(source, wanted, cfg)]) for source in missing]
        lines = "\n".join(f"  {call}" for call in dict.fromkeys(calls))
        of = "these episodes" if wanted else "any episodes"
        words = ", ".join(dict.fromkeys(source.word for source in missing))
        raise RobopolicyError(
            f"{words}: not evaluated on {of} yet. With evaluate=true this is done first, or:\n{lines}"
        )
    for source in {source.word: source for source in missing}.values():
        found[source.word] = _evaluate(_overrides(source, wanted, cfg), console)
        wanted = wanted or found[source.word]
    require_comparable({source.word: found[source.word] for source in sources})
    return found


def _wanted(fixed: Sequence[Evaluation], sources: Sequence[Source]) -> Evaluation | None:
    """Return an evaluation with the conditions for all: a given one, else the newest in common, else the newest."""
    if fixed:
        return fixed[0]
    offered = [one for source in sources[:1] for one in source.candidates]
    for one in offered:
        if all(any(conditions(c) == conditions(one) for c in source.candidates) for source in sources[1:]):
            return one
    return next((one for source in sources for one in source.candidates), None)


def _source(word: str, cfg: DictConfig) -> Source:
    path = Path(word)
    if path.is_file() or (path / "eval_info.json").is_file():
        return Source(word=word, fixed=read_saved(path))
    try:
        folder = checkpoint.resolve(path)
    except CheckpointError as error:
        raise RobopolicyError(f"{word!r} is neither an evaluation nor a checkpoint. {error}") from error
    config = checkpoint.read_config(folder)
    of_step = [one for one in read_evaluations(run_folder(folder)) if one.info["checkpoint"]["step"] == config["step"]]
    asked = [one for one in of_step if _as_asked(one, cfg)]
    asked.sort(key=lambda one: (_as_trained(one, config), _written(one)), reverse=True)
    return Source(word=word, checkpoint=folder, candidates=tuple(asked))


def _as_asked(one: Evaluation, cfg: DictConfig) -> bool:
    seeds = [row["seed"] for row in one.rows]
    return cfg.n_episodes in (None, len(seeds)) and cfg.seed in (None, seeds[0])


def _as_trained(one: Evaluation, config: Mapping[str, Any]) -> bool:
    settings = one.info["settings"]
    same = settings.get("n_action_steps") in (None, config["timing"]["n_action_steps"])
    usual = not settings.get("shift") and (settings.get("latency") or "frozen") == "frozen"
    return same and usual and not settings.get("policy_overrides") and not settings.get("noise_seed")


def _written(one: Evaluation) -> float:
    return (one.folder / "eval_info.json").stat().st_mtime


def _task(source: Source) -> str:
    if source.fixed is not None:
        return str(conditions(source.fixed)["task"])
    assert source.checkpoint is not None
    return str(checkpoint.read_config(source.checkpoint)["task_spec"]["name"])


def _overrides(source: Source, wanted: Evaluation | None, cfg: DictConfig) -> list[str]:
    """Return the settings with which `robopolicy eval` makes the missing evaluation."""
    assert source.checkpoint is not None
    words = {"checkpoint": source.word, "n_episodes": cfg.n_episodes, "seed": cfg.seed}
    if wanted is not None:
        same = conditions(wanted)
        seeds = same["seeds"]
        if seeds != tuple(range(seeds[0], seeds[0] + len(seeds))):
            raise RobopolicyError(f"{wanted.folder} has seeds with gaps; `robopolicy eval` makes runs of seeds only.")
        words |= {"n_episodes": len(seeds), "seed": seeds[0]}
        own = checkpoint.read_config(source.checkpoint)["task_spec"]["max_episode_steps"]
        words |= {"max_episode_steps": same["max_episode_steps"] if same["max_episode_steps"] != own else None}
        words |= {"latency": same["latency"] if same["latency"] != "frozen" else None, "shift": same["shift"]}
        backend = same["backend"]
        words |= {"backend": backend if backend != default_backend() else None}
        words |= {"noise_seed": wanted.info["settings"].get("noise_seed") or None}
    return [f"{key}={value}" for key, value in words.items() if value is not None]


def _evaluate(overrides: Sequence[str], console: Console) -> Evaluation:
    """Run `robopolicy eval` with `overrides` and return what it wrote."""
    from robopolicy.app import eval as evaluation

    console.print(f"[bold]{escape(shlex.join(['robopolicy', 'eval', *overrides]))}")
    with composing.user_errors():
        result = evaluation.run(composing.compose("eval", overrides))
    return read_saved(Path(result["folder"]))


def _parse(word: str) -> tuple[str | None, list[str]]:
    """Return the name before a colon, if there is one, and the paths."""
    name, colon, rest = word.partition(":")
    patterns = [path for path in (rest if colon else word).split(",") if path]
    paths = [path for pattern in patterns for path in (sorted(glob.glob(pattern)) or [pattern])]
    if not paths or (colon and not name):
        raise UnknownNameError("policy", word, ["path", "path,path", "name:path,path"])
    return (name if colon else None), paths


def _labels(parsed: Iterable[tuple[str | None, list[str]]]) -> list[str]:
    """Return a short name for each policy: its own, else as much of the end of its path as tells them all apart."""
    parsed = list(parsed)
    for depth in range(1, 8):
        labels = [name or "+".join("/".join(_parts(path)[-depth:]) for path in paths) for name, paths in parsed]
        if len(set(labels)) == len(labels):
            return labels
    labels = [name or "+".join("/".join(_parts(path)[-1:]) for path in paths) for name, paths in parsed]
    return [
        f"{label} #{labels[:i].count(label) + 1}" if label in labels[:i] else label for i, label in enumerate(labels)
    ]


def _parts(path: str) -> list[str]:
    """Return the parts of a path that say something: the run and the evaluation."""
    parts = [part for part in Path(path).parts if part not in ("eval", "/", "eval_info.json")]
    return parts or [path]
