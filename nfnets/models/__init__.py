"""Model families."""

from nfnets.models.cifar_resnet import CifarResNet
from nfnets.models.registry import create_model, list_models, register

__all__ = ["CifarResNet", "create_model", "list_models", "register"]
