"""Every method's and every family's model compiles to one graph, exports with a dynamic batch, and runs in onnxruntime.

`NFNETS_GRID=all` (`make soak`) runs the whole product, and inductor; otherwise methods whose layers have a forward of
their own go through every tool, each other method and each family through one.
"""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from soak import ALL
from torch import Tensor, nn

import nfnets
from nfnets.convert import list_methods
from nfnets.models import create_model

SLIM: dict[str, Any] = {
    "depths": (1, 1, 1, 2),
    "widths": (32, 32, 64, 64),
    "group_width": 16,
    "final_width": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "nf_resnet8_cifar": {},
    "nf_resnet26": {"depths": (1, 1, 1, 1), "widths": (32, 64, 64, 64)},
    "nf_regnet_b0": {"depths": (1, 1, 1, 2), "final_width": 64},
    "nfnet_f0": SLIM,
    "nfnet_l0": SLIM | {"group_width": 8},
    "eca_nfnet_l0": SLIM | {"group_width": 8},
    "fixup_resnet8_cifar": {},
    "fixup_resnet18": {"widths": (16, 16, 32, 32), "depths": (1, 1, 1, 1)},
    "bn_resnet8_cifar": {"width": 0.5},
    "bn_nf_resnet8_cifar": {},
    "bn_nfnet_l0": SLIM | {"group_width": 8},
    "bn_fixup_resnet8_cifar": {},
    "bn_fixup_resnet18": {},
}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
# Deprecations inside torch's exporters and onnxscript are theirs to mend.
theirs = pytest.mark.filterwarnings("ignore")


