from __future__ import annotations

import gc
import gzip
import hashlib
import http.server
import pickle
import struct
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from nfnets.errors import UserError
from nfnets.train.config import RunConfig
from nfnets.train.data import checksums, datasets, idx, load
from nfnets.train.data.datasets import FASHION_MNIST
from nfnets.train.data.splits import training_and_validation

rng = np.random.default_rng(0)


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """A small data set in the four files of MNIST."""
    for split, count in (("train", 50), ("t10k", 20)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    return tmp_path


def fashion_config(folder: Path, **fields) -> RunConfig:
    return RunConfig.create(data="fashion-mnist", data_dir=folder, **{"verify_data": False, **fields})


def rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_digits_are_split_without_loss_or_leak():
    data = load(RunConfig.create(data="digits"))
    assert (len(data.train), len(data.val), len(data.test)) == (1294, 144, 359)
    assert data.train.images.shape[1:] == (1, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    # The 1797 digits are all different, so sets of them show every leak.
    parts = [rows(split.images) for split in (data.train, data.val, data.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 1797
    whole = load_digits()
    of = {
        np.rint(i * 255 / 16).astype(np.uint8).tobytes(): t
        for i, t in zip(whole["images"], whole["target"], strict=True)
    }
    for split in (data.train, data.val, data.test):
        assert [of[i.numpy().tobytes()] for i in split.images] == split.labels.tolist()


def test_splits_do_not_depend_on_the_seed_nor_test_on_the_limit():
    one, two = (load(RunConfig.create(seed=seed)) for seed in (0, 1))
    few = load(RunConfig.create(train_limit=200))
    for split in ("train", "val", "test"):
        assert torch.equal(getattr(one, split).images, getattr(two, split).images)
    assert torch.equal(one.test.images, few.test.images)
    assert (len(few.train), len(few.val)) == (180, 20)


def test_a_smaller_limit_is_a_subset():
    few, more = (load(RunConfig.create(train_limit=n)) for n in (100, 300))
    small = rows(few.train.images) | rows(few.val.images)
    large = rows(more.train.images) | rows(more.val.images)
    assert small < large


def test_moments_are_the_training_splits():
    data = load(RunConfig.create())
    pixels = data.train.images.double() / 255
    assert data.mean == pytest.approx([float(pixels.mean())], rel=1e-12)
    assert data.std == pytest.approx([float(pixels.std(correction=0))], rel=1e-9)


def test_fashion_mnist_files(fashion: Path):
    data = load(fashion_config(fashion))
    assert (len(data.train), len(data.val), len(data.test)) == (45, 5, 20)
    assert (data.num_classes, data.channels, data.size) == (10, 1, 28)
    with gzip.open(fashion / "t10k-images-idx3-ubyte.gz") as file:
        expected = np.frombuffer(file.read()[16:], np.uint8).reshape(-1, 1, 28, 28)
    assert (data.test.images.numpy() == expected).all()


def test_torchvisions_layout(fashion: Path):
    (fashion / "FashionMNIST" / "raw").mkdir(parents=True)
    for path in fashion.glob("*.gz"):
        path.rename(fashion / "FashionMNIST" / "raw" / path.name)
    assert len(load(fashion_config(fashion)).test) == 20


def test_plain_files_and_the_other_spelling(fashion: Path):
    for path in list(fashion.glob("*.gz")):
        content = gzip.decompress(path.read_bytes())
        path.unlink()
        (fashion / path.stem.replace("-idx", ".idx")).write_bytes(content)
    assert len(load(fashion_config(fashion)).test) == 20


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_the_real_fashion_mnist():
    data = load(RunConfig.create(data="fashion-mnist"))
    assert (len(data.train), len(data.val), len(data.test)) == (54000, 6000, 10000)
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    # The often-quoted mean and deviation of the training set.
    assert data.mean[0] == pytest.approx(0.2860, abs=2e-3)
    assert data.std[0] == pytest.approx(0.3530, abs=2e-3)


def damage(path: Path, how: str) -> None:
    content = gzip.decompress(path.read_bytes())
    broken = {
        "missing": None,
        "gzip-truncated": path.read_bytes()[:-20],
        "not-gzip": b"<html>404</html>",
        "truncated": gzip.compress(content[:-5]),
        "header-only": gzip.compress(content[:6]),
        "magic": gzip.compress(b"\0\0\x0d" + content[3:]),
        "trailing": gzip.compress(content + b"\0"),
    }[how]
    if broken is None:
        path.unlink()
    else:
        path.write_bytes(broken)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "apt-get install dataset-fashion-mnist"),
        ("gzip-truncated", "not a readable IDX file"),
        ("not-gzip", "not a readable IDX file"),
        ("truncated", "its header says"),
        ("header-only", "truncated"),
        ("magic", "magic number 00000d03, expected 00000803"),
        ("trailing", "its header says"),
    ],
)
def test_damaged_files_are_named_in_one_line(fashion: Path, how: str, says: str):
    path = fashion / "train-images-idx3-ubyte.gz"
    damage(path, how)
    with pytest.raises(UserError) as caught:
        load(fashion_config(fashion))
    message = str(caught.value)
    assert says in message
    assert "train-images-idx3-ubyte" in message
    assert str(fashion) in message
    assert "\n" not in message


def test_labels_must_fit_images(fashion: Path):
    path = fashion / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros(49, np.uint8))))
    with pytest.raises(UserError, match="49 labels for 50 images"):
        load(fashion_config(fashion))
    path.write_bytes(gzip.compress(idx_bytes(np.full(50, 10, np.uint8))))
    with pytest.raises(UserError, match="label 10, expected 0 to 9"):
        load(fashion_config(fashion))


