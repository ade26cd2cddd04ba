"""Laws of pinned random numbers."""

from __future__ import annotations

import pytest
import torch

from robopolicy.rng import randint, randn

DRAWS = {"randn": randn, "randint": lambda *shape, **kw: randint(1000, *shape, **kw)}


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(params=DRAWS)
def draw(request):
    return DRAWS[request.param]


def test_one_seed_gives_one_draw(draw):
    assert torch.equal(draw(4, 3, generator=seeded(5)[0]), draw(4, 3, generator=seeded(5)[0]))
    assert not torch.equal(draw(4, 3, generator=seeded(5)[0]), draw(4, 3, generator=seeded(6)[0]))


def test_rows_depend_on_their_own_generator_alone(draw):
    together = draw(3, 4, generator=seeded(7, 8, 9))
    assert torch.equal(together[1:2], draw(1, 4, generator=seeded(8)))
    assert torch.equal(together[[2, 0]], draw(2, 4, generator=seeded(9, 7)))


def test_generators_advance(draw):
    generators = seeded(1, 2)
    assert not torch.equal(draw(2, 5, generator=generators), draw(2, 5, generator=generators))


def test_without_a_generator_the_global_state_decides(draw):
    torch.manual_seed(3)
    first = draw(2, 5)
    torch.manual_seed(3)
    assert torch.equal(draw(2, 5), first)


def test_the_number_of_generators_must_fit(draw):
    with pytest.raises(ValueError, match="needs 3 of them; got 2"):
        draw(3, 4, generator=seeded(1, 2))


def test_draws_have_their_distribution():
    generators = seeded(*range(20))
    normal = randn(20, 5000, generator=generators)
    assert normal.dtype == torch.float32
    assert normal.mean().abs() < 4 / 100_000**0.5
    assert normal.std().item() == pytest.approx(1, abs=4 / 200_000**0.5)
    whole = randint(4, 20, 5000, generator=generators)
    assert whole.dtype == torch.int64
    share = whole.flatten().bincount() / whole.numel()
    torch.testing.assert_close(share, torch.full((4,), 0.25), rtol=0, atol=4 * (0.1875 / 100_000) ** 0.5)


def test_randint_can_draw_one_number_per_row():
    generators = seeded(4, 5)
    assert randint(10, 2, generator=generators).shape == (2,)
