"""Loading anything that a stranger made runs no code: each file here would leave a mark, and is refused in one line."""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_floors import MODULES, ROOT
from test_train_stream import FORMATS, settings_of
from timm.data.readers import class_map, reader_image_in_tar
from typer.testing import CliRunner

import nfnets
from nfnets import state_dicts
from nfnets.cli import app
from nfnets.errors import UserError
from nfnets.hub import from_pretrained, save_pretrained
from nfnets.models import load_weights
from nfnets.signal.report import SignalReport
from nfnets.train import saved_models
from nfnets.train.compare.experiment import read_experiment
from nfnets.train.config import RunConfig
from nfnets.train.data import cifar
from nfnets.train.data.readers import open_split
from nfnets.train.loop import checkpoint
from nfnets.train.models import start_from
from nfnets.train.saved_models import Recipe

MARK = "a-stranger-was-here"


class Bomb:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (MARK,)


def _legacy(path: Path) -> None:
    torch.save({"step": 1, "weight": Bomb()}, path, _use_new_zipfile_serialization=False)


def _zipped(path: Path) -> None:
    torch.save({"step": 1, "weight": Bomb()}, path)


def _bare(path: Path) -> None:
    path.write_bytes(pickle.dumps({"step": 1, "weight": Bomb(), b"data": Bomb(), b"labels": Bomb()}))


def _hidden(path: Path) -> None:
    """A whole state_dict, and the bomb behind it."""
    torch.save(torch.nn.Linear(2, 2).state_dict() | {"extra": Bomb()}, path)


def _script(path: Path) -> None:
    """A TorchScript archive, which `torch.load` would hand to `torch.jit.load`."""
    stored = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), stored)  # type: ignore[no-untyped-call]
    path.write_bytes(stored.getvalue())


PICKLES: dict[str, Callable[[Path], None]] = {
    "zip": _zipped,
    "legacy": _legacy,
    "bare": _bare,
    "hidden": _hidden,
    "script": _script,
}
YAML_TAGS = (
    "!!python/object/apply:os.mkdir ['a-stranger-was-here']",
    "!!python/object/new:os.mkdir ['a-stranger-was-here']",
    "!!python/name:os.system",
    "!!python/module:this",
    "run: {model: !!python/object/apply:os.mkdir ['a-stranger-was-here']}\narms: [{name: bn}]",
    "!!python/object:subprocess.Popen {}",
)


@pytest.fixture(autouse=True)
def nothing_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / MARK).exists()


def refused(action: Callable[[], Any], match: str = ".") -> None:
    with pytest.raises(UserError, match=match) as error:
        action()
    assert "\n" not in str(error.value), "one line"
    assert len(str(error.value)) < 1000


