"""The space of NAS-Bench-201 and its table (Dong and Yang 2020, https://arxiv.org/abs/2001.00326).

A cell has four nodes; each of the six edges between them, from an earlier node to a later one, is
one of five operations. All 15,625 cells have been trained, so that a search takes no time.
"""

import re
from random import Random

Edges = tuple[int, ...]  # an operation for each edge, by its place in OPERATIONS

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
_INTO: dict[int, list[int]] = {
    node: [i for i, edge in enumerate(EDGES) if edge[1] == node] for node in (1, 2, 3)
}


class NASBench201Space:
    """Cells of six edges, as the tuple of their operations' numbers."""

    name = "nasbench201"

    def random(self, rng: Random) -> Edges:
        """Every edge's operation equally likely."""
        return tuple(rng.randrange(len(OPERATIONS)) for _ in EDGES)

    def mutate(self, architecture: Edges, rng: Random) -> tuple[Edges, str]:
        """Another operation for one edge: any node, any of its edges, as in the authors' code."""
        edge = rng.choice(_INTO[rng.randrange(1, 4)])
        old = architecture[edge]
        new = (old + rng.randrange(1, len(OPERATIONS))) % len(OPERATIONS)
        source, target = EDGES[edge]
        words = f"op: edge {source} to {target}, {OPERATIONS[old]} -> {OPERATIONS[new]}"
        return (*architecture[:edge], new, *architecture[edge + 1 :]), words

    def canonical(self, architecture: Edges) -> str:
        """The sum of terms that the cell computes: 4,930 different ones.

        Skips are written as what they pass on, and what is `none`, or reads nothing else, is left
        out. The authors' `to_unique_str` tells 6,466 apart, as the terms of nested sums keep their
        order in it, and zeros stay: each of its classes is within one of these. That zeros give
        zeros is exact for convolutions without a bias; the benchmark's batch norms have one, so
        that a convolution of zeros is a constant there, which this takes for nothing.
        """
        nodes = [["x"]]
        for node in (1, 2, 3):
            terms = [_terms(architecture[edge], nodes[EDGES[edge][0]]) for edge in _INTO[node]]
            nodes.append(sorted(term for edge in terms for term in edge))
        return " + ".join(nodes[-1]) or "0"

    def encode(self, architecture: Edges) -> str:
        """`|nor_conv_3x3~0|+|none~0|skip_connect~1|+|...|`, as the benchmark writes cells."""
        return "+".join(
            "|" + "".join(f"{OPERATIONS[architecture[e]]}~{EDGES[e][0]}|" for e in _INTO[node])
            for node in (1, 2, 3)
        )

    def decode(self, text: str) -> Edges:
        """Of the benchmark's text; ValueError if it is no cell."""
        found = re.findall(r"(\w+)~\d", text)
        if all(name in OPERATIONS for name in found) and len(found) == len(EDGES):
            edges = tuple(OPERATIONS.index(name) for name in found)
            if self.encode(edges) == text:
                return edges
        raise ValueError(
            f"architecture {text!r} is no cell of NAS-Bench-201: expected a text such as "
            f"{self.encode((3,) * len(EDGES))!r}"
        )


def _terms(operation: int, source: list[str]) -> list[str]:
    """What an edge adds to its node."""
    if operation == 0 or not source:
        return []
    return source if operation == 1 else [f"{OPERATIONS[operation]}({' + '.join(source)})"]
