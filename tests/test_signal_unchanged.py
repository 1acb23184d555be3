"""A probe changes nothing, cleans up behind exceptions, and says what it cannot measure."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nfnets.agc import attach_agc
from nfnets.errors import UserError
from nfnets.signal import assert_signal, probe, profile

X = torch.randn(4, 3, 8, 8)


def hooks(model: nn.Module) -> int:
    return sum(
        len(getattr(m, name))
        for m in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Everything that must not change, bitwise."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "rng": torch.get_rng_state(),
        "hooks": hooks(model),
        "forward": "forward" in model.__dict__,
        "ids": [id(t) for t in (*model.parameters(), *model.buffers())],
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


class Net(nn.Module):
    """Norms, dropout, in-place operations and a branch that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(x)))
        y = self.last(self.drop(x))
        y += x
        return self.fc(y.mean((2, 3)))


def train(model: nn.Module, around: Callable[[nn.Module], object] | None, steps: int = 3) -> list[Tensor]:
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outputs = []
    with around(model) if around else torch.enable_grad():  # type: ignore[attr-defined]
        for _ in range(steps):
            out = model(torch.randn(4, 3, 8, 8))
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
            outputs.append(out.detach())
    return [*outputs, *(v.clone() for v in model.state_dict().values()), torch.get_rng_state()]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_profile_leaves_everything_bitwise(backward, training):
    model = Net().train(training)
    model.norm.eval()
    model.conv.weight.requires_grad_(False)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    x = torch.randn(4, 3, 8, 8)
    before, batch = fingerprint(model), x.clone()
    profile(model, x, backward=backward)
    assert same(before, fingerprint(model))
    assert torch.equal(x, batch)
    assert x.grad is None


@pytest.mark.parametrize("options", [{}, {"backward": True}, {"every": 2, "backward": True, "updates": True}])
def test_training_under_a_probe_is_bitwise_the_same(options):
    torch.manual_seed(0)
    model = Net()
    twin = copy.deepcopy(model)
    plain = train(model, None)
    probed = train(twin, lambda m: probe(m, **options))
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))
    assert hooks(twin) == 0
    assert "forward" not in twin.__dict__


