"""Weights from files and from timm's normalizer-free models, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.layers.helpers import make_divisible
from timm.models import nfnet as timm_nfnet
from torch import Tensor, nn

from nfnets.errors import UserError, unknown
from nfnets.gains import gain
from nfnets.given import check_module, shown
from nfnets.layers import ScaledStdConv2d
from nfnets.models.config import NormFreeConfig
from nfnets.models.norm_free import NormFreeNet
from nfnets.state_dicts import differences, is_state, read_state

TIMM_EPS = 1e-5
"""timm's NF models add this to the variance, where DeepMind and we floor N · variance at 1e-4."""

_STEMS: dict[str, Any] = {"7x7_pool": "7x7_pool", "3x3": "3x3", "deep_quad": "deep"}


def load_timm(source: str | nn.Module, pretrained: bool = False, **kwargs: Any) -> NormFreeNet:
    """A timm normalizer-free model as one of ours, with its weights and outputs.

    Both standardize weights, but timm divides by sqrt(N · (v + 1e-5)) and we by sqrt(max(N · v, 1e-4)); the ratio of
    the two, one number per filter, goes into the gain.

    Args:
        source: a timm name (`"dm_nfnet_f0"`, `"nf_resnet50"`, `"nf_regnet_b1"`, `"eca_nfnet_l0"`, …) or such a model.
        pretrained: with a name, let timm download its published weights.
        **kwargs: with a name, for `timm.create_model`.

    Returns:
        The model, in `source`'s mode (evaluation, if a name was given), device and dtype. Stochastic depth is off.

    Raises:
        UserError: not a normalizer-free model of timm's, or one with options that ours does not have.

    Example:
        >>> theirs = timm.create_model("test_nfnet").eval()
        >>> import torch
        >>> images = torch.randn(2, 3, 64, 64)
        >>> torch.testing.assert_close(load_timm(theirs)(images), theirs(images), rtol=1e-4, atol=1e-5)

    Checked against timm `models/nfnet.py`, `layers/std_conv.py`.
    """
    if isinstance(source, str):
        if source.split(".")[0] not in timm_nfnet.model_cfgs:
            raise unknown("normalizer-free timm model", source, timm_nfnet.model_cfgs)
        source = timm.create_model(source, pretrained=pretrained, **kwargs).eval()
    if not isinstance(source, timm_nfnet.NormFreeNet):
        raise UserError(
            f"a {type(source).__name__}: expected one of timm's normalizer-free models, such as nf_resnet50; "
            "convert other models with nfnets.convert"
        )
    model = NormFreeNet(
        _config_of(source),
        num_classes=source.num_classes,
        in_chans=source.in_chans,
        drop_rate=source.drop_rate,
        global_pool=source.head.global_pool.pool_type,
    )
    parameter = next(source.parameters())
    model.to(parameter.device, parameter.dtype)
    load_weights(model, from_timm_state_dict(source.state_dict(), model), f"timm {_architecture(source)}")
    return model.train(source.training)


def from_timm_state_dict(state: Mapping[str, Tensor], model: NormFreeNet) -> dict[str, Tensor]:
    """timm's state dict in our names, shapes and standardization; `model` gives the constants.

    Args:
        state: of a timm normalizer-free model, such as its published weights.
        model: ours, of the same variant.

    Returns:
        What `load_weights` takes; keys that do not fit are passed on for it to name.

    Raises:
        UserError: no state dict, or another model than ours.
    """
    _check_ours(model)
    if not is_state(state):
        raise UserError(
            f"state is {shown(state)}: expected a state dict (names to tensors); pass timm_model.state_dict()"
        )
    own = model.state_dict()
    modules = dict(model.named_modules())
    names = {_timm_name(name): name for name in own}
    result = {name: own[name] for name in own if name.rpartition(".")[2] in ("scale", "alpha", "value")}
    for theirs, value in state.items():
        name = names.get(theirs, theirs)
        owner, _, leaf = name.rpartition(".")
        module = modules.get(owner)
        if leaf == "gain" and isinstance(module, ScaledStdConv2d):
            value = value.flatten() * _ratio(state[theirs.removesuffix("gain") + "weight"], module.eps)
        elif isinstance(module, nn.Linear) and value.ndim == 4:
            value = value.flatten(1)
        result[name] = value
    return result


def to_timm_state_dict(model: NormFreeNet) -> dict[str, Tensor]:
    """Our state dict in timm's names, shapes and standardization: timm's model gives the same outputs with it.

    Args:
        model: of a variant that timm has, e.g. from `load_timm`.

    Returns:
        What `timm_model.load_state_dict` takes.

    Raises:
        UserError: another model than ours, or γ sits elsewhere than in timm's model for these weights, so that no
            weights could match.

    Example:
        >>> theirs, again = timm.create_model("test_nfnet"), timm.create_model("test_nfnet")
        >>> again.load_state_dict(to_timm_state_dict(load_timm(theirs)))
        <All keys matched successfully>
    """
    _check_ours(model)
    if model.config.norm or model.config.constants != "deepmind":
        raise UserError(
            "a model with other constants than timm's: expected norm=None, constants='deepmind'; "
            "build it with load_timm or pass them to create_model"
        )
    modules = dict(model.named_modules())
    result = {}
    for name, value in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        module = modules[owner]
        if leaf in ("scale", "alpha", "value"):
            continue
        if leaf == "gain" and isinstance(module, ScaledStdConv2d):
            value = (value / _ratio(module.weight.detach(), module.eps)).reshape(-1, 1, 1, 1)
        elif leaf == "weight" and isinstance(module, nn.Linear) and ".fc" in name and "attn" in name:
            value = value[:, :, None, None]
        result[_timm_name(name)] = value
    return result


