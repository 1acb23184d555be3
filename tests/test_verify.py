"""verify against layers whose batch dependence is known."""

import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

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


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Function(nn.Module):
    """A forward from a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.function(*inputs, **kwargs)


IDENTITY, NAN = Function(lambda x: x), Function(lambda x: x * float("nan"))


@pytest.mark.parametrize(
    ("a", "b"), [(IDENTITY, NAN), (NAN, IDENTITY), (NAN, NAN), (IDENTITY, Function(lambda x: x / 0))]
)
def test_what_is_not_finite_is_no_proof_of_the_same_function(a: nn.Module, b: nn.Module) -> None:
    verdict = verify.same_function(a, b, X)
    assert not verdict
    assert not verdict.worst <= 1e-4
    assert "not finite" in str(verdict)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x, x * float("nan")),
        lambda x: (x * float("nan"), x),
        lambda x: x / 0,
        lambda x: x + torch.sqrt(0 * x.mean(0)),  # 0 · ∞ in its gradient
    ],
)
def test_what_is_not_finite_is_no_proof_of_batch_independence(function: Callable[..., Any]) -> None:
    verdict = verify.batch_independence(Function(function), X)
    assert not verdict
    assert "not finite" in str(verdict)


def _spectral() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 4))


def _stochastic() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.RReLU(), nn.Linear(4, 4), nn.RReLU(0.01, 0.9), nn.Dropout(0.3))


def _reentrant(inner: nn.Module) -> nn.Module:
    model = Function(lambda x: checkpoint(inner, x, use_reentrant=True))
    model.inner = inner
    return model


class Counting(nn.Module):
    """Registers a new tensor as its buffer at every call, as a moving average may."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return x * self.calls


@pytest.mark.parametrize(
    ("model", "x", "independent"),
    [
        (_spectral(), X, True),
        (nn.Sequential(_spectral(), nn.BatchNorm1d(4)), X, False),
        (Counting(), X, True),
        (_stochastic(), torch.randn(16, 4), True),
        (_reentrant(nn.Linear(4, 2)), X, True),
        (_reentrant(nn.BatchNorm1d(4)), X, False),
        (Function(lambda x: x.detach()), X, True),
        (Function(lambda x: (x - x.mean(0)).detach()), X, False),
        (Function(lambda x: (x, x.detach())), X, True),
        (Function(torch.fft.fft), X.to(torch.complex64), True),
        (Function(lambda x: torch.fft.fft(x, dim=0).conj()), X.to(torch.complex64), False),
        (Function(lambda x: (x, x[:, :0])), X, True),
    ],
)
def test_models_of_every_kind(model: nn.Module, x: torch.Tensor, independent: bool) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    verdict = verify.batch_independence(model, x)
    assert bool(verdict) is independent, verdict
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_same_function_is_the_same_twice() -> None:
    model = Counting()
    assert verify.same_function(model, model, X)
    assert model.calls == 0


def test_complex_outputs_are_compared_whole() -> None:
    x = X.to(torch.complex64)
    assert verify.same_function(IDENTITY, IDENTITY, x)
    assert not verify.same_function(IDENTITY, Function(torch.conj_physical), x + 1j)


