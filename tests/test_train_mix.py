from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from timm.data.mixup import mixup_target

from nfnets.train.augment.mix import Mixer, box
from nfnets.train.config import RunConfig

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def shares(targets: torch.Tensor) -> float:
    """λ, read off a sample whose partner has another label."""
    return float(targets[1, 1])


def test_mixup_is_the_formula_with_timms_targets():
    mix = Mixer(RunConfig.create(mixup=0.4), 5)
    for step in range(20):
        images, targets = mix(IMAGES, LABELS, step)
        share = shares(targets)
        torch.testing.assert_close(images, share * IMAGES + (1 - share) * IMAGES.flip(0))
        torch.testing.assert_close(targets, mixup_target(LABELS, 5, share))


def test_mixups_share_is_beta():
    mix = Mixer(RunConfig.create(mixup=0.4), 5)
    drawn = [shares(mix(IMAGES, LABELS, step)[1]) for step in range(3000)]
    assert stats.kstest(drawn, stats.beta(0.4, 0.4).cdf).pvalue > 1e-3


def test_cutmix_pastes_a_box_and_counts_its_pixels():
    mix = Mixer(RunConfig.create(cutmix=1.0), 5)
    areas = []
    for step in range(200):
        images, targets = mix(IMAGES, LABELS, step)
        pasted = (images == IMAGES.flip(0)).all(1)
        kept = (images == IMAGES).all(1)
        assert bool((pasted ^ kept).all())
        assert bool((pasted == pasted[0]).all())
        rows, columns = pasted[0].any(1), pasted[0].any(0)
        assert torch.equal(pasted[0], rows[:, None] & columns[None])
        areas.append(float(pasted[0].double().mean()))
        assert shares(targets) == pytest.approx(1 - areas[-1], abs=1e-6)
    assert min(areas) < 0.05
    assert max(areas) > 0.6


def test_the_inputs_are_left_alone():
    before = IMAGES.clone()
    for fields in ({"mixup": 0.4}, {"cutmix": 1.0}):
        Mixer(RunConfig.create(**fields), 5)(IMAGES, LABELS, 3)
    assert torch.equal(IMAGES, before)


def test_both_take_turns_by_step():
    mix = Mixer(RunConfig.create(mixup=0.4, cutmix=1.0), 5)
    cut = [
        bool(((mix(IMAGES, LABELS, step)[0] == IMAGES) | (IMAGES.flip(0) == IMAGES)).any())
        for step in range(400)
    ]
    assert stats.binomtest(sum(cut), len(cut), 0.5).pvalue > 1e-3


def test_a_step_has_one_mixture():
    mix = Mixer(RunConfig.create(mixup=0.4, cutmix=1.0, seed=5), 5)
    again = Mixer(RunConfig.create(mixup=0.4, cutmix=1.0, seed=5, lr=0.3), 5)
    for step in (0, 7):
        for a, b in zip(mix(IMAGES, LABELS, step), again(IMAGES, LABELS, step), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(mix(IMAGES, LABELS, 0)[0], mix(IMAGES, LABELS, 1)[0])


@given(st.floats(0, 1), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32))
def test_boxes_stay_inside(share: float, height: int, width: int, seed: int):
    top, bottom, left, right = box(share, height, width, np.random.default_rng(seed))
    assert 0 <= top <= bottom <= height
    assert 0 <= left <= right <= width
    assert (bottom - top) * (right - left) <= (1 - share) * height * width + 1e-9
