"""Check that a batch is a dict of arrays with one number of examples, like the pipeline's example.

A batch is {"inputs": tree, "labels": tree, "weights": [N], "extras": {name: tree}}; the last two
are optional. The first axis of every array is the examples. Nested lists of numbers are arrays too.

Letters: N examples.
"""

from collections.abc import Mapping, Sequence
from numbers import Number
from typing import Any

import jax
import numpy as np

from gpipe_jax.data import casts
from gpipe_jax.data import weights as example_weights
from gpipe_jax.errors import ArgumentError, DataError
from gpipe_jax.utils.trees import PyTree, describe, differentiable

_KEYS = "'inputs', 'labels' and, optionally, 'weights' and 'extras'"


def total_weight(batch: dict) -> float:
    """Return the sum of the weights of a batch: the number of its examples, if it has none."""
    return example_weights.total(complete(arrays(batch))["weights"])


def count_examples(inputs: PyTree) -> int:
    """Return the number of examples of a tree of arrays; raise DataError if there are none."""
    leaves = jax.tree.leaves(inputs)
    count = np.shape(leaves[0])[0] if leaves and np.ndim(leaves[0]) else 0
    if not count:
        raise DataError("`inputs` has no examples: the first axis of its arrays must not be empty")
    return count


def arrays(batch: Any, what: str = "batch") -> dict:
    """Return a batch whose leaves are arrays; raise DataError if it is not a dict of arrays.

    Lists and tuples of numbers, also nested ones, become arrays. Shapes stay as they are.
    """
    if not isinstance(batch, Mapping):
        raise DataError(
            f"a batch is a dict with the keys {_KEYS}; got a {type(batch).__name__}; of a pair "
            f"(x, y) make {{'inputs': x, 'labels': y}}"
        )

    def array(path: tuple, a: Any) -> Any:
        is_shape = isinstance(a, jax.ShapeDtypeStruct | jax.Array) and what == "example"
        return a if is_shape else casts.plain(what + jax.tree_util.keystr(path), a)

    return jax.tree.map_with_path(array, dict(batch), is_leaf=_is_list_of_numbers)


def _is_list_of_numbers(node: Any) -> bool:
    if type(node) not in (list, tuple) or not node:
        return False
    return all(isinstance(leaf, Number | np.generic) for leaf in jax.tree.leaves(list(node)))


def complete(batch: dict) -> dict:
    """Return the batch with weights (default: one) and extras; raise DataError for wrong keys."""
    missing = {"inputs", "labels"} - set(batch)
    unknown = set(batch) - {"inputs", "labels", "weights", "extras"}
    if missing or unknown:
        raise DataError(
            f"a batch has the keys {_KEYS}; "
            f"missing {sorted(missing)}, unknown {sorted(unknown)}; put what several layers read "
            f"into 'extras'"
        )
    weights = np.ones(count_examples(batch["inputs"]), np.float32)
    extras = named_extras(batch.get("extras"))
    return {**batch, "weights": batch.get("weights", weights), "extras": extras}


def differentiable_extras(names: Sequence[str], example: dict) -> tuple[str, ...]:
    """Return the sorted names of extras; raise ArgumentError unless their arrays are floats."""
    known = example["extras"]
    if isinstance(names, str) or not all(name in known for name in names):
        raise ArgumentError(
            "extras",
            f"`extras` must be a list of names of the example's extras, got {names!r}; they are "
            f"{', '.join(map(repr, known)) or 'none'}",
        )
    for name in names:
        if not all(differentiable(a) for a in jax.tree.leaves(known[name])):
            raise ArgumentError(
                "extras",
                f"`extras` has {name!r}, {describe(known[name])}; only arrays of floating-point "
                f"numbers have gradients, so leave it out",
            )
    return tuple(sorted(set(names)))


def named_extras(extras: Any) -> dict[str, PyTree]:
    """Return the extras of a batch by name; raise DataError unless they are a dict."""
    if extras is not None and not isinstance(extras, Mapping):
        raise DataError(
            f"batch['extras'] must be a dict from names to arrays, got a {type(extras).__name__}; "
            f"write {{'mask': mask}}, and `.read('mask')` behind the layers that read it"
        )
    return dict(extras or {})


def check_like(batch: dict, example: dict) -> None:
    """Raise DataError unless `batch` looks like `example`, with at most as many examples."""
    check_structure(batch, example)
    for name, tree in batch.items():
        for (path, a), spec in zip(
            jax.tree.leaves_with_path(tree), jax.tree.leaves(example[name]), strict=True
        ):
            fits = a.shape[1:] == spec.shape[1:] and 0 < a.shape[0] <= spec.shape[0]
            if not fits:
                raise DataError(
                    f"{place(name, path)} has shape {list(a.shape)}, the pipeline's example had "
                    f"{list(spec.shape)}; only the number of examples may differ, and it may only "
                    f"be smaller"
                )


def check_structure(batch: dict, example: dict) -> None:
    """Raise DataError unless `batch` has the trees of `example`, with equal numbers of rows."""
    check_counts(batch)
    _check_extras(batch["extras"], example["extras"])
    for name, tree in batch.items():
        if jax.tree.structure(tree) != jax.tree.structure(example[name]):
            raise DataError(
                f"batch[{name!r}] has structure {jax.tree.structure(tree)}, the pipeline's example "
                f"had {jax.tree.structure(example[name])}"
            )


def _check_extras(extras: dict, example: dict) -> None:
    """Raise DataError unless a batch has the extras of the example, by their names."""
    missing, unknown = (
        sorted(map(str, a.keys() - b.keys())) for a, b in ((example, extras), (extras, example))
    )
    if missing or unknown:
        raise DataError(
            f"`extras` must have the names of the pipeline's example, {sorted(example)}; missing "
            f"{missing}, unknown {unknown}; give them in batch['extras'], or as "
            f"predict(state, inputs, extras)"
        )


def check_counts(batch: dict) -> None:
    """Raise DataError unless all arrays of a batch have the same number of examples."""
    counts = {np.shape(a)[:1] for a in jax.tree.leaves(batch)}
    if len(counts) > 1:
        listed = ", ".join(sorted(str(c[0]) if c else "none" for c in counts))
        raise DataError(
            f"the arrays of a batch differ in the number of examples: {listed} examples; the first "
            f"axis of each must be the examples"
        )


def check_weightless(batch: dict, weights: np.ndarray) -> None:
    """Raise DataError if inputs of weight zero, which batch norm counts, are not finite."""
    counting = {name: batch[name] for name in ("inputs", "extras")}
    for (name, *path), a in jax.tree.leaves_with_path(counting):
        for row in np.flatnonzero(weights == 0):
            if not np.isfinite(a[row]).all():
                raise DataError(
                    f"{place(name.key, tuple(path))}[{row}] has weight 0, and numbers that are "
                    f"not finite; in training, batch norm counts every example, whatever its "
                    f"weight; replace these numbers"
                )


def place(name: str, path: tuple) -> str:
    """Name an array of a batch in a message."""
    return f"batch[{name!r}]{jax.tree_util.keystr(path)}"
