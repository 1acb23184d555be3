from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nfnets.cli_console import told
from nfnets.errors import UserError
from nfnets.train.augment.pipeline import Augmenter, augmenter
from nfnets.train.config import RunConfig
from nfnets.train.data import Data, load
from nfnets.train.data.splits import Split
from nfnets.train.loop.order import Batches


@pytest.fixture(scope="module")
def colors() -> Data:
    images = torch.randint(
        0, 256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    split = Split(images, torch.arange(40) % 10)
    return Data(split, split, split, 10, 3, 16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def test_crop_and_flip_against_padding_and_slicing(colors: Data):
    augment = Augmenter(colors, "crop-flip", seed=3)
    index = torch.tensor([7, 31, 2, 7])
    got = augment(colors.train, index, epoch=5)
    rows, columns = augment.windows(index, 5)
    padded = F.pad(colors.train.images.float(), (2, 2, 2, 2))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (colors.mean, colors.std))
    for at, sample in enumerate(index.tolist()):
        top = int(rows[at, 0])
        mirrored = bool(columns[at, 0] > columns[at, 1])
        left = int(columns[at].min())
        assert -2 <= top <= 2
        assert -2 <= left <= 2
        window = padded[sample, :, top + 2 : top + 18, left + 2 : left + 18]
        if mirrored:
            window = window.flip(2)
        torch.testing.assert_close(got[at], (window / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_every_offset_and_both_mirrors_occur_evenly(colors: Data):
    augment = Augmenter(colors, "crop-flip", seed=0)
    rows, columns = (
        torch.cat(parts)
        for parts in zip(*(augment.windows(torch.arange(40), e) for e in range(250)), strict=True)
    )
    offsets = torch.bincount(rows[:, 0] + 2, minlength=5)
    assert len(offsets) == 5
    assert int(offsets.min()) > 0.9 * 2000
    assert 0.48 < float((columns[:, 0] > columns[:, 1]).float().mean()) < 0.52


@pytest.mark.parametrize("mode", ["none", "crop", "crop-flip"])
def test_an_image_does_not_depend_on_its_batch(colors: Data, mode: str):
    augment = Augmenter(colors, mode, seed=1)
    together = augment(colors.train, torch.arange(40), 2)
    for sample in (0, 17, 39):
        assert torch.equal(augment(colors.train, torch.tensor([sample]), 2)[0], together[sample])
    if mode != "none":
        assert not torch.equal(augment(colors.train, torch.arange(40), 3), together)
        assert not torch.equal(Augmenter(colors, mode, seed=2)(colors.train, torch.arange(40), 2), together)


def test_none_is_normalization_only():
    data = load(RunConfig.create())
    images = augmenter(data, RunConfig.create(augment="none"))(data.train, torch.arange(len(data.train)), 0)
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_digits_are_never_mirrored():
    data = load(RunConfig.create())
    assert not augmenter(data, RunConfig.create(augment="crop-flip")).flip


def batches(data: Data, **fields) -> Batches:
    config = RunConfig.create(**fields)
    return Batches(data, config, Augmenter(data, config.augment, config.seed))


def test_an_epoch_is_a_permutation_in_whole_batches(colors: Data):
    some = batches(colors, batch_size=6)
    assert some.per_epoch == 6
    first, second = (torch.cat([b.index for b in some.from_step(e * 6, e * 6 + 6)]) for e in (0, 1))
    assert len(set(first.tolist())) == len(first) == 36
    assert first.tolist() != second.tolist()
    assert first.tolist() == some.order(0)[:36].tolist()


@pytest.mark.parametrize("start", [0, 1, 5, 6, 11])
def test_any_step_can_be_the_first(colors: Data, start: int, monkeypatch: pytest.MonkeyPatch):
    from nfnets.train.loop import order

    whole = list(batches(colors, batch_size=6).from_step(0, 15))
    monkeypatch.setattr(order, "_CHUNK_BYTES", 4 * 3 * 16 * 16 * 6 * 4)  # chunks of 4 batches
    later = list(batches(colors, batch_size=6).from_step(start, 15))
    assert len(whole) == 15
    assert len(later) == 15 - start
    for a, b in zip(whole[start:], later, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.labels, colors.train.labels[a.index])


def test_arms_of_a_seed_see_the_same_batches(colors: Data):
    for a, b in zip(
        batches(colors, batch_size=8, lr=0.1).from_step(0, 7),
        batches(colors, batch_size=8, lr=0.2, method="nf", clipping=0.1).from_step(0, 7),
        strict=True,
    ):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.index, b.index)


def test_a_batch_larger_than_the_data_is_refused(colors: Data):
    with pytest.raises(
        UserError, match=r"batch_size=41: expected at most 40.*; pass batch_size=40 or less"
    ) as error:
        batches(colors, batch_size=41)
    assert told(error.value).endswith("pass --batch-size 40 or less")
