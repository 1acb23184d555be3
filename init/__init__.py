"""Initializers for networks without normalization."""

from nfnets.init.auto import autoinit_
from nfnets.init.comparison import Comparison, compare
from nfnets.init.drawn import draw_
from nfnets.init.fixup import fixup_
from nfnets.init.identity import zero_
from nfnets.init.interface import initialize
from nfnets.init.lsuv import lsuv_
from nfnets.init.orthogonal import delta_orthogonal_, scaled_orthogonal_
from nfnets.init.registry import list_initializers, register
from nfnets.init.scalars import ScalarBias, ScalarMultiplier
from nfnets.init.selu import selu_
from nfnets.init.shaped import dks_, tat_
from nfnets.init.skipinit import skipinit_
from nfnets.init.weight_norm import weight_norm_
from nfnets.init.zero_gamma import zero_gamma_
from nfnets.scale.report import Report, Row

__all__ = [
    "Comparison",
    "Report",
    "Row",
    "ScalarBias",
    "ScalarMultiplier",
    "autoinit_",
    "compare",
    "delta_orthogonal_",
    "dks_",
    "draw_",
    "fixup_",
    "initialize",
    "list_initializers",
    "lsuv_",
    "register",
    "scaled_orthogonal_",
    "selu_",
    "skipinit_",
    "tat_",
    "weight_norm_",
    "zero_",
    "zero_gamma_",
]
