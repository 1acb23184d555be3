"""The options that commands share, and how their text is read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from nfnets.errors import UserError
from nfnets.plain import shown, value_of

if TYPE_CHECKING:
    from nfnets.cli_examples import ModelAndInputs


class _Plain:
    """Help without noise: a flag takes no value, so it shows none, and a docstring's lines are joined to paragraphs."""

    help: str | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        paragraphs = inspect.cleandoc(self.help or "").split("\n\n")
        self.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in found:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return found


class Command(_Plain, TyperCommand):
    """A command whose help reads well."""


class Group(_Plain, TyperGroup):
    """The same for what holds the commands."""


# What a mistyped option raises, of the click that typer brings or of the one that is installed.
UsageError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def usage(error: Exception) -> str:
    """What a mistyped command line is told: what is wrong with it, and where its help is."""
    told: Any = error
    if type(told).__name__ == "NoArgsIsHelpError":  # the help is on the screen already
        return "no command given"
    context = getattr(told, "ctx", None)
    path = "nfnets" if context is None else context.command_path
    return f"{told.format_message().rstrip('.')}; see `{path} --help`"


NAME_VALUE = "NAME=VALUE"
MODEL_HELP = (
    "[bold]timm:NAME[/], [bold]torchvision:NAME[/], your own [bold]package.module:function[/], "
    "or a name that [bold]nfnets models[/] lists."
)
# Written out: the registry needs torch, and help should not wait for it.
METHODS = (
    "[bold]nf[/] to train without norm layers, [bold]fold[/] to keep a trained net's function; also fixed_variance, "
    "fixup, skipinit, lsuv, gn, ln, ws_gn, evonorm_s0, ghost_bn, bcn, online; tune (trained), dyt, derf (layer norms)."
)
RULES = (
    "input, finite, softmax-output, mean-shift, jump, fading, growth, noise, vanishing, fp16-overflow, cosine, "
    "odd-layer, identical-units, dead-units, attention, branch; of gradients finite-gradient, no-gradient, gradient; "
    "of steps slow-updates, fast-updates, weight-decay."
)
DOUBTS = "frozen (layers), zero-head, few-samples (BatchNorm over two), dropout (of 0.8 and more)"
Model = Annotated[str, typer.Option("--model", "-m", metavar="NAME", help=MODEL_HELP, show_default=False)]
Models = Annotated[
    list[str], typer.Option("--model", "-m", metavar="NAME", help=MODEL_HELP + " Repeat it to compare.")
]
ModelOrOurs = Annotated[str, typer.Option("--model", "-m", metavar="NAME", help=MODEL_HELP)]
Method = Annotated[str, typer.Option(metavar="METHOD", help=f"How to convert: {METHODS}")]
MethodToo = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD",
        help=f"Also profile every model converted by this method: {METHODS}",
        show_default=False,
    ),
]
MethodFirst = Annotated[
    str | None,
    typer.Option(metavar="METHOD", help=f"Convert it by this method first: {METHODS}", show_default=False),
]
MethodOrNone = Annotated[
    str,
    typer.Option(metavar="METHOD", help=f"[bold]bn[/] leaves the model alone; or how to convert: {METHODS}"),
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar=NAME_VALUE,
        help="An option of the method, such as alpha=0.5. Or include=PATTERN and exclude=PATTERN to choose norm layers "
        "by path (layer4*), or strict=false to leave what cannot be converted. Repeatable.",
        show_default=False,
    ),
]
Norms = Annotated[
    str | None,
    typer.Option(
        metavar="KINDS",
        help="Which norm layers: [bold]all[/], or some of batch, group, instance, layer and rms, by commas. "
        "Default: batch. Other commands take it as -o norms=KINDS.",
        show_default=False,
    ),
]
Input = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="CxHxW",
        help="Shape of an input without the batch: 3x64x96, 1x16000. Default: the images that the model was made for. "
        "Repeat it for several inputs, in the order of the forward's arguments. NAME=CxHxW is a keyword argument, "
        "NAME.KEY=CxHxW an entry of a dict.",
        show_default=False,
    ),
]
Images = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="NAME",
        help="Real images of this data set, such as digits or fashion-mnist, instead of normal noise.",
        show_default=False,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Folder with the files of --data. Without it the usual places are searched.",
        show_default=False,
    ),
]
Classes = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Number of outputs. Default: your own function's; the classes of --data; 10 for CIFAR nets; else 1000.",
        show_default=False,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        min=0,
        max=2**63 - 1,
        metavar="N",
        help="Seed of everything random: fresh weights, noise inputs, order and augmentation of images.",
    ),
]
DemoOut = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Where everything is written. Default: runs/demo.", show_default=False
    ),
]
DemoSeeds = Annotated[int, typer.Option(min=1, metavar="N", help="Paired seeds per arm.")]
DemoEpochs = Annotated[int, typer.Option(min=1, metavar="N", help="Passes over the digits.")]
Out = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where everything is written.")]
OutFile = Annotated[
    Path,
    typer.Option(
        "--out", metavar="FILE", help="The .safetensors file to write; its recipe goes beside it, as .json."
    ),
]
Jobs = Annotated[
    int,
    typer.Option(
        min=0, metavar="N", help="Runs at once, each in a process of its own; 0: one per core, up to 4."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar=NAME_VALUE,
        help="Any other setting, such as label_smoothing=0.1: a field of [bold]nfnets.train.RunConfig[/], listed in "
        "its API documentation (docs/api/train.md). Repeatable.",
        show_default=False,
    ),
]


