"""Every conversion method on every kind of net, and each method against what it stands for."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from conversion_nets import NETS, RESIDUAL, PreActivation, resnet18, resnet50
from hypothesis import given, settings
from hypothesis import strategies as st
from soak import thinned
from torch import Tensor, nn

from nfnets import param_groups, verify
from nfnets.convert import (
    Change,
    ConversionError,
    Method,
    Net,
    Start,
    Target,
    convert,
    list_methods,
    plan,
    register,
)
from nfnets.convert.methods.base import _METHODS
from nfnets.convert.methods.evonorm_s0 import EvoNormS0
from nfnets.convert.methods.fixed_variance import FixedVariance
from nfnets.convert.methods.ghost_bn import GhostBatchNorm
from nfnets.convert.methods.parts import group_count
from nfnets.errors import UserError
from nfnets.init import ScalarBias, ScalarMultiplier
from nfnets.layers import Scale, ScaledStdConv2d, SkipInit
from nfnets.trace import is_batch_norm_like

METHODS = sorted(list_methods())
COUPLED = {"bcn", "ghost_bn", "online"}
RESIDUAL_ONLY = {"fixup", "skipinit"}
KEEPS_SIGNAL = {"nf", "gn", "ln", "ws_gn", "bcn", "ghost_bn", "evonorm_s0", "fixed_variance"}


def images(n: int = 8, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("name", "method"), thinned(NETS, METHODS, 3))
def test_every_method_conforms(name: str, method: str) -> None:
    torch.manual_seed(0)
    model = NETS[name]()
    before, ids = bits(model), {path: id(module) for path, module in model.named_modules()}
    torch.manual_seed(1)
    if method in RESIDUAL_ONLY and name not in RESIDUAL:
        with pytest.raises(ConversionError, match="no residual branch") as caught:
            convert(model, images(), method=method)
        assert {row.action for row in caught.value.plan} == {"refuse"}
        converted = None
    else:
        converted = convert(model, images(), method=method)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert {path: id(module) for path, module in model.named_modules()} == ids
    if converted is None:
        return

    norms = {path for path, module in model.named_modules() if is_batch_norm_like(module)}
    inside = {path for path in ids if any(path.startswith(f"{norm}.") for norm in norms)}
    kept = {path for path, _ in converted.named_modules()}
    assert set(ids) - inside <= kept
    assert {path for path in inside if path.endswith(".act")} <= kept or method == "evonorm_s0"
    assert type(converted) is type(model)
    left = [module for module in converted.modules() if is_batch_norm_like(module)]
    assert all(isinstance(module, GhostBatchNorm) for module in left)
    assert bool(left) == (method == "ghost_bn")
    assert not {id(p) for p in converted.parameters()} & {id(p) for p in model.parameters()}

    twin = copy.deepcopy(converted).train()
    out = twin(images())
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    missing = [key for key, p in twin.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert torch.isfinite(out).all()
    assert missing == []
    verdict = verify.batch_independence(converted, images())
    assert bool(verdict) == (method not in COUPLED), verdict
    if method in KEEPS_SIGNAL:
        reference = copy.deepcopy(model).train()(images())
        assert 0.25 < float((out.std() / reference.std()).detach()) < 4

    converted.eval()
    expected = converted(images())
    assert torch.equal(copy.deepcopy(converted)(images()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(converted))(images()), expected)
    buffer = io.BytesIO()
    torch.save(converted.state_dict(), buffer)
    buffer.seek(0)
    other = convert(model, 2 * images(), method=method).eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    torch.testing.assert_close(other(images()), expected)


@pytest.mark.parametrize("method", METHODS)
def test_converting_again_changes_nothing(method: str) -> None:
    model = convert(PreActivation(), images(), method=method)
    again = convert(model, images(), method=method)
    assert again is not model
    assert repr(again) == repr(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    assert not any(row.action == "replace" for row in plan(model, images(), method=method))
    assert convert(pickle.loads(pickle.dumps(model)), images(), method=method, inplace=True)


@pytest.mark.parametrize("method", METHODS)
def test_on_meta_only_the_architecture_changes(method: str) -> None:
    torch.manual_seed(0)
    real = convert(PreActivation(), images(), method=method)
    with torch.device("meta"):
        model = convert(PreActivation(), torch.empty(8, 3, 32, 32), method=method)
    model.load_state_dict(real.state_dict(), assign=True)
    torch.testing.assert_close(model.eval()(images()), real.eval()(images()))


@pytest.mark.parametrize("method", METHODS)
def test_type_and_mode_are_kept(method: str) -> None:
    model = convert(PreActivation().double().eval(), images().double(), method=method)
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    assert {t.dtype for t in tensors} == {torch.float64}
    assert not any(module.training for module in model.modules())
    assert model(images().double()).dtype == torch.float64


@pytest.mark.parametrize("method", ["gn", "ln", "ws_gn", "ghost_bn", "evonorm_s0", "online", "bcn"])
def test_affine_map_and_eps_are_carried_over(method: str) -> None:
    norm = nn.BatchNorm2d(8, eps=0.03)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    new = convert(nn.Sequential(nn.Conv2d(3, 8, 3), norm), images(), method=method)[1]
    assert torch.equal(new.weight, norm.weight)
    assert torch.equal(new.bias, norm.bias)
    assert new.eps == norm.eps


# gn, ws_gn


@given(channels=st.integers(1, 600), space=st.sampled_from([1, 4, 49, 1024]))
def test_group_counts(channels: int, space: int) -> None:
    groups = group_count(channels, space)
    fitting = [
        g for g in range(1, 33) if channels % g == 0 and channels >= 2 * g and channels // g * space >= 16
    ]
    assert groups == max(fitting, default=1)


def test_gn_is_torchs_group_norm() -> None:
    conv, norm = nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24)
    nn.init.normal_(norm.weight)
    converted = convert(nn.Sequential(conv, norm), images(), method="gn", num_groups=6)
    expected = F.group_norm(conv(images()), 6, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(converted(images()), expected)


def test_features_without_space_do_not_collapse() -> None:
    """Two values in a group would leave nothing of them but their order."""
    net = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64))
    converted = convert(net, torch.randn(8, 20), method="gn")
    assert converted[1].num_groups == 4
    assert len(converted(torch.randn(8, 20)).detach().round(decimals=3).unique()) > 100
    with pytest.raises(ConversionError, match="too few to normalize"):
        convert(net, torch.randn(8, 20), method="gn", num_groups=32)
    with pytest.raises(ConversionError, match="does not divide"):
        convert(net, torch.randn(8, 20), method="evonorm_s0", num_groups=7)


def test_a_missing_affine_map_stays_missing() -> None:
    net = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64, affine=False, track_running_stats=False))
    assert convert(net, torch.randn(8, 20), method="gn")[1].weight is None
    ghost = convert(net, torch.randn(8, 20), method="ghost_bn")[1]
    assert (ghost.weight, ghost.running_mean) == (None, None)
    torch.testing.assert_close(ghost.eval()(images()[:, 0, :2].flatten(1)).mean(0), torch.zeros(64))


def test_frozen_norms_get_a_trainable_group_norm_and_keep_no_ghost() -> None:
    frozen = torchvision.ops.FrozenBatchNorm2d(8)
    frozen.weight.normal_()
    net = nn.Sequential(nn.Conv2d(3, 8, 3), frozen)
    (row,) = plan(net, images(), method="gn")
    assert (row.action, row.reason.partition(":")[0]) == ("leave", "frozen")  # unless it is asked for
    grouped = convert(net, images(), method="gn", include="1")[1]
    assert torch.equal(grouped.weight, frozen.weight)
    assert grouped.weight.requires_grad
    (row,) = plan(net, images(), method="ghost_bn", include="1")
    assert (row.action, row.reason) == ("leave", "frozen: it never reads the batch")


def test_ws_gn_standardizes_what_norms_read() -> None:
    model = convert(PreActivation(), images(), method="ws_gn")
    assert isinstance(model.stem, ScaledStdConv2d)
    assert isinstance(model.blocks[2].conv2, ScaledStdConv2d)
    assert type(model.fc) is nn.Linear
    rows = model.blocks[0].conv1.effective_weight().flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(16), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.square().sum(1), torch.ones(16))
    mobile = convert(NETS["mobile"](), images(), method="ws_gn")
    assert type(mobile[3].depthwise[0]) is nn.Conv2d


# ghost_bn


@settings(max_examples=30, deadline=None)
@given(samples=st.integers(2, 40), size=st.integers(1, 33))
def test_ghost_chunks_cover_the_batch(samples: int, size: int) -> None:
    sizes = [
        len(c) for c in torch.tensor_split(torch.zeros(samples), GhostBatchNorm(1, size).chunks(samples))
    ]
    assert sum(sizes) == samples
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(2, size)
    assert max(sizes) <= max(size, 3)


@pytest.mark.parametrize(("samples", "size", "sizes"), [(8, 4, [4, 4]), (10, 4, [4, 3, 3]), (3, 32, [3])])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_ghost_moments_are_those_of_each_chunk(samples, size, sizes, momentum) -> None:
    """As in Composer's tests: every chunk is normalized by its own moments; the last one is smaller."""
    ghost = GhostBatchNorm(5, size, momentum=momentum, eps=1e-12)
    nn.init.normal_(ghost.running_mean)
    before = ghost.running_mean.clone()
    x = torch.randn(samples, 5, 6, 6) * 3 + 7
    chunks, outputs = x.split(sizes), ghost(x).split(sizes)
    for chunk, out in zip(chunks, outputs, strict=True):
        var, mean = torch.var_mean(chunk, (0, 2, 3), correction=0)
        expected = (chunk - mean[:, None, None]) / var[:, None, None].sqrt()
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    share = momentum or 1.0
    means = sum(len(c) / samples * c.mean((0, 2, 3)) for c in chunks)
    variances = sum(len(c) / samples * c.var((0, 2, 3)) for c in chunks)
    torch.testing.assert_close(ghost.running_mean, (1 - share) * before + share * means)
    torch.testing.assert_close(ghost.running_var, (1 - share) + share * variances)
    assert int(ghost.num_batches_tracked) == 1


