"""Whatever stands in a command: exit code 2, one line that says what is wrong, and every file as it was."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from nfnets import cli

DIGITS, DEEP = "1" * 5000, "[" * 3000 + "]" * 3000
USERS = """
from torch import nn

def net(num_classes):
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, num_classes))

def raising(num_classes):
    return {}["width"]

class Forward(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.net = net(num_classes)

    def forward(self, x):
        y = self.net(x)
        raise KeyError("mask")

def named(num_classes):
    found = nn.Sequential(nn.Conv2d(1, 4, 3))
    found.add_module("[v1]", nn.BatchNorm2d(4))
    return found
"""
ARMS = "\narms: [{name: bn, method: bn}]"
ALIASES = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join(9 * [f'*a{i - 1}'])}]\n" for i in range(1, 10)
)
FILES = {
    "users.py": USERS,
    "broken.py": "def net(:\n    pass\n",
    "imports.py": "\n\nimport nowhere_at_all\n",
    "keys.yaml": "1: 2" + ARMS,
    "inner-keys.yaml": "run: {model_options: {1: 2}}" + ARMS,
    "date.yaml": "run: {epochs: 2024-02-31}" + ARMS,
    "no-date.yaml": "run: {epochs: 2024-02-21}" + ARMS,
    "digits.yaml": f"seeds: [{DIGITS}]" + ARMS,
    "deep.yaml": f"arms: {DEEP}",
    "deep.json": f'{{"arms": {DEEP}}}',
    "aliases.yaml": ALIASES + "arms: *a9\n",
    "merged.yaml": "a: &a {x: 1}\n"
    + "".join(
        f"{b}: &{b} {{<<: [{','.join(9 * [f'*{a}'])}]}}\n" for a, b in itertools.pairwise("abcdefghij")
    ),
    "cycle.yaml": "run: &r {model_options: *r}" + ARMS,
    "nan.yaml": "run: {model_options: {a: .nan}}" + ARMS,
    "bytes.yaml": "run: {model_options: {a: !!binary aGk=}}" + ARMS,
    "set.yaml": "run: {model_options: !!set {a, b}}" + ARMS,
    "zero.yaml": 'run: {init_from: "a\\0b"}' + ARMS,
    "method.yaml": "arms: [{name: bn, method: [1]}]",
    "optimizer.yaml": "arms: [{name: fold, method: fold, optimizer: {a: 1}}]",
    "null.yaml": "run: null" + ARMS,
    "text.yaml": "arms: bn,nf",
    "options.yaml": "run: {model_options: 5}" + ARMS,
    "empty.yaml": "",
}
A_RUN = ["train", "--model", "users:net", "--out", "r"]
COMPARE, PLAN = ["compare", "--model", "bn_resnet8_cifar"], ["plan", "-m", "bn_resnet8_cifar"]

COMMANDS: list[tuple[list[str], str]] = [
    # numbers that recipes would compute with
    *[([*A_RUN, "--batch-size", size, "--method", m], "batch_size") for size in ("0", "-4") for m in ("nf", "fold")],
    ([*A_RUN, "--set", "batch_size=true"], "batch_size=true"),
    ([*A_RUN, "--set", "batch_size=" + "1" * 4000, "--method", "fold"], "batch_size"),
    ([*A_RUN, "--recipe", "nfnet", "--epochs", "-1"], "epochs=-1"),
    ([*A_RUN, "--batch-size", DIGITS], "--batch-size"),
    ([*A_RUN, "--set", f"lr={DIGITS}"], "lr="),
    ([*A_RUN, "--lr", "nan"], "lr=nan"),
    ([*A_RUN, "--seed", "9" * 23], "--seed"),
    # values that are none
    ([*A_RUN, "--set", f"model_options={DEEP}"], "in one another"),
    ([*A_RUN, "--set", 'model_options={"a": NaN}'], "finite"),
    ([*A_RUN, "--set", "method=[1]"], "method"),
    ([*A_RUN, "--set", "optimizer=[1]", "--method", "fold"], "optimizer"),
    ([*A_RUN, "--set", 'init_from="a\\u0000b"'], "zero byte"),
    ([*A_RUN, "--set", "momentum=0"], "set nesterov to false"),
    ([*A_RUN, "--data", "imagefolder"], "--data-dir"),
    (["train", "--out", "x" * 300], "too long"),
    # arms
    *[([*COMPARE, "--arms", arms], "expected a method") for arms in ("", " ", ",", "bn,,nf", "bn,")],
    ([*COMPARE, "--arms", f"bn,nf:alpha={DEEP}"], "in one another"),
    ([*COMPARE, "--arms", "bn,nf:method=[1]"], "method"),
    ([*COMPARE, "--arms", "bn,nf:recipe=[1]"], "recipe=[1]"),
    ([*COMPARE, "--arms", "bn,nf:[/a]=1"], "[/a]"),
    ([*COMPARE, "--arms", "bn,[/a]"], "[/a]"),
    ([*COMPARE, "--arms", "bn," + "x" * 2000], "1000 characters"),
    # lists of numbers
    ([*COMPARE, "--seeds", DIGITS], "seeds"),
    ([*COMPARE, "--seeds", "99999999999"], "42,"),
    ([*COMPARE, "--seeds", "5,,6"], "seeds"),
    ([*COMPARE, "--batch-size", "0"], "batch_sizes"),
    ([*COMPARE, "--lrs", "1e400"], "inf"),
    ([*COMPARE, "--set", f"model_options={DEEP}"], "in one another"),
    # files
    *[([*COMPARE, "--file", name], name) for name in FILES if name.endswith((".yaml", ".json"))],
    ([*COMPARE, "--file", "x" * 300], "no experiment"),
    # what a shell says, not what Python would
    (["plan", "-m", "users:Forward", "--input", "1x8x8"], "by --input (users.py, line 17)"),
    (["plan", "-m", "users:raising", "--input", "1x8x8"], "KeyError: 'width' (users.py, line 8)"),
    (["plan", "-m", "broken:net"], "broken.py, line 1"),
    (["plan", "-m", "imports:net"], "(imports.py, line 3)"),
    (["plan", "-m", "users"], "did you mean users:net"),
    (["plan", "-m", ":"], "no name of a module"),
    ([*PLAN, "--data", "digits", "--method", "fixup", "--input", "["], "["),
    # paths and options
    ([*PLAN, "-o", f"alpha={DEEP}"], "in one another"),
    ([*PLAN, "-o", f"include={DEEP}"], "in one another"),
    ([*PLAN, "--input", f"3x{DIGITS}x8"], "input"),
    ([*PLAN, "--seed", "9" * 23], "--seed"),
    ([*PLAN, "--classes", "0"], "--classes"),
    (["plan"], "--model"),
    (["nonsense"], "nonsense"),
    (["train", "--nonsense"], "nfnets train --help"),
    (["profile", "-m", "bn_resnet8_cifar", "--batch", "1"], "--batch"),
    (["convert", "-m", "bn_resnet8_cifar", "--weights", "x" * 300], "no such file"),
]  # fmt: skip

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    for module in ("users", "broken", "imports"):
        monkeypatch.delitem(sys.modules, module, raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nfnets", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def refused(result: tuple[int, str, str], words: str) -> None:
    code, _, err = result
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(err) < 1100
    assert words in err, err


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file but caches and locks."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc" and p.name != ".lock")
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize(("command", "words"), COMMANDS, ids=[" ".join(c)[:60] for c, _ in COMMANDS])
def test_a_bad_value_is_one_line(run: Run, tmp_path: Path, command: list[str], words: str) -> None:
    before = contents(tmp_path)
    refused(run(*command), words)
    assert contents(tmp_path) == before


SMALL = ["--model", "bn_resnet8_cifar", "--train-limit", "200", "--epochs", "1", "--set", "threads=1"]
TRAIN = ["train", *SMALL, "--out", "r"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a finished run's folder holds."""
    folder = tmp_path_factory.mktemp("finished") / "r"
    assert CliRunner().invoke(cli.app, [*TRAIN[:-1], str(folder)]).exit_code == 0
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def _other(content: bytes, **changed: object) -> bytes:
    return json.dumps(json.loads(content) | changed).encode()


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "result cut short": ("result.json", lambda b: b[: len(b) // 2]),
    "result empty": ("result.json", lambda b: b""),
    "result a list": ("result.json", lambda b: b"[1, 2]"),
    "result deep": ("result.json", lambda b: DEEP.encode()),
    "result another run's": (
        "result.json",
        lambda b: _other(b, config=json.loads(b)["config"] | {"lr": 0.3}),
    ),
    "result another program's": ("result.json", lambda b: b'{"status": "done"}'),
    "result without accuracy": ("result.json", lambda b: _other(b, val_accuracy="high")),
    "config cut short": ("config.json", lambda b: b[: len(b) // 2]),
    "config binary": ("config.json", lambda b: b"\xff\x00" * 50),
    "config another program's": ("config.json", lambda b: b'{"model_type": "bert", "layers": 12}'),
    "config digits": ("config.json", lambda b: b'{"epochs": ' + DIGITS.encode() + b"}"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_a_run_is_one_line(
    run: Run, tmp_path: Path, finished: dict[str, bytes], damage: str
) -> None:
    name, harm = DAMAGES[damage]
    (tmp_path / "r").mkdir()
    for file, content in finished.items():
        (tmp_path / "r" / file).write_bytes(harm(content) if file == name else content)
    before = contents(tmp_path)
    refused(run(*TRAIN), f"r/{name}")
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "damage", ["cut", "flipped", "far", "negative", "no model", "other model", "text", "no config"]
)
def test_a_damaged_checkpoint_is_one_line(
    run: Run, tmp_path: Path, finished: dict[str, bytes], damage: str
) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    for file, content in finished.items():
        if file != "result.json":
            (folder / file).write_bytes(content)
    path = folder / "checkpoint.pt"
    content, state = path.read_bytes(), torch.load(path, weights_only=True)
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content[:200] + bytes(255 - b for b in content[200:1200]) + content[1200:])
    elif damage == "text":
        path.write_text("a note")
    else:
        state |= {"far": {"step": 10**9}, "negative": {"step": -1}, "no model": {"model": None}}.get(
            damage, {}
        )
        state |= {"other model": {"model": {"weight": torch.zeros(2)}}, "no config": {"config": "{"}}.get(
            damage, {}
        )
        torch.save(state, path)
    for older in folder.glob("checkpoint.*.pt"):
        older.unlink()
    before = contents(tmp_path)
    refused(run(*TRAIN), "delete the folder")
    assert {p: b for p, b in contents(tmp_path).items() if p.name != "log.jsonl"} == {
        p: b for p, b in before.items() if p.name != "log.jsonl"
    }


# -- names that look like something else ------------------------------------------------------------------------


def test_brackets_in_names_are_text(run: Run) -> None:
    for folder in ("[v1]", "[/a]", ":cat:"):
        code, out, err = run("convert", "-m", "bn_resnet8_cifar", "--out", f"{folder}/n.safetensors")
        assert code == 0, err
        assert f"wrote {folder}/n.safetensors and {folder}/n.json" in out
    code, out, err = run("plan", "-m", "users:named", "--input", "1x8x8")
    assert code == 0, err
    assert "[v1]" in out


def test_an_arm_of_any_name_has_a_folder_and_a_row(run: Run, tmp_path: Path) -> None:
    from nfnets.train.compare.protocol import Trial, slug

    long = "nf:clipping=0." + "0" * 298 + "1"
    arms = ["bn", "nf:init_from=runs/a.safetensors", long, long[:-1] + "2"]
    assert len({slug(arm) for arm in arms}) == 4
    for arm in arms:
        (tmp_path / Trial(arm, 64, 0.1, 2**62).folder).mkdir()
    common = [*SMALL, "--seeds", "42,", "--lrs", "0.1", "--dry-run"]
    code, out, err = run("compare", "--arms", f"bn,{long}", *common)
    assert code == 0, err
    assert "2 of 2 runs to do" in out
    assert out.count(" 42 ") == 2


def test_rates_that_differ_in_the_fifth_digit_are_two_runs() -> None:
    from nfnets.train.compare import ExperimentConfig

    for scaling in ("none", "sqrt", "linear"):
        config = ExperimentConfig.create(
            run={"data": "digits"}, arms=[{"name": "bn", "method": "bn"}],
            lrs=[0.1, 0.10001, 0.1000000001], batch_sizes=[64, 128], lr_scaling=scaling,
        )  # fmt: skip
        trials = [trial for search in config.searches().values() for trial in search]
        assert len({trial.folder for trial in trials}) == 6
        assert [t.lr for t in trials if t.batch_size == 64] == [0.1, 0.10001, 0.1000000001]
    # As before where four digits tell them apart.
    few = config.model_copy(update={"lrs": (0.05, 0.1), "lr_scaling": "sqrt"})
    assert few.candidates(few.arms[0], 128) == (0.07071, 0.1414)


@pytest.mark.parametrize(
    "terminal",
    [
        {"PYTHONIOENCODING": "ascii"},
        pytest.param({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, marks=pytest.mark.soak),
    ],
)
def test_a_terminal_that_is_not_utf8(terminal: dict[str, str], tmp_path: Path) -> None:
    script = """
import sys
from nfnets.cli import main
for words in sys.argv[1:]:
    sys.argv = ["nfnets", *words.split()]
    try:
        main()
    except SystemExit as stop:
        print("code", stop.code)
"""
    commands = ["recipes nf-resnet", "train --help", "plan -m wörk:x", "plan -m bn_resnet8_cifar --input 3×8"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONIO"))}
    command = [sys.executable, "-c", script, *commands]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=environment | terminal, check=False)
    assert done.returncode == 0, done.stderr
    out, err = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    assert "Traceback" not in err
    assert out.count("code 2") == 2
    assert "lambda" in out
    assert err.count("error: ") == 2


def test_a_pipe_gets_no_bar(run: Run) -> None:
    code, out, err = run(*TRAIN)
    assert code == 0, err
    assert "test accuracy" in out
    assert "━" not in out
    assert "0/?" not in out


def test_the_way_to_go_on_allows_the_users_own_model() -> None:
    from nfnets.cli_runs import trusting
    from nfnets.train.compare import Arm, ExperimentConfig

    def config(**run: object) -> ExperimentConfig:
        return ExperimentConfig.create(run={"data": "digits", **run}, arms=[Arm(name="bn", method="bn")])

    assert trusting(config(model="users:net")) == ["--model", "users:net"]
    assert trusting(config(model="timm:resnet18")) == trusting(config()) == []
