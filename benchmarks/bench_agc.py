"""AGC in a training step against timm's and `clip_grad_norm_`, on the parameters of a ResNet-50 and an NFNet-F0.

All on the same gradients, restored before every call, in turn; medians. Rows differ in the share of units that clip:
none, a tenth, all. timm reads and writes everything in any case, ours writes what it clips.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor, nn

from benchmarks.timing import seconds
from nfnets.agc import attach_agc

CLIPPING, EPS = 0.01, 1e-3
# Their names, and how many times faster than timm on two CPU cores.
MODELS = {"resnet50": ("ResNet-50", 8), "dm_nfnet_f0": ("NFNet-F0", 4)}
SMALL = {"rounds": 1, "models": {"resnet18": ("ResNet-18", 1)}}


def unit_norms(tensor: Tensor) -> Tensor:
    if tensor.ndim <= 1:
        return tensor.norm()
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)), keepdim=True)


@torch.no_grad()
def gradients(params: list[nn.Parameter], share: float) -> list[Tensor]:
    """Gradients of which about `share` of the units has twice the norm that AGC lets through, the others half."""
    generator = torch.Generator().manual_seed(0)
    grads = []
    for p in params:
        grad = torch.randn(p.shape, generator=generator).to(p.device)
        norm = unit_norms(grad)
        over = torch.rand(norm.shape, generator=generator).to(p.device) < share
        limit = CLIPPING * unit_norms(p).clamp(min=EPS)
        grads.append(grad * limit / norm * torch.where(over, 2.0, 0.5))
    return grads


def in_turn(calls: dict[str, Callable[[], Any]], restore: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Median milliseconds of each."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 2):
        for name, call in calls.items():
            restore()
            elapsed = seconds(call)
            if index >= 2:
                taken[name].append(1e3 * elapsed)
    return {name: statistics.median(times) for name, times in taken.items()}


def rows(rounds: int = 15, models: dict[str, tuple[str, int]] = MODELS) -> list[dict[str, Any]]:
    """Two for every model and share; ratio is timm / ours, then ours / clip_grad_norm_."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for name, (label, faster) in models.items():
        model = timm.create_model(name).to(device)
        params = list(model.parameters())
        handle = attach_agc(torch.optim.SGD(params, lr=0.0), model, CLIPPING, EPS, exclude=None)
        calls = {
            "ours": handle._change,
            "timm": lambda params=params: adaptive_clip_grad(params, CLIPPING, EPS),
            "norm": lambda params=params: nn.utils.clip_grad_norm_(params, 1.0, foreach=True),
        }
        for share in (0.0, 0.1, 1.0):
            saved = gradients(params, share)
            for p, grad in zip(params, saved, strict=True):
                p.grad = grad.clone()
            current = [p.grad for p in params]

            def restore(current: Any = current, saved: list[Tensor] = saved) -> None:
                torch._foreach_copy_(current, saved)  # pyright: ignore

            ms = in_turn(calls, restore, rounds)
            what = f"AGC, {label}, {share:.0%} clipped"
            found += [
                {
                    "what": what,
                    "ours_ms": ms["ours"],
                    "peer": "timm adaptive_clip_grad",
                    "peer_ms": ms["timm"],
                    "ratio": ms["timm"] / ms["ours"],
                    "target": f"≥ {faster}× faster" if device == "cpu" else "",
                },
                {
                    "what": what,
                    "ours_ms": ms["ours"],
                    "peer": "clip_grad_norm_(foreach=True)",
                    "peer_ms": ms["norm"],
                    "ratio": ms["ours"] / ms["norm"],
                    "target": "≤ 1.5×" if device == "cpu" else "≤ 2×",
                },
            ]
        handle.remove()
    return found


if __name__ == "__main__":
    for row in rows():
        print(
            "{what:32} {ours_ms:8.2f} ms   {peer:30} {peer_ms:8.2f} ms   {ratio:5.2f}  {target}".format(**row)
        )
