"""What the commands that train share: the console, a sweep from its start to its page, how to go on."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from nfnets.train.compare import ExperimentConfig

# Piped or logged, nothing is 80 columns wide.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)


DIVERGED = 3
"""The exit code of a command whose every run came to nothing."""


def compare(
    config: ExperimentConfig, out: Path, jobs: int, patient: bool = True, tensorboard: bool = False
) -> None:
    """Convert, look, train, look again, compare; what is finished already is read back."""
    from nfnets.train.compare.summary import says_nothing, terminal
    from nfnets.train.compare.sweep import sweep

    with resumable(f"nfnets compare --resume --out {shlex.quote(str(out))}", out):
        command = shlex.join(["nfnets", *sys.argv[1:]])
        results = sweep(
            config,
            out,
            first_rank_only(),
            jobs=jobs,
            patient=patient,
            tensorboard=tensorboard,
            command=command,
        )
    speaker = first_rank_only()
    speaker.print(terminal(results))
    if (out / "index.html").is_file():
        speaker.print(f"\nthe whole comparison: [bold]{out / 'index.html'}[/]")
    if says_nothing(results):
        raise typer.Exit(DIVERGED)


def tell(result: dict[str, Any], out: Path) -> None:
    """What a run ended with and what it wrote; one that diverged ends the command with a code of its own."""
    speaker = first_rank_only()
    if result["status"] == "diverged":
        where = "on the test images" if result["diverged_at"] is None else f"at step {result['diverged_at']}"
        speaker.print(f"[yellow]diverged {where}[/]: lower --lr or set --clipping")
    else:
        speaker.print(
            f"test accuracy [bold]{100 * result['test_accuracy']:.2f} %[/], "
            f"{result['train_seconds']:.0f} s of training, {result['images_per_second']:,.0f} images/s"
        )
    if result["unreadable"]["count"]:
        speaker.print(f"[yellow]{result['unreadable']['count']} images could not be read[/]: see result.json")
    there = [name for name in ("model.safetensors", "result.json", "log.jsonl") if (out / name).is_file()]
    speaker.print(f"wrote {out}/{', '.join(there)}")
    if result["status"] == "diverged":
        raise typer.Exit(DIVERGED)


def first_rank_only() -> Console:
    """The console; a silent one in all of torchrun's ranks but the first, which speaks for all."""
    return console if os.environ.get("RANK", "0") == "0" else Console(quiet=True)


@contextmanager
def resumable(how: str, out: Path) -> Iterator[None]:
    """Interrupted, say that the state is saved, and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:  # SystemExit: a scheduler's SIGTERM
        print(f"interrupted; the state is saved in {out}. Go on with: {how}", file=sys.stderr)
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        raise typer.Exit(code if isinstance(code, int) else 1) from None
