"""`online` and `bcn`, which follow statistics over samples, against plain loops over the published formulas."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conversion_nets import NETS
from torch import Tensor, nn

from nfnets import verify
from nfnets.convert import convert, plan
from nfnets.convert.methods.bcn import BatchChannelNorm
from nfnets.convert.methods.online import OnlineNorm, followed
from nfnets.errors import UserError


class Loop:
    """Online Normalization's core as published, a sample and a channel at a time."""

    def __init__(self, channels: int, a: float, b: float, eps: float):
        self.mu, self.var = np.zeros(channels), np.ones(channels)
        self.u, self.v = np.zeros(channels), np.zeros(channels)
        self.a, self.b, self.eps = a, b, eps

    def forward(self, x: np.ndarray) -> np.ndarray:
        y, self.kept = np.empty_like(x), np.empty(x.shape[:2])
        for t in range(x.shape[0]):
            for c in range(x.shape[1]):
                self.kept[t, c] = np.sqrt(self.var[c] + self.eps)
                y[t, c] = (x[t, c] - self.mu[c]) / self.kept[t, c]
                mean, var = x[t, c].mean(), x[t, c].var()
                apart = self.a * (1 - self.a) * (mean - self.mu[c]) ** 2
                self.var[c] = self.a * self.var[c] + (1 - self.a) * var + apart
                self.mu[c] = self.a * self.mu[c] + (1 - self.a) * mean
        self.y = y
        return y

    def backward(self, g: np.ndarray) -> np.ndarray:
        dx = np.empty_like(g)
        for t in range(g.shape[0]):
            for c in range(g.shape[1]):
                g1 = g[t, c] - (1 - self.b) * self.v[c] * self.y[t, c]
                self.v[c] += (g1 * self.y[t, c]).mean()
                dx[t, c] = g1 / self.kept[t, c] - (1 - self.b) * self.u[c]
                self.u[c] += dx[t, c].mean()
        return dx


def streams(layer: OnlineNorm) -> list[Tensor]:
    return [layer.mean, layer.var, layer.along_mean, layer.along_output]


@pytest.mark.parametrize("shape", [(9, 3, 4, 5), (8, 2, 6), (5, 3, 2, 3, 2), (17, 4), (1, 3, 4, 4)])
@pytest.mark.parametrize(("a", "b"), [(0.999, 0.99), (0.5, 0.3), (0.0, 0.0)])
def test_online_is_the_loop_over_samples(shape: tuple[int, ...], a: float, b: float) -> None:
    torch.manual_seed(0)
    layer = OnlineNorm(shape[1], a, b, "none", affine=False).double()
    loop = Loop(shape[1], a, b, layer.eps)
    for _ in range(3):  # state goes on from batch to batch
        x = (2 * torch.randn(shape, dtype=torch.float64) + 1).requires_grad_()
        g = torch.randn_like(x)
        y = layer(x)
        y.backward(g)
        flat = (*shape[:2], -1)
        expected = loop.forward(x.detach().reshape(flat).numpy())
        np.testing.assert_allclose(y.detach().reshape(flat).numpy(), expected, rtol=1e-10, atol=1e-10)
        gradient = loop.backward(g.reshape(flat).numpy())
        np.testing.assert_allclose(x.grad.reshape(flat).numpy(), gradient, rtol=1e-9, atol=1e-9)
        for found, kept in zip(streams(layer), (loop.mu, loop.var, loop.u, loop.v), strict=True):
            np.testing.assert_allclose(found.numpy(), kept, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 64])
