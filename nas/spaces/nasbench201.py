"""Define the space of NAS-Bench-201 (Dong and Yang 2020, https://arxiv.org/abs/2001.00326).

A cell has four nodes and six edges, one from each earlier node to each later one. Each edge is one
of five operations. All 15,625 cells have been trained, so that a search needs no training.

    0 (input) --> 1, 2, 3        1 --> 2, 3        2 --> 3 (output)
"""

import re
from random import Random

from gpipe_jax.utils.graph_drawing import Picture
from nas.spaces import nasbench201_drawing
from nas.spaces.nasbench201_drawing import CellEdge

Edges = tuple[int, ...]  # for each edge the index of its operation in OPERATIONS

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # (source, target)
_EDGES_INTO: dict[int, list[int]] = {
    node: [i for i, edge in enumerate(EDGES) if edge[1] == node] for node in (1, 2, 3)
}


class NASBench201Space:
    """Search cells of six edges; an architecture is the tuple of the edges' operation indices.

    Example::

        evaluator = nas.TabularEvaluator(nas.NASBench201Table("cifar10"))
        nas.search(space=nas.NASBench201Space(), evaluate=evaluator)
    """

    name = "nasbench201"

    def random(self, rng: Random) -> Edges:
        """Draw each edge's operation uniformly."""
        return tuple(rng.randrange(len(OPERATIONS)) for _ in EDGES)

    def mutate(self, architecture: Edges, rng: Random) -> tuple[Edges, str]:
        """Replace one edge's operation by another one.

        As in the authors' code, first a node is drawn, then one of the edges into it.
        """
        edge = rng.choice(_EDGES_INTO[rng.randrange(1, 4)])
        old = architecture[edge]
        new = (old + rng.randrange(1, len(OPERATIONS))) % len(OPERATIONS)
        source, target = EDGES[edge]
        words = f"op: edge {source} to {target}, {OPERATIONS[old]} -> {OPERATIONS[new]}"
        return (*architecture[:edge], new, *architecture[edge + 1 :]), words

    def canonical(self, architecture: Edges) -> str:
        """Return the sum of terms that the cell computes; there are 4,930 different sums.

        A skip is replaced by what it passes on. Edges that are `none`, and edges that read nothing
        else, are left out. The authors' `to_unique_str` distinguishes 6,466 cells, because it keeps
        the order of terms in nested sums and the zeros. Each of its classes lies within one of
        these.

        That zeros give zeros is exact for convolutions without a bias. The benchmark's batch norms
        have one, so that there a convolution of zeros is a constant; this method ignores it.
        """
        nodes = [["x"]]
        for node in (1, 2, 3):
            edges = _EDGES_INTO[node]
            terms = [_terms(architecture[edge], nodes[EDGES[edge][0]]) for edge in edges]
            nodes.append(sorted(term for edge in terms for term in edge))
        return " + ".join(nodes[-1]) or "0"

    def encode(self, architecture: Edges) -> str:
        """Return the benchmark's text: `|nor_conv_3x3~0|+|none~0|skip_connect~1|+|...|`."""
        return "+".join(
            "|" + "".join(f"{OPERATIONS[architecture[e]]}~{EDGES[e][0]}|" for e in edges)
            for edges in _EDGES_INTO.values()
        )

    def decode(self, text: str) -> Edges:
        """Return the cell of the benchmark's text.

        Raises:
            ValueError: It is not a cell.
        """
        names = re.findall(r"(\w+)~\d", text)
        if all(name in OPERATIONS for name in names) and len(names) == len(EDGES):
            edges = tuple(OPERATIONS.index(name) for name in names)
            if self.encode(edges) == text:
                return edges
        raise ValueError(
            f"architecture {text!r} is not a cell of NAS-Bench-201: expected a text such as "
            f"{self.encode((3,) * len(EDGES))!r}"
        )

    def pictures(self, architecture: Edges, before: Edges | None = None) -> list[Picture]:
        """Draw the cell, with marks on edges that differ from the cell `before`."""
        old = None if before is None else _cell_edges(before)
        return [nasbench201_drawing.picture(_cell_edges(architecture), "cell", old)]

    def differences(self, architecture: Edges, before: Edges) -> list[str]:
        """Describe each edge that differs from the cell `before`."""
        return nasbench201_drawing.differences(_cell_edges(architecture), _cell_edges(before))


def _cell_edges(architecture: Edges) -> list[CellEdge]:
    return [
        CellEdge(source, target, OPERATIONS[operation])
        for (source, target), operation in zip(EDGES, architecture, strict=True)
    ]


def _terms(operation: int, source: list[str]) -> list[str]:
    """Return the terms that an edge adds to its node."""
    if operation == 0 or not source:
        return []
    return source if operation == 1 else [f"{OPERATIONS[operation]}({' + '.join(source)})"]
