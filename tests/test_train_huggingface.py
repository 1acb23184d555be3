"""Hugging Face data sets that lie on this disk, in each of the forms that `datasets` writes and reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_stream import CLASSES, as_folders, contents, samples, settings_of

from nfnets.errors import UserError
from nfnets.train.augment.pipeline import augmenter
from nfnets.train.data import load
from nfnets.train.loop import engine
from nfnets.train.loop.order import Batches

datasets: Any = pytest.importorskip("datasets", reason="needs `pip install datasets`")

COUNTS = {"train": 30, "val": 9, "test": 6}


@pytest.fixture(autouse=True)
def apart(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing asks the Hub, nothing lands in the user's cache, no bars."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


def table(split: str, damaged: int | None = None) -> Any:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    rows = samples(split, COUNTS[split])
    files = [content if i != damaged else content[:40] for i, (_, _, content) in enumerate(rows)]
    images = [{"bytes": content, "path": None} for content in files]
    return datasets.Dataset.from_dict(
        {"image": images, "label": [label for _, label, _ in rows]}, features=features
    )


def as_parquet(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        table(split).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")


def as_saved(folder: Path) -> None:
    splits = {"train": table("train"), "validation": table("val"), "test": table("test")}
    datasets.DatasetDict(splits).save_to_disk(folder)


def as_class_folders(folder: Path) -> None:
    for split in COUNTS:
        as_folders(folder, split, COUNTS[split])


@pytest.mark.parametrize("write", [as_parquet, as_saved, as_class_folders])
def test_every_form_gives_every_sample_once_with_its_class(tmp_path: Path, write: Any):
    write(tmp_path / "set")
    data = load(settings_of(tmp_path / "set", data="timm:hfds"))
    assert contents(data.train) == {i: i % 3 for i in range(30)}
    assert contents(data.val) == {100 + i: i % 3 for i in range(9)}
    assert contents(data.test) == {200 + i: i % 3 for i in range(6)}
    assert data.num_classes == 3


def test_a_table_and_a_folder_of_the_same_images_train_the_same_weights(tmp_path: Path):
    as_parquet(tmp_path / "parquet")
    by_class = sorted(samples("train", 30), key=lambda sample: sample[1])
    train = table("train").select([int(name) for name, _, _ in by_class])  # in the order of folders
    train.to_parquet(tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet")
    as_class_folders(tmp_path / "folder")
    found = []
    for data, workers in (("timm:hfds", 2), ("timm:folder", 0)):
        place = tmp_path / ("parquet" if data == "timm:hfds" else "folder")
        config = settings_of(place, data=data, workers=workers)
        batches = Batches(load(config), config, augmenter(load(config), config))
        found.append(list(batches.from_step(0, 6)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


def test_a_run_names_the_row_of_an_unreadable_image(tmp_path: Path):
    splits = {"train": table("train", damaged=4), "test": table("test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "set")
    tiny = {"model": "train_nets:dropout_net", "epochs": 1, "threads": 1, "batch_size": 9}
    config = settings_of(tmp_path / "set", data="timm:hfds", **tiny)
    with pytest.raises(UserError, match=r"timm:hfds/train\[4\]: not a readable image"):
        engine.run(config, tmp_path / "strict")
    allowed = config.model_copy(update={"unreadable_budget": 1})
    result = engine.run(allowed, tmp_path / "run")
    assert (result["status"], result["unreadable"]["count"]) == ("done", 1)
    assert result["samples"] == {"train": 27, "val": 3, "test": 6}


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    with pytest.raises(UserError, match="pip install datasets"):
        load(settings_of(tmp_path, data="timm:hfds"))


def test_what_is_no_data_set_is_one_line(tmp_path: Path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").write_bytes(b"no table")
    with pytest.raises(UserError, match="timm:hfds: cannot be read") as caught:
        load(settings_of(tmp_path / "set", data="timm:hfds"))
    assert "\n" not in str(caught.value)
