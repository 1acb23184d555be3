"""Scales that conversion keeps: heads, streams whose branches start at zero, α in deep nets."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchvision.models import DenseNet

from nfnets.convert import ConversionError, convert, plan
from nfnets.convert.alpha import FURTHEST, branch_scales
from nfnets.convert.reference import FACTOR, Reference, head_sizes
from nfnets.convert.stream import MARGIN, stream_targets
from nfnets.scale.engine import set_scales
from nfnets.scale.target import Target
from nfnets.structure.readers import hidden
from nfnets.trace import trace


def images(n: int = 8, size: int = 16) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


class Gated(nn.Module):
    """Residual branches in a row; between them a gate that halves the stream, if asked for."""

    def __init__(self, blocks: int, gate: bool = False, scale: float | None = None):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(blocks))
        self.gate = nn.Linear(16, 16) if gate else None
        self.gamma = None if scale is None else nn.Parameter(torch.full((16, 1, 1), scale))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        self.seen = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            branch = norm(conv(torch.relu(x)))
            x = x + (branch if self.gamma is None else branch * self.gamma)
            self.seen.append(x)
            if self.gate is not None:
                x = x * torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None]
        return self.fc(x.mean((2, 3)))


def measured(model: nn.Module) -> tuple[Reference, object]:
    reference = Reference(everything=True)
    graph = trace(model.train(), images(), visit=reference.visit)
    with torch.no_grad():
        model(images())  # for what it notes of itself: a trace leaves nothing behind
    return reference, graph


def converted_ratios(model: nn.Module, method: str) -> tuple[nn.Module, list[float]]:
    """The converted model, and its signal beside the BatchNorm model's at every join."""
    model(images())
    levels = [rms(x) for x in model.seen]
    converted = convert(model, images(), method=method)
    converted(images())
    return converted, [rms(x) / level for x, level in zip(converted.seen, levels, strict=True)]


def test_levels_are_root_mean_squares_of_outputs() -> None:
    model = Gated(2)
    reference, graph = measured(model)
    with torch.no_grad():
        expected = rms(model.stem(images()))
    assert reference.rms("stem") == pytest.approx(expected)
    assert reference.at(graph.joins[1].node) == pytest.approx(rms(model.seen[1]), rel=1e-5)
    assert reference.rms("nowhere") == math.inf
    layers = Reference()
    trace(model, images(), visit=layers.visit)
    assert layers.at(graph.joins[1].node) == 0
    assert list(head_sizes(graph, reference)) == ["fc"]


@pytest.mark.parametrize(("share", "bias"), [(0.1, 0.0), (5.0, 0.3), (40.0, -0.2), (1.7, 0.1)])
def test_a_head_gets_the_scale_back_that_it_had(share: float, bias: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 7), nn.Identity()), torch.randn(50, 20)
    nn.init.constant_(model[0].bias, bias)
    wanted = rms(model(x))
    with torch.no_grad():
        model[0].weight.mul_(share)
    moved = rms(model(x))
    set_scales(model, x, targets={"0": Target(wanted, "mean square", unless=(1 / FACTOR, FACTOR))})
    near = 1 / FACTOR <= moved / wanted <= FACTOR
    assert rms(model(x)) == pytest.approx(moved if near else wanted, rel=1e-4)


def test_a_head_whose_bias_alone_is_larger_stays() -> None:
    model, x = nn.Sequential(nn.Linear(20, 7)), torch.randn(50, 20)
    nn.init.constant_(model[0].bias, 5.0)
    before = model[0].weight.clone()
    set_scales(model, x, targets={"0": Target(1.0, "mean square", unless=(1 / FACTOR, FACTOR))})
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(("share", "expected"), [(0.01, 0.01), (1.9, 1.9), (2.1, 1.0), (30.0, 1.0)])
def test_a_layer_that_is_only_to_be_no_larger(share: float, expected: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 7, bias=False)), torch.randn(50, 20)
    before = rms(model(x))
    with torch.no_grad():
        model[0].weight.mul_(share)
    set_scales(model, x, targets={"0": Target(before, "mean square", unless=(0.0, FACTOR))})
    assert rms(model(x)) / before == pytest.approx(expected, rel=1e-4)