@pytest.mark.parametrize("momentum", [0.1, None])
def test_ghost_bn_of_one_chunk_is_batchnorm(momentum: float | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=momentum), nn.ReLU())
    ghost = convert(model, images(), method="ghost_bn", size=8)
    for _ in range(3):
        x = torch.randn(8, 3, 8, 8)
        torch.testing.assert_close(ghost(x), model(x))
    torch.testing.assert_close(ghost.state_dict(), model.state_dict())
    torch.testing.assert_close(ghost.eval()(images()), model.eval()(images()))


# evonorm_s0


@pytest.mark.parametrize("shape", [(4, 32, 7, 7), (2, 32, 1, 3)])
def test_evonorm_is_timms(shape: tuple[int, ...]) -> None:
    ours, theirs = EvoNormS0(32, 8), timm.layers.EvoNorm2dS0(32, 8)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape, requires_grad=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(m(x).square().sum(), x)[0] for m in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_evonorm_without_gate_is_division_by_the_group_std() -> None:
    x = torch.randn(4, 12, 5)
    std = x.view(4, 3, 20).var(2, correction=0).add(1e-5).sqrt().repeat_interleave(4, 1)
    torch.testing.assert_close(EvoNormS0(12, 3, gate=False)(x), x / std[..., None])


def test_evonorm_takes_over_activations_that_are_its_own() -> None:
    def gates(model: nn.Module) -> list[bool]:
        found = convert(model, images(), method="evonorm_s0")
        return [m.v is not None for m in found.modules() if isinstance(m, EvoNormS0)]

    conv, bn, relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    assert gates(nn.Sequential(conv, bn, relu)) == [True]
    assert gates(nn.Sequential(conv, bn, nn.Sigmoid())) == [False]  # a gate bounds its output: not absorbed
    assert gates(nn.Sequential(conv, timm.layers.BatchNormAct2d(8))) == [True]
    both = nn.Sequential(conv, bn, relu, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), relu)
    assert gates(both) == [True, True]  # shared, but by norm layers only
    other = nn.Sequential(conv, bn, relu, nn.Conv2d(8, 8, 3), relu)
    assert gates(other) == [False]  # somebody else needs it
    converted = convert(other, images(), method="evonorm_s0")
    assert isinstance(converted[2], nn.ReLU)
    # torchvision's blocks share one ReLU between a norm layer and the sum; the stem has its own.
    resnet = convert(resnet18(), images(), method="evonorm_s0")
    assert resnet.bn1.v is not None
    assert resnet.layer1[0].bn1.v is None
    assert isinstance(resnet.relu, nn.Identity)


