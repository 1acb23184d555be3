"""The wheel puts `nfnets` into site-packages and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

from test_floors import MODULES, ROOT


def test_the_wheel_holds_one_import_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = {".git", ".venv", "build", "dist", "runs"}
    subprocess.run(["mkdir", source], check=True)
    for item in ROOT.iterdir():
        if item.name not in ignored and not item.name.endswith(".egg-info"):
            subprocess.run(["cp", "-r", item, source], check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nfnets"}
    assert {"nfnets/init/__init__.py", "nfnets/train/__init__.py", "nfnets/py.typed"} <= set(names)
    shipped = {name for name in names if name.endswith(".py")}
    wanted = {m.replace(".", "/") for m in MODULES}
    assert wanted == {name.removesuffix(".py").removesuffix("/__init__") for name in shipped}
