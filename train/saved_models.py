"""A converted model on disk: its weights as safetensors, and the recipe that rebuilds the module around them."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model
from torch import nn

import nfnets
from nfnets import files
from nfnets import verify as checks
from nfnets.convert import convert, list_methods
from nfnets.copying import deep_copy
from nfnets.errors import UserError, first_line
from nfnets.state_dicts import differences, write_state
from nfnets.train.inputs import Described, Inputs, described, fitting, noise
from nfnets.train.keyed import seeded
from nfnets.train.models import build, registered

KEY = "nfnets_recipe"
UNCONVERTED = "bn"
# What `convert` takes besides a method's own options and must not get from a file.
_RESERVED = frozenset({"model", "method", "inputs", "kwargs", "inplace", "batch_size"})


@dataclass(frozen=True)
class Recipe:
    """How to rebuild a converted model: build `model` for these inputs and classes, then convert it.

    Args:
        model: "timm:NAME", "torchvision:NAME", a name of `nfnets.create_model`, or "package.module:function".
        method: a conversion method; "bn" leaves the model as it was built.
        options: of the method.
        num_classes: outputs; None where a builder of the user's own chose them.
        channels: of the images.
        size: pixels per side of the images; None where there is no such number.
        seed: of the random weights that the state replaces.
        version: of nfnets.
        batch_size: images in a batch of the training to come, as `convert` takes it.
        inputs: where they are not square images: a shape without the batch for each ("1x16000"), NAME=SHAPE for what
            the forward takes by keyword, NAME.KEY=SHAPE for a dict's entry.

    Example:
        >>> Recipe("timm:resnet18", "nf", {"alpha": 0.5}, num_classes=10).size
        224
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=300)]
    method: Annotated[str, Field(min_length=1, max_length=100)] = "nf"
    options: dict[str, JsonValue] = field(default_factory=dict)
    num_classes: Annotated[int | None, Field(ge=0, le=1_000_000)] = 1000
    channels: Annotated[int, Field(ge=1, le=65_536)] = 3
    size: Annotated[int | None, Field(ge=1, le=100_000_000)] = 224
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    version: str = nfnets.__version__
    inputs: Annotated[list[str], Field(max_length=16)] = field(default_factory=list)
    batch_size: Annotated[int | None, Field(ge=1, le=100_000_000)] = None

    @property
    def registered(self) -> bool:
        """Whether a registry (ours, timm's, torchvision's) builds the model, so that no code is looked up."""
        return registered(self.model)

    @property
    def described(self) -> list[Described]:
        """The inputs, square images included.

        Raises:
            UserError: there are none, or what describes them is malformed.
        """
        if self.inputs:
            return described(self.inputs)
        if self.size is None:
            raise UserError("recipe: neither size nor inputs; expected one of them")
        return [fitting(Described((self.channels, self.size, self.size)))]


def convert_model(model: nn.Module, inputs: Inputs, recipe: Recipe) -> nn.Module:
    """Convert a model as its recipe says.

    Args:
        model: The model that `recipe.model` names; is not changed.
        inputs: A batch for it.
        recipe: Method and options.

    Returns:
        The converted model.

    Raises:
        UserError: options that are no method's, or what `nfnets.convert` refuses.
    """
    check_options(recipe.options)
    if recipe.method == UNCONVERTED:
        if recipe.options:
            raise UserError(f"recipe: options={recipe.options}: method 'bn' leaves the model alone")
        return deep_copy(model)
    options: dict[str, Any] = dict(recipe.options)
    if recipe.batch_size is not None:
        options = {"batch_size": recipe.batch_size} | options
    with seeded(recipe.seed, "convert"):
        return convert(model, *inputs.args, method=recipe.method, kwargs=inputs.kwargs, **options)


def check_options(options: Mapping[str, Any]) -> None:
    """A UserError where the options of a method hold an argument of `convert` itself.

    Example:
        >>> check_options({"alpha": 0.5, "include": "layer4*"})
    """
    for name in sorted(_RESERVED & options.keys()):
        raise UserError(f"option {name!r} is not a method's; leave it out")


