"""`convert(batch_size=)`, `attach` and `recipe`: what depends on the batch, decided once and in one place."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import nfnets
from nfnets.errors import UserError
from tests.ranks import WORLD, needs_gloo, on_ranks


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def images(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def sgd(model: nn.Module, lr: float = 0.01) -> torch.optim.SGD:
    return torch.optim.SGD(nfnets.param_groups(model, lr=lr, weight_decay=5e-4), momentum=0.9)


def converted(method: str = "nf", batch_size: int | None = 4, **options: Any) -> nn.Module:
    return nfnets.convert(net(), images(), method=method, batch_size=batch_size, **options)


# -- the three lines --------------------------------------------------------------------------------------------------


def test_the_three_lines_train(capsys: pytest.CaptureFixture[str]) -> None:
    model = net()
    x, labels = images(64), torch.arange(64) % 4
    x += F.one_hot(labels, 4)[:, :3, None, None]  # something to learn

    nf = nfnets.convert(model, x, batch_size=4)
    optimizer = torch.optim.SGD(nfnets.param_groups(nf, lr=0.01, weight_decay=5e-4), momentum=0.9)
    nfnets.attach(optimizer, nf)

    assert "nf, 4 images per step\n  clipping: λ = 0.2" in capsys.readouterr().out
    before = F.cross_entropy(nf(x), labels).item()
    for step in range(96):
        rows = torch.arange(4 * step, 4 * step + 4) % 64
        optimizer.zero_grad()
        F.cross_entropy(nf(x[rows]), labels[rows]).backward()
        optimizer.step()
    assert F.cross_entropy(nf(x), labels).item() < 0.6 * before


def test_it_does_what_its_parts_do() -> None:
    a, b = converted(), converted()
    first, second = sgd(a, 0.5), sgd(b, 0.5)
    handle = nfnets.attach(first, a, verbose=False)
    nfnets.attach_agc(second, b, clipping=0.2, head=20)
    for model, optimizer in ((a, first), (b, second)):
        for _ in range(3):
            optimizer.zero_grad()
            (100 * model(images(4)).square().mean()).backward()
            optimizer.step()
    assert all(map(torch.equal, a.parameters(), b.parameters()))
    assert handle.clipping is not None
    assert float(handle.clipping.stats.fraction) > 0, "a comparison where nothing was clipped says nothing"
    handle.remove()
    assert not first._optimizer_step_pre_hooks


# λ = 0.05 · √(64 / batch), docs/recipes.md; what `nfnets train` did before it went this way.
TABLE = [
    ("nf", 4, 0.2, 20.0, False, {"channelwise": False}, "sgd", (0.005, 0.01, 0.02)),
    ("nf", 31, 0.072, 20.0, False, {"channelwise": False}, "sgd", (0.028, 0.055, 0.11)),
    ("nf", 32, 0.071, 20.0, False, {"channelwise": True}, "sgd", (0.028, 0.056, 0.11)),
    ("nf", 64, 0.05, 20.0, False, {"channelwise": True}, "sgd", (0.05, 0.1, 0.2)),
    ("nf", 1024, 0.013, 20.0, False, {"channelwise": True}, "sgd", (0.35, 0.71, 1.4)),
    ("fold", 4, 0.14, None, True, {}, "adamw", (0.0005, 0.001, 0.002)),
    ("fold", 16, 0.07, None, True, {}, "adamw", (0.001, 0.002, 0.004)),
    ("lsuv", 64, 0.05, 20.0, False, {}, "sgd", (0.05, 0.1, 0.2)),
    ("fixed_variance", 4, 0.2, 20.0, False, {}, "sgd", (0.0075, 0.015, 0.03)),
    ("fixup", 4, 0.2, 20.0, False, {}, "sgd", (0.04, 0.08, 0.16)),
    ("skipinit", 4, None, None, False, {}, "sgd", (0.02, 0.04, 0.08)),
    ("gn", 4, None, None, False, {}, "sgd", (0.013, 0.025, 0.05)),
    ("ws_gn", 64, None, None, False, {}, "sgd", None),
    ("evonorm_s0", 4, None, None, False, {}, "sgd", None),
    ("ghost_bn", 64, None, None, False, {}, "sgd", None),
    ("bn", 64, None, None, False, {}, "sgd", (0.05, 0.1, 0.2)),
]


@pytest.mark.parametrize(
    ("method", "batch", "λ", "head", "centralization", "options", "optimizer", "rates"),
    TABLE,
    ids=[f"{row[0]}-{row[1]}" for row in TABLE],
)
def test_the_recommendation(
    method: str, batch: int, λ: Any, head: Any, centralization: bool, options: Any, optimizer: str, rates: Any
) -> None:
    found = nfnets.recipe(method, batch)
    assert dict(found) == {name: found[name] for name in found}
    assert (found["clipping"], found["head"], found["centralization"]) == (λ, head, centralization)
    assert (found["convert"], found["optimizer"]) == (options, optimizer)
    assert rates is None or found["learning_rates"] == rates
    low, middle, high = found["learning_rates"]
    assert low < middle < high
    assert f"{batch} images per optimizer step" in str(found)
    assert ("λ = " in str(found)) == (λ is not None)


def test_rates_say_where_they_come_from() -> None:
    said = {n: nfnets.recipe("nf", n)["rates_from"] for n in (1, 4, 16, 1024)}
    assert said == {
        1: "extrapolated by √(images) from a measurement at 4 images",
        4: "measured at 4 images",
        16: "interpolated between measurements at 4 and 64 images",
        1024: "extrapolated by √(images) from a measurement at 512 images",
    }
    assert "with nf, not with lsuv" in nfnets.recipe("lsuv", 4)["rates_from"]
    assert nfnets.recipe("nf", 4, optimizer="adamw")["learning_rates"] == ()
    assert "not measured with adamw" in str(nfnets.recipe("nf", 4, optimizer="adamw"))


@pytest.mark.parametrize(
    "method", ["nf", "fold", "lsuv", "fixed_variance", "gn", "ws_gn", "evonorm_s0", "ghost_bn"]
)
@pytest.mark.parametrize("batch", [4, 64])
def test_what_is_attached_is_what_is_recommended(method: str, batch: int) -> None:
    model = converted(method, batch)
    found = nfnets.recipe(model)
    handle = nfnets.attach(torch.optim.AdamW(model.parameters()), model, verbose=False)
    agc = handle.clipping
    assert (agc and agc.clipping, agc and agc.head) == (found["clipping"], found["head"])
    assert (handle.centralization is not None) == found["centralization"]


def test_centralization_comes_before_clipping() -> None:
    model = converted("fold")
    optimizer = torch.optim.AdamW(model.parameters())
    handle = nfnets.attach(optimizer, model, verbose=False)
    order = [hook.__self__ for hook in optimizer._optimizer_step_pre_hooks.values()]  # type: ignore[attr-defined]
    assert order == [handle.centralization, handle.clipping]


# -- the batch size stays with the model -----------------------------------------------------------------------------


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


AGAIN = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "convert again": lambda model: nfnets.convert(model, images()),
    "bake": lambda model: nfnets.bake(model.eval()),
    "inside another": lambda model: nn.Sequential(nn.Identity(), model),
}


@pytest.mark.parametrize("how", AGAIN)
def test_the_batch_size_stays_with_the_model(how: str) -> None:
    found = nfnets.recipe(AGAIN[how](converted(batch_size=6)))
    assert (found["method"], found["batch_size"]) == ("nf", 6)


def test_it_is_said_anew_for_a_converted_model() -> None:
    assert nfnets.recipe(nfnets.convert(converted(), images(), batch_size=8))["batch_size"] == 8
    assert nfnets.recipe(converted(), batch_size=8)["batch_size"] == 8


def test_channels_are_set_by_the_batch_and_not_by_the_example() -> None:
    def gains(**options: Any) -> Tensor:
        return nfnets.convert(net(), images(64), **options)[0].gain.detach()  # type: ignore[index]

    assert torch.equal(gains(batch_size=4), gains(channelwise=False))
    assert torch.equal(gains(batch_size=32), gains(channelwise=True))
    assert torch.equal(gains(batch_size=4, channelwise=True), gains(channelwise=True))
    assert not torch.equal(gains(batch_size=4), gains(batch_size=64))
    assert "channelwise=False" in nfnets.plan(net(), images(64), batch_size=4).summary()


def test_few_images_are_told_where_the_method_measures() -> None:
    with pytest.warns(UserWarning, match="'nf' measures constants on 31 images: expected 32 or more") as told:
        nfnets.convert(net(), images(31), batch_size=4)
    assert len(told) == 1
    assert told[0].filename == __file__
    nfnets.convert(net(), images(32), batch_size=4)
    for method in ("fold", "gn"):
        nfnets.convert(net(), images(2), method=method, batch_size=4)
    with torch.device("meta"):
        nfnets.convert(net(), torch.empty(2, 3, 8, 8), batch_size=4)


def test_without_a_batch_size_the_log_tells_that_few_images_decide(caplog: pytest.LogCaptureFixture) -> None:
    nfnets.convert(net(), images(8))
    (line,) = caplog.messages
    assert line.startswith(
        "8 example images tell too little of single channels, which are left as they are: give 32"
    )
    caplog.clear()
    nfnets.convert(net(), images(1))
    assert caplog.messages[0].startswith("1 example image tells")
    caplog.clear()
    nfnets.convert(net(), images(32))
    nfnets.convert(net(), images(8), channelwise=False)
    nfnets.convert(net(), images(8), channelwise=True)
    nfnets.convert(net(), images(8), method="gn")
    nfnets.convert(nfnets.convert(net(), images(32)), images(8))
    assert not caplog.messages


# -- accumulation and processes ---------------------------------------------------------------------------------------


def test_accumulated_batches_count(capsys: pytest.CaptureFixture[str]) -> None:
    model = converted(batch_size=4)
    handle = nfnets.attach(sgd(model), model, accumulate=8, world_size=2)
    assert handle.clipping is not None
    assert handle.clipping.clipping == 0.05
    said = capsys.readouterr().out
    assert "nf, 64 images per step (batches of 4 × 8 accumulated × 2 processes)" in said
    assert (
        "converted with channelwise=False; 64 images per step want nfnets.convert(…, channelwise=True)"
        in said
    )


def work(rank: int, folder: str) -> None:
    with (Path(folder) / f"{rank}.txt").open("w") as said, redirect_stdout(said):
        trained(rank, folder)


def trained(rank: int, folder: str) -> None:
    model = converted(batch_size=4)
    for stepped in (model, DistributedDataParallel(model)):
        optimizer = sgd(model)
        handle = nfnets.attach(optimizer, stepped, accumulate=8)
        assert handle.clipping is not None
        assert handle.clipping.clipping == 0.05
        assert nfnets.attach(sgd(model), model, world_size=1, verbose=False).clipping.clipping == 0.2  # type: ignore
        for _ in range(2):
            optimizer.zero_grad()
            stepped(images(8)[4 * rank : 4 * rank + 4]).square().mean().backward()
            optimizer.step()
    torch.save([p.detach() for p in model.parameters()], Path(folder) / f"{rank}.pt")


@needs_gloo
def test_processes_count(tmp_path: Path) -> None:
    on_ranks(work, tmp_path)
    said = "".join((tmp_path / f"{rank}.txt").read_text() for rank in range(WORLD))
    assert said.count("nfnets.attach: nf, 64 images per step") == 2, f"once, not {WORLD} times"


# -- by hand, and refusals --------------------------------------------------------------------------------------------


def test_any_value_by_hand() -> None:
    model = converted()
    handle = nfnets.attach(sgd(model), model, clipping=0.1, head=None, centralization=True, verbose=False)
    assert handle.clipping is not None
    assert (handle.clipping.clipping, handle.clipping.head) == (0.1, None)
    assert handle.centralization is not None
    assert "clipping: λ = 0.1, as given; not clipped: 5.weight" in str(handle)
    off = nfnets.attach(sgd(model), model, clipping=None, verbose=False)
    assert off.clipping is None
    assert "clipping: off, as given" in str(off)
    foreign = net()  # not ours, and nothing is asked of it
    own = nfnets.attach(sgd(foreign), foreign, clipping=0.1, head=None, centralization=False, verbose=False)
    assert own.recommendation is None
    by_name = nfnets.attach(sgd(foreign), foreign, 16, method="gn", verbose=False)
    assert by_name.clipping is None


def test_weights_that_start_at_zero_are_not_clipped() -> None:
    model = converted()
    nn.init.zeros_(model[5].weight)  # type: ignore[index]
    handle = nfnets.attach(sgd(model), model, verbose=False)
    assert handle.clipping is not None
    assert handle.clipping.head is None
    assert handle.clipping.excluded == ("5.weight",)


def test_one_of_our_families_counts_as_nf() -> None:
    model = nfnets.create_model("nf_resnet50", num_classes=2)
    assert nfnets.recipe(model, batch_size=4)["method"] == "nf"


def test_a_second_call_is_refused_until_the_first_is_removed() -> None:
    for method in ("nf", "fold"):
        model = converted(method)
        optimizer = torch.optim.AdamW(model.parameters())
        handle = nfnets.attach(optimizer, model, verbose=False)
        hooks = list(optimizer._optimizer_step_pre_hooks)
        for again in (nfnets.attach, nfnets.attach_agc):
            with pytest.raises(UserError, match=r"already: expected one handle; call \.remove\(\)"):
                again(optimizer, model)
        assert list(optimizer._optimizer_step_pre_hooks) == hooks
        handle.remove()
        nfnets.attach(optimizer, model, verbose=False)


def test_what_is_clipped_twice_is_refused_and_two_parts_are_not() -> None:
    both = nn.ModuleList([net(), net()])
    optimizer = torch.optim.SGD(both.parameters(), lr=0.1)
    for part in both:
        nfnets.attach_agc(optimizer, part)
    with pytest.raises(UserError, match="the optimizer clips gradients of this model already"):
        nfnets.attach_agc(optimizer, both, exclude=None)
    nfnets.attach_centralization(optimizer, both[0])
    with pytest.raises(UserError, match="the optimizer centralizes gradients of this model already"):
        nfnets.attach_centralization(optimizer, both[0])
    # What a refused call had attached before is gone again.
    other = torch.optim.AdamW(both[0].parameters())
    nfnets.attach_agc(other, both[0])
    with pytest.raises(UserError, match="clips gradients"):
        nfnets.attach(other, both[0], 4, method="fold")
    assert len(other._optimizer_step_pre_hooks) == 1


def test_a_folded_model_that_gets_sgd_is_told() -> None:
    model = converted("fold")
    with pytest.warns(UserWarning, match=r"by SGD.*use torch\.optim\.AdamW with lr=0\.001") as told:
        nfnets.attach(sgd(model), model)
    assert told[0].filename == __file__
    nfnets.attach(torch.optim.AdamW(model.parameters(), lr=0.001), model)


def test_notes_say_what_does_not_fit() -> None:
    model = nfnets.convert(net(), images(8)).eval()
    said = str(nfnets.attach(sgd(model), model, 64, verbose=False))
    assert "converted with channelwise=False; 64 images per step want" in said
    assert "convert measured on 8 images; give it 32 or more" in said
    assert "call model.train() before training" in said
    fits = nfnets.convert(net(), images(), batch_size=64)
    assert "note" not in str(nfnets.attach(sgd(fits), fits, verbose=False))


def mixed() -> nn.Module:
    return nn.Sequential(converted("nf", 4), converted("gn", 8))


REFUSED: dict[str, tuple[Any, str]] = {
    "no batch size": (
        lambda: nfnets.attach(sgd(m := converted(batch_size=None)), m),
        "batch_size is not known: .*batch_size=…",
    ),
    "recipe without": (lambda: nfnets.recipe("nf"), "batch_size is not known"),
    "not converted": (
        lambda: nfnets.attach(sgd(m := net()), m, 4),
        'was not converted by nfnets.convert.*method="nf"',
    ),
    "recipe of such": (lambda: nfnets.recipe(net(), 4), "was not converted"),
    "two methods": (lambda: nfnets.recipe(mixed(), 4), "converted by nf, gn: expected one method"),
    "two sizes": (
        lambda: nfnets.recipe(nn.Sequential(converted(), converted(batch_size=8))),
        "for 4, 8 images",
    ),
    "zero images": (lambda: converted(batch_size=0), "batch_size=0: expected a whole number above 0"),
    "half an image": (lambda: nfnets.recipe("nf", 4.5), "batch_size=4.5: expected a whole"),  # type: ignore[arg-type]
    "true": (lambda: converted(batch_size=True), "batch_size=True"),
    "accumulate": (lambda: nfnets.attach(sgd(m := converted()), m, accumulate=0), "accumulate=0"),
    "world size": (lambda: nfnets.attach(sgd(m := converted()), m, world_size=-1), "world_size=-1"),
    "clipping": (lambda: nfnets.attach(sgd(m := converted()), m, clipping=-1), "clipping=-1"),
    "head": (lambda: nfnets.attach(sgd(m := converted()), m, head="all"), "head='all'"),  # type: ignore[arg-type]
    "centralization": (
        lambda: nfnets.attach(sgd(m := converted()), m, centralization="on"),  # type: ignore[arg-type]
        "centralization='on': expected True, False",
    ),
    "another's parameters": (
        lambda: nfnets.attach(sgd(net()), converted()),
        "none of the model's parameters",
    ),
    "the wrong order": (lambda: nfnets.attach(m := converted(), sgd(m)), "the optimizer comes first"),  # type: ignore[arg-type]
    "agc without a size": (
        lambda: nfnets.attach_agc(sgd(m := converted(batch_size=None)), m, clipping="auto"),
        "batch_size is not known",
    ),
    "agc that is off": (
        lambda: nfnets.attach_agc(sgd(m := converted("gn")), m, clipping="auto"),
        "a model by gn: it is not clipped, since it normalizes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    run, match = REFUSED[case]
    with pytest.raises(UserError, match=match) as told:
        run()
    assert "\n" not in str(told.value)


def test_attach_agc_takes_the_rule() -> None:
    model = converted()
    assert nfnets.attach_agc(sgd(model), model, clipping="auto").clipping == 0.2
