"""What a policy costs beyond its network: `act` at batch 1 and `loss` at batch 128 against the bare network calls.

Both sides of a ratio take turns within one process, so that a busy machine slows both alike; medians are printed.

    python scripts/bench_policy.py                       # the default policy
    python scripts/bench_policy.py diffusion_unet --rounds 50
    python scripts/bench_policy.py diffusion --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from robopolicy.policies.diffusion import DiffusionPolicy
from robopolicy.types import ActionSpec, Batch, ModalitySpec, Observation, TaskSpec

WIDTHS = {"proprio": 25, "objects": 14, "goal": 3}
"""State observations of a cube task: joints and gripper pose, object poses, goal position."""


def cube_spec() -> TaskSpec:
    arm = ("x", "y", "z")
    return TaskSpec(
        name="cube",
        env_id="Cube-v0",
        robot="panda",
        instruction="",
        max_episode_steps=100,
        observation={name: ModalitySpec(shape=(width,), fields={}) for name, width in WIDTHS.items()},
        action=ActionSpec(
            names=(*arm, "gripper"),
            low=(-1.0,) * 4,
            high=(1.0,) * 4,
            delta=(True, True, True, False),
            discrete=(False, False, False, True),
            units=("m",) * 4,
            physical_low=(-0.1,) * 4,
            physical_high=(0.1,) * 4,
            control_mode="pd_ee_delta_pos",
            control_dt_s=0.05,
        ),
    )


def build(config: str, device: str) -> DiffusionPolicy:
    with initialize_config_module("robopolicy.configs", version_base=None):
        policy = instantiate(compose(overrides=[f"+policy={config}"]).policy)(cube_spec())
    policy.norm.fit({name: (-torch.ones(size), torch.ones(size)) for name, size in policy.norm.sizes.items()})
    return policy.to(device)


def random_batch(policy: DiffusionPolicy, size: int) -> Batch:
    steps, horizon = policy.timing.n_obs_steps, policy.timing.horizon
    obs = Observation(modalities={name: torch.randn(size, steps, width) for name, width in WIDTHS.items()})
    action = 2 * torch.rand(size, horizon, policy.spec.action.dim) - 1
    return Batch(obs=obs, action=action, is_pad=torch.zeros(size, horizon, dtype=torch.bool)).to(policy.device)


def take_turns(whole: Callable[[], object], part: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Return median seconds of `whole` and of `part`, and the median ratio of neighbouring calls."""

    def seconds(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        whole(), part()
    pairs = []
    for i in range(rounds):
        first, second = (whole, part) if i % 2 else (part, whole)  # neither side always goes first
        a, b = seconds(first), seconds(second)
        pairs.append((a, b) if i % 2 else (b, a))
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def report(what: str, times: tuple[float, float, float]) -> None:
    print(f"{what:62s} {1e3 * times[0]:9.3f} ms {1e3 * times[1]:9.3f} ms   ratio {times[2]:.3f}", flush=True)


def bench_act(policy: DiffusionPolicy, rounds: int) -> None:
    policy.eval()
    obs = random_batch(policy, 1).obs
    levels = policy.sampler.timesteps(policy.schedule)
    with torch.inference_mode():
        cond = policy.encoder(policy.normalized(obs))
        x = torch.randn(1, policy.timing.horizon, policy.spec.action.dim, device=policy.device)
        rows = [torch.tensor([level], device=policy.device) for level in levels]

    def bare() -> None:
        with torch.inference_mode():
            for row in rows:
                policy.network(x, row, cond)

    report(f"act, batch 1 / {len(levels)} bare network calls", take_turns(lambda: policy.act(obs), bare, rounds))


def bench_loss(policy: DiffusionPolicy, rounds: int) -> None:
    policy.train()
    batch = random_batch(policy, 128)
    with torch.no_grad():
        cond = policy.encoder(policy.normalized(batch.obs))
    level = torch.randint(policy.schedule.num_train_timesteps, (128,), device=policy.device)

    def whole() -> None:
        policy(batch).backward()

    def bare() -> None:
        policy.network(batch.action, level, cond).square().mean().backward()

    report("loss + backward, batch 128 / the network's", take_turns(whole, bare, rounds))


def bench_sampler(policy: DiffusionPolicy, rounds: int) -> None:
    """Ten DDIM steps around a field that costs nothing: diffusers' scheduler against ours."""
    x = torch.randn(1, policy.timing.horizon, policy.spec.action.dim, device=policy.device)
    scheduler = DDIMScheduler(100, beta_schedule="squaredcos_cap_v2", prediction_type="sample")

    def theirs() -> None:
        scheduler.set_timesteps(10)
        now = x
        for t in scheduler.timesteps:
            now = scheduler.step(now, t, now).prev_sample

    def ours() -> None:
        policy.sampler(lambda now, t: now, x, policy.schedule, "sample", timesteps=range(90, -1, -10))

    with torch.inference_mode():
        report("10 DDIM steps without a network, diffusers / ours", take_turns(theirs, ours, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="diffusion", help="name in configs/policy")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy = build(args.config, args.device)
    millions = sum(p.numel() for p in policy.network.parameters()) / 1e6
    print(
        f"{args.config}: {millions:.2f} M parameters, {args.device}, {args.threads} threads, torch {torch.__version__}"
    )
    bench_act(policy, args.rounds)
    bench_loss(policy, max(5, args.rounds // 4))
    bench_sampler(policy, args.rounds)


if __name__ == "__main__":
    main()
