"""A conversion that fails leaves no trace, and one that does not holds two models at most."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_methods_kept import Residual, images
from torch import Tensor, nn

from nfnets.convert import convert, list_methods
from nfnets.convert.apply import _settle
from nfnets.errors import UserError
from nfnets.init import fixup_, skipinit_
from nfnets.scale.one_pass import transaction


class Fails(Residual):
    """Its forward number `last` raises, and all after it."""

    def __init__(self, last: int, error: type[BaseException] = RuntimeError):
        super().__init__()
        self.left, self.error = last, error

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left <= 0:
            raise self.error("stop")
        return super().forward(x)


def passes(method: str) -> int:
    net = Fails(100)
    convert(net, images(), method=method, inplace=True)
    return 100 - net.left


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", list_methods())
def test_a_failing_pass_undoes_everything(method: str, error: type[BaseException]) -> None:
    for last in range(2, passes(method) + 1):
        net = Fails(last, error)
        before, types = copy.deepcopy(net.state_dict()), [type(module) for module in net.modules()]
        with pytest.raises((UserError, KeyboardInterrupt)):
            convert(net, images(), method=method, inplace=True)
        assert [type(module) for module in net.modules()] == types
        for name, value in net.state_dict().items():
            assert torch.equal(value, before[name]), (last, name)


def test_a_transaction_inside_another_is_part_of_it() -> None:
    weight, other = torch.ones(2), torch.ones(2)

    def fail(backup: bool) -> None:
        with transaction(backup) as outer:
            outer(other, torch.zeros(2))
            with transaction() as write:
                write(weight, torch.zeros(2))
            raise KeyError

    with pytest.raises(KeyError):
        fail(backup=True)
    assert torch.equal(torch.stack([weight, other]), torch.ones(2, 2))
    with pytest.raises(KeyError):
        fail(backup=False)
    assert not weight.any()
    with transaction() as write:
        write(weight, torch.ones(2))
    assert weight.all()


@pytest.mark.parametrize("initialize", [fixup_, skipinit_])
def test_the_initializers_draw_as_their_parameters_would(initialize: Any) -> None:
    """Into the same layout: a channels-last weight is filled in its own order."""
    net = convert(Residual(), images(), method="skipinit")
    torch.manual_seed(3)
    initialize(net, images())
    first = copy.deepcopy(net.state_dict())
    torch.manual_seed(3)
    initialize(net, images())
    assert all(torch.equal(value, first[name]) for name, value in net.state_dict().items())


@pytest.fixture
def nothing_else() -> Iterator[None]:
    """What other tests and the libraries hold is not looked through at every count."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def held(size: int) -> float:
    """Weights that are alive, in models of so many bytes."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # By exact type: what other tests left of a compiler's fake tensors has no data.
        if type(thing) in (Tensor, nn.Parameter) and not thing.is_meta:
            # Not `data_ptr()`: a copy that shares its memory until it is written to would move at the question.
            start = torch._C._data_address(thing) - thing.storage_offset() * thing.element_size()
            storages[start] = thing.untyped_storage().nbytes()
    return sum(storages.values()) / size


@pytest.mark.parametrize("method", ["fold", "nf", "lsuv", "fixup"])
@pytest.mark.usefixtures("nothing_else")
def test_no_model_is_held_more_than_twice(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(Residual):
        def __init__(self) -> None:
            super().__init__()
            for block in self.b:
                block.c1, block.n1 = nn.Conv2d(8, 512, 3, padding=1), nn.BatchNorm2d(512)
                block.c2 = nn.Conv2d(512, 8, 3, padding=1)
            self.b.extend(copy.deepcopy(block) for block in list(self.b) * 4)

    net = Wide()
    size = sum(p.numel() * p.element_size() for p in net.parameters())
    before = held(size) - 1
    assert before == pytest.approx(0, abs=0.1)  # its buffers
    peaks = []

    def watched(*args: Any) -> None:
        peaks.append(held(size))
        _settle(*args)
        peaks.append(held(size))

    monkeypatch.setattr("nfnets.convert.apply._settle", watched)
    net.fc.register_forward_hook(lambda *_: peaks.append(held(size)))
    converted = convert(net, images(1, 3, 8, 8).expand(2, -1, -1, -1), method=method)
    assert len(peaks) > 2
    assert max(peaks) - before < 2.2  # and the layer at work
    del converted
