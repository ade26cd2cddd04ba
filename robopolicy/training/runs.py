"""Run folders: who may write to one, and whether its data are still the data it was trained on."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from robopolicy.errors import CheckpointError, DataError

WHOLE_BYTES = 256 * 2**20
SAMPLES = 64


def require_new(run_dir: Path) -> None:
    """Raise CheckpointError unless `run_dir` is free: absent, empty, or an attempt that saved no checkpoint."""
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return
    if any(run_dir.glob("step_*")):
        last = (run_dir / "last").read_text().strip() if (run_dir / "last").exists() else "unfinished"
        raise CheckpointError(
            f"The run {run_dir} exists ({last}). `resume=true run={run_dir.name}` goes on with it; another `run=` "
            "starts a new one."
        )
    if not (run_dir / "config.yaml").exists():
        raise CheckpointError(f"{run_dir} exists and is no run; choose another `run=`.")


@contextlib.contextmanager
def claim(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir` (made if absent) for this process alone, and clear what a killed process left half written.

    Raises:
        CheckpointError: another process is training this run.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"Another process is training the run {run_dir}.") from error
        except OSError:  # a file system without locks: go on without
            pass
        for pattern in (".*.tmp", ".*.old", "step_*/.*.old"):
            for left in run_dir.glob(pattern):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield
    finally:
        os.close(handle)


def fingerprint(path: Path) -> str:
    """Return a SHA-256 of the file at `path`; beyond 256 MiB of its size and 64 evenly spaced MiB."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            for index in range(SAMPLES):
                file.seek((size - 2**20) * index // (SAMPLES - 1))
                digest.update(file.read(2**20))
    return digest.hexdigest()


def require_same_data(path: Path, recorded: str | None, run_dir: Path) -> str:
    """Return the fingerprint of `path`.

    Raises:
        DataError: `recorded` is another one: the demonstrations changed since the run in `run_dir` began.
    """
    now = fingerprint(path)
    if recorded is not None and now != recorded:
        raise DataError(
            f"{path} is not the file that the run {run_dir} began with (SHA-256 {now[:12]}, then {recorded[:12]}). "
            "Bring the old file back to resume, or start a new run with another `run=`."
        )
    return now
