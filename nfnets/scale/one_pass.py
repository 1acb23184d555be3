"""One forward pass in which every layer's output can be replaced: the engine of data-dependent initialization.

If a layer is homogeneous in its weight, out(c·W) = c·out(W), its hook can rescale the weight *and* return the
rescaled output: everything downstream then sees what a fresh forward pass would give, so one pass equals a loop of
forward passes, in execution order, on the same batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.nested import no_sample
from nfnets.noise import keyed
from nfnets.preserve import check_ordinary
from nfnets.trace import Graph, preserved, recording, run, tensors_in

Write = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a selected module, right after it ran."""

    path: str
    module: nn.Module
    index: int
    """0 for the module's first call in this pass, 1 for the second, …"""
    output: Tensor
    """Of a tuple (`nn.MultiheadAttention`), its first tensor."""
    rerun: Callable[[], Tensor]
    """Runs the module's own forward once more on the same arguments, with its parameters as they are now."""


Rescale = Callable[[Call], Tensor | None]


_outermost: ContextVar[Write | None] = ContextVar("outermost", default=None)


@contextlib.contextmanager
def transaction(backup: bool = True) -> Iterator[Write]:
    """Writes into tensors in place; if the block raises, every written tensor gets its old values back.

    One inside another is part of it: what it wrote is taken back, too, if the outer one raises later.

    Args:
        backup: False where nobody looks at the tensors after a failure: then nothing is kept, and nothing restored.

    Example:
        >>> weight = torch.ones(2)
        >>> try:
        ...     with transaction() as write:
        ...         write(weight, torch.zeros(2))
        ...         raise KeyError
        ... except KeyError:
        ...     weight
        tensor([1., 1.])
    """
    outer = _outermost.get()
    if outer is not None:
        yield outer
        return
    before: dict[int, tuple[Tensor, Tensor]] = {}

    def write(tensor: Tensor, value: Tensor) -> None:
        if backup and id(tensor) not in before:
            before[id(tensor)] = (tensor, tensor.detach().clone())
        with torch.no_grad():
            tensor.copy_(value)

    token = _outermost.set(write)
    try:
        yield write
    except BaseException:
        with torch.no_grad():
            for tensor, old in before.values():
                tensor.copy_(old)
        raise
    finally:
        _outermost.reset(token)


def normal_like(tensor: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Normal values with mean 0, in a tensor's shape and layout."""
    return torch.empty_like(tensor).normal_(0, std, generator=generator)


def one_pass(
    model: nn.Module,
    *inputs: Any,
    select: Callable[[nn.Module], bool],
    rescale: Rescale,
    **kwargs: Any,
) -> Graph:
    """Run exactly one forward pass and let `rescale` replace each selected module's output.

    The pass runs without gradients, in the modes that the modules are in: in training mode norm layers normalize by the
    batch, auxiliary heads run, and dropout and stochastic depth drop, all as when training starts. What is drawn comes
    from a key (`nfnets.noise.keyed`), the same in every pass.
    Modes, buffers, random state and devices are as before when it returns or raises, and no hook stays.

    Args:
        model: the model; nothing is moved to another device.
        *inputs: what its forward takes.
        select: which modules `rescale` is called for.
        rescale: called once a call, in execution order, before anything downstream reads (or overwrites) the
            output. It returns the tensor to go on with, or None to leave the output.
        **kwargs: keyword arguments of the forward.

    Returns:
        The dataflow graph of the pass.

    Raises:
        UserError: nothing to run, parameters without values, or a forward that fails on these inputs.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(inplace=True))
        >>> seen = []
        >>> graph = one_pass(
        ...     model,
        ...     torch.randn(8, 3),
        ...     select=lambda module: isinstance(module, nn.Linear),
        ...     rescale=lambda call: seen.append((call.path, tuple(call.output.shape))),
        ... )
        >>> seen
        [('0', (8, 4))]
    """
    check(model, inputs, kwargs)
    calls: dict[str, int] = {}

    def hook_for(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, named: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            index = calls[path] = calls.get(path, -1) + 1

            def rerun() -> Tensor:
                with torch._C._EnableTorchFunction():
                    return _first(module.forward(*args, **named))

            with _unseen(first):
                replaced = rescale(Call(path, module, index, first, rerun))
            if replaced is None:
                return None
            recorder.stand_in(replaced, first)
            return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

        return hook

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(preserved(model, parameters=False))
        stack.enter_context(_no_fast_path())
        stack.enter_context(keyed(model))
        for path, module in model.named_modules():
            if select(module):
                handle = module.register_forward_hook(hook_for(path), with_kwargs=True)
                stack.callback(handle.remove)
        recorder = stack.enter_context(recording(model))
        graph, _ = run(recorder, model, inputs, kwargs)
        return graph


def check(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse what no initializer can run, before anything is changed."""
    check_model(model)
    if not tensors_in(inputs, kwargs):
        raise UserError("no input tensor given: expected a batch; pass what model(*inputs) takes")
    if empty := no_sample((inputs, kwargs)):
        raise UserError(empty)
    check_values(model)


def check_model(model: Any) -> None:
    """Refuse what is no model whose layers can be seen."""
    if not isinstance(model, nn.Module):
        raise UserError(f"model of type {type(model).__name__}: expected an nn.Module; pass the model itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError("a scripted model: its layers cannot be seen; initialize it before torch.jit.script")


def check_values(model: nn.Module) -> None:
    """Refuse parameters that hold no values to change."""
    check_ordinary(model)
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise UserError(f"{name} is lazy, it has no shape yet: run model(*inputs) once, then initialize")
        if parameter.is_meta:
            raise UserError(
                f"{name} is on the meta device, it has no values: model.to_empty(device=...) first"
            )


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _unseen(output: Tensor) -> contextlib.AbstractContextManager[Any]:
    """What is computed to measure an output goes past every mode: a pass makes ten times as many calls for that as the
    model does. Not of a subclass, which may compute its own way."""
    return torch._C.DisableTorchFunction() if type(output) is Tensor else contextlib.nullcontext()


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """The fused transformer kernels of evaluation mode call no submodule, so that no hook would fire."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
