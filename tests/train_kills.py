"""Child processes that train and are killed, each at a point of the parent's choice."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import socket
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file

from nfnets.errors import UserError
from nfnets.train.compare import workers
from nfnets.train.config import RunConfig
from nfnets.train.loop import engine, log
from nfnets.train.loop.log import Log
from nfnets.train.loop.trainer import Trainer


def die() -> None:
    """What `kill -9` does: no handler, no flush, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def train(fields: dict[str, Any], folder: Path, kill: tuple[str, int] | None) -> None:
    """Run the configuration; die at the n-th occurrence of a point, if one is given.

    Points: "step" (after the n-th optimizer step of this process), "half-saved" (half of the n-th checkpoint is
    on disk), "before-rename" and "after-rename" (around the n-th `os.replace`), "logged" (after the n-th flush).
    """
    torch.set_num_threads(1)
    if kill is not None:
        _arm(*kill)
    engine.run(RunConfig.create(**fields), folder)


def _arm(point: str, number: int) -> None:
    left = [number]

    def now() -> bool:
        left[0] -= 1
        return left[0] == 0

    if point == "step":
        step = Trainer.step

        def stepped(self: Trainer, batch: Any) -> Any:
            result = step(self, batch)
            if now():
                die()
            return result

        Trainer.step = stepped
    elif point == "half-saved":
        save = torch.save

        def saved(state: Any, file: IO[bytes]) -> None:
            save(state, file)
            if now():
                file.flush()
                os.truncate(file.name, file.tell() // 2)
                die()

        torch.save = saved
    elif point in ("before-rename", "after-rename"):
        replace = os.replace

        def replaced(source: Path, target: Path) -> None:
            dies = now()
            if dies and point == "before-rename":
                die()
            replace(source, target)
            if dies:
                die()

        os.replace = replaced
    elif point == "logged":
        write = Log.write

        def written(self: Log, rows: Any) -> None:
            write(self, rows)
            if now():
                die()

        Log.write = written
    else:
        raise ValueError(point)


def train_on_a_full_disk(fields: dict[str, Any], folder: Path, limit: int) -> None:
    """Run with every file limited to so many bytes; exit with 7 for a UserError of one line."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        train(fields, folder, None)
    except UserError as error:
        os._exit(7 if "\n" not in str(error) and "cannot be written" in str(error) else 8)


def train_rank(
    fields: dict[str, Any], folder: Path, kill: tuple[str, int] | None, rank: int, size: int, port: int
) -> None:
    """One of several processes, in the environment that torchrun gives them."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    train(fields, folder, kill)


def start_ranks(
    fields: dict[str, Any],
    folder: Path,
    size: int,
    kill: tuple[str, int] | None = None,
    victims: Sequence[int] | None = None,
) -> list[BaseProcess]:
    """Children that train one run together; each (or each of the victims) dies at the point, if one is given."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        workers.server().Process(
            target=train_rank,
            args=(fields, folder, kill if victims is None or rank in victims else None, rank, size, port),
            daemon=not fields.get("workers"),
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes


def start_on_a_full_disk(fields: dict[str, Any], folder: Path, limit: int) -> BaseProcess:
    """A child that may write only so many bytes to a file."""
    process = workers.server().Process(target=train_on_a_full_disk, args=(fields, folder, limit), daemon=True)
    process.start()
    return process


def start(fields: dict[str, Any], folder: Path, kill: tuple[str, int] | None = None) -> BaseProcess:
    """A child that trains; forked from a server that imported everything once."""
    # A daemon could have no loader workers of its own.
    daemon = not fields.get("workers")
    process = workers.server().Process(target=train, args=(fields, folder, kill), daemon=daemon)
    process.start()
    return process


def finish(process: BaseProcess, seconds: float = 300) -> int | None:
    """The exit code of a child, which is ended if it takes too long."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"a training child took over {seconds} s")
    return process.exitcode


def outcome(folder: Path) -> dict[str, Any]:
    """What an interruption must not change."""
    result = json.loads((folder / "result.json").read_text())
    kept = {"val": result["val_loss"], "best": result["best"], "unreadable": result["unreadable"]}
    return kept | {
        "digest": digest(folder),
        "log": log.read(folder / "log.jsonl"),
        "weights": {
            path.name: {name: tensor.tolist() for name, tensor in load_file(path).items()}
            for path in sorted(folder.glob("*.safetensors"))
        },
        "test": (result["test_accuracy"], result["test_loss"], result["ece"]),
    }


def steps_logged(folder: Path) -> list[int]:
    """The steps of the log's training rows, in their order."""
    return [row["step"] for row in log.read(folder / "log.jsonl") if "split" not in row]


def digest(folder: Path) -> str:
    """SHA-256 over every tensor and number of the final model, optimizer and moving average."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    sha = hashlib.sha256()
    for name in ("step", "model", "optimizer", "scaler", "ema"):
        _feed(sha, name, state[name])
    return sha.hexdigest()


def _feed(sha: Any, name: str, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key in value:
            _feed(sha, f"{name}.{key}", value[key])
    elif isinstance(value, (list, tuple)):
        for key, item in enumerate(value):
            _feed(sha, f"{name}.{key}", item)
    else:
        sha.update(f"{name} {value!r}".encode())
