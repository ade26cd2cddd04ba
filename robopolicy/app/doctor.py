"""Say what this machine can do, and the command that mends each missing thing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

EXAMPLES: tuple[tuple[str, str], ...] = (
    ("robopolicy doctor", "simulates a step, draws a picture, looks for the rest; exit code 1 if training cannot run"),
    ("robopolicy doctor render=false", "the same without the picture, which takes longest"),
    ("robopolicy doctor --json", "for a script: every check with what was found and what would mend it"),
)

CHECKOUT = Path(__file__).parents[2]
LEAST_DISK_GB = 2.0
LEAST_MEMORY_GB = 4.0
PROBE_TIMEOUT_S = 180

LIMITS = {"render": "no camera observations and no videos", "record": "no videos"}
"""What a missing optional part takes away from the main job."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the screen."""

    area: str
    name: str
    ok: bool
    found: str
    fix: str = ""
    """The command that mends it, or what is lacking where no command can."""
    required: bool = False
    """Whether collecting, training and evaluating need it."""


def run(cfg: DictConfig) -> Mapping[str, Any]:
    """Check everything, print one screen, and return it; `ok` is false if the main job cannot run."""
    from rich.console import Console

    console = Console(highlight=False)
    wanted = {name: probe for name, probe in PROBES.items() if cfg.render or name != "render"}
    with console.status("Simulating a step and drawing a picture ..."):
        children = {name: _start(name) for name in wanted}
        checks = [*software(), *machine(), *(_result(name, child) for name, child in children.items())]
        checks += [video(), *logging(), *deploy()]
    ok = all(check.ok for check in checks if check.required)
    _show(console, checks, ok=ok)
    return {"ok": ok, "checks": [asdict(check) for check in checks]}


def software() -> list[Check]:
    """Python and the packages that everything stands on."""
    version = sys.version_info[:2]
    checks = [
        Check(
            area="software",
            name="Python",
            ok=version in [(3, 11), (3, 12)],
            found=f"{sys.version.split()[0]} at {sys.executable}",
            fix="PYTHON=/path/to/python3.12 ./scripts/setup",
            required=True,
        )
    ]
    for package in ("torch", "mani_skill", "sapien"):
        found = _version(package)
        checks.append(
            Check(
                area="software",
                name=package,
                ok=found is not None,
                found=found or "not installed",
                fix=_install(package),
                required=True,
            )
        )
    return checks


