"""Folders and Hub repositories: what comes back is what was saved, and nothing a stranger wrote is executed."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nfnets
from nfnets import hub
from nfnets.errors import UserError
from nfnets.hub import Recipe, from_pretrained, push_to_hub, save_pretrained
from nfnets.train import saved_models

METHODS = (
    "nf",
    "fold",
    "fixed_variance",
    "fixup",
    "skipinit",
    "lsuv",
    "gn",
    "ws_gn",
    "ln",
    "online",
    "bcn",
    "evonorm_s0",
    "dyt",
    "derf",
    "ghost_bn",
    "tune",
)


def images(size: int = 16) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(7))


def scrambled(model: nn.Module) -> nn.Module:
    """Every tensor of its state changed, as training does: nothing may come back from the initialization."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=generator))
                tensor.add_(0.05 * torch.rand(tensor.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe("bn_resnet8_cifar", num_classes=3, size=16)
    return save_pretrained(saved_models.rebuild(recipe), tmp_path_factory.mktemp("hub") / "saved", recipe)


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_once, tmp_path / "saved")


@pytest.mark.parametrize("method", ["bn", *METHODS])
def test_round_trip(method: str, tmp_path: Path) -> None:
    recipe = Recipe("bn_resnet8_cifar", method, num_classes=3, size=16)
    net = nfnets.create_model("bn_resnet8_cifar", num_classes=3)
    converted = net if method == "bn" else nfnets.convert(net.eval(), images(), method=method)
    converted = scrambled(converted).eval()
    again = from_pretrained(save_pretrained(converted, tmp_path, recipe))
    assert not again.training
    mine, theirs = converted.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with torch.no_grad():
        assert torch.equal(converted(images()), again(images()))


def test_every_method_is_tried() -> None:
    shipped = {
        name
        for name, method in nfnets.convert.list_methods().items()  # pyright: ignore[reportFunctionMemberAccess]
        if method.__module__.startswith("nfnets.")
    }
    assert shipped == set(METHODS)


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md", "nfnets/cli_options.py"])
def test_every_method_is_named(page: str) -> None:
    """Tables that readers choose from name what the registry holds."""
    text = (Path(__file__).parents[1] / page).read_text()
    if page == "README.md":
        (text,) = [line for line in text.splitlines() if line.startswith("| `convert`, `plan` |")]
    elif page.endswith(".py"):
        text = text[text.index("METHODS = (") : text.index("RULES = (")]
    named = set(re.findall(r"[a-z]\w+", text))
    assert set(METHODS) <= named, set(METHODS) - named


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("timm:resnet10t", num_classes=5, channels=1, size=32),
        Recipe("torchvision:shufflenet_v2_x0_5", "gn", {"num_groups": 2}, num_classes=4, size=32),
        Recipe("nf_resnet26", "bn", num_classes=4, size=32),
    ],
    ids=lambda recipe: recipe.model,
)
def test_every_registry(recipe: Recipe, tmp_path: Path) -> None:
    from nfnets.train.models import build

    original = build(recipe.model, num_classes=recipe.num_classes, channels=recipe.channels, size=recipe.size)
    x = torch.randn(4, recipe.channels, recipe.size, recipe.size)
    model = original
    if recipe.method != "bn":
        model = nfnets.convert(original, x, method=recipe.method, **recipe.options)
    scrambled(model).eval()
    again = from_pretrained(save_pretrained(model, tmp_path, recipe))
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_config_holds_the_recipe(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config == {
        "model": "bn_resnet8_cifar",
        "method": "nf",
        "options": {},
        "num_classes": 3,
        "channels": 3,
        "size": 16,
        "seed": 0,
        "version": nfnets.__version__,
        "inputs": [],
        "batch_size": None,
    }
    assert saved_models.read_recipe(saved / "model.safetensors") == Recipe(**config)
    assert "library_name: nfnets" in (saved / "README.md").read_text()


def test_the_file_that_the_command_writes(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from nfnets.cli import app

    command = ["convert", "-m", "bn_resnet8_cifar", "--input", "3x16x16", "--classes", "3", "--out"]
    done = CliRunner().invoke(app, [*command, str(tmp_path / "nf.safetensors")])
    assert done.exit_code == 0, done.output
    model = from_pretrained(tmp_path / "nf.safetensors")
    again = from_pretrained(save_pretrained(model, tmp_path / "folder"))
    assert torch.equal(model(images()), again(images()))


def test_a_loaded_model_remembers_its_recipe_and_a_card_stays(saved: Path, tmp_path: Path) -> None:
    model = from_pretrained(saved)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "README.md").write_text("mine")
    again = save_pretrained(model, tmp_path / "again")
    assert (again / "config.json").read_text() == (saved / "config.json").read_text()
    assert (again / "README.md").read_text() == "mine"


def test_no_or_a_wrong_recipe_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    net = nfnets.create_model("bn_resnet8_cifar", num_classes=3)
    with pytest.raises(UserError, match="without a recipe"):
        save_pretrained(net, tmp_path / "f")
    for wrong in (
        Recipe("bn_resnet8_cifar", "nf", num_classes=3, size=16),
        Recipe("bn_resnet8_cifar", "bn", num_classes=4, size=16),
    ):
        with pytest.raises(UserError, match="another module"):
            save_pretrained(net, tmp_path / "f", wrong)
    assert not (tmp_path / "f").exists()


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x).flatten(1))


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    own = Own()
    converted = scrambled(nfnets.convert(own, images())).eval()
    recipe = Recipe("mine.models:own", num_classes=2, size=16)
    save_pretrained(converted, tmp_path, recipe, original=own)
    with pytest.raises(UserError, match="pass it as original"):
        from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    again = from_pretrained(tmp_path, original=own)
    assert torch.equal(again(images()), converted(images()))
    assert all(torch.equal(before[name], tensor) for name, tensor in own.state_dict().items())
    assert isinstance(own.body[1], nn.BatchNorm2d)
    with pytest.raises(UserError, match="another module"):
        save_pretrained(own, tmp_path, recipe, original=own)


