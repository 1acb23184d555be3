"""The tracer on models whose graph is known by hand."""

import copy
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torchvision
from timm.layers import DropPath
from torch import Tensor, nn

from nfnets.errors import UserError
from nfnets.trace import Graph, is_batch_norm_like, silenced, trace


def names(graph: Graph) -> list[str]:
    return [node.name for node in graph.nodes]


class Block(nn.Module):
    """torchvision's block shape, with every in-place trap."""

    def __init__(self, how: str = "iadd"):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.how == "iadd":
            out += x
        elif self.how == "add_":
            out.add_(x)
        elif self.how == "torch.add":
            out = torch.add(x, out)
        elif self.how == "alpha":
            out = x + 0.2 * out
        elif self.how == "view":
            out.view(-1).add_(x.reshape(-1))
        elif self.how == "radd":
            out = sum([x, out])
        return self.relu(out)


@pytest.mark.parametrize("how", ["iadd", "add_", "torch.add", "alpha", "radd"])
def test_every_way_to_write_a_residual_join(how: str) -> None:
    graph = trace(Block(how), torch.randn(2, 4, 6, 6))
    (join,) = graph.joins
    assert graph.nodes[join.node].name == "add"
    assert graph.nodes[join.split].kind == "input"
    assert join.shortcut == join.split or graph.nodes[join.shortcut].name == "add"  # sum() starts at 0 + x
    assert graph.nodes[join.branch_end].name == "bn2"
    assert [graph.nodes[i].name for i in join.branch_nodes] == ["conv1", "bn1", "conv2", "bn2"]
    assert join.shortcut_nodes == ()
    assert [node.call for node in graph.calls("relu")] == [0, 1]
    assert graph.nodes[graph.outputs[0]].name == "relu"


def test_an_inplace_write_through_a_view_reaches_its_base() -> None:
    graph = trace(Block("view"), torch.randn(2, 4, 6, 6))
    last = graph.calls("relu")[-1]
    assert graph.nodes[last.inputs[0]].name == "add"


@pytest.mark.parametrize(
    ("build", "joins", "convs"),
    [
        (torchvision.models.resnet18, 8, 20),
        (torchvision.models.resnet50, 16, 53),
        (lambda: timm.create_model("resnet26d"), 8, 31),
        (lambda: timm.create_model("nf_resnet26"), 8, 29),
    ],
)
def test_resnets_and_meta(build, joins: int, convs: int) -> None:
    model, x = build(), torch.randn(2, 3, 64, 64)
    graph = trace(model, x)
    assert len(graph.joins) == joins
    assert sum(isinstance(node.module, nn.Conv2d) for node in graph.nodes) == convs
    on_meta = trace(copy.deepcopy(model).to("meta"), x.to("meta"))
    assert [(n.name, n.inputs, n.shape) for n in on_meta.nodes] == [
        (n.name, n.inputs, n.shape) for n in graph.nodes
    ]
    assert [(j.node, j.branch_end) for j in on_meta.joins] == [(j.node, j.branch_end) for j in graph.joins]


def test_execution_order_matches_forward_hooks() -> None:
    model, seen = torchvision.models.resnet18(), []
    for path, module in model.named_modules():
        if not any(module.children()):
            module.register_forward_hook(lambda *_, path=path: seen.append(path))
    model(torch.randn(2, 3, 64, 64))
    seen_once, seen[:] = list(seen), []
    graph = trace(model, torch.randn(2, 3, 64, 64))
    assert [node.path for node in graph.nodes if node.kind == "module"] == seen_once == seen


