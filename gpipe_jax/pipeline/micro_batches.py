"""Check batches, and divide them into micro-batches.

A batch is {"inputs": tree, "labels": tree, "weights": [N], optional}; the first axis of every array
is the examples.

Letters: N examples, M micro-batches, D replicas, B examples of a micro-batch on one replica.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.distributed.mesh import MeshLike, batch_sharding
from gpipe_jax.errors import DataError
from gpipe_jax.utils.text import batch_problem
from gpipe_jax.utils.trees import PyTree


def shapes_of(example: dict, replicas: int, micro_batches: int) -> dict:
    """Return the shapes of a full batch, weights included.

    Raises ValueError unless it divides evenly between replicas and micro-batches.
    """
    example = _with_weights(example)
    count = example["weights"].shape[0]
    for path, a in jax.tree.leaves_with_path(example):
        if not a.shape or a.shape[0] != count:
            raise ValueError(
                f"example{jax.tree_util.keystr(path)} has shape {list(a.shape)}, but the batch has "
                f"{count} examples; the first axis must be the examples"
            )
    problem = batch_problem(count, replicas=replicas, micro_batches=micro_batches)
    if problem:
        raise ValueError(f"the example does not split into equal micro-batches: {problem}")
    canonical = jax.dtypes.canonicalize_dtype

    def shape(a: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, canonical(a.dtype))

    weights = jax.ShapeDtypeStruct((count,), canonical(jnp.float64))
    return {**jax.tree.map(shape, example), "weights": weights}


def resize(example: PyTree, examples: int) -> PyTree:
    """Return the shapes of a batch like `example` with another number of examples."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((examples, *a.shape[1:]), a.dtype), example)


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
    may_pad: bool = True,
) -> dict:
    """Divide a batch into arrays [M, N/M, ...] with weights that sum to one.

    A shorter batch is padded to the example's N with copies of its first example, of weight zero.

    Args:
        batch: The batch, in numpy.
        example: The shapes of a full batch.
        micro_batches: M.
        own_examples: The number of examples of this process, if the batch is only its part of the
            full batch; None if the batch is the full one.
        may_pad: Whether padding is allowed; not in training where batch norm would count it.

    Raises:
        DataError: The batch does not look like the example, or may not be padded.
    """
    keys, batch = sorted(batch), _with_weights(batch)
    count, full = count_examples(batch["inputs"]), example["weights"].shape[0]
    if own_examples is not None:
        if count != own_examples or "weights" in keys:
            raise DataError(
                f"this process works on {own_examples} of the {full} examples of a batch, got "
                f"{count} with keys {keys}; give all of `Pipeline.rows`, without weights"
            )
        example = resize(example, own_examples)
    elif count < full and not may_pad:
        raise DataError(
            f"a batch of {count} examples cannot be padded to {full} in training: batch norm would "
            f"count the padding; give full batches"
        )
    _check(batch, example)
    arrays = {
        name: split_inputs(batch[name], example, micro_batches, name)
        for name in ("inputs", "labels")
    }
    weights = _padded_weights(batch["weights"], example["weights"]).reshape(micro_batches, -1)
    if own_examples is not None:
        weights *= count / full
    return {**arrays, "weights": weights}


def split_inputs(tree: PyTree, example: dict, micro_batches: int, name: str = "inputs") -> PyTree:
    """Divide one entry of a batch into arrays [M, N/M, ...], padded with its first example."""
    _check({name: tree}, example)

    def divide(a: Any, spec: jax.ShapeDtypeStruct) -> np.ndarray:
        a = np.asarray(a).astype(spec.dtype)
        a = np.concatenate([a, np.repeat(a[:1], spec.shape[0] - a.shape[0], axis=0)])
        return a.reshape(micro_batches, -1, *a.shape[1:])

    return jax.tree.map(divide, tree, example[name])


def _padded_weights(weights: Any, spec: jax.ShapeDtypeStruct) -> np.ndarray:
    """Return the weights of a batch, scaled to a sum of one and padded with zeros."""
    weights = np.asarray(weights, np.float64)
    if not weights.sum() > 0:
        raise DataError(f"the weights of a batch must sum to more than 0, got {weights.sum()}")
    padding = np.zeros(spec.shape[0] - len(weights))
    return np.concatenate([weights / weights.sum(), padding]).astype(spec.dtype)


def count_examples(inputs: PyTree) -> int:
    """Return the number of examples of a tree of arrays; raise DataError if there are none."""
    leaves = jax.tree.leaves(inputs)
    count = np.shape(leaves[0])[0] if leaves and np.ndim(leaves[0]) else 0
    if not count:
        raise DataError("`inputs` has no examples: the first axis of its arrays must not be empty")
    return count


def _with_weights(batch: dict) -> dict:
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
    counts = {np.shape(a)[:1] for a in jax.tree.leaves(batch)}
    if len(counts) > 1:
        listed = ", ".join(sorted(str(c[0]) if c else "none" for c in counts))
        raise DataError(
            f"the arrays of a batch differ in the number of examples: {listed} examples; the first "
            f"axis of each must be the examples"
        )
    for name, tree in batch.items():
        if jax.tree.structure(tree) != jax.tree.structure(example[name]):
            raise DataError(
                f"batch[{name!r}] has structure {jax.tree.structure(tree)}, the pipeline's example "
                f"had {jax.tree.structure(example[name])}"
            )
        for (path, a), spec in zip(
            jax.tree.leaves_with_path(tree), jax.tree.leaves(example[name]), strict=True
        ):
            fits = a.shape[1:] == spec.shape[1:] and 0 < a.shape[0] <= spec.shape[0]
            if not fits:
                raise DataError(
                    f"batch[{name!r}]{jax.tree_util.keystr(path)} has shape {list(a.shape)}, the "
                    f"pipeline's example had {list(spec.shape)}; only the number of examples may "
                    f"differ, and it may only be smaller"
                )
            if not np.can_cast(a.dtype, spec.dtype, "same_kind"):
                raise DataError(
                    f"batch[{name!r}]{jax.tree_util.keystr(path)} has type {a.dtype}, the "
                    f"pipeline's example had {spec.dtype}; convert it first"
                )
