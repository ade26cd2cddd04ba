"""Laws of evaluation, on a point mass whose outcomes are known, and a few real episodes."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from point_task import LENGTH, SEEDS, HomingActor, PointEnv, info_of, point_spec, run_point
from statsmodels.stats.proportion import proportion_confint

from robopolicy.atomic import new_folder
from robopolicy.errors import CheckpointError, RobopolicyError, ShapeError
from robopolicy.evaluation.progress import progress_bar
from robopolicy.evaluation.results import (
    read_evaluation,
    read_evaluations,
    require_disjoint,
    require_free,
    sha256,
    write_results,
)
from robopolicy.evaluation.rollout import EvalResult, Progress, actor_latency, evaluate
from robopolicy.evaluation.statistics import drop_warmup, wilson_interval
from robopolicy.evaluation.video import replay, tiled, write_gif, write_mp4, write_png
from robopolicy.rng import randn
from robopolicy.types import TaskSpec


def outcome(result: EvalResult) -> list[dict]:
    return [episode.to_row(i) for i, episode in enumerate(result.episodes)]


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (97, 100), (1, 3), (50, 100)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_interval_agrees_with_statsmodels_and_contains_the_rate(k, n, confidence):
    low, high = wilson_interval(k, n, confidence)
    assert (low, high) == pytest.approx(proportion_confint(k, n, alpha=1 - confidence, method="wilson"), abs=1e-12)
    assert 0 <= low <= k / n <= high <= 1
    assert high - low > 0


@pytest.mark.parametrize(("k", "n"), [(1, 0), (-1, 3), (4, 3)])
def test_wilson_interval_refuses_impossible_counts(k, n):
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        wilson_interval(k, n)


def test_an_episode_depends_on_its_seed_alone():
    whole = outcome(run_point(1))
    for num_envs in (4, 7, 23):
        assert outcome(run_point(num_envs)) == whole
    backwards = outcome(run_point(5, SEEDS[::-1]))[::-1]
    assert [{**row, "episode_ix": 0} for row in backwards] == [{**row, "episode_ix": 0} for row in whole]


def test_the_same_command_gives_the_same_numbers_and_another_noise_seed_does_not():
    torch.manual_seed(1)
    first = outcome(run_point(8))
    torch.manual_seed(2)
    torch.rand(7)
    assert outcome(run_point(8)) == first
    other = outcome(run_point(8, noise_seed=1))
    assert [row["sum_reward"] for row in other] != [row["sum_reward"] for row in first]


def test_waves_reset_everything_together_and_only_the_padding_is_dropped():
    env = PointEnv(5)
    result = evaluate(HomingActor(5), env, seeds=SEEDS[:12])
    assert [episode.seed for episode in result.episodes] == SEEDS[:12]
    assert env.resets == [SEEDS[:5], SEEDS[5:10], [*SEEDS[10:12], 10012, 10013, 10014]]
    assert result.num_env_steps == 3 * 5 * LENGTH


def test_success_is_the_known_one():
    result = run_point(6, noise=0.0, lame_above=0.3)
    for episode in result.episodes:
        start = torch.rand(2, generator=torch.Generator().manual_seed(episode.seed)) * 2 - 1
        lame = bool(start[0] > 0.3)
        assert episode.success_once == (not lame or bool(start.norm() < 0.1))
        if episode.success_once and not lame:  # each step takes .1 off each coordinate
            assert episode.first_success_step <= int(start.abs().max() / 0.1) + 1
    assert 0 < result.num_success < len(SEEDS)
    assert result.success_once == result.num_success / len(SEEDS)
    assert result.interval == wilson_interval(result.num_success, len(SEEDS))


def test_success_once_and_at_end_are_told_apart():
    result = run_point(6, noise=0.0, lame_above=2.0, leave=True)
    assert result.success_once == 1.0
    assert result.success_at_end == 0.0


def test_stop_on_success_freezes_each_episode_at_its_own_first_success():
    full, stopped = run_point(6, noise=0.0), run_point(6, noise=0.0, stop_on_success=True)
    assert [e.first_success_step for e in full.episodes] == [e.first_success_step for e in stopped.episodes]
    assert all(e.num_steps == (e.first_success_step or LENGTH) for e in stopped.episodes)
    assert stopped.success_at_end is None
    assert outcome(run_point(1, noise=0.0, stop_on_success=True)) == outcome(stopped)
    winners = [seed for seed, e in zip(SEEDS, full.episodes, strict=True) if e.success_once]
    quick = run_point(len(winners), winners, noise=0.0, stop_on_success=True)
    assert quick.num_env_steps < len(winners) * LENGTH


def test_latency_counts_only_calls_that_ran_the_policy():
    result = run_point(6, num_warmup_calls=3)
    calls = 4 * (LENGTH // 4)  # 4 waves, a new chunk every 4 steps
    assert len(result.latency.seconds) == calls - 3
    assert result.latency.num_dropped == 3
    assert result.latency.batch_size == 6
    spent = result.reset_s + result.simulation_s + result.policy_s + result.other_s
    assert spent == pytest.approx(result.wall_s)


def test_latency_statistics_and_warmup():
    latency = drop_warmup([9.0, *[0.001 * k for k in range(1, 101)]], batch_size=1, num_warmup=1)
    assert latency.median_s == pytest.approx(0.0505)
    assert latency.p95_s == pytest.approx(0.09505)
    assert drop_warmup([1.0], batch_size=1, num_warmup=2).to_dict()["median_ms"] is None
    one = actor_latency(HomingActor(1), {"proprio": torch.zeros(6, 2)}, num_calls=7, num_warmup_calls=2)
    assert (len(one.seconds), one.batch_size) == (7, 1)


class _ResettingEnv(PointEnv):
    def step(self, actions):
        *rest, info = super().step(actions)
        return *rest, {**info, "final_info": {}}


class _MuteEnv(PointEnv):
    def step(self, actions):
        return *super().step(actions)[:4], {"elapsed_steps": 1}


class _BrokenActor(HomingActor):
    def __call__(self, frame, *, generator=None):
        action = super().__call__(frame, generator=generator)
        action[1] = torch.nan
        return action


class _NarrowActor(HomingActor):
    def __call__(self, frame, *, generator=None):
        return super().__call__(frame, generator=generator)[:2]


def test_what_cannot_be_counted_is_refused():
    actor = HomingActor(2)
    with pytest.raises(RobopolicyError, match="auto_reset=False"):
        evaluate(actor, _ResettingEnv(2), seeds=[1, 2])
    with pytest.raises(RobopolicyError, match=r"'point' reports no success.*elapsed_steps"):
        evaluate(actor, _MuteEnv(2), seeds=[1, 2])
    with pytest.raises(RobopolicyError, match="not finite at step 0 of seeds 8"):
        evaluate(_BrokenActor(2), PointEnv(2), seeds=[7, 8])
    with pytest.raises(ShapeError, match="N=3"):
        evaluate(_NarrowActor(3), PointEnv(3), seeds=[1, 2, 3])
    for seeds in ([], [1, 1]):
        with pytest.raises(RobopolicyError, match="only once"):
            evaluate(actor, PointEnv(2), seeds=seeds)


def test_progress_reaches_the_end_and_shows_the_success():
    seen: list[Progress] = []
    result = run_point(6, on_step=seen.append)
    assert seen[-1] == Progress(steps_done=80, steps_total=80, episodes_started=23, num_success=result.num_success)
    assert [p.steps_done for p in seen] == list(range(1, 81))
    assert all(a.num_success <= b.num_success for a, b in itertools.pairwise(seen))
    with progress_bar(23) as show:
        show(seen[-1])


def test_demonstration_seeds_are_refused():
    require_disjoint(SEEDS, range(100))
    with pytest.raises(RobopolicyError, match=r"3 of the 23 .*10000, 10001, 10002.*seed=20000"):
        require_disjoint(SEEDS, range(9000, 10003))


def test_results_come_back_from_disk_under_lerobot_names(tmp_path):
    result = run_point(6)
    folder = tmp_path / "eval" / "a"
    with new_folder(folder) as staged:
        write_results(staged, info_of(result, {"seeds": SEEDS}), result)
    (back,) = read_evaluations(tmp_path)
    top = back.info["overall"]
    assert top["n_episodes"] == 23
    assert top["pc_success"] == pytest.approx(100 * result.success_once)
    assert top["pc_success_ci95"] == pytest.approx([100 * side for side in result.interval])
    assert top["avg_sum_reward"] == pytest.approx(np.mean([e.sum_reward for e in result.episodes]))
    assert back.info["failed_seeds"] == [row["seed"] for row in back.rows if not row["success"]]
    assert back.info["per_task"][0]["metrics"]["successes"] == [row["success"] for row in back.rows]
    assert back.info["versions"]["torch"] == importlib.metadata.version("torch")
    assert TaskSpec.from_dict(back.info["task_spec"]).differences(point_spec()) == []
    assert back.rows == json.loads(json.dumps(outcome(result)))


def test_an_evaluation_is_replaced_only_by_its_equal(tmp_path):
    result, folder = run_point(23), tmp_path / "eval" / "a"
    assert require_free(folder, {"seeds": 1}, overwrite=False) is None
    with new_folder(folder) as staged:
        write_results(staged, info_of(result, {"seeds": 1}), result)
    assert require_free(folder, {"seeds": 1}, overwrite=False).name == "a"
    with pytest.raises(CheckpointError, match="other settings \\(seeds\\)"):
        require_free(folder, {"seeds": 2}, overwrite=False)
    assert require_free(folder, {"seeds": 2}, overwrite=True).name == "a"
    with pytest.raises(CheckpointError, match="no evaluation"):
        require_free(tmp_path, {}, overwrite=False)


def test_a_failing_block_leaves_the_earlier_folder_whole(tmp_path):
    folder = tmp_path / "a"
    with new_folder(folder) as staged:
        (staged / "old").write_text("old")
    with pytest.raises(FileNotFoundError), new_folder(folder) as staged:
        (staged / "new" / "deep").write_text("there is no such folder")
    assert [p.name for p in folder.iterdir()] == ["old"]
    with new_folder(folder) as staged:
        (staged / "new").write_text("new")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "new"]


def test_a_replay_shows_what_was_counted(tmp_path):
    result = run_point(6)
    for num_envs in (1, 4):
        clips = replay(PointEnv(num_envs), result.episodes[:9], size_px=64, stride=2, hold_steps=4)
        for clip, episode in zip(clips, result.episodes, strict=False):
            assert clip.same_outcome
            assert clip.seed == episode.seed
            assert clip.first_success_step == episode.first_success_step
            shown = min(LENGTH, (episode.first_success_step or LENGTH) + 4)
            assert len(clip.frames) == 1 + shown // 2
    frames = list(tiled(clips, columns=3))
    assert len(frames) == 1 + LENGTH // 2
    assert frames[0].shape == (192, 192, 3)
    for clip, (x, y) in zip(clips, [(0, 0), (64, 0), (128, 0)], strict=False):
        edge = frames[-1][y + 30, x]
        assert (edge[1] > edge[0]) == (clip.success_frame is not None)  # green for success, red for failure
        assert frames[0][y + 30, x].tolist() == [30, 30, 30] or clip.success_frame == 0

    film = tmp_path / "a.mp4"
    write_mp4(film, iter(frames), fps=10)
    header = next(imageio_ffmpeg.read_frames(str(film)))
    assert header["codec"] == "h264"
    assert header["pix_fmt"].startswith("yuv420p")
    assert header["size"] == (192, 192)
    assert header["fps"] == 10
    probe = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", film, "-f", "null", "-"], capture_output=True)
    assert probe.returncode == 0
    assert film.read_bytes().index(b"moov") < film.read_bytes().index(b"mdat"), "browsers want the index in front"
    write_png(tmp_path / "a.png", frames[-1])
    write_gif(tmp_path / "a.gif", clips[0], fps=10)
    assert (tmp_path / "a.gif").read_bytes()[:6] == b"GIF89a"
    with pytest.raises(RobopolicyError, match="No frames"):
        write_mp4(film, iter([]), fps=10)


def test_a_replay_that_ends_otherwise_says_so():
    episode = run_point(1, noise=0.0, lame_above=2.0).episodes[0]

    class Slippery(PointEnv):
        def step(self, actions):
            return super().step(0.1 * actions)

    (clip,) = replay(Slippery(1), [episode], size_px=32)
    assert not clip.same_outcome


def test_a_broken_evaluation_folder_is_named(tmp_path):
    with pytest.raises(RobopolicyError, match="not a readable evaluation"):
        read_evaluation(tmp_path)


@pytest.mark.sim
def test_real_episodes_depend_on_their_seeds_alone_and_replay_exactly(tmp_path):
    from robopolicy.envs import make

    class Waver:
        """Moves by noise drawn per episode every 4 steps: a stand-in for any policy."""

        replanned = True

        def __init__(self, num_envs: int) -> None:
            self.n, self.age = num_envs, 0

        def reset(self, rows=None) -> None:
            self.age = 0

        def __call__(self, frame, *, generator=None):
            if self.age % 4 == 0:
                self.action = randn(self.n, 4, generator=generator)
            self.age += 1
            return self.action

    def episodes(num_envs: int, seeds: list[int]) -> EvalResult:
        env = make("push_cube", num_envs=num_envs, backend="cpu", max_episode_steps=12)
        result = evaluate(Waver(num_envs), env, seeds=seeds)
        env.close()
        return result

    first = episodes(2, [7, 8, 9])
    rows = {row["seed"]: {**row, "episode_ix": 0} for row in outcome(first)}
    again = {row["seed"]: {**row, "episode_ix": 0} for row in outcome(episodes(3, [9, 7, 8]))}
    assert again == rows
    assert outcome(episodes(2, [7, 8, 9])) == outcome(first)
    assert len({row["sum_reward"] for row in rows.values()}) == 3

    env = make("push_cube", num_envs=1, backend="cpu", max_episode_steps=12)
    for episode in first.episodes:
        env.reset(seed=[episode.seed])
        rewards = [float(env.step(action[None])[1]) for action in episode.actions]
        assert math.fsum(rewards) == episode.sum_reward
    env.close()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A run folder with a small policy of push_cube whose weights are random."""
    from omegaconf import OmegaConf

    from robopolicy.app.build import build_policy
    from robopolicy.app.cli import configs_folder
    from robopolicy.envs import task_spec
    from robopolicy.training import checkpoint

    run = tmp_path_factory.mktemp("checkpoints") / "untrained"
    config = OmegaConf.to_container(OmegaConf.load(configs_folder() / "policy" / "diffusion.yaml"))
    config["network"] |= {"width": 16, "depth": 1}
    torch.manual_seed(0)
    policy = build_policy(config, task_spec("push_cube"))
    for weights in policy.parameters():  # fresh networks end in zeros and would command nothing
        torch.nn.init.normal_(weights, std=0.3)
    policy.norm.fit({name: (-torch.ones(size), torch.ones(size)) for name, size in policy.norm.sizes.items()})
    checkpoint.save(run, step=30, policy=policy, config={"policy": config, "data": {"seeds": [0, 1]}, "train": {}})
    return run