def save(model: nn.Module, recipe: Recipe, path: Path, beside: Path | None = None) -> Path:
    """Write the weights, with the recipe in their metadata and as JSON beside them.

    Args:
        model: The converted model.
        recipe: How it was made.
        path: The .safetensors file.
        beside: The JSON; by default it gets the weights' name.

    Returns:
        The path of the JSON.

    Raises:
        UserError: the path is not a .safetensors file, one of the two files cannot be written, or one is there that
            did not come from here. Then neither is written.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: expected a name that ends in .safetensors; pass --out nf.safetensors")
    beside = path.with_suffix(".json") if beside is None else beside
    for file, read in ((path, read_recipe), (beside, _read_json)):
        _must_be_ours(file, read)
    text = json.dumps(asdict(recipe), indent=1, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {first_line(error)}; pass an --out that is writable") from None
    with files.replacing(path, beside) as (weights, description):
        write_state(weights, model, {KEY: text})
        files.write(description, text + "\n")
    return beside


def _must_be_ours(file: Path, read: Callable[[Path], Recipe]) -> None:
    """Refuse to overwrite what another program or the user wrote."""
    if not file.exists():
        return
    try:
        read(file)
    except (UserError, OSError):
        kind = "a folder" if file.is_dir() else "not a converted model's"
        raise UserError(
            f"cannot write {file}: it exists and is {kind}; move it or choose another name"
        ) from None


def _read_json(path: Path) -> Recipe:
    return parse_recipe(path.read_text(encoding="utf-8", errors="replace"), str(path))


def load(path: str | Path, original: nn.Module | None = None, recipe: Recipe | None = None) -> nn.Module:
    """Rebuild a converted model from the file that `nfnets convert` wrote. Executes no code that the file names.

    Args:
        path: The .safetensors file.
        original: The model before conversion; needed where no registry knows it, used in any case if given.
        recipe: Instead of the one in the file's metadata.

    Returns:
        The converted model with the file's weights, in training mode.

    Raises:
        UserError: no such file, no recipe in it, a recipe that does not rebuild it here, or one that names a
            function to import and no `original`.

    Example:
        >>> import tempfile
        >>> recipe = Recipe("bn_resnet8_cifar", "nf", {}, 10, 1, 8, 0, nfnets.__version__)
        >>> net = build("bn_resnet8_cifar", num_classes=10, channels=1, size=8)
        >>> inputs = noise(recipe.described, batch=4, seed=0)
        >>> converted = convert_model(net, inputs, recipe).eval()
        >>> file = Path(tempfile.mkdtemp()) / "nf.safetensors"
        >>> _ = save(converted, recipe, file)
        >>> bool((load(file).eval()(*inputs.args) == converted(*inputs.args)).all())
        True
    """
    path = Path(path)
    recipe = read_recipe(path) if recipe is None else recipe
    if original is None and recipe.registered:
        _must_fit(recipe, path)
    converted = rebuild(recipe, original)
    try:
        load_model(converted, str(path))
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({first_line(error)})") from None
    except RuntimeError:
        given = f"nfnets {nfnets.__version__}" if original is None else "the original that was passed"
        raise UserError(
            f"{path}: the recipe ({recipe.model} by {recipe.method}, nfnets {recipe.version}) gives another model "
            f"with {given}: {differences(converted.state_dict(), load_file(path))}"
        ) from None
    return converted


def _must_fit(recipe: Recipe, path: Path) -> None:
    """Refuse a recipe whose model is another than the file's before it takes memory: shapes alone are compared.

    A conversion keeps the weights of a model, by name and shape; its norm layers and biases it may not.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a safetensors file ({first_line(error)})") from None
    try:
        with torch.device("meta"):
            model = build(
                recipe.model, num_classes=recipe.num_classes, channels=recipe.channels, size=recipe.size
            )
    except UserError as error:
        if not isinstance(error.__cause__, NotImplementedError | RuntimeError):
            raise
        # A model that reads values while it is built (torchvision's RegNets): what a stranger chooses is bounded.
        largest = max((side for shape in there.values() for side in shape), default=0)
        if max(recipe.channels, recipe.num_classes or 0) > largest:
            raise UserError(
                f"{path}: no weight of {recipe.channels} channels or {recipe.num_classes} outputs"
            ) from None
        return
    weights = {name: tuple(each.shape) for name, each in model.named_parameters() if each.dim() > 1}
    for name, shape in weights.items():
        if there.get(name, shape) != shape:
            theirs, its = ("x".join(map(str, each)) for each in (there[name], shape))
            raise UserError(
                f"{path}: the recipe ({recipe.model}) gives another model: {name} is {theirs} in the file, not {its}"
            )
    needed, held = (sum(map(math.prod, shapes.values())) for shapes in (weights, there))
    if needed > held:
        raise UserError(
            f"{path}: holds {held:,} numbers, the recipe's {recipe.model} has {needed:,} in its weights alone; "
            "expected what `nfnets convert --out` wrote"
        )


