"""Laws of the denoising networks and of the observation encoder."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from fakes import fake_observation, fake_spec
from torch import nn

from robopolicy.nn.dit import ChunkDiT
from robopolicy.nn.encoder import ObservationEncoder
from robopolicy.nn.image import (
    ImageEncoder,
    centre_crop,
    erase_rectangles,
    random_crop,
    scale_channels,
    spatial_softmax,
)
from robopolicy.nn.layers import MOST_ROWS_AHEAD, SinusoidalEmbedding, ahead
from robopolicy.nn.mlp import ChunkMLP
from robopolicy.nn.unet import ChunkUNet

BATCH, HORIZON, ACTION, COND = 6, 8, 3, 10
NETWORKS = {
    "mlp": partial(ChunkMLP, width=32, depth=2, cond_width=16, time_dim=16),
    "unet": partial(ChunkUNet, down_dims=(16, 32), num_groups=4, time_dim=16),
    "dit": partial(ChunkDiT, width=32, depth=2, num_heads=2, time_dim=16),
}


def randomised(net: nn.Module) -> nn.Module:
    """Give every parameter a value, also those that start at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net


@pytest.fixture(params=NETWORKS)
def net(request):
    torch.manual_seed(0)
    return randomised(NETWORKS[request.param](ACTION, HORIZON, COND))


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, HORIZON, ACTION, generator=generator)
    cond = torch.randn(BATCH, COND, generator=generator)
    return x, torch.tensor([0, 1, 17, 50, 98, 99]), cond


def test_every_input_and_parameter_matters(net, inputs):
    x, t, cond = inputs
    x.requires_grad_()
    cond.requires_grad_()
    out = net(x, t, cond)
    assert out.shape == x.shape
    assert not torch.allclose(out, net(x, t.flip(0), cond))
    out.square().sum().backward()
    for name, value in [("x", x), ("cond", cond), *net.named_parameters()]:
        assert value.grad is not None, name
        assert torch.isfinite(value.grad).all(), name
        assert value.grad.abs().sum() > 0, name


def test_rows_do_not_see_each_other(net, inputs):
    x, t, cond = inputs
    together = net(x, t, cond)
    for rows in (torch.tensor([2]), torch.tensor([5, 0, 3])):
        torch.testing.assert_close(net(x[rows], t[rows], cond[rows]), together[rows], rtol=1e-5, atol=1e-5)


def test_every_action_sees_the_whole_chunk(net, inputs):
    x, t, cond = inputs
    moved = x.clone()
    moved[:, 0] += 1
    assert ((net(moved, t, cond) - net(x, t, cond)).abs().sum(dim=(0, 2)) > 0).all()


def test_whole_and_float_levels_agree(net, inputs):
    x, t, cond = inputs
    torch.testing.assert_close(net(x, t.float(), cond), net(x, t, cond), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_levels", [1, 3, MOST_ROWS_AHEAD // BATCH + 2])
def test_levels_worked_out_ahead_change_nothing(net, inputs, num_levels):
    x, _, cond = inputs
    levels = [level % 100 for level in range(num_levels)]
    with torch.no_grad():
        outputs = [apply(x) for apply in ahead(net, levels, cond)]
        assert len(outputs) == num_levels
        for level, output in zip(levels[-3:], outputs[-3:], strict=True):
            torch.testing.assert_close(output, net(x, torch.full((BATCH,), level), cond), rtol=1e-5, atol=1e-5)


def test_any_network_may_be_asked_ahead(inputs):
    x, _, cond = inputs
    (first, second) = ahead(lambda x, t, cond: x + t[:, None, None] + cond.sum(), [3, 1], cond)
    assert torch.equal(first(x), x + 3 + cond.sum())
    assert torch.equal(second(x), x + 1 + cond.sum())


def test_weights_survive_a_state_dict(net, inputs):
    other = copy.deepcopy(net)
    for parameter in other.parameters():
        nn.init.constant_(parameter, 0.3)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(*inputs), net(*inputs))


