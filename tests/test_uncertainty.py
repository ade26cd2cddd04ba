"""Failure prediction against closed forms, and the picture of an energy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import fake_observation, fake_spec, fit_to_bounds
from torch import nn

from robopolicy.errors import RobopolicyError
from robopolicy.evaluation.landscape import plane, save_landscape
from robopolicy.evaluation.uncertainty import auroc, auroc_interval, failure_prediction, replan_threshold
from robopolicy.nn.encoder import ObservationEncoder
from robopolicy.policies.ebt import EnergyPolicy
from robopolicy.sampling.descent import Descent, StepRule
from robopolicy.sampling.objective import Objective
from robopolicy.timing import ChunkTiming


def test_auroc_counts_pairs():
    scores, failed = [1.0, 2.0, 3.0, 3.0], [False, True, False, True]
    assert auroc(scores, failed) == (1 + 0 + 1 + 0.5) / 4
    assert auroc([-s for s in scores], failed) == pytest.approx(1 - auroc(scores, failed))
    assert auroc([0.0, 1.0], [False, True]) == 1.0
    assert auroc([5.0, 5.0, 5.0], [False, True, False]) == 0.5  # a constant is a coin


def test_auroc_of_two_gaussians_is_known_and_in_its_interval():
    """For failures at N(1, 1) and successes at N(0, 1) it is Phi(1 / sqrt(2)) = 0.760."""
    rng = np.random.default_rng(0)
    failed = rng.random(4000) < 0.3
    scores = rng.normal(size=4000) + failed
    assert auroc(scores, failed) == pytest.approx(0.760, abs=0.02)
    low, high = auroc_interval(scores[:200], failed[:200], resamples=500)
    assert low < 0.760 < high
    assert 0.05 < high - low < 0.25


def test_wrong_scores_are_refused():
    with pytest.raises(RobopolicyError, match="one finite score per outcome"):
        auroc([1.0], [True, False])
    with pytest.raises(RobopolicyError, match="one finite score per outcome"):
        auroc([1.0, float("nan")], [True, False])
    with pytest.raises(RobopolicyError, match="failures and successes; got 2 of 2 failed"):
        auroc([1.0, 2.0], [True, True])


def test_signals_are_ranked_by_what_they_predict():
    rng = np.random.default_rng(0)
    episodes = []
    for i in range(60):
        failed = i % 4 == 0
        signals = {"noise": rng.normal(), "good": failed + 0.1 * rng.normal(), "missing": None}
        episodes.append({"success": not failed, "diagnostics": signals})
    found = failure_prediction(episodes, resamples=200)
    assert list(found) == ["good", "noise"]
    assert found["good"]["auroc"] == 1.0
    assert (found["good"]["n"], found["good"]["n_failed"]) == (60, 15)
    assert failure_prediction(episodes[:12]) == {}  # three failures say nothing


def test_a_threshold_lets_most_successes_pass():
    scores = list(range(100)) + [1000.0] * 10
    failed = [False] * 100 + [True] * 10
    limit = replan_threshold(scores, failed, false_alarms=0.05)
    assert sum(score > limit for score in scores[:100]) == 5
    with pytest.raises(RobopolicyError, match="needs successful episodes"):
        replan_threshold([1.0], [True])


class TwoValleys(nn.Module):
    """Valleys at +-0.5 in all dimensions."""

    def __init__(self, *sizes):
        super().__init__()

    def context(self, cond):
        return cond

    def forward(self, x, context, scale=None):
        return -torch.stack([-8 * (x - c).square().mean(dim=(1, 2)) for c in (-0.5, 0.5)]).logsumexp(dim=0)


def test_the_plane_goes_through_start_and_both_solutions(tmp_path):
    spec = fake_spec()
    timing = ChunkTiming(n_obs_steps=2, horizon=8, n_action_steps=4)
    sampler, rule = Descent(max_steps=30), StepRule(step_size="fixed", alpha=1.0)
    policy = EnergyPolicy(
        spec,
        timing=timing,
        network=TwoValleys,
        encoder=ObservationEncoder,
        objective=Objective(),
        rule=rule,
        sampler=sampler,
    )
    fit_to_bounds(policy.norm, spec)
    obs = fake_observation(spec, 3, 2, torch.Generator().manual_seed(0))
    path, energy = policy.descent_path(
        obs.take(torch.zeros(16, dtype=torch.int64)), generator=torch.Generator().manual_seed(0)
    )
    paths = torch.stack(path, dim=1).flatten(2)  # [16, 31, 32]
    origin, axes = plane(paths)
    torch.testing.assert_close(axes @ axes.T, torch.eye(2), rtol=0, atol=1e-5)
    for point in (paths[0, 0], torch.full((32,), 0.5), torch.full((32,), -0.5)):
        across = point - origin - ((point - origin) @ axes.T) @ axes
        assert across.norm() < 0.02 * paths[0, 0].norm()
    assert energy(path[-1]).max() < energy(path[0]).min()
    picture = save_landscape(policy, obs, tmp_path / "landscape.png", generator=torch.Generator().manual_seed(0))
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
