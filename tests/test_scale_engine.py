"""The engine that makes targets hold: every statistic against its definition, one pass against many."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.layers import ChannelAffine, Scale, ScaledStdConv2d
from nfnets.scale.engine import set_scales, solve
from nfnets.scale.target import Target, form, spread_of
from nfnets.trace import trace

STATISTICS = {
    "channel variance": lambda x: x.movedim(1, 0).flatten(1).var(1, correction=0).mean(),
    "variance": lambda x: x.var(),
    "mean square": lambda x: x.square().mean(),
}


def images(n: int = 12, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_a_statistic_is_its_quadratic_form(statistic: str, factor: float) -> None:
    z, bias = images(), torch.tensor([0.5, -2.0, 1.0]).double()
    full = z + bias[:, None, None]
    zz, zb, bb = form(statistic, spread_of(full, -3), bias)
    expected = STATISTICS[statistic](factor * z + bias[:, None, None])
    torch.testing.assert_close(factor**2 * zz + 2 * factor * zb + bb, expected)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_layer_meets_its_target_in_one_pass(statistic: str, bias: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(c, 6, 3, bias=bias) for c in (3, 6, 6)]
    net = nn.Sequential(layers[0], nn.ReLU(inplace=True), layers[1], nn.Tanh(), layers[2]).double()
    values = {"0": 0.7, "2": 1.5, "4": 3.0}
    _, trials = set_scales(net, images(), targets={p: Target(v, statistic) for p, v in values.items()})
    assert [(t.path, t.action) for t in trials] == [(path, "set") for path in values]
    x = images()
    for path, layer in net.named_children():
        x = layer(x)
        if path in values:
            assert float(STATISTICS[statistic](x.detach()).sqrt()) == pytest.approx(values[path], rel=1e-6)


def test_one_pass_gives_what_a_pass_for_each_layer_gives() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).double()
    slow = copy.deepcopy(net)
    set_scales(net, images(), targets={path: Target(1.0, "variance") for path in "024"})
    with torch.no_grad():
        for index in (0, 2, 4):
            before = slow[:index](images())
            z = F.conv2d(before, slow[index].weight)
            b = slow[index].bias[:, None, None].expand_as(z)
            cov = ((z - z.mean()) * (b - b.mean())).sum() / (z.numel() - 1)
            root = cov**2 - z.var() * (b.var() - 1)
            slow[index].weight.mul_((root.sqrt() - cov) / z.var())
    for one, other in zip(net.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("share", "expected"), [(0.4, 0.4), (0.6, 0.6), (1.9, 1.9), (3.0, 1.0), (0.1, 1.0)])
def test_an_output_within_its_bounds_stays(share: float, expected: float) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False)).double()
    size = net(images()).square().mean().sqrt().item()
    target = Target(size / share, "mean square", unless=(0.35, 2.0))
    set_scales(net, images(), targets={"0": target})
    found = net(images()).square().mean().sqrt().item() * share / size
    assert found == pytest.approx(expected, rel=1e-6)


def test_at_most_bounds_the_root_mean_square() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3)).double()
    nn.init.zeros_(net[0].bias)
    set_scales(net, images(), targets={"0": Target(5.0, at_most=0.25)})
    assert net(images()).square().mean().sqrt().item() == pytest.approx(0.25)


@pytest.mark.parametrize("limit", [4.0, math.inf])
def test_channels_get_one_variance_and_no_mean(limit: float) -> None:
    torch.manual_seed(0)
    layer = ScaledStdConv2d(3, 8, 3).double()
    net = nn.Sequential(layer)
    by = "constant" if limit < math.inf else "weight"
    target = Target(0.5, "channel variance" if by == "constant" else "variance", channels=limit, by=by)
    set_scales(net, images(), targets={"0": target})
    out = net(images()).detach().movedim(1, 0).flatten(1)
    torch.testing.assert_close(out.mean(1), torch.zeros(8).double(), atol=1e-9, rtol=0)
    correction = 0 if by == "constant" else 1
    torch.testing.assert_close(out.std(1, correction=correction), torch.full((8,), 0.5).double())


def test_a_constant_is_set_by_the_first_call_and_kept_through_the_pass() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Scale()

        def forward(self, x: Tensor) -> Tensor:
            return self.scale(self.scale(x))

    net, x = Twice().double(), 3 * images()
    _, trials = set_scales(net, x, targets={"scale": Target(1.0, by="constant")})
    assert [trial.action for trial in trials] == ["set", "shared"]
    value = 1 / STATISTICS["channel variance"](x).sqrt()
    torch.testing.assert_close(net.scale.value, value)
    torch.testing.assert_close(net(x), x * value**2)


def test_what_cannot_be_set_stays_and_says_why() -> None:
    class Forgetful(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(input, self.weight / self.weight.norm())

    net = nn.Sequential(
        nn.Conv2d(3, 4, 3).requires_grad_(False),
        Forgetful(4, 4, 1),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 1),
    ).double()
    nn.init.zeros_(net[2].weight)
    with torch.no_grad():
        net[3].bias.copy_(torch.tensor([9.0, -9.0, 9.0, -9.0]))
    before = copy.deepcopy(net.state_dict())
    _, trials = set_scales(net, images(), targets={path: Target(1.0, "variance") for path in "0123"})
    rows = [trial.row() for trial in trials]
    assert [row.action for row in rows] == ["frozen", "refused", "skipped", "skipped"]
    assert "follow its weight" in rows[1].reason
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_pass_that_fails_changes_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Scale(), nn.Linear(2, 2)).double()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UserError, match="forward fails on inputs"):
        set_scales(net, images(), targets={"0": Target(9.0), "1": Target(1.0, by="constant")})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_target_is_a_finite_number_above_0(value: float) -> None:
    with pytest.raises(UserError, match="expected a finite number above 0"):
        Target(value)


def test_nothing_is_solved_of_noise_around_a_mean() -> None:
    x = (1e4 + 1e-4 * torch.rand(8, 3, 4, 4)).float()
    _, factor, code = solve(Target(1.0), spread_of(x, -3), torch.zeros(()), torch.finfo(x.dtype).eps)
    assert (float(factor), int(code)) == (1.0, 2)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 8), nn.LayerNorm(6), ChannelAffine(8)])
def test_a_weight_for_each_channel_is_scaled_where_the_output_follows_it(norm: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), copy.deepcopy(norm)).double()
    set_scales(net, images(), targets={"1": Target(0.3, "variance")})
    assert net(images()).std().item() == pytest.approx(0.3)


def test_a_target_where_nothing_can_be_scaled_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).double()
    for path, by, message in (
        ("1", "weight", "ReLU has no weight"),
        ("0", "constant", "it has no constant"),
        ("7", "weight", "unknown module for a target"),
    ):
        with pytest.raises(UserError, match=message):
            set_scales(net, images(), targets={path: Target(by=by)})


def test_what_is_measured_is_no_part_of_the_graph() -> None:
    """A rescaled output stands where the output stood: the graph is that of a pass that measures nothing."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Scale(1.0), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()
    targets = {"0": Target(2.0), "1": Target(0.5, by="constant"), "3": Target(1.0)}
    graph, trials = set_scales(model, images(), targets=targets)
    assert [(node.kind, node.name, node.inputs) for node in graph.nodes] == [
        (node.kind, node.name, node.inputs) for node in trace(model, images()).nodes
    ]
    assert [trial.action for trial in trials] == ["set"] * 3
