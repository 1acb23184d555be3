"""The commands. Each one reads its options, calls the library, prints; torch is imported by the command that runs."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from nfnets import cli_options as opt
from nfnets import cli_runs as runs
from nfnets import cli_starts as start
from nfnets import files
from nfnets.cli_console import console, one_line, speak_its_encoding, told
from nfnets.errors import UserError, unknown
from nfnets.namesake import overwritten

app = typer.Typer(
    cls=opt.Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Normalizer-free CNNs: convert a BatchNorm CNN, look at its signal, train it, compare it with BatchNorm.",
    epilog="Start with [bold]nfnets demo[/]; then [bold]nfnets plan --model package.module:function[/] with a model "
    "of your own, and [bold]nfnets compare[/]. [bold]nfnets COMMAND --help[/] has an example of each.",
)
command = partial(app.command, cls=opt.Command)
say = partial(console.print, highlight=False, soft_wrap=True)


def main() -> None:
    """The console script: a user's error is one line on stderr and exit code 2, Ctrl-C is 130; no traceback."""
    speak_its_encoding(sys.stdout, sys.stderr)
    try:
        if line := overwritten():
            raise UserError(line)
        code = app(prog_name="nfnets", standalone_mode=False)  # also where `python -m` was its door
    except UserError as error:
        print(f"error: {told(error)}", file=sys.stderr)
        sys.exit(2)
    except opt.UsageError as error:
        print(f"error: {one_line(opt.usage(error))}", file=sys.stderr)
        sys.exit(2)
    except typer.Abort:
        sys.exit(1)
    except BrokenPipeError:  # `nfnets models | head`: nobody reads on, the interpreter must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    if code:
        sys.exit(code)


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


@command(rich_help_panel="Start here")
def demo(
    out: opt.DemoOut = None,
    seeds: opt.DemoSeeds = 3,
    epochs: opt.DemoEpochs = 12,
    jobs: opt.Jobs = 0,
    quick: opt.Quick = False,
) -> None:
    """The whole job on real images in minutes: convert a ResNet, look at its signal, train both, compare.

    Example: nfnets demo --quick
    """
    from nfnets.train.compare.demo import demo_experiment

    config = demo_experiment(seeds=1 if quick else seeds, epochs=2 if quick else epochs, search=not quick)
    words = f" on scikit-learn's digits: {config.run['model']}, {len(config.seeds)} paired seeds"
    console.print(Text.assemble(("BatchNorm against normalizer-free", "bold"), words))
    runs.compare(config, out or Path("runs/demo-quick" if quick else "runs/demo"), jobs)


@command(rich_help_panel="Convert")
def plan(
    model: opt.Model,
    method: opt.Method = "nf",
    norms: opt.Norms = None,
    option: opt.Options = None,
    batch_size: opt.ForBatch = None,
    input_: opt.Input = None,
    data: opt.Images = None,
    data_dir: opt.DataDir = None,
    classes: opt.Classes = None,
    seed: opt.Seed = 0,
) -> None:
    """What a conversion would do to every norm layer, and why. Changes nothing.

    Example: nfnets plan --model torchvision:resnet18 --method nf
    """
    from nfnets.convert import plan as make_plan
    from nfnets.train.compare.tables import plan_table

    options = opt.method_options(option, norms)
    options.pop("strict", None)  # a plan shows everything, what is refused too
    example = opt.example_of(model, input_, 4, classes, data, data_dir, seed)
    args, kwargs = example.inputs
    options |= {"method": method, "kwargs": kwargs, "batch_size": batch_size}
    console.print(plan_table(make_plan(example.model, *args, **options)))


