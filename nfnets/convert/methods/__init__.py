"""One file per conversion method."""

from nfnets.convert.methods import fold, nf
from nfnets.convert.methods.base import Method, methods, register

__all__ = ["Method", "fold", "methods", "nf", "register"]
