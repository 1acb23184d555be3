"""Gradient centralization: what all inputs of a unit have in common does not move its weights.

Paper: "Gradient Centralization: A New Optimization Technique for Deep Neural Networks" (arXiv 2004.01461). Official
code: Yonghongwei/Gradient-Centralization.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from nfnets.before_step import BeforeStep, Exclude
from nfnets.given import tensors_of
from nfnets.unitwise import Units, module_units, units_of


def centralize_grad_(
    parameters: Tensor | nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
) -> None:
    """Take the mean of every unit out of its gradient, in place.

    G_i ← G_i − mean(G_i)

    A unit is a row of a linear layer or a filter of a convolution (of a transposed one too, given the module). What is
    one unit as a whole (biases, gains, scalars, filters of a single weight) and what has no gradient stays as it is.
    Where weights are standardized nothing changes: their gradients have no mean.

    Behind a ReLU all inputs of a filter are positive, and its mean is the direction in which the loss bends most:
    BatchNorm and weight standardization take it out of the function, this out of the step alone.

    Args:
        parameters: tensors with gradients, `model.parameters()`, `model.named_parameters()`, or a module.

    Raises:
        UserError: what is none of these.

    Example:
        >>> w = torch.nn.Parameter(torch.zeros(2, 3))
        >>> w.grad = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
        >>> centralize_grad_(w)
        >>> w.grad
        tensor([[-2., -1.,  3.],
                [-1., -1.,  2.]])

    Paper: arXiv 2004.01461, equation 1. Checked against the official `centralized_gradient`, which takes the filters of
    a transposed convolution by input channel.
    """
    if isinstance(parameters, Tensor):
        _centralize([parameters], {})
    elif isinstance(parameters, nn.Module):
        _centralize(parameters.parameters(), module_units(parameters))
    else:
        _centralize(tensors_of(parameters), {})


@torch.no_grad()
def _centralize(parameters: Iterable[Tensor], units: Mapping[int, Units]) -> None:
    for p in parameters:
        unit = units.get(id(p)) or units_of(p.shape)
        if p.grad is not None and unit.dims:
            gradient = unit.split(p.grad)
            gradient.sub_(gradient.mean(unit.dims, keepdim=True))


class _Centralization(BeforeStep):
    does = "centralizes gradients"

    def change(self, named: list[tuple[str, Tensor]], units: dict[int, Units]) -> None:
        _centralize((p for _, p in named), units)


def attach_centralization(
    optimizer: torch.optim.Optimizer, model: nn.Module, exclude: Exclude = "head"
) -> BeforeStep:
    """Centralize the gradients of a model at every step of an optimizer, just before it uses them.

    G_i ← G_i − mean(G_i), see `centralize_grad_`. For nets without norm layers whose weights are not standardized, such
    as folded ones: it lets them train at rates at which they would break down (docs/experiments.md, "Folded nets").

    Attach it before `attach_agc`: clipping is to see what is left.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        model: whose parameters it steps; DDP, `fully_shard` and compiled ones too.
        exclude: what to leave alone, as for `attach_agc`; `head` is the weights of the layers that make the logits.

    Returns:
        A handle: `.excluded` (names), `.remove()`.

    Raises:
        UserError: an optimizer that holds none of the model's parameters or never runs its hooks, `exclude` that is not
            in the model, gradients that are centralized already. Nothing is changed then.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> handle = attach_centralization(optimizer, net)
        >>> before = net[0].weight.detach().clone()
        >>> net(torch.rand(16, 4)).sum().backward()
        >>> optimizer.step()
        >>> (net[0].weight - before).mean(1).abs().max().item() < 1e-6
        True

    Paper: arXiv 2004.01461. Checked against the official optimizers, which centralize the classifier too.
    """
    return _Centralization(optimizer, model, exclude).warn_without_head()