# fixed_variance


@pytest.mark.parametrize("measure", [False, True])
def test_fixed_variance_is_katagos_bookkeeping(measure: bool) -> None:
    """Block i of a pre-activation trunk gets 1/√(i + 1), the norm layer at its end 1/√(blocks + 1)."""
    torch.manual_seed(0)
    net = PreActivation(64)
    for conv in [m for m in net.modules() if isinstance(m, nn.Conv2d)]:
        conv.padding_mode = "circular"
        gain = 1.0 if conv is net.stem else 1 / ((1 - 1 / math.pi) / 2)  # undoes what a ReLU does to N(0, 1)
        with torch.no_grad():
            rows = torch.randn(64, conv.weight[0].numel())
            rows = (rows - rows.mean(1, keepdim=True)) / rows.std(1, correction=0, keepdim=True)
            conv.weight.copy_((rows * (gain / rows.shape[1]) ** 0.5).view_as(conv.weight))
    model = convert(net, images(16), method="fixed_variance", measure=measure)
    constants = [float(block.bn1.value) for block in model.blocks] + [float(model.last.value)]
    expected = [(i + 1) ** -0.5 for i in range(4)]
    # The first constants are exact; measured variances of one draw of 64 channels scatter.
    assert constants == pytest.approx(expected, rel=0.12 if measure else 0.02)
    assert [float(block.bn2.value) for block in model.blocks] == pytest.approx([1] * 3, rel=0.12)
    seen = []
    for module in model.modules():
        if isinstance(module, FixedVariance):
            module.register_forward_hook(lambda _m, _a, out: seen.append(float(out.detach().square().mean())))
    model(images(16))
    assert seen == pytest.approx([1.0] * 7, rel=1e-3 if measure else 0.25)


