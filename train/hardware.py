"""What a run ran on: device, versions, memory."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nfnets.errors import UserError

PACKAGES = ("nfnets", "torch", "torchvision", "timm", "numpy")


def resolve(device: str) -> torch.device:
    """The torch device of "auto", "cpu" or "cuda".

    Raises:
        UserError: for "cuda" on a machine without it.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device='cuda': torch sees no GPU here; pass device='cpu' or 'auto'")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device == "cuda"
        else torch.device("cpu")
    )


def versions() -> dict[str, str]:
    """Python's and the decisive packages' versions."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # used from a source tree
            found[package] = "unknown"
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """The device's name, CPU, cores and threads."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def core_numbers() -> list[int]:
    """The CPU cores that this process may use, by the system's numbers."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(core_numbers())


def default_threads() -> int:
    """CPU threads of each run of a sweep, where nobody asks for others: OMP_NUM_THREADS, or one.

    Not the cores: results must not depend on the machine, nor on how many runs there are at once.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and 1 <= int(first) <= 1024 else 1


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many CPU threads in torch's operations while the context lasts; None leaves them."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: torch's allocations on a GPU, the whole process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident_mb(peak=True)


def resident_mb(*, peak: bool) -> float:
    """The process's resident memory in MiB, now or at its peak.

    Not getrusage's peak where the kernel tells more: a child inherits it, and hides below its parent's.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) / 2**10
    except (OSError, IndexError):  # not Linux
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / (2**20 if platform.system() == "Darwin" else 2**10)
