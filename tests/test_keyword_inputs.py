"""The model is called as its user calls it: what was given, by the way it was given."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nfnets
from nfnets.convert import list_methods

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def injects(forward: Any) -> Any:
    """As decorators of Hugging Face and Lightning do: a keyword of their own, where the user gave none."""

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("return_dict", False)
        return forward(self, *args, **kwargs)

    return wrapped


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.other = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.asked: list[Any] = []


class Decorated(Net):
    @injects
    def forward(self, x: Tensor, mask: Tensor | None = None, return_dict: bool | None = None) -> Tensor:
        y = self.norm(self.conv(x)).relu()
        assert return_dict is False
        assert mask is not None
        return self.other(y * mask) + y


class TellsApart(Net):
    """Whether an argument came, and how: defaults that nobody gave, and names that a tracer uses."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        assert len(args) == 1
        assert list(kwargs) == ["mask", "visit", "select"]
        y = self.norm(self.conv(args[0])).relu()
        return self.other(y * kwargs["mask"]["of"][0]) + y


class Hooked(Net):
    """Its own hook sees the call that the user makes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(self.looks, with_kwargs=True)

    @staticmethod
    def looks(module: nn.Module, args: Any, kwargs: Any) -> None:
        assert args == ()
        assert list(kwargs) == ["x", "mask"]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu()
        x.zero_()  # its own copy
        return self.other(y * mask) + y


CASES: dict[type[Net], tuple[tuple[Any, ...], dict[str, Any]]] = {
    Decorated: ((X,), {"mask": torch.ones(16, 1, 1, 1)}),
    TellsApart: ((X,), {"mask": {"of": [torch.ones(16, 1, 1, 1)]}, "visit": True, "select": None}),
    Hooked: ((), {"x": X, "mask": torch.ones(16, 1, 1, 1)}),
}


@pytest.mark.parametrize("method", list_methods())
@pytest.mark.parametrize("kind", CASES)
def test_only_what_was_given(kind: type[Net], method: str) -> None:
    args, kwargs = CASES[kind]
    torch.manual_seed(0)
    model, before = kind(), X.clone()
    converted = nfnets.convert(model, *args, kwargs=kwargs, method=method)
    assert X.equal(before)
    assert len(nfnets.plan(model, *args, kwargs=kwargs, method=method).rows) == 2
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    assert converted(*args, **kwargs | ({"x": X.clone()} if kind is Hooked else {})).isfinite().all()
    assert len(converted._forward_pre_hooks) == len(model._forward_pre_hooks)


def test_constants_are_measured_on_them() -> None:
    """A layer that reads a fifth has five times the constant."""
    args, kwargs = CASES[Decorated]
    torch.manual_seed(0)
    model = Decorated()
    scales = []
    for factor in (1.0, 0.2):
        converted: Any = nfnets.convert(model, *args, kwargs={"mask": kwargs["mask"] * factor})
        scales.append(float(converted.other[0].scale))
    assert scales[1] / scales[0] == pytest.approx(5, rel=0.01)
