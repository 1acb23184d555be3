"""Graph nets on digits: BatchNorm and `nf`, 30 steps, at several rates.

    pip install torch_geometric
    python -m experiments.graph_nets [GIN GCN GraphSAGE]

A digit's pixels brighter than a tenth are nodes (brightness and position), each joined to its six nearest; 300 digits
are kept for the test. Four layers of 64 channels by torch_geometric, the mean or the sum over the nodes, a linear
layer; batches of 64 digits, Adam, three seeds. `nf` is clipped at λ = 0.02, and once more without clipping.
"""

from __future__ import annotations

import sys
from functools import cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from nfnets import attach_agc, convert

KINDS, POOLS, RATES, SEEDS, STEPS, BATCH = (
    ("GIN", "GCN", "GraphSAGE"),
    ("mean", "add"),
    (1e-3, 3e-3),
    3,
    30,
    64,
)
ARMS: dict[str, float | None] = {"bn": None, "nf": 0.02, "nf, unclipped": 0.0}
Graph = tuple[Tensor, Tensor]


def graph(image: Tensor) -> Graph:
    """Features of the nodes and edges of one digit."""
    bright = image > 0.1
    places = bright.nonzero().float()
    apart = torch.cdist(places, places).fill_diagonal_(torch.inf)
    near = apart.topk(6, largest=False).indices
    features = torch.cat([image[bright][:, None], places / 7], 1)
    edges = torch.stack([near.flatten(), torch.arange(len(places)).repeat_interleave(6)])
    return (features - 0.5) / 0.3, edges


@cache
def data() -> tuple[list[Graph], Tensor]:
    """All digits and their labels."""
    digits = load_digits()
    return [graph(torch.tensor(image).float() / 16) for image in digits.images], torch.tensor(digits.target)


def batched(graphs: list[Graph]) -> tuple[Tensor, Tensor, Tensor]:
    """Features, edges, and the graph that each node is of."""
    sizes = torch.tensor([len(features) for features, _ in graphs])
    starts = (sizes.cumsum(0) - sizes).tolist()
    edges = torch.cat([edges + start for (_, edges), start in zip(graphs, starts, strict=True)], 1)
    return (
        torch.cat([features for features, _ in graphs]),
        edges,
        torch.arange(len(graphs)).repeat_interleave(sizes),
    )


class Net(nn.Module):
    """A graph net of torch_geometric, what it says of all nodes together, and a head."""

    def __init__(self, kind: str, pool: str):
        super().__init__()
        from torch_geometric.nn import models

        self.net = getattr(models, kind)(3, 64, 4, norm="batch_norm")
        self.pool, self.head = pool, nn.Linear(64, 10)

    def forward(self, x: Tensor, edges: Tensor, of: Tensor) -> Tensor:
        x = self.net(x, edges)
        total = x.new_zeros(int(of.max()) + 1, x.shape[1]).index_add(0, of, x)
        return self.head(total if self.pool == "add" else total / of.bincount()[:, None])


def trained(kind: str, pool: str, arm: str, rate: float, seed: int) -> list[float]:
    """Training loss at the start and at the end, loss and accuracy on the test digits."""
    torch.manual_seed(seed)
    model: nn.Module = Net(kind, pool)
    graphs, labels = data()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(graphs), generator=generator)
    test, rest = order[:300], order[300:]
    of = lambda chosen: batched([graphs[i] for i in chosen.tolist()])  # noqa: E731
    if arm != "bn":
        model = convert(model, *of(rest[:BATCH]))
    optimizer = torch.optim.Adam(model.train().parameters(), rate)
    if ARMS[arm]:
        attach_agc(optimizer, model, clipping=ARMS[arm])
    losses = []
    for _ in range(STEPS):
        chosen = rest[torch.randint(len(rest), (BATCH,), generator=generator)]
        loss = F.cross_entropy(model(*of(chosen)), labels[chosen])
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        outputs = model.eval()(*of(test))
    right = float((outputs.argmax(1) == labels[test]).float().mean())
    return [losses[0], losses[-1], float(F.cross_entropy(outputs, labels[test])), 100 * right]


def main() -> None:
    torch.set_num_threads(1)
    print(
        "| net | pool | arm | rate | first loss | last | test | accuracy |\n|---|---|---|---|---|---|---|---|"
    )
    for kind in sys.argv[1:] or KINDS:
        for pool in POOLS:
            for arm in ARMS:
                for rate in RATES:
                    runs = [trained(kind, pool, arm, rate, seed) for seed in range(SEEDS)]
                    first, last, test, right = torch.tensor(runs).mean(0).tolist()
                    shown = f"{first:.2f} | {last:.2f} | {test:.2f} | {right:.1f}"
                    print(f"| {kind} | {pool} | {arm} | {rate:g} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
