"""Conversion beyond image classifiers: every method on every way that norm layers are used, and what each taught."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from conversion_nets import PreActivation, average_channel_variance
from coverage_nets import (
    DETECTION,
    SMALL,
    Attentive,
    Auxiliary,
    Case,
    Record,
    Siamese,
    detector,
    noise,
    pictures,
    record,
    repvgg,
    segmenter,
    targets,
    views,
)
from soak import thinned
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nfnets import verify
from nfnets.convert import ConversionError, convert, list_methods, plan
from nfnets.convert.methods.fixed_variance import FixedVariance
from nfnets.convert.methods.ghost_bn import GhostBatchNorm
from nfnets.errors import UserError
from nfnets.layers import Scale, ScaledStdConv2d, ScaledStdConvTranspose2d, _ScaledStd
from nfnets.trace import is_batch_norm_like, trace

RESIDUAL_ONLY = {"fixup", "skipinit"}
KEEPS_SIGNAL = {"nf", "gn", "ws_gn", "ghost_bn", "evonorm_s0", "fixed_variance"}


def floats(outputs: Any) -> list[Tensor]:
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]


def gradients(model: nn.Module, case: Case) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs in training mode and the gradient of a sum of them, by parameter."""
    torch.manual_seed(0)
    out = floats(model.train()(*case.inputs(), **case.kwargs()))
    sum((t * torch.linspace(-1, 1, t.numel()).view_as(t)).sum() + t.sum() for t in out).backward()
    return [t.detach() for t in out], {name: p.grad for name, p in model.named_parameters()}


def conforms(case: Case, method: str) -> None:
    torch.manual_seed(0)
    model = case.build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if method in RESIDUAL_ONLY and not case.residual:
        with pytest.raises(ConversionError, match=r"residual branch|inside a branch") as caught:
            convert(model, *case.inputs(), method=method, kwargs=case.kwargs())
        assert {row.action for row in caught.value.plan} == {"refuse"}
        return
    converted = convert(model, *case.inputs(), method=method, kwargs=case.kwargs())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert type(converted) is type(model)
    assert converted.training == model.training
    left = [module for module in converted.modules() if is_batch_norm_like(module)]
    assert all(isinstance(module, GhostBatchNorm) for module in left)
    assert bool(left) == (method == "ghost_bn")
    expected, had = gradients(model, case)
    out, has = gradients(converted, case)
    assert [t.shape for t in out] == [t.shape for t in expected]
    assert all(t.isfinite().all() for t in out)
    unused = {name for name, gradient in had.items() if gradient is None}
    missing = {name for name, gradient in has.items() if gradient is None}
    assert missing <= unused
    assert all(g.isfinite().all() for g in has.values() if g is not None)
    if method in KEEPS_SIGNAL:
        sizes = [
            (float(a.square().mean()), float(b.square().mean())) for a, b in zip(out, expected, strict=True)
        ]
        assert all(1 / 16 < a / b < 16 for a, b in sizes if b > 1e-6), sizes


@pytest.mark.parametrize(("name", "method"), thinned(SMALL, sorted(list_methods()), 3))
def test_every_method_on_every_net(name: str, method: str) -> None:
    conforms(SMALL[name], method)


@pytest.mark.parametrize(("kind", "method"), thinned(DETECTION, ["nf", "fold", "gn"], 3))
def test_detectors(kind: str, method: str) -> None:
    """Images and targets in lists and dicts, losses out; norm layers in body, pyramid and heads."""
    conforms(DETECTION[kind], method)


@pytest.mark.parametrize("method", ["nf", "fold", "lsuv"])
@pytest.mark.parametrize("kind", ["fcn", "deeplab"])
def test_segmentation(kind: str, method: str) -> None:
    """Dicts of maps; batch norm over a pooled 1×1 map; an auxiliary head."""
    conforms(Case(lambda: segmenter(kind), pictures(2, 64)), method)


@pytest.mark.parametrize(
    "name", ["unet", "vnet3d", "audio", "generator", "attentive", "siamese", "split", "byob"]
)
def test_samples_do_not_see_each_other(name: str) -> None:
    case = SMALL[name]
    converted = convert(case.build(), *case.inputs(), method="nf")
    verdict = verify.batch_independence(converted, *case.inputs())
    assert verdict, verdict


# torchvision's own models, as they come


