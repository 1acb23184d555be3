"""verify against layers whose batch dependence is known."""

from collections.abc import Callable
from typing import Any

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
