from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import timm.optim
import torch
from conversion_nets import NETS
from torch import nn

from nfnets.agc import clip_grad_agc_
from nfnets.convert import convert
from nfnets.errors import UserError
from nfnets.layers import ScaledStdConv2d
from nfnets.train.config import RunConfig
from nfnets.train.loop.optim import Optimizer


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def optimizer(model: nn.Module, **fields: Any) -> Optimizer:
    return Optimizer(model, RunConfig.create(**({"lr": 0.01, "weight_decay": 0.1} | fields)))


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for step in steps:
        optimizer.torch.zero_grad()
        model(images + step).square().mean().backward()
        optimizer.set_lr(0.01 / (step + 1))
        optimizer.torch.step()


@pytest.mark.parametrize("name", ["lamb", "lion", "adabelief", "madgrad", "nesterov", "lookahead_radam"])
def test_timms_optimizers_with_our_groups(name: str):
    ours, theirs = net(), net()
    made = optimizer(ours, optimizer=name)
    train(ours, made, range(8))
    decayed = [p for p in theirs.parameters() if p.ndim > 1]
    others = [p for p in theirs.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    expected = Optimizer.__new__(Optimizer)
    expected.torch = timm.optim.create_optimizer_v2(groups, opt=name, lr=0.01)
    expected._shares = [1.0, 1.0]
    train(theirs, expected, range(8))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "adan", "muon", "lookahead_adamw"])
def test_a_restored_optimizer_goes_on_exactly(name: str):
    """Through a file that loads without code, as a resumed run does."""
    fields = {"optimizer": name, "clipping": 0.1}
    model = net()
    made = optimizer(model, **fields)
    train(model, made, range(4))
    file = io.BytesIO()
    torch.save([model.state_dict(), made.torch.state_dict()], file)
    train(model, made, range(4, 9))
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again = net()
    restored = optimizer(again, **fields)
    again.load_state_dict(weights)
    restored.torch.load_state_dict(state)
    train(again, restored, range(4, 9))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("head", [None, 1.0, 4.0])
@pytest.mark.parametrize("name", ["lamb", "lookahead_lion"])
def test_clipping_comes_before_timms_step(name: str, head: float | None):
    ours, theirs = net(), net()
    made = optimizer(ours, optimizer=name, clipping=0.01, clipping_head=head)
    plain = optimizer(theirs, optimizer=name)
    images = torch.randn(8, 1, 8, 8)
    for model in (ours, theirs):
        model(images).square().mean().backward()
    clip_grad_agc_([p for n, p in theirs.named_parameters() if n != "4.weight"], 0.01)
    if head is not None:
        clip_grad_agc_(theirs.get_parameter("4.weight"), 0.01 * head)
    made.torch.step()
    plain.torch.step()
    assert made.clipped is not None
    assert float(made.clipped) > 0
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_head_that_starts_at_zero_is_left_alone():
    model = net()
    with torch.no_grad():
        model[4].weight.zero_()
    made = optimizer(model, clipping=0.01, clipping_head=4.0)
    model(torch.randn(8, 1, 8, 8)).square().mean().backward()
    with torch.no_grad():
        model[4].weight.grad.fill_(1.0)
    made.torch.step()
    assert made.torch.state[model[4].weight]["momentum_buffer"].eq(1.0).all()  # as the gradient was


def test_options_reach_the_optimizer():
    group = optimizer(net(), optimizer="adamw", optimizer_options={"betas": [0.8, 0.95], "eps": 1e-6}).torch
    assert group.param_groups[0]["betas"] == (0.8, 0.95)
    assert group.param_groups[0]["eps"] == 1e-6
    lion = optimizer(net(), optimizer="lion", optimizer_options={"betas": [0.5, 0.9]}).torch
    assert lion.param_groups[1]["betas"] == (0.5, 0.9)
    plain = optimizer(net(), optimizer_options={"fused": False, "dampening": 0.0}).torch
    assert plain.param_groups[0]["fused"] is False


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"optimizer": "adamx"}, "unknown optimizer 'adamx': did you mean adam"),
        ({"optimizer": "adahessian"}, "second derivatives"),
        ({"optimizer": "lion", "momentum": 0.8}, "momentum=0.8: lion takes none"),
        ({"optimizer": "lamb", "optimizer_options": {"nonsense": 1}}, "optimizer lamb: .*nonsense"),
        ({"optimizer_options": {"nonsense": 1}}, "optimizer sgd: .*nonsense"),
        ({"optimizer": "adamw", "optimizer_options": {"eps": -1}}, "optimizer adamw: .*epsilon"),
    ],
)
def test_faults_in_one_line(fields: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says) as caught:
        optimizer(net(), **fields)
    assert "\n" not in str(caught.value)


def test_centralized_gradients_leave_the_filters_means() -> None:
    model = net()
    before = model[0].weight.detach().clone()  # pyright: ignore
    train(model, optimizer(model, centralization=True, clipping=0.1, weight_decay=0.0), range(4))
    moved = model[0].weight.detach() - before  # pyright: ignore
    assert float(moved.abs().max()) > 1e-3
    assert float(moved.mean((1, 2, 3)).abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["sgdp", "adamp"])
def test_projected_steps_have_no_part_along_standardized_weights(name: str) -> None:
    """AdamP, SGDP (arXiv 2006.08217): a scale-invariant weight grows by Pythagoras, ‖W + Δ‖² = ‖W‖² + ‖Δ‖²."""
    torch.manual_seed(0)
    images = torch.randn(16, 3, 12, 12)
    model = convert(NETS["pre-activation"](), images, method="nf")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, ScaledStdConv2d)}
    with torch.no_grad():  # what they rest on: the weight's length is not the net's business
        expected = model.eval()(images)
        for layer in layers.values():
            layer.weight *= 3
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
        for layer in layers.values():
            layer.weight /= 3
    along: dict[str, float] = {}
    for kind in (name, "sgd" if name == "sgdp" else "adamw"):
        twin = copy.deepcopy(model).train()
        made = optimizer(twin, optimizer=kind, weight_decay=0.0, lr=0.2 if "sgd" in kind else 0.01)
        found = {}
        for step in range(6):
            made.torch.zero_grad()
            loss = nn.functional.cross_entropy(twin(images.roll(step, 0)), torch.arange(16) % 5)
            loss.backward()
            before = {n: twin.get_submodule(n).weight.detach().clone() for n in layers}
            made.torch.step()
            for n, weight in before.items():
                moved = twin.get_submodule(n).weight.detach() - weight
                found[n] = float((moved * weight).sum().abs() / (moved.norm() * weight.norm()))
        along[kind] = max(found.values())
        assert len(found) > 5
    projected, plain = along.values()
    assert projected < 1e-4
    assert plain > 100 * projected