def test_probe_measures_the_users_own_passes():
    torch.manual_seed(0)
    model = Net()
    seen = []
    model.conv.register_forward_hook(lambda m, a, o: seen.append(o.detach().double()))
    with probe(model, every=2, backward=True, updates=True) as p:
        before = model.conv.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(5):
            model(torch.randn(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 0:
                moved = (model.conv.weight - before).norm() / before.norm()
    report = p.report()
    assert report.steps == (0, 2, 4)
    for point, x in zip((q for q in report.points if q.name == "conv"), seen[::2], strict=True):
        assert point.var == pytest.approx(x.var((0, 2, 3), correction=0).mean().item(), rel=1e-3)
        assert point.grad_var is not None
        assert point.grad_var > 0
    first = next(q for q in report.points if q.name == "conv")
    assert first.update_ratio == pytest.approx(moved.item(), rel=1e-4)


def test_nested_and_repeated_probes_agree():
    model = Net().eval()
    x = torch.randn(4, 3, 8, 8)
    with probe(model) as outer:
        with probe(model) as inner:
            model(x)
        model(x)
    with outer:
        model(x)
    assert outer.report().steps == (0, 1, 2)
    a = [(p.name, p.var) for p in outer.report().select(step=0)]
    assert a == [(p.name, p.var) for p in inner.report().points]
    assert hooks(model) == 0
    assert "forward" not in model.__dict__


def test_probes_closed_in_any_order_let_go():
    model = Net().eval()
    a, b = probe(model), probe(model)
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    model(torch.randn(4, 3, 8, 8))
    b.__exit__(None, None, None)
    assert b.report().steps == (0,)
    with pytest.raises(UserError, match="no forward pass"):
        a.report()
    assert "forward" not in model.__dict__


def test_control_flow_may_change_between_steps():
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else self.b(torch.relu(self.a(x)))

    model, x = Switch(), torch.rand(8, 4)
    with probe(model, warn=False) as p:
        for sign in (1, -1, -1):
            model(sign * x)
    names = [[q.name for q in p.report().select(step=s)] for s in range(3)]
    assert names[0] == ["input", "a"]
    assert names[2] == ["input", "a", "relu", "b"]


class Boom(Exception):
    pass


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.fail = Net(), True

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        if self.fail:
            raise Boom("inside")
        return y


def test_an_exception_in_the_model_leaves_nothing_behind():
    model = Breaks()
    x = torch.randn(4, 3, 8, 8)
    before = fingerprint(model)
    with pytest.raises(UserError, match="inside"):
        profile(model, x, backward=True)
    assert same(before, fingerprint(model))
    with pytest.raises(Boom), probe(model) as p:
        model(x)
    assert hooks(model) == 0
    assert "forward" not in model.__dict__
    model.fail = False
    with p:
        model(x)
    assert len(p.report().points) > 5


def test_an_exception_does_not_lose_the_steps_before_it():
    model = Breaks()
    model.fail = False
    with probe(model) as p:
        model(X)
        model.fail = True
        with pytest.raises(Boom):
            model(X)
    assert p.report().steps == (0,)


def test_checkpointing_counts_nothing_twice():
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.body, self.first(x), use_reentrant=False)  # type: ignore[return-value]

    torch.manual_seed(0)
    model, x = Recomputed(), torch.randn(4, 3, 9, 9)
    with probe(model, backward=True) as p:
        model(x).square().mean().backward()
    names = [q.name for q in p.report().points]
    assert names == ["input", "first", "body.0", "body.1"]
    assert p.report()["body.0"].grad_var > 0


def test_autocast_and_channels_last():
    model = Net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(8, 3, 8, 8).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = profile(model.eval(), x)
    plain = profile(model, x)
    assert report["conv"].dtype == "bfloat16"
    assert report["conv"].var == pytest.approx(plain["conv"].var, rel=0.05)


def test_a_compiled_model_runs_sampled_steps_eagerly():
    model = Net().eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)
    with probe(compiled, every=2) as p:  # type: ignore[arg-type]
        outputs = [compiled(x) for _ in range(3)]
    assert all(torch.equal(o, expected) for o in outputs)
    assert p.report().steps == (0, 2)
    assert [q.name for q in p.report().select(step=0)] == [q.name for q in profile(model, x).points]


def test_a_model_compiled_in_place_is_sampled_eagerly_and_stays_compiled():
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        compiled.append(len(inputs))
        return graph.forward

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(4, 3, 8, 8)
    names = [q.name for q in profile(model, x).points]
    expected = model(x)
    model.compile(backend=backend)
    model(x)
    before = len(compiled)
    assert before > 0
    with probe(model, every=2) as outer, probe(model, every=3) as inner:
        outputs = [model(x) for _ in range(4)]
    assert all(torch.equal(o, expected) for o in [*outputs, model(x)])
    assert len(compiled) == before
    assert (outer.report().steps, inner.report().steps) == ((0, 2), (0, 3))
    assert [q.name for q in outer.report().select(step=2)] == names
    assert "forward" not in model.__dict__
    assert not hasattr(model._compiled_call_impl, "probe")
    assert hooks(model) == 0


