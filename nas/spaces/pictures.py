"""Draw architectures, and name the differences between two."""

import html as escaping
from typing import NamedTuple

from gpipe_jax.genotypes import cell_drawing
from gpipe_jax.genotypes.genotype import Genotype
from gpipe_jax.utils import graph_drawing
from gpipe_jax.utils.graph_drawing import Picture
from nas.spaces import nasbench201_drawing
from nas.spaces.nasbench201 import NASBench201Space


class Architecture(NamedTuple):
    """A text of a store, read if its space is known."""

    text: str
    genotype: Genotype | None = None
    edges: tuple[int, ...] | None = None


def read(space: str, text: str) -> Architecture:
    """The architecture that a space of that name has encoded as `text`."""
    try:
        if space.partition(",")[0] == "nasnet":
            return Architecture(text, genotype=Genotype.from_json(text))
        if space == NASBench201Space.name:
            return Architecture(text, edges=NASBench201Space().decode(text))
    except ValueError:
        pass  # a space of another's, by the same name
    return Architecture(text)


def pictures(one: Architecture, before: Architecture | None = None) -> list[Picture]:
    """Its cells, marked where they differ from those before; none if it has no picture."""
    if one.genotype:
        return cell_drawing.pictures(one.genotype, before.genotype if before else None)
    if one.edges:
        return [nasbench201_drawing.picture(one.edges, "cell", before.edges if before else None)]
    return []


def differences(one: Architecture, before: Architecture) -> list[str]:
    """What is other than before, in words, one line each; none if nothing is."""
    if one.genotype and before.genotype:
        return cell_drawing.differences(one.genotype, before.genotype)
    if one.edges and before.edges:
        return nasbench201_drawing.differences(one.edges, before.edges)
    return [f"{before.text} → {one.text}"] * (one.text != before.text)


def html(one: Architecture, before: Architecture | None = None) -> str:
    """Its cells as inline SVG, or its text."""
    drawn = pictures(one, before)
    text = f'<pre style="white-space:pre-wrap">{escaping.escape(one.text)}</pre>'
    return graph_drawing.side_by_side(drawn) if drawn else text
