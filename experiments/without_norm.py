"""Nets without a norm layer by their initialization: LSUV, orthogonal, He, Fixup; a plain net and a residual one.

    python -m experiments.without_norm [--out runs/without-norm] [--jobs 2]

Digits (1,294 training images of 8×8 pixels), batch 32, 4 epochs. A plain net of 14 layers without shortcuts, and
ResNet-14. Every arm searches four learning rates on validation data with a tuning seed, then runs with three paired
seeds. No arm is clipped but NF + AGC. About 4 minutes on 2 cores. Interrupted, the same command goes on.
"""

from __future__ import annotations

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
    markdown,
    panels,
    percent,
    percent_axis,
    save,
    sweep,
)
from nfnets.train.compare import ExperimentConfig

BATCH = 32
LRS = (0.01, 0.03, 0.1, 0.3)
# Drawn when the net is built, or by converting the BatchNorm net.
DRAWN = ("he", "orthogonal", "delta_orthogonal")
CONVERTED: dict[str, dict[str, Any]] = {
    "lsuv": {"method": "lsuv"},
    "fixup": {"method": "fixup"},
    "nf": {"method": "nf"},
    "nf+agc": {"method": "nf", "clipping": 0.1},
}
NETS = {"plain": "a plain net of 14 layers", "resnet": "ResNet-14"}
COMMAND = "python -m experiments.without_norm"


def experiment(net: str, **fields: Any) -> ExperimentConfig:
    """All arms that fit a net: Fixup needs residual branches."""
    arms: list[dict[str, Any]] = [{"name": "bn", "method": "bn"}]
    arms += [
        {"name": weights, "method": "bn", "model_options": {"depth": 14, "weights": weights}}
        for weights in DRAWN
    ]
    arms += [
        {"name": name, "clipping": None} | arm
        for name, arm in CONVERTED.items()
        if (net, name) != ("plain", "fixup")
    ]
    return ExperimentConfig.create(
        **{
            "run": {
                "data": "digits",
                "epochs": 4,
                "threads": 1,
                "model": f"experiments.nets:{net}",
                "model_options": {"depth": 14},
                "eval_every": 0,
            },
            "arms": arms,
            "lrs": LRS,
            "batch_sizes": [BATCH],
            "seeds": SEEDS,
            "tuning_seeds": [TUNING_SEED],
        }
        | fields
    )


def table(found: dict[str, dict[str, Any]]) -> str:
    """Test accuracy and the paired differences to He's initialization and to BatchNorm, as Markdown."""
    body = []
    for net, results in found.items():
        he, bn = (accuracies(results, arm, BATCH) for arm in ("he", "bn"))
        rates = {c["arm"]: c["lr"] for c in results["chosen"]}
        for arm in (arm["name"] for arm in results["experiment"]["arms"]):
            values = accuracies(results, arm, BATCH)
            against = ["–" if arm == other else compared(values, v) for other, v in (("he", he), ("bn", bn))]
            body.append([NETS[net], arm, f"{rates[arm]:g}", percent(values), *against])
    return markdown(
        ["net", "arm", "lr", "test, %", "minus He, points [95 %]", "minus BN, points [95 %]"], body
    )


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Every seed's test accuracy and their mean, a panel for each net."""
    figure, axes = panels(len(found), width=4.6 * len(found), height=3.7, sharey=True)
    for axis, (net, results) in zip(axes, found.items(), strict=True):
        names = [arm["name"] for arm in results["experiment"]["arms"]]
        for place, arm in enumerate(names):
            values, color = accuracies(results, arm, BATCH), COLORS[place % len(COLORS)]
            axis.scatter([place] * len(values), values, s=16, alpha=0.5, color=color, linewidths=0)
            axis.plot([place - 0.28, place + 0.28], [sum(values) / len(values)] * 2, color=color, lw=2)
        axis.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
        axis.set_title(NETS[net], fontsize=11)
    percent_axis(axes[0], "test accuracy")
    save(figure, path)


def main() -> None:
    options = arguments(__doc__, "runs/without-norm").parse_args()
    found = {net: sweep(experiment(net), options.out / net, COMMAND, options.jobs) for net in NETS}
    draw(found, options.out / "without_norm.png")
    conclude(options.out, COMMAND, __doc__, table(found))


if __name__ == "__main__":
    main()
