"""Data sets fetched by torchvision into the layout that the readers know."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from nfnets.errors import UserError

_CLASSES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}


def download(data: str, folder: Path) -> None:
    """Fetch what is missing of a data set; its files are checked against torchvision's sums as they come.

    Args:
        data: "mnist", "fashion-mnist", "cifar10" or "cifar100".
        folder: gets torchvision's layout (`MNIST/raw`, `cifar-10-batches-py`, …).

    Raises:
        UserError: for a data set that nobody offers, and for every failure of the network or the disk.

    Example:
        >>> download("digits", Path("data"))
        Traceback (most recent call last):
        ...
        nfnets.errors.UserError: download: nothing to fetch for 'digits'; expected mnist, fashion-mnist, cifar10 or \
cifar100
    """
    if data not in _CLASSES:
        raise UserError(
            f"download: nothing to fetch for {data!r}; expected mnist, fashion-mnist, cifar10 or cifar100"
        )
    from torchvision import datasets  # seconds that a run without a download need not pay

    try:
        folder.mkdir(parents=True, exist_ok=True)
        # torchvision draws a bar and prints every mirror that fails: the error names the last one.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            getattr(datasets, _CLASSES[data])(str(folder), download=True)
    except (OSError, RuntimeError, EOFError) as error:  # URLError is an OSError; a wrong sum a RuntimeError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{data}: cannot be fetched into {folder} ({reason}); check the network, or copy the files there"
        ) from None
