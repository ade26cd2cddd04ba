"""Methods over training seeds: rliable's estimators, intervals that repeat, a test that few seeds cannot fool."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fake_runs import add_evaluation, make_run
from scipy.stats import mannwhitneyu, trim_mean

from robopolicy.errors import RobopolicyError
from robopolicy.evaluation import aggregate
from robopolicy.evaluation.aggregate import compare_methods, smallest_p
from robopolicy.evaluation.comparison import read_saved, score_matrices

FEW = {"num_resamples": 100}


def scores(rate: float, *, seeds: int, tasks: int = 2, rng: int = 0) -> np.ndarray:
    return np.random.default_rng(rng).binomial(50, rate, size=(seeds, tasks)) / 50


def test_estimators_are_those_of_scipy():
    a, b = scores(0.5, seeds=5, rng=1), scores(0.6, seeds=4, rng=2)
    result = compare_methods({"a": a, "b": b}, **FEW)
    assert [m.iqm for m in result.methods] == pytest.approx([trim_mean(x, 0.25, axis=None) for x in (a, b)])
    (pair,) = result.pairs
    wins = [mannwhitneyu(b[:, t], a[:, t]).statistic / (len(a) * len(b)) for t in range(2)]
    assert pair.improvement == pytest.approx(np.mean(wins))
    assert pair.difference == pytest.approx(b.mean() - a.mean())
    for method in result.methods:
        assert method.iqm_interval[0] <= method.iqm <= method.iqm_interval[1]


def test_resampling_repeats_and_leaves_numpys_generator_alone():
    methods = {"a": scores(0.5, seeds=4), "b": scores(0.8, seeds=4, rng=1)}
    before = np.random.get_state()[1].copy()
    assert compare_methods(methods, **FEW).pairs == compare_methods(methods, **FEW).pairs
    assert np.array_equal(before, np.random.get_state()[1])


@pytest.mark.parametrize(("seeds", "p"), [(2, 1 / 3), (3, 0.1), (4, 2 / 70), (5, 2 / 252)])
def test_complete_separation_is_as_significant_as_the_number_of_seeds_allows(seeds, p):
    worse, better = np.linspace(0.1, 0.2, seeds)[:, None], np.linspace(0.8, 0.9, seeds)[:, None]
    (pair,) = compare_methods({"a": worse, "b": better}, **FEW).pairs
    assert pair.p_value == pytest.approx(p)
    assert smallest_p(seeds, seeds) == pytest.approx(p)
    assert pair.improvement == 1
    assert pair.improvement_interval == (1, 1), "the bootstrap alone would call two seeds certain"


def test_a_method_against_itself_is_a_coin():
    same = scores(0.7, seeds=4)
    (pair,) = compare_methods({"a": same, "b": same}, **FEW).pairs
    assert (pair.improvement, pair.difference, pair.p_value) == (0.5, 0, 1)


def test_pairs_are_corrected_and_the_baseline_comes_first():
    methods = {name: scores(0.2 + 0.3 * i, seeds=5, rng=i) for i, name in enumerate("abc")}
    result = compare_methods(methods, **FEW)
    assert [(p.a, p.b) for p in result.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert all(p.p_holm >= p.p_value for p in result.pairs)
    assert [(p.a, p.b) for p in compare_methods(methods, baseline="b", **FEW).pairs] == [("b", "a"), ("b", "c")]


def test_what_is_no_aggregate_is_refused():
    with pytest.raises(RobopolicyError, match="at least two training seeds of each method; 'b' has one"):
        compare_methods({"a": scores(0.5, seeds=3), "b": scores(0.5, seeds=1)})
    with pytest.raises(RobopolicyError, match="same tasks"):
        compare_methods({"a": scores(0.5, seeds=3), "b": scores(0.5, seeds=3, tasks=1)})


def test_the_verb_groups_runs_into_methods_over_tasks(tmp_path, cli):
    """Four training seeds of two methods in two tasks, named by wildcards."""
    for method, lame_above in (("good", 0.8), ("bad", -0.5)):
        for seed in range(4):
            run = make_run(tmp_path, name=f"{method}-s{seed}", losses=False)
            for task, seeds in (("point", range(10000, 10012)), ("far", range(30000, 30012))):
                add_evaluation(run, task, task=task, seeds=seeds, lame_above=lame_above + 0.1 * seed)
    words = [f"{method}:{tmp_path}/{method}-s*/eval/*" for method in ("bad", "good")]
    shown = cli("compare", *words, "baseline=good", "num_resamples=50", "--json")
    answer = json.loads(shown.out)
    assert (shown.code, answer["kind"], answer["tasks"]) == (3, "aggregate", ["far", "point"])
    (pair,) = answer["comparisons"]
    assert (pair["a"], pair["b"]) == ("good", "bad")
    assert pair["p_permutation"] == pytest.approx(2 / 70)
    assert np.shape(answer["policies"][0]["pc_success"]) == (4, 2)
    few = cli("compare", *[word.replace("s*", "s[01]") for word in words], "num_resamples=50")
    assert few.code == 0
    assert "So few training seeds cannot show a difference" in few.out


def test_matrices_need_every_task_of_every_seed_once(tmp_path):
    run = make_run(tmp_path, losses=False)
    point = read_saved(add_evaluation(run, "point"))
    far = read_saved(add_evaluation(run, "far", task="far"))
    other = read_saved(add_evaluation(run, "other"))
    tasks, found = score_matrices({"m": [point, other]})
    assert tasks == ["point"]
    assert found["m"].tolist() == [[np.mean([row["success"] for row in point.rows])]] * 2
    with pytest.raises(RobopolicyError, match="as many training seeds in each task; it has point 2, far 1"):
        score_matrices({"m": [point, other, far]})
    with pytest.raises(RobopolicyError, match="names an evaluation twice"):
        score_matrices({"m": [point, point]})


def test_setting_up_logging_anew_does_not_close_a_redirected_standard_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import absl.logging

    with (tmp_path / "err").open("w") as redirected:
        handler = absl.logging.get_absl_handler().python_handler
        monkeypatch.setattr(handler, "stream", redirected)  # as if absl were imported while it is redirected
        aggregate._rliable()
        handler.close()  # what logging.config does with all handlers
        redirected.write("still open")
