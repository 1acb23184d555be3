"""Scaled-standardized layers against torch's own convolutions, timm's layers and brute force."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from timm.layers import pad_same as timm_pad_same
from timm.layers.std_conv import ScaledStdConv2d as TimmScaledStdConv2d
from timm.layers.std_conv import ScaledStdConv2dSame as TimmScaledStdConv2dSame
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.functional import pad_same
from nfnets.layers import (
    ScaledStdConv1d,
    ScaledStdConv2d,
    ScaledStdConv3d,
    ScaledStdConvTranspose1d,
    ScaledStdConvTranspose2d,
    ScaledStdConvTranspose3d,
    ScaledStdLinear,
    scaled_std_class,
)

# (class, constructor arguments, input shape)
CASES: list[tuple[type, dict[str, Any], tuple[int, ...]]] = [
    (ScaledStdConv1d, {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "dilation": 2}, (2, 4, 11)),
    (ScaledStdConv1d, {"in_channels": 4, "out_channels": 4, "kernel_size": 5, "padding": "same"}, (2, 4, 11)),
    (ScaledStdConv2d, {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2}, (2, 4, 8, 9)),
    (ScaledStdConv2d, {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "groups": 4}, (2, 4, 8, 9)),
    (
        ScaledStdConv2d,
        {"in_channels": 3, "out_channels": 5, "kernel_size": (3, 1), "stride": (2, 1), "padding": (2, 1)},
        (2, 3, 8, 9),
    ),
    *(
        (
            ScaledStdConv2d,
            {"in_channels": 3, "out_channels": 5, "kernel_size": 3, "padding": 1, "padding_mode": mode},
            (2, 3, 7, 6),
        )
        for mode in ("reflect", "replicate", "circular")
    ),
    (
        ScaledStdConv3d,
        {"in_channels": 2, "out_channels": 3, "kernel_size": 2, "bias": False},
        (2, 2, 4, 5, 4),
    ),
    (
        ScaledStdConvTranspose1d,
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2},
        (2, 4, 5),
    ),
    (
        ScaledStdConvTranspose2d,
        {
            "in_channels": 4,
            "out_channels": 6,
            "kernel_size": 3,
            "stride": 2,
            "padding": 1,
            "output_padding": 1,
            "groups": 2,
        },
        (2, 4, 5, 5),
    ),
    (ScaledStdConvTranspose3d, {"in_channels": 2, "out_channels": 3, "kernel_size": 2}, (1, 2, 3, 3, 3)),
    (ScaledStdLinear, {"in_features": 7, "out_features": 5}, (3, 7)),
]


def randomized(layer: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    return layer


def plain_of(cls: type) -> type[nn.Module]:
    return getattr(nn, cls.__name__.removeprefix("ScaledStd"))


def units_first(weight: Tensor, layer: Any) -> Tensor:
    """One filter a row, by loops over the definition."""
    if not layer.unit_dim:
        return weight.reshape(len(weight), -1)
    inputs, outputs = weight.shape[0] // layer.groups, weight.shape[1]
    rows = [
        weight[group * inputs : (group + 1) * inputs, unit].reshape(-1)
        for group in range(layer.groups)
        for unit in range(outputs)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize(("cls", "arguments", "shape"), CASES)
def test_it_is_torchs_layer_run_with_the_effective_weight(cls: type, arguments: dict, shape: tuple) -> None:
    layer = randomized(cls(**arguments, scale=1.7, alpha=0.5))
    x = torch.randn(shape)
    plain = plain_of(cls)(**arguments)
    weight = layer.effective_weight().detach()
    rows, gain = units_first(weight, layer), layer.gain.detach()
    torch.testing.assert_close(rows.sum(1), torch.zeros(len(rows)), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.norm(dim=1), 1.7 * 0.5 * gain.abs(), rtol=1e-4, atol=1e-6)
    # The direction is the centered weight's.
    raw = units_first(layer.weight.detach(), layer)
    cosine = F.cosine_similarity(rows * gain.sign()[:, None], raw - raw.mean(1, keepdim=True))
    torch.testing.assert_close(cosine, torch.ones(len(rows)))
    with torch.no_grad():
        plain.weight.copy_(weight)
        if plain.bias is not None:
            plain.bias.copy_(1.7 * 0.5 * layer.bias)
    torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(layer.eval()(x), plain(x))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("stride", "dilation", "padding"), [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
def test_timms_layer_agrees(groups: int, stride: int, dilation: int, padding: int) -> None:
    theirs = TimmScaledStdConv2d(
        16, 24, 3, stride, padding, dilation, groups, gamma=1.7128586, eps=1e-10, gain_init=0.8
    )
    ours = ScaledStdConv2d(16, 24, 3, stride, padding, dilation, groups, scale=1.7128586)
    with torch.no_grad():
        ours.weight.copy_(theirs.weight)
        ours.gain.copy_(theirs.gain.reshape(-1))
        theirs.bias.normal_()
        ours.bias.copy_(theirs.bias / 1.7128586)
    x = torch.randn(2, 16, 9, 10)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_tensorflow_padding_is_timms(size: tuple, kernel: tuple, stride: tuple, dilation: tuple) -> None:
    x = torch.randn(1, 2, *size)
    ours = pad_same(x, kernel, stride, dilation)
    assert torch.equal(ours, timm_pad_same(x, list(kernel), list(stride), list(dilation)))


def test_tensorflow_padding_puts_the_odd_row_at_the_bottom() -> None:
    padded = pad_same(torch.ones(1, 1, 4, 4), (3, 3), (2, 2), (1, 1))
    assert padded.shape == (1, 1, 5, 5)
    assert padded[0, 0, 4].sum() == 0
    assert padded[0, 0, :4, :4].sum() == 16


@pytest.mark.parametrize("size", [8, 9])
def test_tf_same_layers_agree_with_timms(size: int) -> None:
    x = torch.randn(2, 4, size, size)
    theirs = TimmScaledStdConv2dSame(4, 6, 3, stride=2, eps=1e-10, gamma=1.0)
    ours = ScaledStdConv2d(4, 6, 3, stride=2, padding="tf_same")
    with torch.no_grad():
        ours.weight.copy_(theirs.weight)
        ours.bias.copy_(theirs.bias)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    taken = ScaledStdConv2d.from_plain(Conv2dSame(4, 6, 3, stride=2))
    assert taken.padding == "tf_same"
    assert taken(x).shape == ours(x).shape
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(again(x), ours(x))
    assert "tf_same" in repr(ours)


@pytest.mark.parametrize(("rank", "cls"), [(1, ScaledStdConv1d), (3, ScaledStdConv3d)])
def test_tf_same_in_one_and_three_dimensions(rank: int, cls: type) -> None:
    layer = cls(2, 3, 3, stride=2, padding="tf_same", padding_mode="replicate")
    assert layer(torch.randn(1, 2, *[6] * rank)).shape == (1, 3, *[3] * rank)


def test_variance_of_independent_inputs() -> None:
    torch.manual_seed(0)
    layer = ScaledStdConv2d(64, 256, 3, padding=1, padding_mode="circular", scale=1.3)
    y = layer(2.0 * torch.randn(16, 64, 8, 8) + 5.0)
    assert y.var().item() == pytest.approx((1.3 * 2.0) ** 2, rel=0.03)
    # Centering removes the inputs' mean of 5, which would otherwise dominate.
    assert y.mean().abs() < 0.05


def test_initialization_is_deepminds() -> None:
    torch.manual_seed(0)
    layer = ScaledStdConv2d(64, 256, 3)
    assert layer.weight.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.01)
    assert layer.bias is not None
    assert layer.bias.eq(0).all()
    assert layer.gain.eq(1).all()
    transposed = ScaledStdConvTranspose2d(64, 32, 3, groups=2)
    assert transposed.weight.std().item() == pytest.approx((32 * 9) ** -0.5, rel=0.02)
    with torch.no_grad():
        layer.gain.fill_(3)
    layer.reset_parameters()
    assert layer.gain.eq(1).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ScaledStdConv2d(8, 8, 1, groups=8),
        lambda: ScaledStdConv2d(1, 8, (1, 1)),
        lambda: ScaledStdConv1d(1, 8, kernel_size=1),
        lambda: ScaledStdLinear(1, 8),
        lambda: ScaledStdLinear(0, 8),
        lambda: ScaledStdConv3d(0, 8, 3),
        lambda: ScaledStdConvTranspose2d(1, 8, 1),
        lambda: ScaledStdConvTranspose1d(4, 4, 1, groups=4),
        lambda: ScaledStdConv2d.from_plain(nn.Conv2d(4, 4, 1, groups=4)),
    ],
)
def test_fan_in_below_two_is_refused(make: Any) -> None:
    with pytest.raises(UserError, match=r"fan-in .*leave this layer a plain"):
        make()


def test_depthwise_above_one_tap_is_allowed() -> None:
    assert ScaledStdConv2d(8, 8, 3, groups=8)(torch.randn(1, 8, 5, 5)).std() > 0.1


@pytest.mark.parametrize(("cls", "arguments", "shape"), CASES)
def test_from_plain_takes_the_parameters_over(cls: type, arguments: dict, shape: tuple) -> None:
    plain = plain_of(cls)(**arguments).eval()
    twin = cls.from_plain(plain, scale=2.0)
    assert type(twin) is scaled_std_class(plain) is cls
    assert twin.weight is plain.weight
    assert plain.bias is None or twin.bias is plain.bias
    assert twin.bias is not None
    assert not twin.training
    assert twin(torch.randn(shape)).shape == plain(torch.randn(shape)).shape


def test_from_plain_keeps_type_and_frozenness() -> None:
    plain = nn.Conv2d(4, 6, 3, bias=False).double().requires_grad_(False)
    twin = ScaledStdConv2d.from_plain(plain)
    assert {p.dtype for p in twin.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in twin.parameters())
    assert {b.dtype for b in twin.buffers()} == {torch.float64}


def test_layers_with_a_forward_of_their_own_have_no_twin() -> None:
    class Own(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    assert scaled_std_class(Own(3, 4, 3)) is None
    assert scaled_std_class(nn.ReLU()) is None
    assert scaled_std_class(ScaledStdConv2d(3, 4, 3)) is None
    assert scaled_std_class(Conv2dSame(3, 4, 3)) is ScaledStdConv2d


def test_a_computed_weight_is_refused() -> None:
    plain = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    with pytest.raises(UserError, match="remove_parametrizations"):
        ScaledStdConv2d.from_plain(plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_statistics_in_fp32(dtype: torch.dtype) -> None:
    layer = randomized(ScaledStdConv2d(512, 8, 3)).to(dtype)
    weight = layer.effective_weight()
    assert weight.dtype == dtype
    exact = copy.deepcopy(layer).double().effective_weight()
    torch.testing.assert_close(weight.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    assert layer(torch.randn(1, 512, 4, 4, dtype=dtype)).dtype == dtype


def test_autocast_runs_the_convolution_in_bf16_and_the_statistics_in_fp32() -> None:
    layer = randomized(ScaledStdConv2d(64, 8, 3))
    x = torch.randn(2, 64, 6, 6)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert layer.effective_weight().dtype == torch.float32
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert ((y - exact).norm() / exact.norm()).item() < 0.01
    reference = copy.deepcopy(layer)
    reference.zero_grad()
    reference(x).sum().backward()
    cosine = F.cosine_similarity(layer.weight.grad.flatten(), reference.weight.grad.flatten(), dim=0)
    assert cosine > 0.999


@pytest.mark.parametrize(("cls", "arguments", "shape"), CASES)
def test_per_sample_gradients_equal_one_backward_per_sample(cls: type, arguments: dict, shape: tuple) -> None:
    layer = randomized(cls(**arguments))
    x = torch.randn(3, *shape[1:])
    params = {name: p.detach() for name, p in layer.named_parameters()}
    buffers = dict(layer.named_buffers())

    def loss(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, (params, buffers), (sample[None],)).square().sum()

    with (
        warnings.catch_warnings()
    ):  # some of torch's own convolutions have no batching rule for their backward
        warnings.filterwarnings("ignore", message="There is a performance drop")
        per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    for i, sample in enumerate(x):
        layer.zero_grad()
        layer(sample[None]).square().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(per_sample[name][i], parameter.grad, rtol=1e-4, atol=1e-4)


def test_an_ensemble_by_vmap_over_stacked_states() -> None:
    layers = [randomized(ScaledStdConv2d(3, 4, 3), seed).eval() for seed in range(3)]
    params, buffers = torch.func.stack_module_state(layers)  # type: ignore[arg-type]
    base = copy.deepcopy(layers[0])
    x = torch.randn(2, 3, 6, 6)

    def call(params: dict, buffers: dict) -> Tensor:
        return torch.func.functional_call(base, (params, buffers), (x,))

    with torch.no_grad():
        base(x)  # remembers a weight that must not be used below
        ensemble = torch.vmap(call)(params, buffers)
        torch.testing.assert_close(ensemble, torch.stack([layer(x) for layer in layers]))


@pytest.mark.parametrize("training", [True, False])
def test_compile_is_one_graph(training: bool) -> None:
    model = nn.Sequential(
        ScaledStdConv2d(3, 8, 3, padding="tf_same", stride=2), nn.ReLU(), ScaledStdConvTranspose2d(8, 4, 2)
    )
    model = randomized(model).train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    if training:
        model(x).square().sum().backward()
        eager = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        compiled(x).square().sum().backward()
        torch.testing.assert_close([p.grad for p in model.parameters()], eager, rtol=1e-4, atol=1e-4)
    else:
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
            model[0].weight.data.normal_()
            torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_export_sees_the_computation() -> None:
    model = randomized(nn.Sequential(ScaledStdConv2d(3, 8, 3), nn.ReLU(), ScaledStdConv2d(8, 4, 1))).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)  # fills the memory
        program = torch.export.export(model, (x,))
    names = set(program.state_dict)
    assert {"0.weight", "0.gain", "0.scale"} <= names
    assert names == set(model.state_dict())
    torch.testing.assert_close(program.module()(x), expected)


def test_copies_pickles_and_state_dicts() -> None:
    layer = randomized(ScaledStdConv2d(3, 4, 3, scale=1.5, alpha=0.5)).eval()
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        expected = layer(x)
        assert set(layer.state_dict()) == {"weight", "bias", "gain", "scale", "alpha"}
        twins = [copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))]
        assert layer._remembered is not None
        assert all("_remembered" not in twin.__dict__ for twin in twins)
        fresh = ScaledStdConv2d(3, 4, 3)
        fresh.load_state_dict(layer.state_dict())
        for twin in [*twins, fresh.eval()]:
            assert torch.equal(twin(x), expected)
            assert str(twin) == str(layer)


def test_gradient_of_every_parameter() -> None:
    layer = ScaledStdConv2d(2, 3, 2, scale=1.2, alpha=0.7).double()
    params = [layer.weight, layer.gain, layer.bias]
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "gain": gain, "bias": bias}, (x,))

    inputs = (x, *(p.detach().requires_grad_() for p in params))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
