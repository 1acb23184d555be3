"""CIFAR-10's and CIFAR-100's own files, the Python and the binary version."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nfnets.errors import UserError
from nfnets.train.data import checksums

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]

_PIXELS = 3 * 32 * 32
# Per data set: the folders that its archives make, then per split the files of each version.
_PYTHON = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]),
    "cifar100": ("cifar-100-python", ["train"], ["test"]),
}
_BINARY = {
    "cifar10": ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]),
    "cifar100": ("cifar-100-binary", ["train.bin"], ["test.bin"]),
}
_BINARY_ROWS = {("cifar100", "train.bin"): 50_000}  # 10,000 in every other file
_LABEL = {"cifar10": b"labels", "cifar100": b"fine_labels"}
_LABEL_BYTES = {"cifar10": 1, "cifar100": 2}
_CLASSES = {"cifar10": 10, "cifar100": 100}


def read(name: str, folder: Path, verify: bool = True) -> tuple[Arrays, Arrays]:
    """Training and test images (uint8, N × 3 × 32 × 32) and labels of CIFAR-10 or CIFAR-100.

    Args:
        name: "cifar10" or "cifar100".
        folder: holds the files, or the folder that the official archive makes.
        verify: compare the Python version's files with their published checksums. There are none of the binary
            version's files, whose sizes tell a truncated one.

    Returns:
        ((training images, labels), (test images, labels)).

    Raises:
        UserError: for missing, truncated, foreign or altered files.

    Reference:
        https://www.cs.toronto.edu/~kriz/cifar.html
    """
    for versions, reader in ((_PYTHON, _read_python), (_BINARY, _read_binary)):
        inside, train, test = versions[name]
        for place in (folder, folder / inside):
            if (place / train[0]).is_file():
                first, second = (
                    [reader(name, place / file, verify) for file in files] for files in (train, test)
                )
                return _join(first), _join(second)
    raise UserError(
        f"{name}: no {_PYTHON[name][0]} or {_BINARY[name][0]} in {folder}; "
        f"unpack the archive of https://www.cs.toronto.edu/~kriz/cifar.html there, or pass data_dir"
    )


def _join(parts: list[Arrays]) -> Arrays:
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def _check(name: str, path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> Arrays:
    classes = _CLASSES[name]
    if len(images) == 0 or len(images) != len(labels):
        raise UserError(f"{path}: {len(images)} images and {len(labels)} labels; fetch {name} again")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"{path}: labels {labels.min()} to {labels.max()}, expected 0 to {classes - 1}: not {name}?"
        )
    return images.reshape(-1, 3, 32, 32), labels


def _read_binary(name: str, path: Path, verify: bool) -> Arrays:
    lead = _LABEL_BYTES[name]
    content = _bytes(path)
    record = lead + _PIXELS
    if not content or len(content) % record:
        raise UserError(f"{path}: {len(content)} bytes, expected a multiple of {record}; fetch {name} again")
    rows = np.frombuffer(content, np.uint8).reshape(-1, record)
    expected = _BINARY_ROWS.get((name, path.name), 10_000)
    if verify and len(rows) != expected:
        raise UserError(
            f"{path}: {len(rows)} images, expected {expected}; fetch {name} again, or pass verify_data=false for "
            "files of your own"
        )
    return _check(name, path, rows[:, lead:].copy(), rows[:, lead - 1].astype(np.int64))


def _read_python(name: str, path: Path, verify: bool) -> Arrays:
    content = _bytes(path)
    if verify:
        checksums.check(name, path.name, content, path)
    try:
        # The files are Python 2 pickles, whose strings come as bytes.
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        images = np.asarray(batch[b"data"], np.uint8)
        labels = np.asarray(batch[_LABEL[name]], np.int64)
        if images.ndim != 2 or images.shape[1] != _PIXELS:
            raise ValueError(f"rows of shape {images.shape[1:]}, expected {_PIXELS}")
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(f"{path}: not a {name} batch ({error!r}); fetch {name} again") from None
    return _check(name, path, images, labels)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; fetch the data set again") from None


class _ArraysOnly(pickle.Unpickler):
    """A pickle may call anything; a CIFAR batch needs NumPy arrays only."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"refuses to load {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
