"""One file per conversion method."""

from nfnets.convert.methods import fold, ghost_bn, gn, nf
from nfnets.convert.methods.base import Method, list_methods, register

__all__ = ["Method", "fold", "ghost_bn", "gn", "list_methods", "nf", "register"]