def test_fixed_variance_leaves_the_weights() -> None:
    """But the head's, by one factor: what it reads is not the size that BatchNorm's was, with most initial weights."""
    net = NETS["mobile"]()
    converted = convert(net, images(), method="fixed_variance").state_dict()
    weights = {path: m.weight for path, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    head = weights.popitem()
    assert all(torch.equal(converted[f"{path}.weight"], weight) for path, weight in weights.items())
    share = converted[f"{head[0]}.weight"] / head[1]
    torch.testing.assert_close(share, share.mean().expand_as(share))


# lsuv


@pytest.mark.parametrize("alpha", [1.0, None])
def test_lsuv_gives_every_convolution_unit_variance_and_a_bias(alpha: float | None) -> None:
    """But α = √(2/8) to the last ones of the 8 blocks, unless the paper's 1 is asked for."""
    original = NETS["resnet18"]()
    model = convert(original, images(), method="lsuv", alpha=alpha)
    share = model.fc.weight / original.fc.weight  # it fed no norm layer: not drawn anew
    torch.testing.assert_close(share, share.mean().expand_as(share))
    stds = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is not None, path
            module.register_forward_hook(lambda _m, _a, out, path=path: stds.update({path: float(out.std())}))
    with torch.no_grad():
        model(images())
    last = alpha or 0.5
    expected = {path: last if path.endswith("conv2") else 1.0 for path in stds}
    assert stds == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", ["lsuv", "skipinit", "fixup"])
def test_nothing_writes_over_a_shortcut_once_the_norm_layer_is_gone(method: str) -> None:
    """Its in-place ReLU did so to the norm layer's output; the stream must not get it in its place."""
    torch.manual_seed(0)
    model = convert(PreActivation(), images(), method=method)
    for name, p in model.named_parameters():
        if name.endswith("skip_gain"):
            nn.init.constant_(p, 0.7)
    apart = copy.deepcopy(model)
    for block in apart.blocks:
        block.relu.inplace = False
    torch.testing.assert_close(model(images()), apart(images()))
    fused = nn.Sequential(nn.ReLU(), timm.layers.BatchNormAct2d(3), nn.Conv2d(3, 8, 1))
    convert(fused, images(), method="lsuv")(images()).sum().backward()  # ReLU's backward reads its output


@pytest.mark.parametrize("method", ["nf", "lsuv", "ws_gn", "skipinit"])
def test_a_stream_that_starts_small_stays_small(method: str) -> None:
    """Layers that norm layers read through sums only keep their scale, and so does what is added beside them."""

    class Hybrid(PreActivation):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16))
            for layer in [self.stem, self.mlp[1], self.fc, *(b.conv2 for b in self.blocks)]:
                nn.init.normal_(layer.weight, std=0.005)
            nn.init.zeros_(self.mlp[1].bias)

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks(self.stem(x))
            self.seen = x = x + self.mlp(x.movedim(1, -1)).movedim(-1, 1)
            return self.fc(self.last(x).relu().mean((2, 3)))

    torch.manual_seed(0)
    model = Hybrid()
    converted = convert(model, images(), method=method)
    outputs = [net(images()).detach().square().mean().sqrt() for net in (model, converted)]
    streams = [net.seen.detach().square().mean().sqrt() for net in (model, converted)]
    assert 0.3 < float(streams[1] / streams[0]) < 3.4
    assert 0.4 < float(outputs[1] / outputs[0]) < 2.5


