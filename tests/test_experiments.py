"""Every experiment runs to its table and its figure with tiny settings; what it computes itself is right."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from experiments import (
    agc,
    alpha,
    any_norm,
    batch_size,
    collect,
    common,
    depth,
    dropout,
    families,
    federated,
    fold_finetune,
    large_batch,
    nets,
    plain_init,
    shift,
    signal_propagation,
    small_batch,
    step_time,
    without_norm,
)
from nfnets.layers import SkipInit
from nfnets.models import create_model

DIGITS: dict[str, Any] = {"data": "digits", "train_limit": 120, "epochs": 1, "threads": 1, "eval_every": 0}
RESNET = DIGITS | {"model": "train_nets:residual_net"}
TINY: dict[str, Any] = {"seeds": (0, 1), "lrs": (0.05,), "tuning_seeds": (100,)}


def test_batch_size(tmp_path: Path) -> None:
    keep = ("bn", "nf")
    results = []
    for size in (4, 32):
        arms = [a for a in batch_size.experiment(size).arms if a.name.partition("+")[0] in keep]
        config = batch_size.experiment(size, run=RESNET, arms=arms, **TINY)
        results.append(common.sweep(config, tmp_path / str(size), "test", jobs=0))
    every = batch_size.found(results)
    assert "nf+agc" in {
        a.name for a in batch_size.experiment(4).arms
    }  # a run of its own: the recipe clips at 4 too
    assert every["ghost_bn", 4] == every["bn", 4]
    assert ("ghost_bn", 32) not in every
    assert all(len(values) == 2 for values in every.values())
    every = {key: values for key, values in every.items() if key[0] != "ghost_bn"}
    text = batch_size.table(every)
    assert "| NF + AGC | " in text
    assert f"{100 * sum(every['bn', 32]) / 2:.1f}" in text
    batch_size.draw(every, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_alpha(tmp_path: Path) -> None:
    net = DIGITS | {"model": "experiments.nets:resnet"}
    grid = alpha.grid([(8, 3, net, (0.8, 0.3), (0.05,), (0, 1))], tmp_path / "out")
    runs = common.validate(grid, tmp_path / "out", "test", jobs=0)
    assert len(runs) == 4
    assert len({run["val_accuracy"] for run in runs}) > 1
    rows = alpha.table(runs).splitlines()
    assert rows[0] == "| layers | L | α | lr | validation, % | seeds |"
    assert [row.split(" | ")[:4] for row in rows[2:]] == [
        ["| 8", "3", "0.8", "0.05"],
        ["| 8", "3", "0.3", "0.05"],
    ]
    assert common.validate(grid, tmp_path / "out", "test", jobs=0) == runs  # read back
    collect.collect(tmp_path / "out", tmp_path / "kept")
    kept = json.loads((tmp_path / "kept" / "results.json").read_text())
    assert kept["runs"] == runs
    assert {"command", "versions", "hardware"} <= set(kept)
    alpha.draw(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_any_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = ("layer-norm", "dyt-measured")
    arms = [arm for arm in any_norm.experiment("vit").arms if arm.name in keep]
    run = dict(any_norm.experiment("vit").run) | {"train_limit": 100, "epochs": 1, "data": "digits"}
    results = common.sweep(
        any_norm.experiment("vit", run=run, arms=arms, **TINY), tmp_path / "vit", "test", jobs=0
    )
    rows = any_norm.classified({"vit": results}).splitlines()
    assert [row.split(" | ")[1] for row in rows[2:]] == list(keep)
    pictures = torch.rand(30, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 10
    monkeypatch.setattr(any_norm, "garments", lambda split: pictures)
    image, mask = any_norm.scene("train", 3)
    assert image.shape == (1, any_norm.SIDE, any_norm.SIDE)
    assert set(mask.unique().tolist()) <= set(range(any_norm.KINDS))
    assert bool((image[0][mask > 0] > 0.15).all())
    right: Any = lambda x: F.one_hot(mask[None], 4).movedim(-1, 1).float()  # noqa: E731
    there = len(mask.unique())
    assert any_norm.mean_iou(right, image[None], mask[None]) == there / any_norm.KINDS
    segment = partial(any_norm.segment, 2, steps=2, scenes_seen=2)
    found = common.search(segment, any_norm.UNET_ARMS, (0.03,), tmp_path / "unet", jobs=0, seeds=(0, 1))
    assert len(any_norm.segmented({"unet-b2": found}).splitlines()) == 5


def test_small_batch(tmp_path: Path) -> None:
    grid = small_batch.grid(["resnet", "vgg"], tmp_path, **DIGITS, batch_size=32)
    assert len(grid) == 2 * len(small_batch.LAMBDAS) * len(small_batch.LRS)
    assert {config.clipping for _, config, _ in grid} == set(small_batch.LAMBDAS)
    assert {config.model for _, config, _ in grid} == {"bn_resnet14_cifar", "experiments.nets:vgg"}
    (run,) = common.validate(grid[:1], tmp_path, "test", jobs=0)
    assert 0 < run["val_accuracy"] <= 1
    runs = [row | {"val_accuracy": 0.25} for row, _, _ in grid]
    rows = small_batch.table(runs).splitlines()
    assert len(rows) == 2 + 2 * len(small_batch.LAMBDAS)
    assert rows[2].startswith("| resnet | off | 25.0")
    small_batch.draw(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_large_batch(tmp_path: Path) -> None:
    grid = large_batch.grid(tmp_path, (0,), **DIGITS)
    assert len({folder for _, _, folder in grid}) == len(grid) == 2 * 2 * len(large_batch.ARMS)
    heads = {(row["batch"], row["arm"]): (c.clipping, c.clipping_head) for row, c, _ in grid}
    assert heads[512, "NF"] == (0.018, 20)
    assert heads[512, "NF, head unclipped"] == (0.018, None)
    assert heads[128, "BatchNorm"] == (None, None)
    runs = [row | {"val_accuracy": 0.5} for row, _, _ in grid]
    assert large_batch.table(runs).splitlines()[2].startswith("| 128 | BatchNorm | 50.00 (lr 0.144) |")
    large_batch.draw(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("clip", ["agc", "timm", "norm"])
def test_step_time(clip: str, tmp_path: Path) -> None:
    pair = step_time.Subject("nfnets:nf_resnet8_cifar", 16, clip), step_time.Subject("timm:resnet10t", 32)
    device = torch.device("cpu")
    row = step_time.measure(pair, 2, device, "bf16" if clip == "agc" else "fp32", compiled=False, rounds=3)
    assert row["ours_ms"] > 0
    assert row["faster"] > 0
    assert row == json.loads(json.dumps(row))
    assert f"{row['faster']:.2f}×" in step_time.table([row])
    step_time.draw([row] * 3, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_step_time_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # Whether the compiler takes them: tests/test_export.py.
    compiled: list[nn.Module] = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    pair = step_time.Subject("nfnets:nf_resnet8_cifar", 16, "agc"), step_time.Subject("timm:resnet10t", 32)
    row = step_time.measure(pair, 2, torch.device("cpu"), "fp32", compiled=True, rounds=1)
    assert row["compiled"]
    assert len(compiled) == 2
    assert row["ours_ms"] > 0
    assert row["faster"] > 0


def test_step_time_asks_for_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["step_time", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="sees none here"):
        step_time.main()
    assert not (tmp_path / "out").exists()


def test_every_batch_size_of_the_grid_has_every_arm() -> None:
    for size in batch_size.SIZES:
        there = {arm.name for arm in batch_size.experiment(size).arms}
        for name, (_, same) in batch_size.ARMS.items():
            assert name in there or (size <= batch_size.SMALL and same in there)


def test_fold_finetune(tmp_path: Path) -> None:
    start = fold_finetune.trained(tmp_path / "start", 0, seeds=(100, 0, 1), **RESNET)
    fields: dict[str, Any] = {"run": RESNET, "seeds": (0, 1)}
    one = {"lrs": (0.001,)}
    bn, fold = (
        {name: arm | one for name, arm in arms.items()} for arms in (fold_finetune.BN, fold_finetune.FOLDED)
    )
    folded = fold_finetune.fine_tuned(
        tmp_path / "start", tmp_path / "folded", 0, fold, (0.001,), (16,), **fields
    )
    tuned = fold_finetune.fine_tuned(tmp_path / "start", tmp_path / "bn", 0, bn, (0.001,), (16, 32), **fields)
    text = fold_finetune.table(start, tuned, folded)
    assert text.count("best on validation") == 1
    assert len(text.splitlines()) == 2 + 1 + 2 * len(bn) + len(fold)
    fold_finetune.draw(tuned, folded, tmp_path / "figure.png")


@pytest.mark.soak
def test_depth(tmp_path: Path) -> None:
    found = {}
    for layers in (8, 14):
        config = depth.experiment(layers, 1, dict.fromkeys(depth.ARMS, 0.01), seeds=(0, 1))
        config = config.model_copy(update={"run": config.run | DIGITS})
        found[layers] = common.sweep(config, tmp_path / str(layers), "test", jobs=0)
    assert len(depth.table(found).splitlines()) == 2 + 2 * len(depth.ARMS)
    depth.draw(found, tmp_path / "figure.png")


@pytest.mark.soak
def test_without_norm(tmp_path: Path) -> None:
    found = {}
    for net in without_norm.NETS:
        config = without_norm.experiment(net, **(TINY | {"seeds": (0,)}))
        options = {"model": f"experiments.nets:{net}", "model_options": {"depth": 8}}
        arms = [arm.model_copy(update={"model_options": {"depth": 8} | weights(arm)}) for arm in config.arms]
        config = config.model_copy(update={"run": DIGITS | options, "arms": tuple(arms)})
        found[net] = common.sweep(config, tmp_path / net, "test", jobs=0)
    text = without_norm.table(found)
    assert text.count("| fixup |") == 1  # the plain net has no branches
    assert text.count("| lsuv |") == 2
    without_norm.draw(found, tmp_path / "figure.png")


def weights(arm: Any) -> dict[str, Any]:
    """The initialization that an arm of `without_norm` sets, without its depth."""
    return {k: v for k, v in arm.fields.get("model_options", {}).items() if k == "weights"}


@pytest.mark.parametrize("arm", ["bn", "nf+agc", "tat", "weight_norm", "selu"])
def test_plain_init(arm: str) -> None:
    found = plain_init.run(arm, 0.02, 0, True, "digits", None, 2, 14)
    assert found["status"] == "done"
    assert 0 <= found["test_accuracy"] <= 1


@pytest.mark.parametrize("weights", sorted(nets.WEIGHTS))
@pytest.mark.parametrize("build", [nets.resnet, nets.plain])
def test_bare_nets_have_no_norm_layer_and_keep_the_mean_square(build: Any, weights: str) -> None:
    torch.manual_seed(0)
    model = build(10, 1, depth=8, weights=weights)
    assert not [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.bias is not None for conv in convs)
    # He's: the mean square behind a rectifier doubles, E[y²] = 2 E[x²], for independent pixels.
    square = convs[1].in_channels, convs[1].out_channels
    y = convs[1](torch.randn(64, square[0], 16, 16))
    assert 1.4 < y[..., 1:-1, 1:-1].square().mean().item() < 2.7


def test_agc(tmp_path: Path) -> None:
    found, courses = {}, {"nf-0.035": {}, "nf-0.01": {}}
    for lr in (0.1, 1.0):
        config = agc.experiment(lr, run=RESNET, batch_sizes=[64], seeds=(0, 1))
        results = common.sweep(config, tmp_path / str(lr), "test", jobs=0)
        assert agc.clipped(results, tmp_path / str(lr), "nf") == [[], []]
        for arm, by_rate in courses.items():
            by_rate[lr] = agc.clipped(results, tmp_path / str(lr), arm)
            assert all(0 <= share <= 1 for course in by_rate[lr] for share in course)
        # The first step is the same for both: the tighter λ clips at least as much.
        for loose, tight in zip(courses["nf-0.035"][lr], courses["nf-0.01"][lr], strict=True):
            assert len(loose) == len(tight) == 1
            assert tight[0] >= loose[0]
        found[lr] = results | {"runs": [r | {"batch_size": agc.BATCH} for r in results["runs"]]}
    assert "minus no clipping" in agc.table(found)
    agc.draw(found, courses, tmp_path / "figure.png")


def test_families_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(families.BUDGETS, 64, (150, 1, (0.05,)))
    monkeypatch.setattr(families, "ExperimentConfig", OnDigits)
    results = families.compare("densenet", 64, tmp_path, jobs=0, seeds=2)
    assert "| densenet | 64 |" in families.table({("densenet", 64): results})


class OnDigits:
    """`ExperimentConfig.create` on digits, which need no files."""

    @staticmethod
    def create(**fields: Any) -> Any:
        fields["run"] = fields["run"] | {"data": "digits"}
        return families_config(**fields)


families_config = families.ExperimentConfig.create


@pytest.mark.soak
def test_signal_propagation(tmp_path: Path) -> None:
    built = []

    def designed() -> nn.Module:
        built.append(create_model("nf_resnet8_cifar"))
        return built[-1]

    builders = {
        "bn": lambda: create_model("bn_resnet8_cifar"),
        "designed": designed,
    }
    data = signal_propagation.batches(2, 4, 16, name="digits")
    assert [x.shape for x, _ in data] == [(4, 3, 16, 16)] * 2
    start = signal_propagation.at_start(builders, data[0][0])
    assert list(start.models) == ["bn", "bn, converted", "designed", "designed, LSUV"]
    assert {gain.item() for gain in gains(built[0])} == {1.0}  # as the paper shows it
    end, losses = signal_propagation.after_training(builders, data)
    assert end.steps == (2,)
    assert all(len(pair) == 2 for pair in losses.values())
    assert len(signal_propagation.summary(end)) == 4


def gains(model: nn.Module) -> list[torch.Tensor]:
    return [m.gain for m in model.modules() if isinstance(m, SkipInit)]


@given(st.integers(2, 6), st.floats(0.05, 10), st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_clients_share_out_all_images(number: int, alpha: float, seed: int) -> None:
    labels = torch.arange(400) % 10
    rows = federated.clients(labels, number, alpha, seed)
    assert sorted(torch.cat(rows).tolist()) == list(range(400))
    assert min(map(len, rows)) >= federated.LEAST


def test_a_small_alpha_skews_labels() -> None:
    labels = torch.arange(2000) % 10

    def most(alpha: float) -> float:
        """The mean share of a client's most frequent label."""
        rows = [r for seed in range(5) for r in federated.clients(labels, 5, alpha, seed)]
        return sum(labels[r].bincount().max().item() / len(r) for r in rows) / len(rows)

    assert most(0.1) > most(1.0) > most(100.0)