@pytest.mark.parametrize("name", ["mlp", "dit"])
def test_zero_at_the_start(name, inputs):
    assert not NETWORKS[name](ACTION, HORIZON, COND)(*inputs).any()


def test_dit_blocks_start_as_the_identity():
    torch.manual_seed(0)
    for block in ChunkDiT(ACTION, HORIZON, COND, width=32, num_heads=2).blocks:
        h = torch.randn(2, HORIZON, 32)
        assert torch.equal(block(h, block.modulation(torch.randn(2, 32))), h)


def test_sizes_are_as_documented():
    millions = sum(p.numel() for p in ChunkMLP(4, 16, 90).parameters()) / 1e6
    assert 1.5 < millions < 1.9


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="multiple of 4 for 3 down_dims; got 10"):
        ChunkUNet(ACTION, 10, COND)
    with pytest.raises(ValueError, match="num_groups=8; got \\[20\\]"):
        ChunkUNet(ACTION, 8, COND, down_dims=(20,))
    with pytest.raises(ValueError, match="num_heads=3"):
        ChunkDiT(ACTION, HORIZON, COND, width=32, num_heads=3)
    with pytest.raises(ValueError, match="even"):
        SinusoidalEmbedding(5)


def test_embedding_tells_levels_apart():
    waves = SinusoidalEmbedding(16)(torch.arange(100))
    torch.testing.assert_close(waves.square().sum(dim=-1), torch.full((100,), 8.0))
    assert (torch.cdist(waves, waves) + torch.eye(100)).min() > 0.05


# --- observations ---------------------------------------------------------------------------------------------------


def normalised(spec, batch_size, n_obs_steps, seed=0):
    obs = fake_observation(spec, batch_size, n_obs_steps, torch.Generator().manual_seed(seed))
    return {n: v.float() / 127.5 - 1 if v.dtype == torch.uint8 else v for n, v in obs.modalities.items()}


@pytest.mark.parametrize("camera", [False, True])
@pytest.mark.parametrize("state_width", [None, 12])
def test_encoder_width_is_what_it_says(camera, state_width):
    spec = fake_spec(camera=camera)
    encoder = ObservationEncoder(
        spec.observation, 3, state_width=state_width, image=partial(ImageEncoder, out_dim=7, widths=(16, 16))
    )
    expected = (3 * (9 + 5) if state_width is None else 2 * 12) + (7 if camera else 0)  # the newest picture alone
    assert encoder.out_dim == expected
    assert encoder(normalised(spec, 4, 3)).shape == (4, expected)


def test_encoder_without_networks_is_concatenation():
    spec = fake_spec()
    modalities = normalised(spec, 4, 2)
    out = ObservationEncoder(spec.observation, 2)(modalities)
    assert torch.equal(out, torch.cat([modalities["proprio"], modalities["objects"]], dim=-1).flatten(1))
    only = ObservationEncoder(spec.observation, 2, use=["objects"])
    assert torch.equal(only(modalities), modalities["objects"].flatten(1))


def test_encoder_refuses_unknown_modalities():
    with pytest.raises(ValueError, match="some of proprio, objects; got proprioo"):
        ObservationEncoder(fake_spec().observation, 2, use=["proprioo"])


def test_spatial_softmax_points_at_the_peak():
    maps = torch.zeros(1, 2, 5, 9)
    maps[0, 0, 4, 0] = maps[0, 1, 2, 6] = 100.0
    torch.testing.assert_close(spatial_softmax(maps), torch.tensor([[-1.0, 0.5, 1.0, 0.0]]))


def test_crops_are_pieces_of_the_image():
    images = torch.arange(5 * 2 * 3 * 8 * 10).reshape(5, 2, 3, 8, 10)
    size = (6, 7)
    pieces = {(y, x): images[..., y : y + 6, x : x + 7] for y in range(3) for x in range(4)}
    assert torch.equal(centre_crop(images, size), pieces[1, 1])
    seen = set()
    for seed in range(20):
        cut = random_crop(images, size, torch.Generator().manual_seed(seed))
        for row in range(5):
            found = [place for place, piece in pieces.items() if torch.equal(piece[row], cut[row])]
            assert len(found) == 1  # one place for the whole window
            seen |= set(found)
    assert len(seen) == len(pieces)