def test_the_bombs_are_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise nothing here says anything."""
    (tmp_path / "sandbox").mkdir()
    monkeypatch.chdir(tmp_path / "sandbox")
    for name in ("zip", "legacy", "hidden"):
        PICKLES[name](Path("bomb.pt"))
        torch.load("bomb.pt", weights_only=False)
        Path(MARK).rmdir()
    _bare(Path("bomb.pkl"))
    with pytest.raises(FileExistsError):  # the second of three
        pickle.loads(Path("bomb.pkl").read_bytes())
    Path(MARK).rmdir()


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.filterwarnings("ignore")
def test_pickles_as_weights_and_checkpoints(kind: str, tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for name in ("weights.pt", "weights.pth", "weights.safetensors"):
        path = tmp_path / name
        PICKLES[kind](path)
        refused(lambda p=path: load_weights(net, p), re.escape(str(path)))
        refused(lambda p=path: state_dicts.load_state(net, p), re.escape(str(path)))
        refused(lambda p=path: saved_models.load(p))
        refused(lambda p=path: from_pretrained(p))
        refused(lambda p=path: start_from(net, p), re.escape(str(path)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())

    run = tmp_path / "run"
    run.mkdir()
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        PICKLES[kind](run / name)
    refused(lambda: checkpoint.load(run), "unreadable")


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.filterwarnings("ignore")
def test_the_commands_say_so_in_one_line(kind: str, tmp_path: Path) -> None:
    PICKLES[kind](tmp_path / "w.pt")
    words = ["convert", "-m", "bn_resnet8_cifar", "--weights", "w.pt", "--out", "out.safetensors"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit | UserError), result.exception
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("kind", ["bare", "zip"])
def test_a_folder_of_the_hub(kind: str, tmp_path: Path) -> None:
    net = nfnets.convert(nfnets.create_model("bn_resnet8_cifar"), torch.randn(2, 3, 8, 8))
    folder = save_pretrained(net, tmp_path / "model", Recipe("bn_resnet8_cifar", num_classes=10, size=8))
    from_pretrained(folder)
    # More files than were asked for are not looked at.
    PICKLES[kind](folder / "pytorch_model.bin")
    (folder / "modeling.py").write_text(f"import os; os.mkdir({MARK!r})")
    from_pretrained(folder)
    PICKLES[kind](folder / "model.safetensors")
    refused(lambda: from_pretrained(folder))
    config = json.loads((folder / "config.json").read_text())
    for evil in (
        config | {"auto_map": {"AutoModel": "modeling.Model"}},
        config | {"model": "modeling:Model"},
        config | {"model": "os:mkdir"},
        config | {"method": "modeling:Method"},
        config | {"options": {"__reduce__": ["os.mkdir", MARK]}},
    ):
        (folder / "config.json").write_text(json.dumps(evil))
        refused(lambda: from_pretrained(folder))
    PICKLES[kind](folder / "config.json")
    refused(lambda: from_pretrained(folder))


def test_metadata_of_safetensors_names_no_code(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({MARK!r})")
    for model in (
        "evil:build",
        "os:abort",
        "timm:hf-hub:user/evil",
        "timm:local-dir:.",
        "torchvision:../evil",
    ):
        text = json.dumps({"model": model, "num_classes": 2, "size": 8})
        save_file({"weight": torch.zeros(1)}, tmp_path / "x.safetensors", {saved_models.KEY: text})
        refused(lambda: from_pretrained(tmp_path / "x.safetensors"))
        refused(lambda: saved_models.load(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("text", YAML_TAGS)
def test_tags_in_yaml(text: str, tmp_path: Path) -> None:
    for name in ("experiment.yaml", "experiment.json"):
        (tmp_path / name).write_text(text)
        refused(
            lambda n=name: read_experiment(tmp_path / n), "cannot be read .*could not determine a constructor"
        )
    result = CliRunner().invoke(app, ["compare", "--file", "experiment.yaml", "--out", "out"])
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit | UserError)
    refused(lambda: RunConfig.read(tmp_path / "experiment.json"))


@pytest.mark.parametrize("where", ["run", "arm"])
def test_an_experiment_names_no_code(where: str, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({MARK!r})\ndef build(**_): ...")

    def written(**fields: Any) -> Path:
        arm: dict[str, Any] = {"name": "bn", "method": "bn"}
        run: dict[str, Any] = {"data": "digits"}
        (run if where == "run" else arm).update(fields)
        file = tmp_path / "experiment.yaml"
        file.write_text(json.dumps({"run": run, "arms": [arm]}))
        return file

    refused(lambda: read_experiment(written(model="evil:build")), "--model evil:build")
    refused(lambda: read_experiment(written(model="os:abort"), trusted="evil:build"), "os:abort")
    for name in ("checkpoint_path", "pretrained_cfg_overlay"):
        given = {"model": "timm:resnet18", "model_options": {name: "x.pth"}}
        refused(lambda g=given: read_experiment(written(**g)), f"{name}='x.pth' may run code")
    assert read_experiment(written(model="evil:build"), trusted="evil:build").arms[0].name == "bn"
    for harmless in ("bn_resnet8_cifar", "timm:resnet18", "torchvision:resnet18"):
        read_experiment(written(model=harmless))
    result = CliRunner().invoke(app, ["compare", "--file", str(written(model="evil:build")), "--out", "out"])
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit | UserError)


def test_data_options_do_not_trust_remote_code(tmp_path: Path) -> None:
    run = {"data": "timm:hfds/user/evil", "data_options": {"trust_remote_code": True}}
    (tmp_path / "x.yaml").write_text(json.dumps({"run": run, "arms": [{"name": "bn", "method": "bn"}]}))
    refused(lambda: read_experiment(tmp_path / "x.yaml"), "trust_remote_code=True may run code")


@pytest.mark.parametrize("kind", ["folders", "tar", "class-tars"])
def test_neither_class_maps_nor_caches_of_tars_are_unpickled(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with timm before 1.0.27, whose unpickler takes anything."""
    for reader in (class_map, reader_image_in_tar):
        for name in [name for name in vars(reader) if name.endswith("Unpickler")]:
            monkeypatch.setattr(reader, name, pickle.Unpickler)
    FORMATS[kind](tmp_path, "train", 12)
    for folder in filter(Path.is_dir, (tmp_path, tmp_path / "train")):
        for name in ("classes.pkl", "_train_tarinfos.pickle"):
            _bare(folder / name)
    for name in ("classes.pkl", "classes.txt.pkl", str(tmp_path / "classes.pkl")):
        refused(
            lambda n=name: open_split(settings_of(tmp_path, data_options={"class_map": n}), "train"),
            "may run code",
        )
    given = {} if kind == "folders" else {"cache_tarinfo": True}
    source = open_split(settings_of(tmp_path, data_options=given), "train")
    assert source is not None
    assert len(source) == 12


