"""Check batches, and divide them into micro-batches.

A batch is {"inputs": tree, "labels": tree, "weights": [N], optional}; the first axis of every array
is the examples. Nested lists of numbers count as arrays.

An example of weight 0 takes the values of the first one of positive weight before it goes to the
devices. So it cannot make a gradient NaN, whatever it holds: 0 times infinity would.

Letters: N examples, M micro-batches, D replicas, B examples of a micro-batch on one replica.
"""

from collections.abc import Mapping
from numbers import Number
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.data import casts
from gpipe_jax.data import weights as example_weights
from gpipe_jax.distributed.mesh import MeshLike, batch_sharding
from gpipe_jax.errors import ArgumentError, DataError
from gpipe_jax.losses.weighting import counting_rows
from gpipe_jax.utils.text import batch_problem
from gpipe_jax.utils.trees import PyTree


def shapes_of(example: dict, replicas: int, micro_batches: int) -> dict:
    """Return the shapes of a full batch, weights included, in the types that JAX makes of them.

    Raises ValueError unless it divides evenly between replicas and micro-batches.
    """
    example = with_weights(arrays(example, "example"))
    count = count_examples(example["inputs"])
    for path, a in jax.tree.leaves_with_path(example):
        where = f"example{jax.tree_util.keystr(path)}"
        if not a.shape or a.shape[0] != count:
            raise ArgumentError(
                "example",
                f"{where} has shape {list(a.shape)}, but the batch has {count} examples; the first "
                f"axis must be the examples",
            )
        if not (jnp.issubdtype(a.dtype, jnp.number) or a.dtype == bool):
            raise ArgumentError(
                "example", f"{where} has type {a.dtype}; use an array of numbers or bools"
            )
    weights = example["weights"]
    example_weights.check_type("example['weights']", weights.shape, weights.dtype)
    problem = batch_problem(count, replicas=replicas, micro_batches=micro_batches)
    if problem:
        raise ValueError(f"the example does not split into equal micro-batches: {problem}")

    def shape(a: Any) -> jax.ShapeDtypeStruct:
        native = np.dtype(a.dtype).newbyteorder("=")
        return jax.ShapeDtypeStruct(a.shape, jax.dtypes.canonicalize_dtype(native))

    dtype = jax.dtypes.canonicalize_dtype(jnp.float64)
    return {**jax.tree.map(shape, example), "weights": jax.ShapeDtypeStruct((count,), dtype)}