def few(images: int) -> Any:
    """The first images of each part of digits."""
    return tuple((x[:images], y[:images]) for x, y in federated.parts())


def test_fedbn_keeps_norm_layers_with_their_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round by hand: shared is the mean weighted by images, what belongs to a norm layer stays each client's own."""
    given, sent, judged = few(400), [], []
    average = federated.average

    def watched(states: Any, weights: Any) -> Any:
        sent.append(([{n: t.clone() for n, t in state.items()} for state in states], weights))
        return average(states, weights)

    monkeypatch.setattr(federated, "parts", lambda: given)
    monkeypatch.setattr(federated, "average", watched)
    monkeypatch.setattr(federated, "accuracy", lambda model, _: judged.append(model.state_dict()) or 0.5)
    federated.federated("fedbn", 0.03, 0, tested=False, alpha=0.5, batch=16, rounds=1)
    ((states, weights),) = sent
    assert len(judged) == len(states) == federated.CLIENTS
    for name in states[0]:
        mean = sum(state[name].float() * (n / sum(weights)) for state, n in zip(states, weights, strict=True))
        for own, found in zip(states, judged, strict=True):
            norm = "bn" in name or "downsample.1" in name
            torch.testing.assert_close(found[name].float(), own[name].float() if norm else mean)
    assert not torch.equal(judged[0]["bn1.running_mean"], judged[1]["bn1.running_mean"])


