"""verify against layers whose batch dependence is known."""

import pytest
import torch
import torchvision
from torch import nn

from nfnets import verify
from nfnets.convert import convert
from nfnets.errors import UserError


@pytest.mark.parametrize(
    ("layer", "independent"),
    [
        (nn.BatchNorm2d(4), False),
        (nn.BatchNorm2d(4, track_running_stats=False), False),
        (nn.GroupNorm(2, 4), True),
        (nn.InstanceNorm2d(4), True),
        (nn.Conv2d(4, 4, 3), True),
        (nn.Dropout(0.5), True),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout2d(0.9)), True),
    ],
)
def test_known_layers(layer: nn.Module, independent: bool) -> None:
    assert bool(verify.batch_independence(layer, torch.randn(3, 4, 6, 6))) is independent


def test_a_resnet_is_dependent_and_its_conversion_is_not() -> None:
    model, x = torchvision.models.resnet18(), torch.randn(3, 3, 64, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert not verify.batch_independence(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    verdict = verify.batch_independence(convert(model, x), x)
    assert verdict, verdict


def test_a_leak_through_gradients_alone_is_found() -> None:
    class Leak(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean = x.mean(0, keepdim=True)
            return x + mean - mean.detach()  # the output ignores the neighbors, the gradient does not

    assert not verify.batch_independence(Leak(), torch.randn(3, 4))


def test_same_function() -> None:
    a, x = nn.Linear(4, 2), torch.randn(5, 4)
    b = nn.Linear(4, 2)
    assert verify.same_function(a, a, x)
    assert not verify.same_function(a, b, x)
    with pytest.raises(UserError, match="same outputs"):
        verify.same_function(a, nn.Linear(4, 3), x)


def test_one_sample_is_refused() -> None:
    with pytest.raises(UserError, match="2 samples"):
        verify.batch_independence(nn.Linear(4, 2), torch.randn(1, 4))