class Funnel(nn.Module):
    """A branch that narrows 64-fold, widens, and narrows again before it ends."""

    def __init__(self) -> None:
        super().__init__()
        widths = (256, 4, 256, 4, 256)
        self.stem = nn.Sequential(nn.Conv2d(3, 256, 3, padding=1), nn.BatchNorm2d(256))
        layers: list[nn.Module] = []
        for into, out in itertools.pairwise(widths):
            layers += [nn.Conv2d(into, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.branch = nn.Sequential(*layers[:-1])
        self.fc = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((x + self.branch(x)).mean((2, 3)))


@pytest.mark.parametrize("method", ["fixup", "skipinit"])
def test_layers_inside_a_branch_do_not_outgrow_the_norm_layers_that_stood_there(method: str) -> None:
    """Fixup's He by fan out makes an output of 4 channels out of 256 eight times as large as its input."""
    torch.manual_seed(0)
    sizes = []
    model = convert(Funnel(), images(), method=method)
    for index in (0, 3, 6):
        model.branch[index].register_forward_hook(lambda _m, _a, out: sizes.append(rms(out)))
    model(images())
    assert len(sizes) == 3
    assert all(0.05 < size <= FACTOR for size in sizes), sizes


class Plain(nn.Module):
    """A convolution that runs twice, one with a channel that is constant, and a head of linears."""

    def __init__(self, classes: int = 12):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.twice, self.again = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.dead, self.last = nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12)
        self.fc, self.norm1d = nn.Linear(12, classes), nn.BatchNorm1d(classes)
        with torch.no_grad():
            self.dead.weight[3] = 0.0
            self.dead.bias[3] = 5.0
            self.stem.bias.fill_(3.0)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.again(self.twice(x)))
        x = torch.relu(self.again(self.twice(x)))
        x = torch.relu(self.last(self.dead(x)))
        return self.norm1d(self.fc(x.mean((2, 3))))


def outputs_of_layers(model: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, path=path: seen.setdefault(path, []).append(out))
        for path, module in model.named_modules()
        if hasattr(module, "gain")
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nf_gives_every_channel_its_variance_and_the_mean_zero(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Plain().to(dtype)
    x = images().to(dtype)
    new = convert(model, x, method="nf", channelwise=True)
    seen = outputs_of_layers(new, x)
    assert {path: len(calls) for path, calls in seen.items()} == {"stem": 1, "twice": 2, "dead": 1, "fc": 1}
    for path in ("stem", "twice", "dead"):
        variance, mean = torch.var_mean(seen[path][0], (0, 2, 3), correction=0)
        alive = torch.arange(12) != 3 if path == "dead" else torch.ones(12, dtype=torch.bool)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
        torch.testing.assert_close(variance[alive], torch.ones_like(variance[alive]), rtol=1e-3, atol=0)
    assert float(seen["dead"][0][:, 3].abs().max()) < 1e-4  # its bias is no shift that learns nothing
    assert float((new.dead.gain[3] / new.dead.gain.median()).detach()) <= 4.3  # and its gain has not exploded
    # Eight samples of one value each say little of a channel.
    assert new.fc.gain.unique().tolist() == [1.0]


@pytest.mark.parametrize(("samples", "option"), [(31, None), (32, False), (32, None), (31, True)])
def test_channel_statistics_are_an_option_and_want_samples(samples: int, option: bool | None) -> None:
    torch.manual_seed(0)
    model = Plain()
    new = convert(model, images(samples), method="nf", channelwise=option)
    untouched = all(bool((p == 1).all()) for name, p in new.named_parameters() if name.endswith("gain"))
    assert untouched == (option is False or (option is None and samples < 32))
    assert torch.equal(new.stem.bias, model.stem.bias) == untouched


def test_in_a_branch_every_channel_has_alpha_squared() -> None:
    torch.manual_seed(0)
    new = convert(Gated(3), images(), method="nf", alpha=0.5, channelwise=True)
    for path, (out, *_) in outputs_of_layers(new, images()).items():
        variance, mean = torch.var_mean(out, (0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros(16), atol=1e-5, rtol=0)
        expected = 1.0 if path == "stem" else 0.25
        torch.testing.assert_close(variance, torch.full((16,), expected), rtol=1e-3, atol=0)


def test_a_gate_that_is_off_for_every_sample_changes_its_sign() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 3), nn.ReLU(), nn.Linear(3, 20), nn.Sigmoid()), torch.rand(50, 20)
    assert hidden(trace(model, x)) == ["0"]
    for sign, expected in ((1, 1), (-1, 1)):
        with torch.no_grad():
            model[0].weight.abs_().mul_(sign)
            model[0].bias.fill_(sign)
        set_scales(model, x, targets={}, wake=["0"])
        assert (model[0].weight * expected > 0).all()
        assert model[0].bias[0].item() == expected
    set_scales(model, torch.zeros(5, 20), targets={}, wake=["0"])
    assert (model[0].weight > 0).all()


