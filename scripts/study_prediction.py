"""Why predicting the clean chunk learns faster than predicting the noise: error of the clean chunk at each noise level.

    python scripts/study_prediction.py            # about two minutes on one core; prints a Markdown table

The same small UNet is trained for the same steps with each prediction on half of the demonstrations; then the root mean
square error of the clean chunk (network units, clipped to [-1, 1] as the sampler does) over all windows of the other
half is printed at some levels. First: robopolicy collect task=pick_cube num_demos=200
"""

from __future__ import annotations

import torch
from hydra import compose, initialize_config_module

from robopolicy.app.build import build_policy
from robopolicy.data import batches, load_demonstrations
from robopolicy.data.windows import find_windows, gather
from robopolicy.sampling.prediction import clean_from
from robopolicy.training.ema import EMA
from robopolicy.training.optim import make_optimizer, make_scheduler

LEVELS = (10, 50, 80, 90, 99)
STEPS = 500


def clean_errors(kind: str) -> list[float]:
    """Return the error at each of LEVELS after training with prediction `kind`."""
    with initialize_config_module("robopolicy.configs", version_base="1.3"):
        cfg = compose("train", ["policy=diffusion_unet", f"policy.prediction={kind}"])
    store = load_demonstrations("demos/pick_cube/pd_ee_delta_pos.state.h5")
    train_store = store.first(store.num_episodes // 2)
    torch.manual_seed(0)
    policy = build_policy(cfg.policy, store.spec)
    policy.norm.fit(train_store.limits())
    optimizer = make_optimizer(policy, lr=1e-3)
    scheduler = make_scheduler(optimizer, num_steps=STEPS)
    ema = EMA(policy, power=0.75)
    source = batches(train_store, policy.timing, batch_size=128, seed=0)
    for step in range(STEPS):
        loss = policy(next(source))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        ema.update(policy, step + 1)
    acting = ema.policy.eval()
    windows = find_windows(store.episode_ends, policy.timing)
    unseen = (windows.begin >= train_store.num_frames).nonzero().flatten()
    batch = gather(store, windows, unseen, policy.timing)
    errors = []
    with torch.no_grad():
        cond = acting.encoder(acting.normalized(batch.obs))
        clean = acting.norm.encode("action", batch.action)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
        for level in LEVELS:
            x = acting.schedule.add_noise(clean, noise, level)
            output = acting.network(x, torch.full((len(x),), level), cond)
            weights = clean_from(kind, acting.schedule.alpha_bar[level])
            found = (weights.x_weight * x + weights.output_weight * output).clamp(-1, 1)
            errors.append(float((found - clean).square().mean().sqrt()))
    return errors


def main() -> None:
    torch.set_num_threads(1)
    print("| prediction | " + " | ".join(f"level {level}" for level in LEVELS) + " |")
    print("|---" * (len(LEVELS) + 1) + "|")
    for kind in ("sample", "v", "epsilon"):
        print(f"| {kind} | " + " | ".join(f"{error:.3f}" for error in clean_errors(kind)) + " |", flush=True)


if __name__ == "__main__":
    main()
