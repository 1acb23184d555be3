"""What a training step costs: normalizer-free nets beside timm's, their BatchNorm twins and EfficientNet-B7, on a GPU.

    python -m experiments.step_time [--batch 32] [--out runs/step-time]

Each pair is timed in turn, step by step, so that what slows one slows the other: eager and compiled, fp32 (TF32) and
bf16. A step is forward, backward, clipping and SGD with Nesterov momentum on one fixed batch, in channels-last memory,
at the resolution that each net trains at (EfficientNet-B7: 600 pixels). The paper's pair (arXiv 2102.06171) is NFNet-F1
against EfficientNet-B7: up to 8.7 times faster to train. Interrupted, the same command goes on; without a GPU it
refuses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

import nfnets
from benchmarks.timing import paired
from experiments.common import arguments, conclude, markdown, panels, save
from nfnets.signal.figure import COLORS
from nfnets.train.compare.experiment import write_json
from nfnets.train.hardware import hardware, versions

COMMAND = "python -m experiments.step_time"
CLIPPING = 0.01


@dataclass(frozen=True)
class Subject:
    """A net and how it is trained; models are `nfnets:NAME` or `timm:NAME`."""

    model: str
    side: int
    clip: str = "none"
    """`"agc"` ours, `"timm"` timm's AGC, `"norm"` torch's `clip_grad_norm_`, `"none"`."""

    @property
    def label(self) -> str:
        """For tables."""
        clipped = {"agc": ", AGC", "timm": ", timm's AGC", "norm": ", clip_grad_norm_", "none": ""}[self.clip]
        return f"{self.model}, {self.side} px{clipped}"


PAIRS: tuple[tuple[Subject, Subject], ...] = (
    (Subject("nfnets:nfnet_f0", 192, "agc"), Subject("timm:dm_nfnet_f0", 192, "timm")),
    (Subject("nfnets:nfnet_f1", 224, "agc"), Subject("timm:dm_nfnet_f1", 224, "timm")),
    (Subject("nfnets:nfnet_f1", 224, "agc"), Subject("timm:tf_efficientnet_b7", 600)),
    (Subject("nfnets:nf_resnet50", 224, "agc"), Subject("nfnets:bn_nf_resnet50", 224)),
    (Subject("nfnets:nf_resnet50", 224, "agc"), Subject("nfnets:nf_resnet50", 224, "norm")),
)
MODES: tuple[tuple[str, bool], ...] = (("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True))
"""Precision, and whether the model is compiled."""


def step_of(
    subject: Subject, batch: int, device: torch.device, precision: str, compiled: bool
) -> Callable[[], Tensor]:
    """One training step on a fixed batch."""
    torch.manual_seed(0)
    source, _, name = subject.model.partition(":")
    model: nn.Module = {"nfnets": nfnets.create_model, "timm": timm.create_model}[source](name)
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
    if subject.clip == "agc":
        nfnets.attach_agc(optimizer, model, clipping=CLIPPING)
    x = torch.randn(batch, 3, subject.side, subject.side, device=device).contiguous(
        memory_format=torch.channels_last
    )
    y = torch.zeros(batch, dtype=torch.long, device=device)
    call = torch.compile(model) if compiled else model
    half = precision == "bf16"

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16) if half else nullcontext():
            loss = F.cross_entropy(call(x), y)
        loss.backward()
        if subject.clip == "timm":
            adaptive_clip_grad(model.parameters(), CLIPPING)
        elif subject.clip == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        return loss

    return step


def measure(
    pair: tuple[Subject, Subject],
    batch: int,
    device: torch.device,
    precision: str,
    compiled: bool,
    rounds: int = 20,
) -> dict[str, Any]:
    """Medians in milliseconds, and the median of the paired ratios peer / ours."""
    ours, peer = (step_of(subject, batch, device, precision, compiled) for subject in pair)
    times = paired(peer, ours, rounds, warmup=5)  # a ratio above 1: ours is faster
    torch.compiler.reset()
    return {
        "ours": asdict(pair[0]),
        "peer": asdict(pair[1]),
        "batch": batch,
        "precision": precision,
        "compiled": compiled,
        "ours_ms": times.peer_ms,
        "peer_ms": times.ours_ms,
        "faster": times.ratio,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Every row, as Markdown."""
    body = [
        [
            Subject(**row["ours"]).label,
            Subject(**row["peer"]).label,
            f"{row['precision']}{', compiled' if row['compiled'] else ''}",
            f"{row['ours_ms']:.1f}",
            f"{row['peer_ms']:.1f}",
            f"{row['faster']:.2f}×",
        ]
        for row in rows
    ]
    return markdown(["net", "peer", "mode", "its step, ms", "peer's, ms", "faster"], body)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """How many times faster than its peer each net is: a group of bars for each pair, a bar for each mode."""

    def pair(row: dict[str, Any]) -> str:
        ours, peer = Subject(**row["ours"]).label, Subject(**row["peer"]).label
        return f"{ours.partition(':')[2]}\nagainst {peer}"

    def mode(row: dict[str, Any]) -> str:
        return f"{row['precision']}{', compiled' if row['compiled'] else ''}"

    pairs, modes = ([*dict.fromkeys(map(key, rows))] for key in (pair, mode))
    figure, (axis,) = panels(width=8.0, height=1.0 + 0.8 * len(pairs))
    thick = 0.8 / len(modes)
    for number, name in enumerate(modes):
        found = [row for row in rows if mode(row) == name]
        places = [pairs.index(pair(row)) + (number - (len(modes) - 1) / 2) * thick for row in found]
        axis.barh(places, [row["faster"] for row in found], height=thick, label=name, color=COLORS[number])
    axis.axvline(1.0, color="0.3", linewidth=1)
    axis.set_yticks(range(len(pairs)), pairs, fontsize=8)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("peer's step time over its own")
    axis.legend(frameon=False, fontsize=8)
    save(figure, path)


def main() -> None:
    parser = arguments(__doc__, "runs/step-time")
    parser.add_argument("--batch", type=int, default=32, help="images a step; the paper's is 32 a device")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("step times are asked of a GPU: torch sees none here; nothing was run")
    device = torch.device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    file = options.out / "results.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else []
    options.out.mkdir(parents=True, exist_ok=True)
    for precision, compiled in MODES:
        for pair in PAIRS:
            key = (asdict(pair[0]), asdict(pair[1]), options.batch, precision, compiled)
            if any((r["ours"], r["peer"], r["batch"], r["precision"], r["compiled"]) == key for r in rows):
                continue
            rows.append(measure(pair, options.batch, device, precision, compiled))
            write_json(file, {"runs": rows, "hardware": hardware(device), "versions": versions()})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            torch.cuda.empty_cache()
    draw(rows, options.out / "step_time.png")
    conclude(options.out, COMMAND, __doc__, table(rows))


if __name__ == "__main__":
    main()
