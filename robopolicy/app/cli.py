"""`robopolicy <verb> key=value ...`: finds the verb, composes its config, runs it, and turns errors into messages.

Nothing heavy is imported before a verb runs, so that `robopolicy --help` answers at once. A verb is a module of this
package: the first line of its docstring is its summary, EXAMPLES holds (command, what it does) pairs, and

    run(cfg: DictConfig) -> int | Mapping | None

does the work; its config is configs/<verb>.yaml. An int is the exit code. A mapping is what `--json` prints on standard
output (everything else then goes to standard error); its "exit_code" is that of the process, and without one
`"ok": False` means 1.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import json
import os
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from robopolicy import __version__
from robopolicy.errors import RobopolicyError, UnknownNameError

VERBS = (
    "doctor",
    "collect",
    "train",
    "eval",
    "compare",
    "calibrate",
    "bench",
    "report",
    "export",
    "deploy",
    "simrobot",
)
"""In the order in which a new user meets them; each is robopolicy/app/<verb>.py with configs/<verb>.yaml."""

POSITIONAL = {"compare": "policies", "bench": "what"}
"""Verbs that take plain words, and the setting that lists them."""

USER_ERROR = 2
INTERRUPTED = 130

OPTIONS = """\
  -h, --help          this text; after a verb: its examples, settings and defaults
  -m, --multirun      run once for every combination of comma-separated values (Hydra's sweepers and launchers)
  --cfg               print the settings that would be used, and stop
  --json              print the result as JSON on standard output, everything else on standard error
  --config-dir DIR    find more config files in DIR, laid out like robopolicy's configs/
  --name[=value]      the same as name=true or name=value
  --debug             show the traceback of every error
  --version           print the version"""

COMPLETION = """\
_robopolicy() {
    local IFS=$'\\n' line="${COMP_LINE:0:$COMP_POINT}"
    COMPREPLY=($(compgen -W "$(robopolicy --complete "$line" 2>/dev/null)" -- "${line##* }"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -F _robopolicy robopolicy"""
"""Bash code that asks `robopolicy --complete` for what may follow; installed by `eval "$(robopolicy --completion)"`."""


@dataclass(kw_only=True)
class Call:
    """A command line, taken apart."""

    verb: str | None = None
    overrides: list[str] = field(default_factory=list)
    help: bool = False
    multirun: bool = False
    cfg: bool = False
    json: bool = False
    debug: bool = False
    config_dir: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        return dispatch(words)
    except RobopolicyError as error:
        if debug:
            traceback.print_exc()
        print(f"robopolicy: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("robopolicy: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `robopolicy --help | head`: nobody reads on, and Python would complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def dispatch(words: Sequence[str]) -> int:
    """Do what `words` ask for.

    Raises:
        RobopolicyError: something is misspelled, missing, or cannot be done.
    """
    if words[:1] == ["--completion"]:
        print(COMPLETION)
        return 0
    if words[:1] == ["--complete"]:
        return _complete(" ".join(words[1:]))
    if words[:1] == ["--version"]:
        print(f"robopolicy {__version__}")
        return 0
    call = parse(words)
    if call.verb is None:
        print(overview())
        return 0 if call.help else USER_ERROR
    module = importlib.import_module(f"robopolicy.app.{call.verb}")
    if call.help:
        print(verb_help(call.verb, module.EXAMPLES))
        return 0
    if call.json and call.multirun:
        raise RobopolicyError("--json prints one result and cannot go with --multirun.")
    from robopolicy.app import composing  # loads Hydra

    if call.multirun:
        return composing.sweep(call.verb, call.overrides, module.run, config_dir=call.config_dir)
    cfg = composing.compose(call.verb, call.overrides, config_dir=call.config_dir)
    if call.cfg:
        print(composing.to_yaml(cfg), end="")
        return 0
    composing.require_complete(call.verb, cfg)
    with _results_alone_on_stdout() if call.json else contextlib.nullcontext(sys.stdout) as out:
        with composing.user_errors():
            result = module.run(cfg)
        if call.json:
            print(json.dumps(result if isinstance(result, Mapping) else None, indent=2, default=_plain), file=out)
    if isinstance(result, Mapping):
        return int(result.get("exit_code", 0 if result.get("ok", True) else 1))
    return int(result or 0)


def parse(words: Sequence[str]) -> Call:
    """Take a command line apart; `--video` and `--video=x` become the overrides `video=true` and `video=x`.

    Raises:
        RobopolicyError: the verb is unknown or an option lacks its value.
    """
    call, rest = Call(), list(words)
    positional: list[str] = []
    flags = {"-h": "help", "--help": "help", "-m": "multirun"} | {
        f"--{n}": n for n in ("multirun", "cfg", "json", "debug")
    }
    while rest:
        word = rest.pop(0)
        if word in flags:
            setattr(call, flags[word], True)
        elif word == "--config-dir" or word.startswith("--config-dir="):
            call.config_dir = word.partition("=")[2] or (rest.pop(0) if rest else "")
            if not call.config_dir:
                raise RobopolicyError("--config-dir needs a folder.")
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            call.overrides.append(f"{name.replace('-', '_')}={value if equals else 'true'}")
        elif word.startswith("-"):
            raise UnknownNameError("option", word, ["-h", "-m"])
        elif call.verb is None:
            if word not in VERBS:
                raise UnknownNameError("verb", word, VERBS)
            call.verb = word
        elif "=" in word or word.startswith("~"):
            call.overrides.append(word)
        elif call.verb in POSITIONAL:
            positional.append("'" + word.replace("'", "\\'") + "'")
        else:
            raise RobopolicyError(
                f"{word!r} is not a setting; settings look like key=value. See `robopolicy {call.verb} --help`."
            )
    if call.verb is not None and positional:
        call.overrides.append(f"{POSITIONAL[call.verb]}=[{','.join(positional)}]")
    if call.verb is None and call.overrides:
        raise RobopolicyError(f"{call.overrides[0]!r} comes before a verb. Known verbs: {', '.join(VERBS)}.")
    return call


def overview() -> str:
    """Return what `robopolicy --help` prints."""
    width = max(map(len, VERBS)) + 2
    lines = [f"  {verb:<{width}}{summary(verb)}" for verb in VERBS]
    return "\n".join(
        [
            "Usage: robopolicy <verb> [key=value ...] [options]",
            "",
            "Train robot policies in ManiSkill, measure them honestly, deploy them over ROS.",
            "",
            _bold("Verbs"),
            *lines,
            "",
            _bold("Options"),
            OPTIONS,
            "",
            "robopolicy <verb> --help shows examples and every setting.",
            'Tab completion in bash: eval "$(robopolicy --completion)"',
        ]
    )


def verb_help(verb: str, examples: Sequence[tuple[str, str]]) -> str:
    """Return what `robopolicy <verb> --help` prints: summary, examples, the config as its file has it, choices."""
    config = configs_folder() / f"{verb}.yaml"
    text = config.read_text().rstrip()
    shown = [line for command, what in examples for line in (f"  {command}", f"      {what}")]
    choices = [
        textwrap.fill(
            f"{name}={' | '.join(found)}", 116, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False
        )
        for name, found in groups().items()
        if f"{name}:" in text
    ]
    plain = f" <{POSITIONAL[verb]} ...>" if verb in POSITIONAL else ""
    parts = [
        f"Usage: robopolicy {verb}{plain} [key=value ...] [options]",
        summary(verb),
        "\n".join([_bold("Examples"), *shown]),
        "\n".join([_bold(f"Settings and their defaults (configs/{verb}.yaml)"), textwrap.indent(text, "  ")]),
    ]
    if choices:
        parts.append("\n".join([_bold("Choices"), *choices]))
    parts.append("\n".join([_bold("Options"), OPTIONS]))
    return "\n\n".join(parts)


def summary(verb: str) -> str:
    """Return the first line of the verb's docstring, read without importing its module."""
    source = Path(__file__).with_name(f"{verb}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def configs_folder() -> Path:
    """Return the folder of the packaged configs, found without importing them."""
    spec = importlib.util.find_spec("robopolicy.configs")
    assert spec is not None, "robopolicy.configs is part of the package"
    assert spec.origin is not None
    return Path(spec.origin).parent


def groups() -> dict[str, list[str]]:
    """Return config group to its choices, `policy` to [`diffusion`, ...]; groups inside groups as `policy/sampler`."""
    root = configs_folder()
    files = sorted(path for path in root.rglob("*.yaml") if path.parent != root)
    found: dict[str, list[str]] = {}
    for path in files:
        found.setdefault(path.parent.relative_to(root).as_posix(), []).append(path.stem)
    return found


@contextlib.contextmanager
def _results_alone_on_stdout() -> Iterator[IO[str]]:
    """Send all that is written to standard output to standard error, child processes' and C code's too; yield the real
    standard output."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as terminal:
        out = terminal if sys.stdout is sys.__stdout__ else sys.stdout  # a captured stdout is no file descriptor
        os.dup2(2, 1)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield out
        finally:
            out.flush()
            os.dup2(terminal.fileno(), 1)


def _plain(value: Any) -> Any:
    """Return arrays as lists and paths as strings for JSON."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _complete(line: str) -> int:
    """Print what may stand at the end of `line`, one candidate per line."""
    words = line.split()
    if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
        print("\n".join(VERBS))
    elif words[1] in VERBS:
        from robopolicy.app import composing  # loads Hydra

        rest = line.partition(words[1])[2].lstrip()
        if words[1] in POSITIONAL:  # Hydra reads settings only
            settings, _, last = rest.rpartition(" ")
            rest = " ".join([*(word for word in settings.split() if "=" in word), last])
        print("\n".join(composing.complete(words[1], rest)))
    return 0


def _bold(text: str) -> str:
    return f"\033[1m{text}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text
