"""Files are written whole or not at all, wherever in the project they are written."""

from __future__ import annotations

import ast
import os
import stat
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_floors
import torch
from matplotlib.figure import Figure
from safetensors import safe_open
from torch import nn

from nfnets.errors import UserError
from nfnets.files import remove_leftovers, replacing, write
from nfnets.state_dicts import write_state


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


CONTENTS: dict[str, Any] = {
    "text.html": "<p>ä</p>",
    "bytes.bin": b"\x00\xff",
    "figure.png": lambda path: Figure().savefig(path),
    "figure.svg": lambda path: Figure().savefig(path),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_what_is_given_is_what_is_there_and_nothing_else(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    assert write(path, CONTENTS[name]) == path
    start = {"text.html": b"<p>\xc3\xa4", "bytes.bin": b"\x00\xff", "figure.png": b"\x89PNG"}
    assert path.read_bytes().startswith(start.get(name, b"<?xml"))
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_a_failure_leaves_the_old_file_or_none(
    tmp_path: Path, name: str, old: str | None, error: BaseException
) -> None:
    path = tmp_path / name
    if old is not None:
        path.write_text(old)

    def half(path: Path) -> None:
        write(path, CONTENTS[name])
        os.truncate(path, path.stat().st_size // 2)
        raise error

    kind = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind, match="No space left on device" if kind is UserError else None):
        write(path, half)
    assert names(tmp_path) == ([] if old is None else [name])
    assert old is None or path.read_text() == old


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_gives_the_mode_also_of_what_a_library_makes_for_its_owner_alone(
    tmp_path: Path, umask: int, expected: int
) -> None:
    def private(path: Path) -> None:
        path.unlink()
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    before = os.umask(umask)
    try:
        write(tmp_path / "a", "text")
        write(tmp_path / "b", private)
    finally:
        os.umask(before)
    assert [mode(tmp_path / name) for name in "ab"] == [expected] * 2
    (tmp_path / "a").chmod(0o640)  # its owner's decision
    write(tmp_path / "a", "again")
    assert mode(tmp_path / "a") == 0o640


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    for text in ("first", "second"):
        write(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "far" / "file").read_text() == text
    assert names(tmp_path / "far") == ["file"]


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write(tmp_path / "pipe", lambda path: path.write_text("through"))
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_several_files_change_together_or_not_at_all(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    with replacing(*paths) as partials:
        for path in partials:
            path.write_text("new")
        assert not any(path.exists() for path in paths)
    assert [path.read_text() for path in paths] == ["new", "new"]
    missing = r"c/b: cannot be written \(No such file or directory\)"
    with pytest.raises(UserError, match=missing), replacing(tmp_path / "a", tmp_path / "c" / "b"):
        raise AssertionError
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("where", ["missing/file", "file/inside", "folder"])
def test_what_cannot_be_written_is_one_line(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"{where}: cannot be written") as caught:
        write(tmp_path / where, "text")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file", "folder"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_file_stays(tmp_path: Path) -> None:
    write(tmp_path / "kept", "old").chmod(0o444)
    with pytest.raises(UserError, match="Permission denied"):
        write(tmp_path / "kept", "new")
    assert (tmp_path / "kept").read_text() == "old"


def test_what_a_killed_writer_left_can_be_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-0123.pt").write_text("half")
    write(tmp_path / "whole.pt", "whole")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["whole.pt"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_same_weights_are_the_same_bytes(tmp_path: Path, tied: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    if tied:  # safetensors adds an entry of its own for what it leaves out
        model[1].weight = model[0].weight
    about = {"fingerprint": "f", "config": '{"ä": "\\u2028\x7f\\n"}', "more": ""}
    for number in range(8):  # the library's order is drawn for every file
        write(tmp_path / f"{number}.safetensors", partial(write_state, model=model, metadata=about))
    first = (tmp_path / "0.safetensors").read_bytes()
    assert all(path.read_bytes() == first for path in tmp_path.iterdir())
    with safe_open(tmp_path / "0.safetensors", "pt") as file:
        assert dict(file.metadata()) == about | ({"1.weight": "0.weight"} if tied else {})
        assert torch.equal(file.get_tensor("0.weight"), model[0].weight)
        assert torch.equal(file.get_tensor("1.bias"), model[1].bias)


# Calls that leave a half-written file behind a full disk; where one is meant, `nfnets.files` gave it its path.
WRITERS = {"write_text", "write_bytes", "savefig", "save_model", "save_file", "write_image", "write_html"}
MEANT = {
    "nfnets.files": "the one place",
    "nfnets.train.compare.cost": "/proc, where the kernel keeps a process's peak memory",
    "nfnets.signal.page": "into memory",
    "nfnets.state_dicts": "to a path that the one writer gave",
    "nfnets.train.loop.checkpoint": "to a path that the one writer gave",
}


@pytest.mark.parametrize("module", sorted(test_floors.MODULES.keys() - MEANT.keys()))
def test_nothing_is_written_past_the_one_writer(module: str) -> None:
    tree = ast.parse(test_floors.MODULES[module].read_text())
    inside = {
        id(inner)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in ("write", "replacing")
        for inner in ast.walk(call)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or id(node) in inside:
            continue
        name = ast.unparse(node.func).split(".")[-1]
        assert name not in WRITERS, f"{module}:{node.lineno}: {name}"
        if name == "open":
            modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            assert not any(text.strip("bt+") in ("w", "x") for text in modes), f"{module}:{node.lineno}: open"