def _check_ours(model: NormFreeNet) -> None:
    check_module(model)
    if not isinstance(model, NormFreeNet):
        raise UserError(
            f"a {type(model).__name__}: expected an nfnets.models.NormFreeNet; build it with load_timm or create_model"
        )


def load_weights(model: nn.Module, source: Mapping[str, Tensor] | str | Path, label: str = "") -> None:
    """`load_state_dict`, all or nothing, that says how a checkpoint differs.

    Args:
        model: changed in place.
        source: a state dict, or a file of one (`.safetensors`, or what `torch.save` wrote).
        label: names the source in the error.

    Raises:
        UserError: keys or shapes differ (they are named), or `source` is no state dict; the model is unchanged.

    Example:
        >>> model, other = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> load_weights(model, other.state_dict())
        >>> bool((model.weight == other.weight).all())
        True
    """
    check_module(model)
    if isinstance(source, str | Path):
        label = label or str(source)
        source = read_state(Path(source))[0]
    if not is_state(source):
        raise UserError(
            f"source is {shown(source)}: expected a state dict (names to tensors), or a file of one; "
            "pass model.state_dict()"
        )
    if wrong := differences(model.state_dict(), source):
        raise UserError(
            f"{label or 'the weights'} are of another variant than this {type(model).__name__}: {wrong}; "
            "build the variant the weights were saved from"
        )
    model.load_state_dict(dict(source))


def _timm_name(name: str) -> str:
    return name.replace(".branch.", ".").replace("skip.gain", "skipinit_gain")


def _ratio(weight: Tensor, eps: float) -> Tensor:
    """timm's factor of a filter over ours."""
    filters = weight.double().flatten(1)
    fan_in, variance = filters.shape[1], filters.var(1, correction=0)
    ratio = ((variance * fan_in).clamp_min(eps) / (fan_in * (variance + TIMM_EPS))).sqrt()
    return ratio.to(weight.dtype)


def _architecture(model: nn.Module) -> str:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return config.get("architecture", "model")


def _check_constants(model: timm_nfnet.NormFreeNet, theirs: timm_nfnet.NfCfg) -> None:
    """Old versions of timm do not record the options a model was built with."""
    block: Any = next(module for module in model.modules() if isinstance(module, timm_nfnet.NormFreeBlock))
    conv = block.conv1
    built = block.act1.gamma if theirs.gamma_in_act else conv.scale * conv.weight[0].numel() ** 0.5
    expected = gain(theirs.act_layer, "deepmind")
    if block.alpha != theirs.alpha or not math.isclose(built, expected, rel_tol=1e-9):
        raise UserError(
            f"a timm model with α={block.alpha:g} and γ={built:g}, recorded as α={theirs.alpha:g} and γ="
            f"{expected:g}: its options are unknown; update timm and build it with timm.create_model"
        )


def _config_of(model: timm_nfnet.NormFreeNet) -> NormFreeConfig:
    pretrained: Any = getattr(model, "pretrained_cfg", {})
    name = _architecture(model)
    if name not in timm_nfnet.model_cfgs:
        raise UserError(
            "a NormFreeNet that timm.create_model did not build: expected a named one, such as nf_resnet50"
        )
    theirs = timm_nfnet.model_cfgs[name]
    options = {field.name for field in dataclasses.fields(theirs)}
    changed = {k: v for k, v in getattr(model, "_model_args", {}).items() if k in options}
    theirs = dataclasses.replace(theirs, **changed)
    _check_constants(model, theirs)
    if theirs.stem_type not in _STEMS or theirs.attn_gain != 2 or theirs.std_conv_eps != TIMM_EPS:
        raise UserError(
            f"timm {name}: its stem, attention gain or eps is none of ours; load a published variant"
        )

    def divisible(width: float) -> int:
        return make_divisible(width * theirs.width_factor, theirs.ch_div)

    return NormFreeConfig(
        depths=theirs.depths,
        widths=tuple(divisible(width) for width in theirs.channels),
        stem=_STEMS[theirs.stem_type],
        stem_width=divisible(theirs.stem_chs or theirs.channels[0]),
        strides=(2 if theirs.stem_type == "3x3" else 1, 2, 2, 2),
        ratio=theirs.bottle_ratio,
        ratio_of="in" if theirs.reg else "out",
        first_ratio=1.0 if theirs.reg else None,
        group_width=theirs.group_size,
        divisor=theirs.ch_div,
        extra_conv=theirs.extra_conv,
        attention=theirs.attn_layer,  # type: ignore[arg-type]
        attention_ratio=(theirs.attn_kwargs or {}).get("rd_ratio", 1 / 16),
        attention_at="middle" if theirs.reg else "end",
        pooled_shortcut=True,
        final_width=divisible(theirs.num_features) if theirs.num_features else 0,
        activation=theirs.act_layer,
        constants="deepmind",
        gain_at="input" if theirs.gamma_in_act else "conv",
        alpha=theirs.alpha,
        skipinit=theirs.skipinit,
        padding="tf_same" if theirs.same_padding else "same",
        zero_head=theirs.zero_init_fc,
        train_size=pretrained["input_size"][-1],
        test_size=(pretrained.get("test_input_size") or pretrained["input_size"])[-1],
    )