def resize(example: PyTree, examples: int) -> PyTree:
    """Return the shapes of a batch like `example` with another number of examples."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((examples, *a.shape[1:]), a.dtype), example)


def of_replica(micro_batched: PyTree, replicas: int) -> PyTree:
    """Return the shapes of one micro-batch on one replica, of arrays [M, D*B, ...]."""
    examples = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), micro_batched)
    return resize(examples, count_examples(examples) // replicas)


def abstract(example: dict, micro_batches: int, mesh: MeshLike) -> dict:
    """Return the shapes and shardings of what `split` makes of a full batch."""

    def divide(a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (micro_batches, a.shape[0] // micro_batches, *a.shape[1:])
        return jax.ShapeDtypeStruct(shape, a.dtype, sharding=batch_sharding(mesh))

    return jax.tree.map(divide, example)


def split(
    batch: dict,
    example: dict,
    micro_batches: int,
    *,
    own_examples: int | None = None,
    all_rows_count: bool = False,
) -> dict:
    """Divide a batch into arrays [M, N/M, ...] with weights that sum to one.

    A shorter batch is padded to the example's N with examples of weight zero. Every example of
    weight zero takes the values of the first one of positive weight.

    Args:
        batch: The batch, in numpy.
        example: The shapes of a full batch.
        micro_batches: M.
        own_examples: The number of examples of this process, if the batch is only its part of the
            full batch; None if the batch is the full one.
        all_rows_count: Whether this is training of a network with batch norm, which counts every
            row of the inputs, whatever its weight. Then rows keep their inputs, and the padding
            repeats the inputs of the batch in their order. Default: False.

    Raises:
        DataError: The batch does not look like the example.
    """
    batch = arrays(batch)
    keys, batch = sorted(batch), with_weights(batch)
    count, full = count_examples(batch["inputs"]), example["weights"].shape[0]
    if own_examples is not None:
        if count != own_examples or "weights" in keys:
            raise DataError(
                f"this process works on {own_examples} of the {full} examples of a batch, got "
                f"{count} with keys {keys}; give all of `Pipeline.rows`, without weights"
            )
        example = resize(example, own_examples)
    _check(batch, example)
    spec = example["weights"]
    weights = example_weights.scaled(batch["weights"], spec.shape[0]).astype(spec.dtype)
    rows = counting_rows(weights)
    input_rows = rows
    if all_rows_count:
        _check_weightless(batch["inputs"], weights[:count])
        input_rows = np.arange(len(rows)) % count
    weights = weights.reshape(micro_batches, -1)
    if own_examples is not None:
        weights *= count / full
    return {
        "inputs": _divide(batch, "inputs", example, micro_batches, input_rows),
        "labels": _divide(batch, "labels", example, micro_batches, rows),
        "weights": weights,
    }


def split_inputs(batch: dict, example: dict, micro_batches: int) -> dict:
    """Divide a batch without labels into arrays [M, N/M, ...], padded with its first example.

    Axes other than the first may differ from the example's.
    """
    check_structure(batch, example)
    count, full = count_examples(batch["inputs"]), example["weights"].shape[0]
    rows = np.where(np.arange(full) < count, np.arange(full), 0)
    return {name: _divide(batch, name, example, micro_batches, rows) for name in batch}


def parts(batch: dict, examples: int) -> list[dict]:
    """Divide a batch into batches of at most that many examples, in their order."""
    _check_counts(batch)
    count = count_examples(batch["inputs"])
    if count <= examples:
        return [batch]
    starts = range(0, count, examples)
    return [jax.tree.map(lambda a, i=i: a[i : i + examples], batch) for i in starts]


def _divide(batch: dict, name: str, example: dict, micro_batches: int, rows: np.ndarray) -> PyTree:
    """Return these rows of one entry of a batch, as arrays [M, N/M, ...] of its types."""

    def divide(path: tuple, a: np.ndarray, spec: jax.ShapeDtypeStruct) -> np.ndarray:
        a = casts.cast(_place(name, path), a, spec.dtype)
        a = a if np.array_equal(rows, np.arange(len(a))) else a[rows]
        return a.reshape(micro_batches, -1, *a.shape[1:])

    return jax.tree.map_with_path(divide, batch[name], example[name])


# --- checks ---------------------------------------------------------------------------------------


def total_weight(batch: dict) -> float:
    """Return the sum of the weights of a batch: the number of its examples, if it has none."""
    return example_weights.total(with_weights(arrays(batch))["weights"])


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
            f"a batch is a dict with the keys 'inputs', 'labels' and, optionally, 'weights'; got "
            f"a {type(batch).__name__}; of a pair (x, y) make {{'inputs': x, 'labels': y}}"
        )

    def array(path: tuple, a: Any) -> Any:
        is_shape = isinstance(a, jax.ShapeDtypeStruct | jax.Array) and what == "example"
        return a if is_shape else casts.plain(what + jax.tree_util.keystr(path), a)

    return jax.tree.map_with_path(array, dict(batch), is_leaf=_is_list_of_numbers)


def _is_list_of_numbers(node: Any) -> bool:
    if type(node) not in (list, tuple) or not node:
        return False
    return all(isinstance(leaf, Number | np.generic) for leaf in jax.tree.leaves(list(node)))


def with_weights(batch: dict) -> dict:
    """Return the batch with weights, of one by default; raise DataError for wrong keys."""
    missing = {"inputs", "labels"} - set(batch)
    extra = set(batch) - {"inputs", "labels", "weights"}
    if missing or extra:
        raise DataError(
            f"a batch has the keys 'inputs', 'labels' and, optionally, 'weights'; "
            f"missing {sorted(missing)}, unknown {sorted(extra)}"
        )
    weights = np.ones(count_examples(batch["inputs"]), np.float32)
    return {**batch, "weights": batch.get("weights", weights)}


def _check(batch: dict, example: dict) -> None:
    """Raise DataError unless `batch` looks like `example`, with at most as many examples."""
    check_structure(batch, example)
    for name, tree in batch.items():
        for (path, a), spec in zip(
            jax.tree.leaves_with_path(tree), jax.tree.leaves(example[name]), strict=True
        ):
            fits = a.shape[1:] == spec.shape[1:] and 0 < a.shape[0] <= spec.shape[0]
            if not fits:
                raise DataError(
                    f"{_place(name, path)} has shape {list(a.shape)}, the pipeline's example had "
                    f"{list(spec.shape)}; only the number of examples may differ, and it may only "
                    f"be smaller"
                )


def check_structure(batch: dict, example: dict) -> None:
    """Raise DataError unless `batch` has the trees of `example`, with equal numbers of rows."""
    _check_counts(batch)
    for name, tree in batch.items():
        if jax.tree.structure(tree) != jax.tree.structure(example[name]):
            raise DataError(
                f"batch[{name!r}] has structure {jax.tree.structure(tree)}, the pipeline's example "
                f"had {jax.tree.structure(example[name])}"
            )


def _check_counts(batch: dict) -> None:
    counts = {np.shape(a)[:1] for a in jax.tree.leaves(batch)}
    if len(counts) > 1:
        listed = ", ".join(sorted(str(c[0]) if c else "none" for c in counts))
        raise DataError(
            f"the arrays of a batch differ in the number of examples: {listed} examples; the first "
            f"axis of each must be the examples"
        )


def _check_weightless(inputs: PyTree, weights: np.ndarray) -> None:
    """Raise DataError if inputs of weight zero, which batch norm counts, are not finite."""
    for path, a in jax.tree.leaves_with_path(inputs):
        for row in np.flatnonzero(weights == 0):
            if not np.isfinite(a[row]).all():
                raise DataError(
                    f"{_place('inputs', path)}[{row}] has weight 0, and numbers that are not "
                    f"finite; in training, batch norm counts every example, whatever its weight; "
                    f"replace these numbers"
                )


def _place(name: str, path: tuple) -> str:
    return f"batch[{name!r}]{jax.tree_util.keystr(path)}"
