"""What a profile measures, against hand-placed hooks and the closed forms of arXiv 2101.08692."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import nfnets
from nfnets.layers import ScaledStdConv2d
from nfnets.predict import Moments, predict
from nfnets.signal import profile
from nfnets.signal.report import Point
from nfnets.trace import trace

GAMMA = math.sqrt(2 / (1 - 1 / math.pi))


def moments(x: Tensor) -> tuple[float, float]:
    """DeepMind's definitions, in double precision."""
    x = x.detach().double()
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    return mean.square().mean().item(), var.mean().item()


def taken(model: nn.Module, modules: dict[str, nn.Module], x: Tensor, pre: bool = False) -> dict[str, list]:
    """(squared mean, variance) at every call of the named modules, by plain forward hooks."""
    seen: dict[str, list] = {name: [] for name in modules}
    handles = []
    for name, module in modules.items():
        if pre:
            hook = module.register_forward_pre_hook(lambda m, a, n=name: seen[n].append(moments(a[0])))
        else:
            hook = module.register_forward_hook(lambda m, a, o, n=name: seen[n].append(moments(o)))
        handles.append(hook)
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


def close(point: Point, expected: tuple[float, float]) -> None:
    assert point.mean_sq == pytest.approx(expected[0], rel=1e-3, abs=1e-6)
    assert point.var == pytest.approx(expected[1], rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(("name", "calls", "last"), [("resnet18", 2, "bn2"), ("resnet50", 3, "bn3")])
def test_torchvision_resnet_matches_hooks(name, calls, last):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).train()
    x = torch.randn(4, 3, 48, 48)
    blocks = {n: m for n, m in model.named_modules() if n.count(".") == 1 and n.startswith("layer")}
    ends = taken(model, {n: getattr(m, last) for n, m in blocks.items()}, x)
    sums = taken(model, {n: m.relu for n, m in blocks.items()}, x, pre=True)
    stem = taken(model, {"maxpool": model.maxpool}, x)["maxpool"][0]
    report = profile(model, x)
    joins = report.select(role="join")
    assert [p.name for p in joins] == list(blocks)
    assert [p.block for p in joins] == list(range(1, len(blocks) + 1))
    for p in joins:
        close(p, sums[p.name][calls - 1])  # the block's last ReLU reads the sum, in place
        assert p.residual_var == pytest.approx(ends[p.name][0][1], rel=1e-3)
        close(report[f"{p.name}.{last}"], ends[p.name][0])
        assert report[f"{p.name}.{last}"].role == "branch_end"
    (found,) = report.select(role="stem")
    assert found.name == "maxpool"
    close(found, stem)
    assert [p.name for p in report.select(role="head")] == ["fc"]


def test_a_pre_activation_resnet_matches_hooks():
    torch.manual_seed(0)
    model = timm.create_model("resnetv2_18").train()
    x = torch.randn(4, 3, 48, 48)
    blocks = {n: m for n, m in model.named_modules() if type(m).__name__ == "PreActBasic"}
    ends = taken(model, {n: m.conv2 for n, m in blocks.items()}, x)
    sums = taken(model, blocks, x)
    stem = taken(model, {"stem": model.stem}, x)["stem"][0]
    report = profile(model, x)
    joins = report.select(role="join")
    assert [p.name for p in joins] == list(blocks)
    assert len(joins) == 8
    for p in joins:
        close(p, sums[p.name][0])
        assert 0.1 < p.residual_var == pytest.approx(ends[p.name][0][1], rel=1e-3)
    (found,) = report.select(role="stem")
    close(found, stem)


def test_every_computing_module_is_a_point():
    model = torchvision.models.resnet18()
    report = profile(model, torch.randn(4, 3, 48, 48))
    names = [p.name for p in report.points if p.role != "join" and p.kind != "input"]
    expected = [n for n, m in model.named_modules() if not any(m.children())]
    assert {n.split("#")[0] for n in names} == set(expected)
    assert (
        sum(n.startswith("layer1.0.relu") for n in names) == 2
    )  # a shared module is as many points as calls