def test_empty_validation_is_refused():
    with pytest.raises(UserError, match="leave 0 for validation"):
        load(RunConfig.create(train_limit=4))


def test_idx_round_trip(tmp_path: Path):
    array = rng.integers(0, 256, (3, 4, 5), dtype=np.uint8)
    (tmp_path / "x").write_bytes(idx_bytes(array))
    assert (idx.parse(idx.unpack(tmp_path / "x"), 3, tmp_path / "x") == array).all()


def cifar_images(count: int) -> np.ndarray:
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8)


def python_batch(path: Path, images: np.ndarray, labels: list[int], name: bytes = b"labels") -> None:
    path.write_bytes(pickle.dumps({b"data": images, name: labels}, protocol=2))


@pytest.mark.parametrize("nested", [True, False])
def test_cifar10_python(tmp_path: Path, nested: bool):
    folder = tmp_path / "cifar-10-batches-py" if nested else tmp_path
    folder.mkdir(exist_ok=True)
    batches = [cifar_images(12) for _ in range(6)]
    for i, images in enumerate(batches[:5], 1):
        python_batch(folder / f"data_batch_{i}", images, [j % 10 for j in range(12)])
    python_batch(folder / "test_batch", batches[5], [9 - j % 10 for j in range(12)])
    data = load(RunConfig.create(data="cifar10", data_dir=tmp_path, verify_data=False))
    assert (len(data.train), len(data.val), len(data.test)) == (54, 6, 12)
    assert (data.test.images.flatten(1).numpy() == batches[5]).all()
    assert data.test.labels.tolist() == [9 - j % 10 for j in range(12)]


@pytest.mark.parametrize(("name", "lead"), [("cifar10", 1), ("cifar100", 2)])
def test_cifar_binary_takes_the_fine_label(tmp_path: Path, name: str, lead: int):
    files = {
        "cifar10": [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"],
        "cifar100": ["train.bin", "test.bin"],
    }[name]
    for file in files:
        images = cifar_images(10)
        labels = np.stack([np.full(10, 1), np.arange(10)][2 - lead :], 1).astype(np.uint8)
        (tmp_path / file).write_bytes(np.concatenate([labels, images], 1).tobytes())
    data = load(RunConfig.create(data=name, data_dir=tmp_path, verify_data=False))
    assert data.test.labels.tolist() == list(range(10))
    assert (data.test.images.flatten(1).numpy() == images).all()
    assert data.num_classes == {"cifar10": 10, "cifar100": 100}[name]
    (tmp_path / files[0]).write_bytes(b"\0" * 3000)
    with pytest.raises(UserError, match="3000 bytes, expected a multiple"):
        load(RunConfig.create(data=name, data_dir=tmp_path, verify_data=False))


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("never-made"),))


