"""`plan`, `convert` and `check` with what users bring: builders, weights, inputs of any shape, files in the way."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import test_cli
import torch
from safetensors.torch import save_file, save_model
from test_cli import Run, refused
from torch import Tensor, nn

import nfnets
from nfnets.errors import UserError
from nfnets.hub import from_pretrained
from nfnets.state_dicts import differences, load_state
from nfnets.train import saved_models
from nfnets.train.inputs import Inputs, described
from nfnets.train.models import build

run = test_cli.run  # the fixture
OWN_MODULE = """
import torch
from torch import nn

def image(num_classes=10, width=8):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3),
                         nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

def fixed():
    return image(10)

def open_ended(**options):
    return image(options.get("num_classes", 10))

def sound(in_chans, size=0):
    assert size == 1600
    return nn.Sequential(nn.Conv1d(in_chans, 8, 9), nn.BatchNorm1d(8), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())

def volume(in_chans=1):
    return nn.Sequential(nn.Conv3d(in_chans, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = image(), nn.Linear(14, 2)

    def forward(self, picture, features, *, scale=None):
        out = self.head(torch.cat([self.body(picture), features], 1))
        return out if scale is None else out * scale

class Batch(Two):
    def forward(self, batch):
        return {"logits": super().forward(batch["picture"], batch["rest"]["features"])}

def key_error():
    raise KeyError("width")

def silent():
    raise StopIteration

class Broken(Exception):
    pass

def strange():
    raise Broken("first line\\nsecond line")
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own.py").write_text(OWN_MODULE)
    (tmp_path / "faulty.py").write_text("undefined_name\n")
    monkeypatch.delitem(sys.modules, "own", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("own")


# -- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["1", '["1"]', "[1]", '"1"'])
def test_a_pattern_that_is_a_number(run: Run, pattern: str) -> None:
    code, out, err = run("plan", "-m", "own:image", "--input", "1x8x8", "-o", f"include={pattern}")
    assert code == 0, err
    assert "2 norm layers, 1 to replace, 1 to leave" in out


@pytest.mark.parametrize("command", ["plan", "convert", "train"])
@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("method=fold", "'method'"),
        ("model=f", "'model'"),
        ("kwargs={}", "'kwargs'"),
        ("inplace=true", "'inplace'"),
        ("include=[null]", "include=[None]"),
        ("exclude=5", "'5'"),
    ],
)
def test_options_that_are_no_methods(run: Run, command: str, option: str, words: str) -> None:
    refused(run(command, "-m", "bn_resnet8_cifar", "-o", option), words)


def test_patterns_in_a_recipe_are_text() -> None:
    with pytest.raises(UserError, match="include=1: expected"):
        saved_models.rebuild(
            saved_models.Recipe("bn_resnet8_cifar", "nf", {"include": 1}, num_classes=2, size=8)
        )


def test_a_plan_takes_the_options_of_convert(run: Run) -> None:
    given = ["-m", "own:image", "--input", "1x8x8", "--method", "fixup", "-o", "strict=false"]
    code, out, err = run("plan", *given)
    assert code == 0, err
    assert "2 to refuse" in out
    assert run("convert", *given)[0] == 0


# -- builders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("builder", "words"),
    [
        ("key_error", "own:key_error: could not be built with no arguments: KeyError: 'width'"),
        ("silent", "own:silent: could not be built with no arguments: StopIteration"),
        ("strange", "own:strange: could not be built with no arguments: Broken: first line"),
    ],
)
def test_a_builder_that_fails(run: Run, builder: str, words: str) -> None:
    refused(run("plan", "-m", f"own:{builder}"), words)


def test_a_module_that_fails(run: Run) -> None:
    refused(run("plan", "-m", "faulty:build"), "cannot import faulty (NameError: name 'undefined_name'")


@pytest.mark.parametrize("builder", ["image", "fixed", "open_ended"])
def test_a_builders_own_number_of_outputs(run: Run, own: Any, builder: str, tmp_path: Path) -> None:
    torch.save(own.image().state_dict(), tmp_path / "w.pt")
    command = ["convert", "-m", f"own:{builder}", "--input", "1x8x8", "--weights", "w.pt"]
    code, _, err = run(*command)
    assert code == 0, err
    assert json.loads((tmp_path / "nf.json").read_text())["num_classes"] is None
    assert from_pretrained("nf.safetensors", original=own.image())[-1].out_features == 10


