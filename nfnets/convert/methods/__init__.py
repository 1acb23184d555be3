"""One file per conversion method."""

from nfnets.convert.methods import fold, nf
from nfnets.convert.methods.base import Method, list_methods, register

__all__ = ["Method", "fold", "list_methods", "nf", "register"]
