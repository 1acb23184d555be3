"""AGC and centralization under DDP and FSDP2: two gloo processes must do what one does on the whole batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nfnets.agc import attach_agc, clip_grad_agc_
from nfnets.centralization import centralize_grad_
from tests.ranks import WORLD, needs_gloo, on_ranks

pytestmark = needs_gloo

LR = 0.5
# So that of each kind of parameter some units clip and some do not.
CLIPPING = 0.003
HEAD = 2.0


class Net(nn.Module):
    """Every kind of unit; odd sizes, so that shards are uneven and the scalar's second shard is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.up = nn.ConvTranspose2d(5, 7, 2)
        self.scalar = nn.Parameter(torch.tensor([0.3]))
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.conv(x).relu()).relu() * self.scalar
        return self.head(x.mean((2, 3)))


def build() -> Net:
    torch.manual_seed(0)
    return Net()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.arange(8) % 3


def train(
    model: nn.Module, x: Tensor, y: Tensor, steps: int = 3, head: float | None = None
) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    handle = attach_agc(optimizer, model, clipping=CLIPPING, head=head)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {
        "clipped": handle.stats.per_parameter(),
        "fraction": handle.stats.fraction.item(),
        "excluded": handle.excluded,
    }


def full(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def nonfinite_case(model: nn.Module) -> dict[str, Any]:
    """An infinity that lies in one rank's shard must stop the clipping of its unit, and only that, on both."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    dict(model.named_parameters())["up.weight"].grad[0, 2, 0, 0] = torch.inf  # pyright: ignore
    dict(model.named_parameters())["conv.bias"].grad[0] = torch.nan  # pyright: ignore
    fraction = clip_grad_agc_(model, clipping=CLIPPING).item()
    return {"fraction": fraction, "grads": [full(p.grad) for p in model.parameters()]}


def work(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x, y = (part.chunk(WORLD)[rank] for part in data())
    found: dict[str, Any] = {}

    ddp = nn.parallel.DistributedDataParallel(build())
    found["ddp"] = train(ddp, x, y) | {"params": [full(p) for p in ddp.parameters()]}

    mesh = init_device_mesh("cpu", (WORLD,))
    sharded = build()
    fully_shard(sharded.conv, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    found["fsdp"] = train(sharded, x, y) | {"params": [full(p) for p in sharded.parameters()]}

    headed = build()
    fully_shard(headed, mesh=mesh)
    found["head"] = train(headed, x, y, head=HEAD) | {"params": [full(p) for p in headed.parameters()]}

    # Shards along another dimension: parts of a row of the linear's, whole units of the transposed one's.
    along = build()
    fully_shard(along, mesh=mesh, shard_placement_fn=lambda p: _along(p))
    found["along"] = train(along, x, y) | {"params": [full(p) for p in along.parameters()]}

    found["centralized"] = [_sharded_centralized(mesh, placed) for placed in (None, _along)]

    broken = build()
    fully_shard(broken, mesh=mesh)
    for p in broken.parameters():
        p.grad = None
    found["nonfinite"] = _sharded_nonfinite(broken)
    torch.save(found, f"{folder}/{rank}.pt")


def _along(p: nn.Parameter) -> Any:
    from torch.distributed.tensor import Shard

    # FSDP wants the dimension to divide evenly when it is not the first.
    dims = [i for i in range(1, p.ndim) if p.shape[i] % WORLD == 0]
    return Shard(dims[0]) if dims else Shard(0)


def _centralized(model: nn.Module, gradient_of: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    for p in model.parameters():
        p.grad = gradient_of(p, torch.randn(p.shape, generator=generator))
    centralize_grad_(model)
    return [full(p.grad) for p in model.parameters()]


def _sharded_centralized(mesh: Any, placement: Any) -> list[Tensor]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    model = build()
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    return _centralized(model, lambda p, gradient: distribute_tensor(gradient, p.device_mesh, p.placements))


def _sharded_nonfinite(model: nn.Module) -> dict[str, Any]:
    from torch.distributed.tensor import distribute_tensor

    plain = build()
    grads = {name: torch.ones_like(p) for name, p in plain.named_parameters()}
    grads["up.weight"][0, 2, 0, 0] = torch.inf
    grads["conv.bias"][0] = torch.nan
    for name, p in model.named_parameters():
        p.grad = distribute_tensor(grads[name], p.device_mesh, p.placements)  # pyright: ignore
    fraction = clip_grad_agc_(model, clipping=CLIPPING).item()
    return {"fraction": fraction, "grads": [full(p.grad) for p in model.parameters()]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(work, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    model = build()
    return train(model, *data()) | {"params": [full(p) for p in model.parameters()]}


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "along"])
def test_two_processes_do_what_one_does(
    kind: str, ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    clipped = alone["clipped"]
    # The test would prove nothing if every unit, or none, were clipped.
    assert 0 < alone["fraction"] < 1
    assert {name for name, value in clipped.items() if value > 0} >= {"conv.weight", "up.weight", "up.bias"}
    for rank in ranks:
        found = rank[kind]
        assert found["excluded"] == alone["excluded"] == ("head.weight",)
        assert found["clipped"] == pytest.approx(clipped)
        assert found["fraction"] == pytest.approx(alone["fraction"])
        for p, q in zip(found["params"], alone["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_a_sharded_head_has_a_limit_of_its_own(ranks: list[dict[str, Any]]) -> None:
    model = build()
    expected = train(model, *data(), head=HEAD)
    assert expected["excluded"] == ()
    assert expected["clipped"]["head.weight"] > 0
    for rank in ranks:
        assert rank["head"]["clipped"] == pytest.approx(expected["clipped"])
        for p, q in zip(rank["head"]["params"], model.parameters(), strict=True):
            torch.testing.assert_close(p, q.detach(), rtol=1e-5, atol=1e-7)


def test_shards_lose_the_means_of_whole_filters(ranks: list[dict[str, Any]]) -> None:
    expected = _centralized(build(), lambda _, gradient: gradient)
    for rank in ranks:
        for grads in rank["centralized"]:
            for p, q in zip(grads, expected, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_nonfinite_shard_is_seen_by_every_rank(ranks: list[dict[str, Any]]) -> None:
    expected = nonfinite_case(build())
    for rank in ranks:
        assert rank["nonfinite"]["fraction"] == pytest.approx(expected["fraction"])
        for p, q in zip(rank["nonfinite"]["grads"], expected["grads"], strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=0, equal_nan=True)


def test_sharding_is_really_uneven() -> None:
    sizes = [tuple(len(part) for part in p.chunk(WORLD)) for p in build().parameters()]
    assert (1,) in sizes  # the second shard is empty
    assert (3, 2) in sizes


def test_the_unclipped_run_differs(alone: dict[str, Any]) -> None:
    model = build()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(data()[0]), data()[1]).backward()
        optimizer.step()
    assert any(
        not torch.allclose(p, q, rtol=1e-2) for p, q in zip(plain.parameters(), alone["params"], strict=True)
    )
