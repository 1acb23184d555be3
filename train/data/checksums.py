"""MD5 sums of the files that MNIST, Fashion-MNIST and CIFAR are published in."""

from __future__ import annotations

import hashlib
from pathlib import Path

from nfnets.errors import UserError

# The IDX files' contents, unpacked: repackers (Debian's package, say) compress them anew.
_MNIST = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
_FASHION = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
# The Python version's files, as torchvision.datasets knows them. None are published for the binary version's.
_CIFAR10 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
_CIFAR100 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
KNOWN = {"mnist": _MNIST, "fashion-mnist": _FASHION, "cifar10": _CIFAR10, "cifar100": _CIFAR100}


def check(data: str, file: str, content: bytes, path: Path) -> None:
    """Compare a file's content with what was published.

    Args:
        data: the data set.
        file: the file's published name; one without a known sum passes.
        content: its bytes, unpacked.
        path: where it lies, for the message.

    Raises:
        UserError: when they differ.

    Example:
        >>> check("mnist", "t10k-labels-idx1-ubyte", b"", Path("t10k"))
        Traceback (most recent call last):
        ...
        nfnets.errors.UserError: t10k: MD5 d41d8cd98f00b204e9800998ecf8427e, expected \
27ae3e4e09519cfbb04c329615203637 for mnist's t10k-labels-idx1-ubyte; fetch it again, or pass verify_data=false for \
files of your own
    """
    expected = KNOWN[data].get(file)
    if expected is None:
        return
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise UserError(
            f"{path}: MD5 {found}, expected {expected} for {data}'s {file}; fetch it again, or pass "
            "verify_data=false for files of your own"
        )
