"""Data sets on disk, sample by sample: timm's factory, torchvision's data sets, WebDataset shards."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nfnets.errors import UserError, unknown
from nfnets.train.config import TIMM, RunConfig
from nfnets.train.data.shards import IMAGES, Shards, is_web_dataset, shard_paths
from nfnets.train.data.tree import hidden, walk

# What a split may be called on disk, the plain name first.
SPELLINGS = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test",)}
_FOLDERS = ("", "folder", "tar", "torch/folder", "torch/image_folder")
_READERS = ("wds", "torch", "hfds")
_KNOWN = ("timm:folder", "timm:tar", "timm:wds", "timm:torch/NAME", "timm:hfds", "timm:hfds/OWNER/NAME")
_STREAMS = ("tfds/", "hfids/")
_TRAIN_AND_TEST = tuple(
    f"torch/{name}" for name in ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
)
# Ours, in `data_options`; whatever else stands there is timm's or the data set's own argument.
OPTIONS = frozenset({"train_split", "val_split", "test_split", "num_classes"})


class Source(Protocol):
    """One split: any sample at any time, in any process."""

    @property
    def num_classes(self) -> int: ...

    @property
    def names(self) -> list[str] | None: ...

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Every sample's class, where it is known without reading images."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[IO[bytes] | Image.Image, int]:
        """A file to decode (or an image that the data set decoded), and its class."""
        ...

    def name(self, index: int) -> str:
        """The sample's name, for messages."""
        ...


class TimmReader:
    """A split behind one of timm's readers that give any sample (folders, tars, Hugging Face's)."""

    root: Path | None = None
    """Of its class folders, if those are what it reads."""

    def __init__(self, reader: Any, folder: Path | None, what: str) -> None:
        self.reader, self.folder, self.what = reader, folder, what
        mapping: dict[str, int] | None = getattr(reader, "class_to_idx", None) or getattr(
            reader, "class_name_to_idx", None
        )
        self.names = None if not mapping else sorted(mapping, key=mapping.__getitem__)
        self.num_classes = len(mapping or ())
        self.labels = None
        if hasattr(reader, "targets"):
            self.labels = np.asarray(reader.targets, np.int64)
        elif hasattr(reader, "samples"):
            self.labels = np.asarray([label for _, label in reader.samples], np.int64)
        elif mapping and hasattr(reader, "dataset") and not getattr(reader, "remap_class", True):
            self.labels = _column(reader.dataset, reader.label_key)

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> tuple[IO[bytes], int]:
        file, label = self.reader[index][:2]
        return file, int(label)

    def name(self, index: int) -> str:
        name = self.reader.filename(index)
        if name is None:  # an image that a table holds
            return f"{self.what}[{index}]"
        return str(name) if self.folder is None else str(self.folder / name)


def _column(table: Any, name: str) -> NDArray[np.int64] | None:
    """A column of a Hugging Face data set, without reading the images beside it."""
    if name not in table.column_names:  # inside another one
        return None
    values = np.asarray(table.select_columns([name]).with_format("numpy")[:][name])
    return values.astype(np.int64) if values.ndim == 1 and values.dtype.kind in "iu" else None


class TorchData:
    """A split that one of torchvision's data sets reads and decodes."""

    labels = None
    root: Path | None = None

    def __init__(self, dataset: Any, what: str) -> None:
        self.dataset, self.what = dataset, what
        classes = getattr(dataset, "classes", None)
        self.names = None if classes is None else [str(name) for name in classes]
        self.num_classes = len(classes or ())

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.dataset[index]
        return image, int(label)

    def name(self, index: int) -> str:
        return f"{self.what}[{index}]"


