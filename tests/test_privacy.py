"""Per-sample gradients are one backward pass for each sample, layer by layer and of whole converted models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from conversion_nets import resnet18
from soak import thinned
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock

from nfnets import layers
from nfnets.convert import convert, list_methods
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


MODES = ("hooks", "functorch", "ghost")
COUPLED = ("bcn", "ghost_bn", "online")
"""What Opacus must refuse."""


def small_resnet() -> nn.Module:
    """Torchvision's block, which adds its shortcut in place behind whatever stands for its last norm layer."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    return nn.Sequential(*stem, BasicBlock(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def images_and_labels(n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, 10, 10, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 4


def made_private(model: nn.Module, mode: str = "hooks", noise: float = 0.0) -> Any:
    opacus = pytest.importorskip("opacus")
    return opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 10.0),  # a step that rounding does not hide
        data_loader=DataLoader(TensorDataset(*images_and_labels()), 5),
        noise_multiplier=noise,
        max_grad_norm=0.1,
        grad_sample_mode=mode,
        poisson_sampling=False,
    )


def losses_one_by_one(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of each image's loss, a backward pass for each."""
    rows: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for x, y in zip(*images_and_labels(), strict=True):
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        for name, g in zip(rows, torch.autograd.grad(loss, [*model.parameters()]), strict=True):
            rows[name].append(g)
    return {name: torch.stack(found) for name, found in rows.items()}


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).norm() <= 1e-4 * expected.norm().clamp(min=1e-3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "mode"), thinned(sorted(list_methods()), MODES, 2))
def test_the_engine_takes_converted_models_as_they_are(method: str, mode: str) -> None:
    pytest.importorskip("opacus")
    model = convert(small_resnet(), images_and_labels()[0], method=method)
    if method in COUPLED:
        with pytest.raises(NotImplementedError, match=r"couples|normalizes by the batch"):
            made_private(model, mode)
        return
    expected = losses_one_by_one(model)
    private, optimizer, *criterion, loader = made_private(model, mode)
    (x, y) = next(iter(loader))
    loss = criterion[0] if criterion else nn.functional.cross_entropy
    optimizer.zero_grad()
    loss(private(x), y).backward()
    if mode != "ghost":
        assert [n for n, p in model.named_parameters() if not close(p.grad_sample, expected[n])] == []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    # The definition of DP-SGD's step without noise: gradients of norm 0.1 at most, their mean.
    norms = torch.cat([e.reshape(5, -1) for e in expected.values()], 1).norm(dim=1)
    shares = (0.1 / (norms + 1e-6)).clamp(max=1) / 5
    for name, p in model.named_parameters():
        step = 10 * torch.einsum("n,n...->...", shares, expected[name])
        assert (before[name] - p - step).norm() <= 1e-4 * step.norm() + 1e-6, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
def test_constants_are_those_of_the_moment(mode: str) -> None:
    """A checkpoint that is loaded into a private model brings constants, too."""
    pytest.importorskip("opacus")
    images = images_and_labels()[0]
    model, other = (convert(small_resnet(), scale * images, method="nf") for scale in (1, 3))
    private, *_ = made_private(model, mode)
    private.load_state_dict({f"_module.{name}": value for name, value in other.state_dict().items()})
    expected = losses_one_by_one(other)
    private.allow_grad_accumulation()
    total = nn.functional.cross_entropy(private(images), images_and_labels()[1])
    total.backward()
    for name, p in model.named_parameters():
        if mode == "ghost":
            rows = expected[name].reshape(5, -1).norm(dim=1)
            assert close(p._norm_sample, rows), name
        else:
            assert close(p.grad_sample, expected[name]), name


@pytest.mark.filterwarnings("ignore")
def test_the_model_is_left_as_it_was() -> None:
    pytest.importorskip("opacus")
    model = convert(small_resnet(), images_and_labels()[0], method="nf")
    before, state = repr(model), [*model.state_dict()]
    private, *_ = made_private(model)
    assert repr(model) == before
    assert [*model.state_dict()] == state
    private.remove_hooks()
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    model.register_full_backward_hook(lambda *_: None)  # of another kind than those that were there


class InPart(nn.Module):
    """Writes over half of what a layer put out, through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y[:, :2].mul_(2)
        y += 1
        return self.last(y.mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
def test_writing_over_a_part_of_an_output() -> None:
    pytest.importorskip("opacus")
    torch.manual_seed(0)
    model, images = InPart(), torch.randn(4, 3, 5, 5)
    weights = torch.randn(4, 2)
    private = grad_sample_module(model, loss_reduction="sum")
    (private(images) * weights).sum().backward()
    found = {name: p.grad_sample for name, p in model.named_parameters()}
    private.remove_hooks()
    for name, expected in one_by_one(model, images, weights).items():
        torch.testing.assert_close(found[name], expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_batch_norm_without_parameters_or_statistics_reads_the_batch_too(options: dict[str, bool]) -> None:
    pytest.importorskip("opacus")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.Flatten(), nn.Linear(256, 4))
    ghosts = convert(model, images_and_labels()[0], method="ghost_bn", size=2)
    for net in (model, ghosts):
        with pytest.raises(UserError, match=r"^1: a .*normalizes by the batch"):
            grad_sample_module(net)
    with pytest.raises(NotImplementedError, match="1: a GhostBatchNorm, which normalizes by the batch"):
        made_private(ghosts)


@pytest.mark.filterwarnings("ignore")
def test_a_batch_that_poisson_sampling_left_empty() -> None:
    pytest.importorskip("opacus")
    model = convert(small_resnet(), images_and_labels()[0], method="nf")
    private, optimizer, _ = made_private(model, noise=1.0)
    nn.functional.cross_entropy(private(torch.zeros(0, 3, 10, 10)), torch.zeros(0).long()).backward()
    assert model[0].weight.grad_sample.shape == (0, 8, 3, 3, 3)
    optimizer.step()
