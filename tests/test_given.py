"""What is given where a model, an optimizer, a tensor or a text belongs: one line, for every public function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nfnets
from nfnets import callbacks, convert, functional, gains, hub, init, models, privacy, signal, verify
from nfnets.before_step import excluded_parameters
from nfnets.errors import UserError
from nfnets.given import shown
from nfnets.head import head_layers
from nfnets.models import registry
from nfnets.parameter_groups import no_weight_decay
from nfnets.trace import trace

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def sgd(model: nn.Module | None = None) -> torch.optim.Optimizer:
    return torch.optim.SGD((model or Net()).parameters(), lr=0.1)


def _excluding(attach: Callable[..., Any]) -> Callable[[Any], Any]:
    def call(exclude: Any) -> Any:
        model = Net()
        return attach(sgd(model), model, exclude=exclude)

    return call


OTHERS: dict[str, Callable[[], Any]] = {
    "parameters": lambda: Net().parameters(),
    "named parameters": lambda: Net().named_parameters(),
    "class": lambda: Net,
    "tensor": lambda: X,
    "none": lambda: None,
    "state": lambda: Net().state_dict(),
    "optimizer": sgd,
    "text": lambda: "0",
    "list": lambda: [Net()],
    "empty list": list,
    "function": lambda: lambda x: x,
    "number": lambda: 3,
    "model": Net,
}

CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "convert": (lambda it: convert.convert(it, X), "model"),
    "plan": (lambda it: nfnets.plan(it, X), "model"),
    "bake": (nfnets.bake, "model"),
    "profile": (lambda it: nfnets.profile(it, X), "model"),
    "assert_signal": (lambda it: signal.assert_signal(it, X), "model"),
    "probe": (nfnets.probe, "model"),
    "trace": (lambda it: trace(it, X), "model"),
    "param_groups": (lambda it: nfnets.param_groups(it, 0.1, 0.0), "model"),
    "no_weight_decay": (no_weight_decay, "model"),
    "attach_agc, model": (lambda it: nfnets.attach_agc(sgd(), it), "model"),
    "attach_agc, optimizer": (lambda it: nfnets.attach_agc(it, Net()), "optimizer"),
    "attach_agc, exclude": (_excluding(nfnets.attach_agc), "exclude"),
    "attach_agc, clipping": (lambda it: nfnets.attach_agc(sgd(), Net(), it), ""),
    "attach_centralization, model": (lambda it: nfnets.attach_centralization(sgd(), it), "model"),
    "attach_centralization, optimizer": (lambda it: nfnets.attach_centralization(it, Net()), "optimizer"),
    "attach_centralization, exclude": (_excluding(nfnets.attach_centralization), "exclude"),
    "clip_grad_agc_": (nfnets.clip_grad_agc_, "tensors"),
    "centralize_grad_": (nfnets.centralize_grad_, "tensors"),
    "excluded_parameters": (lambda it: excluded_parameters(it, "head"), "model"),
    "head_layers": (head_layers, "model"),
    "batch_independence": (lambda it: verify.batch_independence(it, X), "model"),
    "batch_independence, inputs": (lambda it: verify.batch_independence(Net(), it), "tensor"),
    "batch_independence, kwargs": (
        lambda it: verify.batch_independence(nn.Identity(), X, kwargs=it),
        "none",
    ),
    "same_function, a": (lambda it: verify.same_function(it, Net(), X), "model"),
    "same_function, b": (lambda it: verify.same_function(Net(), it, X), "model"),
    "same_function, inputs": (lambda it: verify.same_function(Net(), Net(), it), "tensor"),
    "same_function, rtol": (lambda it: verify.same_function(Net(), Net(), X, rtol=it), "number"),
    "lsuv_": (lambda it: init.lsuv_(it, X), "model"),
    "fixup_": (lambda it: init.fixup_(it, X), ""),
    "skipinit_": (lambda it: init.skipinit_(it, X), ""),
    "lsuv_, inputs": (lambda it: init.lsuv_(Net(), it), "tensor"),
    "delta_orthogonal_": (lambda it: init.delta_orthogonal_(it), ""),
    "scaled_orthogonal_": (lambda it: init.scaled_orthogonal_(it), "tensor"),
    "scaled_weight_standardization": (functional.scaled_weight_standardization, "tensor"),
    "per_sample_gradients": (
        lambda it: privacy.per_sample_gradients(nn.Identity() if isinstance(it, Net) else it, [X], X),
        "model",
    ),
    "grad_sample_module": (privacy.grad_sample_module, ""),
    "save_pretrained": (lambda it: hub.save_pretrained(it, "nowhere"), ""),
    "from_pretrained": (hub.from_pretrained, "text"),
    "lightning_callback": (callbacks.lightning_callback, "number none"),
    "create_model": (nfnets.create_model, ""),
    "list_models": (nfnets.list_models, "text"),
    "register": (lambda it: models.register(it, Net), "text"),
    "register, builder": (lambda it: models.register("nf_resnet50", it), ""),
    "load_timm": (models.load_timm, ""),
    "load_weights": (lambda it: models.load_weights(it, {}), ""),
    "load_weights, source": (lambda it: models.load_weights(Net(), it), "state"),
    "to_timm_state_dict": (models.to_timm_state_dict, ""),
    "from_timm_state_dict": (lambda it: models.from_timm_state_dict({}, it), ""),
    "from_timm_state_dict, state": (lambda it: models.from_timm_state_dict(it, Net()), ""),  # type: ignore[arg-type]
    "gain": (gains.gain, ""),
    "moments": (gains.moments, ""),
}
RIGHT = {
    "exclude": {"none", "empty list"},
    "optimizer": {"optimizer"},
    "tensors": {"model", "tensor", "parameters", "named parameters", "state"},
}
# `exclude="0"` and other names that are there but fit nothing, empty lists of parameters: whatever is said, in one line
UNDECIDED = {
    ("clip_grad_agc_", "empty list"),
    ("centralize_grad_", "empty list"),
    ("attach_agc, model", "model"),
    ("attach_centralization, model", "model"),
    ("attach_agc, optimizer", "optimizer"),
    ("attach_centralization, optimizer", "optimizer"),
    ("profile", "state"),
    ("profile", "empty list"),
    ("from_pretrained", "text"),
    ("gain", "function"),
    ("moments", "function"),
    ("gain", "model"),
    ("moments", "model"),
    ("delta_orthogonal_", "tensor"),
    ("register", "text"),
    ("load_weights", "model"),
    ("same_function, kwargs", "empty list"),
    ("lightning_callback", "none"),
    ("bake", "model"),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_mix_up_is_told_in_one_line(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))  # what is registered here ends here
    function, right = CALLS[call]
    expected = RIGHT.get(right, set(right.split()))
    for name, make in OTHERS.items():
        given, said = make(), ""
        try:
            function(given)
        except UserError as error:
            said = str(error)
        assert "\n" not in said
        if (call, name) not in UNDECIDED:
            assert bool(said) is (name not in expected), f"{call}, {name}: {said or 'taken'}"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: nfnets.param_groups(Net().parameters(), 0.1, 0.0),  # type: ignore[arg-type]
            "model is a generator: expected a torch.nn.Module; pass the model, not its parameters",
        ),
        (lambda: nfnets.attach_agc(sgd(), Net().parameters()), "pass the model, not its parameters"),  # type: ignore[arg-type]
        (
            lambda: nfnets.attach_agc(Net(), sgd()),
            "optimizer is a Net, a model: .*; the optimizer comes first",
        ),  # type: ignore[arg-type]
        (
            lambda: nfnets.attach_centralization(sgd(), Net),
            "model is the class Net: .*; pass an instance, as Net",
        ),  # type: ignore[arg-type]
        (
            lambda: verify.same_function(X, Net(), Net()),
            r"a is a Tensor of shape \(4, 3, 8, 8\): .*; models come first",
        ),  # type: ignore[arg-type]
        (lambda: verify.same_function(Net(), X, Net()), "b is a Tensor"),  # type: ignore[arg-type]
        (lambda: verify.batch_independence(Net(), Net()), "a module among the inputs"),
        (lambda: verify.batch_independence(Net(), X, kwargs=X), "kwargs is a Tensor"),  # type: ignore[arg-type]
        (lambda: init.scaled_orthogonal_(Net()), "weight is a Net: .*; pass the weight of one of its layers"),  # type: ignore[arg-type]
        (lambda: gains.gain(nn.ReLU), "activation the class ReLU"),  # type: ignore[arg-type]
        (lambda: trace(sgd(), X), "model is a SGD: .*; pass the model whose parameters it steps"),  # type: ignore[arg-type]
        (lambda: nfnets.create_model(3), "name is 3: expected a text; pass one, as 'nf_resnet50'"),  # type: ignore[arg-type]
    ],
)
def test_what_was_meant(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_exported_programs_are_no_modules() -> None:
    program = torch.export.export(nn.Linear(3, 2), (torch.ones(2, 3),))
    with pytest.raises(UserError, match=r"b is an ExportedProgram: .*; pass its \.module\(\)"):
        verify.same_function(nn.Linear(3, 2), program, torch.ones(2, 3))  # type: ignore[arg-type]


def test_long_values_are_shown_by_their_type() -> None:
    assert shown("a" * 100) == "a str"
    assert shown(Tensor([1.0])) == "a Tensor of shape (1,)"


def test_nothing_changed_when_something_was_refused() -> None:
    optimizer = sgd()
    for attach in (nfnets.attach_agc, nfnets.attach_centralization):
        with pytest.raises(UserError):
            attach(optimizer, Net().parameters())  # type: ignore[arg-type]
    assert not optimizer._optimizer_step_pre_hooks
