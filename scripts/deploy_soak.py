"""Deploy to the simulated robot for minutes on end; how punctual is the loop, does memory grow?

    python scripts/deploy_soak.py --minutes 10 --out docs/deploy_soak.json

The two processes share the machine with whatever else runs on it: the load average is part of the result. With
--real-time auto (the default) they come before all that if the system allows it, with false they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path


def rss_mib(pid: int) -> float:
    """Return the resident memory of a process (Linux)."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--checkpoint", default="pick_cube-diffusion")
    parser.add_argument("--real-time", choices=("auto", "true", "false"), default="auto")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    seconds = 60.0 * given.minutes
    words = ["mode=live", "arm=now", f"duration_s={seconds}", "planner=rti", "record=null", "live=false", "--json"]
    words.append(f"real_time={given.real_time}")
    command = [sys.executable, "-m", "robopolicy", "deploy", f"checkpoint={given.checkpoint}", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
    memory, load = [], []
    while process.poll() is None:
        time.sleep(min(5.0, seconds / 20))
        if process.poll() is None:
            memory.append(rss_mib(process.pid))
            load.append(os.getloadavg()[0])
    assert process.stdout is not None
    said = json.loads(process.stdout.read())
    kept = (
        "turns",
        "missed_deadlines",
        "missed_without_cpu",
        "jitter_ms",
        "plans",
        "inference_ms",
        "observation_age_ms",
        "underruns",
    )
    settled = memory[len(memory) // 5 :]
    result = {
        "minutes": given.minutes,
        **{key: said[key] for key in (*kept, "filter_passed", "filter_clamps", "filter_rejections", "stop_reason")},
        "rss_mib_after_a_fifth": settled[0],
        "rss_mib_at_the_end": settled[-1],
        "load_average": {"least": min(load), "most": max(load)},
        "cores": os.cpu_count(),
        "scheduling": said["scheduling"],
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if given.out is not None:
        given.out.write_text(text)


if __name__ == "__main__":
    main()
