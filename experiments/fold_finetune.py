"""Fold and fine-tune: does a trained net without its norm layers learn on at batch 4 as well as BatchNorm at its best?

    python -m experiments.fold_finetune [--data digits] [--before 4] [--out runs/fold-finetune] [--jobs 2]

ResNet-14 is trained with BatchNorm on 4,000 images of Fashion-MNIST (1 epoch) or on digits (1,294 images, 2 epochs),
one net a seed; so little that there is something left to learn (`--before` sets the epochs). Each is then fine-tuned
for two more epochs on the same images (so that the validation images stay unseen): as it is at batch 4 and 64, and
folded at batch 4, both by SGD and by AdamW, with equal budgets of five learning rates. Folded nets are also trained
without clipping and without gradient centralization. BatchNorm's best batch size and optimizer are chosen on
validation data. About 45 core minutes, 10 on digits. Interrupted, the same command goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.common import (
    COLORS,
    SEEDS,
    TUNING_SEED,
    accuracies,
    arguments,
    compared,
    conclude,
    limits,
    markdown,
    more_evidence,
    panels,
    percent,
    percent_axis,
    save,
    sweep,
)
from nfnets.train.compare import ExperimentConfig
from nfnets.train.compare.statistics import mean_interval

# How many images there are before and after, a tenth of them for validation; None: all.
DATA: dict[str, int | None] = {"digits": None, "fashion-mnist": 4445}
EPOCHS, MORE = {"digits": 2, "fashion-mnist": 1}, 2
MODEL: dict[str, Any] = {"model": "bn_resnet14_cifar", "threads": 1}
BN_BATCHES, FOLDED_BATCHES = (4, 64), (4,)
# At batch 4; with the square root of the batch size at the others.
LRS = (0.001, 0.003, 0.01, 0.03, 0.1)
ADAMW: dict[str, Any] = {"optimizer": "adamw", "lrs": (0.0001, 0.0003, 0.001, 0.003, 0.01)}
BN: dict[str, dict[str, Any]] = {"bn": {"method": "bn"}, "bn-adamw": {"method": "bn", **ADAMW}}
FOLDED: dict[str, dict[str, Any]] = {
    "fold": ADAMW,  # what `nfnets train` does by itself: AdamW, centralized gradients, λ = 0.14
    "fold-no-clipping": {"clipping": None, **ADAMW},
    "fold-not-centralized": {"centralization": False, **ADAMW},
    "fold-sgd": {"optimizer": "sgd"},
}
WEIGHTS = "runs/bn-b64-lr0.1-s{seed}/model.safetensors"
COMMAND = "python -m experiments.fold_finetune"


def trained(out: Path, jobs: int, seeds: Sequence[int] = (TUNING_SEED, *SEEDS), **run: Any) -> dict[str, Any]:
    """Train the nets to start from; their weights lie in runs/bn-b64-lr0.1-s{seed}/."""
    config = ExperimentConfig.create(
        run={**MODEL, **run},
        arms=[{"name": "bn", "method": "bn"}],
        lrs=[0.1],
        batch_sizes=[64],
        seeds=seeds,
    )
    return sweep(config, out, COMMAND, jobs)


def fine_tuned(
    start: Path,
    out: Path,
    jobs: int,
    arms: dict[str, dict[str, Any]],
    lrs: Sequence[float],
    batch_sizes: Sequence[int],
    run: dict[str, Any],
    **fields: Any,
) -> dict[str, Any]:
    """Fine-tune them."""
    config = ExperimentConfig.create(
        **{
            "run": {**MODEL, "epochs": MORE, "init_from": str(start / WEIGHTS), **run},
            "arms": [{"name": name, "method": "fold", **arm} for name, arm in arms.items()],
            "lrs": lrs,
            "batch_sizes": batch_sizes,
            "lr_scaling": "sqrt",
            "seeds": SEEDS,
            "tuning_seeds": [TUNING_SEED],
        }
        | fields
    )
    return sweep(config, out, COMMAND, jobs)


def best(bn: dict[str, Any]) -> tuple[str, int]:
    """BatchNorm's best arm and batch size on validation data."""
    tried = [(arm["name"], b) for arm in bn["experiment"]["arms"] for b in bn["experiment"]["batch_sizes"]]
    return max(tried, key=lambda at: mean_interval(accuracies(bn, *at, "val")).mean)


