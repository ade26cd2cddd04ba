"""Comparison of policies: statistics against references and simulation, comparable evaluations, the verb's answers."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Finished
from fake_runs import add_evaluation, make_run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import multinomial
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import confint_proportions_2indep

from robopolicy.app import cli as app
from robopolicy.app import composing
from robopolicy.errors import RobopolicyError
from robopolicy.evaluation.comparison import (
    Paired,
    compare_evaluations,
    compare_outcomes,
    read_saved,
    require_comparable,
    what_differs,
)
from robopolicy.evaluation.statistics import (
    detectable_gap,
    episodes_needed,
    holm,
    mcnemar_exact,
    mcnemar_power,
    paired_difference_interval,
)

ZOO = Path(__file__).parents[1] / "checkpoints" / "zoo" / "pick_cube-diffusion"
counts = st.tuples(*[st.integers(0, 60)] * 4).filter(lambda table: sum(table) > 0)


# The statistics


@settings(deadline=None)
@given(counts)
def test_the_test_is_that_of_statsmodels(table):
    both, only_a, only_b, neither = table
    assert mcnemar_exact(only_a, only_b) == pytest.approx(mcnemar([[both, only_a], [only_b, neither]]).pvalue)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [((36, 12, 2, 0), 0.0569, 0.3404), ((1, 1, 7, 12), -0.507, -0.026)],
    ids=["Newcombe 1998, table II", "Fagerland et al. 2014, airway reactivity"],
)
def test_the_interval_has_its_published_values(table, low, high):
    assert paired_difference_interval(*table) == pytest.approx((low, high), abs=5e-4)


@settings(deadline=None)
@given(counts)
def test_uncorrelated_pairs_have_newcombes_interval_of_independent_rates(table):
    both, only_a, only_b, neither = table
    n = sum(table)
    if 0 <= both * neither - only_a * only_b <= n / 2:
        wanted = confint_proportions_2indep(both + only_a, n, both + only_b, n, method="newcomb", compare="diff")
        assert paired_difference_interval(*table) == pytest.approx(wanted, abs=1e-9)


@settings(deadline=None)
@given(counts)
def test_the_interval_holds_the_difference_and_turns_with_the_order(table):
    both, only_a, only_b, neither = table
    low, high = paired_difference_interval(*table)
    assert -1 <= low <= (only_a - only_b) / sum(table) <= high <= 1
    assert high > low, "no differing episode is not proof of no difference"
    assert paired_difference_interval(both, only_b, only_a, neither) == pytest.approx((-high, -low))


@pytest.mark.parametrize(("n", "discordance", "gap"), [(7, 0.6, 0.0), (12, 0.5, 0.3), (25, 0.4, 0.4), (30, 0.2, 0.1)])
def test_power_is_the_sum_over_all_tables(n, discordance, gap):
    chances = [(discordance + gap) / 2, (discordance - gap) / 2, 1 - discordance]
    tables = [(a, b, n - a - b) for a, b in itertools.product(range(n + 1), repeat=2) if a + b <= n]
    wanted = sum(multinomial.pmf(t, n, chances) for t in tables if mcnemar_exact(t[0], t[1]) <= 0.05)
    assert mcnemar_power(n, discordance=discordance, gap=gap) == pytest.approx(wanted, abs=1e-9)


def test_six_differing_episodes_are_the_fewest_that_decide():
    assert mcnemar_power(5, discordance=1, gap=1) == 0
    assert mcnemar_power(6, discordance=1, gap=1) == pytest.approx(1)
    assert episodes_needed(discordance=1, gap=1) == 6
    assert detectable_gap(5, discordance=0.2) is None


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 0.5), st.floats(0, 1), st.sampled_from([0.01, 0.05]))
def test_the_number_of_episodes_is_just_enough(gap, more, alpha):
    discordance = gap + more * (1 - gap)
    n = episodes_needed(discordance=discordance, gap=gap, alpha=alpha)
    assert mcnemar_power(n, discordance=discordance, gap=gap, alpha=alpha) >= 0.8
    assert mcnemar_power(n - 1, discordance=discordance, gap=gap, alpha=alpha) < 0.8


@given(st.integers(6, 400), st.floats(0, 1))
@example(n=6, discordance=1.1125369292536007e-308)
@settings(max_examples=25, deadline=None)
def test_the_detectable_gap_has_the_power_asked_for(n, discordance):
    gap = detectable_gap(n, discordance=discordance)
    assert gap is not None
    assert mcnemar_power(n, discordance=max(discordance, gap), gap=gap) == pytest.approx(0.8, abs=1e-3)


def simulated(n: int, discordance: float, gap: float, *, seed: int, repeats: int = 2000) -> Counter[Paired]:
    """Return how often which outcome came, of policies whose rates are .8 on average and differ by `gap`."""
    chances = [0.8 - discordance / 2, (discordance + gap) / 2, (discordance - gap) / 2, 0.2 - discordance / 2]
    tables = np.random.default_rng(seed).multinomial(n, chances, size=repeats).tolist()
    return Counter(Paired(both=both, only_a=a, only_b=b, neither=neither) for both, a, b, neither in tables)


def share(pairs: Counter[Paired], holds: Callable[[Paired], bool]) -> float:
    return sum(times for pair, times in pairs.items() if holds(pair)) / pairs.total()


@pytest.mark.parametrize(("n", "discordance"), [(50, 0.2), (100, 0.4), (300, 0.3)])
def test_equal_policies_are_rarely_called_different(n, discordance):
    pairs = simulated(n, discordance, 0.0, seed=0)
    noise = 3 * math.sqrt(0.05 * 0.95 / pairs.total())
    assert share(pairs, lambda pair: pair.p_value <= 0.05) <= 0.05 + noise


@pytest.mark.parametrize("discordance", [0.1, 0.2, 0.4])
def test_the_power_line_keeps_its_promise_for_ten_points(discordance):
    n = episodes_needed(discordance=discordance, gap=0.1)
    found = share(simulated(n, discordance, 0.1, seed=1), lambda pair: pair.p_value <= 0.05)
    assert found == pytest.approx(mcnemar_power(n, discordance=discordance, gap=0.1), abs=0.03)
    assert found == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize(("n", "discordance", "gap"), [(50, 0.2, 0.1), (100, 0.1, 0.05)])
def test_the_interval_covers_the_true_difference(n, discordance, gap):
    pairs = simulated(n, discordance, gap, seed=2, repeats=800)
    held = share(pairs, lambda pair: pair.interval[0] <= -gap <= pair.interval[1])
    assert held >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / pairs.total())


def test_holm_corrects_for_the_number_of_pairs():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert (holm([0.04]), holm([])) == ([0.04], [])


@pytest.mark.parametrize("table", [(0, 0, 0, 0), (-1, 2, 2, 2)])
def test_impossible_counts_are_refused(table):
    with pytest.raises(ValueError, match="needs counts"):
        paired_difference_interval(*table)
    with pytest.raises(ValueError, match="discordance"):
        mcnemar_power(10, discordance=0.1, gap=0.2)
    with pytest.raises(ValueError, match="as many outcomes"):
        compare_outcomes([True], [True, False])


# Evaluations


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with a good, a worse and a bad evaluation of 40 seeds."""
    run = make_run(tmp_path_factory.mktemp("runs"), name="good", losses=False)
    for name, lame_above in (("good", 0.9), ("worse", 0.75), ("bad", -0.2)):
        overrides = {} if name == "good" else {"sampler.num_inference_steps": 2}
        add_evaluation(
            run, name, n=40, lame_above=lame_above, policy_overrides=overrides, sampler={"num_inference_steps": 10}
        )
    return run


