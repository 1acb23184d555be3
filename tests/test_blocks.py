"""Constants, scalars, gates and masks, against timm and the definitions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import drop_path
from timm.layers.squeeze_excite import SEModule
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.layers import ChannelAffine, Scale, ScaledActivation, SkipInit, SqueezeExcite, StochasticDepth


def test_scale_travels_with_the_state() -> None:
    loaded = Scale()
    loaded.load_state_dict(Scale(0.25).state_dict())
    assert torch.equal(loaded(torch.ones(3)), torch.full((3,), 0.25))
    assert list(loaded.parameters()) == []


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_channel_affine_is_batch_norm_in_evaluation_mode(rank: int) -> None:
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank](5).eval()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    affine = ChannelAffine(5)
    with torch.no_grad():
        affine.weight.copy_(norm.weight / (1 + norm.eps) ** 0.5)
        affine.bias.copy_(norm.bias)
    x = torch.randn(4, 5, *[3] * rank)
    torch.testing.assert_close(affine(x), norm(x))


def test_skipinit_starts_a_block_as_the_identity_and_learns() -> None:
    skip, x, branch = SkipInit(), torch.randn(2, 3), torch.randn(2, 3)
    y = x + skip(branch)
    assert torch.equal(y, x)
    y.sum().backward()
    torch.testing.assert_close(skip.gain.grad, branch.sum())
    assert SkipInit(1.0)(branch).equal(branch)


@pytest.mark.parametrize(
    ("activation", "gain"),
    [(nn.ReLU(), 1.712858550449663), (nn.SiLU(), 1.787187222100442), (F.gelu, 1.700926243363333)],
)
def test_scaled_activation_has_unit_variance(activation: Any, gain: float) -> None:
    layer = ScaledActivation(activation)
    assert layer.gain == pytest.approx(gain, abs=1e-6)
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert layer(z).var().item() == pytest.approx(1, rel=0.02)
    # The activation first, then the gain: for GELU and SiLU the order matters.
    torch.testing.assert_close(layer(z), activation(z) * gain)
    assert ScaledActivation(activation, gain=2.0)(z).equal(activation(z) * 2.0)


@pytest.mark.parametrize("shape", [(3, 16, 7, 5), (2, 16, 9), (2, 16, 3, 4, 2)])
def test_squeeze_excite_is_timms_times_two(shape: tuple[int, ...]) -> None:
    theirs = SEModule(16, rd_channels=8)
    ours = SqueezeExcite(16, ratio=0.5)
    with torch.no_grad():
        for mine, other in ((ours.fc1, theirs.fc1), (ours.fc2, theirs.fc2)):
            mine.weight.copy_(other.weight.flatten(1))
            mine.bias.copy_(other.bias)
    x = torch.randn(shape)
    flat = x.flatten(2).unsqueeze(-1)
    torch.testing.assert_close(ours(x), 2.0 * theirs(flat).reshape(shape))


def test_squeeze_excite_hidden_width_is_floored() -> None:
    assert SqueezeExcite(50, ratio=0.25).fc1.out_features == 12
    assert SqueezeExcite(3, ratio=0.25).fc1.out_features == 1
    assert SqueezeExcite(50, 7).fc2.in_features == 7
    assert isinstance(SqueezeExcite(4, activation=nn.GELU()).activation, nn.GELU)
    with pytest.raises(UserError, match="at least 1"):
        SqueezeExcite(4, hidden=0)


def test_squeeze_excite_passes_its_input_when_the_gate_is_undecided() -> None:
    layer = SqueezeExcite(4)
    nn.init.zeros_(layer.fc2.weight)
    nn.init.zeros_(layer.fc2.bias)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(layer(x), x)  # 2 · sigmoid(0) = 1


def test_stochastic_depth_drops_whole_samples_and_does_not_rescale() -> None:
    torch.manual_seed(0)
    layer = StochasticDepth(0.3)
    x = torch.rand(4000, 2, 3) + 1
    y = layer(x)
    kept = y.flatten(1).ne(0).any(1)
    assert torch.equal(y[kept], x[kept])
    assert y[~kept].eq(0).all()
    # 4000 draws: four standard deviations are 0.029.
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.029)
    assert layer.eval()(x) is x


def test_stochastic_depth_rescaled_is_timms_drop_path() -> None:
    x = torch.ones(64, 2)
    ours = StochasticDepth(0.25, rescale=True)
    torch.manual_seed(0)
    assert set(drop_path(x, 0.25, training=True).unique().tolist()) == set(ours(x).unique().tolist())
    assert ours(torch.ones(20_000, 1)).mean().item() == pytest.approx(1, abs=0.02)
    assert StochasticDepth(1.0, rescale=True)(x).eq(0).all()
    assert StochasticDepth(0.0)(x) is x


def test_stochastic_depth_by_a_generator_leaves_the_global_one_alone() -> None:
    x = torch.ones(32, 1)

    def draw() -> Tensor:
        return StochasticDepth(0.5, source=torch.Generator().manual_seed(3))(x)

    before = torch.get_rng_state()
    first = draw()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draw(), first)
    assert 0 < first.mean() < 1


def test_stochastic_depth_by_keyed_masks() -> None:
    class Keyed:
        step = 0

        def __call__(self, n: int) -> Tensor:
            return torch.arange(n) % 2 == self.step % 2

    source = Keyed()
    layer = StochasticDepth(0.5, source=source)
    x = torch.ones(4, 1, 2, dtype=torch.float64)
    assert layer(x)[:, 0, 0].tolist() == [1, 0, 1, 0]
    source.step = 1
    assert layer(x)[:, 0, 0].tolist() == [0, 1, 0, 1]
    assert layer(x).dtype == torch.float64
    layer.source = lambda n: torch.ones(n + 1)
    with pytest.raises(UserError, match=r"expected \(4,\), one per sample"):
        layer(x)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_stochastic_depth_rates(rate: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        StochasticDepth(rate)


@pytest.mark.parametrize(
    "layer",
    [
        Scale(2),
        ChannelAffine(4),
        SkipInit(0.5),
        ScaledActivation(nn.GELU()),
        SqueezeExcite(4),
        StochasticDepth(0.5, source=torch.Generator().manual_seed(0)),
    ],
)
def test_copies_pickles_and_prints(layer: nn.Module) -> None:
    x = torch.randn(3, 4, 5)
    layer.eval()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert str(twin) == str(layer)


def test_blocks_compile_to_one_graph() -> None:
    model = nn.Sequential(
        Scale(2), ScaledActivation(nn.SiLU()), SqueezeExcite(4), StochasticDepth(0.5), SkipInit(0.3)
    )
    x = torch.randn(3, 4, 5)
    compiled = torch.compile(model.eval(), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    assert torch.compile(model.train(), fullgraph=True, backend="eager")(x).shape == x.shape
    torch._dynamo.reset()
