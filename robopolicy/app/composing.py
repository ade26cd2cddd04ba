"""What the command line asks of Hydra: compose one config, sweep over many, and say what is wrong in our own words."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from robopolicy.app import cli
from robopolicy.errors import RobopolicyError, UnknownNameError

CONFIGS = "robopolicy.configs"
VERSION_BASE = "1.3"

SWEEP_DEFAULTS = {
    "hydra.sweep.dir": "checkpoints/sweeps/${now:%Y-%m-%d_%H-%M-%S}",
    "hydra.sweep.subdir": ".",
    "hydra.output_subdir": "null",
    "hydra/job_logging": "none",
}
"""A sweep leaves one file, multirun.yaml; the runs themselves go where they always go."""


def compose(verb: str, overrides: Sequence[str], *, config_dir: str | None = None) -> DictConfig:
    """Return the config of `verb` with `overrides` applied.

    Raises:
        UnknownNameError: a key or a choice of a group does not exist.
        RobopolicyError: an override cannot be parsed, or is not a number where a number belongs.
    """
    extra = [] if config_dir is None else [f"hydra.searchpath=[file://{_existing(config_dir)}]"]
    with hydra.initialize_config_module(CONFIGS, version_base=VERSION_BASE, job_name=verb):
        try:
            full = hydra.compose(verb, [*extra, *overrides], return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise _explained(verb, [*extra, *overrides], error) from error
        choices = [word for word in overrides if _key(word).split("@")[0] in cli.groups()]
        defaults = hydra.compose(verb, [*extra, *choices])
    HydraConfig.instance().set_config(full)  # as in a sweep, so that a verb can ask which choices were made
    cfg = OmegaConf.masked_copy(full, [str(key) for key in full if key != "hydra"])
    OmegaConf.set_struct(cfg, True)
    _check_numbers(defaults, cfg)
    return cfg


def sweep(verb: str, overrides: Sequence[str], run: Callable[[DictConfig], Any], *, config_dir: str | None) -> int:
    """Run `run` once per combination of the comma-separated values in `overrides`, by Hydra's sweeper and launcher.

    A job that fails does not stop the others; its error is raised at the end.
    """
    given = {_key(word) for word in overrides}
    defaults = [f"{key}={value}" for key, value in SWEEP_DEFAULTS.items() if key not in given]
    extra = [] if config_dir is None else ["--config-dir", _existing(config_dir)]
    entry = hydra.main(version_base=VERSION_BASE, config_path=f"pkg://{CONFIGS}", config_name=verb)(run)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, where Hydra would print and exit
    with _argv(f"robopolicy {verb}", "--multirun", *extra, *defaults, *overrides), user_errors():
        try:
            entry()
        except (HydraException, OmegaConfBaseException) as error:
            if isinstance(error, InstantiationException):
                raise
            single = [word for word in overrides if "," not in word]
            raise _explained(verb, single, error) from error
    return 0


def to_yaml(cfg: DictConfig) -> str:
    """Return `cfg` as YAML with interpolations resolved."""
    return OmegaConf.to_yaml(cfg, resolve=True)


def require_complete(verb: str, cfg: DictConfig) -> None:
    """Raise RobopolicyError, naming them, if settings without a default were not given."""
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        wanted = " ".join(f"{key}=..." for key in missing)
        raise RobopolicyError(f"`robopolicy {verb}` needs {wanted}; see `robopolicy {verb} --help`.")


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn what Hydra raises about a setting's value into RobopolicyError; leave every other error alone."""
    try:
        yield
    except InstantiationException as error:
        cause = error.__cause__
        if not isinstance(cause, TypeError | ValueError | RobopolicyError):
            raise
        where = str(error).partition("full_key: ")[2].strip()
        raise RobopolicyError(f"{where}: {cause}" if where else str(cause)) from error
    except (MissingMandatoryValue, InterpolationResolutionError) as error:
        raise RobopolicyError(str(error)) from error


