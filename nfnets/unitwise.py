"""Unit-wise clipping of gradients: what a unit of a parameter is, its norms, and the factors they give.

A unit is what feeds one output: a row of a linear layer, a filter of a convolution, a whole bias or gain
vector. The rules are DeepMind's (deepmind-research, nfnets/optim.py) in PyTorch's layout; arXiv 2102.06171.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nfnets.errors import UserError

# Private to torch by name only: its own clip_grad_norm_ and optimizers are made of them.
_foreach_mul_: Any = torch._foreach_mul_  # pyright: ignore
_foreach_copy_: Any = torch._foreach_copy_  # pyright: ignore

_FEW = 1 / 4  # share of clipped units below which their rows are scaled one by one
_SMALL = 16_384  # values up to which copying a tensor takes less than a call of its own
_GUARD = 1e-6  # of the division by a gradient's norm, as in DeepMind's code

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Units(NamedTuple):
    """How a tensor falls into units."""

    dims: tuple[int, ...]  # reduced by the norm; () means all: the tensor is one unit
    groups: int = 1  # dim 0 is split into (groups, rest) before

    def split(self, tensor: Tensor) -> Tensor:
        return tensor if self.groups == 1 else tensor.unflatten(0, (self.groups, -1))


@lru_cache(maxsize=4096)
def units_of(shape: Sequence[int], groups: int | None = None) -> Units:
    """The units of a parameter by its shape.

    Args:
        shape: of the parameter.
        groups: of the transposed convolution whose weight (in, out/groups, *kernel) it is; None for anything else.

    Returns:
        At most one dimension longer than 1: the whole tensor. A transposed weight: per (group, out/groups). Else
        per index of dimension 0: (out, in) of a linear, (out, in/groups, *kernel) of a convolution, a row of an
        embedding.

    Example:
        >>> units_of((64,)).dims, units_of((64, 1, 1, 1)).dims, units_of((64, 3, 7, 7)).dims
        ((), (), (1, 2, 3))
        >>> units_of((8, 4, 3, 3), groups=2)
        Units(dims=(1, 3, 4), groups=2)
    """
    if sum(n != 1 for n in shape) <= 1:
        return Units(())
    if groups is None:
        return Units(tuple(range(1, len(shape))))
    if groups == 1:
        return Units((0, *range(2, len(shape))))
    return Units((1, *range(3, len(shape) + 1)), groups)


def module_units(model: nn.Module) -> dict[int, Units]:
    """Units, by `id` of the parameter, where the module's type decides them: transposed convolutions."""
    return {
        id(p): units_of(p.shape, module.groups)
        for module in model.modules()
        if isinstance(module, _TRANSPOSED)
        for p in module.parameters()  # with those of its parametrizations
        if p.ndim == module.weight.ndim
    }


class Spec(NamedTuple):
    """All that clipping needs to know of a parameter but its values."""

    shape: torch.Size
    local: torch.Size  # of this rank's shard
    dtype: torch.dtype
    device: torch.device
    units: Units
    placements: tuple[Any, ...]  # of a DTensor, one for each dimension of its mesh
    mesh: Any

    @property
    def stack(self) -> tuple[int, ...] | None:
        """Same for all small tensors whose units can be read as one tensor's; None for one to be read by itself."""
        if (
            self.local.numel() > _SMALL
            or self.units.dims != tuple(range(1, len(self.local)))[: len(self.units.dims)]
        ):
            return None
        return (-1, *(self.local[1:] if self.units.dims else self.local))

    def shard_groups(self, reduced: bool) -> list[Any]:
        """Process groups that hold the parts of one unit (reduced) or different units (not)."""
        groups = []
        for mesh_dim, placement in enumerate(self.placements):
            dim = getattr(placement, "dim", None)
            if dim is not None:
                within = not self.units.dims or dim + (self.units.groups > 1) in self.units.dims
                if within == reduced:
                    groups.append(self.mesh.get_group(mesh_dim))
        return groups


