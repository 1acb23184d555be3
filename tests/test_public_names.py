"""The public surface that others rely on is there, callable, and stays so whatever was imported before."""

import subprocess
import sys

from test_floors import MODULES

import nfnets

NAMES = [
    "accumulating",
    "attach",
    "attach_agc",
    "attach_centralization",
    "bake",
    "centralize_grad_",
    "clip_grad_agc_",
    "convert",
    "create_model",
    "list_models",
    "param_groups",
    "plan",
]
NAMES += ["probe", "profile", "recipe"]


def test_names_are_there_from_the_first_use_and_after_every_submodule() -> None:
    """In one process, which imports the package anew for each first use."""
    anew = "for name in [n for n in sys.modules if n.partition('.')[0] == 'nfnets']: del sys.modules[name]\n"
    uses = (
        "import nfnets; assert callable(nfnets.convert); nfnets.convert.register, nfnets.convert.list_methods()\n",
        "import nfnets; nfnets.convert.register\n",
        "import nfnets; nfnets.plan; nfnets.convert.Plan\n",
        "import importlib, nfnets\n"
        f"names = {NAMES}\n"
        "assert all(callable(getattr(nfnets, name)) for name in names * 2)\n"
        f"for module in {[m for m in MODULES if not m.endswith('__main__')]}:\n"
        "    importlib.import_module(module)\n"
        "bad = [name for name in names if not callable(getattr(nfnets, name))]\n"
        "assert not bad, bad\n",
    )
    code = "import sys, torch\n" + anew.join(uses)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_documented_modules_and_initializers() -> None:
    assert sorted(nfnets.__all__) == sorted(NAMES)
    for name in ("lsuv_", "fixup_", "skipinit_", "delta_orthogonal_"):
        assert callable(getattr(nfnets.init, name))
    for kind in (
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "ConvTranspose1d",
        "ConvTranspose2d",
        "ConvTranspose3d",
        "Linear",
    ):
        assert hasattr(nfnets.layers, f"ScaledStd{kind}")
    assert callable(nfnets.gains.gain)
    assert callable(nfnets.verify.batch_independence)
    assert callable(nfnets.verify.same_function)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, nfnets; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
