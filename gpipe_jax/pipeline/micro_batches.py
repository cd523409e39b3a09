"""Batches: what they must look like, and how they become micro-batches.

A batch is {"inputs": tree, "labels": tree, "weights": [N], optional}; the first axis of every array
is the examples. Letters: N examples, M micro-batches, D replicas.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpipe_jax.errors import DataError
from gpipe_jax.utils.text import batch_problem
from gpipe_jax.utils.trees import PyTree


def shapes_of(example: dict, data: int, micro_batches: int) -> dict:
    """The shapes of a full batch, which must split evenly over replicas and micro-batches."""
    example = _with_weights(example)
    count = example["weights"].shape[0]
    for path, a in jax.tree.leaves_with_path(example):
        if not a.shape or a.shape[0] != count:
            raise ValueError(
                f"example{jax.tree_util.keystr(path)} has shape {list(a.shape)}, but the batch has "
                f"{count} examples; the first axis must be the examples"
            )
    problem = batch_problem(count, replicas=data, micro_batches=micro_batches)
    if problem:
        raise ValueError(f"the example does not split into equal micro-batches: {problem}")
    canonical = jax.dtypes.canonicalize_dtype
    weights = jax.ShapeDtypeStruct((count,), canonical(jnp.float64))
    shape = lambda a: jax.ShapeDtypeStruct(a.shape, canonical(a.dtype))  # noqa: E731
    return {**jax.tree.map(shape, example), "weights": weights}


def split(batch: dict, example: dict, micro_batches: int) -> dict:
    """Arrays [M, N/M, ...], padded to the example's N, with weights that sum to one.

    The padding is copies of the first example, with weight zero. Raises DataError.
    """
    batch = _with_weights(batch)
    _check(batch, example)
    weights = np.asarray(batch["weights"], np.float64)
    if not weights.sum() > 0:
        raise DataError(f"the weights of a batch must sum to more than 0, got {weights.sum()}")
    missing = example["weights"].shape[0] - len(weights)
    padded = np.concatenate([weights / weights.sum(), np.zeros(missing)])
    parts = {
        name: split_inputs(batch[name], example, micro_batches, name)
        for name in ("inputs", "labels")
    }
    weights = padded.astype(example["weights"].dtype).reshape(micro_batches, -1)
    return {**parts, "weights": weights}


def split_inputs(tree: PyTree, example: dict, micro_batches: int, name: str = "inputs") -> PyTree:
    """One entry of a batch as arrays [M, N/M, ...], padded with copies of the first example."""
    _check({name: tree}, example)

    def one(a: Any, spec: jax.ShapeDtypeStruct) -> np.ndarray:
        a = np.asarray(a).astype(spec.dtype)
        a = np.concatenate([a, np.repeat(a[:1], spec.shape[0] - a.shape[0], axis=0)])
        return a.reshape(micro_batches, -1, *a.shape[1:])

    return jax.tree.map(one, tree, example[name])


def count_examples(inputs: PyTree) -> int:
    """The number of examples of a tree of arrays; at least one."""
    leaves = jax.tree.leaves(inputs)
    count = np.shape(leaves[0])[0] if leaves and np.ndim(leaves[0]) else 0
    if not count:
        raise DataError("`inputs` has no examples: the first axis of its arrays must not be empty")
    return count


def _with_weights(batch: dict) -> dict:
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
    """Raise unless `batch` looks like `example`, with the same or a smaller number of examples."""
    counts = {np.shape(a)[:1] for a in jax.tree.leaves(batch)}
    if len(counts) > 1:
        found = ", ".join(sorted(str(c[0]) if c else "none" for c in counts))
        raise DataError(
            f"the arrays of a batch differ in the number of examples: {found} examples; the first "
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
                    f"differ, and only be smaller"
                )
            if not np.can_cast(a.dtype, spec.dtype, "same_kind"):
                raise DataError(
                    f"batch[{name!r}]{jax.tree_util.keystr(path)} has type {a.dtype}, the "
                    f"pipeline's example had {spec.dtype}; convert it, so that nothing is cut off"
                )
