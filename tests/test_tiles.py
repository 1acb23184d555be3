"""Tiles: the parts of an image, the halo that a net needs, and what norm layers over space break."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nfnets
from nfnets.errors import UserError
from nfnets.tiles import tiled, tiles
from nfnets.verify import tile_independence


def net(norm: str = "", dims: int = 2) -> nn.Sequential:
    """Radius 1 + 2·2 + 1 = 6 at stride 2: a convolution, a strided one, one of 3, upsampled."""
    torch.manual_seed(0)
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]
    layers: list[nn.Module] = [convolution(1, 4, 3, padding=1)]
    layers += {"group": [nn.GroupNorm(2, 4)], "instance": [instance(4)], "batch": [nn.BatchNorm2d(4)]}.get(
        norm, []
    )
    layers += [nn.Tanh(), convolution(4, 4, 2, stride=2), nn.Tanh(), convolution(4, 3, 3, padding=1)]
    return nn.Sequential(*layers, nn.Upsample(scale_factor=2))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolutional_net_is_exact_from_its_radius_on(dims: int) -> None:
    image = torch.randn(2, 1, *(24,) * dims)
    verdict = tile_independence(net(dims=dims), image, tile=8, halo=4)
    assert verdict, verdict
    assert verdict.needed == 3, "a convolution's 1 and, at stride 2, the other's 2"
    assert verdict.worst < 1e-5
    short = tile_independence(net(dims=dims), image, tile=8, halo=2)
    assert not short
    assert short.worst > 1e-3


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_norm_layers_over_space_break_tiles_whatever_the_halo_and_nf_mends_it(norm: str) -> None:
    image = torch.randn(1, 1, 48, 48)
    image[..., :24] *= 4
    verdict = tile_independence(net(norm), image, tile=8, halo=8)
    assert not verdict
    assert verdict.worst > 1e-2
    assert verdict.needed >= 16
    assert "up to the image's border" in verdict.detail
    free = nfnets.convert(net(norm), torch.randn(8, 1, 16, 16), norms="all")
    mended = tile_independence(free, image, tile=8, halo=8)
    assert mended, mended
    assert mended.needed == 3
    assert tile_independence(net("batch"), image, 8, 8), "in evaluation its statistics are constants"


def test_tiles_cover_an_image_once() -> None:
    covered, seen = torch.zeros(10, 7), torch.zeros(10, 7)
    for part in tiles((10, 7), tile=(4, 3), halo=1):
        covered[part.core] += 1
        seen[part.seen] += 1
    assert bool((covered == 1).all())
    assert seen.max() == 4


def test_outputs_of_another_size_and_everything_in_its_place() -> None:
    image = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert torch.equal(tiled(lambda x: x, image, (4, 2), 1), image)
    assert torch.equal(tiled(lambda x: F.avg_pool2d(x, 2), image, 4, 2), F.avg_pool2d(image, 2))
    bigger = lambda x: F.interpolate(x, scale_factor=3.0)  # noqa: E731
    assert torch.equal(tiled(bigger, image, 3, 1), bigger(image))


class Dictionary(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x.mean((2, 3)), "out": x}


def test_bad_input_and_a_model_left_as_it_was() -> None:
    image = torch.randn(1, 3, 8, 8)
    assert tile_independence(Dictionary(), image, 4, 0)
    for wrong in (
        lambda: tile_independence(Dictionary(), image, 0, 0),
        lambda: tile_independence(Dictionary(), image, 4, -1),
        lambda: tile_independence(Dictionary(), image, (4, 4, 4), 1),
        lambda: tile_independence(Dictionary(), image[0, 0], 4, 1),
        lambda: tile_independence(Dictionary(), image.long(), 4, 1),
        lambda: tile_independence(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), image, 8, 0),
        lambda: tile_independence(nn.AvgPool2d(2), image, 3, 0),
    ):
        with pytest.raises(UserError):
            wrong()
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tile_independence(model, image, 4, 2)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