def test_a_number_of_outputs_that_is_asked_for(run: Run, tmp_path: Path) -> None:
    command = ["convert", "--input", "1x8x8", "--classes", "3", "-m"]
    for builder in ("image", "open_ended"):
        assert run(*command, f"own:{builder}")[0] == 0
        assert json.loads((tmp_path / "nf.json").read_text())["num_classes"] == 3
    refused(run(*command, "own:fixed"), "own:fixed has no argument num_classes")


# -- weights ----------------------------------------------------------------------------------------------------


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


class Wrapped(nn.Module):
    """Its own names begin with "module."."""

    def __init__(self) -> None:
        super().__init__()
        self.module = small()


def without_counters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (lambda state: state, []),
        (without_counters, []),
        (lambda state: {"state_dict": state, "epoch": 3}, ["entry 'state_dict'"]),
        (lambda state: {"model": state, "optimizer": {"lr": 1}}, ["entry 'model'"]),
        (lambda state: {"module." + name: tensor for name, tensor in state.items()}, ["'module.' off"]),
        (
            lambda state: {"model": {"module._orig_mod." + n: t for n, t in without_counters(state).items()}},
            ["entry 'model'", "'module.' off", "'_orig_mod.' off"],
        ),
    ],
)
def test_forms_of_a_state_dict(saved: Any, said: list[str], tmp_path: Path) -> None:
    source, target = small(), small()
    for module in (source[1], target[1]):
        module.weight.data.normal_()
    torch.save(saved(dict(source.state_dict())), tmp_path / "w.pt")
    lines = load_state(target, tmp_path / "w.pt")
    assert len(lines) == len(said)
    assert all(words in line for words, line in zip(said, lines, strict=True))
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name


def test_a_prefix_that_is_the_models_own(tmp_path: Path) -> None:
    source, target = Wrapped(), Wrapped()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    assert load_state(target, tmp_path / "w.pt") == []
    assert torch.equal(target.module[0].weight, source.module[0].weight)


def test_half_a_prefix_is_none(tmp_path: Path) -> None:
    state = {"module.0.weight": torch.zeros(2, 1, 3, 3), "0.bias": torch.zeros(2)}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"unknown .*module\.0\.weight"):
        load_state(small(), tmp_path / "w.safetensors")


def _recursive() -> dict[str, Any]:
    found: dict[str, Any] = {"epoch": 1}
    found["model"] = found
    return found


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ({1: torch.zeros(2)}, "its key 1 is no name"),
        ({"state_dict": None}, "its entry 'state_dict' is a NoneType, no tensor"),
        ({"state_dict": {"0.weight": 3}}, "its entry '0.weight' is a int, no tensor"),
        ({"0.weight": "text"}, "its entry '0.weight' is a str, no tensor"),
        ({"model": {}}, "it holds an empty dict, no state_dict"),
        ([1, 2], "it holds a list, no state_dict"),
        (_recursive(), "its entry 'epoch' is a int"),
        (small(), "can be loaded safely"),
        (b"garbage", "can be loaded safely"),
    ],
)
def test_what_is_no_state_dict(run: Run, saved: Any, words: str, tmp_path: Path) -> None:
    if isinstance(saved, bytes):
        (tmp_path / "w.pt").write_bytes(saved)
    else:
        torch.save(saved, tmp_path / "w.pt")
    found = run("convert", "-m", "own:image", "--input", "1x8x8", "--weights", "w.pt")
    refused(found, "w.pt: not readable as weights", words, "save model.state_dict() with torch.save")
    assert "\x1b" not in found[2]
    assert "weights_only" not in found[2]


def test_differences_are_named() -> None:
    own = {f"{i}.weight": torch.zeros(2, 3) for i in range(9)}
    given = {"0.weight": torch.zeros(3, 2), "1.weight": torch.zeros(()), "other": torch.zeros(1)}
    assert differences(own, own) == ""
    assert differences(own, given) == (
        "missing 2.weight, 3.weight, 4.weight, 5.weight and 3 more; unknown other; "
        "0.weight is 3x2, expected 2x3, 1.weight is one number, expected 2x3"
    )


