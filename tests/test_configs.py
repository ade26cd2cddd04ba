"""Every config composes: each choice of each group, with each verb that has the group."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from robopolicy.app import cli, composing
from robopolicy.app.build import build_policy
from robopolicy.types import ActionSpec, ModalitySpec, TaskSpec

FOLDER = cli.configs_folder()
FILES = sorted(FOLDER.rglob("*.yaml"))


def groups_of(verb: str) -> list[str]:
    text = (FOLDER / f"{verb}.yaml").read_text()
    return [group for group in cli.groups() if re.search(rf"^\s*- (optional )?/?{group}: ", text, re.MULTILINE)]


CHOICES = [
    pytest.param(verb, group, choice, id=f"{verb} {group}={choice}")
    for verb in cli.VERBS
    for group in groups_of(verb)
    for choice in cli.groups()[group]
]

SPEC = TaskSpec(
    name="toy",
    env_id="Toy-v1",
    robot="panda",
    instruction="Do it.",
    max_episode_steps=20,
    observation={
        "proprio": ModalitySpec(shape=(5,), fields={"agent/qpos": 5}),
        "goal": ModalitySpec(shape=(3,), fields={"extra/goal_pos": 3}),
    },
    action=ActionSpec(
        names=("x", "gripper"),
        low=(-1.0, -1.0),
        high=(1.0, 1.0),
        delta=(True, False),
        discrete=(False, True),
        units=("m", "m"),
        physical_low=(-0.1, -0.01),
        physical_high=(0.1, 0.04),
        control_mode="pd_ee_delta_pos",
        control_dt_s=0.05,
    ),
)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_verb_has_a_module_and_a_config(verb: str) -> None:
    assert Path(cli.__file__).with_name(f"{verb}.py").is_file()
    assert OmegaConf.is_dict(composing.compose(verb, []))


@pytest.mark.parametrize(("verb", "group", "choice"), CHOICES)
def test_every_choice_composes(verb: str, group: str, choice: str) -> None:
    cfg = composing.compose(verb, [f"{group}={choice}"])
    composing.to_yaml(cfg)  # resolves every interpolation
    if group == "task":
        assert cfg.task.name == choice.removesuffix("_rgb")
        assert cfg.task.obs_mode == ("rgb64" if choice.endswith("_rgb") else "state")


def test_train_offers_every_task_and_policy() -> None:
    assert {"task", "policy"} <= set(groups_of("train"))
    assert {"pick_cube", "push_cube"} <= set(cli.groups()["task"])
    assert {"diffusion", "diffusion_unet", "diffusion_dit", "diffusion_paper"} <= set(cli.groups()["policy"])


@pytest.mark.parametrize("choice", cli.groups()["policy"])
def test_every_policy_builds(choice: str) -> None:
    policy = build_policy(composing.compose("train", [f"policy={choice}"]).policy, SPEC)
    assert sum(weights.numel() for weights in policy.parameters()) > 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_configs_say_what_they_are_and_hold_no_logic(path: Path) -> None:
    text = path.read_text()
    if path.parent.name != "task":  # a task is described in its table
        assert text.startswith("#"), "the first line is a comment that says what the file is"
    assert "${eval:" not in text
