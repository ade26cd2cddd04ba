"""What the network predicts, and the conversions between the three kinds; the only place that knows them.

With x = signal * clean + sigma * noise and signal^2 + sigma^2 = 1:

    kind      output is                         source
    epsilon   noise                             Ho et al. 2020, arXiv:2006.11239
    v         signal * noise - sigma * clean    Salimans and Ho 2022, arXiv:2202.00512
    sample    clean

Each kind is linear in (clean, noise), so each conversion is two numbers per level.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from torch import Tensor

from robopolicy.errors import UnknownNameError

Prediction = Literal["epsilon", "v", "sample"]


class Linear(NamedTuple):
    """The map (x, output) -> x_weight * x + output_weight * output."""

    x_weight: float
    output_weight: float


def check_prediction(kind: str) -> None:
    """Raise UnknownNameError unless `kind` is one of the three."""
    if kind not in get_args(Prediction):
        raise UnknownNameError("prediction", kind, get_args(Prediction))


def target(kind: Prediction, clean: Tensor, noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
    """Return what the network should predict; `signal` and `sigma` broadcast against `clean` and `noise`."""
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    return signal * noise - sigma * clean


def clean_from(kind: Prediction, alpha_bar: float) -> Linear:
    """Return how the clean chunk follows from x and the network's output at a level with `alpha_bar`."""
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if kind == "epsilon":
        return Linear(1 / signal, -sigma / signal)
    if kind == "sample":
        return Linear(0.0, 1.0)
    return Linear(signal, -sigma)


def noise_from(kind: Prediction, alpha_bar: float) -> Linear:
    """Return how the noise follows from x and the network's output at a level with `alpha_bar`."""
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if kind == "epsilon":
        return Linear(0.0, 1.0)
    if kind == "sample":
        return Linear(1 / sigma, -signal / sigma)
    return Linear(sigma, signal)