@pytest.mark.parametrize("name", ["nf_resnet26", "test_nfnet"])
def test_timm_normalizer_free_nets_match_hooks_at_deepminds_positions(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for n, p in model.named_parameters():
        if n.endswith(("conv3.gain", "skipinit_gain")):
            nn.init.ones_(p)  # as for the paper's plots: zero-initialized branches show nothing
    x = torch.randn(4, 3, 64, 64)
    blocks = {n: m for n, m in model.named_modules() if type(m).__name__ == "NormFreeBlock"}
    sums = taken(model, blocks, x)
    attended = any(m.attn_last is not None for m in blocks.values())
    ends = taken(model, {n: m.attn_last if attended else m.conv3 for n, m in blocks.items()}, x)
    gain = 4.0 if attended else 1.0  # DeepMind measures after the gate's factor 2
    report = profile(model, x)
    joins = report.select(role="join")
    assert [p.name for p in joins] == list(blocks)
    for p in joins:
        close(p, sums[p.name][0])
        assert p.residual_var == pytest.approx(gain * ends[p.name][0][1], rel=1e-3)
    assert report.select(role="stem")[0].name.startswith("stem")


def test_alpha_folded_into_the_last_layer_is_divided_out():
    class Block(nn.Module):
        def __init__(self, alpha: float):
            super().__init__()
            self.conv = ScaledStdConv2d(16, 16, 3, padding=1, alpha=alpha)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(torch.relu(x))

    torch.manual_seed(0)
    x = torch.randn(8, 16, 8, 8)
    plain, folded = Block(1.0), Block(0.2)
    folded.conv.weight = plain.conv.weight
    a, b = profile(plain, x)["add"], profile(folded, x)["add"]
    assert b.residual_var == pytest.approx(a.residual_var, rel=1e-4)
    assert b.predicted_residual_var == pytest.approx(a.predicted_residual_var, rel=1e-4)
    assert b.var < a.var


# -- closed forms ---------------------------------------------------------------------------------------------

C = 128


def conv(kind: str) -> nn.Conv2d:
    if kind == "sws":
        return ScaledStdConv2d(C, C, 3, padding=1, padding_mode="circular")
    layer = nn.Conv2d(C, C, 3, padding=1, padding_mode="circular", bias=False)
    nn.init.normal_(layer.weight, std=math.sqrt((2 if kind == "he" else 1) / (9 * C)))
    return layer


class PreActivation(nn.Module):
    """norm and ReLU in the given order, then a convolution; twice; the first block projects its shortcut."""

    def __init__(self, kind: str, order: str, first: bool, beta: float = 1.0, alpha: float = 1.0):
        super().__init__()
        self.kind, self.order, self.alpha, self.beta = kind, order, alpha, beta
        self.norms = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(2)) if order else None
        self.convs = nn.ModuleList(conv(kind) for _ in range(2))
        self.shortcut = conv(kind) if first else None

    def activate(self, x: Tensor, i: int) -> Tensor:
        if self.norms is None:
            return torch.relu(x) * (GAMMA if self.kind == "sws" else 1.0)
        return torch.relu(self.norms[i](x)) if self.order == "bn-relu" else self.norms[i](torch.relu(x))

    def forward(self, x: Tensor) -> Tensor:
        a = self.activate(x, 0) / self.beta
        y = self.convs[1](self.activate(self.convs[0](a), 1))
        return (x if self.shortcut is None else self.shortcut(a)) + self.alpha * y


def stages(make, blocks: int = 5) -> list[Point]:
    torch.manual_seed(1)
    # A first layer, so that the very first block's input is a feature map of variance 1 too.
    body = [make(j) for j in range(blocks)]
    return profile(nn.Sequential(conv("lecun"), *body), torch.randn(16, C, 8, 8)).select(role="join")


def orthogonal_sums_(layers: list[nn.Conv2d]) -> None:
    """Moves weights (by a thousandth) until their sums, 2 in the mean square, are orthogonal from layer to layer.

    A channel's mean is such a sum times the activation's. They are only C draws a layer: without this a closed form
    for their squares is met to 15 %, as draws go.
    """
    sums = torch.linalg.qr(torch.randn(C, len(layers)))[0] * math.sqrt(2 * C)
    with torch.no_grad():
        for layer, target in zip(layers, sums.T, strict=True):
            apart = target - layer.weight.sum((1, 2, 3))
            layer.weight += (apart / layer.weight[0].numel())[:, None, None, None]