def test_an_evaluation_compared_with_itself_is_identical(run):
    good = read_saved(run / "eval/good")
    (pair,) = compare_evaluations({"a": good, "b": good})
    assert (pair.verdict, pair.num_identical, pair.paired.difference) == ("identical", 40, 0)
    assert (pair.paired.p_value, pair.seeds_only_a, pair.seeds_only_b) == (1.0, (), ())
    assert pair.paired.interval[0] < 0 < pair.paired.interval[1]


def test_pairs_are_counted_by_seed(run):
    good, bad = (read_saved(run / "eval" / name) for name in ("good", "bad"))
    (pair,) = compare_evaluations({"good": good, "bad": bad})
    won = {row["seed"] for row in good.rows if row["success"]}
    kept = {row["seed"] for row in bad.rows if row["success"]}
    assert set(pair.seeds_only_a) == won - kept
    assert pair.seeds_only_b == ()
    assert pair.paired.difference == pytest.approx((len(kept) - len(won)) / 40)
    assert pair.verdict == "a"
    assert pair.num_identical == sum(
        x["sum_reward"] == y["sum_reward"] for x, y in zip(good.rows, bad.rows, strict=True)
    )
    assert what_differs(good, bad) == ["sampler.num_inference_steps 10 -> 2"]


def test_all_pairs_together_keep_the_level(run):
    three = {name: read_saved(run / "eval" / name) for name in ("good", "worse", "bad")}
    pairs = compare_evaluations(three)
    assert [(pair.a, pair.b) for pair in pairs] == [("good", "worse"), ("good", "bad"), ("worse", "bad")]
    assert [pair.p_holm for pair in pairs] == holm([pair.paired.p_value for pair in pairs])
    against = compare_evaluations(three, baseline="worse")
    assert [(pair.a, pair.b) for pair in against] == [("worse", "good"), ("worse", "bad")]
    assert against[0].episodes_needed > compare_evaluations({n: three[n] for n in ("good", "worse")})[0].episodes_needed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": "other"}, "task: point against other"),
        ({"seeds": range(20000, 20012)}, r"seeds: 10000 to 10011 \(12\) against 20000 to 20011 \(12\)"),
        ({"n": 6}, r"seeds: 10000 to 10011 \(12\) against 10000 to 10005 \(6\)"),
        ({"max_episode_steps": 50}, "max_episode_steps: 20 against 50"),
        ({"latency": "fixed_ms:50"}, "latency: frozen against fixed_ms:50"),
        ({"shift": "goal_moved:2", "shift_suite": "1"}, "shift: none against goal_moved:2"),
        ({"changes": {"backend": "cuda"}}, "backend: analytic against cuda"),
        ({"changes": {"versions": {"mani_skill": "3.0.0", "sapien": "3.0.3"}}}, "mani_skill: .* against 3.0.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_episodes_are_refused_and_the_difference_named(change, said, tmp_path):
    first, second = add_evaluation(tmp_path, "first"), add_evaluation(tmp_path, "second", **change)
    pair = {"first": read_saved(first), "second": read_saved(second)}
    with pytest.raises(RobopolicyError, match="first and second are not of the same episodes.*\n.*" + said):
        require_comparable(pair)
    with pytest.raises(RobopolicyError, match="cannot be compared"):
        compare_evaluations(pair)


def test_policies_may_differ_in_what_is_theirs(tmp_path):
    first = add_evaluation(tmp_path, "first")
    second = add_evaluation(
        tmp_path, "second", weights_sha256="b" * 64, n_action_steps=4, noise_seed=1, latency="frozen"
    )
    pair = {"first": read_saved(first), "second": read_saved(second)}
    require_comparable(pair)
    assert what_differs(*pair.values()) == ["the weights", "noise_seed 0 -> 1", "n_action_steps 8 -> 4"]


def test_a_lone_eval_info_is_enough(run, tmp_path):
    lone = tmp_path / "ci.json"
    shutil.copy(run / "eval/good/eval_info.json", lone)
    (pair,) = compare_evaluations({"old": read_saved(lone), "new": read_saved(run / "eval/good")})
    assert pair.verdict == "identical"
    with pytest.raises(RobopolicyError, match="has no success_at_end"):
        compare_evaluations({"old": read_saved(lone), "new": read_saved(lone)}, outcome="success_at_end")
    lone.write_text('{"overall": {"pc_success": 97.0}}')
    with pytest.raises(RobopolicyError, match="format None"):
        read_saved(lone)
    lone.write_text("{")
    with pytest.raises(RobopolicyError, match="not a readable evaluation"):
        read_saved(lone)


# The verb


@pytest.fixture
def compare(cli: Callable[..., Finished]) -> Callable[..., Finished]:
    """Return a function that runs `robopolicy compare` with words that may be paths."""
    return lambda *words: cli("compare", *map(str, words))


def test_plain_words_become_the_list_of_policies():
    call = app.parse(["compare", "it's", "a=b/c", "gap=10", "name:x,y", "runs/a b"])
    assert call.overrides == ["a=b/c", "gap=10", r"policies=['it\'s','name:x,y','runs/a b']"]
    cfg = composing.compose("compare", call.overrides[1:])
    assert list(cfg.policies) == ["it's", "name:x,y", "runs/a b"]
    with pytest.raises(RobopolicyError, match="'pick_cube' is not a setting"):
        app.parse(["eval", "pick_cube"])


def test_the_baseline_gates(run, compare):
    at = run / "eval"
    shown = compare(at / "bad", at / "worse", f"baseline={at / 'good'}", "--json")
    answer = json.loads(shown.out)
    assert (shown.code, answer["exit_code"]) == (3, 3)
    assert answer["baseline"] == "good"
    assert answer["worse_than_baseline"] == ["bad"]
    assert [pair["b"] for pair in answer["comparisons"]] == ["bad", "worse"]
    assert "B - A" in shown.err
    better = compare(at / "good", f"baseline={at / 'bad'}", "--json")
    assert (better.code, json.loads(better.out)["comparisons"][0]["better"]) == (0, "good")
    assert compare(at / "good", at / "bad").code == 0, "without a baseline a difference is no failure"


def test_the_table_says_what_differs_and_what_it_would_take(run, compare):
    shown = compare(f"old:{run / 'eval/good'}", f"new:{run / 'eval/bad'}", "gap=10").out
    (pair,) = compare_evaluations({n: read_saved(run / "eval" / n) for n in ("good", "bad")}, gap=0.1)
    for wanted in (
        "A is better",
        "they differ in: sampler.num_inference_steps 10 -> 2",
        f"seeds that only A solves: {', '.join(map(str, pair.seeds_only_a[:20]))}",
        f"to see a 10-point gap with 80 % probability you need n = {pair.episodes_needed:,} paired episodes",
    ):
        assert wanted in shown


def test_the_same_run_twice_is_every_episode_identical(run, compare):
    shown = compare(run, run)
    assert shown.code == 0
    assert "every episode is identical to the last digit" in shown.out


def test_runs_are_compared_by_what_they_have_in_common(run, compare, tmp_path):
    other = make_run(tmp_path, name="other", losses=False)
    missing = compare(run, other)
    assert missing.code == 2
    assert f"robopolicy eval checkpoint={other} n_episodes=40 seed=10000" in missing.err
    add_evaluation(other, "short", n=10)
    assert "not evaluated on these episodes yet" in compare(run, other).err
    add_evaluation(run, "quick", n=10)
    shown = compare(run, other)
    assert str(run / "eval/quick") in shown.err
    assert compare(run, other, "n_episodes=40").code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs at least two policies"),
        (["nowhere", "nowhere"], "'nowhere' is neither an evaluation nor a checkpoint."),
        (["a", "b", "alpha=2"], "alpha must be between 0 and 1; got 2"),
        (["a", "b", "outcome=sucess"], "Did you mean 'success'?"),
        ([":x", "b"], "Unknown policy ':x'"),
        (["a", "b", "bseline=c"], "Did you mean 'baseline'?"),
    ],
)
def test_mistakes_are_explained(words, said, compare):
    shown = compare(*words)
    assert shown.code == 2
    assert said in shown.err


@pytest.mark.sim
def test_missing_evaluations_are_made_on_the_same_seeds(tmp_path, compare):
    """The published policy, evaluated once by the verb itself, and a copy of it with that evaluation."""
    one, two = tmp_path / "one", tmp_path / "two"
    shutil.copytree(ZOO, one, ignore=shutil.ignore_patterns("eval"))
    refused = compare(one, one, "n_episodes=3", "seed=30000")
    assert refused.code == 2
    assert f"robopolicy eval checkpoint={one} n_episodes=3 seed=30000" in refused.err
    shown = compare(one, one, "n_episodes=3", "seed=30000", "evaluate=true", "--json")
    assert shown.code == 0
    answer = json.loads(shown.out)
    assert answer["comparisons"][0]["identical"]
    assert answer["conditions"]["seeds"] == [30000, 30001, 30002]
    shutil.copytree(one, two)
    assert "every episode is identical" in compare(one, two, "n_episodes=3").out
