"""Random numbers that a caller can pin down: one generator for a batch, or one per row so that rows are independent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NoiseTape:
    """In place of a generator: noise given in advance, in the order of use, or a record of what is drawn.

    Where a computation is captured as a graph, noise can so become one of its inputs.
    """

    def __init__(self, noise: Sequence[Tensor] | Tensor | None = None) -> None:
        self.drawn: list[Tensor] = []
        self._noise = noise

    def next(self, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """Return the next noise of `shape`."""
        noise = torch.randn(*shape, device=device) if self._noise is None else self._noise[len(self.drawn)]
        self.drawn.append(noise)
        return noise


Rng = torch.Generator | Sequence[torch.Generator] | NoiseTape | None


def randn(*shape: int, generator: Rng = None, device: torch.device | str = "cpu") -> Tensor:
    """Return standard normal float32 noise of `shape`; with one generator per row, row i is drawn from the i-th alone.

    Noise is drawn on the generator's own device and moved, so that a CPU seed gives the same chunk on every device.
    """
    if isinstance(generator, NoiseTape):
        return generator.next(shape, device)
    if generator is None or isinstance(generator, torch.Generator):
        source = generator.device if generator is not None else device
        return torch.randn(*shape, generator=generator, device=source).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"One generator per row needs {shape[0]} of them; got {len(generator)}.")
    return torch.stack([torch.randn(*shape[1:], generator=g, device=g.device) for g in generator]).to(device)


def randint(high: int, *shape: int, generator: Rng = None, device: torch.device | str = "cpu") -> Tensor:
    """Return uniform int64 numbers in [0, high) of `shape`; generators as in `randn`."""
    if isinstance(generator, NoiseTape):
        raise TypeError("A NoiseTape holds normal noise alone.")
    if generator is None or isinstance(generator, torch.Generator):
        source = generator.device if generator is not None else device
        return torch.randint(high, shape, generator=generator, device=source).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"One generator per row needs {shape[0]} of them; got {len(generator)}.")
    return torch.stack([torch.randint(high, shape[1:], generator=g, device=g.device) for g in generator]).to(device)


def rand(*shape: int, generator: Rng = None, device: torch.device | str = "cpu") -> Tensor:
    """Return uniform float32 numbers in [0, 1) of `shape`; generators as in `randn`."""
    return randint(1 << 24, *shape, generator=generator, device=device) / (1 << 24)


def take_generators(generator: Rng, rows: Tensor) -> Rng:
    """Return the generators of `rows` [K] int where there is one per row; a single one serves any rows."""
    if generator is None or isinstance(generator, torch.Generator | NoiseTape):
        return generator
    return [generator[row] for row in rows.tolist()]