def test_bn_relu_conv_grows_by_0_682_a_block():
    base = 1 - 1 / math.pi
    torch.manual_seed(1)
    blocks = [PreActivation("he", "bn-relu", j == 0) for j in range(5)]
    orthogonal_sums_([blocks[0].shortcut, *(block.convs[1] for block in blocks)])
    report = profile(nn.Sequential(conv("lecun"), *blocks), torch.randn(16, C, 8, 8))
    for j, p in enumerate(report.select(role="join"), start=1):
        assert p.residual_var == pytest.approx(base, rel=0.02)
        assert p.var == pytest.approx((j + 1) * base, rel=0.02)
        assert p.mean_sq == pytest.approx((j + 1) / math.pi, rel=0.02)
        assert p.predicted_residual_var == pytest.approx(base, rel=0.02)
        assert p.predicted_var == pytest.approx((j + 1) * base, rel=0.02)
        assert p.predicted_mean_sq == pytest.approx(p.mean_sq, rel=0.02)


def test_relu_bn_conv_grows_by_one_a_block_without_mean_shift():
    joins = stages(lambda j: PreActivation("lecun", "relu-bn", j == 0))
    for j, p in enumerate(joins, start=1):
        assert p.residual_var == pytest.approx(1, rel=0.02)
        assert p.var == pytest.approx(1 + j, rel=0.02)
        assert p.mean_sq < 0.01


def test_normalizer_free_blocks_grow_by_alpha_squared():
    alpha = 0.2

    def make(j: int) -> PreActivation:
        return PreActivation("sws", "", j == 0, beta=math.sqrt(1 + j * alpha**2), alpha=alpha)

    joins = stages(make)
    for j, p in enumerate(joins, start=1):
        assert p.residual_var == pytest.approx(1, rel=0.02)
        assert p.var == pytest.approx(1 + j * alpha**2, rel=0.02)
        assert p.mean_sq < 0.01
        assert p.predicted_residual_var == pytest.approx(1, rel=0.02)
        assert p.predicted_var == pytest.approx(1 + j * alpha**2, rel=0.02)


def test_he_initialization_without_normalization_shifts_the_mean():
    alpha = 0.2

    def make(kind: str) -> nn.Module:
        torch.manual_seed(1)
        # As in ResNets, where the stem's max-pool shifts the mean; standardized weights repair it, others carry it.
        stem = nn.Sequential(conv("lecun"), nn.MaxPool2d(3, 1, 1))
        beta = [math.sqrt(1 + j * alpha**2) for j in range(3)]
        blocks = [PreActivation(kind, "", j == 0, beta[j], alpha) for _ in range(3) for j in range(3)]
        return nn.Sequential(stem, *blocks)

    report = profile({"sws": make("sws"), "he": make("he")}, torch.randn(16, C, 8, 8))
    shift = {m: [p.mean_sq / p.var for p in report.select(model=m, role="join")] for m in report.models}
    assert min(shift["he"]) > 4
    assert max(shift["sws"]) < 0.1
    verdict = report.check()
    assert not verdict.of("sws")
    assert "mean-shift" in verdict.broken


def test_zero_padding_loses_the_border():
    torch.manual_seed(0)
    n = 14
    layer = nn.Conv2d(64, 64, 3, padding=1, bias=False)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(9 * 64))
    point = profile(nn.Sequential(layer), torch.randn(32, 64, n, n))["0"]
    expected = ((3 * n - 2) / (3 * n)) ** 2
    # The variance of a channel is around its mean over positions, so the border's smaller share is all there is.
    assert point.var == pytest.approx(expected, rel=0.02)
    assert point.predicted_var == pytest.approx(expected, rel=0.02)


def test_a_converted_resnet_keeps_its_signal_near_the_prediction():
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    x = torch.randn(16, 3, 64, 64)
    report = profile({"bn": model, "nf": nfnets.convert(model, x, method="nf")}, x)
    joins = {m: report.select(model=m, role="join") for m in ("bn", "nf")}
    assert [p.name for p in joins["bn"]] == [p.name for p in joins["nf"]]
    for p in joins["nf"]:
        assert p.residual_var is not None
        assert 0.2 < p.residual_var < 5
        assert 0.3 < p.var / p.predicted_var < 3
    assert report.check()


# -- other statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [nn.AvgPool2d(4), nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(4)])
def test_predictions_after_pooling_know_that_images_are_smooth(pool: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(pool, nn.Conv2d(16, 512, 1, bias=False))
    nn.init.normal_(net[1].weight, std=0.25)
    x = torch.nn.functional.interpolate(torch.randn(16, 16, 6, 6), scale_factor=4, mode="bilinear")
    report = nfnets.profile(net, x)
    assert report["1"].predicted_var == pytest.approx(report["1"].var, rel=0.06)
    assert report["1"].predicted_mean_sq == pytest.approx(report["1"].mean_sq, rel=0.25, abs=0.02)
    white = predict(trace(net, x), Moments(0.0, 0.0, x.var().item()))
    assert max(white[2].var, report["1"].var) > 1.5 * min(white[2].var, report["1"].var)


def test_in_place_operations_do_not_corrupt_what_was_measured():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2.0)
            y = self.act(self.conv(x))
            y += 100.0
            return y.zero_()

    model, x = InPlace(), torch.randn(8, 3, 9, 9)
    before = x.clone()
    report = profile(model, x)
    assert torch.equal(x, before)
    y = model.conv(2 * before)
    close(report["conv"], moments(y))
    close(report["act"], moments(torch.relu(y)))