Data = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="digits, mnist, fashion-mnist, cifar10, cifar100 or imagefolder; streamed from disk: imagenet, "
        "timm:NAME (folder, wds, hfds/…, torch/…).",
    ),
]
Download = Annotated[
    bool, typer.Option("--download", help="Fetch MNIST, Fashion-MNIST or CIFAR where they are missing.")
]
Epochs = Annotated[int, typer.Option(metavar="N", help="Passes over the training split.")]
BatchSize = Annotated[int, typer.Option(metavar="N", help="Images per optimizer step.")]
ForBatch = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        min=1,
        metavar="N",
        help="Images per step of your training. It decides what depends on the batch size, and the converted model "
        "keeps it for nfnets.attach. Constants are then measured on 64 images.",
        show_default=False,
    ),
]
BatchSizes = Annotated[str, typer.Option(metavar="N,...", help="Images per optimizer step; several: 4,64.")]
Seeds = Annotated[
    str, typer.Option(metavar="N|N,...", help="How many seeds (3), or which ones (0,5,7; only 42: 42,).")
]
TrainLimit = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Use only this many training images, those for validation included.",
        show_default=False,
    ),
]
Quick = Annotated[bool, typer.Option("--quick", help="One seed, two epochs: does everything work here?")]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File of trained weights: .safetensors, or a state_dict that torch.save wrote. Default: fresh weights.",
        show_default=False,
    ),
]
Verify = Annotated[
    bool,
    typer.Option(
        "--check",
        help="Also check that no image influences another and, for fold, that the function is the same. Exits with 1 "
        "if not.",
    ),
]
Html = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the interactive report.", show_default=False)
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the measurements.", show_default=False)
]
Png = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the NF-ResNet paper's figure.", show_default=False)
]
Backward = Annotated[bool, typer.Option("--backward", help="Measure gradients, too.")]
Allow = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help=f"With --backward, let pass {DOUBTS}. Repeatable.", show_default=False),
]
Batch = Annotated[int, typer.Option(min=2, metavar="N", help="Number of images to measure on.")]
Rules = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help=f"Only this rule: {RULES} Repeatable.", show_default=False),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A published recipe, see [bold]nfnets recipes[/]. Options that you give beside it win.",
        show_default=False,
    ),
]
RecipeName = Annotated[
    str | None, typer.Argument(metavar="NAME", help="Show only this one, in full.", show_default=False)
]
LrRange = Annotated[
    bool,
    typer.Option(
        "--lr-range", help="Do not train: raise the learning rate until the loss explodes, and suggest one."
    ),
]
PeakRate = Annotated[float, typer.Option(metavar="RATE", help="Peak learning rate.")]
Clipping = Annotated[
    str,
    typer.Option(
        metavar="λ|off|auto",
        help="λ of adaptive gradient clipping; off: none; auto: the rule for method and batch size.",
    ),
]
Arms = Annotated[
    str,
    typer.Option(
        metavar="METHOD,...",
        help="What to compare, the baseline first: bn, or any --method of [bold]nfnets plan[/], with settings of its "
        "own behind colons: nf:clipping=0.02:alpha=0.5.",
    ),
]
Rates = Annotated[
    str, typer.Option(metavar="RATE,...", help="Learning rates to try. Every arm tries all of them.")
]
Scaling = Annotated[
    str,
    typer.Option(
        metavar="none|sqrt|linear", help="How learning rates grow with the batch size, if there are several."
    ),
]
TuningSeeds = Annotated[
    str | None,
    typer.Option(
        "--tuning-seeds",
        "--tuning-seed",
        metavar="N,...",
        help="Seeds for the search of the learning rate; their mean decides. Default: the first of --seeds.",
        show_default=False,
    ),
]
Margin = Annotated[
    float, typer.Option(metavar="X", help="A difference in accuracy that would matter, from 0 to 1.")
]
File = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="The whole experiment as YAML or JSON. Other options are ignored, except --model: code of your own that "
        "the file names runs only if --model names it, too.",
        show_default=False,
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the experiment in --out; other options are ignored.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the runs and how long they will take.")]
Leave = Annotated[
    bool,
    typer.Option(
        "--leave", help="Do not wait for runs that other processes work on: end when no other run is left."
    ),
]
Target = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Validation accuracy to take the time to. Default: what the baseline ends with, less the margin.",
        show_default=False,
    ),
]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Write event files beside the JSONL logs.")]
Pattern = Annotated[
    str,
    typer.Argument(metavar="PATTERN", help="Shell-style: '*resnet*', 'timm:*nfnet*', 'torchvision:*'."),
]


