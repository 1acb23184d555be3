"""Conversion of BatchNorm CNNs: plan, convert, methods."""

import sys
from types import ModuleType

from nfnets.convert.apply import ConversionError, convert, plan
from nfnets.convert.bake import bake
from nfnets.convert.methods import Method, list_methods, register
from nfnets.convert.net import Net
from nfnets.convert.plan import Change, Edit, Plan, Start
from nfnets.scale.target import Target
from nfnets.structure.sites import Site

__all__ = [
    "Change",
    "ConversionError",
    "Edit",
    "Method",
    "Net",
    "Plan",
    "Site",
    "Start",
    "Target",
    "bake",
    "convert",
    "list_methods",
    "plan",
    "register",
]

Row = Change  # its name before a change could have a target


class _Callable(ModuleType):
    # Once this package is imported, `nfnets.convert` is the package: it must still be the function people call.
    __call__ = staticmethod(convert)


sys.modules[__name__].__class__ = _Callable
