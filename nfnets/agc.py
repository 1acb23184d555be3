"""Adaptive gradient clipping (AGC): a unit's gradient may not be large next to the unit itself.

Paper: "High-Performance Large-Scale Image Recognition Without Normalization" (arXiv 2102.06171), section 4. Official
code: deepmind-research, nfnets/optim.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nfnets import advice
from nfnets.before_step import BeforeStep, Exclude, excluded_parameters
from nfnets.errors import UserError
from nfnets.given import check_module, shown, tensors_of
from nfnets.unitwise import ClippingPlan, Units, module_units, plan_of


def clip_grad_agc_(
    parameters: Tensor | nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
    clipping: float = 0.01,
    eps: float = 1e-3,
) -> Tensor:
    """Clip gradients in place, unit by unit, relative to the parameters.

    G_i ← G_i · λ · max(‖W_i‖, ε) / ‖G_i‖  where  ‖G_i‖ > λ · max(‖W_i‖, ε)

    A unit is a row of a linear layer, a filter of a convolution (of a transposed one too, given the module), a row of
    an embedding, or a whole bias or gain vector. Units with a gradient that is not finite are left as they are, for
    a gradient scaler to see; so are parameters without a gradient. Norms are taken in float32 at least. Nothing is
    excluded: leave the classifier's weight out, or use `attach_agc`, which does. With `torch.amp.GradScaler`, call
    `scaler.unscale_(optimizer)` first: gradients are compared with parameters, so a loss scale would clip them all.

    Args:
        parameters: tensors with gradients, `model.parameters()`, `model.named_parameters()`, or a module. Sharded
            ones (`fully_shard`) are clipped by the norms of whole units; every rank must call.
        clipping: λ, above 0. The paper uses 0.01 for batches of 1024 to 4096 and more for smaller ones.
        eps: ε, above 0: the floor of a unit's norm, without which zero-initialized units could never move.

    Returns:
        Fraction of the units that were clipped, 0-dim float32 on the parameters' device, without a host
        synchronization. Over all ranks for sharded parameters.

    Raises:
        UserError: no parameters, complex parameters, sparse gradients, λ or ε not above 0. Nothing is changed then.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [9.0, 40.0]]))
        >>> w.grad = torch.tensor([[7.0, 24.0], [5.0, 12.0]])
        >>> clip_grad_agc_(w, clipping=0.5)
        tensor(0.5000)
        >>> w.grad
        tensor([[ 0.7000,  2.4000],
                [ 5.0000, 12.0000]])

    Paper: arXiv 2102.06171, section 4; official code: deepmind-research, nfnets/optim.py.
    """
    _check_limits(clipping, eps)
    units = {}
    if isinstance(parameters, Tensor):
        given: list[Any] = [parameters]
    elif isinstance(parameters, nn.Module):
        given, units = list(parameters.parameters()), module_units(parameters)
    else:
        given = tensors_of(parameters)
    if not given:
        raise UserError("no parameters: expected at least one; pass model.parameters()")
    # A tied parameter comes twice from some iterables, and must not be clipped twice.
    with_grad = list({id(p): p for p in given if p.grad is not None}.values())
    if not with_grad:
        return torch.zeros((), device=given[0].device)
    plan = plan_of(with_grad, units)
    return plan.clip(with_grad, clipping, eps)[:, 0].sum() / plan.totals.sum()


def attach_agc(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    clipping: float | Literal["auto"] = 0.01,
    eps: float = 1e-3,
    exclude: Exclude = "head",
    head: float | None = None,
) -> AGCHandle:
    """Clip the gradients of a model at every step of an optimizer, just before it uses them.

    G_i ← G_i · λ · max(‖W_i‖, ε) / ‖G_i‖  where  ‖G_i‖ > λ · max(‖W_i‖, ε)

    Runs as a step pre-hook, so on the accumulated and averaged gradient, before weight decay and momentum, once a
    step. With `torch.amp.GradScaler` it sees unscaled gradients, or allows for the scale where the optimizer unscales
    by itself (`fused=True`). Given a closure, it clips after every call of it. Of the optimizer's parameters those of
    the model are clipped, also ones that are added later.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        model: whose parameters it steps; DDP, `fully_shard` and compiled ones too.
        clipping: λ, above 0; "auto" takes it from the method and the batch size that `convert` was given.
        eps: ε, above 0.
        exclude: what not to clip: `head`, the weights (not the biases) of the layers that make the logits, by
            identity; a module, all its parameters; a pattern of parameter names (`"stem.*"`); a list of these; None.
            A warning tells of a model whose head is not found (nets that put out images): name its last layer.
        head: above 0, clips the weights that make the logits at so many times λ, whatever `exclude` says of `head`.
            `nfnets train` takes 20 (docs/experiments.md, "The head"); None, as in the paper, leaves it to `exclude`.
            Not for weights that are zero: a clipped gradient hardly moves them.

    Returns:
        A handle: `.stats` (units clipped and not finite), `.excluded` (names; `print` shows them), `.clipping`, `.eps`
        and `.head` (may be changed), `.remove()`.

    Raises:
        UserError: λ, ε or `head` not above 0, an optimizer that holds none of the model's parameters or never runs its
            hooks, `exclude` that is not in the model, gradients that are clipped already, "auto" where it is not known
            or the method is not clipped. Nothing is changed then.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> handle = attach_agc(optimizer, net, clipping=0.01)
        >>> handle.excluded
        ('2.weight',)
        >>> net(torch.ones(16, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(handle.stats.per_parameter())
        ['0.bias', '0.weight', '2.bias']

    Paper: arXiv 2102.06171, section 4; official code: deepmind-research, nfnets/optim.py.
    """
    if clipping == "auto":
        clipping = _by_method(model)
    _check_limits(clipping, eps, 1.0 if head is None else head)
    return AGCHandle(optimizer, model, clipping, eps, exclude, head).warn_without_head()


def _by_method(model: nn.Module) -> float:
    check_module(model)
    method = advice.method_of(model)
    found = advice.recommended(method, advice.batch_size_of(model))
    if found.clipping is None:
        raise UserError(
            f'clipping="auto" for a model by {method}: it is not clipped, since {found.reasons["clipping"]}; '
            "leave attach_agc away"
        )
    return found.clipping


class _Part(NamedTuple):
    """Parameters that are clipped together."""

    names: list[str]
    params: list[Tensor]
    plan: ClippingPlan
    head: bool  # they make the logits


class AGCHandle(BeforeStep):
    """What `attach_agc` returns."""

    does = "clips gradients"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        clipping: float,
        eps: float,
        exclude: Exclude,
        head: float | None = None,
    ) -> None:
        self.clipping, self.eps, self.head = clipping, eps, head
        self.stats = AGCStats()
        self._logits: set[int] = set()
        self._parts: list[_Part] = []
        super().__init__(optimizer, model, exclude)

    def change(self, named: list[tuple[str, Tensor]], units: dict[int, Units]) -> None:
        """Clip."""
        # Set by a GradScaler for optimizers that unscale in their own step: the gradients are still scaled here.
        scale = getattr(self._optimizer, "grad_scale", None)
        if not self._knows(named):
            self._parts = [
                _Part(
                    [name for name, _ in part],
                    [p for _, p in part],
                    plan_of([p for _, p in part], units),
                    head,
                )
                for part, head in self._divided(named)
                if part
            ]
        counts = []
        for part in self._parts:
            limit = self.clipping * self.head if part.head and self.head else self.clipping
            counts.append(part.plan.clip(part.params, limit, self.eps, scale))
        names = tuple(name for part in self._parts for name in part.names)
        self.stats._add(names, _joined(counts), _joined([part.plan.totals for part in self._parts]))

    def _knows(self, named: list[tuple[str, Tensor]]) -> bool:
        """Whether the parameters, and what is special about some, are what they were at the last step."""
        now = [id(p) for part, _ in self._divided(named) for _, p in part]
        known = [id(p) for part in self._parts for p in part.params]
        return now == known and all(part.plan.fits(part.params) for part in self._parts)

    def _divided(self, named: list[tuple[str, Tensor]]) -> list[tuple[list[tuple[str, Tensor]], bool]]:
        """Parameters, and whether they make the logits and have a limit of their own."""
        if self.head is None:
            return [(named, False)]
        logits = [id(p) in self._logits for _, p in named]
        return [
            ([each for each, at in zip(named, logits, strict=True) if at is head], head)
            for head in (False, True)
        ]

    def _asks_for_head(self) -> bool:
        return self.head is not None or super()._asks_for_head()

    def _covered(self) -> str:
        return f"clipping={self.clipping:g}, eps={self.eps:g}, head={self.head}, {super()._covered()}"

    def _excluded(self) -> set[int]:
        if self.head is None:
            return super()._excluded()
        self._logits = excluded_parameters(self._model, "head")
        return super()._excluded() - self._logits


class AGCStats:
    """Counts of units since the start (or `reset`), kept on the device; reading a number synchronizes, nothing else.

    Attributes:
        steps: how often gradients were clipped.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.steps = 0
        self._latest: tuple[Tensor, Tensor] | None = None
        self._rows: dict[tuple[str, ...], tuple[Tensor, Tensor, int]] = {}

    def _add(self, names: tuple[str, ...], counts: Tensor, totals: Tensor) -> None:
        self.steps += 1
        self._latest = counts, totals
        before = self._rows.get(names)
        added, times = (counts, 1) if before is None else (before[0] + counts, before[2] + 1)
        self._rows[names] = added, totals, times

    @property
    def last(self) -> Tensor | None:
        """Fraction of units clipped at the last step, 0-dim on device (None before the first)."""
        return None if self._latest is None else self._latest[0][:, 0].sum() / self._latest[1].sum()

    @property
    def fraction(self) -> Tensor:
        """Fraction of units clipped, over all parameters and steps: 0-dim float32 on device."""
        total = self._total()
        return total[0] / total[2].clamp(min=1)

    @property
    def nonfinite(self) -> Tensor:
        """Units left alone because their gradient was not finite, over all steps: 0-dim int64 on device."""
        return self._total()[1]

    def per_parameter(self) -> dict[str, float]:
        """Fraction of units clipped over all steps, by parameter name (one read from the device)."""
        return {name: clipped / seen for name, (clipped, _, seen) in self._by_name().items()}

    def nonfinite_per_parameter(self) -> dict[str, int]:
        """Units left alone because their gradient was not finite, by parameter name."""
        return {name: nonfinite for name, (_, nonfinite, _) in self._by_name().items()}

    def _by_names(self) -> Iterator[tuple[tuple[str, ...], Tensor]]:
        """Per parameter the units clipped, those not finite, and those seen."""
        for names, (counts, totals, times) in self._rows.items():
            yield names, torch.cat([counts, totals[:, None] * times], 1)

    def _total(self) -> Tensor:
        sums = [rows.sum(0) for _, rows in self._by_names()]
        return torch.stack(sums).sum(0) if sums else torch.zeros(3, dtype=torch.int64)

    def _by_name(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for names, rows in self._by_names():
            for name, row in zip(names, rows.tolist(), strict=True):
                found[name] = [a + b for a, b in zip(found.get(name, [0, 0, 0]), row, strict=True)]
        return found


def _joined(parts: list[Tensor]) -> Tensor:
    """One after another, where the first is: a head may be on another device."""
    return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts])


def _check_limits(clipping: float, eps: float, head: float = 1.0) -> None:
    """Refuse a λ, an ε or a factor for the head that is no finite number above 0."""
    for name, value, usual in (("clipping", clipping, 0.01), ("eps", eps, 1e-3), ("head", head, 20)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{name}={shown(value)}: expected a finite number above 0; pass {name}={usual}")
