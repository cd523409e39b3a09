"""Divide batches into micro-batches.

An example of weight 0 takes the values of the first one of positive weight before it goes to the
devices. So it cannot make a gradient NaN, whatever it holds: 0 times infinity would.

Letters: N examples, M micro-batches, D replicas, B examples of a micro-batch on one replica.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.data import casts
from gpipe_jax.data import weights as example_weights
from gpipe_jax.distributed.mesh import MeshLike, batch_sharding
from gpipe_jax.errors import ArgumentError, DataError
from gpipe_jax.losses.weighting import counting_rows
from gpipe_jax.pipeline.batches import checks
from gpipe_jax.utils.text import batch_problem
from gpipe_jax.utils.trees import PyTree


def shapes_of(example: dict, replicas: int, micro_batches: int) -> dict:
    """Return the shapes of a full batch, weights included, in the types that JAX makes of them.

    Raises ValueError unless it divides evenly between replicas and micro-batches.
    """
    example = checks.complete(checks.arrays(example, "example"))
    count = checks.count_examples(example["inputs"])
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
    return resize(examples, checks.count_examples(examples) // replicas)


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
    batch = checks.arrays(batch)
    keys, batch = sorted(batch), checks.complete(batch)
    count, full = checks.count_examples(batch["inputs"]), example["weights"].shape[0]
    if own_examples is not None:
        if count != own_examples or "weights" in keys:
            raise DataError(
                f"this process works on {own_examples} of the {full} examples of a batch, got "
                f"{count} with keys {keys}; give all of `Pipeline.rows`, without weights"
            )
        example = resize(example, own_examples)
    checks.check_like(batch, example)
    spec = example["weights"]
    weights = example_weights.scaled(batch["weights"], spec.shape[0]).astype(spec.dtype)
    rows = counting_rows(weights)
    input_rows = rows
    if all_rows_count:
        checks.check_weightless(batch, weights[:count])
        input_rows = np.arange(len(rows)) % count
    weights = weights.reshape(micro_batches, -1)
    if own_examples is not None:
        weights *= count / full
    return {
        "inputs": _divide(batch, "inputs", example, micro_batches, input_rows),
        "extras": _divide(batch, "extras", example, micro_batches, input_rows),
        "labels": _divide(batch, "labels", example, micro_batches, rows),
        "weights": weights,
    }


def split_inputs(batch: dict, example: dict, micro_batches: int) -> dict:
    """Divide a batch without labels into arrays [M, N/M, ...], padded with its first example.

    Axes other than the first may differ from the example's.
    """
    checks.check_structure(batch, example)
    count, full = checks.count_examples(batch["inputs"]), example["weights"].shape[0]
    rows = np.where(np.arange(full) < count, np.arange(full), 0)
    return {name: _divide(batch, name, example, micro_batches, rows) for name in batch}


def join(micro_batched: PyTree, examples: int) -> PyTree:
    """Return gradients [M, N/M, ...] of micro-batches as those of a batch's examples, traced.

    Rows of padding repeat the examples in their order, so their gradients are added.
    """

    def join_array(a: jax.Array) -> jax.Array:
        rows = a.reshape(-1, *a.shape[2:])
        missing = -len(rows) % examples
        rows = jnp.concatenate([rows, jnp.zeros((missing, *rows.shape[1:]), rows.dtype)])
        return rows.reshape(-1, examples, *rows.shape[1:]).sum(0)

    return jax.tree.map(join_array, micro_batched)


def parts(batch: dict, examples: int) -> list[dict]:
    """Divide a batch into batches of at most that many examples, in their order."""
    checks.check_counts(batch)
    count = checks.count_examples(batch["inputs"])
    if count <= examples:
        return [batch]
    starts = range(0, count, examples)
    return [jax.tree.map(lambda a, i=i: a[i : i + examples], batch) for i in starts]


def _divide(batch: dict, name: str, example: dict, micro_batches: int, rows: np.ndarray) -> PyTree:
    """Return these rows of one entry of a batch, as arrays [M, N/M, ...] of its types."""

    def divide(path: tuple, a: np.ndarray, spec: jax.ShapeDtypeStruct) -> np.ndarray:
        a = casts.cast(checks.place(name, path), a, spec.dtype)
        a = a if np.array_equal(rows, np.arange(len(a))) else a[rows]
        return a.reshape(micro_batches, -1, *a.shape[1:])

    return jax.tree.map_with_path(divide, batch[name], example[name])