@pytest.mark.parametrize("blocks", [1, 4, 8, 17])
def test_alpha_of_a_row(blocks: int) -> None:
    """All branches together add twice the variance that the stream starts with; one alone as much."""
    model = Gated(blocks)
    graph = trace(model.train(), images(2, 4))
    scales = branch_scales(model, graph, None)
    assert sum(scale**2 for scale in scales.values()) == pytest.approx(min(2, blocks))
    assert len(set(scales.values())) == 1
    assert len(scales) == blocks
    assert list(branch_scales(model, graph, 0.2).values()) == pytest.approx([0.2] * blocks)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_what_a_densenet_concatenates_has_an_alpha(rate: float) -> None:
    """The layers of a block are a row; what they put out has variance α², what reads it is scaled to 1."""
    torch.manual_seed(0)
    model = DenseNet(8, (3, 5), num_init_features=16, drop_rate=rate, num_classes=5)
    model.features.pool0 = nn.Identity()
    x = images(8, 32)
    scales = branch_scales(model, trace(model.train(), x), None)
    blocks = {3: math.sqrt(2 / 3), 5: math.sqrt(2 / 5)}
    ends = {
        f"features.denseblock{b}.denselayer{i + 1}.conv2": alpha
        for b, (layers, alpha) in enumerate(blocks.items(), 1)
        for i in range(layers)
    }
    graph = trace(model, x)
    assert {graph.nodes[i].path: scale for i, scale in scales.items()} == pytest.approx(ends)
    assert set(branch_scales(model, graph, 0.3).values()) == {0.3}

    rows = {row.path: row for row in plan(model, x, method="nf").layers}
    assert {path for path, row in rows.items() if row.role == "branch end"} == set(ends)
    assert all(f"α={alpha:.3g}" in rows[path].reason for path, alpha in ends.items())
    converted = convert(model, x, method="nf", channelwise=False).train()
    seen = {}

    def see(path: str, out: Tensor) -> None:  # at once: activations write over it
        seen[path] = out.detach().transpose(0, 1).flatten(1).var(1).mean().item()

    for path, module in converted.named_modules():
        if path in ends or path.endswith("norm1"):
            module.register_forward_hook(lambda m, a, out, path=path: see(path, out))
    converted(x)
    assert len(seen) == 16
    for path, variance in seen.items():  # dropout's masks are others than those that were measured with
        assert variance == pytest.approx(ends.get(path, 1.0) ** 2, rel=0.15 if rate else 0.02), path