def table(start: dict[str, Any], bn: dict[str, Any], folded: dict[str, Any]) -> str:
    """Test accuracy of every arm, and its paired difference to BatchNorm at its best, as Markdown."""
    chosen = best(bn)
    baseline = accuracies(bn, *chosen)
    seeds = bn["experiment"]["seeds"]
    before = [r["test_accuracy"] for r in start["runs"] if r["seed"] in seeds]
    lrs = {(c["arm"], c["batch_size"]): c["lr"] for r in (bn, folded) for c in r["chosen"]}
    body = [["before fine-tuning", 64, "–", percent(before), compared(before, baseline)]]
    for results in (bn, folded):
        for arm in results["experiment"]["arms"]:
            for batch in results["experiment"]["batch_sizes"]:
                found = accuracies(results, arm["name"], batch)
                at_best = results is bn and (arm["name"], batch) == chosen
                difference = "best on validation" if at_best else compared(found, baseline)
                body.append([arm["name"], batch, f"{lrs[arm['name'], batch]:g}", percent(found), difference])
    head = ["arm", "batch", "lr", "test, %", f"minus {chosen[0]} at batch {chosen[1]}, points [95 %]"]
    return markdown(head, body)


def draw(bn: dict[str, Any], folded: dict[str, Any], path: Path) -> None:
    """Left the search, right the reported seeds."""
    figure, (search, final) = panels(2, width=9.6, height=3.6)
    lines = [(r, arm["name"], b) for r in (bn, folded) for arm in r["experiment"]["arms"] for b in _sizes(r)]
    for number, (results, arm, batch) in enumerate(lines):
        tried = sorted(
            (
                r
                for r in results["runs"]
                if (r["arm"], r["batch_size"], r["seed"]) == (arm, batch, TUNING_SEED)
            ),
            key=lambda r: r["lr"],
        )
        style: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "marker": "o", "ms": 4}
        search.plot([r["lr"] for r in tried], [r["val_accuracy"] or 0.1 for r in tried], **style)
        found = accuracies(results, arm, batch)
        final.scatter([number] * len(found), found, color=style["color"], alpha=0.5, s=16)
        final.plot([number - 0.25, number + 0.25], [sum(found) / len(found)] * 2, color=style["color"], lw=2)
    search.set_xscale("log")
    search.set_xlabel("learning rate")
    percent_axis(search, "validation accuracy, tuning seed")
    percent_axis(final, "test accuracy, seeds and mean")
    labels = [f"{arm.replace('-', chr(10))}\nbatch {batch}" for _, arm, batch in lines]
    final.set_xticks(range(len(lines)), labels, fontsize=8)
    save(figure, path)


def _sizes(results: dict[str, Any]) -> list[int]:
    return results["experiment"]["batch_sizes"]


def main() -> None:
    parser = arguments(__doc__, "runs/fold-finetune")
    parser.add_argument("--data", choices=sorted(DATA), default="fashion-mnist")
    parser.add_argument("--before", type=int, help="epochs of BatchNorm before; default 1, on digits 2")
    parser.add_argument("--arms", nargs="+", choices=FOLDED, default=list(FOLDED), help="default: all")
    more_evidence(parser, seeds=len(SEEDS))
    options = parser.parse_args()
    if options.validation and DATA[options.data] is None:
        parser.error(f"--validation: {options.data} is used whole; leave it out")
    jobs, images, seeds = options.jobs, DATA[options.data], range(options.seeds)
    run = {"data": options.data} | (limits(images, options.validation) if images else {})
    before = options.before or EPOCHS[options.data]
    out = options.out / (f"{options.data}-{before}" if options.before else options.data)
    nets, arms = out / "trained", {name: FOLDED[name] for name in options.arms}
    start = trained(nets, jobs, (TUNING_SEED, *seeds), epochs=before, **run)
    folded = fine_tuned(nets, out / "folded", jobs, arms, LRS, FOLDED_BATCHES, run, seeds=seeds)
    bn = fine_tuned(nets, out / "bn", jobs, BN, LRS, BN_BATCHES, run, seeds=seeds)
    draw(bn, folded, out / "fold_finetune.png")
    asked = f"--data {options.data}" + (f" --before {before}" if options.before else "")
    asked += "" if len(arms) == len(FOLDED) else f" --arms {' '.join(arms)}"
    asked += "" if options.seeds == len(SEEDS) else f" --seeds {options.seeds}"
    asked += f" --validation {options.validation}" if options.validation else ""
    conclude(out, f"{COMMAND} {asked}", __doc__, table(start, bn, folded))


if __name__ == "__main__":
    main()