def example_of(
    spec: str,
    inputs: list[str] | None,
    batch: int,
    classes: int | None,
    data: str | None,
    data_dir: Path | None,
    seed: int,
) -> ModelAndInputs:
    """The model, and inputs for it."""
    from nfnets.cli_examples import example

    return example(
        spec, inputs=inputs, batch=batch, num_classes=classes, data=data, data_dir=data_dir, seed=seed
    )


def flags_of(context: typer.Context, *names: str) -> dict[str, tuple[Any, bool]]:
    """Options of a command by name, each with whether the user gave it."""
    return {
        # By name: typer brings a click of its own, which is not always the installed one.
        name: (context.params[name], getattr(context.get_parameter_source(name), "name", "") != "DEFAULT")
        for name in names
    }


def pairs(texts: list[str] | None) -> dict[str, Any]:
    """Settings from NAME=VALUE texts; values are JSON where they can be."""
    return {name: value_of(value) for name, value in _split(texts)}


def method_options(texts: list[str] | None, norms: str | None = None) -> dict[str, Any]:
    """A method's options from NAME=VALUE texts; patterns stay text, as paths of an nn.Sequential are numbers."""
    from nfnets.train.saved_models import check_options

    options = {
        name: _patterns(value) if name in ("include", "exclude") else value_of(value)
        for name, value in _split(texts)
    }
    if norms is not None:
        options["norms"] = norms
    if isinstance(kinds := options.get("norms"), str) and "," in kinds:
        options["norms"] = [kind.strip() for kind in kinds.split(",")]
    check_options(options)
    return options


def _split(texts: list[str] | None) -> Iterator[tuple[str, str]]:
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"{shown(text)}: expected NAME=VALUE, such as alpha=0.5")
        yield name, value


def _patterns(text: str) -> Any:
    found = value_of(text, parse_int=str, parse_float=str)
    return found if isinstance(found, str | list) else text


def clipping_of(text: str) -> float | None:
    """λ, or None for off."""
    if text in ("off", "none"):
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"clipping {shown(text)}: expected a number such as 0.02, off or auto") from None


def numbers(name: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    """Numbers from text with commas; one may stand at the end, as after a single number."""
    try:
        return [kind(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        raise UserError(f"{name} {shown(text)}: expected numbers separated by commas") from None


_MOST_SEEDS = 10_000


def seeds_of(text: str) -> list[int]:
    """Seeds from their number ("3") or their list ("0,5,7")."""
    found = numbers("seeds", text, int)
    if len(found) == 1 and "," not in text:
        if not 1 <= found[0] <= _MOST_SEEDS:
            raise UserError(
                f"seeds {text!r}: expected 1 to {_MOST_SEEDS:,} of them; the seed 42 alone is 42,"
            )
        return list(range(found[0]))
    return found