class Skips(nn.Module):
    """A U-Net of three levels: a decoder's layer and the skip beside it, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList(_block(3 if i == 0 else 8, 8, 2) for i in range(3))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(8, 8, 2, 2) for _ in range(2))
        self.joins = nn.ModuleList(_block(16, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.downs:
            skips.append(x := down(x))
        x = skips.pop()
        for up, join in zip(self.ups, self.joins, strict=True):
            x = join(torch.cat([skips.pop(), up(x)], 1))
        return x


class Inception(nn.Module):
    """Parallel branches; then layers one after the other whose outputs are read by the next, too (VoVNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.parallel = nn.ModuleList(_block(3, 8) for _ in range(3))
        self.row = nn.ModuleList(_block(24 if i == 0 else 8, 8) for i in range(3))
        self.last = _block(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([branch(x) for branch in self.parallel], 1)
        found = [x]
        for layer in self.row:
            found.append(layer(found[-1]))
        return self.last(torch.cat(found, 1))


def _block(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


@pytest.mark.parametrize("net", [Skips, Inception])
def test_other_concatenations_have_none(net: type[nn.Module]) -> None:
    model = net()
    assert branch_scales(model, trace(model.train(), images()), None) == {}


def test_gates_on_the_stream_shorten_it() -> None:
    """Each halves what came before: of twelve branches 1 + 1/2 + 1/4 + … count, so that they refill it."""
    graph = trace(Gated(12, gate=True).train(), images(2, 4))
    length = 2 - 0.5**11
    scales = branch_scales(nn.Identity(), graph, None)
    assert list(scales.values()) == pytest.approx([min(1, math.sqrt(2 / length))] * 12)


@pytest.mark.parametrize("method", ["nf", "lsuv", "fixed_variance"])
@pytest.mark.parametrize("blocks", [24, pytest.param(100, marks=pytest.mark.soak)])
def test_a_long_stream_starts_higher_and_keeps_its_proportions(blocks: int, method: str) -> None:
    torch.manual_seed(0)
    model = Gated(blocks)
    graph = trace(model.train(), images(2, 4))
    scales = branch_scales(model, graph, None)
    start, *branches = scales.values()
    assert graph.nodes[next(iter(scales))].path == "norm"
    assert start == pytest.approx(math.sqrt((1 + blocks) / (1 + 36 / blocks)) / FURTHEST)
    assert branches == pytest.approx([start * 6 / blocks] * blocks)
    _, ratios = converted_ratios(model, method)
    assert 1 / 4 < min(ratios) <= max(ratios) < 4


def test_a_layer_scale_is_the_alpha_that_a_branch_has_already() -> None:
    for scale, expected in ((1e-3, 1.0), (1.0, math.sqrt(2 / 8))):
        model = Gated(8, scale=scale)
        graph = trace(model.train(), images(2, 4))
        assert list(branch_scales(model, graph, None).values()) == pytest.approx([expected] * 8)


def test_a_stream_that_nothing_refills_starts_where_batchnorms_can_be_met() -> None:
    """Its branches are zero, so it is as large at the last join as at the first; BatchNorm's is √(1 + L)."""
    torch.manual_seed(0)
    model = Gated(30)
    reference, graph = measured(model)
    targets = stream_targets(graph, graph.joins, ["stem"], reference, "SkipInit")
    levels = [rms(x) for x in model.seen]
    assert targets["stem"] == pytest.approx(max(levels) / MARGIN, rel=1e-4)
    _, ratios = converted_ratios(model, "skipinit")
    assert 1 / 3.5 < min(ratios) <= max(ratios) < 3.5
    short = Gated(3)
    reference, graph = measured(short)
    assert stream_targets(graph, graph.joins, ["stem"], reference, "SkipInit") == {"stem": 1.0}


@pytest.mark.parametrize("method", ["fixup", "skipinit"])
def test_a_thousand_layers_are_no_reason_to_refuse(method: str) -> None:
    """BatchNorm's stream grows to √(1 + 200), further than any start is from both ends; nothing shrinks it."""
    model = Gated(200)
    reference, graph = measured(model)
    levels = [rms(x) for x in model.seen]
    targets = stream_targets(graph, graph.joins, ["stem"], reference, method)
    assert targets["stem"] == pytest.approx(math.sqrt(max(levels) * min(levels)), rel=1e-4)
    assert not plan(model, images(), method=method).refused


def test_a_relu_takes_half_of_a_stream_once() -> None:
    class Rectified(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[1](self[0](x))
            for branch in list(self)[2:]:
                x = torch.relu(x + branch(x))
            return x

    def branch() -> nn.Module:
        return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))

    torch.manual_seed(0)
    model = Rectified(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), *(branch() for _ in range(12)))
    reference, graph = measured(model)
    joins = [reference.at(join.node) for join in graph.joins]
    assert len(joins) == 12
    start = stream_targets(graph, graph.joins, ["0"], reference, "Fixup")["0"]
    wanted = max(joins[0], *(level * math.sqrt(2) for level in joins[1:])) / MARGIN
    assert start == pytest.approx(max(1.0, wanted), rel=1e-4)
    assert wanted > 1


@pytest.mark.parametrize("method", ["fixup", "skipinit"])
def test_gates_on_the_stream_are_a_reason_to_refuse(method: str) -> None:
    """Ten of them leave a thousandth, which branches that start at zero cannot refill."""
    with pytest.raises(ConversionError, match="gates on it shrink what stem starts"):
        convert(Gated(10, gate=True), images(), method=method)
    assert not plan(Gated(2, gate=True), images(), method=method).refused


@pytest.mark.parametrize("method", ["fixup", "skipinit"])
def test_a_mix_with_the_shortcut_is_refused(method: str) -> None:
    class Lerp(Gated):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x))
            return self.fc((x + 0.5 * (self.norms[0](self.convs[0](x)) - x)).mean((2, 3)))

    with pytest.raises(ConversionError, match="contains the shortcut itself"):
        convert(Lerp(1), images(), method=method)


