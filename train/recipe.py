"""A converted model on disk: its weights as safetensors, and the recipe that rebuilds the module around them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn

import nfnets
from nfnets import verify as checks
from nfnets.convert import convert
from nfnets.errors import UserError
from nfnets.train.keyed import seeded
from nfnets.train.models import build

KEY = "nfnets_recipe"
UNCONVERTED = "bn"
# What `convert` takes besides a method's own options and must not get from a file.
_RESERVED = frozenset({"model", "method", "inputs", "kwargs", "inplace"})


@dataclass(frozen=True)
class Recipe:
    """How to rebuild a converted model: build `model` for these images and classes, then convert it.

    Args:
        model: "timm:NAME", "torchvision:NAME", a name of `nfnets.create_model`, or "package.module:function".
        method: a conversion method; "bn" leaves the model as it was built.
        options: of the method.
        num_classes: outputs.
        channels: of the images.
        size: pixels per side of the images.
        seed: of the random weights that the state replaces.
        version: of nfnets.

    Example:
        >>> Recipe("timm:resnet18", "nf", {"alpha": 0.5}, num_classes=10).size
        224
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=300)]
    method: Annotated[str, Field(min_length=1, max_length=100)] = "nf"
    options: dict[str, JsonValue] = field(default_factory=dict)
    num_classes: Annotated[int, Field(ge=0, le=1_000_000)] = 1000
    channels: Annotated[int, Field(ge=1, le=1024)] = 3
    size: Annotated[int, Field(ge=1, le=4096)] = 224
    seed: Annotated[int, Field(ge=0)] = 0
    version: str = nfnets.__version__

    @property
    def registered(self) -> bool:
        """Whether a registry (ours, timm's, torchvision's) builds the model, so that no code is looked up."""
        family, colon, _ = self.model.partition(":")
        return not colon or family in ("timm", "torchvision")


def convert_model(
    model: nn.Module,
    images: Tensor,
    recipe: Recipe,
    weights: Path | None = None,
) -> nn.Module:
    """Convert a model as its recipe says, with weights of the user's own if there are any.

    Args:
        model: The model that `recipe.model` names; gets `weights`, is not changed besides.
        images: A batch for it.
        recipe: Method and options.
        weights: A .safetensors file, or what `torch.save(model.state_dict())` wrote.

    Returns:
        The converted model.

    Raises:
        UserError: weights that are not there or do not fit, or what `nfnets.convert` refuses.
    """
    if weights is not None:
        load_weights(model, weights)
    for name in sorted(_RESERVED & recipe.options.keys()):
        raise UserError(f"recipe: option {name!r} is not a method's; leave it out")
    if recipe.method == UNCONVERTED:
        if recipe.options:
            raise UserError(f"recipe: options={recipe.options}: method 'bn' leaves the model alone")
        return copy.deepcopy(model)
    options: dict[str, Any] = dict(recipe.options)
    with seeded(recipe.seed, "convert"):
        return convert(model, images, method=recipe.method, **options)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state_dict from disk into a model, or say in one line why it does not fit.

    Raises:
        UserError: no such file, not a state_dict, or other keys or shapes; the model is as it was.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected weights as .safetensors or a state_dict")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
    except (SafetensorError, RuntimeError, EOFError, AttributeError, ValueError, OSError, KeyError) as error:
        raise UserError(f"{path}: not readable as weights ({_first_line(error)})") from None
    except Exception as error:  # pickle's errors have no common ground below Exception
        raise UserError(f"{path}: not a state_dict ({_first_line(error)})") from None
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys())
    wrong += [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if wrong:
        names = ", ".join(wrong[:6]) + (f", … ({len(wrong)} in all)" if len(wrong) > 6 else "")
        raise UserError(f"{path}: weights of another model; missing, unknown or of another shape: {names}")
    model.load_state_dict(state)


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
        UserError: the path is not a .safetensors file or cannot be written.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: expected a name that ends in .safetensors; pass --out nf.safetensors")
    beside = path.with_suffix(".json") if beside is None else beside
    text = json.dumps(asdict(recipe), indent=1, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, str(path), {KEY: text})
        beside.write_text(text + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {path}: {_first_line(error)}; pass an --out that is writable"
        ) from None
    return beside


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
        >>> images = torch.randn(4, 1, 8, 8)
        >>> converted = convert_model(net, images, recipe).eval()
        >>> file = Path(tempfile.mkdtemp()) / "nf.safetensors"
        >>> _ = save(converted, recipe, file)
        >>> bool(torch.equal(load(file).eval()(images), converted(images)))
        True
    """
    path = Path(path)
    recipe = read_recipe(path) if recipe is None else recipe
    converted = rebuild(recipe, original)
    try:
        load_model(converted, str(path))
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({_first_line(error)})") from None
    except RuntimeError as error:
        raise UserError(
            f"{path}: the recipe (nfnets {recipe.version}) gives another model with nfnets {nfnets.__version__}: "
            f"{_first_line(error)}"
        ) from None
    return converted


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
    shape = (4, recipe.channels, recipe.size, recipe.size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
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
    return convert_model(original, images, recipe).train()


def read_recipe(path: Path) -> Recipe:
    """The recipe in a file's metadata.

    Raises:
        UserError: no such file, or no recipe in it.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise UserError(f"{path}: no such file; expected what `nfnets convert --out` wrote")
    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({_first_line(error)})") from None
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
    converted: nn.Module, original: nn.Module, images: Tensor, method: str, say: Callable[[str], None]
) -> bool:
    """Run the verifications that a method promises, and say what they found.

    Args:
        converted: The converted model.
        original: What it was made from.
        images: A batch of at least two.
        method: "fold" promises the same function, the others do not.
        say: Called with a line per check.

    Returns:
        Whether all of them passed.
    """
    verdicts = [checks.batch_independence(converted, images)]
    if method == "fold":
        verdicts.append(checks.same_function(original, converted, images))
    for verdict in verdicts:
        say(str(verdict))
    return all(verdicts)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