def open_split(config: RunConfig, split: str) -> Source | None:
    """One split of the configured data set, or None where the data set has none of that name.

    Args:
        config: `data`, `data_dir`, `data_options` and `download` are read.
        split: "train", "val" or "test".

    Returns:
        The source.

    Raises:
        UserError: for files that are missing or damaged, a package that is not installed, a class folder without
            an image, a class map that is a pickle, and data sets that can only be read from front to back.
    """
    kind = config.data.removeprefix(TIMM) if config.data.startswith(TIMM) else ""
    options = {name: value for name, value in config.data_options.items() if name not in OPTIONS}
    classes = options.get("class_map")
    if isinstance(classes, str) and not classes.endswith(
        ".txt"
    ):  # timm unpickles another, before 1.0.27 anything
        raise UserError(
            f"data_options class_map={classes!r}: may run code; expected a .txt file of class names, or a mapping"
        )
    named = config.data_options.get(f"{split}_split")
    spellings = SPELLINGS[split] if named is None else (str(named),)
    if kind.lower().startswith(_STREAMS):
        raise UserError(
            f"data={config.data!r}: can only be read from front to back, so a run could neither shuffle by key nor "
            "resume; expected a folder, tars, timm:wds, timm:torch/NAME or timm:hfds/NAME"
        )
    if config.data.startswith(TIMM) and kind not in _FOLDERS and kind.split("/")[0].lower() not in _READERS:
        raise unknown("reader", config.data, _KNOWN)  # timm takes any other name for a folder's
    if kind in _FOLDERS or kind.split("/")[0] == "wds":
        found = _on_disk(config, kind, spellings, options)
    elif named is None and split == "val" and kind in _TRAIN_AND_TEST:
        found = None  # timm answers any split but train with the test images
    else:
        found = None
        for spelling in spellings:
            found = found or _made(config, kind, spelling, options, must=named is not None)
    if found is None and named is not None:
        raise UserError(f"data_options {split}_split={named!r}: {config.data} has no such split")
    if found is not None and len(found) == 0:
        raise UserError(f"{config.data}: the split {split} of {config.data_dir} is empty; fetch it again")
    return found


def _on_disk(
    config: RunConfig, kind: str, spellings: tuple[str, ...], options: dict[str, Any]
) -> Source | None:
    folder = config.data_dir
    if folder is None or not folder.is_dir():
        raise UserError(
            f"{config.data}: {folder} is not a folder; pass data_dir with train and val as folders of class folders, "
            "tars or WebDataset shards"
        )
    for spelling in spellings:
        paths, field = shard_paths(folder, spelling)
        # Tars of images alone lie in a folder of the split's name, or are one tar of that name.
        loose = bool(paths) and paths[0].parent == folder and not (folder / spelling).is_dir()
        loose = loose or (folder / "_info.json").exists()
        if paths and (kind.startswith("wds") or loose or is_web_dataset(paths[0])):
            return Shards(paths, str(options.get("target_key", field)))
        if kind.startswith("wds"):
            continue
        if (folder / f"{spelling}.tar").is_file():
            return _tarred(folder / f"{spelling}.tar", options)
        if paths and paths[0].parent.name == spelling:
            return _tarred(folder / spelling, options)
        if (folder / spelling).is_dir():
            return _in_folders(config, kind, folder / spelling, options)
    if spellings[0] in SPELLINGS["train"] and not kind.startswith("wds"):
        if any((folder / name).exists() for name in ("val", "validation", "test")):
            raise UserError(f"{config.data}: {folder} has no train beside its other splits; fetch it again")
        return _in_folders(config, kind, folder, options)
    return None


def _in_folders(config: RunConfig, kind: str, folder: Path, options: dict[str, Any]) -> Source:
    for _ in walk(folder):  # a link that leads back would be followed until the system gives up
        pass
    source = _made(config, kind, "", options, must=True, root=folder)
    assert isinstance(source, TimmReader | TorchData)
    _leave_hidden_out(folder, source, renumber="class_map" not in options)
    if isinstance(source, TimmReader):
        if "class_map" not in options:
            _no_empty_class(folder, source)
        source = TimmReader(source.reader, folder, source.what)
    else:
        source = TorchData(source.dataset, source.what)
    source.root = folder
    return source


