"""WebDataset shards by random access: indexed once, so that any order and any resumption costs nothing.

timm's and webdataset's own readers are streams: what they give depends on the number of workers and on what was
read before. The shards are plain tar files, so a sample is an offset and a length in one of them.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nfnets.errors import UserError
from nfnets.train.data.tree import hidden

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "tif", "tiff")
_INFO = ("_info.json", "info.json")


class _Entry(NamedTuple):
    key: str
    offset: int
    size: int
    label: int


class Shards:
    """A split in WebDataset's format: tars whose members of one sample share a name up to the first dot.

    Args:
        paths: the shards, in their order.
        target_key: the field of each sample's `.json` that holds the class; "" reads its `.cls` file.
        image_keys: extensions that hold the image.

    Raises:
        UserError: for a shard that is no tar or is cut short, and for a sample without an image or a class.

    Reference:
        https://github.com/webdataset/webdataset; timm's `reader_wds`.
    """

    names: list[str] | None = None

    def __init__(self, paths: list[Path], target_key: str = "", image_keys: tuple[str, ...] = IMAGES) -> None:
        self.paths = paths
        shards: list[int] = []
        samples: list[_Entry] = []
        for number, path in enumerate(paths):
            found = list(_samples(path, target_key, image_keys))
            shards += [number] * len(found)
            samples += found
        self.shard = np.asarray(shards, np.int32)
        self.offset = np.asarray([s.offset for s in samples], np.int64)
        self.size = np.asarray([s.size for s in samples], np.int64)
        self.labels: NDArray[np.int64] = np.asarray([s.label for s in samples], np.int64)
        # One array, not a million strings: it is shared with every worker.
        self._keys = np.asarray([s.key.encode() for s in samples], np.bytes_)
        self.num_classes = int(self.labels.max(initial=-1)) + 1

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[IO[bytes], int]:
        """The image's bytes, and its class."""
        with self.paths[self.shard[index]].open("rb", buffering=0) as file:
            # A positioned read: workers that share the file share no position.
            content = os.pread(file.fileno(), int(self.size[index]), int(self.offset[index]))
        return io.BytesIO(content), int(self.labels[index])

    def name(self, index: int) -> str:
        """The shard and the sample's key in it."""
        return f"{self.paths[self.shard[index]]}:{self._keys[index].decode()}"


def shard_paths(folder: Path, split: str) -> tuple[list[Path], str]:
    """A split's shards in a folder, and the JSON field of the class that the folder's info names.

    `_info.json` (timm's) is believed where there is one; else every tar of the folder whose name has the split as a
    word (`imagenet-train-0001.tar`), or every tar of the folder `split`.

    Args:
        folder: the data set's.
        split: "train", "validation", …

    Returns:
        (shards in the order of their names, field or ""); no shards where there is no such split.

    Raises:
        UserError: when the info is not JSON of timm's form, or names shards that are not there.
    """
    for name in _INFO:
        if (folder / name).is_file():
            return _from_info(folder / name, split)
    inside = sorted((folder / split).glob("*.tar")) if (folder / split).is_dir() else []
    here = sorted(
        path
        for path in folder.glob("*.tar")
        if path.stem != split and split in path.stem.replace("_", "-").split("-")
    )
    return inside or here, ""


def _from_info(path: Path, split: str) -> tuple[list[Path], str]:
    try:
        splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
        if split not in splits:
            return [], ""
        files = [path.parent / name for name in splits[split]["filenames"]]
        field = str(splits[split].get("alt_label") or "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a WebDataset's info ({error!r}); expected splits with filenames"
        ) from None
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: no such shard, but {path.name} names it; fetch it again")
    return files, field


def is_web_dataset(path: Path) -> bool:
    """Whether a tar's first members carry a class beside the image, as WebDataset's do."""
    try:
        with tarfile.open(path, "r:") as tar:
            for _, member in zip(range(6), tar, strict=False):
                if member.name.endswith((".cls", ".json")):
                    return True
    except (tarfile.TarError, OSError):
        return False
    return False


def _samples(path: Path, target_key: str, image_keys: tuple[str, ...]) -> Iterator[_Entry]:
    try:
        with tarfile.open(path, "r:") as tar:
            key, members = "", dict[str, tarfile.TarInfo]()
            for member in tar:
                folder, slash, base = member.name.rpartition("/")
                if not member.isfile() or hidden(base):  # macOS puts ._NAME beside what it packs
                    continue
                stem, _, extension = base.partition(".")
                this = folder + slash + stem
                if this != key and members:
                    yield _sample(path, tar, key, members, target_key, image_keys)
                    members = {}
                key = this
                members[extension.lower()] = member
            if members:
                yield _sample(path, tar, key, members, target_key, image_keys)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a whole tar file ({error}); fetch the shard again") from None


def _sample(
    path: Path,
    tar: tarfile.TarFile,
    key: str,
    members: dict[str, tarfile.TarInfo],
    target_key: str,
    image_keys: tuple[str, ...],
) -> _Entry:
    image = next((members[name] for name in image_keys if name in members), None)
    if image is None:
        raise UserError(
            f"{path}: sample {key} has {', '.join(sorted(members))} and no image; expected one of "
            f"{', '.join(image_keys)}"
        )
    extension = "json" if target_key else "cls"
    if extension not in members:
        raise UserError(
            f"{path}: sample {key} has no .{extension}; expected its class there"
            + ("" if target_key else ", or in a .json field named by data_options target_key")
        )
    file = tar.extractfile(members[extension])
    assert file is not None  # a regular file
    content: Any = file.read()
    try:
        label = int(json.loads(content)[target_key] if target_key else content)
        if label < 0:
            raise ValueError(f"class {label}")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: sample {key}: no class in its .{extension} ({error!r}); expected an integer from 0"
        ) from None
    return _Entry(key, image.offset_data, image.size, label)
