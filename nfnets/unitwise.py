"""Unit-wise clipping of gradients: what a unit of a parameter is, its norms, and the factors they give.

A unit is what feeds one output: a row of a linear layer, a filter of a convolution, a whole bias or gain
vector. The rules are DeepMind's (deepmind-research, nfnets/optim.py) in PyTorch's layout; arXiv 2102.06171.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nfnets.errors import UserError

# Private to torch by name only: its own clip_grad_norm_ and optimizers are made of them.
_foreach_norm: Any = torch._foreach_norm  # pyright: ignore
_foreach_mul_: Any = torch._foreach_mul_  # pyright: ignore
_foreach_copy_: Any = torch._foreach_copy_  # pyright: ignore

_GUARD = 1e-6  # of the division by a gradient's norm, as in DeepMind's code

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Units(NamedTuple):
    """How a tensor falls into units."""

    dims: tuple[int, ...]  # reduced by the norm; () means all: the tensor is one unit
    groups: int = 1  # dim 0 is split into (groups, rest) before

    def split(self, tensor: Tensor) -> Tensor:
        return tensor if self.groups == 1 else tensor.unflatten(0, (self.groups, -1))


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


class Plan:
    """What clipping needs to know of a list of parameters, worked out once.

    Args:
        params: parameters, each with a gradient at every `clip`.
        units: of those whose units do not follow from their shape, by `id` (see `module_units`).

    Raises:
        UserError: a parameter that is complex, not floating point, uninitialized, or sharded in a way whose units
            cannot be put together.
    """

    def __init__(self, params: Sequence[Tensor], units: Mapping[int, Units] | None = None) -> None:
        self.params = list(params)
        chosen = [_checked(p, (units or {}).get(id(p))) for p in self.params]
        kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor, Units]]] = {}
        for i, (p, u) in enumerate(zip(self.params, chosen, strict=True)):
            local = _local(p)
            kinds.setdefault((local.device, local.dtype), []).append((i, p, u))
        self.buckets = [_Bucket(members) for members in kinds.values()]
        device = self.buckets[0].device
        # Over all ranks, where a parameter is sharded.
        self.totals = torch.tensor(
            [_norm_shape(p.shape, u).numel() for p, u in zip(self.params, chosen, strict=True)], device=device
        )
        self._order = [torch.tensor(bucket.positions, device=device) for bucket in self.buckets]

    @torch.no_grad()
    def clip(
        self, clipping: float, eps: float, grad_scale: Tensor | None = None, sync: bool | None = None
    ) -> Tensor:
        """Scale the gradients in place.

        G_i ← G_i · λ · max(‖W_i‖, ε) / ‖G_i‖  where  ‖G_i‖ > λ · max(‖W_i‖, ε)

        Args:
            clipping: λ.
            eps: ε, the floor of a unit's norm.
            grad_scale: what the gradients still are multiplied by (0-dim), if anything.
            sync: whether to read on the host which parameters to write; by default only where that costs nothing.

        Returns:
            Per parameter the units clipped and the units not finite (left as they are): (n, 2), on device.
        """
        for p in self.params:
            if p.grad is None or p.grad.layout is not torch.strided:
                raise UserError(
                    f"gradient of a parameter of shape {tuple(p.shape)}: expected a dense tensor, got "
                    f"{'none' if p.grad is None else p.grad.layout}; use dense gradients (Embedding(sparse=False))"
                )
        found = torch.empty(len(self.params), 2, dtype=torch.int64, device=self.totals.device)
        for bucket, order in zip(self.buckets, self._order, strict=True):
            on_host = bucket.device.type == "cpu" if sync is None else sync
            counts = bucket.clip(clipping, eps, grad_scale, on_host)
            found[order] = counts.to(found.device, non_blocking=True)
        return found


class _Bucket:
    """Parameters of one device and dtype, those that are one unit first."""

    def __init__(self, members: list[tuple[int, Tensor, Units]]) -> None:
        members = sorted(members, key=lambda member: bool(member[2].dims))
        self.positions = [position for position, _, _ in members]
        self.params = [p for _, p, _ in members]
        self.units = [units for _, _, units in members]
        self.whole = sum(not units.dims for units in self.units)
        local = [_local(p) for p in self.params]
        self.device, dtype = local[0].device, local[0].dtype
        self.norm_dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        self.shapes = [_norm_shape(p.shape, units) for p, units in zip(local, self.units, strict=True)]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.owner = self._repeat(self.sizes)  # of a unit: the number of its parameter here
        self.lengths = [p.numel() for p in local[: self.whole]]
        self.scatter = self._repeat(self.lengths)
        self.partial = self._by_group(reduced=True, owner=self.owner)
        self.counted = self._by_group(reduced=False, owner=torch.arange(len(members), device=self.device))

    def _repeat(self, sizes: list[int]) -> Tensor:
        count = torch.tensor(sizes, dtype=torch.int64, device=self.device)
        return torch.arange(len(sizes), device=self.device).repeat_interleave(count)

    def _by_group(self, reduced: bool, owner: Tensor) -> list[tuple[Any, Tensor]]:
        """(process group, entries of `owner` whose parameter must be summed over it)."""
        found: dict[Any, list[int]] = {}
        for i, (p, units) in enumerate(zip(self.params, self.units, strict=True)):
            for group in _shard_groups(p, units, reduced):
                found.setdefault(group, []).append(i)
        return [
            (group, torch.isin(owner, torch.tensor(numbers, device=self.device)).nonzero().squeeze(1))
            for group, numbers in found.items()
        ]

    def norms(self, tensors: list[Tensor]) -> Tensor:
        """Norm of every unit, parameter after parameter."""
        found: list[Tensor] = []
        if self.whole:
            found.append(torch.stack(_foreach_norm(tensors[: self.whole], 2, self.norm_dtype)))
        for tensor, units in zip(tensors[self.whole :], self.units[self.whole :], strict=True):
            norm = torch.linalg.vector_norm(units.split(tensor), 2, units.dims, dtype=self.norm_dtype)
            found.append(norm.reshape(-1))
        return torch.cat(found)

    def clip(self, clipping: float, eps: float, grad_scale: Tensor | None, on_host: bool) -> Tensor:
        """Scale the gradients; per parameter the units clipped and those not finite, (n, 2)."""
        grads = [_local(p.grad) for p in self.params if p.grad is not None]
        norms = torch.stack([self.norms([_local(p.detach()) for p in self.params]), self.norms(grads)])
        for group, index in self.partial:
            squares = norms[:, index].square()
            torch.distributed.all_reduce(squares, group=group)
            norms[:, index] = squares.sqrt()
        weight, grad = norms
        if grad_scale is not None:
            grad = grad / grad_scale.to(self.device)
        limit = weight.clamp(min=eps).mul_(clipping)
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
            if some:
                units.split(grad).mul_(part.view(shape))

    def _scale_all(self, grads: list[Tensor], factor: Tensor) -> None:
        # A factor of 1 leaves every bit as it is.
        if self.whole:
            # In one piece: a launch for every bias and gain would cost more than all the convolutions.
            flat = torch.cat([g.reshape(-1) for g in grads[: self.whole]]) * factor[self.scatter]
            pieces = zip(flat.split(self.lengths), grads, strict=False)
            _foreach_copy_(grads[: self.whole], [piece.view_as(g) for piece, g in pieces])
        if self.whole < len(grads):
            rest = range(self.whole, len(grads))
            parts = factor.split(self.sizes)
            _foreach_mul_(
                [self.units[i].split(grads[i]) for i in rest], [parts[i].view(self.shapes[i]) for i in rest]
            )


def _checked(p: Tensor, units: Units | None) -> Units:
    if nn.parameter.is_lazy(p):
        raise UserError(
            "a lazy parameter without a shape: expected an initialized model; run one forward first"
        )
    if not p.is_floating_point():
        raise UserError(
            f"a parameter of dtype {p.dtype} and shape {tuple(p.shape)}: expected floating point; leave it out"
        )
    units = units or units_of(p.shape)
    for placement in getattr(p, "placements", ()):
        dim = getattr(placement, "dim", None)
        if placement.is_partial() or (dim == 0 and units.groups > 1):
            raise UserError(
                f"a parameter of shape {tuple(p.shape)} placed as {placement}: expected units that lie within shards "
                "or are sums over them; exclude it, or shard it along another dimension"
            )
    return units


def _local(tensor: Tensor) -> Tensor:
    # A DTensor's shard; told by its attribute because importing the class takes a second that most do not need.
    return tensor.to_local() if hasattr(tensor, "placements") else tensor  # pyright: ignore


def _shard_groups(p: Tensor, units: Units, reduced: bool) -> list[Any]:
    """Process groups that hold the parts of one unit (reduced) or different units of the parameter (not)."""
    groups = []
    for mesh_dim, placement in enumerate(getattr(p, "placements", ())):
        dim = getattr(placement, "dim", None)
        if dim is not None:
            within = not units.dims or dim + (units.groups > 1) in units.dims
            if within == reduced:
                groups.append(p.device_mesh.get_group(mesh_dim))  # pyright: ignore
    return groups


def _norm_shape(shape: torch.Size, units: Units) -> torch.Size:
    """Shape of the norms in `units.split(tensor)`, reduced dimensions kept as 1."""
    if not units.dims:
        return torch.Size([1] * len(shape))
    if units.groups > 1:
        shape = torch.Size([units.groups, shape[0] // units.groups, *shape[1:]])
    return torch.Size(1 if i in units.dims else n for i, n in enumerate(shape))
