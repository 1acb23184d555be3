"""Delta-orthogonal and scaled orthogonal weights, against the oracles of JAX's and TensorFlow's tests."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nfnets.errors import UserError
from nfnets.init import delta_orthogonal_, scaled_orthogonal_
from nfnets.init.orthogonal import orthonormal_rows


def center(weight: torch.Tensor) -> torch.Tensor:
    return weight[(slice(None), slice(None), *(size // 2 for size in weight.shape[2:]))]


@settings(deadline=None, max_examples=30)
@given(
    channels=st.integers(1, 12),
    kernel=st.lists(st.sampled_from([1, 3, 5]), min_size=1, max_size=3),
    gain=st.sampled_from([1.0, 0.5, 3.0]),
)
def test_square_center_has_determinant_one_and_the_rest_is_zero(
    channels: int, kernel: list[int], gain: float
) -> None:
    weight = delta_orthogonal_(torch.full((channels, channels, *kernel), 7.0), gain)
    middle = center(weight).double() / gain
    assert torch.linalg.det(middle).abs().item() == pytest.approx(1, abs=1e-5)
    assert weight.square().sum().item() == pytest.approx(center(weight).square().sum().item())
    torch.testing.assert_close(middle @ middle.T, torch.eye(channels).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("outputs", [6, 9])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_keeps_the_norm_under_circular_padding(rank: int, outputs: int) -> None:
    weight = delta_orthogonal_(torch.empty(outputs, 6, *[3] * rank), gain=2.0)
    x = torch.randn(4, 6, *[8] * rank)
    padded = F.pad(x, [1] * (2 * rank), mode="circular")
    y = (F.conv1d, F.conv2d, F.conv3d)[rank - 1](padded, weight)
    torch.testing.assert_close(y.flatten(1).norm(dim=1), 2 * x.flatten(1).norm(dim=1), rtol=1e-5, atol=0)


def test_groups_are_isometries_of_their_own() -> None:
    weight = delta_orthogonal_(torch.empty(8, 2, 3, 3), groups=4)
    x = torch.randn(2, 8, 6, 6)
    y = F.conv2d(F.pad(x, [1] * 4, mode="circular"), weight, groups=4)
    torch.testing.assert_close(y.norm(), x.norm(), rtol=1e-5, atol=0)


def test_a_thousand_layers_keep_the_norm() -> None:
    x = torch.randn(2, 8, 4, 4)
    before = x.norm()
    for _ in range(1000):
        x = F.conv2d(F.pad(x, [1] * 4, mode="circular"), delta_orthogonal_(torch.empty(8, 8, 3, 3)))
    torch.testing.assert_close(x.norm(), before, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(256, 64, 1, 1), (64, 256, 1, 1), (32, 16, 3, 3), (16, 32, 3)])
@pytest.mark.parametrize("delta", [True, False])
def test_scaled_orthogonal_keeps_the_mean_square(shape: tuple[int, ...], delta: bool) -> None:
    weight = scaled_orthogonal_(torch.empty(shape), delta=delta)
    matrix = center(weight) if delta else weight.flatten(1)
    q = (matrix @ torch.randn(matrix.shape[1], 4000)).square().mean().item()
    assert q == pytest.approx(1, abs=0.03)  # DKS's own code gives 0.25 and 4.0 for the first two
    outputs, inputs = matrix.shape
    scale = max(1, outputs / inputs)
    small = matrix.T @ matrix if outputs >= inputs else matrix @ matrix.T
    torch.testing.assert_close(small, scale * torch.eye(min(outputs, inputs)), rtol=0, atol=1e-4)


def test_half_precision_generators_and_requires_grad() -> None:
    weight = torch.nn.Parameter(torch.empty(4, 4, 3, 3, dtype=torch.bfloat16))
    delta_orthogonal_(weight, generator=torch.Generator().manual_seed(1))
    other = delta_orthogonal_(torch.empty(4, 4, 3, 3), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(weight.detach().float(), other, rtol=1e-2, atol=1e-2)
    assert weight.requires_grad
    assert weight.grad_fn is None


@pytest.mark.parametrize(
    ("weight", "arguments", "message"),
    [
        (torch.ones(4, 4), {}, "3 to 5 dimensions"),
        (torch.ones(4, 8, 3, 3), {}, "in ≤ out"),
        (torch.ones(4, 4, 2, 3), {}, "even kernel"),
        (torch.ones(4, 4, 3, 3), {"groups": 3}, "divisor"),
        (torch.ones(4, 4, 3, 3), {"gain": float("nan")}, "finite"),
        (torch.ones(0, 4, 3, 3), {}, "non-empty"),
        (torch.ones(4, 4, 3, 3, dtype=torch.int32), {}, "floating point"),
    ],
)
def test_bad_input_changes_nothing(weight: torch.Tensor, arguments: dict, message: str) -> None:
    before = weight.clone()
    with pytest.raises(UserError, match=message):
        delta_orthogonal_(weight, **arguments)
    assert torch.equal(weight, before)


@pytest.mark.parametrize(("rows", "columns"), [(64, 576), (256, 64), (40, 80), (31, 62), (48, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_matrices_are_what_torch_draws_by_qr(rows: int, columns: int, dtype: torch.dtype) -> None:
    ours = orthonormal_rows(rows, columns, torch.empty(0, dtype=dtype), torch.Generator().manual_seed(3))
    torchs = nn.init.orthogonal_(
        torch.empty(rows, columns, dtype=dtype), generator=torch.Generator().manual_seed(3)
    )
    torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)
    gram = ours @ ours.T if rows < columns else ours.T @ ours
    torch.testing.assert_close(
        gram, torch.eye(len(gram), dtype=dtype), rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-14
    )