@command(rich_help_panel="Convert")
def convert(
    model: opt.Model,
    out: opt.OutFile = Path("nf.safetensors"),
    method: opt.Method = "nf",
    norms: opt.Norms = None,
    option: opt.Options = None,
    batch_size: opt.ForBatch = None,
    weights: opt.Weights = None,
    check_: opt.Verify = False,
    input_: opt.Input = None,
    data: opt.Images = None,
    data_dir: opt.DataDir = None,
    classes: opt.Classes = None,
    seed: opt.Seed = 0,
) -> None:
    """Convert a model. Writes its weights and the recipe that rebuilds it.

    Example: nfnets convert --model timm:resnet18 --method nf --out nf.safetensors
    """
    from nfnets.state_dicts import load_state
    from nfnets.train import saved_models

    options = opt.method_options(option, norms)
    shown = 16 if batch_size is None else 64
    example = opt.example_of(model, input_, shown, classes, data, data_dir, seed)
    for line in [] if weights is None else load_state(example.model, weights):
        say(line)
    made = example.recipe(model, method, options, seed, batch_size)
    converted = saved_models.convert_model(example.model, example.inputs, made)
    written = saved_models.save(converted, made, out)
    say(f"wrote {out} and {written}")
    theirs = "" if made.registered else f", original={model.replace(':', '.')}(...)"
    say(f"rebuild it: nfnets.hub.from_pretrained({str(out)!r}{theirs})")
    if check_ and not saved_models.verify(converted, example.model, example.inputs, method, say):
        raise typer.Exit(1)


@command(rich_help_panel="Look")
def profile(
    model: opt.Models,
    method: opt.MethodToo = None,
    html: opt.Html = None,
    json_: opt.Json = None,
    png: opt.Png = None,
    backward: opt.Backward = False,
    batch: opt.Batch = 16,
    input_: opt.Input = None,
    data: opt.Images = None,
    data_dir: opt.DataDir = None,
    classes: opt.Classes = None,
    seed: opt.Seed = 0,
) -> None:
    """How the signal propagates through one model, or through several side by side, at initialization.

    Example: nfnets profile --model torchvision:resnet18 --method nf --html signal.html
    """
    from nfnets.cli_examples import converted, measured

    models: dict[str, Any] = {}
    examples = [opt.example_of(spec, input_, batch, classes, data, data_dir, seed) for spec in model]
    shapes = [" ".join(map(str, example.described)) for example in examples]
    for spec, example, shape in zip(model, examples, shapes, strict=True):
        if shape != shapes[0]:
            raise UserError(
                f"{spec} was made for {shape}, {model[0]} for {shapes[0]}: pass one --input for all"
            )
        models[spec] = example.model
        if method is not None:
            models[f"{spec} {method}"] = converted(example, method)
    report = measured(models, examples[0].inputs, backward)
    console.print(report)

    def draw(path: Path) -> None:
        try:
            files.write(path, lambda partial: report.plot().savefig(partial, dpi=150))
        except UserError:
            raise
        except ValueError as error:  # a format that matplotlib does not know
            raise UserError(f"cannot write {path}: {error}; pass a path that ends in .png or .svg") from None

    for path, write in ((html, report.to_html), (json_, report.to_json), (png, draw)):
        if path is not None:
            write(path)
    for path in (html, json_, png):
        if path is not None:
            say(f"wrote {path}")


@command(rich_help_panel="Look")
def check(
    model: opt.Model,
    method: opt.MethodFirst = None,
    rule: opt.Rules = None,
    backward: opt.Backward = False,
    allow: opt.Allow = None,
    batch: opt.Batch = 16,
    input_: opt.Input = None,
    data: opt.Images = None,
    data_dir: opt.DataDir = None,
    classes: opt.Classes = None,
    seed: opt.Seed = 0,
) -> None:
    """Judge a model's signal at initialization. Exits with 1 when a rule is broken. For CI.

    With --backward also when it could not be trained as it stands: see --allow.

    Example: nfnets check --model mypackage.models:build --method nf
    """
    from nfnets.cli_examples import converted, measured
    from nfnets.signal.notes import DOUBTS, doubts
    from nfnets.signal.rules import needs_backward

    for name in (allowed := allow or []):
        if name not in DOUBTS:
            raise unknown("doubt", name, DOUBTS)
    strict = backward and not rule
    backward = backward or needs_backward(rule or None)
    example = opt.example_of(model, input_, batch, classes, data, data_dir, seed)
    net = example.model if method is None else converted(example, method)
    report = measured({model: net}, example.inputs, backward)
    verdict = report.check(rule or None)
    console.print(str(verdict), highlight=False)
    found = doubts(report.notes) if strict else {}
    for name, note in found.items():
        say(
            f"allowed: {note}" if name in allowed else f"not passed: {note}; if meant so, pass --allow {name}"
        )
    if not verdict or found.keys() - {*allowed}:
        raise typer.Exit(1)


