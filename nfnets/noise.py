"""Noise of training, dropout and stochastic depth above all: switched off, or drawn from a key of our own."""

from __future__ import annotations

import contextlib
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_KEY = 0x6E666E65  # one that nobody draws images from: masks and values of one seed are not independent


def is_noise(module: nn.Module) -> bool:
    """Whether a module is dropout or stochastic depth."""
    kind = type(module).__name__.lower()
    return isinstance(module, nn.modules.dropout._DropoutNd) or "drop" in kind or "stochasticdepth" in kind


def drops(model: nn.Module) -> bool:
    """Whether a model has dropout or stochastic depth that is not off.

    Example:
        >>> drops(nn.Sequential(nn.Dropout(0.1))), drops(nn.Dropout(0.0))
        (True, False)
    """
    return any(is_noise(module) and _rate(module) != 0 for module in model.modules())


def _rate(module: nn.Module) -> Any:
    """The probability of being dropped; None where it has another name."""
    return getattr(module, "p", getattr(module, "drop_prob", None))


@contextlib.contextmanager
def silenced(model: nn.Module) -> Iterator[None]:
    """Dropout and stochastic depth pass on what they get; the modes come back.

    What they put out is a new tensor wherever it is one in training: the next operation may write over it, and what
    else reads their input must not see that.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5), nn.ReLU(inplace=True))
        >>> x = torch.tensor([-1.0, 2.0])
        >>> with silenced(model):
        ...     model(x), x
        (tensor([0., 2.]), tensor([-1.,  2.]))
    """
    # Not what a module wraps: timm's ResidualDrop holds a whole branch, norm layers too.
    noise = [module for module in model.modules() if module.training and is_noise(module)]
    handles = [module.register_forward_hook(_as_new) for module in noise if _copies(module)]
    for module in noise:
        module.training = False
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in noise:
            module.training = True


def _copies(module: nn.Module) -> bool:
    """Whether noise in training mode puts out a new tensor; a scripted module takes no hook."""
    inplace = getattr(module, "inplace", False)
    return _rate(module) != 0 and not inplace and not isinstance(module, torch.jit.ScriptModule)


def _as_new(module: nn.Module, given: tuple[Any, ...], output: Any) -> Tensor | None:
    return output.clone() if isinstance(output, Tensor) and any(output is each for each in given) else None


@contextlib.contextmanager
def keyed(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """What passes draw inside comes from one key, the same every time; the user's generators are left as they were.

    Torch's, NumPy's and Python's global generators, and those of torch that modules hold. A stochastic depth that
    drops the whole batch at once drops rows, with the same second moment: one pass shows that of each sample's mask.

    Yields:
        Whether anything has been drawn since.

    Example:
        >>> with keyed(nn.Dropout(0.5)) as drawn:
        ...     before, _, after = drawn(), nn.functional.dropout(torch.ones(3)), drawn()
        >>> before, after
        (False, True)
    """
    generators = _generators(model)
    states = [generator.get_state() for generator in generators]
    others = np.random.get_state(), random.getstate()  # noqa: NPY002
    whole = [
        module for module in model.modules() if is_noise(module) and getattr(module, "mode", "") == "batch"
    ]
    try:
        for generator in generators:
            generator.manual_seed(_KEY)
        np.random.seed(_KEY)  # noqa: NPY002
        random.seed(_KEY)
        for module in whole:
            module.mode = "row"  # type: ignore[assignment]
        first = _states(generators)
        yield lambda: _states(generators) != first
    finally:
        for module in whole:
            module.mode = "batch"  # type: ignore[assignment]
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        np.random.set_state(others[0])  # noqa: NPY002
        random.setstate(others[1])


def _generators(model: nn.Module) -> list[torch.Generator]:
    devices = {t.device for t in [*model.parameters(), *model.buffers()] if t.device.type == "cuda"}
    held = [
        value for m in model.modules() for value in vars(m).values() if isinstance(value, torch.Generator)
    ]
    found = [torch.default_generator, *(torch.cuda.default_generators[d.index or 0] for d in devices), *held]
    return list({id(generator): generator for generator in found}.values())


def _states(generators: list[torch.Generator]) -> list[Any]:
    numbers = [generator.get_state().numpy().tobytes() for generator in generators]
    return [*numbers, pickle.dumps(np.random.get_state()), random.getstate()]  # noqa: NPY002