def test_federated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = few(400)
    monkeypatch.setattr(federated, "parts", lambda: given)
    run = partial(federated.federated, alpha=0.5, rounds=1, batch=16)
    results = common.search(run, federated.ARMS, (0.03,), tmp_path, jobs=0, seeds=(0, 1))
    assert "NF − BN" in federated.table({(0.5, 16): results})
    federated.draw({(0.5, 16): results}, tmp_path / "figure.png")


def test_a_search_decides_on_validation_data_and_runs_nothing_twice(tmp_path: Path) -> None:
    asked = []

    def run(arm: str, lr: float, seed: int, tested: bool) -> dict[str, Any]:
        asked.append((arm, lr, seed, tested))
        val = {"a": 0.9 - lr, "b": 0.5 + lr}[arm]
        return {"status": "done", "val_accuracy": val, "test_accuracy": 1 - val if tested else None}

    results = common.search(run, ("a", "b"), (0.1, 0.2), tmp_path, jobs=0, seeds=(0, 1))
    assert {c["arm"]: c["lr"] for c in results["chosen"]} == {"a": 0.1, "b": 0.2}
    assert [key for key in asked if key[3] != (key[2] != 100)] == []  # the test split is for what is reported
    assert common.accuracies(results, "b", 0) == pytest.approx([0.3, 0.3])
    before = len(asked)
    assert common.search(run, ("a", "b"), (0.1, 0.2), tmp_path, jobs=0, seeds=(0, 1)) == results
    assert len(asked) == before == 4 + 4


