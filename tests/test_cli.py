"""The commands as a user meets them: what they print, what they leave, and one line for every mistake."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from nfnets import cli
from nfnets.hub import from_pretrained
from nfnets.train import saved_models
from nfnets.train.compare import cost

TINY = ["--model", "bn_resnet8_cifar", "--train-limit", "200", "--epochs", "1", "--set", "threads=1"]
USERS_MODULE = """
from torch import nn

def head(num_classes):
    return [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)]

def small(num_classes):
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), *head(num_classes))

def no_norm(num_classes):
    return nn.Sequential(nn.Conv2d(1, 8, 3), *head(num_classes))

def exploding(num_classes):
    class Scale(nn.Module):
        def forward(self, x):
            return x * 1e30
    return nn.Sequential(Scale(), Scale(), small(num_classes))
"""

Run = Callable[..., tuple[int, str, str]]
COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call the console script's function in a fresh folder; gives exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users.py").write_text(USERS_MODULE)
    monkeypatch.delitem(sys.modules, "users", raising=False)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nfnets", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def refused(result: tuple[int, str, str], *words: str) -> None:
    code, _, err = result
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


# -- help -------------------------------------------------------------------------------------------------------


def test_help_names_every_command_without_waiting_for_torch() -> None:
    script = """
import sys
from nfnets.cli import main
sys.argv = ["nfnets", "--help"]
try:
    main()
