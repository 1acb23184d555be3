"""Tensors inside objects of the user's own are seen, and outputs without any are refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nfnets.convert import convert, list_methods
from nfnets.errors import UserError
from nfnets.nested import fresh, tensors_in
from nfnets.trace import trace

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@dataclass
class Batch:
    images: Tensor
    note: str = ""


class Slotted:
    __slots__ = ("images", "missing")

    def __init__(self, images: Tensor) -> None:
        self.images = images


class Ring(list):
    """Holds itself."""

    def __init__(self, images: Tensor) -> None:
        super().__init__([images])
        self.itself = self

    @property
    def images(self) -> Tensor:
        return self[0]


class Net(nn.Module):
    def __init__(self, wrap: Any = None) -> None:
        super().__init__()
        self.conv, self.norm, self.wrap = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), wrap
        self.again, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, batch: Any) -> Any:
        x = self.norm(self.conv(batch.images)).relu()
        x = x + self.last(self.again(x))
        return x if self.wrap is None else self.wrap(x)


@pytest.mark.parametrize("kind", [Batch, Slotted, Ring, lambda x: SimpleNamespace(images=x)])
def test_every_method_takes_inputs_inside_objects(kind: Any) -> None:
    for method in list_methods():
        converted = convert(Net(), kind(X), method=method)
        assert converted(kind(X)).isfinite().all()


def test_outputs_inside_objects_are_traced() -> None:
    for wrap in (Batch, Slotted, Ring):
        assert trace(Net(wrap), Batch(X)).outputs


def test_copies_are_apart_and_alike() -> None:
    batch = Batch(X.clone())
    other, same = fresh((batch, batch.images))
    assert other.images is same
    assert other.images is not batch.images
    assert tensors_in(Slotted) == []
    assert tensors_in(nn.Conv2d(3, 4, 3)) == []


@pytest.mark.parametrize(
    ("output", "said"), [("a cat", "str"), (None, "None"), (3, "int"), ([], "list"), (X.numpy(), "ndarray")]
)
def test_a_forward_that_returns_no_tensor(output: Any, said: str) -> None:
    net = Net(lambda x: output)
    before = copy.deepcopy(net.state_dict())
    for method in list_methods():
        with pytest.raises(UserError, match=f"Net.forward returns no tensor .type {said}.*expected a tensor"):
            convert(net, Batch(X), method=method, inplace=True)
    assert all(map(torch.equal, net.state_dict().values(), before.values()))


@pytest.mark.parametrize("given", ["images", None, 3, X.numpy(), [], {}])
def test_inputs_that_hold_no_tensor(given: Any) -> None:
    for method in list_methods():
        with pytest.raises(UserError, match="no input tensor given") as caught:
            convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), given, method=method)
        assert "\n" not in str(caught.value)