@pytest.mark.parametrize("name", ["mc3_18", pytest.param("s3d", marks=pytest.mark.soak)])
def test_video_models_plan_on_meta(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
        x = torch.empty((2, 3, 16, 224, 224) if name == "s3d" else (2, 3, 4, 32, 32))
        converted = convert(model, x, method="nf")
    assert not any(is_batch_norm_like(module) for module in converted.modules())


def test_raft_takes_two_images() -> None:
    with torch.device("meta"):
        model = torchvision.models.optical_flow.raft_large(weights=None)
        pair = torch.empty(1, 3, 128, 128), torch.empty(1, 3, 128, 128)
        rows = plan(model, *pair, method="nf")
    norms = {path for path, module in model.named_modules() if is_batch_norm_like(module)}
    assert {row.path for row in rows} == norms
    assert {row.action for row in rows} == {"replace"}
    # α counts the encoder's residual branches, not the twelve updates of the flow that follow.
    ends = {row.reason.partition("α=")[2][:5] for row in rows if row.role == "branch end"}
    assert ends == {f"{math.sqrt(2 / 6):.3g}"}


def test_a_detector_needs_no_targets_to_be_converted() -> None:
    """In training mode it refuses images alone; its evaluation mode shows the same norm layers."""
    model = detector("retinanet").train()
    converted = convert(model, views(), method="nf")
    assert converted.training
    assert model.training
    assert not any(is_batch_norm_like(module) for module in converted.modules())
    assert sum(float(loss.detach()) for loss in converted(views(), targets()).values()) > 0
    with pytest.raises(UserError, match="forward fails"):
        convert(model, [torch.zeros(3, 64)], method="nf")


def test_a_frozen_detector_is_folded_exactly() -> None:
    torch.manual_seed(0)
    model = detector("maskrcnn", torchvision.ops.FrozenBatchNorm2d)
    for module in model.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            module.weight.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    model.eval().double()
    folded = convert(model, views64(), targets(masks=True), method="fold")
    assert not any(is_batch_norm_like(module) for module in folded.modules())
    seen: dict[str, list[Tensor]] = {}
    for name, net in (("before", model), ("after", folded)):
        features = net.backbone(torch.stack(views64()))
        seen[name] = [*features.values(), *tree_leaves(net.rpn.head(list(features.values())))]
    for before, after in zip(seen["before"], seen["after"], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


def views64() -> list[Tensor]:
    return [view.double() for view in views()]


# What these nets taught


def test_keyword_inputs() -> None:
    converted = convert(Record(), method="nf", kwargs=record())
    seen = {}
    trace(converted, visit=lambda n, out: seen.setdefault(n.path, average_channel_variance(out)), **record())
    assert float(seen["encoder.left.0"]) == pytest.approx(1, rel=1e-3)
    assert len(plan(Record(), record()["batch"], kwargs={"weight": 1.0})) == 3
    with pytest.raises(UserError, match="unexpected keyword argument 'wieght'"):
        convert(Record(), kwargs=record() | {"wieght": 1})
    with pytest.raises(UserError, match="expected a dict"):
        convert(Record(), kwargs=[1])  # pyright: ignore[reportArgumentType]


def test_a_head_that_runs_in_training_only_is_calibrated_too() -> None:
    model = Auxiliary().eval()
    converted = convert(model, *pictures()(), method="nf")
    assert not converted.training
    assert isinstance(converted.aux[0][0], ScaledStdConv2d)
    seen = {}
    trace(
        converted.train(),
        *pictures()(),
        visit=lambda n, out: seen.setdefault(n.path, average_channel_variance(out)),
    )
    assert float(seen["aux.0.0"]) == pytest.approx(1, rel=1e-3)


def test_alpha_counts_branches_that_follow_each_other() -> None:
    """An encoder that runs twice has as many residual branches as one that runs once."""
    converted = convert(Siamese(), noise(8, 3, 16, 16), noise(8, 3, 16, 16), method="nf")
    assert float(converted.last[0].alpha) == 1.0  # √(2/L) for L = 1, at most 1
    pre = convert(PreActivation(), noise(4, 3, 16, 16), method="nf")
    assert float(pre.blocks[0].conv2.alpha) == pytest.approx(math.sqrt(2 / 3))


def test_parallel_branch_ends_share_alpha() -> None:
    model = nn.Sequential(repvgg()[:4])
    converted = convert(model, noise(4, 3, 32, 32), method="nf", alpha=0.5)
    block = converted[0][3]
    for end in (block.conv_kxk.conv, block.conv_1x1.conv):
        assert float(end.alpha) == pytest.approx(0.5 / math.sqrt(2))
    skip = convert(timm.create_model("test_byobnet"), noise(2, 3, 64, 64), method="nf")
    assert not any(is_batch_norm_like(module) for module in skip.modules())


def test_skipinit_starts_every_parallel_path_at_zero() -> None:
    block = timm.models.byobnet.RepVggBlock
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), block(8, 8), nn.Flatten(), nn.Linear(2048, 3)
    )
    for method in ("skipinit", "fixup"):
        converted = convert(model, noise(2, 3, 16, 16), method=method)
        x = noise(2, 8, 16, 16).relu()
        torch.testing.assert_close(converted[2](x), x)


