"""Statistics that the model computes anyway: a BatchNorm layer takes the moments of its input, in double precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nfnets.nested import tensors_in
from nfnets.signal.attention import Look, look_at_fused
from nfnets.signal.moments import Lent

# Below so many values reading them again costs less than looking into the call.
_WORTH = 1 << 17
# What a BatchNorm keeps is 1/√(var + eps) in fp32: of a variance far below eps it tells nothing.
_TELLS = 0.05
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

Read = Callable[[Lent | None], None]
"""Measures a tensor; its moments may be known."""


@dataclass(frozen=True)
class _Held:
    output: Tensor
    version: int | None
    read: Read

    def now(self, lent: Lent | None = None) -> None:
        """Not if somebody wrote there whom nobody saw: a kernel of another library, in a function of its own."""
        with torch._C.DisableTorchFunction():
            if self.version is None or self.output._version == self.version:
                self.read(lent)


class Beside(TorchFunctionMode):
    """Sees the functions of a pass before they run: what goes into fused attention, and what a BatchNorm reads.

    A tensor that a BatchNorm may read next waits for it. Any other function or module that is given the tensor has it
    measured first, since it could write there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fused: Look | None = None
        """At the fused attention that just ran."""
        self._held: _Held | None = None

    def hold(self, output: Tensor, dim: int, read: Read) -> None:
        """Measures a tensor, at the latest before something else is done with it.

        Args:
            output: made by the call that just ran.
            dim: of its channels.
            read: what to do.
        """
        waits = dim == 1 and output.numel() >= _WORTH and output.device.type == "cpu"
        if not waits or output.dtype not in (torch.float32, torch.float64):
            return read(None)
        version = None if output.is_inference() else output._version
        self._held = _Held(output, version, read)

    def release(self) -> None:
        """Measures what waits."""
        held, self._held = self._held, None
        if held is not None:
            held.now()

    def entered(self, module: nn.Module) -> None:
        """Before a module runs; the tracer calls it."""
        if self._held is not None and type(module) not in _BATCH_NORMS:
            self.release()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            with torch._C.DisableTorchFunction(), torch.no_grad():
                self.fused = look_at_fused(*args, **kwargs)
        held = self._held
        if held is None or func is Tensor.dim:
            return func(*args, **kwargs)
        if func is F.batch_norm and args and args[0] is held.output:
            self._held = None
            with _Statistics() as statistics:
                output = func(*args, **kwargs)
            held.now(statistics.of(held.output))
            return output
        if any(t is held.output for t in tensors_in(args, kwargs)):
            self.release()
        return func(*args, **kwargs)


class _Statistics(TorchDispatchMode):
    """Keeps what torch's BatchNorm kernel returns beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_batch_norm.default and len(args) == 8:
            self.found.append((*out[1:], args[7]))
        return out

    def of(self, x: Tensor) -> Lent | None:
        """Of a BatchNorm's input, if it has used the batch's statistics and they tell of every channel."""
        if len(self.found) != 1:
            return None
        mean, scale, eps = self.found[0]
        channels = x.shape[1]
        if mean.numel() != channels or scale.numel() != channels:
            return None
        if scale.amax().item() ** 2 * eps * (1 + _TELLS) < 1:
            return Lent(x.numel() // channels, mean, scale, eps)
        return None
