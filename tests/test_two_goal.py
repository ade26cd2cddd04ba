"""The two-goal reach: two right answers by construction, nothing that tells them apart, and no reward for averaging."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robopolicy.data.maniskill import load_demonstrations
from robopolicy.envs import load_maniskill, make
from robopolicy.envs.demonstrations import collect
from robopolicy.envs.vector import SimVectorEnv

pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore::DeprecationWarning:mani_skill")]

TOOL = slice(18, 21)
"""Position of the tool in `proprio`."""
NUM = 4


@pytest.fixture(scope="module")
def env() -> Iterator[SimVectorEnv]:
    env = make("two_goal", num_envs=NUM, backend="cpu")
    yield env
    env.close()


def run(env: SimVectorEnv, targets: Tensor, *, steps: int = 35) -> list[dict[str, Tensor]]:
    """Move the tools to `targets` [N, 3] by proportional control and return the infos of all steps."""
    frame, _ = env.reset(seed=list(range(NUM)))
    infos = []
    for _ in range(steps):
        way = targets - frame["proprio"][:, TOOL]
        way = way * (0.035 / way.norm(dim=1, keepdim=True).clamp(min=0.035))
        frame, *_, info = env.step(torch.cat([way / 0.1, torch.ones(NUM, 1)], dim=1))
        infos.append(info)
    return infos


def goals_of(env: SimVectorEnv) -> Tensor:
    frame, _ = env.reset(seed=list(range(NUM)))
    return frame["goal"].reshape(NUM, 2, 3)


def test_the_goals_mirror_each_other_about_the_plane_in_which_the_tool_starts(env: SimVectorEnv) -> None:
    frame, info = env.reset(seed=list(range(NUM)))
    left, right = frame["goal"].reshape(NUM, 2, 3).unbind(dim=1)
    assert torch.equal(left * torch.tensor([1.0, -1.0, 1.0]), right)
    tool = frame["proprio"][:, TOOL]
    torch.testing.assert_close((left - tool).norm(dim=1), (right - tool).norm(dim=1), atol=1e-6, rtol=0)
    assert torch.equal(frame["proprio"], frame["proprio"][:1].expand(NUM, -1))  # every episode begins in one place
    assert len(left.unique(dim=0)) == NUM
    assert info["goal_index"].tolist() == [-1] * NUM


def test_either_goal_is_a_success_and_the_info_says_which(env: SimVectorEnv) -> None:
    chosen = torch.tensor([0, 1, 1, 0])
    infos = run(env, goals_of(env)[torch.arange(NUM), chosen])
    assert infos[-1]["success"].all()
    assert torch.equal(infos[-1]["goal_index"], chosen)
    reached = torch.stack([info["success"] for info in infos])
    assert torch.equal(torch.stack([info["goal_index"] for info in infos]) >= 0, reached)
    assert not torch.stack([info["fail"] for info in infos]).any()


def test_averaging_the_goals_fails_and_stays_failed(env: SimVectorEnv) -> None:
    goals = goals_of(env)
    infos = run(env, goals.mean(dim=1))
    assert not torch.stack([info["success"] for info in infos]).any()
    assert infos[-1]["fail"].all()
    for _ in range(30):  # a goal that is reached through the wedge does not count
        way = goals[:, 0] - env.base_env.agent.tcp_pose.p
        _, _, terminated, _, info = env.step(torch.cat([(way / 0.3).clamp(-0.3, 0.3), torch.ones(NUM, 1)], dim=1))
    assert info["distance"].max() < 0.02
    assert terminated.all()
    assert not info["success"].any()
    _, info = env.reset(seed=3, options={"env_idx": [1]})
    assert info["fail"].tolist() == [True, False, True, True]


def test_demonstrators_go_to_both_goals_whatever_they_see(tmp_path: Path) -> None:
    load_maniskill()
    from robopolicy.envs.two_goal import chosen_goal

    choices = torch.tensor([chosen_goal(seed) for seed in range(400)])
    assert 0.42 < choices.float().mean() < 0.58  # 3.2 standard deviations of a fair coin
    first = int((choices.diff() != 0).nonzero()[0])  # this seed and the next choose differently
    path = collect("two_goal", num_demos=2, seed=first, out_dir=tmp_path, num_workers=1)
    store = load_demonstrations(path)
    ends = store.episode_ends.tolist()
    arrived = [int(store.modalities["proprio"][end - 1, TOOL][1] < 0) for end in ends]
    assert arrived == choices[first : first + 2].tolist()
    assert max(b - a for a, b in zip([0, *ends], ends, strict=False)) < 30
