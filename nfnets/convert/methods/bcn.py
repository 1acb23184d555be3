"""`bcn`: batch-channel normalization, by the batch or by estimates and then by groups, with standardized weights."""

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
from nfnets.convert.methods.gn import beside_standardized
from nfnets.convert.methods.parts import carry_affine, channels_of, learns
from nfnets.convert.methods.rows import groups_or_reason, site_row
from nfnets.convert.net import Net
from nfnets.convert.own_norm import eps_of, is_frozen
from nfnets.convert.plan import Change, Edit
from nfnets.errors import UserError
from nfnets.given import counted
from nfnets.structure.sites import Site


class BatchChannelNorm(nn.Module):
    """Normalization of each channel over the batch, then of each sample's groups of channels.

    Stage 1: z = γ (x − μ)/√(σ² + ε) + β. Without `estimate` μ and σ² are the batch's in training, as BatchNorm's, for
    large batches. With it they are running estimates in training too, without gradients, for small ones:
    σ² ← (1−r)σ² + r·mean((x − μ)²), μ ← (1−r)μ + r·mean(x), then z. Stage 2: each group of a sample's channels to mean
    0 and variance 1, then one scale and one shift for the group.

    Each process of `torch.distributed` goes by its own part of the batch.

    Args:
        num_features: channels.
        num_groups: groups of channels in stage 2.
        estimate: which stage 1.
        rate: r, or BatchNorm's momentum. The authors' code starts estimates at r = 0 and raises it by a schedule: set
            the attribute to do so.
        eps: ε of both stages.
        affine: whether stage 1 has γ and β.

    Example:
        >>> layer = BatchChannelNorm(8, num_groups=4, estimate=True)
        >>> out = layer(3 + torch.randn(2, 8, 5, 5)).detach()
        >>> out.view(2, 4, -1).mean(2).abs().max().item() < 1e-5
        True

    Paper: arXiv 1911.09738. Checked against torch's batch norm and group norm in a row, and a NumPy loop.
    """

    mean: Tensor
    var: Tensor

    def __init__(
        self,
        num_features: int,
        num_groups: int = 32,
        estimate: bool = False,
        rate: float = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        if num_groups < 1 or num_features % num_groups:
            raise UserError(
                f"num_groups={num_groups}: expected a divisor of {num_features} channels; pass num_groups=1"
            )
        if not 0 <= rate <= 1:
            raise UserError(f"rate={rate}: expected a number from 0 to 1; pass rate=0.1")
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_features, self.num_groups, self.estimate = num_features, num_groups, estimate
        self.rate, self.eps = rate, eps
        self.weight = nn.Parameter(torch.ones(num_features, **at)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, **at)) if affine else None
        self.group_weight = nn.Parameter(torch.ones(num_groups, **at))
        self.group_bias = nn.Parameter(torch.zeros(num_groups, **at))
        self.register_buffer("mean", torch.zeros(num_features, **at))
        self.register_buffer("var", torch.ones(num_features, **at))

    @property
    def couples(self) -> str:
        """What training couples."""
        return "the batch, and samples over time" if self.estimate else "the batch"

    def forward(self, input: Tensor) -> Tensor:
        if self.estimate and self.training:
            self._follow(input.detach())
        batch = self.training and not self.estimate
        own = self.mean, self.var, self.weight, self.bias
        if self.estimate and self.training:
            own = self.mean.clone(), self.var.clone(), *own[2:]  # the next batch moves the buffers
        z = F.batch_norm(input, *own, batch, self.rate, self.eps)
        each = self.num_features // self.num_groups
        scale, shift = (t.repeat_interleave(each) for t in (self.group_weight, self.group_bias))
        return F.group_norm(z, self.num_groups, scale, shift, self.eps)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        over, shape = (0, *range(2, x.ndim)), (1, -1) + (1,) * (x.ndim - 2)
        if x.numel() == 0:
            return
        x = x.to(torch.promote_types(x.dtype, self.mean.dtype))
        square = (x - self.mean.view(shape)).square().mean(over)  # by the mean before it moves
        self.var.lerp_(square.to(self.var.dtype), self.rate)
        self.mean.lerp_(x.mean(over).to(self.mean.dtype), self.rate)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, num_groups={self.num_groups}, estimate={self.estimate}, rate={self.rate}, "
            f"eps={self.eps}, affine={self.weight is not None}"
        )


@register
@dataclass
class BCN(Method):
    """Batch-channel normalization in every norm layer's place, and standardized weights in front of it.

    `BatchChannelNorm`, stage 1 with the norm layer's γ, β, ε and momentum, stage 2 over groups as `gn` chooses them;
    the layers that it reads are standardized as by `ws_gn`. Training couples samples: within the batch, or by running
    estimates over time, which `nfnets.verify.batch_independence` says too. Frozen norm layers are left.

    Args:
        estimate: whether stage 1 uses running estimates in training too, for batches of a few samples, or the batch's
            statistics.
        num_groups: groups in every layer; None as for `gn`.
        rate: by which estimates or running statistics move a batch. None for the norm layer's momentum.

    Paper: arXiv 1911.09738. Checked against torch's batch norm and group norm in a row, and a NumPy loop.
    """

    name = "bcn"
    estimate: bool = False
    num_groups: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if self.num_groups is not None and self.num_groups < 1:
            raise UserError(f"num_groups={self.num_groups}: expected 1 or more; pass num_groups=32")
        if self.rate is not None and not 0 <= self.rate <= 1:
            raise UserError(f"rate={self.rate}: expected a number from 0 to 1; pass rate=0.1")

    def decide(self, net: Net) -> Iterator[Change]:
        yield from beside_standardized(net, lambda site, *more: self._change(net, site, *more))

    def _change(self, net: Net, site: Site, edits: tuple[Edit, ...], note: str) -> Change:
        if is_frozen(net.graph, site):
            return site_row(site, "leave", "", "frozen: it never reads the batch")
        groups = groups_or_reason(net.graph, site, self.num_groups)
        if isinstance(groups, str):
            return site_row(site, "refuse", "", groups)
        what = "running estimates, then" if self.estimate else "the batch's statistics, then"
        over = "the batch and samples over time" if self.estimate else "the batch"
        why = f"{what} {counted(groups, 'group')} of {channels_of(site.norm) // groups}: couples {over}{note}"
        build = partial(self._build, groups)
        return site_row(site, "replace", "BatchChannelNorm", why, *edits, Edit(site.path, build))

    def _build(self, groups: int, norm: nn.Module) -> nn.Module:
        own = getattr(norm, "momentum", None)
        rate = self.rate if self.rate is not None else 0.1 if own is None else own
        new = BatchChannelNorm(
            channels_of(norm), groups, self.estimate, rate, eps_of(norm), affine=False, **like(norm)
        )
        carry_affine(norm, new)
        new.group_weight.requires_grad_(learns(norm, "weight"))
        new.group_bias.requires_grad_(learns(norm, "bias"))
        return after(norm, new)
