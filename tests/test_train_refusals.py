"""What a user, a damaged file or a stranger's file can get wrong: one line each, before anything is changed."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_train_stream import add, as_folders, picture, png, settings_of
from torch import nn
from torchvision.transforms import functional as transforms

from nfnets import state_dicts
from nfnets.cli_examples import example
from nfnets.errors import UserError
from nfnets.train import models, saved_models
from nfnets.train.compare import Arm, Event, Trial
from nfnets.train.compare.tables import duration
from nfnets.train.config import RunConfig
from nfnets.train.data import decode, load
from nfnets.train.data.readers import open_split
from nfnets.train.data.shards import Shards, shard_paths
from nfnets.train.data.splits import Split
from nfnets.train.inputs import Inputs
from nfnets.train.loop.evaluate import evaluate


def says(words: str, act: Callable[[], Any]) -> None:
    """It fails with one line that holds the words."""
    with pytest.raises(UserError) as caught:
        act()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"warmup_epochs": 3, "epochs": 2}, "at most epochs=2"),
        ({"min_lr": 1, "lr": 0.1}, "at most lr=0.1"),
        ({"momentum": 0}, "Nesterov"),
        ({"batch_size": 9, "augment_repeats": 2}, "divisor of batch_size=9"),
        ({"schedule": "steps"}, "expected epochs"),
        ({"decay_epochs": [1]}, "none for another"),
        ({"grad_checkpointing": True, "compile": True}, "set one of it"),
        ({"min_lr": 0.01, "schedule": "constant"}, "only schedule='cosine'"),
        ({"data": "imagenet"}, "set data_dir"),
        ({"data_options": {"num_classes": 3}}, "expected streamed data"),
    ],
)
def test_settings_that_contradict_each_other(fields: dict[str, Any], words: str):
    says(words, lambda: RunConfig.create(**fields))


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())


def test_weights_that_do_not_fit_leave_the_model_as_it_was(tmp_path: Path):
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_file({"0.weight": torch.zeros(2, 1, 3, 3)}, tmp_path / "half.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "code.pt").write_bytes(pickle.dumps(SimpleNamespace(a=1)))
    for name, words in {
        "nowhere.pt": "no such file",
        "half.safetensors": "0.bias",
        "noise.safetensors": "not readable as weights",
        "noise.pt": "noise.pt: not readable as weights",
        "list.pt": "not readable as weights",
        "code.pt": "can be loaded safely",
    }.items():
        says(words, lambda name=name: state_dicts.load_state(model, tmp_path / name))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.save({"state_dict": small().state_dict()}, tmp_path / "good.pt")
    state_dicts.load_state(model, tmp_path / "good.pt")
    assert not torch.equal(model.state_dict()["0.weight"], before["0.weight"])


def test_a_file_that_holds_no_recipe(tmp_path: Path):
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    says("no such file", lambda: saved_models.read_recipe(tmp_path / "nowhere"))
    says("no recipe in its metadata", lambda: saved_models.read_recipe(tmp_path / "bare.safetensors"))
    says("not a safetensors file", lambda: saved_models.read_recipe(tmp_path / "noise.safetensors"))


def test_bn_takes_no_options_in_a_recipe():
    bare = saved_models.Recipe("bn_resnet8_cifar", "bn", {"alpha": 0.5}, 10, 1, 8, 0, "0")
    inputs = Inputs((torch.randn(2, 1, 8, 8),), {})
    says("leaves the model alone", lambda: saved_models.convert_model(small(), inputs, bare))


def test_verifying_says_what_it_found():
    lines: list[str] = []
    model, other = small(), small()
    images = Inputs((torch.randn(4, 1, 8, 8),), {})
    assert saved_models.verify(model, model, images, "fold", lines.append)
    assert len(lines) == 2
    assert not saved_models.verify(other, model, images, "fold", lines.append)  # another function
    assert saved_models.verify(other, model, images, "nf", lines.append)  # which nf does not promise
    assert not saved_models.verify(nn.BatchNorm2d(1), model, images, "nf", lines.append)  # reads its batch


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.png": b"x"}, "has no .cls"),
        ({"a.cls": b"1"}, "no image"),
        ({"a.png": b"x", "a.cls": b"minus"}, "no class in its .cls"),
        ({"a.png": b"x", "a.cls": b"-1"}, "no class in its .cls"),
    ],
)
def test_shards_whose_samples_are_not_whole(tmp_path: Path, members: dict[str, bytes], words: str):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)  # is no sample
        for name, content in members.items():
            add(tar, name, content)
    says(words, lambda: Shards([tmp_path / "train.tar"]))


def test_an_info_that_names_what_is_not_there(tmp_path: Path):
    info = tmp_path / "_info.json"
    info.write_text("{}")
    says("not a WebDataset's info", lambda: shard_paths(tmp_path, "train"))
    info.write_text(json.dumps({"splits": {"train": {"filenames": ["a.tar"]}}}))
    says("no such shard", lambda: shard_paths(tmp_path, "train"))
    assert shard_paths(tmp_path, "val") == ([], "")


def test_an_empty_shard_and_a_missing_train_split(tmp_path: Path):
    with tarfile.open(tmp_path / "set-train-0.tar", "w"):
        pass
    says("is empty", lambda: open_split(settings_of(tmp_path), "train"))
    as_folders(tmp_path / "other", "val", 6)
    says("no train beside its other splits", lambda: open_split(settings_of(tmp_path / "other"), "train"))


def test_a_damaged_tar_of_images(tmp_path: Path):
    (tmp_path / "train.tar").write_bytes(bytes(512) + b"noise")
    says("no images in it that timm can read", lambda: open_split(settings_of(tmp_path), "train"))


def test_classes_that_only_another_split_has(tmp_path: Path):
    for split, classes in (("train", 2), ("val", 3)):
        with tarfile.open(tmp_path / f"set-{split}-0.tar", "w") as tar:
            for i in range(12):
                add(tar, f"{i}.png", png(picture(i)))
                add(tar, f"{i}.cls", str(i % classes).encode())
    says("test has class 2", lambda: load(settings_of(tmp_path)))


def test_models_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text("def build(num_classes): pass\n")
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"num_classes": 2, "channels": 1, "size": 8}
    says("did you mean build", lambda: models.build("mine:biuld", **options))
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    says("cannot take 1 channels", lambda: models._adapt_first_conv(grouped, 1))


def test_examples_take_real_images(tmp_path: Path):
    found = example("bn_resnet8_cifar", batch=4, data="digits")
    assert (found.inputs.args[0].shape, found.num_classes) == ((4, 1, 8, 8), 10)


def test_every_image_of_a_split_unreadable():
    class Nothing(Split):
        def parts(self, *_: Any) -> Any:
            return iter(())

    split = Nothing(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    says("not one of 3 images", lambda: evaluate(small(), split, torch.Tensor.float, batch_size=2))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # at which PIL goes on
def test_an_image_between_pils_limit_and_twice_of_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    file = io.BytesIO()
    Image.new("RGB", (30, 30)).save(file, "png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(decode.DecodeError, match="PIL's limit of 500"):
        decode.decode(file)


@pytest.mark.parametrize("size", [(90, 10), (10, 90), (30, 33)])
def test_a_window_that_never_fits_is_the_largest_central_one(size: tuple[int, int]):
    width, height = size
    ratio = min(4 / 3, max(3 / 4, width / height))
    w, h = (round(height * ratio), height) if width / height > ratio else (width, round(width / ratio))
    expected = ((width - w) // 2, (height - h) // 2, w, h)
    # Draws that ask for the whole area at the narrowest (or widest) ratio fit none of these.
    assert decode.crop_window(width, height, [1.0, 0.0, 0.0, 0.0] * 10, 1.0) == expected


def test_the_center_of_an_image_of_the_right_size_is_the_image():
    image = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    for how in ("wide", "square"):
        wide = image if how == "square" else image.resize((15, 10))
        expected = np.asarray(transforms.center_crop(wide, [10, 10]))
        assert np.array_equal(decode.pixels(decode.center_crop(wide, 10, 1.0, "bilinear")), expected)


def test_chunks_are_joined_in_their_order():
    parts = [torch.full((n, 3, 2, 2), n, dtype=torch.uint8) for n in (2, 1)]
    assert torch.equal(decode.joined(parts), torch.cat(parts))


def test_durations_in_words():
    assert [duration(s) for s in (59.4, 60, 3599, 3600)] == ["59 s", "1 min 0 s", "59 min 59 s", "1 h 0 min"]


def test_arms_that_are_no_pairs():
    says("expected method:field=value", lambda: Arm.parse("nf:clipping"))


def test_a_sweeps_boards_hold_each_run_in_its_folder(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own
        import torch.utils.tensorboard  # noqa: F401
    from test_board import scalars

    from nfnets.train.compare.board import Boards

    trials = [Trial("bn", 8, 0.1, seed) for seed in (0, 1)]
    with Boards(tmp_path) as boards:
        for trial in trials:
            boards(Event("step", trial, {"step": 1, "loss": 2.0 + trial.seed, "lr": 0.1}))
        boards(Event("end", trials[0], {"steps": 1, "test_loss": 3.0, "test_accuracy": None}))
    for trial in trials:
        found = scalars(tmp_path / "runs" / trial.folder / "tensorboard")
        assert found["train/loss"] == [(1, 2.0 + trial.seed)]
        assert ("test/loss" in found) == (trial.seed == 0)