def test_keyword_inputs() -> None:
    def scaled(x: torch.Tensor, *, scale: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        return x * scale * shared

    def leaking(x: torch.Tensor, *, scale: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
        return x * scale.mean(0) * shared

    kwargs = {"scale": torch.rand(3, 4), "shared": torch.tensor(2.0)}
    assert verify.batch_independence(Function(scaled), X, kwargs=kwargs)
    assert not verify.batch_independence(Function(leaking), X, kwargs=kwargs)
    assert verify.same_function(Function(scaled), Function(scaled), X, kwargs=kwargs)
    assert not verify.same_function(Function(scaled), Function(leaking), X, kwargs=kwargs)


def test_inputs_that_the_model_rejects() -> None:
    for check in (
        lambda: verify.batch_independence(nn.Linear(5, 2), X),
        lambda: verify.same_function(nn.Linear(5, 2), nn.Linear(5, 2), X),
        lambda: verify.batch_independence(nn.Linear(4, 2), X, kwargs={"scale": X}),
    ):
        with pytest.raises(UserError, match=r"forward fails in .* mode on inputs \(3, 4\)"):
            check()


def test_the_batch_may_lie_in_any_dimension_of_an_output() -> None:
    """As CTC's (T, N, C): four positions of three samples, which one after another are independent."""
    body, recurrent = nn.Conv1d(2, 5, 3), nn.GRU(5, 6, bidirectional=True)  # over time, not over samples
    images = torch.randn(4, 2, 6)

    def read(x: torch.Tensor) -> torch.Tensor:
        return recurrent(body(x).permute(2, 0, 1))[0]

    def mixing(x: torch.Tensor) -> torch.Tensor:
        return recurrent(body(x).permute(2, 0, 1) - x.mean())[0]

    for given in ({}, {"batch_dim": 1}):  # by size alone, dimension 0 is as long as the batch
        assert verify.batch_independence(Function(read), images, **given)
        assert not verify.batch_independence(Function(mixing), images, **given)
    assert not verify.batch_independence(Function(read), images, batch_dim=0)
    series = torch.randn(6, 3, 5)
    assert verify.batch_independence(recurrent, series, input_batch_dim=1)
    assert not verify.batch_independence(recurrent, series)


@pytest.mark.parametrize(
    ("function", "independent"),
    [
        (lambda x: (x, torch.arange(3.0)), True),  # anchors, as many as there are samples
        (lambda x: (x, x.new_ones(7, 3).cumsum(1)), True),  # positions: no sample's
        (lambda x: (x, (x * x.sum()).transpose(0, 1)), False),
        (lambda x: [{"boxes": row[None] * torch.ones(2, 1)} for row in x], True),  # one entry for each sample
        (lambda x: [{"boxes": row[None] * x.mean()} for row in x], False),
        (lambda x: [x[:1].expand(1 + int(x[1:].sum() > 0), 4)] * len(x), False),  # a shape that others decide
        (lambda x: x.view(3, 4) * 2, True),  # takes no other number of samples
        (lambda x: x.view(3, 4).flip(0), False),
        (lambda x: (x.view(3, 4) * 2).t(), True),
    ],
)
def test_outputs_that_belong_to_no_sample_and_outputs_in_lists(
    function: Callable[..., Any], independent: bool
) -> None:
    x = torch.arange(12.0).view(3, 4) / 12 - 0.7
    verdict = verify.batch_independence(Function(function), x)
    assert bool(verdict) is independent, verdict


def test_two_dimensions_that_could_be_the_batch() -> None:
    model = Function(lambda x: x.view(1, 4, 4).transpose(1, 2))
    with pytest.raises(UserError, match="pass batch_dim"):
        verify.batch_independence(model, torch.randn(4, 4))
    assert verify.batch_independence(model, torch.randn(4, 4), batch_dim=2)


class Frozen(nn.Module):
    """Sets flags in its forward, as fine-tuning code and physics models do."""

    def __init__(self, change: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.norm, self.change = nn.Linear(4, 4), nn.Identity(), change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = self.change(self, x)
        return self.norm(self.layer(x if given is None else given)).tanh()


def _forces(model: Any, x: torch.Tensor) -> torch.Tensor:
    x.requires_grad_(True)
    return torch.autograd.grad(model.layer(x).square().sum(), x, create_graph=True)[0]


def _freeze(model: Any, x: torch.Tensor) -> None:
    model.layer.requires_grad_(False)


def _unfreeze(model: Any, x: torch.Tensor) -> None:
    model.layer.requires_grad_(True)


def _no_gradient(model: nn.Module, x: torch.Tensor) -> None:
    x.requires_grad = False


@pytest.mark.parametrize(
    "change",
    [
        _forces,
        _no_gradient,
        _freeze,
        _unfreeze,
    ],
)
def test_a_forward_that_sets_requires_grad(change: Callable[..., Any]) -> None:
    model = Frozen(change)
    model.layer.bias.requires_grad_(False)
    kept = model.layer.weight.grad = torch.ones(4, 4)
    verdict = verify.batch_independence(model, X)
    assert verdict, verdict
    assert model.layer.weight.grad is kept
    assert torch.equal(kept, torch.ones(4, 4))
    assert (model.layer.weight.requires_grad, model.layer.bias.requires_grad) == (True, False)
    assert model.layer.bias.grad is None
    model.norm = nn.BatchNorm1d(4)
    assert not verify.batch_independence(model, X)


def test_masks_drawn_by_python_and_numpy_are_the_same_twice() -> None:
    before = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    assert verify.batch_independence(Function(lambda x: x * random.random()), X)
    assert verify.batch_independence(Function(lambda x: x * float(np.random.rand())), X)  # noqa: NPY002
    assert (random.getstate(), str(np.random.get_state())) == before  # noqa: NPY002


def test_a_forward_that_does_not_repeat_is_no_leak() -> None:
    own = random.Random(0)
    with pytest.raises(UserError, match="two passes over the same inputs differ"):
        verify.batch_independence(Function(lambda x: x * own.random()), X)
    assert not verify.batch_independence(Function(lambda x: x - x.mean(0)), X)


class Scheduled(nn.Module):
    """Dropout whose rate grows with the calls, counted in Python: drop path and DropBlock schedules."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return nn.functional.dropout(x, min(0.9, 0.2 * self.calls), self.training)


def test_a_schedule_that_counts_calls_in_python_is_no_leak() -> None:
    model = Scheduled()
    assert verify.batch_independence(model, X)
    assert model.calls == 0


@dataclass
class Parts:
    """No container that pytree knows."""

    logits: torch.Tensor
    more: dict[str, Any]


class Output(OrderedDict[str, Any]):
    """As the outputs of transformers: a dict whose entries are attributes, too."""

    def __init__(self, **entries: Any) -> None:
        super().__init__(entries)
        self.__dict__.update(entries)


@pytest.mark.parametrize(
    "made",
    [
        lambda x, y: Parts(x, {"hidden": [y]}),
        lambda x, y: Output(logits=x, hidden=(y,)),
        lambda x, y: SimpleNamespace(a=x, b=y),
    ],
)
def test_outputs_in_data_classes_and_objects(made: Callable[..., Any]) -> None:
    same, other = Function(lambda x: made(x, 2 * x)), Function(lambda x: made(x, 3 * x))
    assert verify.same_function(same, same, X)
    verdict = verify.same_function(same, other, X)
    assert not verdict
    assert verdict.worst == pytest.approx(0.5)
    assert verify.batch_independence(same, X)
    assert not verify.batch_independence(Function(lambda x: made(x, x - x.mean(0))), X)


def test_exported_models_are_run_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).eval()
    with torch.no_grad():
        model[1].running_var.fill_(4.0)
    exported = torch.export.export(model, (X,)).module()
    assert verify.same_function(model, exported, X)
    assert verify.same_function(exported, model, X)
    assert not verify.same_function(nn.Sequential(model[0], nn.Identity()), exported, X)
    with pytest.raises(UserError, match=r"check the model before torch\.export"):
        verify.batch_independence(exported, X)
