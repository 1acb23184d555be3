"""Whose code runs when a layer is called: torch's own, or a subclass's or the instance's?"""

from __future__ import annotations

from torch import nn

_RUN = ("__call__", "forward", "_conv_forward", "_call_impl")
"""What a call of torch's layers runs through."""


def runs_torchs_code(module: nn.Module) -> bool:
    """Whether a call of a module runs code of torch's own, with nothing of somebody else's in between.

    A subclass that adds attributes or another constructor does; one with a `forward` of its own, or an instance whose
    `forward` was exchanged, does not.

    Example:
        >>> class Padded(nn.Conv2d):
        ...     def forward(self, input):
        ...         return super().forward(nn.functional.pad(input, [1, 1]))
        >>> class Named(nn.Conv2d):
        ...     title = "first"
        >>> [runs_torchs_code(kind(3, 3, 1)) for kind in (nn.Conv2d, Named, Padded)]
        [True, True, False]
    """
    if any(name in vars(module) for name in _RUN):
        return False
    methods = (getattr(type(module), name, None) for name in _RUN)
    return all(method is None or method.__module__.startswith("torch.nn.") for method in methods)