def test_nan_in_the_weights_passes_no_check(run: Run, own: Any, tmp_path: Path) -> None:
    model = own.image()
    nn.init.constant_(model[7].weight, float("nan"))
    torch.save(model.state_dict(), tmp_path / "nan.pt")
    command = ["convert", "-m", "own:image", "--input", "1x8x8", "--weights", "nan.pt", "--method", "fold"]
    code, out, _ = run(*command, "--check")
    assert code in (1, 2)
    assert "pass" not in out
    lines: list[str] = []
    inputs = Inputs((torch.randn(4, 1, 8, 8),), {})
    assert not saved_models.verify(model, model, inputs, "fold", lines.append)
    assert all(line.startswith("FAIL") and "not finite" in line for line in lines)


def test_what_was_done_to_the_weights_is_said(run: Run, own: Any, tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in own.image().state_dict().items()}
    torch.save({"model": state}, tmp_path / "w.pt")
    code, out, err = run("convert", "-m", "own:image", "--input", "1x8x8", "--weights", "w.pt")
    assert code == 0, err
    assert out.startswith(
        "w.pt: took its entry 'model'\nw.pt: took 'module.' off its names\nwrote nf.safetensors"
    )


def test_an_original_that_does_not_fit_is_compared(run: Run, own: Any) -> None:
    assert run("convert", "-m", "own:image", "--input", "1x8x8")[0] == 0
    with pytest.raises(
        UserError, match=r"gives another model .*the original.*: 7.weight is 10x8, expected 3x8"
    ) as e:
        from_pretrained("nf.safetensors", original=own.image(3))
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match=r"0.weight is 8x1x3x3, expected 4x1x3x3"):
        from_pretrained("nf.safetensors", original=own.image(10, 4))


# -- files ------------------------------------------------------------------------------------------------------


def test_both_files_or_none(run: Run, tmp_path: Path) -> None:
    command = ["convert", "-m", "bn_resnet8_cifar", "--input", "3x8x8", "--out", "j.safetensors"]
    (tmp_path / "j.json").mkdir()
    before = sorted(tmp_path.iterdir())
    refused(run(*command), "j.json", "folder")
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "j.json").rmdir()
    assert run(*command)[0] == 0
    assert run(*command, "--seed", "1")[0] == 0, "its own files are written anew"
    assert json.loads((tmp_path / "j.json").read_text())["seed"] == 1
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("name", ["j.json", "j.safetensors"])
def test_files_of_others_stay(run: Run, name: str, tmp_path: Path) -> None:
    save_file({"trained": torch.zeros(3)}, tmp_path / "j.safetensors")
    (tmp_path / "j.json").write_text('{"mine": 1}')
    for other in {"j.json", "j.safetensors"} - {name}:
        (tmp_path / other).unlink()
    before = (tmp_path / name).read_bytes()
    refused(
        run("convert", "-m", "bn_resnet8_cifar", "--input", "3x8x8", "--out", "j.safetensors"),
        f"{name}: it exists and is not a converted model's",
    )
    assert (tmp_path / name).read_bytes() == before
    assert len(list(tmp_path.glob("j.*"))) == 1


def test_a_write_that_fails_late_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(
        run("convert", "-m", "bn_resnet8_cifar", "--input", "3x8x8"), "cannot be written", "No space left"
    )
    assert not list(tmp_path.glob("nf.*"))