def test_cifar_pickles_may_call_nothing(tmp_path: Path):
    (tmp_path / "train").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "test").write_bytes(b"")
    with pytest.raises(UserError, match="not a cifar100 batch"):
        load(RunConfig.create(data="cifar100", data_dir=tmp_path, verify_data=False))
    assert not Path("never-made").exists()


def test_missing_cifar_names_the_folder(tmp_path: Path):
    with pytest.raises(UserError, match="cifar-10-batches-py"):
        load(RunConfig.create(data="cifar10", data_dir=tmp_path, verify_data=False))


def image_folder(root: Path, splits: tuple[str, ...], count: int = 10) -> None:
    for split in splits:
        for kind, color in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
            place = root / split / kind
            place.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20 + i, 30), color).save(place / f"{i}.png")


def test_image_folder(tmp_path: Path):
    image_folder(tmp_path, ("train", "val", "test"))
    data = load(RunConfig.create(data="imagefolder", data_dir=tmp_path, image_size=16))
    assert (len(data.train), len(data.val), len(data.test)) == (20, 20, 20)
    assert (data.num_classes, data.channels, data.size) == (2, 3, 16)
    for image, label in zip(data.train.images, data.train.labels, strict=True):
        assert image[:, 8, 8].tolist() == [[255, 0, 0], [0, 0, 255]][int(label)]


def test_bare_image_folder_is_split(tmp_path: Path):
    image_folder(tmp_path, ("",))
    data = load(RunConfig.create(data="imagefolder", data_dir=tmp_path, image_size=8))
    assert (len(data.train), len(data.val), len(data.test)) == (14, 2, 4)


