"""Which way standardization takes, and that all ways give the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nfnets.functional import EPS, scaled_weight_standardization
from nfnets.layers import ScaledStdConv2d
from nfnets.standardized import standardize_rows, standardized_rows


def rows(seed: int = 0) -> Tensor:
    return torch.randn(5, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_above_the_floor_the_backward_pass_is_pytorchs_own() -> None:
    weight = rows().requires_grad_()
    out = standardized_rows(weight, None, None, EPS)
    assert out.grad_fn is not None
    assert out.grad_fn.name() == "NativeGroupNormBackward0"
    weight = (1e-4 * rows()).requires_grad_()
    out = standardized_rows(weight, None, None, EPS)
    assert out.grad_fn is not None
    assert out.grad_fn.name() != "NativeGroupNormBackward0"


@pytest.mark.parametrize("small", [1.0, 1e-4, 0.0])
@pytest.mark.parametrize("with_gain", [True, False])
@pytest.mark.parametrize("scale", [None, 1.7])
def test_every_way_gives_what_the_formula_gives(small: float, with_gain: bool, scale: float | None) -> None:
    weight = rows() * torch.tensor([[1.0], [small], [1.0], [300.0], [1.0]])
    gain = torch.linspace(-1, 2, 5).double() if with_gain else None
    factor = None if scale is None else torch.tensor(scale, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (weight, gain) if t is not None]
    own = torch.ones(5).double() if gain is None else gain
    expected = standardize_rows(weight, own if factor is None else own * factor, EPS)
    ours = standardized_rows(weight, gain, factor, EPS)
    torch.testing.assert_close(ours, expected)
    grads = [torch.autograd.grad((out * rows(1)).sum(), inputs) for out in (ours, expected)]
    torch.testing.assert_close(*grads)


def test_a_unit_that_is_not_a_number_hides_no_other() -> None:
    weight = rows()
    weight[0, 0] = float("nan")
    weight[1] *= 1e-4
    ours = standardized_rows(weight, None, None, EPS)
    expected = standardize_rows(weight, torch.ones(5).double(), EPS)
    torch.testing.assert_close(ours, expected, equal_nan=True)
    assert ours[0].isnan().all()
    assert ours[1:].isfinite().all()


def test_a_scale_that_learns_gets_its_gradient() -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    out = scaled_weight_standardization(rows(), scale=scale)
    out[:, 0].sum().backward()
    torch.testing.assert_close(scale.grad, scaled_weight_standardization(rows())[:, 0].sum())


def test_shapes_without_numbers() -> None:
    """Nothing may be read of a fake tensor, or of one without memory."""
    with FakeTensorMode():
        layer = ScaledStdConv2d(3, 4, 3)
        out = layer(torch.randn(2, 3, 8, 8))
        out.sum().backward()
    assert out.shape == (2, 4, 6, 6)
    assert scaled_weight_standardization(torch.empty(4, 3, device="meta")).shape == (4, 3)


def test_under_a_dispatch_mode_the_numbers_are_the_same() -> None:
    layer = ScaledStdConv2d(3, 4, 3)
    with FlopCounterMode(display=False):
        inside = layer.effective_weight()
    torch.testing.assert_close(inside, layer.effective_weight())