# fixup, skipinit


def test_fixup_of_a_torchvision_resnet() -> None:
    torch.manual_seed(0)
    model = convert(resnet50(), images(2), method="fixup")
    block = model.layer2[0]
    assert isinstance(model.bn1, ScalarBias)
    assert isinstance(block.bn1, ScalarBias)
    assert [type(m) for m in block.bn3] == [ScalarMultiplier, ScalarBias]
    assert isinstance(block.downsample[1], nn.Identity)
    assert not block.conv3.weight.any()
    fan_out = 32 * 9
    expected = (2 / fan_out) ** 0.5 * 16 ** (-1 / 4)  # L = 16 branches of m = 3 layers
    assert block.conv2.weight.std().item() == pytest.approx(expected, rel=0.02)
    x = torch.rand(2, 64, 8, 8)
    assert torch.equal(model.layer1[1].eval()(x), x)
    assert not model(images(2)).any()
    groups = {g["name"]: g for g in param_groups(model, 0.1, 0.0)}
    assert groups["scalars"]["lr"] == pytest.approx(0.01)
    assert (
        len(groups["scalars"]["params"]) == 1 + 16 * 4
    )  # stem; two inner biases, multiplier and bias a block


def test_fixup_and_skipinit_put_a_scalar_where_no_norm_ends_the_branch() -> None:
    fixup = convert(PreActivation(), images(), method="fixup")
    assert fixup.blocks[0].conv2.skip_gain.item() == 1
    assert len(next(g for g in param_groups(fixup, 0.1, 0.0) if g["name"] == "scalars")["params"]) == 7 + 3
    skip = convert(PreActivation(), images(), method="skipinit", value=0.25)
    assert [block.conv2.skip_gain.item() for block in skip.blocks] == [0.25] * 3
    assert all(block.conv1.bias is not None for block in skip.blocks)


def test_skipinit_of_a_torchvision_resnet() -> None:
    model = convert(resnet18(), images(2), method="skipinit")
    blocks = [m for m in model.modules() if isinstance(m, torchvision.models.resnet.BasicBlock)]
    assert all(isinstance(block.bn2, SkipInit) and block.bn2.gain.item() == 0 for block in blocks)
    assert all(block.conv1.bias is not None and block.conv2.bias is not None for block in blocks)
    x = torch.rand(2, 16, 8, 8)
    assert torch.equal(model.layer1[0](x), x)


