"""`ghost_bn`: BatchNorm that sees small batches however large the batch is; a baseline, not norm-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets.convert.fused import after, like
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import carry_affine, channels_of
from nfnets.convert.methods.rows import site_row
from nfnets.convert.net import Net
from nfnets.convert.own_norm import eps_of, is_frozen, statistics_of
from nfnets.convert.plan import Change, Edit
from nfnets.errors import UserError
from nfnets.structure.sites import Site
from nfnets.trace import Graph


class GhostBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over chunks of the batch: in training, y = (x − mean_chunk) / √(var_chunk + ε) · γ + β.

    Chunks are consecutive samples, at most `size`, as even as possible: 33 samples at size 32 are chunks of 17 and
    16. None holds a single sample, unless the batch does or `size` is 1. Running statistics move once a batch, by
    `momentum`, to the mean of the chunks' means and variances, weighted by their samples. In evaluation mode this
    is BatchNorm.

    Args:
        num_features: channels.
        size: samples a chunk, at most.
        eps, momentum, affine, track_running_stats: as `nn.BatchNorm2d`.

    Example:
        >>> GhostBatchNorm(3, size=2)(torch.randn(4, 3, 8, 8)).view(2, -1).mean(1).abs().max() < 1e-6
        tensor(True)

    Paper: arXiv 1705.08741. Checked against torch's batch norm on each chunk, as Composer's tests do; Composer
    divides the momentum by the number of chunks and updates once a chunk, which decays slightly less.
    """

    def __init__(self, num_features: int, size: int = 32, **kwargs: Any):
        super().__init__(num_features, **kwargs)
        if size < 1:
            raise UserError(f"size={size}: expected 1 sample a chunk or more; pass size=32")
        self.size = size

    def forward(self, input: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        outputs, means, variances, shares = [], [], [], []
        for chunk in torch.tensor_split(input, self.chunks(len(input))):
            # At momentum 1 torch writes the chunk's own mean and (unbiased) variance.
            mean = var = None
            if self.running_mean is not None and self.running_var is not None:
                mean, var = torch.empty_like(self.running_mean), torch.empty_like(self.running_var)
                means.append(mean.zero_())
                variances.append(var.zero_())
                shares.append(len(chunk) / len(input))
            outputs.append(F.batch_norm(chunk, mean, var, self.weight, self.bias, True, 1.0, self.eps))
        if means and self.training:
            self._track(means, variances, shares)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def chunks(self, samples: int) -> int:
        """Into how many chunks a batch is split."""
        most = samples if self.size == 1 else samples // 2
        return max(1, min(-(-samples // self.size), most))

    @torch.no_grad()
    def _track(self, means: list[Tensor], variances: list[Tensor], shares: list[float]) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        momentum: Any = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1 / self.num_batches_tracked.to(self.running_mean)
        for running, seen in ((self.running_mean, means), (self.running_var, variances)):
            mean = sum(share * statistic for share, statistic in zip(shares, seen, strict=True))
            running.lerp_(mean, momentum)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, size={self.size}"


@register
@dataclass
class GhostBN(Method):
    """BatchNorm over chunks of `size` samples: what the noise of small batches is worth at a large one.

    γ, β, ε, momentum and running statistics are the norm layer's. Frozen norm layers, which never read the batch,
    are left.

    Args:
        size: samples a chunk, at most.

    Paper: arXiv 1705.08741. Checked against torch's batch norm on each chunk.
    """

    name = "ghost_bn"
    size: int = 32

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"size={self.size}: expected 1 sample a chunk or more; pass size=32")

    def decide(self, net: Net) -> Iterator[Change]:
        for site in net.sites:
            yield self._change(net.graph, site)

    def _change(self, graph: Graph, site: Site) -> Change:
        if isinstance(site.norm, GhostBatchNorm) and site.norm.size == self.size:
            return site_row(site, "leave", "", f"it already sees chunks of {self.size}")
        if is_frozen(graph, site):
            return site_row(site, "leave", "", "frozen: it never reads the batch")
        edit = Edit(site.path, partial(_ghost, self.size))
        return site_row(site, "replace", "GhostBatchNorm", f"chunks of {self.size}", edit)


def _ghost(size: int, norm: Any) -> nn.Module:
    new = GhostBatchNorm(
        channels_of(norm),
        size,
        eps=eps_of(norm),
        momentum=getattr(norm, "momentum", 0.1),
        affine=False,
        track_running_stats=norm.running_mean is not None,
        **like(norm),
    )
    carry_affine(norm, new)
    new.affine = new.weight is not None
    if norm.running_mean is not None:
        new.running_mean, new.running_var = statistics_of(norm)
        new.num_batches_tracked = getattr(norm, "num_batches_tracked", new.num_batches_tracked)
    return after(norm, new)
