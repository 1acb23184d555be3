"""`online`: Online Normalization, by statistics of the samples before; batches of one have it as good as large ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nfnets.convert.fused import after, like
from nfnets.convert.methods.base import Method, register
from nfnets.convert.methods.parts import carry_affine, channels_of
from nfnets.convert.methods.rows import site_row
from nfnets.convert.net import Net
from nfnets.convert.own_norm import eps_of, is_frozen
from nfnets.convert.plan import Change, Edit
from nfnets.errors import UserError

Bound = Literal["clamp", "scale", "none"]


def followed(start: Tensor, decay: Tensor, added: Tensor) -> Tensor:
    """All states of s ← decay_t · s + added_t, from the start on, without a loop over t.

    Neighbors are joined, then pairs, then fours: log₂(T) steps, exact whatever the decays are.

    Args:
        start: (C,), what s is at first.
        decay: (T, C).
        added: (T, C).

    Returns:
        (T + 1, C): s before each step, and after the last.

    Example:
        >>> followed(torch.ones(1), torch.full((3, 1), 0.5), torch.ones(3, 1)).flatten()
        tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    state = torch.cat([start[None], added])
    factor = torch.cat([torch.zeros_like(start)[None], decay])
    reach = 1
    while reach < len(state):
        joined = state[reach:] + factor[reach:] * state[:-reach]
        factor = torch.cat([factor[:reach], factor[reach:] * factor[:-reach]])
        state = torch.cat([state[:reach], joined])
        reach *= 2
    return state


