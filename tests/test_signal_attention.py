"""Attention whose scale is missing is found however it is written, and none is where it has one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nfnets
from nfnets.signal import SignalReport

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
ROOT = 16**0.5


def alphas(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    empty = torch.empty(len(q) * q.shape[1], q.shape[2], k.shape[2])
    logits = torch.baddbmm(empty, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=1 / ROOT)
    return (logits.softmax(-1) @ v.flatten(0, 1)).unflatten(0, q.shape[:2])


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    later = torch.ones(q.shape[2], k.shape[2]).triu(1).bool()
    return (q @ k.mT).masked_fill(later, -torch.inf).softmax(-1) @ v


SICK: dict[str, Attend] = {
    "softmax": lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "einsum": lambda q, k, v: F.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k), -1) @ v,
    "causal": causal,
    "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0),
    "fused and causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0),
}
HEALTHY: dict[str, Attend] = {
    "softmax": lambda q, k, v: (q @ k.mT / ROOT).softmax(-1) @ v,
    "queries": lambda q, k, v: ((q / ROOT) @ k.mT).softmax(-1) @ v,
    "baddbmm": alphas,
    "cosine": lambda q, k, v: (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v,
    "fused": F.scaled_dot_product_attention,
    "fused, queries": lambda q, k, v: F.scaled_dot_product_attention(q / ROOT, k, v, scale=1.0),
    "fused, 1/d": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1 / 16),
}


class Block(nn.Module):
    """Four heads of width 16 over 12 positions."""

    def __init__(self, attend: Attend, size: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.qkv, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)
        nn.init.normal_(self.qkv.weight, 0.0, size / 8)
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def report(attend: Attend, size: float = 1.0) -> SignalReport:
    return nfnets.profile(Block(attend, size), torch.randn(8, 12, 64), backward=True)


@pytest.mark.parametrize("how", SICK)
def test_a_missing_scale_is_found(how: str) -> None:
    verdict = report(SICK[how]).check()
    assert verdict.broken == ("attention",)
    (finding,) = verdict.findings
    assert finding.name in ("softmax", "out")
    assert 8 < finding.value < 32  # queries and keys of variance 1: the width of a head


@pytest.mark.parametrize("how", HEALTHY)
def test_a_scale_is_seen_wherever_it_stands(how: str) -> None:
    found = report(HEALTHY[how])
    assert all(p.logits is None for p in found.points)
    assert any(p.peak is not None for p in found.points)
    assert "attention" not in found.check().broken
    assert "attention" not in {r.name for r in found.check().unmeasured}


def test_the_logits_are_those_of_the_softmax() -> None:
    seen: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q @ k.mT)[:4])
        return SICK["softmax"](q, k, v)

    (value,) = [p.logits for p in report(attend).points if p.logits is not None]
    assert value == pytest.approx(seen[0].var(-1, correction=0).mean().item(), rel=1e-4)


@pytest.mark.parametrize(("scale", "broken"), [(1.0, ("attention",)), (1 / ROOT, ())])
def test_layers_that_are_written_as_functions(scale: float, broken: tuple[str, ...]) -> None:
    class Written(Block):
        def forward(self, x: Tensor) -> Tensor:
            normal = self.norm(2 * x)
            q, k, v = (
                (F.linear(normal, w) + b).unflatten(-1, (4, 16)).transpose(1, 2)
                for w, b in zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
            )
            q = q if scale == 1.0 else q * scale
            return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))

    found = nfnets.profile(Written(SICK["softmax"]), torch.randn(8, 12, 64), backward=True)
    assert found.check().broken == broken, str(found.check())


def test_small_weights_stand_for_a_scale() -> None:
    """As in T5, which has no other."""
    found = report(SICK["softmax"], size=0.25)
    assert found.check(), str(found.check())
    assert any("attention without a scale" in note for note in found.notes)
