"""Evaluation by a mixture of BatchNorm's own statistics and the test batch's: for nets that meet other images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.given import check_module, shown


@contextmanager
def batch_statistics(model: nn.Module, share_of_batch: float = 1.0) -> Iterator[nn.Module]:
    """While entered, BatchNorm layers in evaluation mode normalize by their statistics mixed with the batch's.

    μ = (1 − s) · μ_running + s · μ_batch and σ² = (1 − s) · σ²_running + s · σ²_batch, s the share of the batch, the
    batch's variance the biased one, as in training; γ, β and ε are the layer's. s = 0 is evaluation, s = 1 what
    training mode computes, α-BN what lies between. Nothing moves. Predictions then depend on the
    images beside each one. It is for evaluation only; layers in training mode do as always.

    Args:
        model: with BatchNorm layers of torch's, or of classes that call `F.batch_norm` as torch's do.
        share_of_batch: s, from 0 to 1. Papers and implementations differ in which side their α weighs.

    Yields:
        The same model.

    Raises:
        UserError: no module, no share, or no BatchNorm layer with running statistics.

    Example:
        >>> import torch
        >>> norm, x = nn.BatchNorm1d(3).eval(), 5 + torch.randn(64, 3)
        >>> with batch_statistics(norm, share_of_batch=1.0):
        ...     mean = norm(x).mean().abs().item()
        >>> mean < 1e-6, norm(x).mean().item() > 4
        (True, True)

    Paper: arXiv 2110.04065 (α-BN); arXiv 2006.10963 (test-batch statistics). Checked against torch's batch norm in both
    modes.
    """
    check_module(model)
    number = isinstance(share_of_batch, int | float) and not isinstance(share_of_batch, bool)
    if not number or not 0 <= share_of_batch <= 1:
        raise UserError(f"share_of_batch={shown(share_of_batch)}: expected a number from 0 to 1; pass 0.1")
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        raise UserError(
            f"{type(model).__name__} has no BatchNorm layer with running statistics: expected one that has; nets "
            "without norm layers need no test-time statistics"
        )
    handles = [norm.register_forward_pre_hook(_Mixing(float(share_of_batch))) for norm in norms]
    handles += [norm.register_forward_hook(_put_back, always_call=True) for norm in norms]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


class _Mixing:
    """Puts mixed statistics into a layer before it runs, and remembers its own."""

    def __init__(self, share: float):
        self.share = share

    def __call__(self, norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        if norm.training:
            return
        (x,) = given
        own = norm.running_mean, norm.running_var
        wide = x.detach().to(own[0].dtype)  # type: ignore[union-attr]
        over = [dim for dim in range(x.ndim) if dim != 1]
        mean, variance = wide.mean(over), wide.var(over, correction=0)
        norm.__dict__["_own_statistics"] = own
        norm.running_mean = own[0].lerp(mean, self.share)  # type: ignore[operator,union-attr]
        norm.running_var = own[1].lerp(variance, self.share)  # type: ignore[operator,union-attr]


def _put_back(norm: nn.Module, *_: object) -> None:
    own = norm.__dict__.pop("_own_statistics", None)
    if own is not None:
        norm.running_mean, norm.running_var = own