class _Online(torch.autograd.Function):
    """(x − μ_t)/√(σ²_t + ε), and the controlled gradient; both move the streams on."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        statistics: tuple[Tensor, Tensor],
        control: tuple[Tensor, Tensor],
        *own: float,
    ) -> Tensor:
        kept, ctx.kept, eps = own
        wide = torch.promote_types(input.dtype, torch.float32)
        positions = math.prod(input.shape[2:])
        x = input.detach().to(wide).reshape(*input.shape[:2], positions)
        variances, means = torch.var_mean(x, 2, correction=0)
        decay = torch.full_like(means, kept)
        mean = followed(statistics[0].to(wide), decay, (1 - kept) * means)
        apart = variances + kept * (means - mean[:-1]).square()
        variance = followed(statistics[1].to(wide), decay, (1 - kept) * apart)
        multiplier = (variance[:-1] + eps).rsqrt()
        y = (x - mean[:-1, :, None]) * multiplier[:, :, None]
        statistics[0].copy_(mean[-1])
        statistics[1].copy_(variance[-1])
        ctx.control = control
        ctx.save_for_backward(y, multiplier)
        return y.view(input.shape).to(input.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # type: ignore[override]
        (gradient,) = grad_outputs
        (along_output, along_mean), (y, multiplier) = ctx.control, ctx.saved_tensors
        g, free = gradient.to(y.dtype).reshape(y.shape), 1 - ctx.kept
        decay = 1 - free * y.square().mean(2)
        v = followed(along_output.to(y.dtype), decay, (g * y).mean(2))
        g = (g - free * v[:-1, :, None] * y) * multiplier[:, :, None]
        u = followed(along_mean.to(y.dtype), torch.full_like(decay, ctx.kept), g.mean(2))
        g = g - free * u[:-1, :, None]
        along_output.copy_(v[-1])
        along_mean.copy_(u[-1])
        return g.view(gradient.shape).to(gradient.dtype), None, None, None, None, None


# They branch on shapes, so torch.fx records a call of each and does not look inside.
torch.fx.wrap("_online")
torch.fx.wrap("_bounded")


@torch.compiler.disable  # the backward pass moves buffers, which a compiled graph must not
def _online(
    input: Tensor, statistics: tuple[Tensor, Tensor], control: tuple[Tensor, Tensor], *own: float
) -> Tensor:
    return _Online.apply(input, statistics, control, *own)  # type: ignore[return-value]


def _bounded(y: Tensor, weight: Tensor | None, bias: Tensor | None, bound: Bound, eps: float) -> Tensor:
    """γ and β, then what keeps outputs small; in y's type, as BatchNorm's are."""
    out, shape = y, (1, -1) + (1,) * (y.ndim - 2)
    if weight is not None:
        out = out * weight.view(shape)
    if bias is not None:
        out = out + bias.view(shape)
    if bound == "clamp":
        out = out.clamp(-5, 5)
    elif bound == "scale":
        square = out.square().flatten(1).mean(1).add(eps).rsqrt()
        out = out * square.view(-1, *(1,) * (y.ndim - 1))
    return out.to(y.dtype)


class OnlineNorm(nn.Module):
    """Normalization by a running mean and variance that each sample moves after it was normalized.

    In training, for sample t and each channel, with m and s² the sample's own mean and variance over positions:
    y = (x − μ)/√(σ² + ε), then σ² ← a·σ² + (1−a)·s² + a(1−a)(m − μ)² and μ ← a·μ + (1−a)·m. The gradient g is kept
    orthogonal to y and to the constants over time: g' = g − (1−b)·v·y, v ← v + mean(g'·y); h = g'/√(σ² + ε),
    dx = h − (1−b)·u, u ← u + mean(dx). Then γ and β, then what bounds the output, for the statistics lag behind.
    In evaluation mode μ and σ² stand still. All four streams are buffers and travel with the `state_dict`.

    Samples are coupled over time: the order of the batch matters, and gradients reach later samples through the
    streams. Batches of any size give the same in sequence. Each process of `torch.distributed` follows its own samples,
    and `DistributedDataParallel` hands the first one's buffers to all; compiled models run it between two graphs.
    Gradient checkpoints would run it twice.

    Args:
        num_features: channels.
        forward_decay: a.
        backward_decay: b.
        bound: "clamp" to ±5, as the authors' code does; "scale" by 1/√(mean(x²) + ε) of each sample, the paper's layer
            scaling; or "none".
        eps: ε.
        affine: whether there are γ and β.

    Example:
        >>> layer, x = OnlineNorm(3), 4 + torch.randn(2000, 3, 4, 4)
        >>> layer(x)[-500:].mean().abs().item() < 1, layer.mean.shape
        (True, torch.Size([3]))

    Paper: arXiv 1905.05894. Checked against a plain NumPy loop over samples, forward and backward.
    """

    couples = "samples over time"
    mean: Tensor
    var: Tensor
    along_output: Tensor
    along_mean: Tensor
    bound: Bound

    def __init__(
        self,
        num_features: int,
        forward_decay: float = 0.999,
        backward_decay: float = 0.99,
        bound: Bound = "clamp",
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        for name, decay in (("forward_decay", forward_decay), ("backward_decay", backward_decay)):
            if not 0 <= decay < 1:
                raise UserError(
                    f"{name}={decay}: expected a number from 0 to below 1; pass one such as {name}=0.99"
                )
        if bound not in ("clamp", "scale", "none"):
            raise UserError(f"bound={bound!r}: expected 'clamp', 'scale' or 'none'; pass bound='clamp'")
        at: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_features, self.eps, self.bound = num_features, eps, bound
        self.forward_decay, self.backward_decay = forward_decay, backward_decay
        self.weight = nn.Parameter(torch.ones(num_features, **at)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, **at)) if affine else None
        self.register_buffer("mean", torch.zeros(num_features, **at))
        self.register_buffer("var", torch.ones(num_features, **at))
        self.register_buffer("along_output", torch.zeros(num_features, **at))
        self.register_buffer("along_mean", torch.zeros(num_features, **at))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            own = self.forward_decay, self.backward_decay, self.eps
            statistics, control = (self.mean, self.var), (self.along_output, self.along_mean)
            y: Tensor = _online(input, statistics, control, *own)  # type: ignore[call-arg]
        else:
            y = F.batch_norm(input, self.mean, self.var, eps=self.eps)
        return _bounded(y, self.weight, self.bias, self.bound, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, forward_decay={self.forward_decay}, backward_decay={self.backward_decay}, "
            f"bound={self.bound!r}, eps={self.eps}, affine={self.weight is not None}"
        )


@register
@dataclass
class Online(Method):
    """Online Normalization in every norm layer's place: BatchNorm's normalization without a batch.

    y = (x − μ)/√(σ² + ε) by statistics of the samples before, and a gradient that is controlled by what came before;
    `OnlineNorm` says how. γ, β and ε are the norm layer's; the statistics start at 0 and 1, as published. Training
    couples samples over time, which `nfnets.verify.batch_independence` says too. Frozen norm layers are left.

    Args:
        forward_decay: of the statistics, a sample.
        backward_decay: of what controls the gradient, a sample.
        bound: what keeps outputs small while the statistics lag: "clamp" to ±5, "scale" each sample, or "none".

    Paper: arXiv 1905.05894. Checked against a plain NumPy loop over samples, forward and backward.
    """

    name = "online"
    forward_decay: float = 0.999
    backward_decay: float = 0.99
    bound: Bound = "clamp"

    def __post_init__(self) -> None:
        OnlineNorm(
            1, self.forward_decay, self.backward_decay, self.bound
        )  # which refuses what it cannot take

    def decide(self, net: Net) -> Iterator[Change]:
        for site in net.sites:
            if is_frozen(net.graph, site):
                yield site_row(site, "leave", "", "frozen: it never reads the batch")
                continue
            why = "statistics of the samples before: couples samples over time"
            yield site_row(site, "replace", "OnlineNorm", why, Edit(site.path, self._build))

    def _build(self, norm: nn.Module) -> nn.Module:
        own = self.forward_decay, self.backward_decay, self.bound
        new = OnlineNorm(channels_of(norm), *own, eps=eps_of(norm), affine=False, **like(norm))
        carry_affine(norm, new)
        return after(norm, new)
