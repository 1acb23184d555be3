"""One file per conversion method."""

from nfnets.convert.methods import (
    evonorm_s0,
    fixed_variance,
    fixup,
    fold,
    ghost_bn,
    gn,
    lsuv,
    nf,
    pointwise,
    skipinit,
    tune,
)
from nfnets.convert.methods.base import Method, list_methods, register

__all__ = [
    "Method",
    "evonorm_s0",
    "fixed_variance",
    "fixup",
    "fold",
    "ghost_bn",
    "gn",
    "list_methods",
    "lsuv",
    "nf",
    "pointwise",
    "register",
    "skipinit",
    "tune",
]