@command(rich_help_panel="Look")
def init(
    model: opt.Model,
    method: start.Start = "he",
    compare_: start.CompareStarts = False,
    methods: start.StartsToo = None,
    option: start.StartOptions = None,
    html: opt.Html = None,
    json_: opt.Json = None,
    batch: opt.Batch = 32,
    input_: opt.Input = None,
    data: opt.Images = None,
    data_dir: opt.DataDir = None,
    classes: opt.Classes = None,
    seed: opt.Seed = 0,
) -> None:
    """What an initializer would set in every layer, and what layers put out then; or several side by side.

    Example: nfnets init --model mypackage.models:build --compare --html starts.html
    """
    from nfnets.cli_examples import started, starts

    if not compare_ and (methods or html or json_):
        raise UserError("--methods, --html and --json are for --compare: pass it, too")
    if compare_ and option:
        raise UserError("--option is for one --method: leave out --compare")
    example = opt.example_of(model, input_, batch, classes, data, data_dir, seed)
    if not compare_:
        print(started(example, method, opt.pairs(option), seed))
        return
    found = starts(example, None if methods is None else [m.strip() for m in methods.split(",")], seed)
    console.print(found)
    for name, why in found.refused.items():
        say(f"{name} was refused: {why}")
    for path, write in ((html, found.to_html), (json_, found.to_json)):
        if path is not None:
            write(path)
            say(f"wrote {path}")


@command(rich_help_panel="Train")
def train(
    context: typer.Context,
    recipe: opt.Recipe = None,
    model: opt.ModelOrOurs = "bn_resnet20_cifar",
    method: opt.MethodOrNone = "nf",
    option: opt.Options = None,
    data: opt.Data = "digits",
    data_dir: opt.DataDir = None,
    download: opt.Download = False,
    train_limit: opt.TrainLimit = None,
    epochs: opt.Epochs = 10,
    batch_size: opt.BatchSize = 64,
    lr: opt.PeakRate = 0.1,
    clipping: opt.Clipping = "auto",
    seed: opt.Seed = 0,
    settings: opt.Settings = None,
    lr_range: opt.LrRange = False,
    tensorboard: opt.TensorBoard = False,
    out: opt.Out = Path("runs/train"),
) -> None:
    """Train one model. After an interruption the same command goes on. Exits with 3 if the run diverges.

    Example: nfnets train --model timm:resnet18 --data fashion-mnist --method nf --epochs 5
    """
    from nfnets.train.compare.progress import train_with_progress
    from nfnets.train.named_recipes import run_config

    flags = opt.flags_of(
        context, "model", "method", "data", "data_dir", "train_limit", "epochs", "batch_size"
    )
    flags |= opt.flags_of(context, "lr", "seed")
    if option:
        flags["method_options"] = (opt.method_options(option), True)
    if download:
        flags["download"] = (True, True)
    if clipping != "auto":
        flags["clipping"] = (opt.clipping_of(clipping), True)
    config = run_config(recipe, flags, opt.pairs(settings))
    if lr_range:
        from nfnets.train.loop import lr_range as range_test

        found = range_test.lr_range(config)
        written = range_test.save(found, out)
        then = " and explodes soon after" if found.stopped else ""
        suggested = Text.assemble("suggested learning rate ", (f"{found.suggested:.2g}", "bold"))
        console.print(suggested + f"; the loss falls up to {found.lowest:.2g}{then}")
        say(f"wrote {written[0]} and {written[1].name}")
        return
    with runs.resumable("the same command", out):
        result = train_with_progress(config, out, runs.first_rank_only(), tensorboard)
    runs.tell(result, out)


