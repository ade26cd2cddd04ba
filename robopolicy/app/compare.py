"""Compare policies on the same episodes: who wins which seeds, how sure that is, how many episodes it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from robopolicy.evaluation.aggregate import Aggregate
    from robopolicy.evaluation.comparison import Comparison
    from robopolicy.evaluation.results import Evaluation

EXAMPLES: tuple[tuple[str, str], ...] = (
    ("robopolicy compare pick_cube pick_cube-v2", "the newest evaluations of two runs that are of the same episodes"),
    (
        "robopolicy compare checkpoints/pick_cube/eval/fast checkpoints/pick_cube/eval/slow gap=10",
        "two evaluations, and how many episodes would show a difference of 10 points",
    ),
    (
        "robopolicy compare new baseline=old evaluate=true --json",
        "in CI: exit code 3 where old is significantly better",
    ),
    (
        "robopolicy compare mlp:a-s1,a-s2,a-s3,a-s4 unet:b-s1,b-s2,b-s3,b-s4",
        "two methods over four training seeds each: interquartile mean, probability of improvement",
    ),
)

REGRESSION = 3
"""Exit code where the baseline is significantly better than one of the others."""
MOST_SEEDS_SHOWN = 20


def run(cfg: DictConfig) -> dict[str, Any]:
    """Compare `cfg.policies`; the result says `exit_code` 3 where the baseline wins."""
    from rich.console import Console

    from robopolicy.app.compare_words import find_evaluations, parse_policies
    from robopolicy.errors import RobopolicyError

    _check(cfg)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    policies, baseline = parse_policies(cfg.policies, cfg.baseline)
    if len(policies) < 2:
        raise RobopolicyError(
            "`robopolicy compare` needs at least two policies: evaluation folders, runs or checkpoints; see "
            "`robopolicy compare --help`."
        )
    found = find_evaluations(policies, cfg, console)
    if any(len(ones) > 1 for ones in found.values()):
        return _compare_methods(found, baseline, cfg)
    return _compare_evaluations({name: ones[0] for name, ones in found.items()}, baseline, cfg)


def _check(cfg: DictConfig) -> None:
    """Raise for settings out of their range."""
    from robopolicy.errors import RobopolicyError, UnknownNameError

    if cfg.outcome not in ("success", "success_at_end"):
        raise UnknownNameError("outcome", str(cfg.outcome), ("success", "success_at_end"))
    if cfg.num_resamples < 1:
        raise RobopolicyError(f"num_resamples must be at least 1; got {cfg.num_resamples}.")
    for name, most in (("alpha", 1), ("power", 1), ("gap", 100)):
        if not 0 < cfg[name] < most:
            raise RobopolicyError(f"{name} must be between 0 and {most}; got {cfg[name]}.")


def _compare_evaluations(
    evaluations: Mapping[str, Evaluation], baseline: str | None, cfg: DictConfig
) -> dict[str, Any]:
    """Compare single evaluations episode by episode."""
    from robopolicy.evaluation.comparison import METHODS, compare_evaluations, conditions
    from robopolicy.evaluation.statistics import wilson_interval

    pairs = compare_evaluations(
        evaluations,
        baseline=baseline,
        outcome=cfg.outcome,
        alpha=cfg.alpha,
        gap=cfg.gap / 100,
        power=cfg.power,
    )
    shown = []
    for name, one in evaluations.items():
        hits, n = sum(bool(row[cfg.outcome]) for row in one.rows), len(one.rows)
        shown.append(
            {
                "name": name,
                "folder": str(one.folder),
                "n_episodes": n,
                "n_success": hits,
                "pc_success": 100 * hits / n,
                "pc_success_ci95": [100 * side for side in wilson_interval(hits, n)],
            }
        )
    _say_pairs(shown, pairs, evaluations, cfg)
    worse = [pair.b for pair in pairs if baseline and pair.verdict == "a"]
    return {
        "kind": "paired",
        "conditions": conditions(next(iter(evaluations.values()))),
        "outcome": cfg.outcome,
        "alpha": cfg.alpha,
        "power": cfg.power,
        "methods": METHODS,
        "policies": shown,
        "comparisons": [pair.to_dict() for pair in pairs],
        **_gate(baseline, worse),
    }


def _compare_methods(
    found: Mapping[str, Sequence[Evaluation]], baseline: str | None, cfg: DictConfig
) -> dict[str, Any]:
    """Compare methods by the success rates of several training seeds."""
    from robopolicy.evaluation.aggregate import compare_methods
    from robopolicy.evaluation.comparison import require_comparable, score_matrices

    everything = {f"{name} ({one.folder})": one for name, ones in found.items() for one in ones}
    require_comparable(everything, per_task=True)
    tasks, scores = score_matrices(found, cfg.outcome)
    result = compare_methods(scores, baseline=baseline, num_resamples=cfg.num_resamples)
    _say_methods(result, tasks, cfg)
    worse = [pair.b for pair in result.pairs if baseline and pair.p_holm <= cfg.alpha and pair.difference < 0]
    return {
        "kind": "aggregate",
        "tasks": tasks,
        "outcome": cfg.outcome,
        "alpha": cfg.alpha,
        "methods": {
            "interval": "stratified bootstrap over training seeds (rliable)",
            "test": "exact permutation of training seeds (scipy)",
            "correction": "Holm",
        },
        "policies": [
            {**method.to_dict(), "folders": [str(one.folder) for one in found[method.name]]}
            for method in result.methods
        ],
        "comparisons": [pair.to_dict() for pair in result.pairs],
        **_gate(baseline, worse),
    }


def _gate(baseline: str | None, worse: Sequence[str]) -> dict[str, Any]:
    return {"baseline": baseline, "worse_than_baseline": list(worse), "exit_code": REGRESSION if worse else 0}


def _say_pairs(
    shown: Sequence[Mapping[str, Any]],
    pairs: Sequence[Comparison],
    evaluations: Mapping[str, Evaluation],
    cfg: DictConfig,
) -> None:
    """Print the table of rates, that of pairs, and what the numbers allow to say; policies by letter."""
    from rich.console import Console
    from rich.markup import escape

    from robopolicy.evaluation.comparison import what_differs
    from robopolicy.evaluation.report import percent

    console = Console(highlight=False)
    letters = _letters(evaluations)
    rates = _table("", "policy", "success", "95 % interval", "episodes")
    for one in shown:
        low, high = one["pc_success_ci95"]
        rates.add_row(
            letters[one["name"]],
            escape(one["name"]),
            f"{percent(one['pc_success'])} %",
            f"{percent(low)} to {percent(high)}",
            f"{one['n_success']} of {one['n_episodes']}",
        )
    console.print(rates)
    corrected = ["p (Holm)"] if len(pairs) > 1 else []
    table = _table("pair", "difference", "95 % interval", "won", "lost", "p", *corrected, "verdict")
    for pair in pairs:
        low, high = pair.paired.interval
        table.add_row(
            f"{letters[pair.b]} - {letters[pair.a]}",
            f"{100 * pair.paired.difference:+.1f}",
            f"{100 * low:+.1f} to {100 * high:+.1f}",
            str(pair.paired.only_b),
            str(pair.paired.only_a),
            _p(pair.paired.p_value),
            *([_p(pair.p_holm)] if corrected else []),
            _verdict(pair, letters),
        )
    console.print("\n", table)
    console.print(
        "[dim]difference in points, Newcombe's interval (of the rates: Wilson's); p: exact McNemar test[/]\n",
        soft_wrap=True,
    )
    for pair in pairs:
        changed = what_differs(evaluations[pair.a], evaluations[pair.b])
        console.print(escape("\n".join(_sentences(pair, letters, changed, cfg))), soft_wrap=True)


def _sentences(pair: Comparison, letters: Mapping[str, str], changed: Sequence[str], cfg: DictConfig) -> list[str]:
    """Return what is to be said of a pair beside its row: what was changed, where outcomes differ, the power line."""
    lines = [f"{letters[pair.b]} against {letters[pair.a]}"]
    if changed:
        lines.append(f"  they differ in: {'; '.join(changed)}")
    if pair.num_identical:
        which = "every episode is" if pair.num_identical == pair.paired.n else f"{pair.num_identical} episodes are"
        lines.append(f"  {which} identical to the last digit")
    for name, seeds in ((pair.b, pair.seeds_only_b), (pair.a, pair.seeds_only_a)):
        if seeds:
            more = ", ..." if len(seeds) > MOST_SEEDS_SHOWN else ""
            lines.append(
                f"  seeds that only {letters[name]} solves: {', '.join(map(str, seeds[:MOST_SEEDS_SHOWN]))}{more}"
            )
    if pair.verdict == "identical":
        return lines
    seen = "no gap at all" if pair.detectable_gap is None else f"one of {100 * pair.detectable_gap:.0f} points or more"
    lines.append(
        f"  power: to see a {cfg.gap:g}-point gap with {100 * cfg.power:g} % probability you need "
        f"n = {pair.episodes_needed:,} paired episodes (if outcomes differ in "
        f"{100 * max(pair.paired.discordance, pair.gap):.0f} % of them); n = {pair.paired.n} sees {seen}"
    )
    return lines


def _say_methods(result: Aggregate, tasks: Sequence[str], cfg: DictConfig) -> None:
    """Print the table of methods, that of pairs, and what so many training seeds can show."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    letters = _letters([method.name for method in result.methods])
    table = _table("", "method", "runs", "mean", "interquartile mean", "95 % interval")
    for method in result.methods:
        low, high = method.iqm_interval
        table.add_row(
            letters[method.name],
            escape(method.name),
            f"{method.scores.shape[0]} x {len(tasks)} task{'s' * (len(tasks) > 1)}",
            f"{100 * method.mean:.1f} %",
            f"{100 * method.iqm:.1f} %",
            f"{100 * low:.1f} to {100 * high:.1f}",
        )
    console.print(table)
    corrected = ["p (Holm)"] if len(result.pairs) > 1 else []
    pairs = _table("pair", "difference", "P(improvement)", "95 % interval", "p", *corrected, "verdict")
    for pair in result.pairs:
        low, high = pair.improvement_interval
        better = letters[pair.b if pair.difference > 0 else pair.a]
        pairs.add_row(
            f"{letters[pair.b]} - {letters[pair.a]}",
            f"{100 * pair.difference:+.1f}",
            f"{pair.improvement:.2f}",
            f"{low:.2f} to {high:.2f}",
            _p(pair.p_value),
            *([_p(pair.p_holm)] if corrected else []),
            f"{better} is better" if pair.p_holm <= cfg.alpha else "undecided",
        )
    console.print("\n", pairs)
    console.print(
        "[dim]success, differences in points; intervals: stratified bootstrap over training seeds (rliable)[/]"
    )
    least = max(pair.smallest_p for pair in result.pairs) * len(result.pairs)
    if least > cfg.alpha:
        console.print(
            f"So few training seeds cannot show a difference at alpha = {cfg.alpha:g}: even if every run of one method "
            f"beat every run of the other, p would be {_p(min(1.0, least))}. Two methods need four training seeds each."
        )


def _letters(names: Iterable[str]) -> dict[str, str]:
    """Return name to A, B, ..., short enough for a table."""
    return {name: chr(ord("A") + i) if i < 26 else f"P{i + 1}" for i, name in enumerate(names)}


def _table(*columns: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in columns:
        words = name in ("", "policy", "method", "pair", "verdict")
        table.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap="interval" in name)
    return table


def _verdict(pair: Comparison, letters: Mapping[str, str]) -> str:
    better = {"a": pair.a, "b": pair.b}.get(pair.verdict)
    if better is not None:
        return f"{letters[better]} is better"
    return "identical" if pair.verdict == "identical" else "undecided"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"