def test_bad_image_folders(tmp_path: Path):
    def config(folder: Path) -> RunConfig:
        return RunConfig.create(data="imagefolder", data_dir=folder, image_size=8)

    with pytest.raises(UserError, match="is not a folder"):
        load(config(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="class folder"):
        load(config(tmp_path))
    image_folder(tmp_path, ("train", "val"))
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "wolf")
    with pytest.raises(UserError, match="differ in classes: dog, wolf"):
        load(config(tmp_path))
    (tmp_path / "val" / "wolf").rename(tmp_path / "val" / "dog")
    (tmp_path / "train" / "cat" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(UserError, match=r"3\.png: not a readable image"):
        load(config(tmp_path))


def test_constant_images_have_no_zero_deviation():
    mean, std = datasets._moments(np.full((3, 1, 2, 2), 51, np.uint8))
    assert mean == (0.2,)
    assert std == (1.0,)


def test_checksums_are_torchvisions():
    from torchvision import datasets as torchvision

    lists: Any = {"cifar10": torchvision.CIFAR10, "cifar100": torchvision.CIFAR100}
    for name, peer in lists.items():
        assert checksums.KNOWN[name] == dict(peer.train_list + peer.test_list)
    for name, peer in (("mnist", torchvision.MNIST), ("fashion-mnist", torchvision.FashionMNIST)):
        assert {f"{file}.gz" for file in checksums.KNOWN[name]} == {file for file, _ in peer.resources}


def test_altered_files_are_refused_by_checksum(fashion: Path, tmp_path: Path):
    for data in ("mnist", "fashion-mnist"):
        with pytest.raises(
            UserError, match=r"train-images-idx3-ubyte\.gz: MD5 [0-9a-f]{32}, expected"
        ) as caught:
            load(RunConfig.create(data=data, data_dir=fashion))
        assert "verify_data=false" in str(caught.value)
        assert len(load(RunConfig.create(data=data, data_dir=fashion, verify_data=False)).test) == 20
    python_batch(tmp_path / "data_batch_1", cifar_images(3), [0, 1, 2])
    with pytest.raises(UserError, match="data_batch_1: MD5"):
        load(RunConfig.create(data="cifar10", data_dir=tmp_path))
    binary = np.concatenate([np.zeros((10, 2), np.uint8), cifar_images(10)], 1).tobytes()
    (tmp_path / "train.bin").write_bytes(binary)
    with pytest.raises(UserError, match=r"train\.bin: 10 images, expected 50000"):
        load(RunConfig.create(data="cifar100", data_dir=tmp_path))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address that it is served at."""
    folder = tmp_path / "served"
    folder.mkdir()
    serve = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=serve.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{serve.server_port}/"
    serve.shutdown()
    thread.join()
    serve.server_close()


def test_mnist_is_downloaded_once(
    fashion: Path, tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
):
    from torchvision.datasets import MNIST

    folder, address = server
    resources = []
    for path in sorted(fashion.glob("*.gz")):
        content = path.read_bytes()
        (folder / path.name).write_bytes(content)
        resources.append((path.name, hashlib.md5(content).hexdigest()))
    monkeypatch.setattr(MNIST, "mirrors", [address])
    monkeypatch.setattr(MNIST, "resources", resources)
    config = RunConfig.create(data="mnist", data_dir=tmp_path / "got", download=True, verify_data=False)
    assert (len(load(config).train), len(load(config).test)) == (45, 20)
    for path in folder.iterdir():
        path.unlink()
    assert len(load(config).test) == 20  # what is there is not asked for again
    assert len(load(config.model_copy(update={"download": False})).test) == 20


def test_a_failed_download_is_one_line(
    tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
):
    from torchvision import datasets as torchvision

    folder, address = server
    monkeypatch.setattr(torchvision.MNIST, "mirrors", [address])
    monkeypatch.setattr(torchvision.CIFAR10, "url", address + "cifar-10-python.tar.gz")
    (folder / "cifar-10-python.tar.gz").write_bytes(b"not the archive")
    with warnings.catch_warnings():  # the 404 that torchvision got keeps a socket, until it is collected
        warnings.simplefilter("ignore", ResourceWarning)
        for data in ("mnist", "cifar10"):
            with pytest.raises(
                UserError, match=f"{data}: cannot be fetched into .*check the network"
            ) as caught:
                load(RunConfig.create(data=data, data_dir=tmp_path / data, download=True))
            assert "\n" not in str(caught.value)
        del caught
        gc.collect()
    with pytest.raises(UserError, match="nothing to fetch for 'digits'"):
        load(RunConfig.create(data="digits", download=True))


def test_unreadable_images_of_a_resident_folder_are_counted(tmp_path: Path):
    image_folder(tmp_path, ("train", "val", "test"))
    (tmp_path / "train" / "cat" / "3.png").write_bytes(b"")
    config = RunConfig.create(data="imagefolder", data_dir=tmp_path, image_size=8, unreadable_budget=1)
    data = load(config)
    assert len(data.train) == 19
    assert data.unreadable.summary()["by_split"] == {"train": 1}
    (tmp_path / "val" / "dog" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(UserError, match=r"0\.png.*2 of them, over unreadable_budget=1"):
        load(config)


@given(
    count=st.integers(50, 400), fraction=st.floats(0.1, 0.5), a=st.integers(20, 400), b=st.integers(20, 400)
)
def test_what_validates_under_one_limit_trains_under_none(
    count: int, fraction: float, a: int, b: int
) -> None:
    splits = [training_and_validation(count, fraction, limit, "digits") for limit in (a, b)]
    for (train, val), limit in zip(splits, (a, b), strict=True):
        assert len(train) + len(val) == min(count, limit)
        assert not any(set(val) & set(trained) for trained, _ in splits)
