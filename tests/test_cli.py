"""The command line: help that costs nothing, names that are suggested, exit codes that mean something."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Finished
from hypothesis import given
from hypothesis import strategies as st

from robopolicy.app import cli as app
from robopolicy.app import composing, run_config
from robopolicy.errors import RobopolicyError

ROOT = Path(__file__).parents[1]
Cli = Callable[..., Finished]

EXAMPLES = [
    pytest.param(verb, command, id=command)
    for verb in app.VERBS
    for command, _ in importlib.import_module(f"robopolicy.app.{verb}").EXAMPLES
]


def test_help_lists_every_verb_with_its_summary(cli: Cli) -> None:
    shown = cli("--help")
    assert shown.code == 0
    for verb in app.VERBS:
        module = importlib.import_module(f"robopolicy.app.{verb}")
        first_line = (module.__doc__ or "").partition("\n")[0]
        assert first_line.endswith(".")
        assert [verb, *first_line.split()] in [line.split() for line in shown.out.splitlines()]


def test_no_verb_is_an_error_that_shows_the_help(cli: Cli) -> None:
    shown = cli()
    assert (shown.code, shown.out) == (2, cli("--help").out)


@pytest.mark.parametrize("words", [["--help"], *[[verb, "--help"] for verb in app.VERBS]], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    script = f"import sys; from robopolicy.app.cli import main; main({words}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "rich", "sapien", "mani_skill", "matplotlib", "hydra"}
    assert heavy & set(done.stderr.split()) == set()


@pytest.mark.parametrize("verb", app.VERBS)
def test_verb_help_has_three_examples_and_the_whole_config(verb: str, cli: Cli) -> None:
    module = importlib.import_module(f"robopolicy.app.{verb}")
    shown = cli(verb, "--help")
    assert shown.code == 0
    assert len(module.EXAMPLES) >= 3
    for command, what in module.EXAMPLES:
        assert without_variables(command).startswith(f"robopolicy {verb}")
        assert f"  {command}\n      {what}" in shown.out
    for line in (app.configs_folder() / f"{verb}.yaml").read_text().splitlines():
        assert line in shown.out


def without_variables(command: str) -> str:
    """Return `command` without the environment variables that are set before it."""
    return re.sub(r"^([A-Z_]+=\S+ +)+", "", command)


def compose_as_typed(command: str) -> str | None:
    """Compose what `command` asks for and return its verb; of a sweep, only its first job."""
    call = app.parse(shlex.split(without_variables(command), comments=True)[1:])
    if call.verb is not None and not call.help:
        overrides = [word.partition(",")[0] if call.multirun else word for word in call.overrides]
        composing.require_complete(call.verb, composing.compose(call.verb, overrides))
    return call.verb


@pytest.mark.parametrize(("verb", "command"), EXAMPLES)
def test_examples_compose(verb: str, command: str) -> None:
    assert compose_as_typed(command) == verb


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name)
def test_commands_in_the_documentation_work(page: Path) -> None:
    blocks = re.findall(r"^```(?:bash|sh|console|text)?\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for line in (line.strip().removeprefix("$ ") for line in lines):
        if line.startswith("robopolicy ") and not re.search(r"[<>]|\.\.\.|--completion", line):
            compose_as_typed(line)
        elif line.startswith("./scripts/"):
            assert (ROOT / line.split()[0]).is_file(), line


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["tarin"], "Unknown verb 'tarin'. Did you mean 'train'? Known: "),
        (["train", "policy=difusion"], "Unknown policy for train 'difusion'. Did you mean 'diffusion'? Known: "),
        (["train", "task=pick_cub"], "Did you mean 'pick_cube'? Known: "),
        (["train", "train.num_step=3"], "'train.num_step'. Did you mean 'train.num_steps'? Known: "),
        (["train", "num_steps=3"], "Did you mean 'train.num_steps'?"),
        (["train", "polcy=diffusion"], "Did you mean 'policy'?"),
        (["train", "trian.num_steps=3"], "Did you mean 'train'?"),
        (["train", "horizon=8"], "Did you mean 'policy.timing.horizon'?"),
        (["train", "lr=8"], "Known: train.lr."),
        (["eval", "task=push_cube"], "Unknown setting of eval 'task'."),
        (["train", "policy.timing.horizn=8"], "Did you mean 'policy.timing.horizon'?"),
        (["train", "train.num_steps=many"], "train.num_steps must be a whole number"),
        (["train", "seed=1,2"], "--multirun"),
        (["train", "seed=[1"], "'seed=[1' cannot be read: "),
        (["train", "pick_cube"], "'pick_cube' is not a setting; settings look like key=value."),
        (["train", "-z"], "Unknown option '-z'."),
        (["train", "--config-dir"], "--config-dir needs a folder."),
        (["train", "--config-dir", "/nowhere"], "/nowhere: there is no such folder."),
        (["seed=1"], "Unknown verb 'seed=1'."),
        (["--seed=1"], "comes before a verb"),
        (["train", "-m", "seed=1,2", "policy=diffusion,difusion"], "Did you mean 'diffusion'?"),
        (["train", "-m", "seed=1,2", "train.num_step=3"], "Did you mean 'train.num_steps'?"),
        (["train", "-m", "--json", "seed=1,2"], "--json prints one result"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_a_suggestion_and_no_traceback(words: list[str], wanted: str, cli: Cli, empty_cwd: Path) -> None:
    shown = cli(*words)
    assert wanted in shown.err
    assert shown.err.startswith("robopolicy: ")
    assert "Traceback" not in shown.err
    assert (shown.code, shown.out) == (2, "")


def test_debug_shows_the_traceback(cli: Cli) -> None:
    shown = cli("train", "policy=difusion", "--debug")
    assert shown.code == 2
    assert "Traceback" in shown.err


def test_cfg_prints_the_settings_and_runs_nothing(cli: Cli, empty_cwd: Path) -> None:
    shown = cli("train", "--cfg", "seed=7", "train.num_steps=2e3")
    settings = yaml.safe_load(shown.out)
    assert (shown.code, settings["seed"], settings["train"]["num_steps"]) == (0, 7, 2000)
    assert isinstance(settings["train"]["num_steps"], int)
    assert list(empty_cwd.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (RobopolicyError("no"), 2)], ids=["interrupted", "user error"]
)
def test_exit_codes_of_a_verb(
    error: BaseException, code: int, cli: Cli, empty_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(cfg: object) -> None:
        raise error

    monkeypatch.setattr("robopolicy.app.doctor.run", fail)
    shown = cli("doctor")
    assert shown.code == code
    assert "Traceback" not in shown.err


@pytest.mark.parametrize(
    ("result", "code", "printed"),
    [
        (None, 0, None),
        (3, 3, None),
        ({"ok": True, "path": Path("a")}, 0, {"ok": True, "path": "a"}),
        ({"ok": False}, 1, {"ok": False}),
        ({"rate": 0.5}, 0, {"rate": 0.5}),
    ],
)
def test_json_stands_alone_on_stdout(
    result: object, code: int, printed: object, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(cfg: object) -> object:
        print("progress")
        return result

    monkeypatch.setattr("robopolicy.app.doctor.run", run)
    shown = cli("doctor", "--json")
    assert (shown.code, json.loads(shown.out)) == (code, printed)
    assert "progress" in shown.err


def test_json_keeps_the_output_of_child_processes_off_stdout() -> None:
    script = """