def test_gradients_are_those_of_autograd():
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    x = torch.randn(4, 3, 48, 48)
    report = profile(model, x, loss=lambda out: out.square().mean())
    kept: dict[str, Tensor] = {}
    out = x
    model.train()
    model.layer1[0].register_forward_hook(lambda m, a, o: (o.retain_grad(), kept.update(block=o))[1] and None)
    model.conv1.register_forward_hook(lambda m, a, o: (o.retain_grad(), kept.update(conv=o))[1] and None)
    out = model(x)
    out.square().mean().backward()
    grad = kept["conv"].grad
    assert grad is not None
    assert report["conv1"].grad_var == pytest.approx(moments(grad)[1], rel=1e-3)
    assert report["conv1"].grad_mean_sq == pytest.approx(moments(grad)[0], rel=1e-3)
    assert report["conv1"].grad_norm == pytest.approx(grad.norm().item(), rel=1e-3)
    assert report["conv1"].weight_grad_norm == pytest.approx(model.conv1.weight.grad.norm().item(), rel=1e-3)
    after = kept["block"].grad  # what leaves the block's in-place ReLU
    assert after is not None
    assert report["layer1.0.relu#2"].grad_var == pytest.approx(moments(after)[1], rel=1e-3)


def test_weight_norms_headroom_and_dead_units():
    model = nn.Sequential(nn.Conv2d(3, 10, 3), nn.ReLU())
    with torch.no_grad():
        model[0].bias[:4] = -1e4
        model[0].weight.mul_(100)
    report = profile(model, torch.randn(8, 3, 12, 12))
    assert report["0"].weight_norm == pytest.approx(model[0].weight.norm().item(), rel=1e-5)
    assert report["1"].dead == pytest.approx(0.4)
    largest = max(abs(report["0"].min), abs(report["0"].max))
    assert report["0"].headroom_fp16 == pytest.approx(math.log2(65504 / largest))
    assert report["0"].headroom_bf16 > report["0"].headroom_fp16


def test_tokens_keep_their_channels_in_the_last_dimension():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    seen = {}
    model.blocks[0].mlp.fc1.register_forward_hook(lambda m, a, o: seen.update(fc1=o.detach().double()))
    model.blocks[1].register_forward_hook(lambda m, a, o: seen.update(block=o.detach().double()))
    report = profile(model, torch.randn(4, 3, 32, 32))
    for name, x in (("blocks.0.mlp.fc1", seen["fc1"]), ("blocks.1#2", seen["block"])):
        assert report[name].var == pytest.approx(x.var((0, 1), correction=0).mean().item(), rel=1e-3)
    assert len(report.select(role="join")) == 4


def test_convnext_changes_over_between_layouts():
    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1))
    seen = {}
    model.stages[1].blocks[0].register_forward_hook(lambda m, a, o: seen.update(block=o))
    model.stages[1].blocks[0].norm.register_forward_hook(lambda m, a, o: seen.update(norm=o))
    report = profile(model, torch.randn(4, 3, 64, 64))
    close(report["stages.1.blocks.0"], moments(seen["block"]))
    norm = seen["norm"]
    norm = norm if norm.shape[1] == report["stages.1.blocks.0"].shape[1] else norm.permute(0, 3, 1, 2)
    close(report["stages.1.blocks.0.norm"], moments(norm))


def test_recurrent_cells_and_several_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(6, 6)
            self.out = nn.Linear(6, 3)

        def forward(self, x: Tensor, h: Tensor) -> dict[str, Tensor]:
            for _ in range(3):
                h = self.cell(x, h)
            return {"logits": self.out(h), "state": h}

    report = profile(Twice(), torch.randn(40, 6), torch.randn(40, 6), backward=True)
    assert [p.name for p in report.points] == ["input", "input#2", "cell", "cell#2", "cell#3", "out"]
    assert report["cell#3"].grad_var > 0
