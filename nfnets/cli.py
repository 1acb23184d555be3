"""The commands. Each one reads its options, calls the library, prints; torch is imported by the command that runs."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from nfnets.errors import UserError

if TYPE_CHECKING:
    from nfnets.train.protocol import ExperimentConfig

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Normalizer-free CNNs: convert a BatchNorm CNN, look at its signal, train it, compare it with BatchNorm.",
    epilog="Start with [bold]nfnets demo[/]; then [bold]nfnets compare --model timm:resnet18 --data fashion-mnist[/].",
)
# Piped or logged, nothing is 80 columns wide.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120)

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


def main() -> None:
    """The console script: a user's error is one line on stderr and exit code 2, Ctrl-C is 130; no traceback."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (
        BrokenPipeError
    ):  # `nfnets models | head`: nobody reads on; the interpreter must not complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        from nfnets import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel="Start here")
def demo(
    out: Out = Path("runs/demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Paired seeds per arm.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the digits.")] = 12,
    jobs: Jobs = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, two epochs: does everything work here?")
    ] = False,
) -> None:
    """The whole job on real images in minutes: convert a ResNet, look at its signal, train both, compare."""
    from nfnets.train.demo import demo_experiment

    config = demo_experiment(seeds=1 if quick else seeds, epochs=2 if quick else epochs, search=not quick)
    console.print(
        f"[bold]BatchNorm against normalizer-free[/] on scikit-learn's digits: {config.run['model']}, "
        f"{len(config.seeds)} paired seeds"
    )
    _compare(config, out, jobs)


@app.command(rich_help_panel="Convert")
def plan(
    model: Model,
    method: Method = "nf",
    option: Options = None,
    input_: Input = None,
    data: Images = None,
    data_dir: DataDir = None,
    classes: Classes = None,
    seed: Seed = 0,
) -> None:
    """What a conversion would do to every norm layer, and why. Changes nothing.

    Example: nfnets plan --model torchvision:resnet18 --method nf
    """
    from nfnets.convert import plan as make_plan
    from nfnets.train.tables import plan_table

    net, images, _ = _example(model, input_, 4, classes, data, data_dir, seed)
    console.print(plan_table(make_plan(net, images, method=method, **_pairs(option))))


@app.command(rich_help_panel="Convert")
def convert(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="The .safetensors file to write.")] = Path(
        "nf.safetensors"
    ),
    method: Method = "nf",
    option: Options = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Weights to convert: .safetensors, or .pt with a state_dict.", show_default=False),
    ] = None,
    check_: Annotated[
        bool, typer.Option("--check", help="Also verify: batch independence, and for fold the same function.")
    ] = False,
    input_: Input = None,
    data: Images = None,
    data_dir: DataDir = None,
    classes: Classes = None,
    seed: Seed = 0,
) -> None:
    """Convert a model; write its weights, and beside them the recipe that rebuilds it.

    Example: nfnets convert --model timm:resnet18 --method nf --out nf.safetensors
    """
    from nfnets import __version__
    from nfnets.train import recipe

    net, images, outputs = _example(model, input_, 16, classes, data, data_dir, seed)
    channels, size = images.shape[1:3]
    made = recipe.Recipe(model, method, _pairs(option), outputs, channels, size, seed, __version__)
    converted = recipe.convert_model(net, images, made, weights)
    written = recipe.save(converted, made, out)
    console.print(f"wrote {out} and {written}")
    console.print(f"rebuild it: nfnets.train.recipe.load({str(out)!r})", highlight=False)
    if check_ and not recipe.verify(
        converted, net, images, method, lambda line: console.print(line, highlight=False)
    ):
        raise typer.Exit(1)


@app.command(rich_help_panel="Look")
def profile(
    model: Annotated[list[str], typer.Option("--model", "-m", help=MODEL_HELP + " Repeat it to compare.")],
    method: Annotated[
        str | None,
        typer.Option(help="Also profile every model converted by this method.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the interactive report.", show_default=False)
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Write the measurements.", show_default=False)
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write the NF-ResNet paper's figure.", show_default=False)
    ] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Measure gradients, too.")] = False,
    batch: Annotated[int, typer.Option(min=2, help="Number of images to measure on.")] = 16,
    input_: Input = None,
    data: Images = None,
    data_dir: DataDir = None,
    classes: Classes = None,
    seed: Seed = 0,
) -> None:
    """How the signal propagates through one model, or through several side by side, at initialization.

    Example: nfnets profile --model torchvision:resnet18 --method nf --html signal.html
    """
    from nfnets.convert import convert as convert_
    from nfnets.signal import profile as measure

    models: dict[str, Any] = {}
    images = None
    for spec in model:
        net, images, _ = _example(spec, input_, batch, classes, data, data_dir, seed)
        models[spec] = net
        if method is not None:
            models[f"{spec} {method}"] = convert_(net, images, method=method)
    report = measure(models, images, backward=backward)
    console.print(report)

    def draw(path: Path) -> None:
        try:
            report.plot().savefig(path, dpi=150)
        except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not know
            raise UserError(
                f"cannot write {path}: {error}; pass a writable path that ends in .png or .svg"
            ) from None

    for path, write in ((html, report.to_html), (json_, report.to_json), (png, draw)):
        if path is not None:
            write(path)
    for path in (html, json_, png):
        if path is not None:
            console.print(f"wrote {path}")