@pytest.mark.parametrize("method", sorted(RESIDUAL_ONLY))
def test_branches_inside_branches_have_scalars_of_their_own(method: str) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = PreActivation(), nn.Conv2d(16, 16, 1)
            self.norm = nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner.stem(x)
            return x + self.norm(self.outer(self.inner.blocks(x)))

    model = convert(Nested(), images(), method=method)
    assert len([n for n, _ in model.named_parameters() if n.endswith("skip_gain")]) == 3
    kind = SkipInit if method == "skipinit" else ScalarMultiplier
    assert len([m for m in model.modules() if isinstance(m, kind)]) == 1
    torch.testing.assert_close(model(images()), model.inner.stem(images()))


@pytest.mark.parametrize("method", sorted(RESIDUAL_ONLY))
def test_layer_norms_and_their_branches_stay(method: str) -> None:
    """A hybrid: a branch with a batch norm, then one with a layer norm, which is no business of these methods."""

    class Hybrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv, self.bn = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
            self.ln, self.mlp, self.fc = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 5)
            self.last = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = (x + self.bn(self.conv(x))).mean((2, 3))
            return self.fc(self.last(x + self.mlp(self.ln(x))))  # a norm layer reads that branch's sum

    model = Hybrid()
    converted = convert(model, images(), method=method)
    assert torch.equal(converted.mlp.weight, model.mlp.weight)
    assert torch.equal(converted.ln.weight, model.ln.weight)
    assert sum(n.endswith("gain") or n.endswith("scale") for n, _ in converted.named_parameters()) == 1
    h = model.stem(images())
    assert torch.equal(converted.bn(converted.conv(h)), torch.zeros_like(h))


# What holds of conversion whatever the method


def test_include_and_exclude() -> None:
    model = resnet18()
    part = convert(model, images(), method="gn", include=["layer4", "bn1"], exclude="*.downsample.*")
    left = {path for path, module in part.named_modules() if is_batch_norm_like(module)}
    rows = plan(model, images(), method="gn", include=["layer4", "bn1"], exclude="*.downsample.*")
    assert {row.path for row in rows if row.action == "leave"} == left
    assert {row.reason for row in rows if row.path == "layer4.0.downsample.1"} == {"exclude='*.downsample.*'"}
    assert isinstance(part.bn1, nn.GroupNorm)
    assert isinstance(part.layer4[1].bn2, nn.GroupNorm)
    assert isinstance(part.layer1[0].bn1, nn.BatchNorm2d)
    assert len(rows) == 20
    rest = convert(part, images(), method="gn")
    assert not any(is_batch_norm_like(m) for m in rest.modules())
    with pytest.raises(UserError, match=r"layer4\.0\.bn1"):
        convert(model, images(), include="layer4.0.bn7")


def test_layers_of_norms_that_stay_are_not_standardized() -> None:
    part = convert(PreActivation(), images(), exclude="last")
    assert isinstance(part.last, nn.BatchNorm2d)
    assert isinstance(part.blocks[1].conv2, ScaledStdConv2d)  # the next block's norm layer reads it
    alone = convert(PreActivation(), images(), include="blocks.0.bn2")
    assert [path for path, m in alone.named_modules() if isinstance(m, ScaledStdConv2d)] == ["blocks.0.conv1"]


def test_a_model_that_never_had_norms_is_still_an_error() -> None:
    with pytest.raises(UserError, match="no BatchNorm layer"):
        convert(nn.Conv2d(3, 4, 3), images())
    with pytest.raises(UserError, match="expected the model that it is a part of"):
        convert(nn.BatchNorm2d(3), images())


@pytest.fixture
def identity_method() -> Iterator[str]:
    @register
    @dataclass
    class Drop(Method):
        """Every norm layer becomes a constant."""

        name = "test_drop"
        factor: float = 1.0

        def decide(self, net: Net) -> Iterator[Change | Start]:
            def build(norm: nn.Module) -> nn.Module:
                return FixedVariance(norm.num_features, self.factor)

            def start(model: nn.Module, *inputs: Tensor) -> None:
                if self.factor < 0:
                    raise RuntimeError("broken")

            yield from (Change(site, build, why="a constant") for site in net.sites)
            yield Start(start, "breaks if it is told to")

    yield Drop.name
    del _METHODS[Drop.name]


