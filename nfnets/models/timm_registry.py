"""Our models under timm: every name of `list_models` as `nfnets_<name>`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import FeatureHookNet, generate_default_cfgs, register_model
from torch import nn

from nfnets.errors import UserError
from nfnets.models import cifar_resnet, fixup_families  # noqa: F401  (their names are registered)
from nfnets.models.families import CONFIGS
from nfnets.models.norm_free import NormFreeNet
from nfnets.models.registry import create_model, list_models

PREFIX = "nfnets_"

default_cfgs: dict[str, Any] = {}  # timm looks for this name in an entry point's module


def register_with_timm() -> list[str]:
    """Register every model with timm, so that its scripts can train and validate them.

    Has run for ours when `nfnets.models` is imported; call it again after `nfnets.models.register`.

    Returns:
        The names added now.

    Example:
        >>> import timm
        >>> timm.create_model("nfnets_bn_resnet8_cifar", num_classes=3).get_classifier().out_features
        3
    """
    new = [name for name in list_models() if PREFIX + name not in default_cfgs]
    default_cfgs.update(generate_default_cfgs({PREFIX + name: _defaults(name) for name in new}))
    for name in new:
        register_model(_entry_point(name))
    return [PREFIX + name for name in new]


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if pretrained:
            raise UserError(
                f"{PREFIX}{name}: no weights of its own are published; use nfnets.models.load_timm for timm's"
            )
        for unused in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            kwargs.pop(unused, None)
        features, indices = kwargs.pop("features_only", False), kwargs.pop("out_indices", None)
        model = create_model(name, **kwargs)
        config: Any = default_cfgs[PREFIX + name].default.to_dict()
        config |= {
            "architecture": PREFIX + name,
            "num_classes": kwargs.get("num_classes", config["num_classes"]),
        }
        if features:
            model = _features(model, indices)
        model.pretrained_cfg = model.default_cfg = config  # type: ignore[assignment]
        return model

    build.__name__ = build.__qualname__ = PREFIX + name
    build.__doc__ = f"`nfnets.create_model({name!r})`"
    build.__module__ = __name__
    return build


def _features(model: nn.Module, indices: Any) -> nn.Module:
    if not isinstance(model, NormFreeNet):
        raise UserError(
            f"features_only: expected a normalizer-free net or its twin, not a {type(model).__name__}"
        )
    return FeatureHookNet(
        model, tuple(range(len(model.stages))) if indices is None else indices, no_rewrite=True
    )


def _defaults(name: str) -> dict[str, Any]:
    small = name.endswith("_cifar")
    config = CONFIGS.get(name.removeprefix("bn_"))
    train, test = (config.train_size, config.test_size) if config else (32, 32) if small else (224, 224)
    stride = config.reductions()[-1] if config else 4 if small else 32
    head = "head.fc" if config else "fc"
    first = ("stem.conv1" if config.stem == "deep" else "stem.conv") if config else "conv1"
    return {
        "url": "",
        "num_classes": 10 if small else 1000,
        "input_size": (3, train, train),
        "test_input_size": (3, test, test),
        "pool_size": (-(-train // stride),) * 2,
        "crop_pct": 1.0 if small else 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "classifier": head,
        "first_conv": first,
        "license": "apache-2.0",
    }


register_with_timm()