def test_collect_keeps_every_run_but_not_its_configuration(tmp_path: Path) -> None:
    source, target = tmp_path / "out", tmp_path / "kept"
    run = {"arm": "bn", "lr": 0.1, "test_accuracy": 0.5, "config": {"epochs": 1}}
    for folder in ("b4", "b4/runs/bn"):
        (source / folder).mkdir(parents=True)
        found = {"format": 1, "start": str(source / "b4" / "net"), "runs": [run, run]}
        (source / folder / "results.json").write_text(json.dumps(found))
    (source / "verdict.md").write_text("found")
    written = collect.collect(source, target)
    assert sorted(file.name for file in written) == ["b4-results.json", "verdict.md"]
    kept = json.loads((target / "b4-results.json").read_text())
    assert kept.pop("start") == "out/b4/net"  # nothing of where the folder lay
    assert kept == {"format": 1, "runs": [{"arm": "bn", "lr": 0.1, "test_accuracy": 0.5}] * 2}


@pytest.mark.soak  # Opacus with converted models: tests/test_privacy.py
@pytest.mark.filterwarnings("ignore")
def test_privacy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opacus")
    from experiments import privacy

    torch.manual_seed(0)
    model = privacy.convert(nets.plain(10, 1), torch.randn(8, 1, 28, 28))
    assert privacy.gradient_error(model, torch.randn(2, 1, 28, 28)) < 1e-4
    monkeypatch.setattr(privacy, "parts", partial(few, 32))
    monkeypatch.setattr(privacy, "BATCH", 16)
    run = partial(privacy.private, epochs=1)
    results = common.search(run, privacy.ARMS, (0.3,), tmp_path, jobs=0, seeds=(0,))
    assert all(r["epsilon"] <= privacy.EPSILON for r in results["runs"])
    assert "ε" in privacy.table(results)
    privacy.draw(results, tmp_path / "figure.png")


