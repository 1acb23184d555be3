"""What the commands that train share: a sweep from its start to its page, how to go on."""

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
from rich.text import Text

from nfnets.cli_console import console

if TYPE_CHECKING:
    from nfnets.train.compare import ExperimentConfig


DIVERGED = 3
"""The exit code of a command whose every run came to nothing."""


def compare(
    config: ExperimentConfig, out: Path, jobs: int, patient: bool = True, tensorboard: bool = False
) -> None:
    """Convert, look, train, look again, compare; what is finished already is read back."""
    from nfnets.train.compare.summary import terminal
    from nfnets.train.compare.sweep import sweep

    with resumable(shlex.join(["nfnets", "compare", "--resume", "--out", str(out), *trusting(config)]), out):
        command = shlex.join(["nfnets", *sys.argv[1:]])
        summary = sweep(
            config,
            out,
            first_rank_only(),
            jobs=jobs,
            patient=patient,
            tensorboard=tensorboard,
            command=command,
        )
    speaker = first_rank_only()
    speaker.print(terminal(summary))
    if (out / "index.html").is_file():
        path = Text.assemble("\nthe whole comparison: ", (str(out / "index.html"), "bold"))
        speaker.print(path, soft_wrap=True)
    if summary.says_nothing:
        raise typer.Exit(DIVERGED)


def tell(result: dict[str, Any], out: Path) -> None:
    """What a run ended with and what it wrote; one that diverged ends the command with a code of its own."""
    speaker = first_rank_only()
    if result["status"] == "diverged":
        where = "on the test images" if result["diverged_at"] is None else f"at step {result['diverged_at']}"
        speaker.print(Text(f"diverged {where}", "yellow") + ": lower --lr or set --clipping")
    else:
        accuracy = Text.assemble("test accuracy ", (f"{100 * result['test_accuracy']:.2f} %", "bold"))
        took = f"{result['train_seconds']:.0f} s of training, {result['images_per_second']:,.0f} images/s"
        speaker.print(accuracy + f", {took}")
    if result["unreadable"]["count"]:
        words = Text(f"{result['unreadable']['count']} images could not be read", "yellow")
        speaker.print(words + ": see result.json")
    there = [name for name in ("model.safetensors", "result.json", "log.jsonl") if (out / name).is_file()]
    speaker.print(f"wrote {out}/{', '.join(there)}", soft_wrap=True)
    if result["status"] == "diverged":
        raise typer.Exit(DIVERGED)


def trusting(config: ExperimentConfig) -> list[str]:
    """The option that allows the user's own model when an experiment is read back: a file names no code to run."""
    from nfnets.train.models import registered

    given = (config.run, *(arm.fields for arm in config.arms))
    models = dict.fromkeys(str(fields["model"]) for fields in given if "model" in fields)
    own = [model for model in models if not registered(model)]
    return ["--model", own[0]] if own else []


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
