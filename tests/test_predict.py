"""Predicted moments against the papers' closed forms and against measurement."""

import math

import pytest
import timm
import torch
from conversion_nets import average_channel_variance, resnet50
from torch import Tensor, nn

from nfnets.convert import convert
from nfnets.layers import Scale, ScaledStdConv2d
from nfnets.predict import predict
from nfnets.trace import Graph, trace


def measured(model: nn.Module, x: Tensor) -> tuple[Graph, dict[int, tuple[float, float]]]:
    seen = {}

    def visit(node, out: Tensor) -> None:
        if out.ndim == 4:
            mean = out.float().mean((0, 2, 3))
            seen[node.index] = float(mean.pow(2).mean()), float(average_channel_variance(out))

    return trace(model, x, visit=visit), seen


class PreActivation(nn.Module):
    """BN → ReLU → conv residual blocks with He weights, circular padding so that nothing is lost at borders."""

    def __init__(self, blocks: int, channels: int = 128):
        super().__init__()
        conv = lambda i: nn.Conv2d(i, channels, 3, padding=1, padding_mode="circular", bias=False)  # noqa: E731
        self.stem, self.norms = conv(3), nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(blocks))
        self.convs = nn.ModuleList(conv(channels) for _ in range(blocks))
        for layer in [self.stem, *self.convs]:
            nn.init.normal_(layer.weight, std=math.sqrt(1 / layer.weight[0].numel()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = x + conv(norm(x).relu())
        return x


def test_batchnorm_relu_conv_closed_form() -> None:
    """arXiv 2101.08692 figure 1: with weights of variance 1/N a branch adds (1 − 1/π)/2 to the variance, and its
    squared mean is the rest of E[relu²] = 1/2; twice that for He weights."""
    torch.manual_seed(0)
    model = PreActivation(4)
    graph, seen = measured(model, torch.randn(16, 3, 16, 16))
    theory = predict(graph)
    stem = theory[graph.joins[0].shortcut].var  # 1, but for the luck of 128 random filters
    for j, join in enumerate(graph.joins):
        assert theory[join.branch].var == pytest.approx((1 - 1 / math.pi) / 2, rel=0.02)
        assert theory[join.branch].mean_sq == pytest.approx(1 / (2 * math.pi), rel=0.4)  # of 128 random sums
        assert theory[join.node].var == pytest.approx(stem + (j + 1) * (1 - 1 / math.pi) / 2, rel=0.02)
        assert seen[join.branch][1] == pytest.approx(theory[join.branch].var, rel=0.05)
        assert seen[join.node][1] == pytest.approx(theory[join.node].var, rel=0.05)


class NormFree(nn.Module):
    """h ← h + α·f(h/β), β² = 1 + jα²: the NF-ResNet paper's block, α on an activation scaled by γ/β."""

    def __init__(self, blocks: int, alpha: float, channels: int = 64):
        super().__init__()
        conv = lambda i, s: ScaledStdConv2d(i, channels, 3, padding=1, padding_mode="circular", scale=s)  # noqa: E731
        gamma = math.sqrt(2 / (1 - 1 / math.pi))
        self.stem = conv(3, 1.0)
        self.betas = nn.ModuleList(Scale(1 / math.sqrt(1 + j * alpha**2)) for j in range(blocks))
        self.convs = nn.ModuleList(conv(channels, gamma) for _ in range(blocks))
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for beta, conv in zip(self.betas, self.convs, strict=True):
            x = x + self.alpha * conv(beta(x).relu())
        return x


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_norm_free_closed_form(alpha: float) -> None:
    torch.manual_seed(0)
    graph, seen = measured(NormFree(5, alpha), torch.randn(32, 3, 16, 16))
    theory = predict(graph)
    for j, join in enumerate(graph.joins):
        assert theory[join.branch_end].var == pytest.approx(1, rel=0.02)
        assert theory[join.node].var == pytest.approx(1 + (j + 1) * alpha**2, rel=0.02)
        assert seen[join.node][1] == pytest.approx(theory[join.node].var, rel=0.06)


@pytest.mark.parametrize("size", [56, 28, 14, 7, 4])
def test_border_loss(size: int) -> None:
    """normalizer_free §6: zero padding leaves ((3n − 2)/3n)² of a 3×3 convolution's variance."""
    graph = trace(ScaledStdConv2d(8, 8, 3, padding=1), torch.randn(1, 8, size, size))
    expected = ((3 * size - 2) / (3 * size)) ** 2
    assert predict(graph)[1].var == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.SiLU()],
        [nn.BatchNorm2d(32), nn.GELU(), nn.Conv2d(32, 64, 1, bias=False), nn.ReLU(), nn.Conv2d(64, 64, 3)],
        [nn.BatchNorm2d(32), nn.AvgPool2d(2), nn.LeakyReLU(0.2)],
        [nn.BatchNorm2d(32), nn.MaxPool2d(3)],
        [nn.ConvTranspose2d(32, 64, 4, stride=2), nn.Tanh()],
        [nn.Conv2d(32, 64, 3, groups=4), nn.Sigmoid()],
    ],
)
def test_white_noise_through_ordinary_layers(layers: list[nn.Module]) -> None:
    torch.manual_seed(0)
    graph, seen = measured(nn.Sequential(*layers), torch.randn(16, 32, 24, 24))
    theory = predict(graph)
    last = graph.nodes[-1].index
    assert theory[last].var == pytest.approx(seen[last][1], rel=0.1)
    if theory[last].mean_sq > 0.01:
        assert theory[last].mean_sq == pytest.approx(seen[last][0], rel=0.3)


@pytest.mark.parametrize("channelwise", [False, True])
def test_a_converted_resnet_follows_its_design(channelwise: bool) -> None:
    """Post-activation: transitions reset to 1 + α², then ReLU and α² in turn; theory within a third."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 96, 96)
    new = convert(resnet50(), x, alpha=0.5, channelwise=channelwise)
    graph, seen = measured(new, x)
    theory = predict(graph)
    for join in graph.joins:
        assert theory[join.branch_end].var == pytest.approx(0.25)
        assert seen[join.branch_end][1] == pytest.approx(0.25, rel=0.01)
        if channelwise:
            assert theory[join.branch_end].mean_sq == 0
            assert seen[join.branch_end][0] < 1e-6
        assert theory[join.node].var == pytest.approx(seen[join.node][1], rel=0.34)
        if join.shortcut_nodes:
            assert theory[join.node].var == pytest.approx(1.25)


def test_weights_that_a_layer_computes_are_read_as_used() -> None:
    """timm's standardized convolutions compute their weight in forward; ours with the same constants agrees."""
    torch.manual_seed(0)
    theirs = timm.layers.ScaledStdConv2d(16, 32, 3, padding=1, gamma=1.7, eps=1e-6)
    graph, seen = measured(theirs, torch.randn(32, 16, 24, 24))
    assert predict(graph)[1].var == pytest.approx(seen[1][1], rel=0.05)
    ours = ScaledStdConv2d(16, 32, 3, padding=1, scale=1.7)
    assert predict(graph)[1].var == pytest.approx(
        predict(trace(ours, torch.randn(2, 16, 24, 24)))[1].var, rel=1e-2
    )
