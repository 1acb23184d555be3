"""The one tracer: a model's dataflow graph from one forward pass."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nfnets.errors import ForwardError, UserError, first_line
from nfnets.given import check_module
from nfnets.graph import Graph, Join, Node
from nfnets.nested import fresh, leaves, tensors_in
from nfnets.noise import silenced
from nfnets.preserve import preserved
from nfnets.tailored import TailoredActivation
from nfnets.written import as_written

__all__ = [
    "Graph",
    "Join",
    "Node",
    "Visit",
    "beside",
    "fresh",
    "is_atomic",
    "is_batch_norm_like",
    "preserved",
    "recording",
    "silenced",
    "tensors_in",
    "trace",
]

Visit = Callable[[Node, Tensor], None]


def is_batch_norm_like(module: nn.Module) -> bool:
    """Whether a module normalizes by batch or running statistics: BatchNorm of any kind, frozen ones too."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    if not (hasattr(module, "running_mean") and hasattr(module, "running_var")):
        return False
    return not isinstance(module, nn.modules.instancenorm._InstanceNorm | nn.LazyInstanceNorm1d)


def couples(module: nn.Module) -> str:
    """What a module of ours says that its training couples, such as "samples over time"; nothing for others."""
    said = getattr(module, "couples", "")
    return said if isinstance(said, str) else ""


_ATOMIC = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    torch.jit.ScriptModule,
    TailoredActivation,
)


def is_atomic(module: nn.Module) -> bool:
    """Whether the tracer records a module's call as one node: see docs/design.md."""
    if isinstance(module, _ATOMIC):
        return True
    childless_torch = not module._modules and type(module).__module__.startswith("torch.nn.modules")
    return childless_torch or is_batch_norm_like(module) or bool(couples(module))