@pytest.mark.sim
def test_eval_verb_repeats_itself_and_records_what_was_changed(cli, untrained):
    ask = ("eval", f"checkpoint={untrained}", "n_episodes=3", "num_envs=2", "max_episode_steps=10", "--json")
    first = cli(*ask)
    assert first.code == 0, first.err
    folder = untrained / "eval" / "step_00000030-n3-s10000-max_episode_steps_10"
    assert json.loads(first.out)["folder"] == str(folder)
    rows = (folder / "episodes.jsonl").read_text()
    again = cli(*ask)
    assert again.code == 0, again.err
    assert "other outcome for 0 of its seeds" in again.err
    assert (folder / "episodes.jsonl").read_text() == rows

    changed = cli(*ask, "policy.sampler.num_inference_steps=2", "n_action_steps=4")
    assert changed.code == 0, changed.err
    folder = Path(json.loads(changed.out)["folder"])
    assert (folder / "episodes.jsonl").read_text() != rows
    info = read_evaluation(folder).info
    assert info["settings"]["policy_overrides"] == {"sampler.num_inference_steps": 2}
    assert info["settings"]["n_action_steps"] == 4
    assert info["settings"]["seeds"] == [10000, 10001, 10002]
    for word in ask[1:-1]:
        assert word in info["command"]
    assert "policy.sampler.num_inference_steps=2" in info["command"]
    assert info["latency"]["batch_size"] == 2
    assert info["latency_batch_1"]["batch_size"] == 1
    assert info["checkpoint"]["weights_sha256"] == sha256(untrained / "step_00000030" / "model.safetensors")