def images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def family(name: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    options = dict(FAMILIES[name])
    if name == "fixup_resnet18":
        model: nn.Module = nfnets.models.FixupResNet(
            options["depths"], options["widths"], 10, stem="7x7_pool", shortcut="projection"
        )
    else:
        model = create_model(name, num_classes=10, **options)
    with torch.no_grad():  # branches and heads that start at zero would hide errors
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model, 16 if name.endswith("_cifar") else 64


class Mixed(nn.Module):
    """What the methods meet: residual joins, groups, a concat, an in-place activation, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True))
        self.branch = nn.Sequential(
            *(nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8), nn.SiLU()),
            *(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)),
        )
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2, bias=False), nn.BatchNorm2d(8), nn.GELU())
        self.norm = nn.BatchNorm2d(11)
        self.depthwise = nn.Conv2d(11, 11, 3, padding=1, groups=11, bias=False)
        self.last = nn.BatchNorm2d(11)
        self.head = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = torch.relu(h + self.branch(h))
        h = torch.cat([self.up(h), x], 1).contiguous()
        h = self.last(self.depthwise(self.norm(h).relu())).relu()
        return self.head(h.mean((2, 3)))


def converted(method: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    net: nn.Module = Mixed() if method not in ("fixup", "skipinit") else create_model("bn_resnet8_cifar")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    net(images(16, 16))  # running statistics worth folding
    model = nfnets.convert(net.eval() if method == "fold" else net, images(8, 16), method=method)
    return model.train(), 16


def subject(name: str, baked: bool) -> tuple[nn.Module, int]:
    model, size = family(name) if name in FAMILIES else converted(name)
    return (nfnets.bake(model) if baked else model), size


TOOLS = ("export", "onnx", "compile")
OWN = {"nf", "evonorm_s0"}
"""Methods that leave layers with a forward of their own, by every tool; the others by one."""


SLOW = {"nf_resnet26", "bn_nfnet_l0", "nfnet_l0", "nfnet_f0", "bn_fixup_resnet18"}
"""Families of many blocks, whose layers others have, too: `make soak` alone."""


def tools_of(name: str, number: int) -> tuple[str, ...]:
    """What a method or family is tried with in `make test`."""
    if name in OWN:
        return TOOLS
    return () if name in SLOW else (TOOLS[number % len(TOOLS)],)


def subjects(tool: str) -> Any:
    """Every method and family, baked and not; otherwise each once, in turn one and the other, by one tool in turn."""
    names = [*list_methods(), *FAMILIES]
    chosen = [
        (name, bool(baked))
        for i, name in enumerate(names)
        for baked in (0, 1)
        if ALL or (baked == i % 2 and tool in tools_of(name, i))
    ]
    cases = [pytest.param(*case, id=f"{case[0]}{'-baked' if case[1] else ''}") for case in chosen]
    return pytest.mark.parametrize(("name", "baked"), cases)


@subjects("compile")
@theirs
def test_compiles_to_one_graph(name: str, baked: bool) -> None:
    # In fp64: in fp32 a single activation within rounding of ReLU's kink moves the first layer's gradient by a percent.
    model, size = subject(name, baked)
    model, x = model.double(), images(4, size).double()
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(twin, fullgraph=True, backend="inductor" if ALL else "aot_eager")
    # Online Normalization's backward pass moves buffers: compiled, it trains in several graphs (test_methods_stateful).
    for training in (True, False) if name != "online" else (False,):
        outputs, expected = compiled.train(training)(x), model.train(training)(x)
        torch.testing.assert_close(outputs, expected, **TOLERANCE)
        if training:
            outputs.square().sum().backward()
            expected.square().sum().backward()
            for (path, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
                assert (one.grad is None) == (other.grad is None), path
                if one.grad is not None:
                    scale = one.grad.abs().max().item()
                    torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4 * max(1, scale))


@subjects("export")
@theirs
@pytest.mark.parametrize("strict", [False, True] if ALL else [False])
def test_exports_with_a_dynamic_batch(name: str, baked: bool, strict: bool) -> None:
    model, size = subject(name, baked)
    model.eval()
    program = torch.export.export(
        model, (images(2, size),), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict
    )
    stored = io.BytesIO()
    torch.export.save(program, stored)
    again: Any = torch.export.load(io.BytesIO(stored.getvalue())).module()
    with torch.no_grad():
        for batch in (2, 5):
            torch.testing.assert_close(again(images(batch, size)), model(images(batch, size)), **TOLERANCE)


@subjects("onnx")
@theirs
def test_onnxruntime_agrees(name: str, baked: bool) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, size = subject(name, baked)
    model.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (images(2, size),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        assert program is not None
        stored = io.BytesIO()
        program.save(stored)
        if (
            baked
            and not name.startswith("bn_")
            and name
            not in (
                "gn",
                "ln",
                "ws_gn",
                "evonorm_s0",
                "ghost_bn",
                "bcn",
                "online",
            )
        ):
            operators = {node.op_type for node in program.model_proto.graph.node}
            assert not operators & {"BatchNormalization", "InstanceNormalization", "ReduceL2", "Sqrt"}
        session = onnxruntime.InferenceSession(stored.getvalue(), providers=["CPUExecutionProvider"])
        for batch in (2, 5):
            x = images(batch, size)
            (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(np.asarray(answer)), model(x), **TOLERANCE)


@theirs
@pytest.mark.parametrize("method", list_methods())
def test_torch_fx_traces(method: str) -> None:
    """With and without gradients: weights that are remembered without them must not end up as constants."""
    model, size = converted(method)
    for training in (True, False):
        model.train(training)
        if training and method == "ghost_bn":
            with pytest.raises(RuntimeError, match="'len' is not supported in symbolic tracing"):
                torch.fx.symbolic_trace(model)
            continue
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                traced = torch.fx.symbolic_trace(model)
            x = images(4, size)
            # Copies, for what follows statistics moves on with every call.
            torch.testing.assert_close(copy.deepcopy(traced)(x), copy.deepcopy(model)(x))
            assert dict(traced.named_parameters()).keys() == dict(model.named_parameters()).keys()
            traced.zero_grad()
            traced(x).square().sum().backward()
            assert all(parameter.grad is not None for parameter in traced.parameters())


@theirs
@pytest.mark.parametrize("method", ["nf", "evonorm_s0"])
def test_torchscript_by_tracing(method: str) -> None:
    model, size = converted(method)
    scripted: Any = torch.jit.trace(model.eval(), images(2, size))
    with torch.no_grad():
        torch.testing.assert_close(scripted(images(2, size)), model(images(2, size)), **TOLERANCE)
