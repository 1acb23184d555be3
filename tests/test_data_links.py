"""Folders of images as they lie on disks: links, hidden files, one class."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from nfnets.errors import UserError
from nfnets.hub import from_pretrained
from nfnets.train import saved_models
from nfnets.train.config import RunConfig
from nfnets.train.data import load

KINDS = ("imagefolder", "timm:folder", "imagenet", "timm:torch/image_folder")


def picture(path: Path) -> None:
    """Every one of another gray."""
    path.parent.mkdir(parents=True, exist_ok=True)
    gray = sum(map(ord, str(path))) % 200
    Image.fromarray(np.full((8, 8, 3), gray, np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 20), ("val", 4)):
        for name, i in itertools.product(("a", "b"), range(count)):
            picture(tmp_path / split / name / f"{i}.png")
    return tmp_path


def loaded(folder: Path, kind: str) -> tuple[int, int, list[int]]:
    config = RunConfig.create(data=kind, data_dir=folder, image_size=8, batch_size=4, workers=0, device="cpu")
    data = load(config)
    labels = [
        int(label)
        for split in (data.train, data.val, data.test)
        for p in split.parts(8)
        for label in p.labels
    ]
    return data.num_classes, len(data.train), sorted(labels)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_hidden_is_no_data(folder: Path, kind: str) -> None:
    before = loaded(folder, kind)
    for place in (".git/x.png", "a/.thumbs/x.png", "b/._0.png", "a/.DS_Store.jpg"):
        picture(folder / "train" / place)
        picture(folder / "val" / place)
    assert loaded(folder, kind) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_folder_elsewhere_is_followed(folder: Path, kind: str) -> None:
    before = loaded(folder, kind)
    (folder / "train" / "b").rename(folder / "elsewhere")
    (folder / "train" / "b").symlink_to(folder / "elsewhere")
    if kind in ("imagefolder", "timm:folder"):
        (folder / "train" / "a" / "0.png").rename(folder / "0.png")
        (folder / "train" / "a" / "0.png").symlink_to(folder / "0.png")
    assert loaded(folder, kind) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("link", "to", "words"),
    [
        ("train/a/loop", "train", "link back"),
        ("train/a/loop", "train/a", "link back"),
        ("train/a/loop", ".", "link back"),
        ("train/a/more", "train/b", "are one file"),
        ("train/a/more", "val/a", "are one file"),
        ("val/a/more", "train/b", "are one file"),
        ("train/a/again.png", "train/a/0.png", "are one file"),
        ("val/b/again.png", "train/b/0.png", "are one file"),
    ],
)
def test_links_by_which_images_multiply(folder: Path, kind: str, link: str, to: str, words: str) -> None:
    (folder / link).symlink_to((folder / to).resolve())
    with pytest.raises(UserError, match=words) as error:
        loaded(folder, kind)
    assert link in str(error.value)


def test_two_links_that_lead_to_each_other(folder: Path) -> None:
    (folder / "train" / "a" / "x").symlink_to(folder / "train" / "b")
    (folder / "train" / "b" / "y").symlink_to(folder / "train" / "a")
    with pytest.raises(UserError, match="link back"):
        loaded(folder, "imagefolder")


@pytest.mark.parametrize("kind", KINDS)
def test_one_class_is_nothing_to_learn(tmp_path: Path, kind: str) -> None:
    for split, i in itertools.product(("train", "val"), range(20)):
        picture(tmp_path / split / "a" / f"{i}.png")
    with pytest.raises(UserError, match="one class alone"):
        loaded(tmp_path, kind)


@pytest.mark.parametrize(
    "changed", [{"channels": 65_536}, {"num_classes": 1_000_000}, {"model": "timm:resnet50"}], ids=str
)
@pytest.mark.parametrize("empty", [True, False])
def test_a_recipe_larger_than_its_file_takes_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, object], empty: bool
) -> None:
    from nfnets.train.models import build

    made = {"model": "timm:resnet18", "method": "nf", "num_classes": 10, "channels": 3, "size": 64}
    net = build("timm:resnet18", num_classes=10, channels=3, size=64)
    state = {"x": torch.zeros(2)} if empty else net.state_dict()
    save_file(state, tmp_path / "nf.safetensors", {saved_models.KEY: json.dumps(made | changed)})
    asked: list[object] = []
    monkeypatch.setattr(saved_models, "noise", lambda *a, **k: asked.append(a))
    monkeypatch.setattr(saved_models, "rebuild", lambda *a, **k: asked.append(a))
    with pytest.raises(UserError, match=r"gives another model|holds .* numbers"):
        from_pretrained(tmp_path / "nf.safetensors")
    assert asked == []
