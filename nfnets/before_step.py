"""What changes gradients just before an optimizer uses them: where it hooks in, and what it leaves out."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence, Set
from typing import Any, Self

import torch
from torch import Tensor, nn

from nfnets.errors import UserError, unknown
from nfnets.given import check_module, check_optimizer, shown
from nfnets.head import head_layers, unwrap
from nfnets.unitwise import Units, module_units

Exclude = str | nn.Module | Sequence[str | nn.Module] | Set[str | nn.Module] | None


class BeforeStep:
    """A step pre-hook on the gradients of those of an optimizer's parameters that are the model's.

    It sees the accumulated and averaged gradient, before weight decay and momentum, once a step; given a closure, after
    every call of it. Hooks run in the order in which they were attached.

    Attributes:
        excluded: names of the parameters that are left out.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        model: whose parameters it steps; DDP, `fully_shard` and compiled ones too.
        exclude: what to leave out, see `excluded_parameters`.

    Raises:
        UserError: an optimizer that holds none of the model's parameters or never runs its hooks, `exclude` that is not
            in the model, parameters that another handle of the same kind changes. Nothing is changed then.
    """

    does = "changes gradients"

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, exclude: Exclude) -> None:
        _check_stepped(optimizer, model)
        self._optimizer, self._model, self._exclude = optimizer, unwrap(model), exclude
        self._known: tuple[int, ...] = ()
        self._eligible: list[tuple[str, Tensor]] = []
        self._units: dict[int, Units] = {}
        self._survey()
        if not set(map(id, self._held())) & {id(p) for p in self._model.parameters()}:
            raise UserError(
                "the optimizer holds none of the model's parameters: expected the model that it steps; "
                "attach after the optimizer was made, to the same model"
            )
        self._refuse_again()
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Leave gradients as they are from now on."""
        self._hook.remove()

    def _refuse_again(self) -> None:
        """Refuse to do to a gradient what an earlier handle does to it: two would clip it twice."""
        mine = {id(p) for _, p in self._eligible}
        for hook in self._optimizer._optimizer_step_pre_hooks.values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, type(self)):
                other._survey()
                if mine & {id(p) for _, p in other._eligible}:
                    raise UserError(
                        f"the optimizer {self.does} of this model already: expected one handle; "
                        "call .remove() of the first one before attaching again"
                    )

    def warn_without_head(self) -> Self:
        """Warn, on behalf of the function that called this, if no head was found where one is to be treated apart."""
        if self._asks_for_head() and not head_layers(self._model):
            kind = type(self._model).__name__
            warnings.warn(
                f"no layer of {kind} is known to make its logits: exclude='head' leaves nothing out; "
                "pass the last layer, exclude=model.…, or exclude=None",
                stacklevel=3,
            )
        return self

    def _asks_for_head(self) -> bool:
        return "head" in _entries_of(self._exclude)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._covered()})"

    def _covered(self) -> str:
        return f"{len(self._eligible)} parameters, excluded: {', '.join(self.excluded) or 'none'}"

    def change(self, named: list[tuple[str, Tensor]], units: dict[int, Units]) -> None:
        """What is done to the gradients of these parameters, all of which have one; in place.

        Args:
            named: names and parameters.
            units: of those whose units do not follow from their shape, by `id`.
        """
        raise NotImplementedError

    def _held(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _survey(self) -> None:
        """Which of the optimizer's parameters are meant; again whenever their set changes."""
        held = self._held()
        known = tuple(map(id, held))
        if known == self._known:
            return
        excluded = self._excluded()
        names = {id(p): name for name, p in self._model.named_parameters()}
        self.excluded = tuple(name for i, name in names.items() if i in excluded)
        self._eligible = [(names[id(p)], p) for p in held if id(p) in names and id(p) not in excluded]
        self._units = module_units(self._model)
        self._known = known

    def _excluded(self) -> set[int]:
        return excluded_parameters(self._model, self._exclude)

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # args[0] is the optimizer.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._change()
            return None

        # Gradients are only made inside step, perhaps several times.
        def changed(*inputs: Any) -> Any:
            loss = closure(*inputs)
            self._change()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": changed}
        return (*args[:1], changed, *args[2:]), kwargs

    def _change(self) -> None:
        self._survey()
        present = [(name, p) for name, p in self._eligible if p.grad is not None]
        if present:
            self.change(present, self._units)


def _check_stepped(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Refuse what no gradient can be changed for.

    Raises:
        UserError: no optimizer or model, an optimizer that never runs its hooks, flat parameters.
    """
    check_optimizer(optimizer)
    check_module(model)
    if not getattr(type(optimizer).step, "hooked", False):
        raise UserError(
            f"optimizer {type(optimizer).__name__}: expected one that runs its step hooks, but it wraps another and "
            "does not; attach to the optimizer that it wraps"
        )
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise UserError(
            "model in FullyShardedDataParallel: its flat parameters hide the units; use fully_shard"
        )


def excluded_parameters(model: nn.Module, exclude: Exclude) -> set[int]:
    """Parameters to leave alone, by `id`, so that a tied parameter is excluded under every name.

    Args:
        model: whose parameters they are.
        exclude: `head`, the weights (not the biases) of the layers that make the logits, by identity; a module, all its
            parameters; a pattern of parameter names (`"stem.*"`); a list of these; None.

    Raises:
        UserError: what is not in the model.
    """
    check_module(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    found: set[int] = set()
    for entry in _entries_of(exclude):
        if entry == "head":
            for layer in head_layers(model):
                # All but the bias: a weight may be parametrized into several tensors.
                found |= {id(p) for p in layer.parameters() if p is not getattr(layer, "bias", None)}
        elif isinstance(entry, nn.Module):
            if not any(entry is module for module in model.modules()):
                raise UserError(
                    f"exclude={type(entry).__name__}: expected a module of the model; pass one of its own"
                )
            found |= {id(p) for p in entry.parameters()}
        elif isinstance(entry, str):
            matches = fnmatch.filter(named, entry)
            if not matches:
                raise unknown("parameter to exclude", entry, named)
            found |= {id(named[name]) for name in matches}
        else:
            raise UserError(
                f"exclude holds {shown(entry)}: expected 'head', a module, a pattern of parameter names "
                "or None; pass one of these"
            )
    return found


def _entries_of(exclude: Exclude) -> list[str | nn.Module]:
    """What `exclude` lists.

    Raises:
        UserError: nothing that can.
    """
    if exclude is None:
        return []
    if isinstance(exclude, str | nn.Module):
        return [exclude]
    if not isinstance(exclude, Sequence | Set):
        raise UserError(
            f"exclude is {shown(exclude)}: expected 'head', a module, a pattern of parameter names, a list of these "
            "or None; pass one of these"
        )
    return list(exclude)