def machine() -> list[Check]:
    """Cores, memory, disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    disk_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    return [
        Check(area="machine", name="CPU", ok=True, found=f"{cores} cores"),
        Check(
            area="machine",
            name="memory",
            ok=memory_gb >= LEAST_MEMORY_GB,
            found=f"{memory_gb:.0f} GB",
            fix=f"use fewer environments (num_envs=4) below {LEAST_MEMORY_GB:.0f} GB",
        ),
        Check(
            area="machine",
            name="disk",
            ok=disk_gb >= LEAST_DISK_GB,
            found=f"{disk_gb:.0f} GB free in {Path.cwd()}",
            fix=f"free {LEAST_DISK_GB:.0f} GB, or work in another folder",
        ),
    ]


def video() -> Check:
    """The encoder that writes mp4 files."""
    try:
        import imageio_ffmpeg

        program = imageio_ffmpeg.get_ffmpeg_exe()
        subprocess.run([program, "-version"], check=True, capture_output=True)
        found, ok = f"ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}", True
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        found, ok = str(error), False
    return Check(area="record", name="video", ok=ok, found=found, fix=_install("imageio-ffmpeg"))


def logging() -> list[Check]:
    """Where metrics can go."""
    checks = [Check(area="log", name="metrics.jsonl", ok=True, found="always")]
    for package, setting in (("tensorboard", "logger=tensorboard"), ("wandb", "logger=wandb; offline by itself")):
        found = _version(package)
        checks.append(
            Check(
                area="log",
                name=package,
                ok=found is not None,
                found=f"{found} ({setting})" if found else "not installed",
                fix=_install(package, extra=package),
            )
        )
    return checks


def deploy() -> list[Check]:
    """What the connection to a robot needs, and whether its loop can come before other programs."""
    from robopolicy.deploy.realtime import why_not

    found, why = _version("websockets"), why_not()
    return [
        Check(
            area="deploy",
            name="ROS bridge",
            ok=found is not None,
            found=f"websockets {found}" if found else "websockets is not installed",
            fix=_install("websockets", extra="deploy"),
        ),
        Check(
            area="deploy",
            name="priority",
            ok=not why,
            found=why or "real-time, so the control loop comes before other programs",
            fix="deploy on a computer that does little else, or allow it",
        ),
    ]


def simulate_cpu() -> str:
    """Step a task in the CPU simulation; return what was found."""
    import torch

    from robopolicy import envs

    env = envs.make("push_cube", num_envs=4, backend="cpu")
    env.reset(seed=0)
    begun_s = time.perf_counter()
    for _ in range(20):
        env.step(torch.zeros(env.num_envs, env.task_spec.action.dim))
    rate = 20 * env.num_envs / (time.perf_counter() - begun_s)
    env.close()
    return f"PushCube-v1, {rate:,.0f} steps/s with {env.num_envs} environments"


def simulate_gpu() -> str:
    """Return what GPU the simulation can use."""
    import torch

    from robopolicy.envs.backends import why_no_cuda

    if reason := why_no_cuda():
        raise RuntimeError(reason)
    return torch.cuda.get_device_name()


def render() -> str:
    """Draw one picture; return which device drew it, and how fast."""
    from robopolicy import envs

    env = envs.make("push_cube", num_envs=1, backend="cpu", render=True)
    env.reset(seed=0)
    env.render()
    begun_s = time.perf_counter()
    picture = env.render()
    took_s = time.perf_counter() - begun_s
    if picture.float().std() < 1:
        raise RuntimeError(f"{envs.render_backend()} draws an empty picture")
    devices = ", ".join(device.name for device in envs.prepare_vulkan().devices if device.is_suitable)
    size = "x".join(map(str, picture.shape[1:3]))
    return f"{devices or envs.render_backend()}, {1 / took_s:.1f} pictures/s at {size}"


PROBES: dict[str, Callable[[], str]] = {"simulate_cpu": simulate_cpu, "simulate_gpu": simulate_gpu, "render": render}
"""Each runs in a process of its own: a driver that crashes must not take the doctor with it."""


def _start(probe: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", __name__, probe]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def _answer(probe: str) -> None:
    """Run one probe and print [whether it worked, what it found, what may mend it] as JSON, alone on stdout."""
    import torch

    out = os.dup(1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    try:
        answer = [True, PROBES[probe](), ""]
    except Exception as error:  # whatever stands in the way is the answer
        answer = [False, str(error) or type(error).__name__, _mend(probe)]
    os.write(out, json.dumps(answer).encode())


def _result(probe: str, child: subprocess.Popen[str]) -> Check:
    """Wait for `child` and turn its answer into a line."""
    fix = _install("mani_skill")
    try:
        answer, errors = child.communicate(timeout=PROBE_TIMEOUT_S)
        ok, found, fix = json.loads(answer) if answer else (False, _last_words(child.returncode, errors), fix)
    except subprocess.TimeoutExpired:
        child.kill()
        ok, found = False, f"no answer within {PROBE_TIMEOUT_S} s"
    area, name = {"simulate_cpu": ("simulate", "on CPU"), "simulate_gpu": ("simulate", "on GPU")}.get(
        probe, ("render", "pictures")
    )
    return Check(
        area=area,
        name=name,
        ok=ok,
        found=found if ok else found.partition("\n")[0],
        fix=fix,
        required=probe == "simulate_cpu",
    )


def _last_words(code: int, errors: str) -> str:
    if code < 0:
        return f"crashed with {signal.Signals(-code).name}"
    return (errors.strip().splitlines() or [f"ended with exit code {code}"])[-1]


def _mend(probe: str) -> str:
    """Return the command, or the words, that may mend a probe that failed."""
    from robopolicy.envs import vulkan

    if probe == "render":
        return "sudo apt-get install -y libvulkan1" if vulkan.has_nvidia_driver() else vulkan.INSTALL_VULKAN
    if probe == "simulate_gpu":
        if not vulkan.has_nvidia_driver():
            return "needs an NVIDIA GPU with its driver; the CPU simulation does the same work more slowly"
        if "+cpu" in (_version("torch") or ""):
            return "rm -rf .venv && ./scripts/setup   # installs PyTorch with CUDA"
        return "check `nvidia-smi`, and that github.com can be reached for PhysX's GPU library"
    return _install("mani_skill")


def _install(package: str, *, extra: str | None = None) -> str:
    """Return the command that installs `package`: scripts/setup in a checkout, pip elsewhere."""
    if (CHECKOUT / "scripts/setup").exists():
        here = Path.cwd()
        folder = "." if here == CHECKOUT else str(CHECKOUT)
        return f"{folder}/scripts/setup{f' {extra}' if extra else ''}"
    wanted = next(
        (line for line in importlib.metadata.requires("robopolicy") or [] if line.startswith(package)), package
    )
    return f"{sys.executable} -m pip install '{wanted.partition(';')[0].strip()}'"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _show(console: Any, checks: list[Check], *, ok: bool) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    area = ""
    for check in checks:
        mark = "[green]ok[/]" if check.ok else "[bold red]missing[/]" if check.required else "[yellow]missing[/]"
        shown = "" if check.area == area else f"[bold]{check.area}[/]"
        area = check.area
        found = escape(check.found)
        if not check.ok:
            found += f"\n[cyan]{escape(check.fix)}[/]"
        table.add_row(shown, check.name, mark, found)
    console.print(table)
    console.print()
    if not ok:
        lacking = ", ".join(f"{check.area}: {check.name}" for check in checks if check.required and not check.ok)
        console.print(f"[bold red]This machine cannot collect, train and evaluate yet[/] ({lacking}).")
        return
    limits = [text for area, text in LIMITS.items() if not all(check.ok for check in checks if check.area == area)]
    console.print(
        "[bold green]This machine can collect, train and evaluate policies[/]"
        + (f" [yellow]({'; '.join(limits)})[/]." if limits else ".")
    )


if __name__ == "__main__":
    _answer(sys.argv[1])
