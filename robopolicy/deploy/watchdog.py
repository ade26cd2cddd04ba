"""Deadlines on the monotonic clock: whatever is older or slower than the robot file allows means stop."""

from __future__ import annotations

import math
from dataclasses import dataclass

from robopolicy.deploy.contract import LinkStatus
from robopolicy.deploy.robot import Watchdogs


@dataclass(slots=True)
class Vitals:
    """What the watchdogs look at, at one turn of the loop; ages in seconds."""

    state_age_s: float = math.inf
    """Since the newest joint state was measured."""
    observation_age_s: float = 0.0
    """Since the newest sample of the most outdated stream that the policy needs."""
    stream: str = ""
    """That stream."""
    spread_s: float = 0.0
    """Of the newest observation."""
    inferring_s: float = 0.0
    """How long the present inference has been running; 0 between two."""
    late_s: float = 0.0
    """How much later than its deadline the turn began."""
    link: LinkStatus | None = None
    clock_jumped: bool = False


def why_stop(vitals: Vitals, deadlines: Watchdogs, *, generation: int | None) -> str:
    """Return the first deadline that has passed, in words; empty while all is well.

    Args:
        generation: the connection that the robot was armed on; None before.
    """
    link = vitals.link
    if link is not None and not link.connected:
        return f"the link to the robot is lost{': ' + link.detail if link.detail else ''}"
    if link is not None and generation is not None and link.generation != generation:
        return "the link to the robot was lost and came back"
    if vitals.state_age_s > deadlines.state_age_s:
        return _old("the newest joint state is", vitals.state_age_s, deadlines.state_age_s)
    if vitals.observation_age_s > deadlines.observation_age_s:
        return _old(
            f"the newest sample of stream {vitals.stream!r} is", vitals.observation_age_s, deadlines.observation_age_s
        )
    if vitals.spread_s > deadlines.spread_s:
        return f"the streams of one observation lie {vitals.spread_s:.3f} s apart (limit {deadlines.spread_s:g} s)"
    if vitals.inferring_s > deadlines.inference_s:
        return f"the policy has been thinking for {vitals.inferring_s:.2f} s (limit {deadlines.inference_s:g} s)"
    if vitals.late_s > deadlines.loop_overrun_s:
        return f"the control loop ran {1e3 * vitals.late_s:.0f} ms late (limit {1e3 * deadlines.loop_overrun_s:.0f} ms)"
    if link is not None and link.ping_s is not None and link.ping_s > deadlines.link_s:
        return f"the bridge answered a ping after {link.ping_s:.2f} s (limit {deadlines.link_s:g} s)"
    if vitals.clock_jumped:
        return "the robot's clock jumped: time stamps cannot be trusted"
    return ""


def _old(what: str, age_s: float, limit_s: float) -> str:
    return f"{what} missing" if math.isinf(age_s) else f"{what} {age_s:.3f} s old (limit {limit_s:g} s)"