@pytest.mark.sim
def test_eval_verb_delays_plans_and_shows_how_episodes_failed(cli, untrained):
    ask = ("eval", f"checkpoint={untrained}", "n_episodes=3", "max_episode_steps=12", "--json")

    def rows(*words: str) -> tuple[Path, str]:
        done = cli(*ask, *words)
        assert done.code == 0, done.err
        folder = Path(json.loads(done.out)["folder"])
        return folder, (folder / "episodes.jsonl").read_text()

    frozen, none = rows("failures=true", "failures_most=2"), rows("latency=fixed_ms:0")
    assert none[0].name == f"{frozen[0].name}-latency_fixed_ms_0"
    assert none[1] == frozen[1], "no latency is no latency, bit for bit"
    info = read_evaluation(frozen[0]).info
    assert info["failures"]["seeds"] == info["failed_seeds"][:2] == [10000, 10001]
    assert info["failures"]["same_outcomes"]
    with Image.open(frozen[0] / "failures.png") as picture:
        assert picture.size == (2 * 192, 192)

    for executor in ("async", "sync"):
        folder, text = rows("latency=fixed_ms:100", f"executor={executor}")
        assert text != frozen[1]
        found = read_evaluation(folder)
        assert found.info["settings"]["latency"] == "fixed_ms:100"
        assert found.info["settings"]["executor"] == executor
        assert "latency=fixed_ms:100" in found.info["command"]
        for row in found.rows:
            assert row["inference_ms_mean"] == row["inference_ms_p95"] == 100
            assert row["num_hold_steps"] >= 2
            assert row["min_distance_m"] > 0
    folder, _ = rows("latency=measured")
    found = read_evaluation(folder)
    measured = found.info["latency_batch_1"]["calls_ms"] + found.info["latency_first_plan"]["calls_ms"]
    for row in found.rows:
        assert min(measured) - 1e-3 <= row["inference_ms_mean"] <= max(measured) + 1e-3


