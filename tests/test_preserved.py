"""Looking at a model changes nothing in it, whatever its forward does to it."""

from __future__ import annotations

import collections
import copy
import queue
import random
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import nfnets
from nfnets import verify
from nfnets.errors import UserError
from nfnets.init import lsuv_
from nfnets.preserve import preserved
from nfnets.signal import profile
from nfnets.trace import trace

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "plan": lambda model: nfnets.plan(model, X),
    "profile": lambda model: profile(model, X, backward=True),
    "batch_independence": lambda model: verify.batch_independence(model, X),
    "same_function": lambda model: verify.same_function(model, model, X),
}


@dataclass
class Store:
    """Not a container to anyone: a cache as Hugging Face's, a hook as fastai's."""

    seen: Tensor | None = None
    layers: list[Any] = field(default_factory=list)


class Net(nn.Module):
    """Does something to itself at every call."""

    def __init__(self, does: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("unset", None)
        self.does = does
        self.calls, self.state = 0, torch.ones(4)
        self.kept: Any = [torch.ones(2), {"a": 1}]
        self.by_name = collections.OrderedDict(first=1, second=[2])
        self.recent = collections.deque([1, 2, 3], maxlen=3)
        self.names = {"a"}
        self.store = Store(torch.ones(3), [Store()])
        self.generator = torch.Generator().manual_seed(5)

    def forward(self, x: Tensor) -> Tensor:
        if self.does is _under_no_grad:  # later, autograd would refuse it
            self.does(self, x)
        y = self.norm(self.conv(x))
        if self.does is not _under_no_grad:
            self.does(self, y)
        return y.relu()


def _in_place(tensor: Callable[[Any], Tensor]) -> Callable[[Any, Tensor], Any]:
    return lambda net, y: tensor(net).copy_(tensor(net) + 1)


def _max_norm(net: Any, y: Tensor) -> None:
    net.conv.weight.data = torch.renorm(net.conv.weight.data, p=2, dim=0, maxnorm=0.1)


def _under_no_grad(net: Any, y: Tensor) -> None:
    with torch.no_grad():
        net.conv.weight.mul_(0.5)


DOES: dict[str, Callable[[Any, Tensor], Any]] = {
    "keeps its activation": lambda net, y: setattr(net, "seen", y),
    "keeps one over another": lambda net, y: setattr(net, "state", y),
    "keeps one in a list": lambda net, y: net.kept.append(y),
    "keeps one in a dictionary in a list": lambda net, y: net.kept[1].update(a=y, b=y),
    "keeps one in an ordered dictionary": lambda net, y: (net.by_name.pop("first"), net.by_name.update(z=y)),
    "keeps one in a queue": lambda net, y: net.recent.append(y),
    "keeps its name": lambda net, y: (net.names.discard("a"), net.names.add("b")),
    "keeps one on an object": lambda net, y: setattr(net.store.layers[0], "seen", y),
    "empties a list": lambda net, y: net.kept.clear(),
    "counts": lambda net, y: setattr(net, "calls", net.calls + 1),
    "deletes": lambda net, y: net.__dict__.pop("calls", None),
    "registers a buffer": lambda net, y: net.register_buffer("another", y.detach()),
    "fills an empty buffer": lambda net, y: setattr(net, "unset", y.detach()),
    "exchanges a buffer": lambda net, y: setattr(net, "average", net.average + 1),
    "gives a buffer other data": lambda net, y: setattr(net.average, "data", torch.ones(4, 1)),
    "writes to a buffer": _in_place(lambda net: net.average),
    "writes to a view of a buffer": _in_place(lambda net: net.average[1:]),
    "writes to a tensor of its own": _in_place(lambda net: net.state),
    "writes to one in an object": _in_place(lambda net: net.store.seen),
    "writes its activation to one": lambda net, y: net.state.add_(y.mean((0, 2, 3))),
    "writes to a parameter's data": _in_place(lambda net: net.conv.weight.data),
    "writes to a parameter": _under_no_grad,
    "gives a parameter other data": _max_norm,
    "does both": lambda net, y: (net.conv.weight.data.mul_(2), _max_norm(net, y)),
    "freezes": lambda net, y: net.conv.weight.requires_grad_(False),
    "draws": lambda net, y: torch.rand(3, generator=net.generator),
    "draws elsewhere": lambda net, y: (random.random(), np.random.rand(), torch.rand(3)),  # noqa: NPY002
    "exchanges a module": lambda net, y: setattr(net, "norm", nn.BatchNorm2d(4)),
    "changes modes": lambda net, y: net.norm.train(not net.norm.training),
}


def picture(thing: Any, seen: set[int] | None = None) -> Any:
    """Everything that a model holds, by identity and by value."""
    seen = set() if seen is None else seen
    if isinstance(thing, Tensor):
        flags = thing.requires_grad, thing.grad_fn is None, thing._version, thing.data_ptr() % 16
        return id(thing), tuple(thing.shape), thing.detach().tolist(), flags
    if isinstance(thing, torch.Generator):
        return id(thing), thing.get_state().tolist()
    if isinstance(thing, int | str | float | None) or (callable(thing) and not isinstance(thing, nn.Module)):
        return thing
    if id(thing) in seen:
        return id(thing)
    seen.add(id(thing))
    if isinstance(thing, dict):
        return id(thing), [(key, picture(value, seen)) for key, value in thing.items()]
    if isinstance(thing, set):
        return id(thing), sorted(thing)
    if isinstance(thing, list | tuple | collections.deque):
        return id(thing), [picture(value, seen) for value in thing]
    return id(thing), picture(vars(thing), seen)


def randomness() -> Any:
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002
    return random.getstate(), keys.tolist(), position, torch.get_rng_state().tolist()


@pytest.mark.parametrize("does", DOES)
@pytest.mark.parametrize("look", LOOKS)
def test_a_model_is_as_it_was(does, look):
    net = Net(DOES[does])
    if look == "profile" and does == "writes its activation to one":
        pytest.skip("autograd itself refuses it")
    before = picture(net)
    states = randomness()
    LOOKS[look](net)
    assert picture(net) == before
    assert randomness() == states


def test_after_an_exception_too():
    def fails(net: Any, y: Tensor) -> None:
        net.seen = y
        net.conv.weight.data.zero_()
        raise RuntimeError("broken")

    net = Net(fails)
    before = picture(net)
    for look in LOOKS.values():
        with pytest.raises(UserError, match="broken"):
            look(net)
        assert picture(net) == before


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("does", ["counts", "gives a parameter other data", "writes to a parameter"])
def test_a_loss_from_before_can_still_be_differentiated(look, training, does):
    torch.manual_seed(0)
    net = Net(DOES[does]).train(training)
    with torch.no_grad():
        net(X)
    twin = copy.deepcopy(net)
    net.does = twin.does = DOES["counts"]
    loss, expected = net(X).square().sum(), twin(X).square().sum()
    net.does = DOES[does]
    LOOKS[look](net)
    loss.backward()
    expected.backward()
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None
        assert ours.grad.equal(theirs.grad)


def test_initializers_keep_what_they_wrote_and_nothing_else():
    net = Net(DOES["keeps its activation"])
    weight = net.conv.weight.detach().clone()
    lsuv_(net, X)
    assert not net.conv.weight.equal(weight)
    assert not hasattr(net, "seen")
    assert net.norm.num_batches_tracked == 0


def test_arrays_and_views_of_a_parameter_see_it_as_before():
    net = Net(DOES["writes to a parameter's data"])
    array, view = net.conv.weight.detach().numpy(), net.conv.weight.detach()[1:]
    expected = array.copy()
    trace(net, X)
    assert np.array_equal(array, expected)
    with torch.no_grad():
        net.conv.weight.fill_(3)
    assert (array == 3).all()
    assert (view == 3).all()


def test_parameters_are_not_copied(monkeypatch):
    """Only those are that the forward writes to: memory tells."""
    layers = [nn.Linear(64, 64) for _ in range(4)]
    model = nn.Sequential(*layers)
    addresses = [layer.weight.data_ptr() for layer in layers]
    copied: list[int] = []
    clone = Tensor.clone
    monkeypatch.setattr(Tensor, "clone", lambda t, **k: (copied.append(t.numel()), clone(t, **k))[1])
    with preserved(model):
        layers[1].weight.data.zero_()
    assert copied == []
    assert [layer.weight.data_ptr() == a for layer, a in zip(layers, addresses, strict=True)].count(True) == 3
    assert layers[1].weight.abs().sum() > 0


def test_what_other_threads_may_be_at_work_on_is_left_alone():
    net = Net(lambda net, y: (net.store.layers[0].queue.put(1), net.event.set()))
    net.store.layers[0].queue, net.event = queue.Queue(), threading.Event()
    trace(net, X)
    assert net.store.layers[0].queue.qsize() == 1
    assert net.event.is_set()


def test_a_lazy_model_becomes_what_its_first_pass_makes_of_it():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of PyTorch call them new
        model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU())
    trace(model, X)
    assert type(model[0]) is nn.Conv2d
    assert model(X).shape == (4, 4, 6, 6)


def test_tensors_of_every_kind_are_carried_through():
    """Those that cannot be copied, written to or shared as others are; and scripted layers."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.register_buffer("wide", torch.ones(1).expand(5))
            self.register_buffer("sparse", torch.eye(3).to_sparse())
            self.register_buffer("empty", torch.empty(0))
            self.nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
            self.shared = torch.ones(3).share_memory_()

        def forward(self, x: Tensor) -> Tensor:
            self.shared.add_(1)
            self.sparse.mul_(2)
            return self.norm(self.conv(x))

    model = Model()
    assert len(trace(model, X).nodes) == 3
    assert model.norm.num_batches_tracked == 0
    assert model.shared.tolist() == [1, 1, 1]
    assert model.sparse.to_dense().equal(torch.eye(3))
    on_meta = copy.deepcopy(nn.Sequential(model.conv, model.norm)).to("meta")
    assert len(trace(on_meta, X.to("meta")).nodes) == 3
    with FakeTensorMode():
        assert (
            len(trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.ones(2, 3, 8, 8)).nodes)
            == 3
        )
