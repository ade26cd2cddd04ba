"""Publish the last step of a run as a small checkpoint with a card: checkpoints/zoo/<name>.

    python scripts/publish.py demo --name pick_cube-diffusion

Weights are stored in half precision (statistics of the normaliser in full). The success on the card is that of the
stored weights, measured here on the episodes of `robopolicy eval`, beside that of the run's own weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from robopolicy.training import checkpoint

CARD = """# {name}

{method} for **{env_id}** ({instruction}), {control_mode}, state observations.

| | |
|---|---|
| success_once | **{success}**, n = {n}, seeds {seed}..{last_seed}, last checkpoint |
| the same episodes with the weights in full precision | {full} |
| success at the end of {max_steps} steps | {at_end} |
| demonstrations | {demos} ({frames} steps), `{demos_path}`; motion-planned, seeds {demo_seeds} |
| training | {steps} steps, batch {batch}, peak learning rate {lr}, seed {train_seed} |
| weights | {weights} in fp16 (averaged); {size_mb:.1f} MB |
| made by | `{command}` |
| evaluated by | `robopolicy eval checkpoint={name} n_episodes={n}`, robopolicy {version}, ManiSkill {mani_skill} |

Load it with `robopolicy eval checkpoint={name}`. Format: `policy.json` + `model.safetensors`, no pickle.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder, step folder, or name of a run")
    parser.add_argument("--name", required=True, help="name in checkpoints/zoo")
    parser.add_argument("--episodes", type=int, default=100)
    args = parser.parse_args()
    source = checkpoint.resolve(args.run)
    target = checkpoint.CHECKPOINTS / "zoo" / args.name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "policy.json", target / "policy.json")
    weights = checkpoint.read_weights(source)
    save_file(
        {n: t if n.startswith("norm.") else t.to(torch.float16) for n, t in weights.items()},
        target / "model.safetensors",
    )
    full, half = (evaluate(str(folder), args.episodes) for folder in (source, target))
    shutil.rmtree(target / "eval", ignore_errors=True)
    (target / "README.md").write_text(card(args.name, checkpoint.read_config(target), full, half, target))
    print(f"Published {target}: {success(half)} (full precision {success(full)}).")


def evaluate(path: str, n_episodes: int) -> dict[str, Any]:
    """Return eval_info of `path`."""
    words = ["eval", f"checkpoint={path}", f"n_episodes={n_episodes}", "name=publish", "overwrite=true", "--json"]
    found = subprocess.run([sys.executable, "-m", "robopolicy", *words], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads((Path(json.loads(found.stdout)["folder"]) / "eval_info.json").read_text())


def success(info: dict[str, Any], key: str = "pc_success") -> str:
    low, high = info["overall"][f"{key}_ci95"]
    return f"{info['overall'][key]:.0f} % (95 % interval {low:.1f}-{high:.1f})"


def card(name: str, config: dict[str, Any], full: dict[str, Any], half: dict[str, Any], folder: Path) -> str:
    task, data, train = config["task_spec"], config["data"], config["train"]
    tensors = checkpoint.read_weights(folder)
    return CARD.format(
        name=name,
        method=config["policy"]["_target_"].rpartition(".")[2],
        env_id=task["env_id"],
        instruction=task["instruction"].rstrip("."),
        control_mode=task["action"]["control_mode"],
        success=success(half),
        full=success(full),
        at_end=success(half, "pc_success_at_end"),
        n=half["overall"]["n_episodes"],
        seed=half["settings"]["seeds"][0],
        last_seed=half["settings"]["seeds"][-1],
        max_steps=task["max_episode_steps"],
        demos=data["num_episodes"],
        frames=data["num_frames"],
        demos_path=data["path"],
        demo_seeds=f"{min(data['seeds'])}..{max(data['seeds'])}",
        steps=config["step"],
        batch=train["batch_size"],
        lr=train["lr"],
        train_seed=train["seed"],
        weights=f"{sum(t.numel() for t in tensors.values()) / 1e6:.2f} M",
        size_mb=(folder / "model.safetensors").stat().st_size / 1e6,
        command=train["command"],
        version=half["versions"]["robopolicy"],
        mani_skill=half["versions"]["mani_skill"],
    )


if __name__ == "__main__":
    main()
