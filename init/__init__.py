"""Initializers for networks without normalization."""

from nfnets.init.lsuv import lsuv_
from nfnets.init.orthogonal import delta_orthogonal_, scaled_orthogonal_

__all__ = ["delta_orthogonal_", "lsuv_", "scaled_orthogonal_"]