@app.command(rich_help_panel="Look")
def check(
    model: Model,
    method: Annotated[
        str | None, typer.Option(help="Convert it by this method first.", show_default=False)
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(help="Only this rule, such as mean-shift. Repeatable.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=2, help="Number of images to measure on.")] = 16,
    input_: Input = None,
    data: Images = None,
    data_dir: DataDir = None,
    classes: Classes = None,
    seed: Seed = 0,
) -> None:
    """Judge a model's signal at initialization; exits with 1 when a rule is broken. For CI.

    Example: nfnets check --model mypackage.models:build --method nf
    """
    from nfnets.convert import convert as convert_
    from nfnets.signal import profile as measure

    net, images, _ = _example(model, input_, batch, classes, data, data_dir, seed)
    if method is not None:
        net = convert_(net, images, method=method)
    verdict = measure({model: net}, images).check(rule or None)
    console.print(str(verdict), highlight=False, markup=False)
    if not verdict:
        raise typer.Exit(1)


Data = Annotated[str, typer.Option(help="digits, fashion-mnist, cifar10, cifar100 or imagefolder.")]
Epochs = Annotated[int, typer.Option(help="Passes over the training split.")]
TrainLimit = Annotated[
    int | None,
    typer.Option(help="Use only so many training images, validation included.", show_default=False),
]


@app.command(rich_help_panel="Train")
def train(
    model: ModelOrOurs = "bn_resnet20_cifar",
    method: Annotated[str, typer.Option(help="bn leaves the model alone; or a conversion method.")] = "nf",
    option: Options = None,
    data: Data = "digits",
    data_dir: DataDir = None,
    train_limit: TrainLimit = None,
    epochs: Epochs = 10,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 64,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 0.1,
    clipping: Annotated[
        str,
        typer.Option(help="Adaptive gradient clipping's λ, off, or auto: the recipe's for method and batch."),
    ] = "auto",
    seed: Seed = 0,
    settings: Settings = None,
    out: Out = Path("runs/train"),
) -> None:
    """Train one arm. Interrupted, the same command goes on where it was.

    Example: nfnets train --model timm:resnet18 --data fashion-mnist --method nf --epochs 5
    """
    from nfnets.train import recipes
    from nfnets.train.config import RunConfig
    from nfnets.train.progress import train_with_progress

    agc = recipes.clipping(method, batch_size) if clipping == "auto" else _clipping(clipping)
    fields = {
        "model": model,
        "method": method,
        "method_options": _pairs(option),
        "data": data,
        "data_dir": data_dir,
    }
    fields |= {
        "train_limit": train_limit,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "clipping": agc,
        "seed": seed,
    }
    config = RunConfig.create(**{**fields, **_pairs(settings)})
    with _resumable("the same command", out):
        result = train_with_progress(config, out, console)
    if result["status"] == "diverged":
        console.print(f"[yellow]diverged at step {result['diverged_at']}[/]: lower --lr or set --clipping")
    else:
        console.print(
            f"test accuracy [bold]{100 * result['test_accuracy']:.2f} %[/], "
            f"{result['train_seconds']:.0f} s of training, {result['images_per_second']:,.0f} images/s"
        )
    console.print(f"wrote {out}/model.safetensors, result.json, log.jsonl")


@app.command(rich_help_panel="Train")
def compare(
    arms: Annotated[
        str,
        typer.Option(help="Methods, the baseline first; a setting is added as nf:clipping=0.02:alpha=0.5."),
    ] = "bn,nf",
    model: ModelOrOurs = "bn_resnet20_cifar",
    data: Data = "digits",
    data_dir: DataDir = None,
    train_limit: TrainLimit = None,
    seeds: Annotated[str, typer.Option(help="How many, or which: 3, or 0,5,7.")] = "3",
    batch_size: Annotated[str, typer.Option(help="Images per step; several as 4,64.")] = "64",
    lrs: Annotated[
        str, typer.Option(help="Learning rates that every arm searches: the equal budget.")
    ] = "0.05,0.1,0.2",
    lr_scaling: Annotated[
        str, typer.Option(help="How they follow further batch sizes: none, sqrt or linear.")
    ] = "none",
    tuning_seed: Annotated[
        int | None, typer.Option(help="Seed of the search. Default: the first one.", show_default=False)
    ] = None,
    epochs: Epochs = 10,
    clipping: Annotated[
        str,
        typer.Option(help="Adaptive gradient clipping's λ, off, or auto: the recipe's for method and batch."),
    ] = "auto",
    margin: Annotated[
        float, typer.Option(help="A difference in accuracy that would matter, in [0, 1].")
    ] = 0.01,
    settings: Settings = None,
    jobs: Jobs = 1,
    out: Out = Path("runs/compare"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what --out holds; ignores the rest.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and how long they will take.")
    ] = False,
) -> None:
    """Train several arms over paired seeds, and say with 95 % intervals whether they hold up against the first.

    Every arm searches the same learning rates on the held-out validation split; the best one runs on every seed.

    The test split decides nothing. Interrupted, the same command (or --resume) goes on where it was.

    Example: nfnets compare --model timm:resnet18 --data fashion-mnist --train-limit 12000 --epochs 4
    """
    from nfnets.train.experiment import read_experiment
    from nfnets.train.protocol import Arm, ExperimentConfig

    if resume:
        config = read_experiment(out)
    else:
        run = {"model": model, "data": data, "epochs": epochs}
        run |= {k: str(v) for k, v in {"data_dir": data_dir}.items() if v is not None}
        run |= {k: v for k, v in {"train_limit": train_limit}.items() if v is not None}
        if clipping != "auto":
            run["clipping"] = _clipping(clipping)
        config = ExperimentConfig.create(
            run={**run, **_pairs(settings)},
            arms=[Arm.parse(arm) for arm in arms.split(",")],
            seeds=_seeds(seeds),
            lrs=_numbers("lrs", lrs, float),
            batch_sizes=_numbers("batch-size", batch_size, int),
            lr_scaling=lr_scaling,
            tuning_seed=tuning_seed,
            margin=margin,
        )
    if dry_run:
        from nfnets.train.data import load
        from nfnets.train.estimate import dry_run as estimate
        from nfnets.train.tables import planned_table

        console.print(planned_table(estimate(config, load(config.first_run()), out)))
        return
    _compare(config, out, jobs)


@app.command(rich_help_panel="Look")
def models(
    pattern: Annotated[
        str, typer.Argument(help="Shell-style: '*resnet*', 'timm:*nfnet*', 'torchvision:*'.")
    ] = "*",
) -> None:
    """List the models that --model takes by name."""
    from nfnets.train.names import model_names

    for name in model_names(pattern):
        print(name)


def _compare(config: ExperimentConfig, out: Path, jobs: int) -> None:
    """Convert, look, train, compare; what is finished already is read back."""
    from nfnets.train import inspection
    from nfnets.train.comparison import terminal
    from nfnets.train.data import load
    from nfnets.train.experiment import claim, run_experiment
    from nfnets.train.progress import SweepProgress
    from nfnets.train.report import write_report
    from nfnets.train.tables import plan_table
    from nfnets.train.workers import cores

    data = load(config.first_run())
    plans = inspection.conversion_plans(config, data)
    claim(config, out)
    for arm, rows in plans.items():
        console.print(plan_table(rows, title=arm))
    inspection.save_signal(inspection.signal_at_start(config, data), out)
    console.print(f"signal at initialization: {out / 'signal.html'}\n")
    with (
        _resumable(f"nfnets compare --resume --out {shlex.quote(str(out))}", out),
        SweepProgress(config, data, console) as progress,
    ):
        results = run_experiment(
            config,
            out,
            watch=progress,
            data=data,
            jobs=jobs or min(4, cores()),
            command=shlex.join(["nfnets", *sys.argv[1:]]),
            about={"plans": inspection.plan_rows(plans)},
        )
    page = write_report(out)
    console.print(terminal(results))
    console.print(f"\nthe whole comparison: [bold]{page}[/]")


@contextmanager
def _resumable(how: str, out: Path) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:  # SystemExit: a scheduler's SIGTERM
        print(f"interrupted; the state is saved in {out}. Go on with: {how}", file=sys.stderr)
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        raise typer.Exit(code if isinstance(code, int) else 1) from None


def _example(
    spec: str,
    shape: str | None,
    batch: int,
    classes: int | None,
    data: str | None,
    data_dir: Path | None,
    seed: int,
) -> tuple[Any, Any, int]:
    from nfnets.train.examples import example, parse_shape

    given = None if shape is None else parse_shape(shape)
    found = example(
        spec, shape=given, batch=batch, num_classes=classes, data=data, data_dir=data_dir, seed=seed
    )
    return found.model, found.images, found.num_classes


def _pairs(texts: list[str] | None) -> dict[str, Any]:
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


def _clipping(text: str) -> float | None:
    if text in ("off", "none"):
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"clipping {text!r}: expected a number such as 0.02, off or auto") from None


def _numbers(name: str, text: str, kind: Callable[[str], Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{name} {text!r}: expected numbers separated by commas") from None


def _seeds(text: str) -> list[int]:
    numbers = _numbers("seeds", text, int)
    if len(numbers) == 1 and "," not in text:
        if numbers[0] < 1:
            raise UserError(f"seeds {text!r}: expected at least 1")
        return list(range(numbers[0]))
    return numbers