def test_a_layer_norm_in_the_head_stays() -> None:
    head = nn.Sequential(nn.Flatten(), nn.LayerNorm(2048), nn.Linear(2048, 3))
    block = timm.models.byobnet.RepVggBlock
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), block(8, 8), head)
    for method in ("fixup", "skipinit"):
        converted = convert(model, noise(2, 3, 16, 16), method=method)
        assert isinstance(converted[3][1], nn.LayerNorm)
        assert not any(is_batch_norm_like(module) for module in converted.modules())


def test_norm_layers_inside_a_norm_layer_go_with_it() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU))
    net = timm.layers.convert_splitbn_model(net, 2)
    rows = plan(net, noise(4, 3, 8, 8), method="nf")
    assert [row.path for row in rows] == ["1"]
    assert isinstance(convert(net, noise(4, 3, 8, 8), method="nf")[1].act, nn.SiLU)


def test_a_dropout_fused_into_a_norm_layer_stays() -> None:
    norm = timm.layers.BatchNormAct2d(8, drop_layer=lambda: nn.Dropout2d(0.5))
    new = convert(nn.Sequential(nn.Conv2d(3, 8, 3), norm), noise(4, 3, 8, 8), method="nf")[1]
    assert [type(part) for part in new] == [nn.Dropout2d, nn.ReLU]


def test_constants_of_an_earlier_conversion_stay() -> None:
    x = noise(4, 3, 16, 16)
    first = convert(PreActivation(), x, include=["blocks.0", "blocks.2"])
    constants = {name: buffer.clone() for name, buffer in first.named_buffers() if "blocks" in name}
    constants = {k: v for k, v in constants.items() if k.endswith(("scale", "alpha", "value"))}
    both = convert(first, 3 * x + 1)
    assert not any(is_batch_norm_like(module) for module in both.modules())
    now = dict(both.named_buffers())
    assert len(constants) == 10
    assert all(torch.equal(now[name], value) for name, value in constants.items())
    other = convert(convert(PreActivation(), x, include="blocks.1"), 3 * x)
    assert float(other.stem.scale) != 1.0  # new ones are measured


def test_ready_made_layers_keep_their_constants() -> None:
    net = nn.Sequential(ScaledStdConv2d(3, 8, 3, scale=0.3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    converted = convert(net, noise(4, 3, 8, 8), method="nf")
    assert float(converted[0].scale) == pytest.approx(0.3)
    assert float(converted[2].scale) != 1.0


@pytest.mark.parametrize(
    ("build", "becomes"),
    [
        (
            lambda: nn.ConvTranspose2d(1, 8, 1),
            nn.ConvTranspose2d,
        ),  # fan-in 1, with 8 weights an input channel
        (lambda: nn.ConvTranspose2d(4, 2, 1), ScaledStdConvTranspose2d),
        (lambda: nn.ConvTranspose2d(4, 8, 3, groups=4), nn.ConvTranspose2d),  # depthwise
        (lambda: nn.Conv2d(4, 8, 1, groups=4), nn.Conv2d),
        (lambda: timm.layers.Conv2dSame(4, 8, 3), ScaledStdConv2d),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3)), nn.Conv2d),
    ],
)
def test_what_is_standardized(build: Callable[[], nn.Module], becomes: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layer = build()
    units = layer.out_channels
    net = nn.Sequential(layer, nn.BatchNorm2d(units))
    converted = convert(net, noise(2, layer.in_channels, 8, 8), method="nf")
    assert isinstance(converted[0], becomes)
    assert isinstance(converted[0], _ScaledStd) == issubclass(becomes, _ScaledStd)
    assert isinstance(converted[1], nn.Identity if issubclass(becomes, _ScaledStd) else Scale)
    out = converted(noise(2, layer.in_channels, 8, 8))
    assert float(average_channel_variance(out.detach())) == pytest.approx(1, rel=1e-3)


def test_a_linear_layer_over_tokens_is_measured_over_its_own_channels() -> None:
    converted = convert(Attentive(), noise(4, 3, 16, 16), method="nf")
    assert isinstance(converted.norm, Scale)  # a reshape stands between it and the linear
    assert isinstance(convert(Attentive(), noise(4, 3, 16, 16), method="fixed_variance").norm, FixedVariance)


def test_what_writes_nothing_hides_nothing() -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            padded = x.new_zeros(len(x), 3, 12, 12)
            padded[:, :, 1:-1, 1:-1].copy_(x)  # as detectors batch images of different sizes
            return self.norm(self.conv(padded).float().contiguous())

    graph = trace(Casts(), noise(2, 3, 10, 10))
    assert graph.depends(graph.calls("conv")[0].index, 0)
    (row,) = plan(Casts(), noise(2, 3, 10, 10), method="nf")
    assert row.reads == "conv"
    assert row.replaced == "Identity"


def test_inputs_of_the_original_are_not_written_to() -> None:
    inputs, found = views(), targets()
    before = copy.deepcopy((inputs, found))
    convert(detector("fcos"), inputs, found, method="nf")
    for now, then in zip(tree_leaves((inputs, found)), tree_leaves(before), strict=True):
        assert torch.equal(now, then)