def complete(verb: str, line: str) -> list[str]:
    """Return what may stand at the end of `line`, the words after the verb."""
    from hydra._internal.core_plugins.bash_completion import BashCompletion

    with hydra.initialize_config_module(CONFIGS, version_base=VERSION_BASE, job_name=verb):
        found: list[str] = BashCompletion(GlobalHydra.instance().config_loader())._query(config_name=verb, line=line)
    return [word for word in found if not word.startswith("hydra")] if "hydra" not in line else found


@contextlib.contextmanager
def _argv(*words: str) -> Iterator[None]:
    """Put `words` where Hydra reads its command line."""
    before, sys.argv = sys.argv, list(words)
    try:
        yield
    finally:
        sys.argv = before


def _existing(folder: str) -> str:
    if not os.path.isdir(folder):
        raise RobopolicyError(f"--config-dir {folder}: there is no such folder.")
    return os.path.abspath(folder)


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _explained(verb: str, overrides: Sequence[str], error: Exception) -> RobopolicyError:
    """Return what the user should read in place of `error`."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.strip("/").rpartition("/")
        return UnknownNameError(f"{group} for {verb}", name, error.options)
    if isinstance(error, OverrideParseException):
        return RobopolicyError(f"{error.override!r} cannot be read: {error}")
    unknown = _unknown_key(error)
    if unknown is None:
        return RobopolicyError(str(error))
    known = list(_leaves(_defaults(verb, [word for word in overrides if _key(word) != unknown])))
    parent, dot, leaf = unknown.rpartition(".")
    inside = [key for key in known if key.startswith(f"{parent}.")] if dot else []
    prefix = f"{parent}." if inside else ""
    beside = {prefix + key.removeprefix(prefix).partition(".")[0] for key in inside or known}
    same_leaf = {key for key in known if key.rpartition(".")[2] == leaf}
    return UnknownNameError(f"setting of {verb}", unknown, same_leaf or beside)


def _unknown_key(error: Exception) -> str | None:
    """Return the key that `error` says is not in the config, or None if it says something else."""
    if isinstance(error, ConfigCompositionException) and "No match in the defaults list" in str(error):
        return str(error).partition("'")[2].partition("'")[0]  # a group of configs/ that this verb does not have
    if "not in struct" in str(error.__cause__):
        return str(getattr(error.__cause__, "full_key", "")) or None
    return None


def _defaults(verb: str, overrides: Sequence[str]) -> DictConfig:
    """Return the config of `verb` before any value is overridden, with the groups as chosen."""
    choices = [word for word in overrides if _key(word).split("@")[0] in {*cli.groups(), "hydra.searchpath"}]
    alive = GlobalHydra.instance().is_initialized()
    with (
        contextlib.nullcontext()
        if alive
        else hydra.initialize_config_module(CONFIGS, version_base=VERSION_BASE, job_name=verb)
    ):
        return hydra.compose(verb, choices)


def _leaves(cfg: DictConfig) -> dict[str, Any]:
    """Return dotted key to value, interpolations unresolved."""

    def walk(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            if isinstance(value, Mapping) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    return dict(walk(plain, ""))  # type: ignore[arg-type]


def _check_numbers(defaults: DictConfig, cfg: DictConfig) -> None:
    """Raise RobopolicyError where a default is a number and the value given is none; make 2e4 the integer 20000."""
    values = _leaves(cfg)
    for key, default in _leaves(defaults).items():
        value = values.get(key)
        if isinstance(default, bool) or not isinstance(default, int | float) or value is None or value == default:
            continue
        if isinstance(value, str) and value.startswith("${"):
            continue
        whole = isinstance(value, float) and value.is_integer()
        if isinstance(default, int) and whole:
            OmegaConf.update(cfg, key, int(value))
        elif isinstance(value, bool) or not isinstance(value, int | type(default)):
            wanted = "a whole number" if isinstance(default, int) else "a number"
            raise RobopolicyError(f"{key} must be {wanted}, {default} for example; got {value!r}.")