def test_a_users_own_method(identity_method: str) -> None:
    model = convert(NETS["vgg"](), images(), method=identity_method, factor=0.5)
    assert [float(m.value) for m in model.modules() if isinstance(m, FixedVariance)] == [0.5] * 4
    with pytest.raises(UserError, match="did you mean factor"):
        convert(NETS["vgg"](), images(), method=identity_method, fcator=0.5)
    net = NETS["vgg"]()
    ids = {path: id(module) for path, module in net.named_modules()}
    with pytest.raises(RuntimeError, match="broken"):
        convert(net, images(), method=identity_method, factor=-1.0, inplace=True)
    assert {path: id(module) for path, module in net.named_modules()} == ids


def test_an_edit_that_fails_is_undone(identity_method: str) -> None:
    class Odd(nn.BatchNorm2d):
        num_features = property(lambda self: 1 / 0, lambda self, value: None)

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), Odd(8))
    before = list(net)
    with pytest.raises(ZeroDivisionError):
        convert(net, images(), method=identity_method, inplace=True)
    assert all(now is then for now, then in zip(net, before, strict=True))


def _decides(**body: object) -> str:
    """The name of a method with these attributes, registered until `own_methods` ends."""
    kind = dataclass(type("Mine", (Method,), {"name": "test_mine", "__module__": __name__, **body}))
    _METHODS["test_mine"] = kind
    return "test_mine"


@pytest.fixture
def own_methods() -> Iterator[None]:
    yield
    _METHODS.pop("test_mine", None)


MISTAKES = {
    "nothing": (lambda self, net: None, "decides None: expected changes"),
    "no change": (lambda self, net: ["bn"], "yields a str: expected a Change"),
    "a name alone": (lambda self, net: [Change(s, "Identity") for s in net.sites], "replaces nothing"),
    "a module": (
        lambda self, net: [Change(s, nn.Identity()) for s in net.sites],
        "pass lambda norm: Identity",
    ),
    "another action": (
        lambda self, net: [Change(s, action="skip") for s in net.sites],
        "expected one of replace",
    ),
    "a place twice": (
        lambda self, net: [Change(s, lambda norm: nn.Identity()) for s in [*net.sites, *net.sites]],
        "changes 1 twice",
    ),
    "an unknown place": (lambda self, net: [Change("nope", lambda old: old)], "unknown module to change"),
    "the layer itself": (
        lambda self, net: [Change(s, lambda norm: norm) for s in net.sites],
        "the norm layer itself",
    ),
    "no module": (lambda self, net: [Change(s, lambda norm: None) for s in net.sites], "is a NoneType"),
    "what does not fit": (
        lambda self, net: [Change(s, lambda norm: nn.Linear(99, 9), target=Target()) for s in net.sites],
        "with the changes of method 'test_mine' the model's forward fails",
    ),
    "a constant without one": (
        lambda self, net: [Change(s, lambda norm: Scale(), target=Target()) for s in net.sites],
        "pass by='constant'",
    ),
    "channels of a constant": (
        lambda self, net: [
            Change(s, lambda norm: Scale(), target=Target(by="constant", channels=4.0)) for s in net.sites
        ],
        "one constant for all",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_a_method_of_ones_own(mistake: str, own_methods: None) -> None:
    decide, message = MISTAKES[mistake]
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(UserError, match=message):
        convert(net, images(), method=_decides(decide=decide))
    assert isinstance(net[1], nn.BatchNorm2d)


def test_what_a_method_builds_takes_the_norm_layers_type_and_what_was_fused(own_methods: None) -> None:
    decide = lambda self, net: [Change(s, lambda norm: nn.GroupNorm(2, norm.num_features)) for s in net.sites]  # noqa: E731
    net = nn.Sequential(nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8)).double()
    converted = convert(net, images().double(), method=_decides(decide=decide))
    assert [type(layer).__name__ for layer in converted[1]] == ["GroupNorm", "ReLU"]
    assert converted(images().double()).dtype == torch.float64