finally:
    print("torch" in sys.modules, "pydantic" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
    for command in ("demo", "convert", "plan", "profile", "check", "train", "compare", "models"):
        assert re.search(rf"^│ {command} ", done.stdout, re.M)


def test_every_option_is_explained() -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    for name, command in group.commands.items():
        assert command.help
        for parameter in command.params:
            assert len(getattr(parameter, "help", None) or "") > 10, (
                f"nfnets {name}: {parameter.name} has no help"
            )


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_shows_an_example_that_parses(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    (example,) = re.findall(rf"Example: nfnets {command}(.*)", out)
    parsed = COMMANDS[command].make_context(command, shlex.split(example))
    assert "model" not in parsed.params or parsed.params["model"]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_reads_well(run: Run, command: str) -> None:
    """Flags without a value, values that say what they are, sentences that do not break before the edge."""
    _, out, _ = run(command, "--help")
    assert re.search(r"--help +-h +Show this", out)
    assert not re.search(r"<(bool|int|float|path|list)| range>?\W*\[", out)
    for parameter in COMMANDS[command].params:
        if getattr(parameter, "is_flag", False):
            assert re.search(rf"{parameter.opts[0]} +[A-Z][a-z]", out), f"{parameter.name} shows a value"
    for paragraph in re.split(r"\n\s*\n", out[: out.index("─ Options")])[2:-1]:
        *full, _ = [line.rstrip() for line in paragraph.splitlines()]
        assert all(len(line) > 90 for line in full), paragraph


@pytest.mark.parametrize("command", ["plan", "convert", "profile", "check", "train"])
def test_help_names_every_method(run: Run, command: str) -> None:
    from nfnets.convert import list_methods

    shipped = {name for name, method in list_methods().items() if method.__module__.startswith("nfnets.")}
    words = re.findall(r"\w+", run(command, "--help")[1])
    assert shipped <= set(words)


def test_help_names_every_rule(run: Run) -> None:
    from nfnets.signal.rules import RULES

    assert set(RULES) <= set(re.findall(r"[\w-]+", run("check", "--help")[1]))


def test_models(run: Run) -> None:
    code, out, _ = run("models", "bn_resnet*_cifar")
    assert code == 0
    assert "bn_resnet20_cifar" in out.split()
    assert "torchvision:resnet18" in run("models", "torchvision:resnet1*")[1].split()
    assert "timm:resnet18" in run("models", "timm:resnet1*")[1].split()


# -- look, convert ----------------------------------------------------------------------------------------------


def test_plan_prints_a_row_per_norm_layer(run: Run) -> None:
    from nfnets import create_model

    code, out, _ = run("plan", "--model", "bn_resnet20_cifar")
    assert code == 0
    norms = [
        n for n, m in create_model("bn_resnet20_cifar").named_modules() if isinstance(m, torch.nn.BatchNorm2d)
    ]
    assert len(norms) == 21
    for name in norms:
        assert re.search(rf"^\s*{re.escape(name)}\s", out, re.M)


def test_plan_and_check_take_a_users_own_model(run: Run) -> None:
    code, out, _ = run("plan", "--model", "users:small", "--input", "1x8x8")
    assert code == 0
    assert "1 norm layer, 1 to replace" in out


def test_profile_writes_what_it_is_asked_for(run: Run, tmp_path: Path) -> None:
    code, out, _ = run(
        "profile",
        "-m",
        "bn_resnet8_cifar",
        "--method",
        "nf",
        *["--html", "s.html", "--json", "s.json", "--png", "s.png"],
    )
    assert code == 0
    assert {p["model"] for p in json.loads((tmp_path / "s.json").read_text())["points"]} == {
        "bn_resnet8_cifar",
        "bn_resnet8_cifar nf",
    }
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote s.html" in out


def test_check_says_by_its_exit_code(run: Run) -> None:
    assert run("check", "--model", "bn_resnet8_cifar")[0] == 0
    code, out, _ = run("check", "--model", "users:exploding", "--input", "1x8x8")
    assert code == 1
    assert "remedy" in out


def test_convert_writes_a_model_that_can_be_rebuilt(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("convert", "-m", "bn_resnet8_cifar", "--method", "nf", "-o", "alpha=0.25", "--check")
    assert code == 0
    assert "pass  batch independence" in out
    made = json.loads((tmp_path / "nf.json").read_text())
    assert (made["model"], made["method"], made["options"]) == ("bn_resnet8_cifar", "nf", {"alpha": 0.25})
    (call,) = re.findall(r"rebuild it: nfnets\.hub\.from_pretrained\('(.*)'\)", out)
    model = from_pretrained(call)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    from safetensors.torch import load_file

    for name, tensor in load_file(tmp_path / "nf.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_convert_says_how_a_users_own_model_is_rebuilt(run: Run) -> None:
    code, out, _ = run("convert", "-m", "users:small", "--input", "1x8x8", "--classes", "3")
    assert code == 0
    assert "from_pretrained('nf.safetensors', original=users.small(...))" in out
    users = importlib.import_module("users")
    from_pretrained("nf.safetensors", original=users.small(3))


def test_convert_takes_trained_weights(run: Run, tmp_path: Path) -> None:
    from nfnets import create_model

    trained = create_model("bn_resnet8_cifar")
    with torch.no_grad():
        for module in trained.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    torch.save(trained.state_dict(), tmp_path / "bn.pt")
    command = [
        "convert",
        "-m",
        "bn_resnet8_cifar",
        "--method",
        "fold",
        "--weights",
        "bn.pt",
        "--check",
        "--out",
        "fold.safetensors",
    ]
    code, out, err = run(*command)
    assert code == 0, err
    assert "pass  same function" in out
    images = torch.randn(4, 3, 32, 32)
    folded = saved_models.load(tmp_path / "fold.safetensors").eval()
    with torch.no_grad():
        torch.testing.assert_close(folded(images), trained.eval()(images), rtol=1e-4, atol=1e-4)


# -- train, compare ---------------------------------------------------------------------------------------------


def test_train(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("train", *TINY, "--method", "nf", "--out", "r")
    assert code == 0
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert f"test accuracy {100 * result['test_accuracy']:.2f} %" in out
    assert result["config"]["clipping"] is not None, "auto is the recipe's"


def test_compare_from_nothing_to_a_page(run: Run, tmp_path: Path) -> None:
    command = ["compare", *TINY, "--seeds", "2", "--lrs", "0.1", "--out", "r", "--jobs", "2"]
    code, out, _ = run(*command, "--dry-run")
    assert code == 0
    assert "4 of 4 runs to do" in out
    assert not (tmp_path / "r").exists()
    code, out, err = run(*command)
    assert code == 0, err
    assert re.search(r"nf at batch size 64: .*(below|above|inconclusive)", out)
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert results["complete"]
    assert results["command"].startswith("nfnets compare --model bn_resnet8_cifar")
    for name in ("index.html", "signal.html", "curves.png", "accuracy.png", "signal.png"):
        assert (tmp_path / "r" / name).stat().st_size > 5000, name
    page = (tmp_path / "r" / "index.html").read_text()
    check_page(page, results)
    shutil.copy(tmp_path / "r" / "experiment.json", tmp_path / "e.yaml")
    code, out, _ = run("compare", "--file", "e.yaml", "--out", "r", "--dry-run")
    assert code == 0
    assert "0 of 4 runs to do" in out
    code, out, _ = run("compare", "--resume", "--out", "r")
    assert code == 0
    assert out.count("finished before") == 4
    refused(run(*command, "--epochs", "2"), "r holds another experiment", "epochs was 1, now 2")


def check_page(page: str, results: dict) -> None:
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.findall(
        r"<(?:script|img|link|iframe|source|video)[^>]*(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page
    )
    assert not re.findall(r"url\(\s*[\"']?(?:https?:)?//|@import", outside)
    # Without JavaScript: the verdict, the table with every arm, the plan with every norm layer, every setting.
    text = re.sub(r"<[^>]+>", " ", outside)
    assert "nf at batch size 64" in text
    assert "layer3.0.bn2" in text
    assert "label_smoothing" in text
    assert results["command"] in text
    assert page.count("DecompressionStream") == 1
    assert len(page) < 4_000_000


def test_a_diverging_run_is_recorded_and_the_others_go_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "measure_all", lambda config, out: [])  # clocks are not what is looked at here
    command = [
        "compare",
        *TINY,
        "--seeds",
        "1",
        "--arms",
        "bn,nf:clipping=1000",
        "--lrs",
        "1e12",
        "--jobs",
        "1",
    ]
    code, out, _ = run(*command, "--out", "r", "--set", "warmup_epochs=0")
    assert code == 3  # none of nf ended: there is nothing to compare
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    status = {r["arm"]: r["status"] for r in results["runs"]}
    assert status["nf:clipping=1000"] == "diverged"
    assert len(status) == 2
    assert "diverged at step" in out


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = ["train", *TINY, "--epochs", "500", "--out", "r"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from nfnets.cli import main; main()", *command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 300
    log = tmp_path / "r" / "log.jsonl"
    while (
        not (log.exists() and log.stat().st_size) and time.monotonic() < deadline and process.poll() is None
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "the state is saved in r. Go on with: the same command" in err
    assert (tmp_path / "r" / "checkpoint.pt").exists()


# -- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan -m timm:resnet19", ["'resnet19'", "resnet18"]),
        ("plan -m torchvision:resnet19", ["'resnet19'", "resnet18"]),
        ("plan -m bn_resnet21_cifar", ["bn_resnet20_cifar"]),
        ("plan -m nowhere.to.be:found", ["cannot import"]),
        ("plan -m users:smal --input 1x8x8", ["did you mean small"]),
        ("plan -m bn_resnet8_cifar --method nff", ["unknown method 'nff'", "did you mean nf"]),
        ("plan -m bn_resnet8_cifar -o alfa=1", ["alfa", "alpha"]),
        ("plan -m bn_resnet8_cifar -o alpha", ["expected NAME=VALUE"]),
        ("plan -m bn_resnet8_cifar -o alpha=7", ["alpha=7", "at most 1"]),
        ("plan -m users:no_norm --input 1x8x8", ["no BatchNorm layer"]),
        ("plan -m users:small --input 3x8x8", ["1 channels"]),
        ("plan -m users:small --input 224", ["forward fails on inputs (4, 224)"]),
        ("plan -m users:small --input 3x8x", ["'3x8x'", "3x224x224"]),
        ("plan -m users:small --input 3x0x8", ["'3x0x8'"]),
        ("plan -m users:small --input 1x8x8 --input 2=8", ["'2=8'", "NAME=SHAPE"]),
        ("plan -m users:small --input a=8 --input a=8", ["input a: given 2 times"]),
        ("plan -m users:small --input 1x8x8 --input mask=8", ["mask"]),
        ("plan -m users:small --input batch.=8", ["'batch.=8'", "NAME.KEY=SHAPE"]),
        ("plan -m users:small --input batch=8 --input batch.image=8", ["batch.image", "a tensor and a dict"]),
        ("plan -m users:small --input 1x100000x100000", ["268,435,456 numbers"]),
        ("plan -m users:small --input 1x8x8 --data digits", ["pass one of both"]),
        ("convert -m bn_resnet8_cifar --out nf.pt", [".safetensors"]),
        ("convert -m bn_resnet8_cifar --out users.py/nf.safetensors", ["cannot write"]),
        ("convert -m bn_resnet8_cifar --weights nothing.pt", ["no such file"]),
        ("convert -m bn_resnet8_cifar --weights users.py", ["users.py"]),
        ("profile -m bn_resnet8_cifar --html users.py/s.html", ["users.py"]),
        ("profile -m bn_resnet8_cifar --png s.nonsense", ["s.nonsense"]),
        ("check -m bn_resnet8_cifar --rule nonsense", ["nonsense"]),
        ("train --data mnits", ["data='mnits'"]),
        ("train --epochs 0", ["epochs=0"]),
        ("train --set label_smoothin=1", ["did you mean label_smoothing"]),
        ("train --clipping tight", ["'tight'"]),
        ("train --data fashion-mnist --data-dir .", ["."]),
        ("train --model bn_resnet8_cifar --out users.py/r", ["users.py"]),
        ("compare --data cifar10 --data-dir .", ["cifar"]),
        ("compare --arms bn,nff --model bn_resnet8_cifar --out r", ["unknown method 'nff'"]),
        ("compare --arms bn,bn", ["each one once"]),
        ("compare --arms bn,nf:clipping", ["method:field=value"]),
        ("compare --seeds 0", ["seeds '0'"]),
        ("compare --seeds x", ["seeds 'x'"]),
        ("compare --lrs 0.1,fast", ["lrs '0.1,fast'"]),
        ("compare --lrs -0.1", ["-0.1"]),
        ("compare --batch-size 100000 --model bn_resnet8_cifar --out r", ["100000", "1294"]),
        ("compare --model bn_resnet8_cifar --out users.py/r", ["cannot write to users.py/r"]),
        ("compare --resume --out nothing", ["no experiment"]),
        ("compare --file nothing.yaml", ["nothing.yaml: no experiment there"]),
        ("compare --file users.py", ["users.py"]),
        ("models nonsense*", ["no model matches"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: Run, tmp_path: Path, command: str, words: list[str]
) -> None:
    before = {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".pyc"
    }
    refused(run(*command.split()), *words)
    after = {path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert after == set(before), "nothing is left behind"


def test_a_truncated_data_file(run: Run, tmp_path: Path) -> None:
    import gzip

    for part, count in (("train", 60000), ("t10k", 10000)):
        head = (2051).to_bytes(4, "big") + count.to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + bytes(1000)))
        head = (2049).to_bytes(4, "big") + count.to_bytes(4, "big")
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + bytes(count)))
    refused(
        run("compare", "--data", "fashion-mnist", "--data-dir", ".", "--out", "r"), "train-images-idx3-ubyte"
    )
    assert not (tmp_path / "r").exists()
