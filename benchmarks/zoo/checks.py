"""The checks of a conversion: each takes what was measured and returns a `Verdict`."""

from __future__ import annotations

import copy
import math
import pickle
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.build import DETECTION, Entry
from benchmarks.zoo.measure import (
    Measured,
    Sample,
    deviation,
    heads_of,
    inside_branch,
    joins_of,
    last_at,
    other_neighbors,
    reaching,
    sample_of,
    sums_of,
)
from nfnets.convert.alpha import branch_scales
from nfnets.structure.walk import is_weighted
from nfnets.trace import Graph, is_batch_norm_like

FACTOR = 4.0
OUTPUT_RTOL = 1e-4
GRADIENT_RTOL = 1e-3
STARTS_AT_ZERO = ("fixup", "skipinit")
"""Methods whose scalars or last layers are 0 at first, so that other gradients are too."""
SCALED = ("nf", "fixed_variance", "lsuv")
"""Methods that multiply branches by α."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found."""

    passed: bool
    detail: str = ""
    worst: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values; an infinite deviation as None."""
        worst = self.worst if self.worst is not None and math.isfinite(self.worst) else None
        return {"passed": self.passed, "detail": self.detail[:300], "worst": worst}


# The original


def fingerprint(model: nn.Module) -> int:
    """A checksum of every module's type and mode, and of every tensor's name, type, shape, flags and bits."""
    code = 0
    for path, module in model.named_modules():
        code = zlib.crc32(f"{path}:{type(module).__qualname__}:{module.training}".encode(), code)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        code = zlib.crc32(
            f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:{tensor.requires_grad}".encode(), code
        )
        code = zlib.crc32(_bits(tensor), code)
    return code


def _bits(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def original_unchanged(before: int, model: nn.Module) -> Verdict:
    """Whether the model that was converted is bit for bit what it was."""
    same = fingerprint(model) == before
    return Verdict(same, "" if same else "a tensor, type or mode of the original changed")


# Names


def names_kept(original: nn.Module, converted: nn.Module) -> Verdict:
    """Class, attribute paths and `state_dict` prefixes: all as before, except inside what replaced a norm layer."""
    if type(converted) is not type(original):
        return Verdict(False, f"class {type(converted).__name__}, was {type(original).__name__}")
    everywhere = original.named_modules(remove_duplicate=False)  # MONAI registers a layer under several names
    norms = tuple(f"{path}." for path, m in everywhere if is_batch_norm_like(m))
    before = {path for path, _ in original.named_modules(remove_duplicate=False)}
    after = {path for path, _ in converted.named_modules(remove_duplicate=False)}
    if lost := sorted(path for path in before - after if not path.startswith(norms)):
        return Verdict(False, f"lost modules: {', '.join(lost[:3])} ({len(lost)} in all)")
    if new := sorted(path for path in after - before if not path.startswith(norms)):
        return Verdict(False, f"new modules: {', '.join(new[:3])} ({len(new)} in all)")
    kept = set(converted.state_dict())
    if lost := sorted(key for key in original.state_dict() if key not in kept and not key.startswith(norms)):
        return Verdict(False, f"lost state_dict keys: {', '.join(lost[:3])} ({len(lost)} in all)")
    strangers = sorted(key for key in kept if key.rpartition(".")[0] not in after)
    return Verdict(not strangers, f"keys under no module: {', '.join(strangers[:3])}" if strangers else "")


def norm_gone(converted: nn.Module, before: Graph | None = None) -> Verdict:
    """No BatchNorm-like layer is left, but frozen ones and those that no call of the original (`before`) passed."""
    left = [path for path, m in converted.named_modules() if is_batch_norm_like(m) and not _is_frozen(m)]
    left = [path for path in left if before is None or before.calls(path)]
    return Verdict(not left, f"left: {', '.join(left[:3])} ({len(left)} in all)" if left else "")


def _is_frozen(module: nn.Module) -> bool:
    """A norm layer that holds nothing but buffers couples no samples: methods leave it, `fold` folds it."""
    return not isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
        True for _ in module.parameters()
    )


# The pass


def finite(after: Measured) -> Verdict:
    """Outputs and gradients are finite in training mode."""
    if after.finite:
        return Verdict(True)
    wrong = [name for name, norm in after.gradients.items() if not math.isfinite(norm)]
    return Verdict(False, f"gradient of {wrong[0]} ({len(wrong)} in all)" if wrong else "an output")


def gradients(
    before: Measured, after: Measured, converted: nn.Module, method: str, chooses: bool = False
) -> Verdict:
    """Every parameter that had a gradient in the BN model still has one, and so has every new one on an output's path.

    A gradient must also not vanish where the BN model's does not, except for methods that start branches at zero, and
    where the loss `chooses` what it reads: a detector samples a few of its boxes by their outputs.
    """
    old, useful = before.gradients, reaching(after.graph)
    trained = [name for name, p in converted.named_parameters() if p.requires_grad]
    known = reaching(before.graph) | set(old)
    wanted = [n for n in trained if (n in old if n in known else n in useful)]
    if missing := [name for name in wanted if name not in after.gradients]:
        return Verdict(False, f"none for {', '.join(missing[:3])} ({len(missing)} in all)", len(missing))
    if method in STARTS_AT_ZERO or chooses:
        return Verdict(True)
    zero = [name for name in wanted if after.gradients[name] == 0 and _was_trained(name, old)]
    return Verdict(
        not zero, f"zero for {', '.join(zero[:3])} ({len(zero)} in all)" if zero else "", len(zero)
    )


def _was_trained(name: str, old: dict[str, float]) -> bool:
    """Whether a parameter's gradient was not zero in the BN model; of a new one, those of the module it stands in.

    What batch statistics cancel (a shift before a norm layer) has a gradient of rounding errors: that counts as zero.
    """
    least = 1e-6 * max(old.values(), default=0.0)
    if name in old:
        return old[name] > least
    prefix = name
    while prefix:
        prefix = prefix.rpartition(".")[0]  # what replaces a fused norm layer lies one level below it
        beside = [norm for other, norm in old.items() if other.rpartition(".")[0] == prefix]
        if beside:
            return all(norm > least for norm in beside)
    return True


def signal(before: Measured, after: Measured, converted: nn.Module, method: str) -> Verdict:
    """Root mean squares within a factor 4 of the BN model's, at every residual point and at the head.

    Both in training mode on the same unit normal batch, dropout and stochastic depth off, the BN model as its own
    initializer left it. Residual points are the sums that join a branch to its shortcut, the head is what the last
    weight or norm layers before the outputs put out. The statistic is sqrt(mean of x²) over samples, channels and
    positions. A point where both are zero agrees. Inside a branch a sum may be smaller where it has been multiplied by
    the branch's α (the paper's residual variance is the one before α), or where a method starts branches at zero: it
    is zero there, or has Fixup's L^(−1/(2m−2)). Where a method starts a classifier at exactly zero, as Fixup does,
    what the classifier reads is compared instead, and nothing behind it. Where there is no residual point and no head,
    the outputs are.
    """
    ratios: dict[str, float] = {}
    sums = sums_of(after.graph)
    scales = branch_scales(converted, before.graph, None) if method in SCALED else {}
    heads = heads_of(before.graph)
    weighted = [node.index for node in after.graph.nodes if node.params and node.kind == "module"]
    empty = [
        index
        for index in weighted
        if _zero_weight(converted, after.graph.nodes[index].path)
        and not any(other > index and after.graph.depends(other, index) for other in weighted)
    ]
    for name, index in joins_of(before.graph).items():
        found = sums.get(name)
        if found is not None and any(after.graph.depends(found, zero) for zero in empty):
            continue
        ratio = _ratio(before, index, after, found)
        if ratio < 1 and inside_branch(before.graph, index):
            if method in STARTS_AT_ZERO:
                continue
            ratio = min(1.0, ratio / _alpha(scales, before.graph, index))
        ratios[name] = ratio
    for path, index in heads.items():
        found = last_at(after.graph, path)
        if found is not None and after.powers.get(found) == 0 and _zero_weight(converted, path):
            index, found = _fed_by(before, index), _fed_by(after, found)
        if index is not None:
            ratios[f"head {path}"] = _ratio(before, index, after, found)
    if not ratios:  # a library's own weight layers end it, in a sum
        ends = zip(before.graph.outputs, after.graph.outputs, strict=False)
        ratios = {f"output {n}": _ratio(before, old, after, new) for n, (old, new) in enumerate(ends)}
    name, worst = max(ratios.items(), key=lambda item: abs(math.log(item[1])) if item[1] else math.inf)
    far = sum(not 1 / FACTOR <= ratio <= FACTOR for ratio in ratios.values())
    where = f"{worst:.3g}× at {name}"
    return Verdict(not far, f"{where}; {far} of {len(ratios)} points" if far else where, worst)


def _ratio(before: Measured, index: int, after: Measured, found: int | None) -> float:
    old, new = before.powers.get(index), None if found is None else after.powers.get(found)
    if old is None or new is None:
        return math.inf  # the point is gone
    if not math.isfinite(new):
        return math.inf
    if old == 0 or new == 0:
        return 1.0 if old == new else (math.inf if old == 0 else 0.0)
    return math.sqrt(new / old)


def _alpha(scales: dict[int, float], graph: Graph, index: int) -> float:
    """The smallest α by which what is summed in a node is multiplied before; 1 if there is none."""
    waiting, seen, found = [index], set[int](), [1.0]
    while waiting:
        node = graph.nodes[waiting.pop()]
        if node.index in seen:
            continue
        seen.add(node.index)
        if node.index in scales:
            found.append(scales[node.index])
        elif not is_weighted(node.module):
            waiting += node.inputs
    return min(found)


def _zero_weight(model: nn.Module, path: str) -> bool:
    weight = getattr(model.get_submodule(path), "weight", None)
    return isinstance(weight, Tensor) and not weight.any()


def _fed_by(measured: Measured, index: int) -> int | None:
    """The nearest measured node before this one, along first inputs."""
    nodes = measured.graph.nodes
    while nodes[index].inputs:
        index = nodes[index].inputs[0]
        if index in measured.powers:
            return index
    return None


# Batch independence and copies


def independence_and_copies(
    entry: Entry, converted: nn.Module, inputs: tuple[Any, ...], seen: Sample, original: nn.Module
) -> dict[str, Verdict]:
    """Both in one pass: a copy of a copy runs beside other neighbors and must repeat what sample 0 saw.

    Independence: sample 0's outputs and the gradient of the summed loss in its inputs are the same whatever the other
    samples are and however many, dropout and stochastic depth off. A detector's images pass through random sampling
    of proposals together, so there it is its backbone's features that are compared.
    Copies: the copy was made by `deepcopy`, then `pickle` (unless the `original` cannot be pickled), then had every
    tensor zeroed and loaded from the `state_dict`. Only when that run disagrees, each part is looked at alone.
    """
    run, given = _runnable(entry, converted, inputs)
    if entry.kind == DETECTION:
        seen = sample_of(run(converted), given, converted)
    try:
        twin = _pickled(_copied(converted, inputs), original)
        _reload(twin, converted)
    except Exception as error:
        copies = Verdict(False, f"{type(error).__name__}: {error}")
        return {"independent": _independent(run, given, converted, seen), "copies": copies}
    neighbors = _independent(run, given, twin, seen)
    if neighbors.passed:
        return {"independent": neighbors, "copies": Verdict(True)}
    repeated = _distance(seen, sample_of(run(twin), given, twin))
    copies = Verdict(
        repeated <= OUTPUT_RTOL, "" if repeated <= OUTPUT_RTOL else f"a copy differs by {repeated:.1e}"
    )
    return {"independent": _independent(run, given, converted, seen), "copies": copies}


def _copied(model: nn.Module, inputs: tuple[Any, ...]) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError:  # it keeps tensors of its last forward, which nothing can copy with their history
        with torch.no_grad():
            model(*inputs)
        return copy.deepcopy(model)


def _pickled(model: nn.Module, original: nn.Module) -> nn.Module:
    # By way of the disk where it is large: the bytes beside two models would be a third one.
    with tempfile.SpooledTemporaryFile(max_size=2**30) as file:
        try:
            pickle.dump(model, file, protocol=5)
        except Exception:  # parametrized layers, and hooks of transformers, cannot be pickled in any model
            if _can_be_pickled(original):
                raise
            return model
        del model
        file.seek(0)
        return pickle.load(file)


def _can_be_pickled(model: nn.Module) -> bool:
    try:
        pickle.dumps(model, protocol=5)
    except Exception:
        return False
    return True


def _runnable(
    entry: Entry, model: nn.Module, inputs: tuple[Any, ...]
) -> tuple[Callable[[nn.Module], Callable[..., Any]], tuple[Any, ...]]:
    if entry.kind != DETECTION:
        return (lambda m: m), inputs
    images = torch.stack(inputs[0])
    return (lambda m: m.backbone), (torch.cat([images, images.flip(-1)]),)


def _independent(
    run: Callable[[nn.Module], Callable[..., Any]], given: tuple[Any, ...], model: nn.Module, seen: Sample
) -> Verdict:
    # Two samples cost least; but kernels may round a batch of another size otherwise, so a doubt is settled at
    # the same size.
    verdict = Verdict(False)
    wanted = any(t.is_floating_point() and t.ndim > 1 for t in given)  # or there is nothing but indices
    for batch in dict.fromkeys((2, max(len(t) for t in given))):
        other = sample_of(run(model), other_neighbors(given, batch), model)
        moved, turned = deviation(seen.outputs, other.outputs), deviation(seen.gradients, other.gradients)
        detail = (
            f"other samples move sample 0's output by {moved:.1e}, its gradient by {turned:.1e} (relative)"
        )
        passed = moved <= OUTPUT_RTOL and turned <= GRADIENT_RTOL and bool(seen.gradients) == wanted
        verdict = Verdict(passed, detail, max(moved, turned))
        if passed:
            break
    return verdict


def _distance(a: Sample, b: Sample) -> float:
    return deviation(a.outputs, b.outputs)


def _reload(twin: nn.Module, model: nn.Module) -> None:
    state = model.state_dict()
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    twin.load_state_dict(state, strict=True)
    for name, tensor in twin.state_dict().items():
        if not torch.equal(tensor, state[name]) and not bool(torch.isnan(tensor).any()):
            raise ValueError(f"{name} did not come back from the state_dict")


def compiles(converted: nn.Module, inputs: tuple[Any, ...], backend: str = "aot_eager") -> Verdict:
    """Whether `torch.compile` runs the model in training mode and gives what it gives without; aot_eager by default:
    tracing and automatic differentiation are what a conversion could break, code generation costs a minute each.
    """
    from torch import _dynamo

    _dynamo.reset()
    try:
        plain = sample_of(converted, inputs, converted)
        compiled = sample_of(torch.compile(converted, backend=backend), inputs, converted)
    except Exception as error:
        return Verdict(False, f"{type(error).__name__}: {error}".splitlines()[0])
    finally:
        _dynamo.reset()
    moved = _distance(plain, compiled)
    return Verdict(moved <= OUTPUT_RTOL, f"{backend}: output differs by {moved:.1e} (relative)", moved)
