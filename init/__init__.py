"""Initializers for networks without normalization."""

from nfnets.init.fixup import fixup_
from nfnets.init.lsuv import lsuv_
from nfnets.init.orthogonal import delta_orthogonal_, scaled_orthogonal_
from nfnets.init.scalars import ScalarBias, ScalarMultiplier
from nfnets.init.skipinit import skipinit_

__all__ = [
    "ScalarBias",
    "ScalarMultiplier",
    "delta_orthogonal_",
    "fixup_",
    "lsuv_",
    "scaled_orthogonal_",
    "skipinit_",
]