def rebuild(recipe: Recipe, original: nn.Module | None = None) -> nn.Module:
    """The module that a recipe describes, with weights that a state is to replace.

    Args:
        recipe: May come from a stranger.
        original: The model before conversion; left as it is.

    Returns:
        The converted model, in training mode.

    Raises:
        UserError: an unknown model, method or option; a function to import, and no `original`.
    """
    inputs = noise(recipe.described, batch=4, seed=0)
    if original is None:
        if not recipe.registered:
            raise UserError(
                f"the recipe's model {recipe.model!r} is a function that would have to be imported, and a file "
                "must not decide what code runs; build the model yourself and pass it as original"
            )
        with seeded(recipe.seed, "init"):
            original = build(
                recipe.model, num_classes=recipe.num_classes, channels=recipe.channels, size=recipe.size
            )
    with _few_images():
        return convert_model(original, inputs, recipe).train()


@contextlib.contextmanager
def _few_images() -> Iterator[None]:
    """Nothing is said of few images: what is measured on them is replaced."""

    def other(record: logging.LogRecord) -> bool:
        return "too little of single channels" not in record.msg

    log = logging.getLogger("nfnets")
    log.addFilter(other)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"method '\w+' measures constants on")
            yield
    finally:
        log.removeFilter(other)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file's metadata.

    Raises:
        UserError: no such file, or no recipe in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected what `nfnets convert --out` wrote")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({first_line(error)})") from None
    if text is None:
        raise UserError(f"{path}: no recipe in its metadata; expected what `nfnets convert --out` wrote")
    return parse_recipe(text, str(path))


def parse_recipe(text: str, where: str) -> Recipe:
    """A recipe from JSON that anybody may have written.

    Args:
        text: The JSON.
        where: What it was read from, for the error.

    Returns:
        The recipe, its types and bounds checked.

    Raises:
        UserError: not JSON, unknown or missing fields, values out of bounds.

    Example:
        >>> parse_recipe('{"model": "bn_resnet8_cifar", "sise": 8}', "config.json")
        Traceback (most recent call last):
        ...
        nfnets.errors.UserError: config.json: not a recipe: sise: unexpected keyword argument
    """
    try:
        return TypeAdapter(Recipe).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "JSON"
        raise UserError(
            f"{where}: not a recipe: {place}: {first['msg'][0].lower()}{first['msg'][1:]}"
        ) from None


def verify(
    converted: nn.Module, original: nn.Module, inputs: Inputs, method: str, say: Callable[[str], None]
) -> bool:
    """Run the verifications that a method promises, and say what they found.

    Args:
        converted: The converted model.
        original: What it was made from.
        inputs: A batch of at least two.
        method: Of conversion; some promise the same function (`fold`, `tune`).
        say: Called with a line per check.

    Returns:
        Whether all of them passed.
    """
    args, kwargs = inputs
    verdicts = [checks.batch_independence(converted, *args, kwargs=kwargs)]
    kind = list_methods().get(method)
    if kind is not None and kind.keeps_function:
        verdicts.append(checks.same_function(original, converted, *args, kwargs=kwargs))
    for verdict in verdicts:
        say(str(verdict))
    return all(verdicts)
