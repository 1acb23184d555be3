"""Copies and files of a model that are made while a probe is open: they are models of their own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import nfnets
from nfnets.signal import probe

X = torch.randn(4, 3, 16, 16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.absent = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), None
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))).mean((2, 3)))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model).module


def inside_another(model: nn.Module) -> nn.Module:
    return copy.deepcopy(nn.Sequential(model))[0]


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "AveragedModel": averaged,
    "inside another": inside_another,
    "convert": lambda model: nfnets.convert(model, X),
}


def runs_alone(made: nn.Module, model: nn.Module) -> None:
    """Its own class's `forward` on its own weights, and nothing of the probe in it."""
    assert not {"forward", "__getstate__", "_compiled_call_impl"} & vars(made).keys()
    made.last = nn.Linear(8, 2)
    nn.init.zeros_(made.last.weight)
    nn.init.zeros_(made.last.bias)
    assert made(X).abs().max() == 0
    assert model(X).abs().max() > 0


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_made_under_a_probe_is_a_model_of_its_own(name: str, compiled: bool) -> None:
    make: Callable[[nn.Module], nn.Module] = COPIES[name]
    model = Net()
    if compiled:
        model.compile(backend="eager")
    before = set(vars(model))
    with probe(model) as outer:
        model(X)
        with probe(model) as inner:
            made = [make(model)]
            runs_alone(made[0], model)
        made.append(make(model))
        calls = outer.calls
        runs_alone(made[1], model)
        assert outer.calls == calls + 1  # that of the model itself
    assert set(vars(model)) == before
    assert inner.calls >= 1
    for each in made:
        runs_alone(each, model)


def test_a_models_own_forward_is_copied_with_it() -> None:
    class Doubled:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, x: Tensor) -> Tensor:
            return self.factor * x

    model = nn.Identity()
    model.__dict__["forward"] = Doubled(2.0)
    with probe(model):
        twin = copy.deepcopy(model)
    model.forward.factor = 5.0  # type: ignore[union-attr]
    assert torch.equal(twin(X), 2 * X)
    assert torch.equal(model(X), 5 * X)


def test_a_traced_module_is_copied() -> None:
    """`torch.fx` copies by its own rules, not by the state."""
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    with probe(model):
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    x = torch.randn(4, 3)
    for twin in twins:
        assert torch.equal(twin(x), model(x))
        twin.get_submodule("0").weight.data.zero_()
        assert not torch.equal(twin(x), model(x))
