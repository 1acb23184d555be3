"""Moments against torch's own, in double precision, over layouts and types."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nfnets.errors import UserError
from nfnets.signal.moments import channel_moments, merge, similarity
from nfnets.signal.summary import fetch, finish, measure, merge_stats


def brute(x: torch.Tensor, dim: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    var, mean = torch.var_mean(x.double().movedim(dim, 0).flatten(1), 1, correction=0)
    return mean, var


def summary(*parts: torch.Tensor) -> dict[str, float]:
    stats = [fetch({"x": measure(part)})[0]["x"] for part in parts]
    return finish([merge_stats(stats)])[0]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 7), min_size=2, max_size=5),
    dim=st.integers(-5, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    transpose=st.booleans(),
    offset=st.sampled_from([0.0, 3.0, -100.0]),
    seed=st.integers(0, 99),
)
def test_any_layout_and_type(shape, dim, dtype, transpose, offset, seed):
    dim = dim % len(shape)
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset).to(dtype)
    x = x.transpose(0, -1).contiguous().transpose(0, -1) if transpose else x
    found = channel_moments(x, dim)
    mean, var = brute(x, dim)
    assert found.count == x.numel() // x.shape[dim]
    torch.testing.assert_close(found.mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.var.double(), var, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_large_mean_does_not_eat_the_variance(form):
    x = torch.randn(64, 8, 33, 33).add(1000.0).to(memory_format=form)
    torch.testing.assert_close(channel_moments(x).var.double(), brute(x)[1], rtol=1e-4, atol=0)


def test_half_precision_does_not_overflow():
    x = torch.full((4, 3, 8, 8), 60000.0, dtype=torch.float16)
    assert channel_moments(x).mean.tolist() == [60000.0] * 3
    assert channel_moments(x).var.tolist() == [0.0] * 3


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=4, unique=True), seed=st.integers(0, 99))
def test_merging_parts_gives_the_whole(cuts, seed):
    x = torch.randn(40, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3 + 7
    edges = [0, *sorted(cuts), 40]
    parts = [channel_moments(x[a:b]) for a, b in pairwise(edges)]
    total = parts[0]
    for part in parts[1:]:
        total = merge(total, part)
    mean, var = brute(x)
    assert total.count == 120
    torch.testing.assert_close(total.mean, mean)
    torch.testing.assert_close(total.var, var)


def test_similarity_is_torchs_cosine_over_all_pairs():
    x = torch.randn(6, 3, 4, 4) + 0.3
    flat = x.flatten(1)
    pairs = [
        F.cosine_similarity(flat[i], flat[j], dim=0).item() for i in range(6) for j in range(6) if i != j
    ]
    cosine, rank = similarity(x)
    assert cosine.item() == pytest.approx(sum(pairs) / 30, rel=1e-4)
    unit = F.normalize(flat.double(), dim=1)
    energy = torch.linalg.svdvals(unit).square()
    assert rank.item() == pytest.approx((energy.sum() ** 2 / energy.square().sum()).item(), rel=1e-4)


def test_similarity_of_channels_last_is_the_same():
    x = torch.randn(5, 8, 6, 6)
    torch.testing.assert_close(similarity(x), similarity(x.to(memory_format=torch.channels_last)))


def test_similarity_from_some_features_estimates_it_from_all():
    torch.manual_seed(0)
    x = torch.randn(8, 64, 32, 32) + torch.randn(64, 32, 32)
    exact, estimate = similarity(x), similarity(x, features=8192)
    assert estimate[0].item() == pytest.approx(exact[0].item(), abs=0.02)
    assert estimate[1].item() == pytest.approx(exact[1].item(), rel=0.05)
    assert estimate != exact


def test_one_direction_has_rank_one_and_a_single_sample_none():
    ray = torch.arange(1.0, 5.0)[:, None] * torch.randn(1, 12)
    cosine, rank = similarity(ray)
    assert (round(cosine.item(), 5), round(rank.item(), 5)) == (1.0, 1.0)
    assert all(math.isnan(v.item()) for v in similarity(torch.randn(1, 12)))


def test_summary_against_definitions():
    x = torch.randn(8, 6, 5, 5) * torch.arange(1.0, 7)[None, :, None, None] + 2
    x[:, 1] = 0.0
    x[:, 4] = -7.25
    found = summary(x)
    mean, var = brute(x)
    assert found["mean_sq"] == pytest.approx(mean.square().mean().item(), rel=1e-5)
    assert found["var"] == pytest.approx(var.mean().item(), rel=1e-5)
    assert found["total_mean"] == pytest.approx(x.double().mean().item(), rel=1e-5)
    assert found["total_var"] == pytest.approx(x.double().var(correction=0).item(), rel=1e-5)
    assert found["norm"] == pytest.approx(x.double().norm().item(), rel=1e-5)
    assert (found["min"], found["max"]) == (x.min().item(), x.max().item())
    assert found["dead"] == pytest.approx(2 / 6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_shows_in_the_extremes(bad):
    x = torch.randn(4, 3, 5, 5)
    x[1, 2, 3, 4] = bad
    found = summary(x)
    assert not (math.isfinite(found["min"]) and math.isfinite(found["max"]))


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.ones(3, 4, dtype=torch.int64), "int64"),
        (torch.ones(3), r"shape \(3,\)"),
        (torch.ones(0, 4), r"shape \(0, 4\)"),
    ],
)
def test_what_has_no_moments_is_refused(x, says):
    with pytest.raises(UserError, match=says):
        channel_moments(x)


def test_a_summary_merged_from_parts_is_that_of_the_whole():
    x = torch.randn(24, 6, 5, 5) * 3 + torch.arange(6.0)[:, None, None]
    x[:, 2] = 0.0  # dead in every part
    x[:8, 4], x[8:, 4] = 1.0, 2.0  # constant in each part, not in all
    whole, merged = summary(x), summary(*x.split([8, 4, 12]))
    assert whole["dead"] == pytest.approx(1 / 6)
    for name in ("mean_sq", "var", "total_mean", "total_var", "dead", "min", "max", "norm"):
        assert merged[name] == pytest.approx(whole[name], rel=1e-5), name


@pytest.mark.parametrize("where", [0, 1])
def test_a_merged_summary_forgets_no_nan(where):
    parts = [torch.randn(4, 3, 5), torch.randn(4, 3, 5)]
    parts[where][0, 0, 0] = math.nan
    assert math.isnan(summary(*parts)["min"])


def test_channels_with_large_means_are_centered_before_squaring():
    x = torch.randn(16, 8, 40, 40)
    x[:, 3] += 3000.0
    x[:, 5] = 777.0
    found, (_, var) = channel_moments(x), brute(x)
    torch.testing.assert_close(found.var.double(), var, rtol=1e-4, atol=1e-6)
    assert found.var[5] == 0


def test_many_tensors_of_mixed_types_come_over_together():
    tensors = [
        torch.randn(4, c, 3, dtype=d)
        for c, d in ((2, torch.float64), (5, torch.float32), (3, torch.bfloat16))
    ]
    raws = {i: measure(x, similar=i != 1) for i, x in enumerate(tensors)}
    stats, numbers = fetch(raws, {"seven": torch.tensor(7, dtype=torch.float16)})
    assert numbers == {"seven": 7.0}
    for x, found in zip(tensors, finish(list(stats.values())), strict=True):
        assert found["var"] == pytest.approx(brute(x)[1].mean().item(), rel=1e-4)
        assert found["max"] == x.max().item()
    assert stats[1].cosine is None
    assert stats[2].cosine is not None