def test_dropout(tmp_path: Path) -> None:
    found = {}
    for net in dropout.NETS:
        run = DIGITS | {"model": f"experiments.nets:{net}"}
        config = dropout.experiment(net, run=run, **TINY)
        found[net] = common.sweep(config, tmp_path / net, "test", jobs=0)
    assert dropout.table(found).count("\n") == 1 + len(dropout.NETS) * len(dropout.ARMS)


def test_changes_are_the_published_formulas() -> None:
    """ImageNet-C's (arXiv 1903.12261), by NumPy and SciPy, on images from 0 to 1."""
    from scipy.ndimage import gaussian_filter

    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    a = x.numpy()
    means = a.mean((2, 3), keepdims=True)
    found = shift.contrast(x, 5).numpy()
    np.testing.assert_allclose(found, np.clip((a - means) * 0.05 + means, 0, 1), atol=1e-6)
    np.testing.assert_allclose(shift.brightness(x, 2).numpy(), np.clip(a + 0.2, 0, 1), atol=1e-6)
    half = torch.full((40, 1, 28, 28), 0.5)
    assert abs(float(shift.noise(half, 1).std()) - 0.08) < 2e-3
    assert torch.equal(shift.noise(half, 3), shift.noise(half, 3))
    blurred = np.stack([gaussian_filter(one[0], 1.0, mode="mirror", truncate=4.0) for one in a])
    np.testing.assert_allclose(shift.blur(x, 5).numpy()[:, 0], blurred, atol=1e-4)
    for f in shift.CHANGES.values():
        assert f(x, 1).shape == x.shape
        assert (f(x, 5) - x).abs().mean() > (f(x, 1) - x).abs().mean() > 0.01


@pytest.mark.soak
def test_shift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run, on digits of 8×8 pixels in place of the images that may not be there."""
    train, val, test = few(96)
    monkeypatch.setattr(shift, "parts", lambda *_: (train, val, test, lambda x: x))
    monkeypatch.setattr(shift, "TESTED", 12)
    monkeypatch.setattr(shift, "BATCH", 48)
    monkeypatch.setitem(shift.DATA, "fashion-mnist", (96, 2))
    results = common.search(shift.shifted, ("bn", "fold"), (0.05,), tmp_path, jobs=0, seeds=(0, 1))
    written = shift.table(results)
    assert written.count("\n") == 1 + 2 + len(shift.BY_BATCH)
    shift.draw(results, tmp_path / "figure.png")
    (bn,) = [r for r in results["runs"] if r["final"] and r["arm"] == "bn" and r["seed"] == 0]
    assert set(bn["shift"]) == {"bn", *shift.BY_BATCH}
    assert all(len(row) == 5 for row in [bn["shift"]["bn"][name] for name in shift.CHANGES])