# Results that carry no signal: only the argument's shape, type or device is read.
_SHAPE_ONLY = {"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "empty_like", "zeros_like"}
_SHAPE_ONLY |= {"ones_like", "full_like", "rand_like", "randn_like", "randint_like"}
_SHAPED_AS = {"view_as", "reshape_as", "expand_as", "type_as", "resize_as", "broadcast_to"}
"""Functions that read a second tensor for its shape or type only."""
_REFLECTED = {f"{prefix}{op}": op for op in ("add", "sub", "mul", "truediv", "matmul") for prefix in "ir"}
_SYNONYMS = {**_REFLECTED, "truediv": "div", "multiply": "mul", "divide": "div", "concat": "cat"}
_SYNONYMS |= {"concatenate": "cat", "itruediv": "div", "rtruediv": "rdiv", "subtract": "sub"}


def _function_name(function: Any) -> str:
    name = getattr(function, "__name__", None) or type(function).__name__
    if name in ("__get__", "__set__"):
        name = getattr(function.__self__, "__name__", name)
    name = name.strip("_")
    return _SYNONYMS.get(name, name)


def _version(tensors: list[Tensor]) -> int | None:
    """How often the first tensor was written to; None if that is not counted."""
    return tensors[0]._version if tensors and not tensors[0].is_inference() else None


class _Produced:
    """Which node made a tensor: by identity, and without keeping it alive."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def __setitem__(self, tensor: Tensor, node: int) -> None:
        self._known[id(tensor)] = (weakref.ref(tensor), node)

    def get(self, tensor: Tensor) -> int | None:
        entry = self._known.get(id(tensor))  # of one that was freed, perhaps: ids are used again
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def __contains__(self, tensor: Tensor) -> bool:
        return self.get(tensor) is not None


@dataclass(frozen=True, slots=True)
class _Open:
    """A module's call that has not returned yet."""

    module: nn.Module | None = None
    path: str = ""
    hidden: bool = False
    """Whether what runs inside is not recorded: it is atomic, or inside of one that is."""
    start: int = 0
    """How many nodes came before."""
    handled: BaseException | None = None
    """The exception in whose handler it is called: another one when it ends is its own."""
    inputs: tuple[int, ...] = ()
    first: Tensor | None = None
    version: int | None = None
    arguments: int = 0


def _nothing(node: Node) -> Node:
    """What stands for a call inside a module that raised, if nothing came of it."""
    return Node(node.index, "function", "raised", node.path, (), (), node.shape, node.dtype)


class _Recorder(TorchFunctionMode):
    """Records functions as a mode and modules as hooks; both write into one list of nodes."""

    def __init__(
        self,
        model: nn.Module,
        visit: Visit | None,
        norms: Collection[nn.Module] = (),
        entered: Callable[[nn.Module], None] | None = None,
    ):
        super().__init__()
        self.also = norms
        self.entered = entered
        self.nodes: list[Node] = []
        self.visit = visit
        self.produced = _Produced()
        self.names = {id(p): n for n, p in model.named_parameters(remove_duplicate=True)}
        self.norms = _norm_tensors(model, self.is_norm)
        self.read: set[str] = set()
        self.open = [_Open()]
        self.raised: set[int] = set()
        self.call_counts: dict[str, int] = {}

    def is_norm(self, module: nn.Module) -> bool:
        return is_batch_norm_like(module) or module in self.also

    def sources(self, values: Any) -> tuple[int, ...]:
        return tuple(node for t in tensors_in(values) if (node := self.produced.get(t)) is not None)

    def record(
        self, kind: str, name: str, inputs: tuple[int, ...], params: tuple[str, ...], output: Any, **more: Any
    ) -> None:
        tensors = tensors_in(output)
        path = more.pop("path", self.open[-1].path)
        node = Node(
            index=len(self.nodes),
            kind=kind,
            name=name,
            path=path,
            inputs=inputs,
            params=params,
            shape=tuple(tensors[0].shape),
            dtype=tensors[0].dtype,
            **more,
        )
        self.nodes.append(node)
        for tensor in tensors:
            self.produced[tensor] = node.index
        if self.visit is not None:
            with torch._C.DisableTorchFunction():
                self.visit(node, tensors[0])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.open[-1].hidden:
            return func(*args, **kwargs)
        arguments = tensors_in(args, kwargs)
        name = _function_name(func)
        inputs = self.sources(arguments[:1] if name in _SHAPED_AS else arguments)
        params = tuple(dict.fromkeys(self.names[id(t)] for t in arguments if id(t) in self.names))
        before = _version(arguments)
        output = func(*args, **kwargs)
        read = [self.norms[id(t)] for t in arguments if id(t) in self.norms]
        if read and name not in _SHAPE_ONLY and tensors_in(output):
            self.read.update(read)
        if not inputs and not params:
            return output
        if output is next(iter(arguments), None) and before is not None and before == _version(arguments):
            return output  # nothing happened: `.contiguous()` or `.float()` of what is so already
        written = args[0] if name == "setitem" else output
        if name in _SHAPE_ONLY or not tensors_in(written):
            return output
        if name != "setitem" and not inputs and all(id(t) in self.names for t in tensors_in(output)):
            return output
        numbers = tuple(a for a in leaves((args, kwargs)) if type(a) in (int, float))
        rescales = name in ("mul", "div") and self._rescales(arguments, output)
        if rescales:
            numbers += tuple(
                float(t.detach())
                for t in arguments
                if t.numel() == 1 and t not in self.produced and not t.is_meta
            )
        inplace = written is next(iter(arguments), None)
        more = {"constants": numbers, "rescales": rescales, "inplace": inplace}
        self.record("function", name, inputs, params, written, **more)
        base = arguments[0]._base if written is arguments[0] else None
        if base is not None:
            self.produced[base] = len(self.nodes) - 1  # an in-place write through a view changes its base too
        return output

    def _rescales(self, arguments: list[Tensor], output: Any) -> bool:
        traced = [t for t in arguments if t in self.produced and t.shape == output.shape]
        factors = [t for t in arguments if all(t is not other for other in traced)]
        per_sample = all(
            t.numel() == 1 or (set(t.shape[1:]) <= {1} and t.ndim == output.ndim) for t in factors
        )
        return len(traced) == 1 and per_sample and not any(t in self.produced for t in factors)

    @staticmethod
    def quietly(hook: Callable[..., None], *given: Any) -> None:
        """Hooks run while the mode is on, and what they ask of a tensor would go through it: slow, and no signal."""
        with torch._C.DisableTorchFunction():
            hook(*given)

    def enter(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> None:
        if self.entered is not None:
            self.entered(module)
        given = tensors_in(args)[:1]
        call = _Open(
            module,
            path,
            hidden=self.open[-1].hidden or is_atomic(module) or module in self.also,
            start=len(self.nodes),
            handled=sys.exception(),
            # Read now: an in-place module overwrites them.
            inputs=self.sources((args, kwargs)),
            first=next(iter(given), None),
            version=_version(given),
            arguments=len(args) + len(kwargs),
        )
        self.open.append(call)

    def leave(self, module: nn.Module, path: str, output: Any) -> None:
        """Also when the module raised: somebody may catch that and go on."""
        if all(call.module is not module for call in self.open):
            return  # another hook raised before `enter`
        while (call := self.open.pop()).module is not module:
            pass  # left by a `BaseException`, of which no hook is told
        if sys.exception() is not call.handled:
            self.raised.update(range(call.start, len(self.nodes)))
            return
        if self.open[-1].hidden:
            return
        tensors = tensors_in(output)
        opaque = any(t not in self.produced for t in tensors) and bool(call.inputs)
        if tensors and (call.hidden or opaque):
            # Of a childless module straight from the dictionary: several times faster.
            own = module.parameters() if module._modules else module._parameters.values()
            params = tuple(dict.fromkeys(self.names[id(p)] for p in own if id(p) in self.names))
            count = self.call_counts.get(path, 0)
            self.call_counts[path] = count + 1
            inplace = tensors[0] is call.first and _version(tensors) != call.version
            more = {"path": path, "module": module, "call": count, "inplace": inplace}
            more |= {"arguments": call.arguments, "norm": self.is_norm(module)}
            self.record("module", path, call.inputs, params, output, **more)

    def stand_in(self, tensor: Tensor, output: Tensor) -> None:
        """Note that a tensor goes on in an output's place: who reads it, reads what made the output."""
        node = self.produced.get(output)
        if node is not None:
            self.produced[tensor] = node

    def graph(self, output: Any) -> Graph:
        """The pass that was recorded, `output` what the model returned."""
        outputs = tuple(dict.fromkeys(self.sources(output)))
        needed = set(outputs)
        for node in reversed(self.nodes):
            if node.index in needed or node.index not in self.raised:
                needed.update(node.inputs)
        lost = self.raised - needed
        nodes = [_nothing(node) if node.index in lost else node for node in self.nodes]
        return Graph(nodes, outputs, frozenset(self.read))


def _norm_tensors(model: nn.Module, is_norm: Callable[[nn.Module], bool]) -> dict[int, str]:
    """Names of norm layers' parameters and buffers, by identity."""
    norms = [(path, module) for path, module in model.named_modules() if is_norm(module)]
    named = ((path, n, t) for path, m in norms for n, t in [*m.named_parameters(), *m.named_buffers()])
    return {id(tensor): f"{path}.{name}" for path, name, tensor in named}


@contextlib.contextmanager
def recording(
    model: nn.Module,
    visit: Visit | None = None,
    norms: Collection[nn.Module] = (),
    entered: Callable[[nn.Module], None] | None = None,
) -> Iterator[_Recorder]:
    """Record every forward pass of `model` that runs inside; hooks are gone afterwards.

    `entered` is called with every module before it runs.
    """
    if isinstance(model, nn.DataParallel):
        raise UserError(
            "DataParallel runs replicas in threads that no tracer sees: pass model.module instead"
        )
    recorder = _Recorder(model, visit, norms, entered)
    handles = []
    try:
        for path, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks: what it computes is part of the module that calls it
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, a, k, path=path: recorder.quietly(recorder.enter, m, path, a, k),
                    with_kwargs=True,
                    prepend=True,
                )
            )
            handles.append(
                module.register_forward_hook(
                    lambda m, a, o, path=path: recorder.quietly(recorder.leave, m, path, o),
                    always_call=True,
                )
            )
        with as_written(), recorder:
            yield recorder
    finally:
        for handle in handles:
            handle.remove()


