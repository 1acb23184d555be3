"""MNIST's IDX files, plain or gzipped: read, and checked against their own header."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nfnets.errors import UserError

_UNSIGNED_BYTE = 0x08


def find(folder: Path, name: str) -> Path | None:
    """The file `name` or `name.gz` in the folder, with MNIST's two spellings (`-idx3` and `.idx3`)."""
    for spelling in (name, name.replace("-idx", ".idx")):
        for suffix in (".gz", ""):
            path = folder / (spelling + suffix)
            if path.is_file():
                return path
    return None


def unpack(path: Path) -> bytes:
    """The file's content, through gzip when its name ends in .gz; a UserError when it cannot be had."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable IDX file ({error}); fetch it again") from None


def parse(content: bytes, dimensions: int, path: Path) -> NDArray[np.uint8]:
    """The array in an IDX file's content.

    Header: two zero bytes, the type (0x08), the number of dimensions, then each size as a big-endian uint32.

    Args:
        content: of the file, unpacked.
        dimensions: how many are expected (3 for images, 1 for labels).
        path: is named in errors.

    Returns:
        A uint8 array of the header's shape.

    Raises:
        UserError: for truncated content, a wrong magic number, or trailing bytes.

    Example:
        >>> parse(bytes([0, 0, 8, 1, 0, 0, 0, 3, 5, 6, 7]), 1, Path("labels")).tolist()
        [5, 6, 7]

    Reference:
        http://yann.lecun.com/exdb/mnist/
    """
    magic = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    if content[:4] != magic:
        raise UserError(
            f"{path}: magic number {content[:4].hex() or 'missing'}, expected {magic.hex()} "
            f"(unsigned bytes, {dimensions} dimension{'s' if dimensions > 1 else ''}); fetch the file again"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise UserError(f"{path}: truncated within its header; fetch it again")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(content) - start != expected:
        raise UserError(
            f"{path}: {len(content) - start} bytes of data, its header says {expected}; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()
