"""What a norm layer of any class computes: torch's own as they say, any other found by trying a copy of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, permutations
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets.copying import deep_copy
from nfnets.whose import runs_torchs_code

NormKind = Literal["batch", "group", "instance", "layer", "rms"]
KINDS: tuple[NormKind, ...] = get_args(NormKind)


@dataclass(frozen=True, slots=True)
class Law:
    """What a norm layer computes.

    Args:
        kind: what it normalizes over, see `norm_kind`.
        shape: of γ and β: the channels, or the last dimensions that a layer norm is made for.
        dim: where these are in its input: 1, or −1 for the last.
        gamma: name of the parameter γ; "" if there is none.
        beta: name of the parameter β; "" if there is none.
    """

    kind: NormKind
    shape: tuple[int, ...]
    dim: int
    gamma: str = ""
    beta: str = ""


def law_of(module: nn.Module) -> Law | None:
    """What a norm layer computes; None if it is none of group, instance, layer and RMS norm, or does more.

    Torch's own are what they say. A layer of another class gets random parameters, runs on small random inputs, and is
    compared with `F.group_norm`, `F.instance_norm`, `F.layer_norm` and `F.rms_norm`, over the last dimension and over
    dimension 1. What is fused into it (`drop`, `act`) may follow.

    Example:
        >>> class Own(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.g = nn.Parameter(torch.ones(4))
        ...
        ...     def forward(self, x):
        ...         return self.g * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        >>> law_of(Own()), law_of(nn.ReLU())
        (Law(kind='rms', shape=(4,), dim=-1, gamma='g', beta=''), None)
    """
    known = _torchs(module)
    if known is not None and runs_torchs_code(module):
        return known
    if not _may_be_norm(module):
        return None
    found: list[Law] = []

    def tried() -> bool:
        found.extend(islice((law for law in _tries(module) if known is None or law.kind == known.kind), 1))
        return True

    holds(tried)
    return found[0] if found else None


def _torchs(module: nn.Module) -> Law | None:
    named = {name: "" if module._parameters.get(name) is None else name for name in ("weight", "bias")}
    names = tuple(named.values())
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return Law("instance", (module.num_features,), 1, *names)
    if isinstance(module, nn.GroupNorm):
        return Law("group", (module.num_channels,), 1, *names)
    for kind, known in (("layer", nn.LayerNorm), ("rms", nn.RMSNorm)):
        if isinstance(module, known):
            return Law(kind, tuple(module.normalized_shape), -1, *names)  # type: ignore[arg-type]
    return None


_FUSED = ("drop", "act")


def _may_be_norm(module: nn.Module) -> bool:
    """Whether a module of somebody else's class is built like a norm layer: no parts but what is fused into one, and
    at most two parameters, of the same number of values."""
    own = [p for p in module._parameters.values() if p is not None]
    small = len(own) <= 2 and len({p.numel() for p in own}) <= 1 and all(p.is_floating_point() for p in own)
    foreign = not type(module).__module__.startswith("torch.") or _torchs(module) is not None
    parts = all(child is None or name in _FUSED for name, child in module._modules.items())
    lazy = any(map(nn.parameter.is_lazy, own))
    return foreign and small and parts and not lazy and not isinstance(module, torch.jit.ScriptModule)


def _tries(module: nn.Module) -> Iterator[Law]:
    """Laws that explain what a random copy of the layer puts out, at several ranks."""
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    channels = next((p.numel() for p in parameters.values()), None) or _declared(module)
    if channels < 2:
        return  # everything is normal over one value
    a, b, c = [n for n in (5, 7, 6, 4, 3) if n != channels][:3]
    for before, after in (((), (a, b)), ((a, b), ()), ((a,), ()), ((), (a,)), ((), ()), ((), (a, b, c))):
        shape = (2, *before, channels, *after)
        found: list[Any] = []

        def run(shape: tuple[int, ...] = shape, found: list[Any] = found) -> bool:
            twin, x = random_twin(module, shape)
            x = 2 * x + 0.7
            found.extend((twin, x, twin(x.clone())))
            return True

        if holds(run) and isinstance(found[-1], Tensor) and found[-1].shape == shape:
            twin, x, out = found
            yield from _explained(twin, x, out, channels, tuple(parameters))


def _declared(module: nn.Module) -> int:
    """How many channels a layer without parameters says that it is made for; any number will do if it does not."""
    for name in ("normalized_shape", "num_channels", "num_features", "hidden_size", "channels", "dim"):
        value = getattr(module, name, None)
        value = value[0] if isinstance(value, tuple | list) and len(value) == 1 else value
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 20:
            return value
    return 8


def _explained(twin: Any, x: Tensor, out: Tensor, channels: int, names: tuple[str, ...]) -> Iterator[Law]:
    act = getattr(twin, "act", None)
    finish = act if isinstance(act, nn.Module) else nn.Identity()
    orders = [(*order, "", "")[:2] for order in permutations(names)] or [("", "")]
    if len(names) == 1:
        orders.append(("", names[0]))
    for dim in (-1, 1):
        if x.shape[dim] != channels:
            continue
        for kind, plain in _plain(twin, x, dim, channels):
            for gamma, beta in orders:
                expected = plain
                if gamma:
                    expected = expected * along(getattr(twin, gamma).flatten(), x.ndim, dim)
                if beta:
                    expected = expected + along(getattr(twin, beta).flatten(), x.ndim, dim)
                if torch.allclose(out, finish(expected), 1e-3, 1e-3):
                    yield Law(kind, (channels,), dim, gamma, beta)


def _plain(twin: Any, x: Tensor, dim: int, channels: int) -> Iterator[tuple[NormKind, Tensor]]:
    """What norm layers without γ and β make of an input."""
    eps = next(
        (v for v in vars(twin).values() if isinstance(v, float) and 0 < v <= 0.01),
        1e-5,
    )
    last = x.movedim(dim, -1)
    yield "layer", F.layer_norm(last, (channels,), eps=eps).movedim(-1, dim)
    yield "rms", F.rms_norm(last, (channels,), eps=eps).movedim(-1, dim)
    if dim != 1 or x.ndim < 3:
        return
    yield "instance", F.instance_norm(x, eps=eps)
    groups = getattr(twin, "num_groups", None)
    for count in [groups] if isinstance(groups, int) else (1, 2, 4, 8, 16, 32):
        if count and channels % count == 0:
            yield "group", F.group_norm(x, count, eps=eps)


def along(parameter: Tensor, ndim: int, dim: int) -> Tensor:
    """A parameter of a norm layer in a shape that multiplies its input.

    Example:
        >>> along(torch.ones(3), 4, 1).shape, along(torch.ones(3), 4, -1).shape
        (torch.Size([3, 1, 1]), torch.Size([3]))
    """
    return parameter if dim == -1 else parameter.reshape((-1,) + (1,) * (ndim - 2))


def holds(check: Callable[[], bool]) -> bool:
    """Whether it does; a layer that wants more than a tensor of this shape is not what it is tried for."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            return check()
        except Exception:
            return False


def random_twin(norm: nn.Module, shape: tuple[int, ...], variance: float = 1.0) -> tuple[Any, Tensor]:
    """A copy in evaluation mode with random parameters, and statistics of about a variance; and an input for it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cpu")
    twin: Any = deep_copy(norm).to_empty(device="cpu").float().eval()
    for tensor in (t for t in [*twin.parameters(), *twin.buffers()] if t.is_floating_point()):
        tensor.copy_(torch.randn(tensor.shape, generator=generator, device="cpu"))
    if getattr(twin, "running_var", None) is not None:
        twin.running_var.abs_().add_(0.5).mul_(variance)
    for module in twin.modules():  # the user's hooks are not to see these values
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin, x