def plan_of(params: Sequence[Tensor], units: Mapping[int, Units] | None = None) -> ClippingPlan:
    """What clipping parameters like these takes, worked out once for every set of shapes, dtypes and devices.

    Args:
        params: parameters that have a gradient.
        units: of those whose units do not follow from their shape, by `id` (see `module_units`).

    Raises:
        UserError: a parameter that is not floating point, uninitialized, or sharded in a way whose units cannot be
            put together.
    """
    special = units or {}
    return _plan_of(tuple(_spec(p, special.get(id(p))) for p in params))


@lru_cache(maxsize=64)
def _plan_of(specs: tuple[Spec, ...]) -> ClippingPlan:
    return ClippingPlan(specs)


class ClippingPlan:
    """How to clip a list of parameters: in buckets of one device and dtype."""

    def __init__(self, specs: tuple[Spec, ...]) -> None:
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, spec in enumerate(specs):
            _check(spec)
            kinds.setdefault((spec.device, spec.dtype), []).append(i)
        device = specs[0].device
        self._buckets: list[tuple[list[int], Tensor, _Bucket]] = []
        for members in kinds.values():
            # Those that are one unit first; what is read together side by side.
            members.sort(key=lambda i: (bool(specs[i].units.dims), specs[i].stack or (i,)))
            bucket = _Bucket([specs[i] for i in members])
            self._buckets.append((members, torch.tensor(members, device=device), bucket))
        self._sharded = any(spec.placements for spec in specs)
        self._kind = [(spec.shape, spec.dtype) for spec in specs]
        # Units of each parameter, over all ranks.
        self.totals = torch.tensor([_norm_shape(s.shape, s.units).numel() for s in specs], device=device)

    def fits(self, params: Sequence[Tensor]) -> bool:
        """Whether these parameters, those that it was made of, still are what they were."""
        kind = [(p.shape, p.dtype) for p in params]
        return kind == self._kind and params[0].device == self.totals.device

    @torch.no_grad()
    def clip(
        self,
        params: Sequence[Tensor],
        clipping: float,
        eps: float,
        grad_scale: Tensor | None = None,
        sync: bool | None = None,
    ) -> Tensor:
        """Scale the gradients in place.

        G_i ← G_i · λ · max(‖W_i‖, ε) / ‖G_i‖  where  ‖G_i‖ > λ · max(‖W_i‖, ε)

        Args:
            params: those that the plan was made of, each with a gradient.
            clipping: λ.
            eps: ε, the floor of a unit's norm.
            grad_scale: what the gradients still are multiplied by (0-dim), if anything.
            sync: whether to read on the host which gradients to write; by default only where that costs nothing.

        Returns:
            Per parameter the units clipped and the units not finite (left as they are): (n, 2), on device.
        """
        grads: list[Tensor] = []
        for p in params:
            grad = p.grad
            if grad is None or grad.layout is not torch.strided:
                raise UserError(
                    f"gradient of a parameter of shape {tuple(p.shape)}: expected a dense tensor, got "
                    f"{'none' if grad is None else grad.layout}; use dense gradients (Embedding(sparse=False))"
                )
            grads.append(grad)
        weights = list(params)
        if self._sharded:
            weights, grads = [_local(p.detach()) for p in weights], [_local(grad) for grad in grads]
        found = torch.zeros(len(grads), 2, dtype=torch.int64, device=self.totals.device)
        for members, index, bucket in self._buckets:
            on_host = bucket.device.type == "cpu" if sync is None else sync
            counts = bucket.clip(
                [weights[i] for i in members], [grads[i] for i in members], clipping, eps, grad_scale, on_host
            )
            if counts is not None:
                found[index] = counts.to(found.device, non_blocking=True)
        return found