def test_ddp_names_are_the_models_own(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        torch.manual_seed(0)
        model = Net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        with probe(wrapped, backward=True) as p:
            wrapped(X).square().mean().backward()
        names = [q.name for q in profile(model, X).points]
        assert [q.name for q in p.report().points] == names
        assert [q.name for q in profile(wrapped, X).points] == names
        assert p.report()["conv"].grad_var > 0  # type: ignore[operator]
        assert p.report().models == ("Net",)
    finally:
        torch.distributed.destroy_process_group()


def test_fractions_that_agc_clips_join_the_report():
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach_agc(optimizer, model, clipping=1e-3)
    seen = []
    with probe(model, backward=True, agc=handle) as p:
        for _ in range(3):
            model(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(handle.stats.per_parameter())
    report = p.report()
    assert report.meta["clipped"] == seen[-1]
    for step in range(3):
        found = {q.name: q.clipped for q in report.select(step=step) if q.clipped is not None}
        assert found == {n: seen[step][f"{n}.weight"] for n in ("conv", "norm", "last")}
    assert report["fc"].clipped is None  # the head is excluded
    assert any(value > 0 for value in found.values())
    assert "AGC clipped" in report._repr_html_()


def test_every_point_compares_its_samples_when_asked():
    model = torchvision.models.resnet18()
    with probe(model) as default, probe(model, thorough=True) as thorough:
        for _ in range(2):
            model(torch.randn(2, 3, 32, 32))
    known = [[q.name for q in p.report().select(step=1) if q.cosine is not None] for p in (default, thorough)]
    assert {q.name for q in default.report().select(step=1) if q.role} == set(known[0])
    assert set(known[0]) < set(known[1]) == {q.name for q in thorough.report().points}
    exact = [
        [(q.name, q.var, q.mean_sq, q.min, q.max, q.dead) for q in p.report().points]
        for p in (default, thorough)
    ]
    assert exact[0] == exact[1]


def test_predictions_stay_those_of_the_first_step():
    torch.manual_seed(0)
    model = Net().eval()
    with probe(model) as p:
        model(X)
        with torch.no_grad():
            model.conv.weight.mul_(10)
        model(X)
    first, second = (p.report().select(step=s) for s in (0, 1))
    assert [q.predicted_var for q in first] == [q.predicted_var for q in second]
    assert second[1].var == pytest.approx(100 * first[1].var, rel=0.2)  # type: ignore[operator]


# -- what is refused, and what is said about the rest ------------------------------------------------------------


def conv_net(**more: object) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2, **more))  # type: ignore[arg-type]


class Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.conv, self.make = nn.Conv2d(3, 4, 3), make

    def forward(self, x: Tensor) -> object:
        return self.make(self.conv(x))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: profile("resnet18", X), "a str: expected an nn.Module"),
        (lambda: profile({}, X), "no model"),
        (lambda: profile(Net(), X[:0]), r"shape \(0, 3, 8, 8\): expected at least one sample"),
        (lambda: profile(Net(), torch.randn(4, 5, 8, 8)), r"forward fails on inputs \(4, 5, 8, 8\)"),
        (lambda: profile(Net()), "of no tensor"),
        (lambda: profile(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192)), X[:1]), "more than 1 value"),
        (lambda: profile(Returns(lambda y: "text"), X), "returns str, no tensor"),
        (lambda: profile(Returns(lambda y: y.argmax(1)), X, backward=True), "no differentiable output"),
        (lambda: profile(nn.Flatten(), X), "no point to measure"),
        (lambda: profile(nn.Linear(3, 3, device="meta"), X), "meta device"),
        (lambda: profile(nn.DataParallel(Net()), X), "DataParallel"),
        (lambda: profile(Net(), X, loss=lambda out: out), "one number"),
        (lambda: probe(nn.DataParallel(Net())), "DataParallel"),
        (lambda: probe(Net(), every=0), "every=0"),
        (lambda: probe("net"), "expected an nn.Module"),  # type: ignore[arg-type]
        (lambda: probe(Net(), agc=0.01), "agc=float"),  # type: ignore[arg-type]
        (lambda: probe(Net()).report(), "no forward pass"),
    ],
)
def test_bad_input_is_one_line(call, says):
    with pytest.raises(UserError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_frozen_norms_of_a_training_model_stay_frozen():
    model = Net().train()
    model.norm.eval()
    model.norm.running_var.fill_(100.0)
    frozen = profile(model, X)["norm"]
    assert frozen.var < 0.1
    assert profile(model.eval(), X)["norm"].var == pytest.approx(1, rel=0.02)


def test_works_under_inference_mode_and_with_frozen_weights():
    model = Net().requires_grad_(False)
    with torch.inference_mode():
        report = profile(model, X.clone(), backward=True)
    assert report["conv"].grad_var > 0
    assert report["conv"].weight_grad_norm is None


def test_assert_signal_names_layer_and_remedy():
    sick = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
    with torch.no_grad():
        sick[2].bias.fill_(-100.0)  # type: ignore[union-attr]
    with pytest.raises(
        AssertionError, match=r"dead-units[\s\S]*Sequential: 3[\s\S]*remedy: raise the biases"
    ):
        assert_signal(sick, torch.randn(4, 3, 16, 16))
    assert_signal(sick, torch.randn(4, 3, 16, 16), rules=["finite", "fp16-overflow"])
