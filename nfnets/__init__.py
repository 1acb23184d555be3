"""Normalizer-free CNNs in PyTorch: convert, look at the signal, train, compare with BatchNorm."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nfnets.namesake import mixed

if TYPE_CHECKING:
    from nfnets.accumulate import accumulating
    from nfnets.advice import recipe
    from nfnets.agc import attach_agc, clip_grad_agc_
    from nfnets.attached import attach
    from nfnets.centralization import attach_centralization, centralize_grad_
    from nfnets.convert import bake, convert, plan
    from nfnets.models import create_model, list_models
    from nfnets.parameter_groups import param_groups
    from nfnets.signal import probe, profile

# In a clone `init` and `train` stand beside this folder, not in it: Python started there finds the clone before what
# is installed, and must not take half of the package from each.
_here = Path(__file__).resolve().parent
if not (_here / "init").is_dir() and (_here.parent / "init" / "__init__.py").is_file():
    __path__.append(str(_here.parent))

if _line := mixed(_here):
    warnings.warn(_line, stacklevel=2)

# Looked up on first use, so that `nfnets --help` does not wait for torch.
_WHERE = {
    "accumulating": "nfnets.accumulate",
    "attach": "nfnets.attached",
    "attach_agc": "nfnets.agc",
    "attach_centralization": "nfnets.centralization",
    "centralize_grad_": "nfnets.centralization",
    "clip_grad_agc_": "nfnets.agc",
    "bake": "nfnets.convert",
    "plan": "nfnets.convert",
    "create_model": "nfnets.models",
    "list_models": "nfnets.models",
    "param_groups": "nfnets.parameter_groups",
    "probe": "nfnets.signal",
    "profile": "nfnets.signal",
    "recipe": "nfnets.advice",
}
_MODULES = (
    "callbacks",
    "convert",  # a module that can be called, so that nfnets.convert.register is there at first use, too
    "functional",
    "gains",
    "hub",
    "init",
    "layers",
    "models",
    "signal",
    "trace",
    "train",
    "verify",
)

__version__ = "0.1.0"
__all__ = [
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
    "probe",
    "profile",
    "recipe",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"nfnets.{name}")
    raise AttributeError(f"module 'nfnets' has no attribute {name!r}")
