"""What a method decides on: one traced forward pass of a model, its norm layers, and what its layers put out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from nfnets.convert.alpha import branch_scales
from nfnets.convert.limits import largest, lifted
from nfnets.convert.plan import Change
from nfnets.convert.reference import FACTOR, Reference, head_sizes
from nfnets.scale.target import Target
from nfnets.structure.readers import fed_through_sums, hidden, read_by_norms
from nfnets.structure.sites import Site
from nfnets.trace import Graph, Node


@dataclass
class Net:
    """A traced model, as a method sees it; nothing here changes the model.

    Args:
        model: the model that is converted.
        graph: one forward pass of it.
        sites: the norm layers to replace, in execution order.
        sizes: root mean squares of what its layers put out, norm layers by the batch. See `Method.compares`.
        samples: how many the example inputs have.
        meta: whether there are no values, only shapes.
    """

    model: nn.Module
    graph: Graph
    sites: list[Site]
    sizes: Reference = field(default_factory=Reference)
    samples: int = 1
    meta: bool = False

    def alphas(self, alpha: float | None = None) -> Mapping[int, float]:
        """The factor that the last layers of each branch get, by node; see `branch_scales`."""
        return branch_scales(self.model, self.graph, alpha)

    def lifted(self, alphas: Mapping[int, float]) -> Mapping[int, float]:
        """`alphas`, and the factors at which streams start that no norm layer starts."""
        return lifted(self.graph, self.sites, self.sizes, alphas)

    def alpha_of(self, site: Site, alphas: Mapping[int, float]) -> float:
        """The factor of a norm layer, 1 where it ends no branch."""
        return next((alphas[call] for call in site.calls if call in alphas), 1.0)

    def limits(self, alphas: Mapping[int, float] | None = None) -> Mapping[str, float]:
        """Largest root mean squares, by path, of what stands in norm layers' places and of what feeds them."""
        return largest(self.graph, self.sites, self.sizes, alphas)

    def summed(self) -> Iterator[Node]:
        """Layers that norm layers read through sums, concatenations, pools and activations, and none alone."""
        return fed_through_sums(self.graph, self.sites)

    @cached_property
    def read(self) -> list[str]:
        """Paths of all layers that norm layers read, alone or not, and whose weights can be scaled."""
        return read_by_norms(self.graph, self.sites)

    def held(self) -> Iterator[Change]:
        """Layers that stay, and what is kept of them: heads keep their size within a factor 2, and a gate's hidden
        layer changes its sign if no example activates it."""
        for path in hidden(self.graph):
            yield Change(path, action="wake", why="dead for every example without its norm layers")
        for path, rms in head_sizes(self.graph, self.sizes).items():
            target = Target(rms, "mean square", unless=(1 / FACTOR, FACTOR), search=True)
            yield Change(path, action="scale", target=target, why="a head keeps its scale")