class _Bucket:
    """Parameters of one device and dtype, those that are one unit first."""

    def __init__(self, specs: list[Spec]) -> None:
        self.units = [spec.units for spec in specs]
        self.whole = sum(not units.dims for units in self.units)
        self.device, dtype = specs[0].device, specs[0].dtype
        self.norm_dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        self.shapes = [_norm_shape(spec.local, spec.units) for spec in specs]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.owner = self._repeat(self.sizes)  # of a unit: the number of its parameter here
        self.lengths = [spec.local.numel() for spec in specs[: self.whole]]
        self.scatter = self._repeat(self.lengths)
        self.stacks = self._stacks(specs)
        self.places = self._places()
        self.partial = self._by_group(specs, self.owner, reduced=True)
        self.counted = self._by_group(specs, torch.arange(len(specs), device=self.device), reduced=False)

    def _repeat(self, sizes: list[int]) -> Tensor:
        count = torch.tensor(sizes, dtype=torch.int64, device=self.device)
        return torch.arange(len(sizes), device=self.device).repeat_interleave(count)

    def _stacks(self, specs: list[Spec]) -> list[tuple[int, int, Units]]:
        """(first, last + 1, units) of parameters that are read together."""
        found: list[tuple[int, int, Units]] = []
        for i, spec in enumerate(specs):
            if (
                i
                and spec.stack is not None
                and specs[i - 1].stack == spec.stack
                and specs[i - 1].units == spec.units
            ):
                found[-1] = (found[-1][0], i + 1, spec.units)
            else:
                found.append((i, i + 1, spec.units))
        return found

    def _places(self) -> Tensor:
        """Where the norms of weights (first row) and gradients are, if each stack's follow one another."""
        weights: list[int] = []
        grads: list[int] = []
        for first, last, _ in self.stacks:
            count, at = sum(self.sizes[first:last]), len(weights) + len(grads)
            weights += range(at, at + count)
            grads += range(at + count, at + 2 * count)
        return torch.tensor([weights, grads], dtype=torch.int64, device=self.device)

    def _by_group(self, specs: list[Spec], owner: Tensor, reduced: bool) -> list[tuple[Any, Tensor]]:
        """(process group, entries of `owner` whose parameter must be summed over it)."""
        found: dict[Any, list[int]] = {}
        for i, spec in enumerate(specs):
            for group in spec.shard_groups(reduced):
                found.setdefault(group, []).append(i)
        return [
            (group, torch.isin(owner, torch.tensor(numbers, device=self.device)).nonzero().squeeze(1))
            for group, numbers in found.items()
        ]

    def norms(self, weights: list[Tensor], grads: list[Tensor]) -> Tensor:
        """Norm of every unit of this rank, parameter after parameter: (2, units), of weights and gradients."""
        found: list[Tensor] = []
        for first, last, units in self.stacks:
            if last - first > 1:
                members = weights[first:last] + grads[first:last]
                together = torch.cat(members) if units.dims else torch.stack(members).view(len(members), -1)
                found.append(torch.linalg.vector_norm(together, 2, units.dims or (1,), dtype=self.norm_dtype))
            else:
                for tensor in (weights[first], grads[first]):
                    norm = torch.linalg.vector_norm(units.split(tensor), 2, units.dims, dtype=self.norm_dtype)
                    found.append(norm.view(-1))
        return torch.cat(found)[self.places]

    def clip(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        clipping: float,
        eps: float,
        grad_scale: Tensor | None,
        on_host: bool,
    ) -> Tensor | None:
        """Scale the gradients; per parameter the units clipped and those not finite, (n, 2); None where none are."""
        norms = self.norms(weights, grads)
        for group, index in self.partial:
            squares = norms[:, index].square()
            torch.distributed.all_reduce(squares, group=group)
            norms[:, index] = squares.sqrt()
        weight, grad = norms
        if grad_scale is not None:
            grad = grad / grad_scale.to(self.device)
        limit = weight.clamp(min=eps).mul_(clipping)
        # NaN, of an infinite norm and limit, too, is not ≤ 0.
        if on_host and not self.counted and (grad - limit).max().item() <= 0:
            return None
        finite = grad.isfinite()
        # Infinity times a factor of 0 would be NaN, and hide from a gradient scaler what it must see.
        clipped = (grad > limit).logical_and_(finite)
        factor = torch.where(clipped, limit / grad.clamp(min=_GUARD), 1)
        counts = torch.zeros(len(grads), 2, dtype=torch.int64, device=self.device)
        counts.index_add_(0, self.owner, torch.stack([clipped, ~finite], 1).long())
        if on_host:
            self._scale_some(grads, factor, counts[:, 0].tolist())
        else:
            self._scale_all(grads, factor)
        for group, index in self.counted:
            part = counts[index]
            torch.distributed.all_reduce(part, group=group)
            counts[index] = part
        return counts

    def _scale_some(self, grads: list[Tensor], factor: Tensor, clipped: list[int]) -> None:
        # Where reading a count costs nothing, what is not clipped need not be written.
        parts = zip(grads, self.units, self.shapes, factor.split(self.sizes), clipped, strict=True)
        for grad, units, shape, part, some in parts:
            by_row = units.groups == 1 and 0 not in units.dims
            if by_row and 0 < some < _FEW * len(part):
                rows = (part < 1).nonzero().view(-1)
                few = grad.index_select(0, rows).mul_(part[rows].view(-1, *shape[1:]))
                grad.index_copy_(0, rows, few)
            elif some:
                units.split(grad).mul_(part.view(shape))

    def _scale_all(self, grads: list[Tensor], factor: Tensor) -> None:
        # A factor of 1 leaves every bit as it is.
        if whole := grads[: self.whole]:
            # In one piece: a launch for every bias and gain would cost more than all the convolutions.
            flat = torch.cat([g.reshape(-1) for g in whole]) * factor[self.scatter]
            pieces = zip(flat.split(self.lengths), whole, strict=True)
            _foreach_copy_(whole, [piece.view_as(g) for piece, g in pieces])
        if rest := range(self.whole, len(grads)):
            parts = factor.split(self.sizes)
            _foreach_mul_(
                [self.units[i].split(grads[i]) for i in rest], [parts[i].view(self.shapes[i]) for i in rest]
            )