import subprocess, sys
from robopolicy.app import cli, doctor
doctor.run = lambda cfg: subprocess.run(["echo", "noise"], check=True) and {"ok": True}
sys.exit(cli.main(["doctor", "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"ok": True}
    assert "noise" in done.stderr


def test_multirun_runs_every_combination_and_leaves_one_file(
    cli: Cli, empty_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run(cfg: object) -> None:
        seen.append((cfg.seed, cfg.train.num_steps))  # type: ignore[attr-defined]
        if cfg.seed == 1:  # type: ignore[attr-defined]
            raise RobopolicyError("seed 1 is unlucky")

    monkeypatch.setattr("robopolicy.app.train.run", run)
    shown = cli("train", "--multirun", "seed=1,2", "train.num_steps=10,20")
    assert seen == [(1, 10), (1, 20), (2, 10), (2, 20)]  # a failed job does not stop the others
    assert (shown.code, "seed 1 is unlucky" in shown.err) == (2, True)
    files = [path.relative_to(empty_cwd).as_posix() for path in empty_cwd.rglob("*") if path.is_file()]
    assert len(files) == 1
    assert files[0].startswith("checkpoints/sweeps/")
    assert files[0].endswith("/multirun.yaml")


def test_the_jobs_of_a_sweep_get_folders_of_their_own(
    cli: Cli, empty_cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[str] = []
    monkeypatch.setattr("robopolicy.app.train.run", lambda cfg: folders.append(run_config.run_folder(cfg).as_posix()))
    assert cli("train", "-m", "task=push_cube", "seed=1,2", "train.lr=1e-3,3e-4", "logger=[wandb]").code == 0
    assert folders == [
        f"checkpoints/push_cube-diffusion-s{s}-train.lr_{lr}" for s in (1, 2) for lr in ("0.001", "0.0003")
    ]
    assert cli("train", "seed=3", "train.lr=3e-4").code == 0
    assert folders[-1] == "checkpoints/pick_cube-diffusion-s3"


def test_config_dir_adds_choices(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "my_task.yaml").write_text(
        (app.configs_folder() / "task/pick_cube.yaml").read_text() + "mine: 1\n"
    )
    shown = cli("train", "--config-dir", str(tmp_path), "task=my_task", "--cfg")
    assert shown.code == 0
    assert "mine: 1" in shown.out


@given(st.from_regex(r"[a-z][a-z-]{0,10}[a-z]", fullmatch=True), st.one_of(st.none(), st.text(max_size=8)))
def test_dashed_options_are_settings(name: str, value: str | None) -> None:
    known = {option.strip().split()[0].strip(",") for option in app.OPTIONS.splitlines()} | {"--help", "--multirun"}
    word = f"--{name}" if value is None else f"--{name}={value}"
    if f"--{name}" in known:
        return
    expected = f"{name.replace('-', '_')}={'true' if value is None else value}"
    assert app.parse(["train", word]).overrides == [expected]


@pytest.mark.parametrize(
    ("line", "among"),
    [
        ("robopolicy ", "train"),
        ("robopolicy tr", "train"),
        ("robopolicy train poli", "policy="),
        ("robopolicy train policy=", "policy=diffusion"),
        ("robopolicy train task=push_cube train.num_s", "train.num_steps="),
    ],
)
def test_completion_offers_what_may_follow(line: str, among: str, cli: Cli) -> None:
    assert among in cli("--complete", line).out.splitlines()


def test_completion_script_completes_in_bash(tmp_path: Path) -> None:
    script = f"""
robopolicy() {{ {shlex.quote(sys.executable)} -m robopolicy "$@"; }}
eval "$(robopolicy --completion)"
COMP_LINE="robopolicy train policy=diffusion_u"; COMP_POINT=${{#COMP_LINE}}
_robopolicy
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["policy=diffusion_unet"]
