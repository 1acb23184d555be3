"""Gradient centralization against its definition, beside clipping, closures and weight standardization."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nfnets import attach_agc, attach_centralization, centralize_grad_, clip_grad_agc_
from nfnets.errors import UserError
from nfnets.layers import ScaledStdConv2d, ScaledStdConvTranspose2d


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def means(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight.detach()  # pyright: ignore
    return weight.flatten(1).mean(1)


def backward(model: nn.Module, shift: float = 0.0) -> Tensor:
    x = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(1)) + shift
    loss = nn.functional.cross_entropy(model(x), torch.arange(8) % 4)
    loss.backward()
    return loss


def with_gradients(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    return module


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(5, 3),
        nn.Conv1d(4, 6, 3, groups=2),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv3d(2, 3, 2),
        nn.Conv2d(4, 8, 1).to(memory_format=torch.channels_last),
    ],
    ids=["linear", "grouped", "depthwise", "3d", "channels-last"],
)
def test_the_mean_of_every_filter_goes(layer: nn.Module) -> None:
    expected = [p.grad.clone() for p in with_gradients(layer).parameters()]  # pyright: ignore
    for unit in expected[0]:
        unit -= sum(unit.flatten().tolist()) / unit.numel()
    centralize_grad_(layer.parameters())
    for p, grad in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_transposed_filter_is_that_of_an_output_channel(groups: int) -> None:
    layer = with_gradients(nn.ConvTranspose2d(4, 6, 3, groups=groups))
    grad = layer.weight.grad.clone()  # pyright: ignore
    for group in grad.chunk(groups):
        for unit in group.unbind(1):
            unit -= unit.mean()
    centralize_grad_(layer)
    torch.testing.assert_close(layer.weight.grad, grad)


def test_what_is_one_unit_stays() -> None:
    """Biases, gains, scalars, filters of a single weight."""
    for shape in ((), (7,), (7, 1, 1, 1), (1, 9)):
        p = nn.Parameter(torch.ones(shape))
        p.grad = torch.full(shape, 3.0)
        centralize_grad_(p)
        assert bool((p.grad == 3).all())
    centralize_grad_(nn.Parameter(torch.ones(2, 2)))  # has no gradient


@pytest.mark.parametrize("layer", [ScaledStdConv2d(3, 8, 3), ScaledStdConvTranspose2d(3, 8, 3)])
def test_standardized_weights_have_centered_gradients_already(layer: nn.Module) -> None:
    torch.manual_seed(0)
    layer(torch.rand(2, 3, 8, 8)).square().sum().backward()
    grad: Tensor = layer.weight.grad.clone()  # pyright: ignore
    centralize_grad_(layer)
    torch.testing.assert_close(layer.weight.grad, grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


def test_steps_keep_the_means_and_leave_the_head_alone() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    handle = attach_centralization(optimizer, model)
    assert handle.excluded == ("4.weight",)
    before, head = means(model[0]), means(model[4])
    for _ in range(3):
        optimizer.zero_grad()
        backward(model, 1.0)
        optimizer.step()
    torch.testing.assert_close(means(model[0]), before)
    assert float((means(model[4]) - head).abs().max()) > 1e-3
    handle.remove()
    optimizer.zero_grad()
    backward(model, 1.0)
    optimizer.step()
    assert float((means(model[0]) - before).abs().max()) > 1e-4


def test_clipping_sees_what_is_left() -> None:
    model, by_hand = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attach_centralization(optimizer, model, exclude=None)
    attach_agc(optimizer, model, clipping=0.01, exclude=None)
    backward(model)
    optimizer.step()
    backward(by_hand)
    centralize_grad_(by_hand)
    clip_grad_agc_(by_hand, 0.01)
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q - q.grad)  # pyright: ignore


def test_gradients_that_a_closure_makes() -> None:
    model, plain = net(), net()
    for one in (model, plain):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        if one is model:
            attach_centralization(optimizer, one)

        def closure(one: nn.Module = one, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            return backward(one)

        optimizer.step(closure)  # pyright: ignore
    start = means(net()[0])
    torch.testing.assert_close(means(model[0]), start)
    assert float((means(plain[0]) - start).abs().max()) > 1e-4


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match="holds none of the model's parameters"):
        attach_centralization(torch.optim.SGD(net().parameters(), lr=0.1), net())