def _spec(p: Tensor, units: Units | None) -> Spec:
    if nn.parameter.is_lazy(p):
        raise UserError(
            "a lazy parameter without a shape: expected an initialized model; run one forward first"
        )
    shape, placements = p.shape, getattr(p, "placements", ())
    local = _local(p.detach()) if placements else p
    mesh = p.device_mesh if placements else None  # pyright: ignore
    return Spec(shape, local.shape, p.dtype, local.device, units or units_of(shape), placements, mesh)


def _check(spec: Spec) -> None:
    if not spec.dtype.is_floating_point:
        raise UserError(
            f"a parameter of dtype {spec.dtype} and shape {tuple(spec.shape)}: expected floating point; leave it out"
        )
    for placement in spec.placements:
        if placement.is_partial() or (getattr(placement, "dim", None) == 0 and spec.units.groups > 1):
            raise UserError(
                f"a parameter of shape {tuple(spec.shape)} placed as {placement}: expected units that lie within "
                "shards or are sums over them; exclude it, or shard it along another dimension"
            )


def _local(tensor: Tensor) -> Tensor:
    # A DTensor's shard; told by its attribute because importing the class takes a second that most do not need.
    return tensor.to_local() if hasattr(tensor, "placements") else tensor  # pyright: ignore


def _norm_shape(shape: torch.Size, units: Units) -> torch.Size:
    """Shape of the norms in `units.split(tensor)`, reduced dimensions kept as 1."""
    if not units.dims:
        return torch.Size([1] * len(shape))
    if units.groups > 1:
        shape = torch.Size([units.groups, shape[0] // units.groups, *shape[1:]])
    return torch.Size(1 if i in units.dims else n for i, n in enumerate(shape))
