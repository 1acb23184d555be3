"""The optimizer of a configuration: its parameter groups, its rates, what it does to gradients first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nfnets.attached import attach
from nfnets.errors import UserError, unknown
from nfnets.parameter_groups import param_groups
from nfnets.train.config import RunConfig


class Optimizer:
    """SGD, AdamW or any of timm's optimizers over `nfnets.param_groups`, with AGC where it is configured.

    `sgd` and `adamw` are torch's fused implementations, which take a sixth of the plain loop's time on a CPU and a
    quarter of foreach's. Any other name is built by timm's factory with the same parameter groups.

    Args:
        model: whose parameters are trained.
        config: `optimizer`, `optimizer_options`, `lr`, `momentum`, `nesterov`, `weight_decay`, `clipping`,
            `clipping_eps`, `clipping_head` and `centralization` are read.

    Raises:
        UserError: for an unknown optimizer (with near matches), options that it does not take, or one that cannot
            be used here.

    Example:
        >>> optimizer = Optimizer(nn.Linear(2, 3), RunConfig.create(clipping=0.1, nesterov=False))
        >>> optimizer.set_lr(0.05)
        >>> [group["lr"] for group in optimizer.torch.param_groups]
        [0.05, 0.05]
        >>> type(Optimizer(nn.Linear(2, 3), RunConfig.create(optimizer="lamb")).torch).__name__
        'Lamb'
    """

    def __init__(self, model: nn.Module, config: RunConfig) -> None:
        groups = param_groups(model, config.lr, config.weight_decay)
        # Fixup's scalars learn at a tenth of the rate: the schedule must keep every group's share.
        self._shares = [group["lr"] / config.lr for group in groups]
        self.torch = _build(groups, config)
        # Lookahead runs no hooks of its own.
        stepped = getattr(self.torch, "_base_optimizer", self.torch)
        # The batch size is the whole job's, and what follows from it stands in the configuration.
        given = {"head": config.clipping_head, "centralization": config.centralization}
        handle = attach(
            stepped, model, clipping=config.clipping, eps=config.clipping_eps, **given, verbose=False
        )
        self._agc = handle.clipping

    def set_lr(self, lr: float) -> None:
        """The coming step's learning rate."""
        for group, share in zip(self.torch.param_groups, self._shares, strict=True):
            group["lr"] = lr * share

    @property
    def clipped(self) -> Tensor | None:
        """Fraction of units that AGC clipped at the last step, on the device; None where it is off."""
        return None if self._agc is None else self._agc.stats.last


def _build(groups: list[dict[str, Any]], config: RunConfig) -> torch.optim.Optimizer:
    options: dict[str, Any] = dict(config.optimizer_options)
    # Options come from JSON, which has no tuples.
    options |= {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    try:
        if config.optimizer == "sgd":
            return _sgd(groups, config, options)
        if config.optimizer == "adamw":
            given = {"betas": (config.momentum, 0.999), "fused": True}
            return torch.optim.AdamW(groups, lr=config.lr, **{**given, **options})
        return _timm(groups, config, options)
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"optimizer {config.optimizer}: could not be built with {options}: {reason}; "
            "change optimizer_options, or use another"
        ) from error


def _sgd(groups: list[dict[str, Any]], config: RunConfig, options: dict[str, Any]) -> torch.optim.SGD:
    damped = bool(options.get("dampening"))
    given = {"momentum": config.momentum, "nesterov": config.nesterov, "fused": not damped}
    sgd = torch.optim.SGD(groups, lr=config.lr, **{**given, **options})
    if not damped and sgd.defaults["momentum"]:
        # The fused step makes its buffers from uninitialized memory and fills them at its first step; where a
        # gradient scaler lets it skip that step (fp16 often begins with an overflow), garbage would stay in them.
        for group in sgd.param_groups:
            for p in group["params"]:
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p, requires_grad=False)
    return sgd


def _timm(groups: list[dict[str, Any]], config: RunConfig, options: dict[str, Any]) -> torch.optim.Optimizer:
    # Seconds of imports.
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers  # pyright: ignore[reportPrivateImportUsage]

    name = config.optimizer.lower()
    inner = name.removeprefix("lookahead_")
    known = [str(known) for known in list_optimizers()]
    if inner not in known:
        raise unknown("optimizer", config.optimizer, ["sgd", "adamw", *known])
    info = get_optimizer_info(inner)
    if info.second_order:
        raise UserError(
            f"optimizer {config.optimizer}: needs second derivatives, which the loop does not take; use another"
        )
    if not info.has_momentum and config.momentum != type(config).model_fields["momentum"].default:
        raise UserError(
            f"momentum={config.momentum:g}: {config.optimizer} takes none; set its betas in optimizer_options"
        )
    # Every group brings its rate and its decay; the factory's own would decay gains and norms.
    return create_optimizer_v2(
        groups, opt=name, lr=config.lr, weight_decay=0.0, momentum=config.momentum, **options
    )