@pytest.mark.sim
def test_eval_verb_looks_at_one_episode(cli, untrained):
    ask = ("eval", f"checkpoint={untrained}", "max_episode_steps=12", "--json")
    many, one = cli(*ask, "n_episodes=3"), cli(*ask, "episode=2")
    assert (many.code, one.code) == (0, 0), many.err + one.err
    folders = [Path(json.loads(done.out)["folder"]) for done in (many, one)]
    assert folders[1].name == "step_00000030-n1-s10002-max_episode_steps_12"
    all_rows, (row,) = (read_evaluation(folder).rows for folder in folders)
    assert row["seed"] == all_rows[2]["seed"] == 10002
    assert row["sum_reward"] == pytest.approx(all_rows[2]["sum_reward"], abs=1e-4)
    assert "episode=2" in read_evaluation(folders[1]).info["command"]


@pytest.mark.sim
def test_eval_verb_refuses_what_would_mislead(cli, untrained, tmp_path):
    refused = cli("eval", f"checkpoint={untrained}", "n_episodes=3", "seed=1")
    assert refused.code == 2
    assert "1 of the 3 evaluation seeds" in refused.err
    for word, reason in (
        ("n_episodes=0", "n_episodes must be at least 1"),
        ("n_action_steps=40", r"n_action_steps must be in \[1, 15\]"),
        ("device=gpu", "Unknown device 'gpu'"),
        ("latency=slow", "Unknown latency 'slow'"),
        ("executor=eager", "Unknown executor 'eager'"),
        ("+policy.sampler.steps=3", "unexpected keyword argument 'steps'"),
    ):
        refused = cli("eval", f"checkpoint={untrained}", word)
        assert refused.code == 2
        assert re.search(reason, refused.err), refused.err
    other = tmp_path / "other"
    shutil.copytree(untrained, other, ignore=shutil.ignore_patterns("eval"))
    file = other / "step_00000030" / "policy.json"
    config = json.loads(file.read_text())
    config["task_spec"]["action"]["control_dt_s"] = 0.1
    file.write_text(json.dumps(config))
    refused = cli("eval", f"checkpoint={other}", "n_episodes=1")
    assert refused.code == 2
    assert "does not fit task 'push_cube'" in refused.err
    assert "action.control_dt_s: 0.1 against 0.05" in refused.err
    assert not (other / "eval").exists()
