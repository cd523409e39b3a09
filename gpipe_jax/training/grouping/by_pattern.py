"""Choose an optimizer for each parameter by patterns on its names; see `leaf_names`."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import optax

from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers import leaf_names
from gpipe_jax.layers.shape_inference import LayerShape
from gpipe_jax.training.elementwise import check_transformation
from gpipe_jax.utils.trees import PyTree, by_name, path_name

if TYPE_CHECKING:
    from gpipe_jax.pipeline.pipeline import Pipeline

Patterns = Sequence[str]


def grouped(
    pipe: "Pipeline",
    default: optax.GradientTransformation,
    groups: Mapping[Any, optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """Update groups of parameters by transformations of their own.

    The result does not depend on the mesh or the schedule. Each transformation sees its own
    parameters only: a global norm is that of the group. To clip by the norm of all gradients, put
    `optax.clip_by_global_norm` before this one, in `optax.chain`.

    Args:
        pipe: The pipeline that is trained; it names the parameters.
        default: The transformation of parameters that no pattern matches.
        groups: A transformation for each pattern, or tuple of patterns: "9" is layer 9, "Dense"
            every Dense layer, "*.bias" every bias. The first one that matches a parameter counts. A
            tied parameter has the names that it has in all its layers.

    Returns:
        An optax transformation for this pipeline.

    Raises:
        ArgumentError: A pattern matches no parameter that is trained, or a value is no optax
            transformation.

    Example::

        tx = gpipe.optimizers.grouped(
            pipe, optax.adamw(1e-3), {"*.bias": optax.sgd(1e-2), ("0", "1"): optax.adamw(1e-4)}
        )
        trainer = gpipe.Trainer(pipe, optax.chain(optax.clip_by_global_norm(1.0), tx))
    """
    check_transformation("default", default)
    if not isinstance(groups, Mapping):
        raise ArgumentError(
            "groups",
            f"`groups` must be a dict of transformations by pattern, got {type(groups).__name__}; "
            f'give, for example, {{"*.bias": optax.sgd(1e-2)}}',
        )
    for key, tx in groups.items():
        check_transformation(f"groups[{key!r}]", tx)
    patterns = [(key,) if isinstance(key, str) else key for key in groups]
    return partition(labels(pipe.shapes, patterns), [default, *groups.values()])


def partition(
    labels: PyTree, transformations: Sequence[optax.GradientTransformation]
) -> optax.GradientTransformationExtraArgs:
    """Apply to each parameter the transformation that its label numbers."""
    by_label: dict[Hashable, Any] = dict(enumerate(transformations))
    return optax.partition(by_label, labels, mask_compatible_extra_args=True)


def labels(shapes: Sequence[LayerShape], groups: Sequence[Patterns]) -> list[PyTree]:
    """Number the group of each parameter that is trained: from 1, and 0 for those in none.

    Args:
        shapes: The shapes of each layer; those of frozen parameters are None.
        groups: The patterns of each group. The first one that matches a parameter counts.

    Returns:
        One tree for each layer, of the structure of its trained parameters.

    Raises:
        ArgumentError: A pattern matches no parameter that is trained.
    """
    names = _names(shapes)
    known = [names_of for own in names for names_of in own.values()]
    for patterns in groups:
        leaf_names.check_used("groups", patterns, known)

    def label(i: int, path: Any) -> int:
        own = names[i][path_name(path)]
        found = (n for n, of in enumerate(groups, 1) if leaf_names.matches(of, own))
        return next(found, 0)

    return [
        jax.tree.map_with_path(lambda path, _, i=i: label(i, path), shape.params)
        for i, shape in enumerate(shapes)
    ]


def check_decay(
    labels: Sequence[PyTree], decaying: Sequence[PyTree], group: int, setting: str
) -> None:
    """Raise ArgumentError if a group has a decay, and nothing in it decays."""
    pairs = zip(jax.tree.leaves(list(labels)), jax.tree.leaves(list(decaying)), strict=True)
    if not any(label == group and decays for label, decays in pairs):
        raise ArgumentError(
            "groups",
            f"`groups` gives group {group} a {setting}, but all its parameters are norms and "
            f"biases, which do not decay; remove it, or match other parameters",
        )


def _names(shapes: Sequence[LayerShape]) -> list[dict[str, tuple[str, ...]]]:
    """Return the names of each trained parameter, by its path in its layer."""
    layers = [shape.layer for shape in shapes]

    def of(i: int, path: str) -> Iterator[str]:
        yield from leaf_names.names(i, layers[i], path)
        for tied, name in layers[i].ties:
            if f"{path}.".startswith(f"{tied}."):
                rest = path.removeprefix(tied)
                for j in range(i + 1, len(layers)):
                    for other, other_name in layers[j].ties:
                        if other_name == name:
                            yield from leaf_names.names(j, layers[j], other + rest)

    return [
        {path: tuple(of(i, path)) for path in by_name(shape.params)}
        for i, shape in enumerate(shapes)
    ]