# -- inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "inputs", "size"),
    [
        ("own:sound", ["1x1600"], 1600),
        ("own:volume", ["2x4x8x8"], None),
        ("own:image", ["1x12x20"], None),
        ("own:Two", ["1x8x8", "4"], 8),
        ("own:Two", ["picture=1x8x8", "features=4", "scale=1"], 8),
        ("own:Two", ["1x8x8", "scale=2", "features=4"], 8),
        ("own:Batch", ["batch.picture=1x8x8", "batch.rest.features=4"], 8),
        ("timm:test_resnet", ["3x32x48"], None),
    ],
)
def test_inputs_of_every_shape(
    run: Run, own: Any, model: str, inputs: list[str], size: int | None, tmp_path: Path
) -> None:
    given = ["-m", model, *[word for text in inputs for word in ("--input", text)]]
    code, out, err = run("convert", *given, "--check")
    assert code == 0, out + err
    assert "pass  batch independence" in out
    assert run("plan", *given, "--method", "fold")[0] == 0
    assert run("check", *given, "--method", "nf")[0] in (0, 1)  # judged, whatever the verdict
    made = saved_models.read_recipe(tmp_path / "nf.safetensors")
    assert (made.inputs, made.size) == (inputs, size)
    shape = described(inputs)[0].shape
    original = None
    if not made.registered:
        original = build(model, num_classes=None, channels=shape[0], size=size)
    again = from_pretrained("nf.safetensors", original=original)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in again.modules())
    shutil.copy(tmp_path / "nf.json", tmp_path / "config.json")
    shutil.copy(tmp_path / "nf.safetensors", tmp_path / "model.safetensors")
    from_pretrained(tmp_path, original=original)


def test_square_images_need_no_inputs_in_the_recipe(run: Run, tmp_path: Path) -> None:
    assert run("convert", "-m", "bn_resnet8_cifar", "--input", "3x16X16")[0] == 0
    made = saved_models.read_recipe(tmp_path / "nf.safetensors")
    assert (made.inputs, made.channels, made.size) == ([], 3, 16)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        ("own:Two", ["1x8x8", "features=4", "scale=1"]),
        ("own:Batch", ["batch.picture=1x8x8", "batch.rest.features=4"]),
    ],
)
def test_profile_takes_keyword_inputs(run: Run, tmp_path: Path, model: str, inputs: list[str]) -> None:
    given = ["-m", model, *[word for text in inputs for word in ("--input", text)]]
    code, _, err = run("profile", *given, "--method", "nf", "--json", "s.json")
    assert code == 0, err
    points = json.loads((tmp_path / "s.json").read_text())["points"]
    assert {(model, "body.1"), (f"{model} nf", "body.3")} <= {(p["model"], p["name"]) for p in points}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": ["1x"]}, "input '1x'"),
        ({"inputs": ["1x99999999x99999999"]}, "268,435,456 numbers"),
        ({"inputs": ["3x8x8", "evil=1"]}, "evil"),
        ({"inputs": ["1"] * 17}, "inputs"),
        ({"inputs": "3x8x8"}, "inputs"),
        ({"size": None}, "neither size nor inputs"),
        ({"size": 99_999_999}, "268,435,456 numbers"),
    ],
)
def test_inputs_that_a_stranger_wrote(changes: dict[str, Any], words: str) -> None:
    text = json.dumps({"model": "bn_resnet8_cifar", "num_classes": 2, "size": 8} | changes)
    with pytest.raises(UserError, match=words):
        saved_models.rebuild(saved_models.parse_recipe(text, "config.json"))


def test_tied_tensors_may_be_saved_once(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        return net

    source, target = tied(), tied()
    save_model(source, str(tmp_path / "w.safetensors"))
    assert load_state(target, tmp_path / "w.safetensors") == []
    assert torch.equal(target[0].weight, source[0].weight)
    assert target[0].weight is target[1].weight
    with pytest.raises(
        UserError, match=r"missing 1\.weight|missing 0\.weight"
    ):  # of two layers that are not tied
        load_state(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), tmp_path / "w.safetensors")


def test_the_batch_size_reaches_the_rebuilt_model(run: Run, tmp_path: Path) -> None:
    given = ["-m", "bn_resnet8_cifar", "--input", "3x16x16", "--batch-size", "4"]
    code, _, err = run("convert", *given)
    assert (code, err) == (0, "")
    found = nfnets.recipe(from_pretrained("nf.safetensors"))
    assert (found["method"], found["batch_size"]) == ("nf", 4)
    assert "channelwise=False" in run("plan", *given)[1]
    refused(run("convert", *given[:-1], "0"), "--batch-size")
    refused(run("convert", *given[:-2], "-o", "batch_size=4"), "option 'batch_size' is not a method's")