@command(rich_help_panel="Train")
def recipes(
    name: opt.RecipeName = None,
) -> None:
    """The published recipes for train --recipe: every setting, with its source.

    Example: nfnets recipes nfnet
    """
    from nfnets.train.named_recipes import RECIPES, recipe, recipe_table

    for one in RECIPES.values() if name is None else [recipe(name)]:
        console.print(recipe_table(one))


@command(rich_help_panel="Train")
def compare(
    arms: opt.Arms = "bn,nf",
    model: opt.ModelOrOurs = "bn_resnet20_cifar",
    data: opt.Data = "digits",
    data_dir: opt.DataDir = None,
    download: opt.Download = False,
    train_limit: opt.TrainLimit = None,
    seeds: opt.Seeds = "3",
    batch_size: opt.BatchSizes = "64",
    lrs: opt.Rates = "0.05,0.1,0.2",
    lr_scaling: opt.Scaling = "none",
    tuning_seeds: opt.TuningSeeds = None,
    epochs: opt.Epochs = 10,
    clipping: opt.Clipping = "auto",
    margin: opt.Margin = 0.01,
    settings: opt.Settings = None,
    jobs: opt.Jobs = 1,
    out: opt.Out = Path("runs/compare"),
    file: opt.File = None,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    leave: opt.Leave = False,
    target: opt.Target = None,
    tensorboard: opt.TensorBoard = False,
) -> None:
    """Train with BatchNorm and without, over paired seeds, and say with 95 % intervals whether they differ.

    Every arm searches the same learning rates on the held-out validation split; the best one runs on every seed.
    The test split decides nothing. Exits with 3 when so many runs diverged that nothing can be compared.

    Interrupted, the same command (or --resume) goes on where it was. Run in several shells, on several machines or
    by torchrun at the same time, it shares the runs out.

    Example: nfnets compare --data fashion-mnist --download --train-limit 12000 --epochs 4 --model bn_resnet14_cifar
    """
    from nfnets.train.compare import Arm, ExperimentConfig
    from nfnets.train.compare.experiment import read_experiment

    if resume or file is not None:
        config = read_experiment(out / "experiment.json" if file is None else file, trusted=model)
    else:
        run = {"model": model, "data": data, "epochs": epochs}
        run |= {k: str(v) for k, v in {"data_dir": data_dir}.items() if v is not None}
        run |= {k: v for k, v in {"train_limit": train_limit}.items() if v is not None}
        if download:
            run["download"] = True
        if clipping != "auto":
            run["clipping"] = opt.clipping_of(clipping)
        config = ExperimentConfig.create(
            run={**run, **opt.pairs(settings)},
            arms=[Arm.parse(arm) for arm in arms.split(",")],
            seeds=opt.seeds_of(seeds),
            lrs=opt.numbers("lrs", lrs, float),
            batch_sizes=opt.numbers("batch-size", batch_size, int),
            lr_scaling=lr_scaling,
            tuning_seeds=() if tuning_seeds is None else opt.numbers("tuning-seeds", tuning_seeds, int),
            margin=margin,
            target=target,
        )
    if dry_run:
        from nfnets.train.compare.estimate import dry_run as estimate
        from nfnets.train.compare.tables import planned_table
        from nfnets.train.data import load

        console.print(planned_table(estimate(config, load(config.first_run()), out), jobs))
        return
    runs.compare(config, out, jobs, not leave, tensorboard)


@command(rich_help_panel="Look")
def models(
    pattern: opt.Pattern = "*",
) -> None:
    """List the models that --model takes by name.

    Example: nfnets models 'timm:*resnet1*'
    """
    from nfnets.train.names import model_names

    for name in model_names(pattern):
        print(name)
