"""Converted models as folders and as repositories of the Hugging Face Hub: config.json and model.safetensors."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from nfnets import files
from nfnets.errors import UserError, first_line
from nfnets.given import check_module, shown
from nfnets.state_dicts import differences
from nfnets.train import saved_models
from nfnets.train.saved_models import Recipe

__all__ = ["Recipe", "from_pretrained", "push_to_hub", "save_pretrained"]

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_REMEMBERED = "_nfnets_recipe"


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    recipe: Recipe | None = None,
    *,
    original: nn.Module | None = None,
) -> Path:
    """Write a converted model: its weights as safetensors, and the recipe that rebuilds the module around them.

    Whether the recipe really rebuilds the model is tried before anything is written.

    Args:
        model: the converted model. Any method; `Recipe(method="bn")` is a model that was not converted.
        folder: gets `config.json` (the recipe), `model.safetensors` and, if it has none, a model card.
        recipe: what was built and how it was converted; a model from `from_pretrained` remembers its own.
        original: a model as it was before conversion, where no registry knows it ("package.module:function").
            Without it such a recipe cannot be tried.

    Returns:
        The folder.

    Raises:
        UserError: no recipe, one that gives another module than `model`, or a folder that cannot be written.

    Example:
        >>> import tempfile, torch, nfnets
        >>> net = nfnets.create_model("bn_resnet8_cifar", num_classes=3)
        >>> nf = nfnets.convert(net, torch.randn(4, 3, 16, 16), method="nf")
        >>> folder = save_pretrained(nf, tempfile.mkdtemp(), Recipe("bn_resnet8_cifar", num_classes=3, size=16))
        >>> sorted(file.name for file in folder.iterdir())
        ['README.md', 'config.json', 'model.safetensors']
        >>> from_pretrained(folder).fc.out_features
        3
    """
    check_module(model)
    if recipe is None:
        recipe = getattr(model, _REMEMBERED, None)
    if recipe is None:
        raise UserError(
            f"a {type(model).__name__} without a recipe: expected how it was made; pass "
            'Recipe("timm:resnet18", method="nf", num_classes=10, size=224) with your own values'
        )
    if recipe.registered or original is not None:
        _must_rebuild(model, recipe, original)
    folder = Path(folder)
    saved_models.save(model, recipe, folder / WEIGHTS, folder / CONFIG)
    card = folder / CARD
    if not card.exists():
        files.write(card, model_card(recipe))
    return folder


def from_pretrained(
    source: str | Path,
    *,
    original: nn.Module | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> nn.Module:
    """A model from a folder or a repository that `save_pretrained` or `push_to_hub` wrote.

    Executes no code that the folder names or holds: models come from nfnets', timm's and torchvision's registries,
    weights from safetensors, and only the two files that are needed are downloaded.

    Args:
        source: a folder; the file that `nfnets convert` wrote; or else a repository's name on the Hub, "user/model".
        original: the model before conversion, where its recipe names a function that would have to be imported.
        revision: of the repository: branch, tag or commit.
        token: for a private repository; by default the one that `hf auth login` stored.
        cache_dir: where downloads are kept.

    Returns:
        The model in evaluation mode. It remembers its recipe, so that `save_pretrained(model, folder)` writes it again.

    Raises:
        UserError: neither a folder nor a repository, a file is missing or malformed, weights of another model, or a
            recipe that needs `original`.
    """
    if not isinstance(source, str | Path):
        raise UserError(
            f"source is {shown(source)}: expected a folder or a repository; pass one, as 'user/model'"
        )
    path = Path(source)
    if path.is_file():
        weights, recipe = path, saved_models.read_recipe(path)
    else:
        folder = path if path.is_dir() else _downloaded(str(source), revision, token, cache_dir)
        weights, recipe = folder / WEIGHTS, _recipe_in(folder)
    model = saved_models.load(weights, original, recipe).eval()
    setattr(model, _REMEMBERED, recipe)
    return model


def push_to_hub(
    model: nn.Module,
    repo: str,
    recipe: Recipe | None = None,
    *,
    original: nn.Module | None = None,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload a model",
) -> str:
    """Save a model and upload it to the Hugging Face Hub.

    Args:
        model: as for `save_pretrained`.
        repo: "user/model"; created if it is not there.
        recipe: as for `save_pretrained`.
        original: as for `save_pretrained`.
        private: of a repository that is created now.
        token: by default the one that `hf auth login` stored.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        UserError: as `save_pretrained`, or huggingface_hub is not installed, or refuses.
    """
    hub = _hub()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, recipe, original=original)
        try:
            client = hub.HfApi(token=token)
            client.create_repo(repo, private=private, exist_ok=True)
            if client.file_exists(repo, CARD):  # a card that somebody wrote stays
                (Path(folder) / CARD).unlink()
            done = client.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
        except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError) as error:
            raise UserError(f"cannot upload to {repo!r}: {first_line(error)}") from None
    return str(done.commit_url)


def model_card(recipe: Recipe) -> str:
    """The README.md of a repository: what the Hub shows, and how to load the model.

    Example:
        >>> model_card(Recipe("timm:resnet18")).splitlines()[1]
        'library_name: nfnets'
    """
    made = f"`{recipe.model}`, converted by the method `{recipe.method}`"
    if recipe.method == saved_models.UNCONVERTED:
        made = f"`{recipe.model}`, as it was built"
    outputs = "" if recipe.num_classes is None else f"{recipe.num_classes} outputs, "
    shapes = " and ".join(str(each).replace("x", " × ") for each in recipe.described)
    return (
        "---\nlibrary_name: nfnets\npipeline_tag: image-classification\ntags:\n- nfnets\n- image-classification\n"
        f"---\n\n{made} with nfnets {recipe.version}: {outputs}inputs of {shapes}.\n\n"
        '```python\nfrom nfnets.hub import from_pretrained\n\nmodel = from_pretrained("user/model")  # this one\n```\n'
    )


def _must_rebuild(model: nn.Module, recipe: Recipe, original: nn.Module | None) -> None:
    if wrong := differences(model.state_dict(), saved_models.rebuild(recipe, original).state_dict()):
        raise UserError(
            f"the recipe ({recipe.model}, {recipe.method}, {recipe.num_classes} outputs, {recipe.channels} channels) "
            f"gives another module than this {type(model).__name__}: {wrong}; pass the recipe that it was made by"
        )


def _recipe_in(folder: Path) -> Recipe:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name}; expected what save_pretrained wrote")
    config = folder / CONFIG
    return saved_models.parse_recipe(config.read_text(encoding="utf-8", errors="replace"), str(config))


def _downloaded(repo: str, revision: str | None, token: str | None, cache_dir: Any) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"{repo}: no such folder, nor a name on the Hub; expected a folder or user/model")
    hub = _hub()
    try:
        found = hub.snapshot_download(
            repo,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=[CONFIG, WEIGHTS],
            library_name="nfnets",
        )
    except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, OSError) as error:
        raise UserError(
            f"{repo}: no such folder, and the Hub gives no such model ({first_line(error)})"
        ) from None
    return Path(found)


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise UserError("the Hub needs huggingface_hub; pip install huggingface_hub") from None
    return huggingface_hub
