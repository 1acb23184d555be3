"""Model families."""

from nfnets.models.cifar_resnet import CifarResNet
from nfnets.models.config import NormFreeConfig
from nfnets.models.families import CONFIGS
from nfnets.models.fixup import FixupResNet
from nfnets.models.fixup_families import fixup_cifar
from nfnets.models.norm_free import NormFreeNet
from nfnets.models.registry import create_model, list_models, register
from nfnets.models.timm_registry import register_with_timm
from nfnets.models.weights import from_timm_state_dict, load_timm, load_weights, to_timm_state_dict

__all__ = [
    "CONFIGS",
    "CifarResNet",
    "FixupResNet",
    "NormFreeConfig",
    "NormFreeNet",
    "create_model",
    "fixup_cifar",
    "from_timm_state_dict",
    "list_models",
    "load_timm",
    "load_weights",
    "register",
    "register_with_timm",
    "to_timm_state_dict",
]
