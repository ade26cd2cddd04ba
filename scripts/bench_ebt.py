"""What an energy policy costs beyond its network: acting, training, and training with each graph mode.

Both sides of a ratio take turns within one process, so that a busy machine slows both alike; medians are printed.

    python scripts/bench_ebt.py                # the default policy: floors of an energy step and of a training step
    python scripts/bench_ebt.py --graphs       # time and memory of a training step per graph mode, 4 energy steps
    python scripts/bench_ebt.py --device cuda

The floor of an energy step is one forward pass of the bare network and its gradient with respect to the chunk, at batch
1; that of a training step the same at batch 128 with the graph kept, a squared error of the landing, and its derivative
with respect to the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from bench_policy import build, random_batch, report, take_turns

from robopolicy.policies.ebt import EnergyPolicy
from robopolicy.sampling.objective import Objective

GRAPHS = ("per_step_detach", "momentum_path", "truncated_last", "full_bptt")
BATCH = 128


def bench_act(policy: EnergyPolicy, rounds: int) -> None:
    policy.eval()
    steps = 20
    policy.sampler = dataclasses.replace(policy.sampler, max_steps=steps, stop="fixed")
    obs = random_batch(policy, 1).obs
    with torch.no_grad():
        context = policy.network.context(policy.encoder(policy.normalized(obs)))  # type: ignore[operator]
    x = torch.randn(1, policy.timing.horizon, policy.spec.action.dim, device=policy.device, requires_grad=True)
    frozen = [p.requires_grad_(False) for p in policy.parameters()]  # as acting copies are (training/ema.py)

    def bare() -> None:
        for _ in range(steps):
            torch.autograd.grad(policy.network(x, context).sum(), x)

    report(
        f"act, {steps} energy steps, batch 1 / bare forward + input gradient",
        take_turns(lambda: policy.act(obs), bare, rounds),
    )
    for p in frozen:
        p.requires_grad_(True)


def bench_loss(policy: EnergyPolicy, rounds: int) -> None:
    policy.train()
    batch = random_batch(policy, BATCH)
    with torch.no_grad():
        cond = policy.encoder(policy.normalized(batch.obs))
    clean = batch.action

    def whole() -> None:
        policy(batch).backward()
        policy.zero_grad(set_to_none=True)

    def bare() -> None:
        x = torch.randn_like(clean).requires_grad_()
        context = policy.network.context(cond)  # type: ignore[operator]
        (slope,) = torch.autograd.grad(policy.network(x, context).sum(), x, create_graph=True)
        (x - slope - clean).square().mean().backward()
        policy.zero_grad(set_to_none=True)

    report(f"loss + backward, batch {BATCH} / bare second-order step", take_turns(whole, bare, rounds))


def bench_graph(config: str, graph: str, device: str, rounds: int) -> None:
    """Print time and memory of a training step of 4 energy steps with one graph mode (in a process of its own)."""
    policy: Any = build(config, device).train()
    kind = "denoise" if graph in ("per_step_detach", "momentum_path") else "mse_last_step"
    policy.objective = Objective(kind=kind, min_steps=4, max_steps=4, graph=graph)  # type: ignore[arg-type]
    batch = random_batch(policy, BATCH)
    policy(random_batch(policy, 2)).backward()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        policy(batch).backward()
        times.append(time.process_time() - begin)
        policy.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else 0.0
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    facts = {
        "graph": graph,
        "objective": kind,
        "cpu_ms": round(1e3 * statistics.median(times), 1),
        "peak_mib": round(peak or grown, 1),
    }
    print(json.dumps(facts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="ebt", help="name in configs/policy")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--graph", choices=GRAPHS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.graph:
        bench_graph(args.config, args.graph, args.device, 8)
        return
    if args.graphs:
        for graph in GRAPHS:
            command = [sys.executable, __file__, args.config, "--device", args.device, "--graph", graph]
            subprocess.run(command, check=True)
        return
    policy: Any = build(args.config, args.device)
    millions = sum(p.numel() for p in policy.network.parameters()) / 1e6
    print(f"{args.config}: {millions:.2f} M parameters, {args.device}, 1 thread, torch {torch.__version__}")
    bench_act(policy, args.rounds)
    bench_loss(policy, max(5, args.rounds // 4))


if __name__ == "__main__":
    main()
