"""The report: tells what the run's files hold, needs nothing but itself, and says what is missing."""

from __future__ import annotations

import html.parser
import importlib.metadata
import json
import re
from pathlib import Path

import pytest
import torch
from fake_runs import add_evaluation, make_run
from point_task import PointEnv, run_point
from safetensors.torch import save_file

from robopolicy.errors import CheckpointError
from robopolicy.evaluation.charts import histogram, loss_chart
from robopolicy.evaluation.comparison import compare_evaluations, read_saved
from robopolicy.evaluation.report import (
    context,
    duration,
    milliseconds,
    num_parameters,
    percent,
    points,
    render_report,
)
from robopolicy.evaluation.report_tables import episode_columns
from robopolicy.evaluation.statistics import mcnemar_exact, wilson_interval
from robopolicy.evaluation.video import record

VOID = {"meta", "br", "img", "input", "link", "path", "use", "source"}


class Page(html.parser.HTMLParser):
    """Collects tags, and what a browser would request; complains about tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.urls, self.links, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if (tag, name) == ("a", "href")]
        self.urls += [value for name, value in attrs if name in ("src", "href", "poster", "xlink:href", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += f" {data}"


def page_of(run: Path) -> Page:
    path = render_report(run)
    assert path == run / "report.html"
    return Page(path.read_text())


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_a_full_report_holds_everything_and_requests_nothing(tmp_path):
    run = make_run(tmp_path)
    add_evaluation(run, "main", film=True)
    page = page_of(run)
    text = flat(page.text)
    (info,) = (json.loads(p.read_text()) for p in run.glob("eval/*/eval_info.json"))
    for wanted in (
        "Go to the origin.",
        f"{percent(info['overall']['pc_success'])}\u2009%",
        f"{info['overall']['n_success']} of 12",
        "demos/point.h5",
        "0-39, 50-59 (50)",
        "Failed seeds: " + ", ".join(map(str, info["failed_seeds"])),
        "robopolicy train task=point",
        "robopolicy eval checkpoint=checkpoints/run",
        "sha256 " + "a" * 64,
        f"torch {importlib.metadata.version('torch')}",
    ):
        assert flat(wanted) in text
    assert "How failed episodes ended" in text
    assert page.tags.count("img") == 1
    assert page.tags.count("svg") == 3
    assert "video" in page.tags
    assert all(url.startswith(("data:", "#")) for url in page.urls if url not in page.links)
    assert page.links == ["eval/main/episodes.mp4"]
    assert not re.search(
        r"(https?:)?//(?!www\.w3\.org)[\w.]+\.\w+/", (run / "report.html").read_text().split("base64")[0]
    )
    assert "run <1>" in page.text, "names are escaped"
    assert page.tags.count("tr") == 13
    assert [p.name for p in run.iterdir() if "report" in p.name] == ["report.html"]


@pytest.mark.parametrize("losses", [True, False])
def test_what_is_missing_is_said(tmp_path, losses):
    run = make_run(tmp_path, losses=losses)
    text = flat(page_of(run).text)
    assert "Not evaluated yet." in text
    assert "robopolicy eval checkpoint=" in text
    assert ("No training losses" in text) != losses
    add_evaluation(run, "main")
    text = flat(page_of(run).text)
    assert "Not evaluated yet." not in text
    assert "No film of this evaluation." in text


def test_the_headline_is_the_last_step_as_trained_not_the_best(tmp_path):
    run = make_run(tmp_path, steps=(50, 100))
    add_evaluation(run, "a", step=50, n=40)
    add_evaluation(run, "b", step=100, n=8)
    add_evaluation(run, "c", step=100, n=12)
    add_evaluation(run, "d", step=100, n=16, policy_overrides={"sampler.num_inference_steps": 4})
    shown = context(run)
    assert shown["main"]["name"] == "c"
    assert [one["name"] for one in shown["evaluations"]] == ["a", "b", "c", "d"]
    assert shown["step"] == 100
    assert "sampler.num_inference_steps=4" in flat(page_of(run).text)


def test_evaluations_of_the_same_episodes_are_paired_with_the_headline(tmp_path):
    run = make_run(tmp_path)
    add_evaluation(run, "main", n=30, lame_above=0.9)
    add_evaluation(run, "bad", n=30, lame_above=-0.4, policy_overrides={"sampler.eta": 1.0})
    add_evaluation(run, "late", n=30, latency="fixed_ms:200")
    add_evaluation(run, "short", n=10)
    shown = context(run)
    assert shown["main"]["name"] == "main"
    (row,) = shown["paired"]
    (pair,) = compare_evaluations({name: read_saved(run / "eval" / name) for name in ("main", "bad")})
    assert (row["name"], row["verdict"], row["won"], row["lost"]) == ("bad", "worse", 0, len(pair.seeds_only_a))
    assert row["p"] == pair.paired.p_value
    text = flat(page_of(run).text)
    assert "Against main, episode by episode" in text
    assert f"{points(100 * pair.paired.interval[0])} to {points(100 * pair.paired.interval[1])}" in text
    assert "latency=fixed_ms:200" in text
    assert "n_action_steps=" not in text


def cell(shift: str, level: int, n_success: int) -> dict[str, object]:
    """Return a cell of robustness.json: `n_success` of 50, against 48."""
    low, high = wilson_interval(n_success, 50)
    lost = 48 - n_success
    return {
        "shift": shift, "family": "scene", "level": level, "strength": 0.03 * level, "unit": "m", "n": 50,
        "n_success": n_success, "rate": n_success / 50, "ci95": [low, high], "difference": -lost / 50,
        "difference_ci95": [-1, 1], "lost": lost, "gained": 0, "mcnemar_p": mcnemar_exact(lost, 0),
        "folder": f"eval/{shift}_{level}",
    }  # fmt: skip


def test_a_shift_suite_becomes_a_heat_map(tmp_path):
    run = make_run(tmp_path, losses=False)
    add_evaluation(run, "main")
    assert context(run)["robustness"] is None
    table = {
        "format": "robopolicy-robustness/1", "suite": "1", "task": "point", "step": 100, "n_episodes": 50,
        "seed": 10000, "settings": {}, "clean": {"n_success": 48, "n": 50, "rate": 0.96, "ci95": [0.86, 0.99]},
        "cells": [cell("goal_moved", 1, 47), cell("goal_moved", 3, 12), cell("push", 2, 41)],
        "skipped": [{"shift": "camera_pose", "why": "the policy sees no camera"}],
    }  # fmt: skip
    (run / "eval/suite").mkdir()
    file = run / "eval/suite/robustness.json"
    file.write_text(json.dumps(table))
    shown = context(run)["robustness"]
    assert shown["levels"] == [1, 2, 3]
    assert [cell["changed"] for row in shown["rows"] for cell in row["cells"].values()] == [False, True, True]
    text = flat(page_of(run).text)
    for wanted in (
        "It loses most to goal_moved at level 3",
        "24* -72.0",
        "94 -2.0",
        "camera_pose (the policy sees no camera)",
    ):
        assert wanted in text
    file.write_text("{")
    assert context(run)["robustness"] is None


def test_episodes_show_what_else_is_known_of_them():
    rows = [
        {"min_distance_m": 0.012, "num_replans": 3, "num_hold_steps": 0},
        {"min_distance_m": None, "num_replans": 4},
    ]
    columns = episode_columns(rows)
    assert [column["heading"] for column in columns] == ["nearest, cm", "plans"]
    assert columns[0]["values"] == [(0.012, "1.2"), (None, "–")]
    assert episode_columns([{"seed": 1}]) == []


def test_a_published_policy_is_its_own_run(tmp_path):
    run = make_run(tmp_path, losses=False)
    zoo = tmp_path / "zoo"
    (run / "step_00000100").rename(zoo)
    assert "Not evaluated yet." in flat(page_of(zoo).text)
    with pytest.raises(CheckpointError, match="no checkpoint to report on"):
        render_report(run)


def test_a_film_that_was_deleted_or_is_too_large_does_not_break_the_page(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    add_evaluation(run, "main", film=True)
    monkeypatch.setattr("robopolicy.evaluation.report.MOST_VIDEO_BYTES", 10)
    assert "too large" in flat(page_of(run).text)
    (run / "eval/main/episodes.mp4").unlink()
    assert "No film of this evaluation." in flat(page_of(run).text)


def test_record_names_what_it_wrote(tmp_path):
    result = run_point(4)
    video = record(PointEnv(2), result.episodes[:4], tmp_path, size_px=48, stride=2)
    assert video["same_outcomes"]
    assert video["seeds"] == [10000, 10001, 10002, 10003]
    assert {p.name for p in tmp_path.iterdir()} == {video["mp4"], video["poster"], video["gif"]}


def test_charts_take_their_colour_from_the_page():
    train = (range(1, 2000), [1 / k for k in range(1, 2000)])
    for svg in (
        loss_chart(train, None),
        loss_chart(([1, 2], [0.5, float("nan")]), ([1], [0.4])),
        histogram([1, 2, 2, 3], xlabel="steps", ylabel="episodes"),
        histogram([0.1, 0.11, 0.5, 9.0], xlabel="ms", ylabel="calls", marks=[("median", 0.3)]),
        histogram([2.0, 2.0], xlabel="ms", ylabel="calls"),
    ):
        Page(svg)
        assert svg.startswith("<svg")
        assert "currentColor" in svg
        assert "#010203" not in svg
        assert len(svg) < 120_000
    assert loss_chart(train, None) == loss_chart(train, None)


def test_numbers_read_well(tmp_path):
    assert [percent(v) for v in (97.0, 96.55, 100.0, 0.0)] == ["97", "96.5", "100", "0"]
    assert [milliseconds(v) for v in (0.01234, 3.14159, 42.42, 1234.5)] == ["0.0123", "3.14", "42.4", "1234"]
    assert [duration(v) for v in (0.84, 42.3, 185, 7620)] == ["0.8 s", "42 s", "3 min 5 s", "2 h 7 min"]
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, tmp_path / "m.safetensors")
    assert num_parameters(tmp_path / "m.safetensors") == 10
    assert num_parameters(tmp_path / "none.safetensors") is None