def test_a_model_in_evaluation_mode_is_measured_as_one_that_trains() -> None:
    """Statistics of an untrained model are no statistics: its norm layers do nothing in evaluation mode."""
    torch.manual_seed(0)
    model = Gated(2)
    for conv in model.convs:
        nn.init.normal_(conv.weight, std=1e-3)
    results = [
        convert(model.train(mode), images(), method="lsuv", orthonormal=False) for mode in (True, False)
    ]
    for a, b in zip(results[0].parameters(), results[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert not results[1].training
    one = convert(
        model, images(1, 1), method="nf"
    )  # a single value in a channel: nothing to measure, no error
    assert not any(isinstance(m, nn.BatchNorm2d) for m in one.modules())


@pytest.mark.parametrize(
    "method", ["nf", "fixed_variance", "lsuv", "fixup", "skipinit", "fold", "gn", "ws_gn"]
)
def test_conversion_takes_three_forward_passes_at_most(method: str) -> None:
    model = Gated(4)
    calls = []
    model.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    convert(model, images(), method=method)  # a copy takes its hooks along
    assert 1 <= calls.count(8) <= 3
    assert len(calls) <= 4  # one on two images: does the copy compute with itself?


@pytest.mark.parametrize("fused", [False, True], ids=["module", "fused"])
def test_a_silu_takes_its_share_of_a_stream(fused: bool) -> None:
    """It leaves 0.6 of a unit normal signal, and the stream must be as much larger before it."""
    norm = (
        BatchNormAct2d(16, act_layer=nn.SiLU)
        if fused
        else nn.Sequential(nn.BatchNorm2d(16), nn.SiLU(inplace=True))
    )

    class Smooth(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(
                nn.Conv2d(3, 16, 3),
                norm,
                *(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)) for _ in range(12)),
            )
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            x = self[1](self[0](x))
            self.seen = []
            for branch in list(self)[2:]:
                x = x + branch(x)
                self.seen.append(x)
            return x

    torch.manual_seed(0)
    model = Smooth()
    reference, graph = measured(model)
    levels = [rms(x) for x in model.seen]
    start = stream_targets(graph, graph.joins, ["0"], reference, "SkipInit")["0"]
    silu = math.sqrt(levels[0] ** 2 - 1)
    assert silu == pytest.approx(0.6, abs=0.05)
    assert start == pytest.approx(max(levels) / MARGIN / silu, rel=0.05)
    _, ratios = converted_ratios(model, "skipinit")
    assert 1 / 3.5 < min(ratios) <= max(ratios) < 3.5


@pytest.mark.parametrize("method", ["fixup", "skipinit"])
def test_a_silu_takes_from_a_stream_what_it_takes_of_its_present_values(method: str) -> None:
    """Half of the first signal is negative; what it leaves is positive, and the next ones take ever less."""

    class Activated(Gated):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.silu(self.norm(self.stem(x)))
            self.seen = []
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = x + norm(conv(x))
                self.seen.append(x)
                x = nn.functional.silu(x)
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Activated(16)
    for norm in model.norms:
        nn.init.constant_(norm.weight, 0.3)
    _, ratios = converted_ratios(model, method)
    assert 1 / 3.5 < min(ratios) <= max(ratios) < 3.5


def test_a_stream_that_saturates_does_not_start_beyond_all_bounds() -> None:
    class Saturated(Gated):
        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.hardtanh(self.norm(self.stem(x)), -0.1, 0.1)
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = x + norm(conv(x))
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    reference, graph = measured(Saturated(2))
    (start,) = stream_targets(graph, graph.joins, ["stem"], reference, "SkipInit").values()
    assert 0.1 < start < 10


@pytest.mark.parametrize("method", ["nf", "lsuv", "fixed_variance", "fixup", "skipinit"])
def test_what_small_gammas_made_small_stays_small(method: str) -> None:
    """timm's RepVGG draws γ and β around 0.1: its whole stream is a fifth of the usual one."""
    torch.manual_seed(0)
    model = Gated(3)
    for norm in (model.norm, *model.norms):
        nn.init.normal_(norm.weight, 0.1, 0.1)
        nn.init.normal_(norm.bias, 0.0, 0.1)
    _, ratios = converted_ratios(model, method)
    assert 1 / 3 < min(ratios) <= max(ratios) < 3


def test_norms_that_start_at_zero_set_no_limit() -> None:
    """Of a branch that BatchNorm switches off at first nothing is known: α decides."""
    torch.manual_seed(0)
    model = Gated(8)
    for norm in model.norms:
        nn.init.zeros_(norm.weight)
    converted = convert(model, images(), method="nf")
    seen: list[float] = []
    for conv in converted.convs:
        conv.register_forward_hook(lambda _module, _args, out: seen.append(rms(out)))
    converted(images())
    assert seen == pytest.approx([0.5] * 8, rel=0.2)


@pytest.mark.parametrize("method", ["nf", "lsuv", "fixed_variance", "skipinit"])
def test_a_stream_that_no_norm_layer_starts_is_as_large_as_it_was(method: str) -> None:
    """A bare convolution on the shortcut, as where MaxViT's stages begin, passes on what the stream has grown to."""

    class Bare(Gated):
        def __init__(self) -> None:
            super().__init__(2)
            self.expand = nn.Conv2d(16, 16, 1)
            nn.init.dirac_(self.expand.weight)

        def forward(self, x: Tensor) -> Tensor:
            x = self.expand(20 * self.stem(x))
            self.seen = []
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = x + conv(torch.relu(norm(x)))
                self.seen.append(x)
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    model = Bare()
    model(images())
    assert min(rms(x) for x in model.seen) > 8
    _, ratios = converted_ratios(model, method)
    assert 1 / 3 < min(ratios) <= max(ratios) < 3


class Mixed(Gated):
    """Between the blocks a convolution whose weight is computed (CondConv), its norm layer, and a gate."""

    def __init__(self) -> None:
        super().__init__(4)
        self.experts = nn.Parameter(0.02 * torch.randn(4, 16 * 16))
        self.route, self.between = nn.Linear(16, 4), nn.BatchNorm2d(16)
        self.again = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        self.seen = []
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if number == 2:
                mix = torch.sigmoid(self.route(x.mean((2, 3)))).mean(0)
                x = self.between(nn.functional.conv2d(x, (mix @ self.experts).view(16, 16, 1, 1)))
                x = self.again(0.01 * x * torch.sigmoid(x.mean((2, 3), keepdim=True)))
            x = x + norm(conv(torch.relu(x)))
            self.seen.append(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("method", ["nf", "lsuv", "fixed_variance", "fixup", "skipinit"])
def test_where_no_weight_sets_a_size_a_constant_does(method: str) -> None:
    torch.manual_seed(0)
    model = Mixed()
    converted, ratios = converted_ratios(model, method)
    assert 1 / 4 < min(ratios) <= max(ratios) < 4
    assert type(converted.route) is nn.Linear  # what chooses weights is no layer that feeds a norm layer
    torch.testing.assert_close(converted.route.weight, model.route.weight)


def test_lsuv_of_a_net_whose_only_norm_layer_reads_the_input() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    converted = convert(model, 30 * images(), method="lsuv")
    assert rms(converted[0](30 * images())) == pytest.approx(1, rel=0.05)