def test_states_that_follow_are_those_of_the_loop(steps: int) -> None:
    torch.manual_seed(0)
    decay, added = torch.randn(steps, 3).double(), torch.randn(steps, 3).double()
    decay[steps // 2 :: 5] = 0.0
    state = torch.randn(3).double()
    expected = [state]
    for t in range(steps):
        expected.append(decay[t] * expected[-1] + added[t])
    torch.testing.assert_close(followed(state, decay, added), torch.stack(expected))


def test_online_in_batches_is_online_one_by_one() -> None:
    torch.manual_seed(0)
    one = OnlineNorm(3).double()
    other = copy.deepcopy(one)
    x, g = torch.randn(12, 3, 4, 4).double(), torch.randn(12, 3, 4, 4).double()
    gradients = []
    for layer, size in ((one, 12), (other, 1)):
        found = []
        for part, back in zip(x.split(size), g.split(size), strict=True):
            leaf = part.clone().requires_grad_()
            layer(leaf).backward(back)
            found.append(leaf.grad)
        gradients.append(torch.cat(found))
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(one.state_dict(), other.state_dict())
    torch.testing.assert_close(one.weight.grad, other.weight.grad)


def test_onlines_bounds_and_evaluation() -> None:
    torch.manual_seed(0)
    x = 100 * torch.randn(4, 3, 5, 5)
    assert OnlineNorm(3)(x).abs().max() == 5
    scaled = OnlineNorm(3, bound="scale")(x)
    torch.testing.assert_close(scaled.square().mean((1, 2, 3)), torch.ones(4))
    layer = OnlineNorm(3, bound="none")
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer(torch.randn(64, 3, 5, 5))
    before = copy.deepcopy(layer.state_dict())
    found = layer.eval()(x)
    expected = F.batch_norm(x, layer.mean, layer.var, layer.weight, layer.bias, eps=layer.eps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    for wrong in ({"forward_decay": 1.0}, {"backward_decay": -0.1}, {"bound": "5"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            OnlineNorm(3, **wrong)
    half = OnlineNorm(3)(torch.randn(4, 3, 5, 5, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's compiler asks for it itself
def test_online_goes_on_from_a_checkpoint_and_compiled() -> None:
    torch.manual_seed(0)
    images = torch.randn(6, 3, 12, 12)
    model = convert(NETS["pre-activation"](), images, method="online")
    (model(images).square().sum()).backward()
    other = convert(NETS["pre-activation"](), images, method="online")
    other.load_state_dict(model.state_dict())
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    outs, found = [], []
    for net in (model, other, compiled):
        net.zero_grad()
        out = net(images)
        out.square().sum().backward()
        outs.append(out.detach())
        found.append([p.grad for p in net.parameters()])
    for out, gradients in zip(outs[1:], found[1:], strict=True):
        torch.testing.assert_close(out, outs[0])
        torch.testing.assert_close(gradients, found[0], rtol=1e-4, atol=1e-5)


# bcn


def split(net: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in net.named_modules() if isinstance(module, BatchChannelNorm)}


@pytest.mark.parametrize("shape", [(6, 8, 4, 5), (6, 8, 7), (9, 8, 2, 3, 2)])
def test_bcn_is_batch_norm_and_then_group_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 3](8, momentum=0.3).double()
    layer = BatchChannelNorm(8, 4, rate=0.3).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    norm.load_state_dict({"weight": layer.weight, "bias": layer.bias}, strict=False)
    x = (3 * torch.randn(shape).double() + 1).requires_grad_()
    for training in (True, True, False):
        z = norm.train(training)(x)
        grouped = F.group_norm(z, 4, eps=layer.eps).view(shape[0], 4, -1)
        expected = (grouped * layer.group_weight[:, None] + layer.group_bias[:, None]).view(shape)
        found = layer.train(training)(x)
        torch.testing.assert_close(found, expected)
        g = torch.randn_like(found)
        torch.testing.assert_close(*(torch.autograd.grad(out, x, g)[0] for out in (found, expected)))
    torch.testing.assert_close(layer.mean, norm.running_mean)
    torch.testing.assert_close(layer.var, norm.running_var)


def test_bcns_estimates_are_the_published_ones() -> None:
    torch.manual_seed(0)
    layer = BatchChannelNorm(4, 2, estimate=True, rate=0.2).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    mean, var = np.zeros(4), np.ones(4)
    for _ in range(3):
        x = (2 * torch.randn(3, 4, 5, 5).double() - 1).requires_grad_()
        values, z = x.detach().numpy(), np.empty((3, 4, 5, 5))
        for c in range(4):
            var[c] = 0.8 * var[c] + 0.2 * ((values[:, c] - mean[c]) ** 2).mean()
            mean[c] = 0.8 * mean[c] + 0.2 * values[:, c].mean()
            own = float(layer.weight[c].detach()), float(layer.bias[c].detach())
            z[:, c] = own[0] * (values[:, c] - mean[c]) / np.sqrt(var[c] + 1e-5) + own[1]
        expected = np.empty_like(z)
        for n in range(3):
            for k in range(2):
                group = z[n, 2 * k : 2 * k + 2]
                scaled = (group - group.mean()) / np.sqrt(group.var() + 1e-5)
                scale, shift = layer.group_weight[k].detach(), layer.group_bias[k].detach()
                expected[n, 2 * k : 2 * k + 2] = scaled * float(scale) + float(shift)
        found = layer(x)
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(layer.mean.numpy(), mean)
        np.testing.assert_allclose(layer.var.numpy(), var)
        found.square().sum().backward()
        assert x.grad.isfinite().all()
    torch.testing.assert_close(layer.eval()(x), layer.train()(x), rtol=1, atol=1)  # by the same estimates


@pytest.mark.parametrize("estimate", [False, True])
def test_bcn_converts_and_standardizes(estimate: bool) -> None:
    torch.manual_seed(0)
    images = torch.randn(6, 3, 12, 12)
    model = NETS["mobile"]()
    converted = convert(model, images, method="bcn", estimate=estimate, rate=0.05)
    standardized = convert(model, images, method="ws_gn")
    layers = split(converted)
    assert len(layers) == len(plan(model, images, method="bcn"))
    assert all(layer.estimate == estimate and layer.rate == 0.05 for layer in layers.values())
    kinds = [
        {n: type(m) for n, m in net.named_modules() if n not in layers} for net in (converted, standardized)
    ]
    assert kinds[0] == kinds[1]
    twin = copy.deepcopy(converted)
    twin(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in twin.parameters())
    with pytest.raises(UserError, match="rate"):
        convert(model, images, method="bcn", rate=2.0)


# what they couple


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"method": "online"}, "OnlineNorm couples samples over time"),
        ({"method": "bcn"}, "BatchChannelNorm couples the batch"),
        ({"method": "bcn", "estimate": True}, "BatchChannelNorm couples the batch, and samples over time"),
    ],
)
def test_what_is_coupled_is_said(options: dict[str, Any], what: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 12, 12)
    model = NETS["pre-activation"]()
    assert all("couples" in row.reason for row in plan(model, images, **options))
    verdict = verify.batch_independence(convert(model, images, **options), images)
    assert not verdict
    assert what in str(verdict)
    # One batch does not show what a layer that has seen nothing couples over time.
    fresh = nn.Sequential(OnlineNorm(3, backward_decay=0.0).requires_grad_(False), nn.Flatten())
    assert not verify.batch_independence(fresh, images)