# -- what a stranger may have written ---------------------------------------------------------------------------


def edited(saved: Path, **changes: Any) -> Path:
    config = json.loads((saved / "config.json").read_text()) | changes
    (saved / "config.json").write_text(json.dumps(config))
    return saved


def test_a_recipe_imports_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\ndef build(**_): open('ran', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # The same recipe in the weights' metadata, which `recipe.load` reads.
    saved_models.save(Own(), Recipe("evil:build"), tmp_path / "evil.safetensors")
    for load in (
        lambda: from_pretrained(edited(saved, model="evil:build")),
        lambda: saved_models.load(tmp_path / "evil.safetensors"),
    ):
        with pytest.raises(UserError, match="must not decide what code runs"):
            load()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": "timm:hf-hub:user/evil"}, "unknown timm model"),
        ({"model": "torchvision:../evil"}, "unknown torchvision model"),
        ({"model": "nothing_like_it"}, "unknown model"),
        ({"method": "nothing_like_it"}, "unknown method"),
        ({"options": {"inplace": True}}, "is not a method's"),
        ({"options": {"alpfa": 1}}, "did you mean alpha"),
        ({"method": "bn", "options": {"alpha": 1}}, "leaves the model alone"),
        ({"num_classes": 10**12}, "num_classes"),
        ({"size": "big"}, "size"),
        ({"pretrained": True}, "pretrained"),
        ({"num_classes": 4}, "gives another model"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_recipes_are_user_errors(saved: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        from_pretrained(edited(saved, **changes))


@settings(max_examples=60, deadline=None)
@given(
    st.text()
    | st.dictionaries(st.text(), st.integers() | st.none()).map(json.dumps)
    | st.lists(st.none()).map(json.dumps)
)
def test_any_text_in_place_of_a_recipe_is_a_user_error(text: str) -> None:
    with pytest.raises(UserError, match="not a recipe"):
        saved_models.parse_recipe(text, "config.json")


class _Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_a_pickle_in_place_of_weights_is_not_opened(saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (saved / "model.safetensors").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(UserError, match="not a safetensors file"):
        from_pretrained(saved)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(UserError, match=f"no {name}"):
        from_pretrained(saved)


# -- the Hub, without a network ---------------------------------------------------------------------------------


def test_download_asks_for_the_two_files_only(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(saved)

    real = hub._hub()
    fake = types.SimpleNamespace(snapshot_download=snapshot_download, errors=real.errors)
    monkeypatch.setattr(hub, "_hub", lambda: fake)
    assert from_pretrained("user/model", revision="v1").fc.out_features == 3
    assert asked["repo"] == "user/model"
    assert asked["revision"] == "v1"
    assert asked["allow_patterns"] == ["config.json", "model.safetensors"]


def test_offline_and_wrong_names_are_user_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the Hub gives no such model"):
        from_pretrained("user/model", cache_dir=tmp_path)
    with pytest.raises(UserError, match="expected a folder or user/model"):
        from_pretrained("no/such/folder")


@pytest.mark.parametrize("has_card", [False, True])
def test_push(saved: Path, monkeypatch: pytest.MonkeyPatch, has_card: bool) -> None:
    calls: list[Any] = []
    uploaded: dict[str, bytes] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            calls.append(token)

        def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
            calls.append((repo, private, exist_ok))

        def file_exists(self, repo: str, name: str) -> bool:
            return has_card

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
            uploaded.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})
            return types.SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    fake = types.SimpleNamespace(HfApi=Api, errors=hub._hub().errors)
    monkeypatch.setattr(hub, "_hub", lambda: fake)
    url = push_to_hub(from_pretrained(saved), "user/model", private=True, token="t")
    assert url.endswith("user/model/commit/1")
    assert calls == ["t", ("user/model", True, True)]
    assert uploaded["config.json"] == (saved / "config.json").read_bytes()
    assert ("README.md" in uploaded) is not has_card