def _leave_hidden_out(folder: Path, source: TimmReader | TorchData, renumber: bool) -> None:
    """Take hidden images, and classes that consist of them, out of what timm or torchvision listed."""
    listed: Any = source.reader if isinstance(source, TimmReader) else source.dataset
    seen = [
        (path, label)
        for path, label in listed.samples
        if not any(map(hidden, Path(path).relative_to(folder).parts))
    ]
    if len(seen) == len(listed.samples):
        return
    if renumber:
        number = {old: new for new, old in enumerate(sorted({label for _, label in seen}))}
        names = {name: number[old] for name, old in listed.class_to_idx.items() if old in number}
        listed.class_to_idx = names
        if hasattr(listed, "classes"):
            listed.classes = sorted(names, key=names.__getitem__)
        seen = [(path, number[label]) for path, label in seen]
    listed.samples = seen
    if hasattr(listed, "targets"):
        listed.targets = [label for _, label in seen]


def is_image(path: str) -> bool:
    """Whether a file's name ends as an image's."""
    return path.rpartition(".")[2].lower() in IMAGES


def _no_empty_class(folder: Path, source: TimmReader) -> None:
    """timm leaves a class folder without images out: every later class would get another number."""
    used = {os.path.relpath(path, folder).split(os.sep)[0] for path, _ in source.reader.samples}
    places = [place.name for place in folder.iterdir() if place.is_dir() and not hidden(place.name)]
    empty = sorted(set(places) - used)
    if empty:
        shown = ", ".join(empty[:5])
        raise UserError(
            f"{folder}: no image in class folder{'s' if len(empty) > 1 else ''} {shown}; add images or remove it"
        )


def _tarred(path: Path, options: dict[str, Any]) -> Source:
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    # Its cache is a pickle beside the tars, which timm before 1.0.27 loads whoever made it.
    options = options | {"cache_tarinfo": False}
    try:
        reader: Any = ReaderImageInTar(str(path), **options)
        # It keeps the tars that it has read from open, and never closes them.
        weakref.finalize(
            reader, _close, [reader.tar_state] if reader.root_is_tar else list(reader.tar_state.values())
        )
        return TimmReader(reader, path, str(path))
    except Exception as error:  # a damaged tar raises almost anything
        raise UserError(f"{path}: no images in it that timm can read ({_reason(error)})") from None


def _close(states: list[Any]) -> None:
    for state in states:
        _close(list(state.children.values()))
        if state.tf is not None:
            state.tf.close()


def _made(
    config: RunConfig, kind: str, split: str, options: dict[str, Any], *, must: bool, root: Path | None = None
) -> Source | None:
    """A split from `timm.data.create_dataset`; None where it has no such split and need not have one."""
    from timm.data.dataset_factory import create_dataset

    root = root or config.data_dir
    name = "" if kind in ("folder", "tar") else kind
    place = str(root or "data")
    hub = name.lower().strip("/") == "hfds" or name.lower().startswith("hfds/")
    if name.lower().strip("/") == "hfds":
        name, place = _on_this_disk(config), None
    elif hub:  # the folder is its cache, Hugging Face's own by default
        place = None if root is None else str(root)
    try:
        made: Any = create_dataset(
            name,
            root=place,
            split=split,
            search_split=False,
            download=config.download and name.lower().startswith("torch/") and root is not None,
            **options,
        )
    except ImportError as error:
        package = "datasets" if hub else str(error.name)
        raise UserError(f"data={config.data!r}: needs the package {package}; pip install {package}") from None
    except Exception as error:  # whatever timm's readers and torchvision's data sets raise
        if not must and split not in SPELLINGS["train"] and "split" in str(error).lower():
            return None
        raise UserError(
            f"{config.data}: cannot be read from {place or root or 'the Hub'} ({_reason(error)})"
        ) from None
    if hasattr(made, "reader"):
        return TimmReader(made.reader, None if hub else root, f"{config.data}/{split}")
    return TorchData(made, f"{name}/{split}" if split else str(root))


def _on_this_disk(config: RunConfig) -> str:
    """timm's name of a Hugging Face data set in a folder."""
    folder = config.data_dir
    if folder is None or not folder.exists():
        raise UserError(
            f"{config.data}: {folder} is not a folder; pass data_dir with class folders, Parquet files or what "
            "Dataset.save_to_disk wrote, or the name of a data set on the Hub as timm:hfds/OWNER/NAME"
        )
    return f"hfds/{folder.resolve()}"


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
