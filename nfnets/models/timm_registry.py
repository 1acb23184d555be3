"""Our models under timm: every name of `list_models` as `nfnets_<name>`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from timm.models import (
    FeatureDictNet,
    FeatureHookNet,
    FeatureListNet,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import FeatureGetterNet
from torch import nn

from nfnets.errors import UserError, unknown
from nfnets.models import cifar_resnet, fixup_families  # noqa: F401  (their names are registered)
from nfnets.models.families import CONFIGS
from nfnets.models.registry import builder, create_model, list_models
from nfnets.models.stages import StagedNet

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
        own, overlay = kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
        if pretrained and not _has_source(own) and not _has_source(overlay):
            raise UserError(
                f"{PREFIX}{name}: no weights of its own are published; use nfnets.models.load_timm for timm's, or "
                "name a file by pretrained_cfg_overlay={'file': …}"
            )
        features, indices = kwargs.pop("features_only", False), kwargs.pop("out_indices", None)
        kind = kwargs.pop("feature_cls", "getter")
        model: Any = build_model_with_cfg(
            partial(create_model, name),
            PREFIX + name,
            pretrained,
            pretrained_cfg=own,
            pretrained_cfg_overlay=overlay,
            kwargs_filter=_not_taken(name),
            **kwargs,
        )
        config = dict(model.pretrained_cfg)
        config["num_classes"] = getattr(
            model, "num_classes", kwargs.get("num_classes", config["num_classes"])
        )
        config["input_size"] = (getattr(model, "in_chans", 3), *config["input_size"][1:])
        if features:
            model = _features(model, indices, kind)
            config = {key: value for key, value in config.items() if key not in ("num_classes", "classifier")}
        model.pretrained_cfg = model.default_cfg = config
        return model

    build.__name__ = build.__qualname__ = PREFIX + name
    build.__doc__ = f"`nfnets.create_model({name!r})`"
    build.__module__ = __name__
    return build


def _has_source(config: Any) -> bool:
    return isinstance(config, Mapping) and any(
        config.get(key) for key in ("file", "url", "hf_hub_id", "state_dict")
    )


def _not_taken(name: str) -> Any:
    """Which of the arguments that timm fills in from the configuration the builder does not have."""
    taken = inspect.signature(builder(name)).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        return ()
    return tuple({"num_classes", "global_pool", "in_chans"} - {parameter.name for parameter in taken})


def _features(model: nn.Module, indices: Any, kind: str | type) -> Any:
    if not isinstance(model, StagedNet):
        raise UserError(f"features_only: expected one of nfnets' own networks, not a {type(model).__name__}")
    flat = any("." in info["module"] for info in model.feature_info)  # timm looks one container deep
    extractors: dict[str, Callable[..., Any]] = {
        "getter": FeatureGetterNet,
        "hook": partial(FeatureHookNet, no_rewrite=True),
        "list": partial(FeatureListNet, flatten_sequential=flat),
        "dict": partial(FeatureDictNet, flatten_sequential=flat),
    }
    if isinstance(kind, str) and kind not in extractors:
        raise unknown("feature_cls", kind, extractors)
    extractor = extractors[kind] if isinstance(kind, str) else kind
    return extractor(model, out_indices=tuple(range(len(model.feature_info))) if indices is None else indices)


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