def test_a_report_is_data(tmp_path: Path) -> None:
    _bare(tmp_path / "signal.json")
    refused(lambda: SignalReport.from_json(tmp_path / "signal.json"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_batch_of_cifar(name: str, tmp_path: Path) -> None:
    _bare(tmp_path / "batch")
    refused(lambda: cifar._read_python(name, tmp_path / "batch", False), "refuses to load")


def test_timm_refuses_them_for_our_models_too(tmp_path: Path) -> None:
    _zipped(tmp_path / "w.pth")
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):
        timm.create_model("nfnets_bn_resnet8_cifar", checkpoint_path=str(tmp_path / "w.pth"))
    where = {"file": str(tmp_path / "w.pth")}
    with pytest.raises((RuntimeError, pickle.UnpicklingError)):
        timm.create_model("nfnets_bn_resnet8_cifar", pretrained=True, pretrained_cfg_overlay=where)


def test_every_loader_in_the_package_is_a_known_one() -> None:
    """A new `torch.load`, `pickle` or YAML loader has to come here first."""
    suspicious = re.compile(
        r"\b(torch\.load|pickle\.loads?|pickle\.Unpickler|yaml\.\w*load\w*|_Loader|yaml\.\w*Loader|np\.load|joblib\.load|marshal\.loads?"
        r"|shelve\.open|torch\.jit\.load|torch\.package|hub\.load|eval|exec|literal_eval)\("
    )
    found = {}
    for name, file in MODULES.items():
        for line in file.read_text().splitlines():
            if suspicious.search(line) and ".eval(" not in line and "``" not in line:
                found.setdefault(name, []).append(line.strip())
    assert all(
        "weights_only=True" in line for lines in found.values() for line in lines if "torch.load" in line
    )
    assert {(name, suspicious.search(line).group(1)) for name, lines in found.items() for line in lines} == {  # type: ignore[union-attr]
        ("nfnets.state_dicts", "torch.load"),
        ("nfnets.train.loop.checkpoint", "torch.load"),
        ("nfnets.plain", "_Loader"),
    }
    assert "class _Loader(yaml.SafeLoader)" in (ROOT / "nfnets" / "plain.py").read_text()
    assert "class _ArraysOnly(pickle.Unpickler)" in (ROOT / "train" / "data" / "cifar.py").read_text()
