"""Scaled weight standardization against reference numbers, invariants, brute force, timm and autograd's checkers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from timm.layers.std_conv import ScaledStdConv2d as TimmScaledStdConv2d
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from nfnets.errors import UserError
from nfnets.functional import EPS, scaled_weight_standardization, standardize_rows

SHAPES = [(8, 4, 3, 3), (6, 1, 3, 3), (5, 7), (4, 3, 5), (4, 2, 3, 3, 3), (3, 2048)]

# PyTorch scripts its own forward-mode formulas and warns that scripting is deprecated.
FORWARD_AD = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is (deprecated|not supported):FutureWarning"
)


def weights(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    fan_in = max(1, torch.Size(shape[1:]).numel())
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * fan_in**-0.5 + 0.3).to(dtype)


def brute(weight: Tensor, gain: Tensor | None = None, eps: float = EPS) -> Tensor:
    """One unit after another, in double precision."""
    out = torch.empty(weight.shape, dtype=torch.float64)
    for i, unit in enumerate(weight.double()):
        n = unit.numel()
        mean = unit.sum() / n
        variance = ((unit - mean) ** 2).sum() / n
        g = 1.0 if gain is None else float(gain[i])
        out[i] = g * (unit - mean) / max(n * float(variance), eps) ** 0.5
    return out


def test_the_reference_sheets_two_examples() -> None:
    plain = scaled_weight_standardization(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    torch.testing.assert_close(
        plain, torch.tensor([[-0.670820, -0.223607, 0.223607, 0.670820]]), atol=1e-6, rtol=0
    )
    floored = scaled_weight_standardization(torch.tensor([[0.001, 0.002, 0.003, 0.004]]))
    torch.testing.assert_close(floored, torch.tensor([[-0.15, -0.05, 0.05, 0.15]]), atol=1e-6, rtol=0)
    assert floored.norm().item() == pytest.approx(0.2236, abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_invariants(shape: tuple[int, ...]) -> None:
    weight, gain = weights(shape), torch.linspace(-2, 3, shape[0])
    out = scaled_weight_standardization(weight, gain).flatten(1)
    rows = weight.flatten(1)  # an error of the mean by two units in its last place is added up N times
    rounding = rows.shape[1] * 2.0**-22 * rows.mean(1).abs() / (rows - rows.mean(1, keepdim=True)).norm(dim=1)
    assert (out.sum(1).abs() <= gain.abs() * (rounding + 2e-6)).all()
    torch.testing.assert_close(out.norm(dim=1), gain.abs(), rtol=1e-5, atol=1e-6)
    moved = scaled_weight_standardization(2.5 * weight - 0.7, gain).flatten(1)
    torch.testing.assert_close(moved, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_has_zero_sum_and_is_orthogonal_to_the_weight(shape: tuple[int, ...]) -> None:
    weight = weights(shape, dtype=torch.float64).requires_grad_()
    target = weights(shape, seed=1, dtype=torch.float64)
    (scaled_weight_standardization(weight) * target).sum().backward()
    assert weight.grad is not None
    gradient, rows = weight.grad.flatten(1), weight.detach().flatten(1)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient.sum(1), torch.zeros(shape[0]).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close((gradient * rows).sum(1), torch.zeros(shape[0]).double(), atol=1e-12, rtol=0)


@settings(max_examples=60, deadline=None)
@given(
    shape=hnp.array_shapes(min_dims=2, max_dims=5, max_side=6),
    scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3]),
    shift=st.sampled_from([0.0, 1.0, -30.0]),
    seed=st.integers(0, 10_000),
)
def test_any_shape_scale_and_shift(shape: tuple[int, ...], scale: float, shift: float, seed: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + shift * scale
    gain = torch.randn(shape[0], generator=torch.Generator().manual_seed(seed + 1))
    out = scaled_weight_standardization(weight, gain)
    assert out.shape == weight.shape
    # A mean 30 deviations off costs float32 two digits of the deviations.
    torch.testing.assert_close(out.double(), brute(weight, gain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4, 1e-8])
def test_a_constant_filter_becomes_zero_and_its_gradient_is_finite(value: float) -> None:
    weight = torch.full((2, 9), value, requires_grad=True)
    out = scaled_weight_standardization(weight)
    out.backward(torch.randn(2, 9))
    # One rounding of the mean, at most a millionth of the value, over the floor's square root of 1e-2.
    assert out.abs().max() <= 1e-6 * abs(value) / EPS**0.5
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


def test_below_the_floor_no_gradient_goes_through_the_variance() -> None:
    weight = (1e-4 * weights((3, 8), dtype=torch.float64)).requires_grad_()
    target = weights((3, 8), seed=1, dtype=torch.float64)
    (scaled_weight_standardization(weight) * target).sum().backward()
    centered = (target - target.mean(1, keepdim=True)) / EPS**0.5
    torch.testing.assert_close(weight.grad, centered)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_standardized_in_fp32(dtype: torch.dtype) -> None:
    weight = weights((4, 2048), dtype=dtype)
    out = scaled_weight_standardization(weight)
    assert out.dtype == dtype
    expected = brute(weight).to(dtype)
    torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    # In fp16 itself, squares of these weights would vanish: statistics must not be taken there.
    small = (weights((2, 64)) * 2e-4).to(dtype)
    torch.testing.assert_close(
        scaled_weight_standardization(small).double(), brute(small), rtol=0.02, atol=1e-3
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [(3,), (3, 3), (2, 1, 2)])
def test_transposed_units_by_brute_force(groups: int, kernel: tuple[int, ...]) -> None:
    inputs, outputs = 8, 4 * groups
    weight = weights((inputs, outputs // groups, *kernel))
    gain = torch.linspace(0.5, 1.5, outputs)
    out = scaled_weight_standardization(weight, gain, unit_dim=1, groups=groups)
    per_group = inputs // groups
    for unit in range(outputs):
        group, column = divmod(unit, outputs // groups)
        rows = slice(group * per_group, (group + 1) * per_group)
        expected = brute(weight[rows, column].reshape(1, -1), gain[unit : unit + 1])
        torch.testing.assert_close(out[rows, column].reshape(1, -1).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("eps", "close"), [(1e-6, 2e-3), (1e-8, 1e-4)])
def test_timm_agrees_as_its_eps_vanishes(eps: float, close: float) -> None:
    theirs = TimmScaledStdConv2d(16, 8, 3, gamma=1.7, eps=eps)
    seen: list[Tensor] = []
    convolve = torch.nn.functional.conv2d
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", lambda x, w, *a: seen.append(w) or convolve(x, w, *a))
        theirs(torch.zeros(1, 16, 8, 8))
    gain = 1.7 * theirs.gain.detach().reshape(-1)
    ours = scaled_weight_standardization(theirs.weight.detach(), gain)
    torch.testing.assert_close(ours, seen[0].detach(), rtol=close, atol=1e-6)


@FORWARD_AD
@pytest.mark.parametrize(("eps", "where"), [(EPS, "above"), (50.0, "below")])
def test_first_and_second_derivatives(eps: float, where: str) -> None:
    weight = weights((3, 2, 2), dtype=torch.float64).requires_grad_()
    gain = torch.tensor([0.7, -1.2, 2.0], dtype=torch.float64, requires_grad=True)
    assert (weight.flatten(1).var(1, correction=0) * 4 > eps).all() == (where == "above")

    def standardize(weight: Tensor, gain: Tensor) -> Tensor:
        return scaled_weight_standardization(weight, gain, eps)

    assert gradcheck(standardize, (weight, gain), check_forward_ad=True)
    assert gradgradcheck(standardize, (weight, gain))


def test_first_derivatives_where_some_units_are_below_the_floor() -> None:
    weight = weights((4, 6), dtype=torch.float64)
    weight = (weight * torch.tensor([[1.0], [1e-4], [2.0], [3e-4]])).requires_grad_()
    gain = torch.ones(4, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(scaled_weight_standardization(weight, gain)[:, 0].sum(), (weight, gain))
    formula = torch.autograd.grad(standardize_rows(weight, gain, EPS)[:, 0].sum(), (weight, gain))
    torch.testing.assert_close(ours, formula)


@pytest.mark.parametrize("which", ["weight", "gain", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fused_backward_is_the_formulas(which: str, dtype: torch.dtype) -> None:
    """Above the floor, below it, constant and far from zero, in one tensor."""
    weight = weights((6, 24), dtype=dtype) * torch.tensor(
        [[1.0], [1e-4], [300.0], [1e-3], [0.0], [1.0]], dtype=dtype
    )
    weight[5] += 5
    gain = torch.tensor([1.0, -2.0, 0.0, 0.5, 1.0, 3.0], dtype=dtype)
    weight.requires_grad_(which != "gain")
    gain.requires_grad_(which != "weight")
    inputs = [t for t in (weight, gain) if t.requires_grad]
    grad = weights((6, 24), seed=2, dtype=dtype)
    ours = torch.autograd.grad(scaled_weight_standardization(weight, gain), inputs, grad)
    double = [t.detach().double().requires_grad_(t.requires_grad) for t in (weight, gain)]
    exact = torch.autograd.grad(
        standardize_rows(double[0], double[1], EPS), [t for t in double if t.requires_grad], grad.double()
    )
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(
            mine, theirs.to(dtype), rtol=2e-4, atol=1e-5 if dtype == torch.float32 else 1e-12
        )


def test_a_batch_of_gradients_in_one_backward() -> None:
    weight = weights((3, 4)).requires_grad_()
    out = scaled_weight_standardization(weight)
    grads = torch.randn(5, 3, 4)
    (batched,) = torch.autograd.grad(out, weight, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, weight, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(batched, torch.stack(each))


def test_transposed_derivatives() -> None:
    weight = weights((4, 3, 2), dtype=torch.float64).requires_grad_()
    gain = torch.linspace(1, 2, 6, dtype=torch.float64).requires_grad_()
    assert gradcheck(lambda w, g: scaled_weight_standardization(w, g, EPS, 1, 2), (weight, gain))


def test_vmap_over_a_stack_of_weights_and_gains() -> None:
    weight, gain = weights((5, 4, 3, 2)), torch.rand(5, 4)
    mapped = torch.vmap(scaled_weight_standardization)(weight, gain)
    each = torch.stack([scaled_weight_standardization(w, g) for w, g in zip(weight, gain, strict=True)])
    torch.testing.assert_close(mapped, each)
    shared = torch.vmap(scaled_weight_standardization, in_dims=(0, None))(weight, gain[0])
    torch.testing.assert_close(shared[1], scaled_weight_standardization(weight[1], gain[0]))


@FORWARD_AD
def test_functional_transforms_agree_with_autograd() -> None:
    weight = weights((3, 4), dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return scaled_weight_standardization(w).pow(3).sum()

    hessian = torch.func.hessian(loss)(weight)
    expected = torch.autograd.functional.hessian(loss, weight)
    torch.testing.assert_close(hessian, expected)
    assert hessian.abs().max() > 0.1


def test_only_the_gain_can_be_trained() -> None:
    weight, gain = weights((3, 4)), torch.ones(3, requires_grad=True)
    scaled_weight_standardization(weight, gain)[:, 0].sum().backward()
    torch.testing.assert_close(gain.grad, scaled_weight_standardization(weight)[:, 0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"weight": torch.ones(3)}, "expected 2"),
        ({"weight": torch.ones(3, 2), "unit_dim": 2}, "unit_dim"),
        ({"weight": torch.ones(3, 2, dtype=torch.int64)}, "floating point"),
        ({"weight": torch.ones(3, 0, 3, 3)}, "fan-in 0"),
        ({"weight": torch.ones(3, 2), "eps": 0.0}, "above 0"),
        ({"weight": torch.ones(3, 2), "eps": float("nan")}, "above 0"),
        ({"weight": torch.ones(3, 2), "gain": torch.ones(2)}, r"expected \(3,\)"),
        ({"weight": torch.ones(3, 2), "unit_dim": 1, "groups": 2}, "divisor"),
    ],
)
def test_bad_input_is_refused(arguments: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        scaled_weight_standardization(**arguments)
