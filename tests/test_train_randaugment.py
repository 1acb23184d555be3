from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from nfnets.errors import UserError
from nfnets.train.augment.erasing import AREA, RandomErasing
from nfnets.train.augment.pipeline import augmenter
from nfnets.train.augment.randaugment import OPERATIONS, SIGNED, RandAugment, apply
from nfnets.train.config import RunConfig
from nfnets.train.data import Data
from nfnets.train.data.splits import Split
from nfnets.train.loop.order import Batches


def pictures(channels: int, side: int = 16, count: int = 64) -> Tensor:
    """Smooth and rough images: enhancement and equalization act on them differently."""
    generator = torch.Generator().manual_seed(side)
    coarse = torch.rand(count, channels, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, side, mode="bilinear") * 200
    return (smooth + 55 * torch.rand(count, channels, side, side, generator=generator)).to(torch.uint8)


def data(channels: int, count: int = 64) -> Data:
    split = Split(pictures(channels, count=count), torch.arange(count) % 10)
    return Data(split, split, split, 10, channels, 16, (0.4,) * channels, (0.2,) * channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_torchvisions(operation: str, channels: int):
    theirs = v2.RandAugment(interpolation=v2.InterpolationMode.BILINEAR)
    strength, signed = theirs._AUGMENTATION_SPACE[operation]
    assert signed == (operation in SIGNED)
    images = pictures(channels, side=19)
    for bin_ in (0, 6, 15, 27, 30):
        values = strength(31, 19, 19)
        for sign in (1, -1) if signed else (1,):
            # Their strengths are float32, whose last place rounds a pixel halfway between two values the other way.
            value = 0.0 if values is None else sign * round(float(values[bin_]), 6)
            expected = torch.stack(
                [
                    theirs._apply_image_or_video_transform(
                        image, operation, value, interpolation=theirs.interpolation, fill=theirs._fill
                    )
                    for image in images
                ]
            )
            got = apply(operation, images, bin_ / 3, negative=sign < 0)
            assert got.dtype == torch.uint8
            assert int((got.int() - expected.int()).abs().max()) == 0


@pytest.mark.parametrize("magnitude", [0.0, 15.0, 30.0])
def test_any_magnitude_can_be_applied(magnitude: float):
    for operation in OPERATIONS:
        for negative in (False, True) if operation in SIGNED else (False,):
            assert apply(operation, pictures(3), magnitude, negative=negative).shape == (64, 3, 16, 16)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_its_images_one_by_one(channels: int):
    augment = RandAugment(3, 9, seed=4)
    images, draw = pictures(channels), torch.arange(100, 164)
    together = augment(images, draw, 2)
    for at in range(64):
        assert torch.equal(augment(images[at : at + 1], draw[at : at + 1], 2)[0], together[at])
        by_hand = images[at : at + 1]
        for layer in range(3):
            operation, negative = augment.drawn(draw[at : at + 1], 2, layer)
            by_hand = apply(OPERATIONS[int(operation)], by_hand, 9, negative=bool(negative))
        assert torch.equal(by_hand[0], together[at])
    assert not torch.equal(augment(images, draw, 3), together)
    assert not torch.equal(RandAugment(3, 9, seed=5)(images, draw, 2), together)


def test_operations_and_signs_are_drawn_evenly():
    augment = RandAugment(1, 9, seed=0)
    operation, negative = augment.drawn(torch.arange(140_000), 0, 0)
    counts = torch.bincount(operation, minlength=len(OPERATIONS))
    assert len(counts) == 14
    assert int(counts.min()) > 9_600
    assert int(counts.max()) < 10_400
    signed = operation < len(SIGNED)
    assert 0.49 < float(negative[signed].float().mean()) < 0.51
    assert not bool(negative[~signed].any())


def test_other_channels_are_refused():
    with pytest.raises(UserError, match="RandAugment of 4 channels: expected 1 or 3"):
        RandAugment(1, 9, 0)(torch.zeros(2, 4, 8, 8, dtype=torch.uint8), torch.arange(2), 0)


def test_boxes_are_in_the_image_and_of_the_drawn_area():
    top, left, tall, wide = RandomErasing(0.25, "mean", 1).boxes(torch.arange(40_000), 3, 48, 64)
    erased = wide > 0
    assert torch.equal(erased, tall > 0)
    assert 0.24 < float(erased.float().mean()) < 0.26
    assert bool(((top >= 0) & (top + tall <= 48) & (left >= 0) & (left + wide <= 64)).all())
    share = (tall * wide)[erased] / (48 * 64)
    assert AREA[0] * 0.8 < float(share.min())
    assert float(share.max()) < AREA[1] * 1.1
    assert float(share.mean()) == pytest.approx(sum(AREA) / 2, rel=0.05)
    ratio = (tall[erased] / wide[erased]).log()
    assert 0.5 < float((ratio > 0).float().mean() + 0.05) < 0.6
    # Corners are reached: an off-by-one would leave a row or a column out.
    assert int(top[erased].min()) == int(left[erased].min()) == 0
    assert int((top + tall)[erased].max()) == 48
    assert int((left + wide)[erased].max()) == 64


@pytest.mark.parametrize("fill", ["mean", "noise"])
def test_erasing_is_keyed_per_image(fill: str):
    erase = RandomErasing(0.5, fill, 0)
    images = torch.full((200, 3, 16, 16), 7.0)
    index = torch.arange(200)
    got = erase(images.clone(), index, 1)
    for at in (0, 77, 199):
        assert torch.equal(erase(images[at : at + 1].clone(), index[at : at + 1], 1)[0], got[at])
    top, left, tall, wide = erase.boxes(index, 1, 16, 16)
    for at in range(200):
        box = got[at, :, top[at] : top[at] + tall[at], left[at] : left[at] + wide[at]]
        assert int((got[at] != 7).sum()) == box.numel() == int(3 * tall[at] * wide[at])
    inside = got[got != 7]
    if fill == "mean":
        assert float(inside.abs().max()) == 0
    else:
        assert float(inside.mean()) == pytest.approx(0, abs=0.05)
        assert float(inside.std()) == pytest.approx(1, abs=0.05)
    assert not torch.equal(erase(images.clone(), index, 2), got)


FULL = {
    "augment": "crop-flip",
    "data": "cifar10",
    "randaugment_layers": 2,
    "random_erasing": 0.5,
    "erasing_fill": "noise",
}


def test_the_whole_augmentation_does_not_depend_on_the_batch():
    config = RunConfig.create(**FULL)
    some = data(3)
    augment = augmenter(some, config)
    together = augment(some.train, torch.arange(64), 1)
    for at in (0, 31, 63):
        assert torch.equal(augment(some.train, torch.tensor([at]), 1)[0], together[at])


def test_repeats_hold_every_image_so_often_with_other_draws():
    some = data(3)
    config = RunConfig.create(**FULL, batch_size=12, augment_repeats=3)
    batches = Batches(some, config, augmenter(some, config))
    assert batches.per_epoch == 5
    seen = []
    for batch in batches.from_step(0, 5):
        first, *others = batch.index.split(4)
        assert all(torch.equal(first, other) for other in others)
        assert torch.equal(batch.labels, some.train.labels[batch.index])
        for a, b in ((0, 4), (0, 8), (4, 8)):
            same = (batch.images[a : a + 4] == batch.images[b : b + 4]).flatten(1).all(1)
            assert int(same.sum()) == 0
        seen += first.tolist()
    assert seen == batches.order(0)[:20].tolist()
    # The first copy is what the image is without repeats; any step can be the first.
    alone = augmenter(some, config)(some.train, batch.index[:4], 0)  # pyright: ignore[reportPossiblyUnboundVariable]
    assert torch.equal(alone, batch.images[:4])  # pyright: ignore[reportPossiblyUnboundVariable]
    later = next(batches.from_step(4, 5))
    assert torch.equal(later.images, batch.images)  # pyright: ignore[reportPossiblyUnboundVariable]