_beside: ContextVar[TorchFunctionMode | None] = ContextVar("beside", default=None)


@contextlib.contextmanager
def beside(mode: TorchFunctionMode) -> Iterator[None]:
    """`mode` sees what recorded passes inside compute, and nothing of what is done to record them.

    Args:
        mode: a mode of functions, entered for each pass.

    Example:
        >>> class Names(TorchFunctionMode):
        ...     def __torch_function__(self, func, types, args=(), kwargs=None):
        ...         print(func.__name__)
        ...         return func(*args, **(kwargs or {}))
        >>> with beside(Names()):
        ...     graph = trace(nn.ReLU(), torch.ones(2))
        relu
    """
    token = _beside.set(mode)
    try:
        yield
    finally:
        _beside.reset(token)


def trace(
    model: nn.Module,
    *inputs: Any,
    visit: Visit | None = None,
    norms: Collection[nn.Module] = (),
    **kwargs: Any,
) -> Graph:
    """Run one forward pass and return its dataflow graph; the model is left as it was.

    Works for any model whose forward runs: data-dependent control flow, in-place operations, dict and tuple
    outputs, several inputs, shared modules; on `meta` tensors when no values are needed.

    Args:
        model: the model, in the mode (`train`/`eval`) whose graph is wanted.
        *inputs: what its forward takes.
        visit: called as `visit(node, output)` right after each node ran, before anything downstream can
            overwrite the tensor in place.
        norms: modules that count as norm layers beside BatchNorm, each call one node.
        **kwargs: keyword arguments of the forward.

    Returns:
        The graph: nodes in execution order and residual joins.

    Raises:
        UserError: the model rejects the inputs, or no tensor reaches the output.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        >>> [node.name for node in trace(model, torch.randn(2, 3, 8, 8)).nodes]
        ['input', '0', '1', '2']
    """
    check_module(model)
    with preserved(model), torch.no_grad(), recording(model, visit, norms) as recorder:
        graph, output = run(recorder, model, inputs, kwargs)
        if not tensors_in(output):
            given = f"{type(model).__name__}.forward returns no tensor (type {type(output).__name__})"
            raise UserError(f"{given}: expected a tensor or a container of tensors; return what it computes")
        return graph


def run(recorder: _Recorder, model: nn.Module, inputs: Any, kwargs: Any) -> tuple[Graph, Any]:
    """One forward pass of a model that is being recorded, on copies of its inputs: the graph, and what it returned.

    Raises:
        UserError: the model rejects the inputs.
    """
    inputs, kwargs = fresh((inputs, kwargs))
    given = tensors_in(inputs, kwargs)
    for tensor in given:
        recorder.record("input", "input", (), (), tensor, path="")
    try:
        with _beside.get() or contextlib.nullcontext():
            output = model(*inputs, **kwargs)
    except UserError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in given)
        reason = first_line(error).removesuffix(
            ", but expected one of:"
        )  # torch lists signatures on further lines
        message = (
            f"the model's forward fails on inputs {shapes or 'of no tensor'}: {reason}; nothing was changed"
        )
        raise ForwardError(f"{message}, pass example inputs that model(*inputs) accepts", reason) from error
    return recorder.graph(output), output
