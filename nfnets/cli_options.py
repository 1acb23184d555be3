"""The options that commands share, and how their text is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from nfnets.errors import UserError

MODEL_HELP = (
    "[bold]timm:NAME[/], [bold]torchvision:NAME[/], your own [bold]package.module:function[/], "
    "or a name that [bold]nfnets models[/] lists."
)
Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP, show_default=False)]
ModelOrOurs = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
Method = Annotated[
    str,
    typer.Option(help="Conversion method: nf to train, fold to keep a function; an unknown one lists all."),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", help="An option of the method, as alpha=0.5. Repeatable.", show_default=False
    ),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input", help="Image shape, as 3x224x224. Default: what the model was made for.", show_default=False
    ),
]
Images = Annotated[
    str | None,
    typer.Option(
        "--data", help="Take real images of this data set instead of normal noise.", show_default=False
    ),
]
DataDir = Annotated[
    Path | None, typer.Option(help="Folder with the data set's own files.", show_default=False)
]
Classes = Annotated[int | None, typer.Option(min=1, help="Outputs of the model.", show_default=False)]
Seed = Annotated[int, typer.Option(min=0, help="Of the weights, and of what is random besides.")]
Out = Annotated[Path, typer.Option("--out", help="Directory for everything that is written.")]
Jobs = Annotated[
    int, typer.Option(min=0, help="Runs at once, each in a process of its own; 0: one per core, up to 4.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Any other setting of a run, as label_smoothing=0.1. Repeatable.", show_default=False
    ),
]


Data = Annotated[
    str,
    typer.Option(
        help="digits, mnist, fashion-mnist, cifar10, cifar100 or imagefolder; streamed from disk: imagenet, "
        "timm:NAME (folder, wds, hfds/…, torch/…)."
    ),
]
Download = Annotated[
    bool, typer.Option("--download", help="Fetch MNIST, Fashion-MNIST or CIFAR where they are missing.")
]
Epochs = Annotated[int, typer.Option(help="Passes over the training split.")]
TrainLimit = Annotated[
    int | None,
    typer.Option(help="Use only so many training images, validation included.", show_default=False),
]
Quick = Annotated[bool, typer.Option("--quick", help="One seed, two epochs: does everything work here?")]
Weights = Annotated[
    Path | None,
    typer.Option(help="Weights to convert: .safetensors, or .pt with a state_dict.", show_default=False),
]
Verify = Annotated[
    bool, typer.Option("--check", help="Also verify: batch independence, and for fold the same function.")
]
Html = Annotated[Path | None, typer.Option(help="Write the interactive report.", show_default=False)]
Json = Annotated[Path | None, typer.Option("--json", help="Write the measurements.", show_default=False)]
Png = Annotated[Path | None, typer.Option(help="Write the NF-ResNet paper's figure.", show_default=False)]
Backward = Annotated[bool, typer.Option("--backward", help="Measure gradients, too.")]
Batch = Annotated[int, typer.Option(min=2, help="Number of images to measure on.")]
Rules = Annotated[
    list[str] | None,
    typer.Option(help="Only this rule, such as mean-shift. Repeatable.", show_default=False),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="A published recipe, see [bold]nfnets recipes[/]; options given beside it win.",
        show_default=False,
    ),
]
LrRange = Annotated[
    bool,
    typer.Option(
        "--lr-range", help="Do not train: let the rate grow until the loss explodes, and suggest one."
    ),
]
PeakRate = Annotated[float, typer.Option(help="Peak learning rate.")]
Clipping = Annotated[
    str,
    typer.Option(help="Adaptive gradient clipping's λ, off, or auto: the recipe's for method and batch."),
]
Arms = Annotated[
    str,
    typer.Option(help="Methods, the baseline first; a setting is added as nf:clipping=0.02:alpha=0.5."),
]
Rates = Annotated[str, typer.Option(help="Learning rates that every arm searches: the equal budget.")]
Scaling = Annotated[str, typer.Option(help="How they follow further batch sizes: none, sqrt or linear.")]
TuningSeed = Annotated[
    int | None, typer.Option(help="Seed of the search. Default: the first one.", show_default=False)
]
Margin = Annotated[float, typer.Option(help="A difference in accuracy that would matter, in [0, 1].")]
File = Annotated[
    Path | None,
    typer.Option(
        help="The whole experiment as YAML or JSON. Of the rest only --model counts, as leave to run code of your own.",
        show_default=False,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with what --out holds; ignores the rest, as --file.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the runs and how long they will take.")]
Leave = Annotated[
    bool, typer.Option("--leave", help="End where only runs are left that other processes hold.")
]
Target = Annotated[
    float | None,
    typer.Option(
        help="Validation accuracy for time-to-accuracy. Default: the baseline's less the margin.",
        show_default=False,
    ),
]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Write event files beside the JSONL logs.")]
Pattern = Annotated[str, typer.Argument(help="Shell-style: '*resnet*', 'timm:*nfnet*', 'torchvision:*'.")]


def example_of(
    spec: str,
    shape: str | None,
    batch: int,
    classes: int | None,
    data: str | None,
    data_dir: Path | None,
    seed: int,
) -> tuple[Any, Any, int]:
    """The model, images for it, and its number of outputs."""
    from nfnets.cli_examples import example, parse_shape

    given = None if shape is None else parse_shape(shape)
    found = example(
        spec, shape=given, batch=batch, num_classes=classes, data=data, data_dir=data_dir, seed=seed
    )
    return found.model, found.images, found.num_classes


def flags_of(context: typer.Context, *names: str) -> dict[str, tuple[Any, bool]]:
    """Options of a command by name, each with whether the user gave it."""
    return {
        # By name: typer brings a click of its own, which is not always the installed one.
        name: (context.params[name], getattr(context.get_parameter_source(name), "name", "") != "DEFAULT")
        for name in names
    }


def pairs(texts: list[str] | None) -> dict[str, Any]:
    """Settings from NAME=VALUE texts; values are JSON where they can be."""
    pairs = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(f"{text!r}: expected NAME=VALUE, such as alpha=0.5")
        try:
            pairs[key] = json.loads(value)
        except ValueError:
            pairs[key] = value
    return pairs


def clipping_of(text: str) -> float | None:
    """λ, or None for off."""
    if text in ("off", "none"):
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"clipping {text!r}: expected a number such as 0.02, off or auto") from None


def numbers(name: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Numbers from text with commas."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{name} {text!r}: expected numbers separated by commas") from None


def seeds_of(text: str) -> list[int]:
    """Seeds from their number ("3") or their list ("0,5,7")."""
    found = numbers("seeds", text, int)
    if len(found) == 1 and "," not in text:
        if found[0] < 1:
            raise UserError(f"seeds {text!r}: expected at least 1")
        return list(range(found[0]))
    return found