def test_random_crops_follow_their_generators():
    images = torch.rand(4, 1, 3, 12, 12)

    def crop(rows):
        return random_crop(images[rows], (8, 8), [torch.Generator().manual_seed(row) for row in rows])

    assert torch.equal(crop([0, 1, 2, 3])[2:], crop([2, 3]))


def test_erasing_covers_a_rectangle_of_one_colour_in_a_share_of_the_rows():
    images = torch.full((1000, 2, 3, 40, 60), 0.123)
    erased = erase_rectangles(images, 0.5, generator=torch.Generator().manual_seed(0))
    covered = (erased != 0.123).all(dim=2)  # [B, O, Y, X]
    rows = covered.flatten(1).any(dim=1)
    assert rows.float().mean() == pytest.approx(0.5, abs=0.04)
    assert torch.equal(covered[:, 0], covered[:, 1])
    area = covered[rows, 0].float().mean(dim=(1, 2))
    assert 0.01 < area.min() < 0.03
    assert 0.30 < area.max() < 0.36
    assert area.mean() == pytest.approx(0.175, abs=0.01)
    one = covered[rows, 0]
    assert torch.equal(one, one.any(dim=2)[:, :, None] & one.any(dim=1)[:, None, :])  # rectangles
    for number in rows.nonzero().flatten()[:20].tolist():
        colours = erased[number].permute(0, 2, 3, 1)[covered[number]]
        assert torch.equal(colours, colours[:1].expand_as(colours))
    assert torch.equal(erase_rectangles(images[:5], 0.0), images[:5])


def test_channels_are_scaled_from_black_and_alike_within_a_window():
    images = torch.rand(64, 2, 3, 4, 4) * 0.6 - 0.9
    scaled = scale_channels(images, 0.3, generator=torch.Generator().manual_seed(0))
    factors = ((scaled + 1) / (images + 1)).movedim(2, 1).flatten(2)  # [B, C, O Y X]
    torch.testing.assert_close(factors, factors[..., :1].expand_as(factors))
    assert 0.7 < factors.min() < 0.75
    assert 1.25 < factors.max() < 1.3
    assert factors[..., 0].std(dim=1).min() > 0
    torch.testing.assert_close(scale_channels(images, 0.0), images)


def test_augmentation_follows_its_generators_and_ends_with_training():
    encoder = ImageEncoder((3, 24, 24), crop_fraction=1, erase=0.9, jitter=0.3)
    images = torch.rand(4, 1, 3, 24, 24)

    def features(rows):
        return encoder(images[rows], generator=[torch.Generator().manual_seed(row) for row in rows])

    torch.testing.assert_close(features([0, 1, 2, 3])[2:], features([2, 3]))
    assert not torch.equal(encoder(images), encoder(images))
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images))
    with pytest.raises(ValueError, match=r"erase must be in \[0, 1\] and jitter in \[0, 1\); got 2 and 0"):
        ImageEncoder((3, 24, 24), erase=2)


def test_image_encoder_crops_at_random_only_in_training():
    torch.manual_seed(0)
    encoder = ImageEncoder((3, 24, 32), widths=(16, 32), crop_fraction=0.75)
    images = torch.rand(2, 1, 3, 24, 32)
    encoder.train()
    first, second = (encoder(images, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.allclose(first, second)
    encoder.eval()
    assert torch.equal(encoder(images), encoder(images))


def test_image_encoder_sees_where_things_are():
    """A bright square moved across the image moves the features; rows stay independent."""
    torch.manual_seed(0)
    encoder = ImageEncoder((3, 24, 32), widths=(16, 32)).eval()
    images = -torch.ones(2, 1, 3, 24, 32)
    images[0, ..., 4:8, 4:8] = images[1, ..., 12:16, 20:24] = 1.0
    features = encoder(images)
    assert (features[0] - features[1]).abs().max() > 1e-3
    torch.testing.assert_close(encoder(images[1:]), features[1:], rtol=1e-5, atol=1e-5)
