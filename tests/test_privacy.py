"""Per-sample gradients are one backward pass for each sample, layer by layer and of whole converted models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from conversion_nets import resnet18
from torch import Tensor, nn

from nfnets import layers
from nfnets.convert import convert
from nfnets.errors import UserError
from nfnets.privacy import grad_sample_module, per_sample_gradients

CASES: list[tuple[nn.Module, tuple[int, ...]]] = [
    (layers.ScaledStdConv1d(4, 6, 3, padding=1, groups=2), (4, 9)),
    (layers.ScaledStdConv2d(3, 6, 3, stride=2, padding="tf_same", scale=1.7), (3, 9, 9)),
    (layers.ScaledStdConv2d(4, 6, 3, padding=2, dilation=2, padding_mode="circular", alpha=0.2), (4, 8, 8)),
    (layers.ScaledStdConv3d(2, 4, 3), (2, 5, 5, 5)),
    (layers.ScaledStdConvTranspose1d(4, 6, 3), (4, 5)),
    (layers.ScaledStdConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5)),
    (layers.ScaledStdConvTranspose3d(2, 4, 2), (2, 3, 3, 3)),
    (layers.ScaledStdLinear(7, 5), (7,)),
    (layers.ScaledStdLinear(7, 5), (3, 7)),
]


def one_by_one(module: nn.Module, images: Tensor, backprops: Tensor) -> dict[str, Tensor]:
    """The definition: a backward pass for each sample."""
    rows: dict[str, list[Tensor]] = {}
    for x, g in zip(images, backprops, strict=True):
        module.zero_grad()
        (module(x[None]) * g[None]).sum().backward()
        for name, p in module.named_parameters():
            if p.requires_grad:
                assert p.grad is not None
                rows.setdefault(name, []).append(p.grad.clone())
    return {name: torch.stack(found) for name, found in rows.items()}


@pytest.mark.parametrize(("layer", "shape"), CASES, ids=lambda v: type(v).__name__)
def test_a_layer(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    images = torch.randn(5, *shape)
    backprops = torch.randn_like(layer(images))
    found = per_sample_gradients(layer, [images], backprops)
    expected = one_by_one(layer, images, backprops)
    assert len(found) == len(expected) == 3
    for name, p in layer.named_parameters():
        torch.testing.assert_close(found[p], expected[name], rtol=1e-4, atol=1e-5)


def test_frozen_parameters_have_none() -> None:
    layer = layers.ScaledStdConv2d(3, 4, 3)
    layer.weight.requires_grad_(False)
    found = per_sample_gradients(layer, [torch.randn(2, 3, 5, 5)], torch.randn(2, 4, 3, 3))
    assert {id(p) for p in found} == {id(layer.gain), id(layer.bias)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [resnet18, torchvision.models.mobilenet_v2])
def test_a_converted_model_with_its_additions_and_activations_in_place(build: Any) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 32, 32)
    model = convert(build(num_classes=4), images, method="nf")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    pytest.importorskip("opacus")
    private = grad_sample_module(model, loss_reduction="sum")
    output = private(images)
    weights = torch.randn_like(output)
    (output * weights).sum().backward()
    found = {name: p.grad_sample for name, p in model.named_parameters()}
    private.disable_hooks()
    for name, expected in one_by_one(model, images, weights).items():
        assert (found[name] - expected).norm() <= 1e-4 * expected.norm().clamp(min=1e-3), name


@pytest.mark.filterwarnings("ignore")
def test_dp_sgd_takes_a_step() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 4
    opacus = pytest.importorskip("opacus")
    model: Any = grad_sample_module(convert(resnet18(num_classes=4), images, method="nf"))
    engine = opacus.PrivacyEngine()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 8)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    model, sgd, data = engine.make_private(
        module=model, optimizer=sgd, data_loader=data, noise_multiplier=1.0, max_grad_norm=1.0
    )
    before = [p.detach().clone() for p in model.parameters()]
    for x, y in data:
        sgd.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        sgd.step()
    assert all((p != b).any() for p, b in zip(model.parameters(), before, strict=True))
    assert engine.get_epsilon(1e-3) > 0


@pytest.mark.filterwarnings("ignore")
def test_batch_norm_is_refused_by_name() -> None:
    pytest.importorskip("opacus")
    images = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(UserError, match=r"^1: a BatchNorm2d, which normalizes by the batch: .*convert it"):
        grad_sample_module(model)
    ghosts = convert(model, images, method="ghost_bn", size=2)
    with pytest.raises(UserError, match=r'^1: a GhostBatchNorm, .*convert\(model, images, method="nf"\)'):
        grad_sample_module(ghosts)
    grad_sample_module(convert(ghosts, images, method="nf"))  # as it says


class Positions(nn.Linear):
    """As Swin's attention: a table of indices beside the parameters."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.register_buffer("index", torch.arange(3))


@pytest.mark.filterwarnings("ignore")
def test_other_layers_with_buffers_are_not_told_to_convert() -> None:
    pytest.importorskip("opacus")
    model = nn.Sequential(Positions(), nn.Linear(3, 2))
    with pytest.raises(
        UserError, match=r"^0: a trainable Positions with buffers \(index\).*freeze"
    ) as caught:
        grad_sample_module(model)
    assert "convert" not in str(caught.value)
    model[0].requires_grad_(False)
    grad_sample_module(model)


@pytest.mark.filterwarnings("ignore")
def test_every_method_that_leaves_no_batch_statistics_is_taken() -> None:
    pytest.importorskip("opacus")
    torch.manual_seed(0)
    images = torch.randn(3, 3, 12, 12)
    layers_of = lambda c: [nn.Conv2d(c, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]  # noqa: E731
    for method in ("nf", "fixed_variance", "fold", "lsuv", "gn", "ws_gn", "evonorm_s0"):
        model = convert(nn.Sequential(*layers_of(3), *layers_of(4)), images, method=method)
        private = grad_sample_module(model, loss_reduction="sum")
        output = private(images)
        weights = torch.randn_like(output)
        (output * weights).sum().backward()
        found = {name: p.grad_sample for name, p in model.named_parameters()}
        private.disable_hooks()
        for name, expected in one_by_one(model, images, weights).items():
            assert (found[name] - expected).norm() <= 1e-4 * expected.norm().clamp(min=1e-3), (method, name)