def test_nothing_is_changed() -> None:
    model = torchvision.models.resnet18()
    model.bn1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    trace(model, torch.ones(2, 3, 64, 64))
    assert torch.equal(torch.randn(3), expected)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_data_dependent_control_flow_dicts_and_several_inputs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, batch: dict[str, Tensor], bias: Tensor) -> dict[str, Tensor]:
            x = batch["x"]
            h = self.a(x) if float(x.sum()) > 0 else self.b(x)
            return {"h": h + bias, "z": h}

    model = Model()
    graph = trace(model, {"x": torch.ones(2, 4)}, torch.zeros(2, 4))
    assert len(graph.calls("a")) == 1
    assert not graph.calls("b")
    assert len(graph.outputs) == 2
    assert graph.joins == ()  # the two inputs share no ancestor
    assert len(trace(model, {"x": -torch.ones(2, 4)}, bias=torch.zeros(2, 4)).calls("b")) == 1


def test_visit_sees_each_output_before_it_is_overwritten() -> None:
    seen: dict[str, float] = {}
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    trace(
        model, torch.randn(2, 3, 8, 8), visit=lambda node, out: seen.setdefault(node.name, float(out.min()))
    )
    assert seen["0"] < 0 <= seen["1"]


def test_scalings_end_no_branch() -> None:
    class Scaled(Block):
        def __init__(self) -> None:
            super().__init__()
            self.skip, self.drop = nn.Parameter(torch.zeros(())), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            mask = torch.empty(len(x), 1, 1, 1).bernoulli_(0.5)
            return x + self.drop(out * mask) * self.skip * 0.2

    graph = trace(Scaled(), torch.randn(2, 4, 6, 6))
    assert graph.nodes[graph.joins[0].branch_end].name == "bn2"


def test_a_gate_is_no_scaling() -> None:
    graph = trace(timm.create_model("seresnet50"), torch.randn(2, 3, 64, 64))
    assert {graph.nodes[join.branch_end].name for join in graph.joins} == {"mul"}


def test_hooks_are_gone_after_an_exception() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            self.layer(x)
            raise RuntimeError("no luck")

    model = Breaks()
    with pytest.raises(UserError, match="no luck"):
        trace(model, torch.randn(3, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert int(model.layer.num_batches_tracked) == 0


def test_ancestors_by_brute_force() -> None:
    graph = trace(torchvision.models.resnet18(), torch.randn(2, 3, 64, 64))

    def walk(index: int) -> set[int]:
        found = set(graph.nodes[index].inputs)
        return found.union(*(walk(i) for i in found)) if found else found

    for index in (5, 12, 20):
        assert graph.ancestors(index) == walk(index)
    for node in graph.nodes:
        assert all(node.index in graph.nodes[c].inputs for c in graph.consumers(node.index))


def test_compiled_model_is_traced_eagerly() -> None:
    graph = trace(torch.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU())), torch.randn(2, 4))
    assert [node.kind for node in graph.nodes] == ["input", "module", "module"]


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates the scripting that old models use

    @torch.jit.script
    def swish(x: Tensor) -> Tensor:
        return x * x.sigmoid()

    @torch.jit.script
    def added(x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x + swish(y))


class ScriptedJoin(nn.Module):
    """A block that adds its shortcut in a scripted function, as fused activations do."""

    def __init__(self, of: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.of = of

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x, self.bn(self.conv(x)))


def test_scripted_functions_are_seen_as_the_python_they_were_written_in() -> None:
    block, x = ScriptedJoin(added), torch.randn(2, 4, 8, 8)
    before = block.eval()(x)
    graph = trace(block, x)
    assert names(graph) == ["input", "conv", "bn", "sigmoid", "mul", "add", "relu"]
    assert len(graph.joins) == 1
    assert torch.equal(block(x), before)
    assert isinstance(added(x, x), Tensor)


