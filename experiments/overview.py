"""The figure of the README: accuracy without BatchNorm minus with it, against batch size, from the kept results.

python -m experiments.overview     # seconds; reads docs/results, writes docs/images/nf_minus_bn.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context

from experiments.common import accuracies, panels
from nfnets.signal.figure import COLORS, MARKERS
from nfnets.train.compare.statistics import Interval, paired_difference

ROOT = Path(__file__).parents[1]
STYLE = {"font.size": 10, "savefig.dpi": 150}


class Row(NamedTuple):
    """A comparison: its folder in docs/results, what was trained on what, and NF − BN as a share of 1."""

    folder: str
    label: str
    batch_size: int
    difference: Interval


def _compares_bn_and_nf(experiment: Any) -> bool:
    arms = experiment.get("arms", ()) if isinstance(experiment, dict) else ()
    return [arm["name"] for arm in arms if isinstance(arm, dict)] == ["bn", "nf"]


def rows(results: Path = ROOT / "docs" / "results") -> list[Row]:
    """Every kept comparison of the arms `bn` and `nf` alone, by batch size and label."""
    found = []
    for file in sorted(results.glob("*/results.json")):
        content = json.loads(file.read_text())
        if not _compares_bn_and_nf(experiment := content.get("experiment")):
            continue
        (batch,), net = experiment["batch_sizes"], experiment["run"]["model"].rpartition(":")[2]
        data = "digits" if experiment["run"]["data"] == "digits" else "Fashion-MNIST"
        names = {
            "vgg": "VGG",
            "densenet": "DenseNet",
            "efficientnet": "EfficientNet",
            "mobilenet": "MobileNet",
        }
        label = net.removeprefix("bn_").removesuffix("_cifar").replace("resnet", "ResNet-")
        for name, written in names.items():
            label = label.replace(name, written) if label.startswith(name) else label
        values = (accuracies(content, arm, batch) for arm in ("nf", "bn"))
        found.append(
            Row(file.parent.name, f"{label.replace('v', 'V')}, {data}", batch, paired_difference(*values))
        )
    return sorted(found, key=lambda row: (row.batch_size, row.label))


def draw(found: Sequence[Row], file: Path) -> None:
    """One dot with its interval for each comparison, groups by batch size."""
    labels = sorted({row.label for row in found})
    sizes = sorted({row.batch_size for row in found})
    with rc_context(STYLE):
        figure, (axis,) = panels(width=8.4, height=4.2)
        for place, size in enumerate(sizes):
            group = [row for row in found if row.batch_size == size]
            for x, row in zip(
                place + 0.1 * (np.arange(len(group)) - (len(group) - 1) / 2), group, strict=True
            ):
                number, mean = labels.index(row.label), 100 * row.difference.mean
                axis.errorbar(
                    x,
                    mean,
                    [[mean - 100 * row.difference.low], [100 * row.difference.high - mean]],
                    fmt=MARKERS[number % len(MARKERS)],
                    color=COLORS[number % len(COLORS)],
                    markerfacecolor="white" if number >= len(COLORS) else None,
                    capsize=2.5,
                    markersize=5.5,
                    label=row.label,
                )
        axis.axhline(0, color="0.3", linewidth=1)
        axis.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axis.set_xlabel("images per step")
        axis.set_ylabel("accuracy: NF − BatchNorm, points")
        for y, side, text in ((0.98, "top", "NF is better ↑"), (0.02, "bottom", "BatchNorm is better ↓")):
            axis.text(0.99, y, text, ha="right", va=side, color="0.4", transform=axis.transAxes)
        handles, names = axis.get_legend_handles_labels()
        once = {name: handles[names.index(name)] for name in sorted(set(names))}
        axis.legend(
            list(once.values()),
            list(once),
            frameon=False,
            fontsize=8.5,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Draw it; prints the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "nf_minus_bn.png")
    options = parser.parse_args(argv)
    found = rows()
    draw(found, options.out)
    for row in found:
        d = row.difference
        print(
            f"{row.batch_size:4}  {row.label:28} {100 * d.mean:+6.2f} [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
        )
    return found


if __name__ == "__main__":
    main()
