"""From a model's name to a module for images of some shape."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.errors import UserError, first_line, unknown
from nfnets.plain import shown
from nfnets.state_dicts import load_state
from nfnets.train.config import RunConfig
from nfnets.train.keyed import seeded


def build(
    spec: str,
    *,
    num_classes: int | None,
    channels: int,
    size: int | None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """A model for images of `channels` × size × size and `num_classes` classes.

    Args:
        spec: "timm:NAME", "torchvision:NAME", "package.module:function" (called with those of
            `num_classes`, `in_chans` and `size` that it accepts), or a name of `nfnets.create_model`.
        num_classes: outputs of the classifier; None for what the constructor chooses by itself.
        channels: of the images. A torchvision model's first convolution is replaced where it differs.
        size: pixels per side; None where there is no such number.
        options: further keyword arguments of the constructor.

    Returns:
        The module, in training mode, initialized from torch's global generators.

    Raises:
        UserError: for an unknown model (with near matches), or a constructor that fails.

    Example:
        >>> model = build("timm:resnet10t", num_classes=10, channels=1, size=32)
        >>> model(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """
    family, colon, name = spec.partition(":")
    given = {"num_classes": num_classes, "in_chans": channels}
    if not colon:
        make = _ours(spec)
    elif family == "timm":
        make = _timm(name)
    elif family == "torchvision":
        make, given = _torchvision(name), {"num_classes": num_classes}
    else:
        make = _function(family, name)
        given = _accepted(make, {**given, "size": size})
    given = {name: value for name, value in given.items() if value is not None} | (options or {})
    try:
        model = make(**given)
    except UserError:
        raise
    except Exception as error:  # a builder of the user's own may raise anything
        with_ = ", ".join(f"{name}={shown(value)}" for name, value in given.items()) or "no arguments"
        raise UserError(
            f"model {spec}: could not be built with {with_}: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model {spec}: returned {type(model).__name__}, expected a torch.nn.Module")
    if family == "torchvision" and colon:
        _adapt_first_conv(model, channels)
    return model.train()


def registered(spec: str) -> bool:
    """Whether a registry (ours, timm's, torchvision's) builds the model, so that no code is looked up.

    Example:
        >>> registered("timm:resnet18"), registered("mine.models:build")
        (True, False)
    """
    family, colon, _ = spec.partition(":")
    return not colon or family in ("timm", "torchvision")


def outputs_of(spec: str, asked: int | None, usual: int) -> int | None:
    """The number of outputs to build a model with, where the user need not have said one.

    Args:
        spec: as for `build`.
        asked: what the user said, if anything.
        usual: what a registry's model gets, and a builder that has no default of its own.

    Returns:
        The number; None to leave it to a builder of the user's own.

    Raises:
        UserError: a number was asked for, and the builder has no argument for it.

    Example:
        >>> outputs_of("timm:resnet18", None, 1000), outputs_of("torch.nn:Identity", None, 1000)
        (1000, None)
    """
    if registered(spec):
        return usual if asked is None else asked
    family, _, name = spec.partition(":")
    make = _function(family, name)
    if asked is None:
        parameter = _parameters(make).get("num_classes")
        return usual if parameter is not None and parameter.default is parameter.empty else None
    if not _accepted(make, {"num_classes": asked}):
        raise UserError(
            f"{asked} classes: {spec} has no argument num_classes; add it, or leave the number of classes out"
        )
    return asked


def start_from(model: nn.Module, path: Path) -> None:
    """Load what `init_from` names, such as a run's model.safetensors; executes no code.

    Raises:
        UserError: an unreadable file, or tensors that are not this model's.
    """
    try:
        load_state(model, path)
    except UserError as error:
        raise UserError(f"init_from={error}; expected the state of the model before conversion") from None


def drop_options(config: RunConfig) -> dict[str, Any]:
    """The constructor's arguments for `drop_rate` and `drop_path_rate`, where they are set.

    timm, the models of `nfnets.create_model` and builders of the user's own call them so; torchvision's take
    `dropout` and `stochastic_depth_prob`.

    Raises:
        UserError: for a builder of the user's own that has no such argument. (The others refuse it themselves.)

    Example:
        >>> drop_options(RunConfig.create(model="torchvision:efficientnet_b0", drop_path_rate=0.1))
        {'stochastic_depth_prob': 0.1}
    """
    fields = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate}
    given = {name: rate for name, rate in fields.items() if rate is not None}
    family, _, name = config.model.partition(":")
    if config.model.startswith("torchvision:"):
        theirs = {"drop_rate": "dropout", "drop_path_rate": "stochastic_depth_prob"}
        return {theirs[field]: rate for field, rate in given.items()}
    if given and not registered(config.model):
        make = _function(family, name)
        for field in [name for name in given if name not in _accepted(make, given)]:
            raise UserError(
                f"{field}={given[field]}: {config.model} has no argument {field}; add it, or leave {field} out"
            )
    return given


def _timm(name: str) -> Callable[..., nn.Module]:
    import timm

    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())
    return lambda **given: timm.create_model(name, **given)


def _torchvision(name: str) -> Callable[..., nn.Module]:
    from torchvision import models

    # Detection, segmentation and video models take no plain image batch.
    known = models.list_models(module=models)
    if name not in known:
        raise unknown("torchvision model", name, known)
    return lambda **given: models.get_model(name, **given)


def _ours(name: str) -> Callable[..., nn.Module]:
    import nfnets

    known = nfnets.list_models()
    if name not in known:
        import timm

        if functions := _functions_in(name):
            raise UserError(f"model {name!r}: that is a module; did you mean {' or '.join(functions)}?")
        # Whoever leaves out the prefix knows what it is called there.
        raise unknown("model", name, [*known, f"timm:{name}"] if timm.is_model(name) else known)
    return lambda **given: nfnets.create_model(name, **given)


def _functions_in(name: str, most: int = 3) -> list[str]:
    """Functions and classes of a module in this folder, as models; it is read, not run."""
    inside = name.removesuffix(".py").replace(".", "/")
    try:
        tree = ast.parse(Path(f"{inside}.py").read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    found = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    module = inside.replace("/", ".")
    return [f"{module}:{each}" for each in found if not each.startswith("_")][:most]


def _function(module_name: str, name: str) -> Callable[..., Any]:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:  # an installed command does not look in the folder that it is called from
        sys.path.insert(0, here)
    try:
        if not all(part.isidentifier() for part in module_name.split(".")):
            raise ImportError("no name of a module")
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's own may raise anything
        why = (
            first_line(error)
            if isinstance(error, ImportError)
            else f"{type(error).__name__}: {first_line(error)}"
        )
        raise UserError(
            f"model {module_name}:{name}: cannot import {module_name} ({why}); expected timm:NAME, "
            f"torchvision:NAME or an importable package.module:function"
        ) from error
    finally:
        if added:
            sys.path.remove(here)
    make = getattr(module, name, None)
    if not callable(make):
        public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise unknown(f"function of {module_name}", name, public)
    return make


def _parameters(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(make).parameters
    except (TypeError, ValueError):  # some builtins have none
        return {}


def _accepted(make: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the callable has parameters for."""
    parameters = _parameters(make)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return given
    return {name: value for name, value in given.items() if name in parameters}


def _adapt_first_conv(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by one of the same settings for another number of channels."""
    path, conv = next((p, m) for p, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if conv.in_channels == channels:
        return
    if conv.groups != 1:
        raise UserError(f"{path}: a grouped first convolution cannot take {channels} channels")
    parent = model.get_submodule(path.rpartition(".")[0])
    adapted = nn.Conv2d(
        channels,
        conv.out_channels,
        conv.kernel_size,  # pyright: ignore[reportArgumentType]
        stride=conv.stride,  # pyright: ignore[reportArgumentType]
        padding=conv.padding,  # pyright: ignore[reportArgumentType]
        dilation=conv.dilation,  # pyright: ignore[reportArgumentType]
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
    )
    nn.init.kaiming_normal_(adapted.weight, mode="fan_out", nonlinearity="relu")
    if adapted.bias is not None:
        nn.init.zeros_(adapted.bias)
    setattr(parent, path.rpartition(".")[2], adapted)


def check_output(model: nn.Module, images: Tensor, num_classes: int, spec: str) -> None:
    """A UserError where the model cannot train on such a batch, or does not give one logit per class.

    The forward pass runs in training mode (BatchNorm rejects a batch of one value per channel only there), without
    gradients; buffers and random generators are as before.
    """
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        with torch.no_grad(), seeded(0, "check"):
            output = model(images)
    except Exception as error:  # a forward of the user's own may raise anything
        torchs = isinstance(error, RuntimeError | ValueError | AssertionError)
        reason = (first_line(error) if torchs else f"{type(error).__name__}: {first_line(error)}").rstrip(".")
        raise UserError(
            f"model {spec}: cannot train on batches of shape {tuple(images.shape)}: {reason}; give it a "
            "larger batch_size, another image_size or another model"
        ) from error
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
    if not isinstance(output, Tensor) or output.shape != (len(images), num_classes):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        expected = (len(images), num_classes)
        raise UserError(f"model {spec}: gives {shape} for {len(images)} images, expected {expected} logits")
