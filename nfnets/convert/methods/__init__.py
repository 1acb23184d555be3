"""One file per conversion method."""

from nfnets.convert.methods import (
    bcn,
    evonorm_s0,
    fixed_variance,
    fixup,
    fold,
    ghost_bn,
    gn,
    lsuv,
    nf,
    online,
    pointwise,
    skipinit,
    tune,
)
from nfnets.convert.methods.base import Method, list_methods, register

__all__ = [
    "Method",
    "bcn",
    "evonorm_s0",
    "fixed_variance",
    "fixup",
    "fold",
    "ghost_bn",
    "gn",
    "list_methods",
    "lsuv",
    "nf",
    "online",
    "pointwise",
    "register",
    "skipinit",
    "tune",
]
