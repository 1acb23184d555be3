"""A conversion that was asked for and would change nothing is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from nfnets.convert import ConversionError, convert, plan
from nfnets.trace import is_batch_norm_like

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MEASURED = ["nf", "lsuv", "fixed_variance", "fixup", "skipinit"]


class Other(nn.Module):
    """Norm layers for other inputs than those of the example."""

    def __init__(self, beside: bool = False) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8) if beside else nn.ReLU())
        self.large = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.large(x) if x.shape[-1] > 8 else x


def norms(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if is_batch_norm_like(module)]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("method", MEASURED)
def test_what_the_forward_never_runs(method: str, inplace: bool) -> None:
    net = Other()
    with pytest.raises(
        ConversionError, match=r"^nothing would be replaced: 1 norm layer left.*large\.1, since .*never runs"
    ) as caught:
        convert(net, X, method=method, inplace=inplace)
    assert [(row.path, row.action) for row in caught.value.plan] == [("large.1", "leave")]
    assert str(caught.value.plan) in str(caught.value)
    assert type(net.large[1]) is nn.BatchNorm2d
    assert norms(convert(net, X, method=method, strict=False)) == ["large.1"]


def test_layers_for_which_nothing_must_be_measured() -> None:
    assert norms(convert(Other(), X, method="gn")) == []


def test_one_that_is_replaced_is_enough() -> None:
    once = convert(Other(beside=True), X, method="nf")
    assert norms(once) == ["large.1"]
    assert norms(convert(once, X, method="nf")) == ["large.1"]  # again: as far as it goes
    assert norms(convert(convert(once, torch.randn(4, 3, 16, 16)), X)) == []


def test_the_users_choice_is_no_error() -> None:
    net = Other(beside=True)
    assert norms(convert(net, X, exclude="*")) == ["first.1", "large.1"]
    assert norms(convert(net, X, exclude=["first", "large"])) == ["first.1", "large.1"]
    with pytest.raises(
        ConversionError, match=r"^nothing would be replaced: 1 norm layer left, the first, large\.1"
    ):
        convert(net, X, include="large")
    with pytest.raises(ConversionError, match="nothing would be replaced"):
        convert(net, X, exclude="first")


def test_what_the_method_leaves() -> None:
    frozen = nn.Sequential(nn.Conv2d(3, 8, 3), torchvision.ops.FrozenBatchNorm2d(8))
    options: dict[str, Any] = {"method": "ghost_bn", "size": 2}
    reason = next(iter(plan(frozen, X, **options))).reason
    with pytest.raises(ConversionError, match=f"nothing would be replaced: .*{reason}"):
        convert(frozen, X, **options)
