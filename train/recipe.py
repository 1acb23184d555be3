"""A converted model on disk: its weights as safetensors, and the recipe that rebuilds the module around them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
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


@dataclass(frozen=True)
class Recipe:
    """How to rebuild a converted model: build `model` for these images and classes, then convert it."""

    model: str
    method: str
    options: dict[str, Any]
    num_classes: int
    channels: int
    size: int
    seed: int
    version: str


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
    with seeded(recipe.seed, "convert"):
        return convert(model, images, method=recipe.method, **recipe.options)


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


def save(model: nn.Module, recipe: Recipe, path: Path) -> Path:
    """Write the weights, with the recipe in their metadata and as JSON beside them.

    Args:
        model: The converted model.
        recipe: How it was made.
        path: The .safetensors file; the JSON gets its name.

    Returns:
        The path of the JSON.

    Raises:
        UserError: the path is not a .safetensors file or cannot be written.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: expected a name that ends in .safetensors; pass --out nf.safetensors")
    text = json.dumps(asdict(recipe), indent=1, sort_keys=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, str(path), {KEY: text})
        path.with_suffix(".json").write_text(text + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {path}: {_first_line(error)}; pass an --out that is writable"
        ) from None
    return path.with_suffix(".json")


def load(path: str | Path) -> nn.Module:
    """Rebuild a converted model from the file that `nfnets convert` wrote.

    Args:
        path: The .safetensors file.

    Returns:
        The converted model with the file's weights, in training mode.

    Raises:
        UserError: no such file, no recipe in it, or a recipe that does not rebuild it here.

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
    recipe = read_recipe(path)
    images = torch.randn(
        4, recipe.channels, recipe.size, recipe.size, generator=torch.Generator().manual_seed(0)
    )
    with seeded(recipe.seed, "init"):
        model = build(
            recipe.model, num_classes=recipe.num_classes, channels=recipe.channels, size=recipe.size
        )
    converted = convert_model(model, images, recipe)
    try:
        load_model(converted, str(path))
    except RuntimeError as error:
        raise UserError(
            f"{path}: the recipe (nfnets {recipe.version}) gives another model with nfnets {nfnets.__version__}: "
            f"{_first_line(error)}"
        ) from None
    return converted


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
    return Recipe(**json.loads(text))


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
