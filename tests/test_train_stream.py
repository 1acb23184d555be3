"""Streamed data sets against files written in their own formats, torchvision's crops and resident tensors."""

from __future__ import annotations

import io
import json
import multiprocessing
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_kills
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as transforms
from torchvision.transforms.transforms import RandomResizedCrop

from nfnets.errors import UserError
from nfnets.train.augment.pipeline import augmenter
from nfnets.train.config import RunConfig
from nfnets.train.data import decode, load
from nfnets.train.data.data import Data
from nfnets.train.data.decode import DRAWS
from nfnets.train.keyed import bits, key, uniform
from nfnets.train.loop import engine
from nfnets.train.loop.order import Batches

rng = np.random.default_rng(0)
CLASSES = ("cat", "dog", "eel")


def picture(index: int) -> Image.Image:
    """An image that its first pixel tells apart, losslessly."""
    pixels = rng.integers(0, 256, (20 + index % 5, 24 - index % 3, 3), dtype=np.uint8)
    pixels[:] = index
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def samples(split: str, count: int) -> list[tuple[str, int, bytes]]:
    """(name, class, file) of a split; every image has its own gray value."""
    start = {"train": 0, "val": 100, "test": 200}[split]
    return [(f"{i:03}", i % 3, png(picture(start + i))) for i in range(count)]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def as_folders(root: Path, split: str, count: int) -> None:
    for name, label, content in samples(split, count):
        place = root / split / CLASSES[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.png").write_bytes(content)


def as_tar(root: Path, split: str, count: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / f"{split}.tar", "w") as tar:
        for name, label, content in samples(split, count):
            add(tar, f"{CLASSES[label]}/{name}.png", content)


def as_class_tars(root: Path, split: str, count: int) -> None:
    (root / split).mkdir(parents=True)
    for label, kind in enumerate(CLASSES):
        with tarfile.open(root / split / f"{kind}.tar", "w") as tar:
            for name, this, content in samples(split, count):
                if this == label:
                    add(tar, f"{name}.png", content)


def as_shards(root: Path, split: str, count: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        with tarfile.open(root / f"set-{split}-{shard:04}.tar", "w") as tar:
            for name, label, content in samples(split, count)[shard::2]:
                add(tar, f"./{name}.cls", str(label).encode())
                add(tar, f"./{name}.png", content)


FORMATS: dict[str, Callable[[Path, str, int], None]] = {
    "folders": as_folders,
    "tar": as_tar,
    "class-tars": as_class_tars,
    "shards": as_shards,
}


def settings_of(folder: Path, **fields: Any) -> RunConfig:
    some = {"data": "imagenet", "data_dir": folder, "image_size": 16, "batch_size": 10, "workers": 0}
    return RunConfig.create(
        **(some | {"augment": "crop-flip", "device": "cpu", "interpolation": "bilinear"} | fields)
    )


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for split, count in (("train", 60), ("val", 15)):
        as_folders(tmp_path, split, count)
    return tmp_path


def contents(split: Any) -> dict[int, int]:
    """Gray value to class, of everything that an evaluation reads."""
    found: dict[int, int] = {}
    for part in split.parts(7):
        for image, label in zip(part.images, part.labels, strict=True):
            assert int(image[0, 0, 0]) not in found
            found[int(image[0, 0, 0])] = int(label)
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_every_sample_once_with_its_class(tmp_path: Path, kind: str):
    for split, count in (("train", 60), ("val", 15)):
        FORMATS[kind](tmp_path, split, count)
    data = load(settings_of(tmp_path))
    assert (len(data.train), len(data.val), len(data.test)) == (54, 6, 15)
    assert (data.num_classes, data.channels, data.size) == (3, 3, 16)
    assert contents(data.train) | contents(data.val) == {i: i % 3 for i in range(60)}
    assert contents(data.test) == {100 + i: i % 3 for i in range(15)}


def test_published_splits_are_used_as_they_are(tmp_path: Path):
    for split, count in (("train", 30), ("val", 9), ("test", 6)):
        as_folders(tmp_path, split, count)
    data = load(settings_of(tmp_path, data="timm:folder"))
    assert contents(data.val) == {100 + i: i % 3 for i in range(9)}
    assert contents(data.test) == {200 + i: i % 3 for i in range(6)}
    assert len(data.train) == 30


def test_torchvisions_reader_and_a_bare_folder(tmp_path: Path):
    as_folders(tmp_path, "train", 60)
    for kind, folder in (("timm:torch/image_folder", tmp_path), ("timm:", tmp_path / "train")):
        data = load(settings_of(folder, data=kind))
        parts = [contents(split) for split in (data.train, data.val, data.test)]
        assert [len(part) for part in parts] == [43, 5, 12]
        assert parts[0] | parts[1] | parts[2] == {i: i % 3 for i in range(60)}


def test_shards_with_info_and_json_classes(tmp_path: Path):
    for split, count in (("train", 24), ("validation", 6)):
        with tarfile.open(tmp_path / f"{split}.0.tar", "w") as tar:
            for i in range(count):
                add(tar, f"s{i}.json", json.dumps({"label": i % 3, "fine": i % 2}).encode())
                add(tar, f"s{i}.jpg", png(picture(i)))
    splits = {
        name: {
            "name": name,
            "filenames": [f"{name}.0.tar"],
            "shard_lengths": [n],
            "num_samples": n,
            "alt_label": key,
        }
        for name, n, key in (("train", 24, "label"), ("validation", 6, "label"))
    }
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    data = load(settings_of(tmp_path, data="timm:wds"))
    assert (len(data.train), len(data.val), len(data.test), data.num_classes) == (22, 2, 6, 3)
    fine = load(settings_of(tmp_path, data="timm:wds", data_options={"target_key": "fine"}))
    assert fine.num_classes == 2
    with (tmp_path / "train.0.tar").open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(UserError, match=r"train\.0\.tar: not a whole tar"):
        load(settings_of(tmp_path, data="timm:wds"))


def batches(data: Data, config: RunConfig, start: int, stop: int) -> list[Any]:
    return list(Batches(data, config, augmenter(data, config)).from_step(start, stop))


@pytest.mark.parametrize("kind", ["folders", "tar", "shards"])
def test_workers_change_no_bit_and_a_resumed_run_begins_in_the_middle(tmp_path: Path, kind: str):
    for split, count in (("train", 60), ("val", 15)):
        FORMATS[kind](tmp_path, split, count)
    config = settings_of(tmp_path, augment_repeats=2, randaugment_layers=1, random_erasing=0.5)
    data = load(config)
    expected = batches(data, config, 0, 12)  # beyond two epochs
    assert len({tuple(b.index.tolist()) for b in expected}) == 12
    threaded = config.model_copy(update={"workers": 3})
    for begin in (0, 7):
        found = batches(load(threaded), threaded, begin, 12)
        for one, two in zip(expected[begin:], found, strict=True):
            assert torch.equal(one.images, two.images)
            assert torch.equal(one.labels, two.labels)
    assert multiprocessing.active_children() == []
    # Nothing of the steps that were done is read again.
    stream: Any = data.train
    read: list[int] = []
    real = stream.samples.source.read
    stream.samples.source.read = lambda index: read.append(index) or real(index)
    batches(data, config, 7, 9)
    asked = torch.cat([b.index for b in expected[7:9]])
    assert read == stream.samples.rows[asked.numpy()].tolist()


def test_a_sample_draws_alone_and_anew_in_every_epoch(folders: Path):
    config = settings_of(folders)
    data = load(config)
    stream: Any = data.train
    together = next(iter(stream.draw([(0, torch.arange(20), torch.arange(20))])))[0]
    alone = next(iter(stream.draw([(0, torch.tensor([13]), torch.tensor([13]))])))[0]
    assert torch.equal(together[13], alone[0])
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    crops = stream.samples.crops

    def pixels(draw: int, epoch: int) -> Any:
        return crops(image, crops.draws([draw], epoch)[0])

    assert not np.array_equal(pixels(3, 0), pixels(3, 1))
    assert not np.array_equal(pixels(3, 0), pixels(4, 0))
    assert np.array_equal(pixels(3, 0), pixels(3, 0))
    # All at once are the numbers of each alone, made from its own key.
    together = crops.draws(range(50), 2)
    own = [int(bits(key(crops.seed, "resized-crop", 2), torch.tensor([i]))) for i in range(50)]
    alone = [uniform(k, torch.arange(DRAWS), torch.float64).tolist() for k in own]
    assert [draw.numbers for draw in together] == alone
    assert [draw.flipped for draw in together] == [
        draw.flipped for i in range(50) for draw in crops.draws([i], 2)
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(0, 10**9), st.floats(0.01, 1))
def test_crops_are_torchvisions(width: int, height: int, seed: int, least: float):
    draw = np.random.default_rng(seed)
    image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
    numbers = draw.random(decode.DRAWS).tolist()
    left, top, w, h = decode.crop_window(width, height, numbers, least)
    assert 0 <= left <= left + w <= width
    assert 0 <= top <= top + h <= height
    ours = decode.random_crop(image, 12, numbers, least, "bicubic")
    peers: Any = transforms.resized_crop(
        image, top, left, h, w, [12, 12], transforms.InterpolationMode.BICUBIC
    )  # pyright: ignore
    assert np.array_equal(np.asarray(ours), np.asarray(peers))
    resized: Any = transforms.resize(image, [13], transforms.InterpolationMode.BICUBIC)  # pyright: ignore
    peers = transforms.center_crop(resized, [12])
    assert np.array_equal(np.asarray(decode.center_crop(image, 12, 12 / 13, "bicubic")), np.asarray(peers))


def test_crop_windows_are_distributed_as_torchvisions():
    draws = np.random.default_rng(0).random((4000, decode.DRAWS)).tolist()
    ours = np.array([decode.crop_window(50, 40, numbers, 0.08) for numbers in draws])
    image = torch.zeros(3, 40, 50)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        params = [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in params])
    for values in (ours, theirs):
        assert values[:, 2].std() > 5
    # Means of 4,000 draws: a twentieth of a standard deviation is over three standard errors of the difference.
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.08 * theirs.std(0).max()
    assert np.abs(ours.std(0) - theirs.std(0)).max() < 0.08 * theirs.std(0).max()


TINY: dict[str, Any] = {"model": "train_nets:plain_net", "epochs": 1, "threads": 1}


def test_an_unreadable_image_fails_the_run_or_is_counted(folders: Path, tmp_path: Path):
    damaged = [folders / "train" / "cat" / "000.png", folders / "val" / "dog" / "001.png"]
    damaged[0].write_bytes(damaged[0].read_bytes()[:-30])
    damaged[1].write_bytes(b"")
    config = settings_of(folders, **TINY)
    with pytest.raises(UserError, match=r"000\.png: not a readable image .*; replace or remove it, or allow"):
        engine.run(config.model_copy(update={"epochs": 3}), tmp_path / "fails")
    with pytest.raises(UserError, match=r"2 of them, over unreadable_budget=1"):
        engine.run(config.model_copy(update={"unreadable_budget": 1, "epochs": 3}), tmp_path / "fails too")
    results = []
    for workers in (0, 2):
        changed = {"unreadable_budget": 2, "workers": workers, "epochs": 3}
        results.append(engine.run(config.model_copy(update=changed), tmp_path / f"{workers}"))
    for result in results:
        assert result["unreadable"]["by_split"] == {"test": 1, "train": 1}
        assert any("000.png" in text for text in result["unreadable"]["first"])
        # 14 of the 15 test images count, each once.
        assert result["test_accuracy"] * 14 == pytest.approx(round(result["test_accuracy"] * 14), abs=1e-9)
    assert results[0]["test_loss"] == results[1]["test_loss"]
    digests = [train_kills.digest(tmp_path / name) for name in ("0", "2")]
    assert digests[0] == digests[1]


def test_an_image_over_pils_limit_is_named(folders: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    for data in ("imagenet", "imagefolder"):
        with pytest.raises(UserError, match=r"\.png: not a readable image .*limit"):
            engine.run(settings_of(folders, data=data, **TINY), folders / "run")
    assert not (folders / "run").exists() or not (folders / "run" / "config.json").exists()


@pytest.mark.parametrize("data", ["imagenet", "imagefolder", "timm:torch/image_folder"])
def test_an_empty_class_folder_is_named(folders: Path, data: str):
    (folders / "train" / "bee").mkdir()
    with pytest.raises(UserError, match="bee"):
        load(settings_of(folders, data=data))


@pytest.mark.parametrize("data", ["imagenet", "imagefolder"])
def test_one_image_per_class(tmp_path: Path, data: str):
    for split in ("train", "val"):
        as_folders(tmp_path, split, 3)
    with pytest.raises(UserError, match=r"leave|no training image is left of 1 class"):
        load(settings_of(tmp_path, data=data, validation_fraction=0.3))
    as_folders(tmp_path, "test", 3)
    if data == "imagefolder":  # nothing needs to be held out
        assert len(load(settings_of(tmp_path, data=data)).train) == 3


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"data": "timm:tfds/mnist"}, "front to back"),
        ({"data": "timm:hfds", "data_dir": Path("nowhere")}, "nowhere is not a folder"),
        ({"data": "timm:torch/nonsense"}, "nonsense"),
        ({"data": "timm:fodler"}, "did you mean timm:folder"),
        ({"data": "timm:wds"}, "no training images"),
        ({"data_options": {"val_split": "dev"}}, "val_split='dev'"),
        ({"data_options": {"num_classes": 2}}, "from 3"),
        ({"data_dir": Path("nowhere")}, "nowhere is not a folder"),
    ],
)
def test_bad_settings_are_one_line(folders: Path, fields: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says) as caught:
        load(settings_of(folders).model_copy(update=fields))
    assert "\n" not in str(caught.value)


def test_what_is_no_tar_is_named_where_shards_are_expected(tmp_path: Path):
    (tmp_path / "set-train-0000.tar").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(UserError, match=r"set-train-0000\.tar: not a whole tar"):
        load(settings_of(tmp_path))


def test_classes_must_agree(folders: Path):
    (folders / "val" / "eel").rename(folders / "val" / "elk")
    with pytest.raises(UserError, match="differ in classes: eel, elk"):
        load(settings_of(folders))


def test_two_processes_share_the_reading(folders: Path, tmp_path: Path):
    fields = settings_of(
        folders, model="train_nets:plain_net", epochs=2, mixup=0.2, accumulation=1, workers=1
    )
    options = fields.model_dump() | {"threads": 1}
    for rank in train_kills.start_ranks(options, tmp_path / "two", 2):
        assert train_kills.finish(rank) == 0
    assert train_kills.finish(train_kills.start(options, tmp_path / "one")) == 0
    one, two = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("one", "two")
    )
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5)