def test_threads_that_trace_at_the_same_time_leave_compilation_and_scripting_as_they_were() -> None:
    x, scripted = torch.randn(2, 4, 8, 8), torch.jit.ScriptFunction.__call__
    second_runs, first_ended = threading.Event(), threading.Event()

    def first(*_: object) -> None:
        assert second_runs.wait(60)

    def second(*_: object) -> None:
        second_runs.set()
        assert first_ended.wait(60)

    with ThreadPoolExecutor(2) as threads:
        tracing = threads.submit(trace, ScriptedJoin(added), x, visit=first)
        late = threads.submit(trace, ScriptedJoin(added), x, visit=second)
        assert "add" in names(tracing.result(60))
        first_ended.set()
        assert "add" in names(late.result(60))
    assert torch.jit.ScriptFunction.__call__ is scripted
    compiled = torch.compile(lambda x: x + torch.compiler.is_compiling(), backend="eager")
    assert torch.equal(compiled(x), x + 1)


def test_a_scripted_function_without_python_still_runs() -> None:
    code = "def added(x: Tensor, y: Tensor) -> Tensor:\n    return torch.relu(x + y)\n"
    loaded = torch.jit.CompilationUnit(code).added  # as from a file
    assert names(trace(ScriptedJoin(loaded), torch.randn(2, 4, 8, 8)))[:3] == ["input", "conv", "bn"]


def test_data_parallel_is_refused() -> None:
    with pytest.raises(UserError, match=r"model\.module"):
        trace(nn.DataParallel(nn.Linear(2, 2)), torch.randn(2, 2))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm2d(4), True),
        (nn.SyncBatchNorm(4), True),
        (torchvision.ops.FrozenBatchNorm2d(4), True),
        (timm.layers.BatchNormAct2d(4), True),
        (nn.BatchNorm1d(4, affine=False, track_running_stats=False), True),
        (nn.InstanceNorm2d(4, track_running_stats=True), False),
        (nn.GroupNorm(2, 4), False),
        (nn.LayerNorm(4), False),
    ],
)
def test_what_counts_as_batch_norm(module: nn.Module, expected: bool) -> None:
    assert is_batch_norm_like(module) is expected


def test_silencing_noise_leaves_what_it_wraps() -> None:
    """timm's `ResidualDrop` holds a whole branch: its norm layers must go on reading the batch."""

    class ResidualDrop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5))

    model = ResidualDrop().train()
    with silenced(model):
        assert [module.training for module in (model, model.m[0], model.m[1])] == [False, True, False]
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("noise", "apart"),
    [
        (nn.Dropout(0.5), True),
        (nn.Dropout(0.0), False),  # puts out its input in training too
        (nn.Dropout(0.5, inplace=True), False),
        (nn.Dropout(0.5).eval(), False),
        (DropPath(0.5), True),
        (DropPath(0.0), False),
    ],
    ids=["dropout", "rate 0", "in place", "evaluation", "path", "path, rate 0"],
)
def test_silenced_noise_puts_out_a_new_tensor_where_it_does_in_training(
    noise: nn.Module, apart: bool
) -> None:
    x = torch.randn(4, 3)
    same = noise(x) is x or noise(x).data_ptr() == x.data_ptr()
    assert same is not apart
    model = nn.Sequential(noise, nn.ReLU(inplace=True))
    given = x.clone()
    with silenced(model):
        assert torch.equal(model(given), x.relu())
    assert torch.equal(given, x) is apart
    assert not any(m._forward_hooks for m in model.modules())


def test_who_writes_in_place_and_who_only_reads_a_shape() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.over, self.apart, self.same = nn.ReLU(inplace=True), nn.ReLU(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.same(self.over(self.apart(x)))
            y += 1
            z = y.flatten(1).sigmoid()
            return z.reshape_as(y)

    nodes = trace(Net(), torch.randn(2, 3, 4)).nodes
    assert [(node.name, node.inplace) for node in nodes if node.name != "input"] == [
        ("apart", False),
        ("over", True),
        ("same", False),
        ("add", True),
        ("flatten", False),
        ("sigmoid", False),
        ("reshape_as", False),
    ]
    assert nodes[-1].inputs == (nodes[-1].index - 1,)
