"""`Pipeline`: a sequence of layers on a mesh, and one exact training step of it.

`Pipeline.value_and_grad` is equal to `sequential.value_and_grad` of the same layers, whatever the
number of stages, replicas and micro-batches, and whatever the schedule.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpipe_jax import cost as costs
from gpipe_jax import executor, partition, report
from gpipe_jax.config import nearest_multiples
from gpipe_jax.layers.layer import Layer
from gpipe_jax.mesh import DATA, STAGE
from gpipe_jax.schedule import Schedule, forward_only, make
from gpipe_jax.sequential import describe, infer_shapes, layer_key, step_key
from gpipe_jax.stages import Stages

PyTree = Any


class State(NamedTuple):
    """What a pipeline carries from step to step."""

    params: PyTree  # rectangular: axis 0 of every array is the stage; see `Pipeline.to_layers`
    seed: jax.Array  # of all randomness in training; uint32 []


class Pipeline:
    """A network cut into K composite layers, one for each position along the mesh's stage axis.

    `layers` is a sequence of `gpipe_jax.layer(...)`; each takes one pytree and returns one.
    `loss(outputs, labels)` returns the losses of the examples (see `losses`). `example` is a batch,
    or its shapes: {"inputs": ..., "labels": ..., "weights": [N] optional}; its N examples are split
    into `micro_batches` x D equal parts. Later batches may be shorter: they are padded with
    examples of weight zero. `schedule` is "gpipe", "1f1b" or "eager_1f1b" (see `schedule`).

    `partition` is "auto", which minimises the slowest stage by the layers' `cost` ("flops", "time",
    or one number a layer; see `cost`), or the index of the first layer of stages 1 to K-1.
    `memory_limit` bounds, in bytes, the parameters, gradients, two optimizer slots and working set
    of a stage. The backward pass recomputes each stage from its input; `remat="layer"` also
    recomputes within it layer by layer, for less memory and about a third more time.

    Building a pipeline allocates nothing on any device, so the mesh may be a compile-only one.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        *,
        loss: Callable,
        mesh: Mesh,
        example: dict,
        micro_batches: int = 1,
        schedule: str = "1f1b",
        partition: str | Sequence[int] = "auto",
        cost: str | Sequence[float] = "flops",
        memory_limit: float | None = None,
        remat: str = "stage",
    ) -> None:
        if remat not in ("stage", "layer"):
            raise ValueError(f"`remat` must be 'stage' or 'layer', got {remat!r}")
        self.layers, self.loss, self.mesh = tuple(layers), loss, mesh
        self.micro_batches = micro_batches
        self.example = _shapes_of(example, mesh.shape[DATA] * micro_batches)
        self.schedule: Schedule = make(schedule, mesh.shape[STAGE], micro_batches)
        self._one = jax.tree.map(self._micro_batch_shape, self.example)
        self.shapes = infer_shapes(self.layers, self._one["inputs"])
        self._check_loss()
        platform = mesh.devices.flat[0].platform
        self.costs = costs.measure(self.shapes, cost, platform)
        self.partition = self._cut(partition, cost, platform, memory_limit)
        self.stages = Stages(self.shapes, self.partition.stages, remat_layers=remat == "layer")

    # --- cutting ---------------------------------------------------------------------------------

    def _micro_batch_shape(self, a: Any) -> jax.ShapeDtypeStruct:
        size = a.shape[0] // (self.replicas * self.micro_batches)
        return jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype)

    def _check_loss(self) -> None:
        """Evaluate the loss abstractly, so that a mismatch is found before anything compiles."""
        from gpipe_jax.losses import weighted_sums

        one, outputs = self._one, self.shapes[-1].output
        try:
            jax.eval_shape(
                lambda *a: weighted_sums(self.loss, *a), outputs, one["labels"], one["weights"]
            )
        except Exception as error:
            raise ValueError(
                f"`loss` does not take the outputs of layer {len(self.layers) - 1}, "
                f"{self.layers[-1]}: {describe(outputs)}, with labels {describe(one['labels'])}: "
                f"{error}"
            ) from error

    def _cut(
        self, wanted: Any, cost: Any, platform: str, memory_limit: float | None
    ) -> partition.Partition:
        times = [c.compute_s for c in self.costs]
        options: dict = dict(
            # Costs that the caller gave are in a unit of their own: nothing to add to them.
            transfer=costs.transfer_s(self.costs, platform) if isinstance(cost, str) else None,
            # Value, gradient and two optimizer slots for each parameter.
            memory=[4 * c.parameter_bytes + c.working_bytes for c in self.costs],
            memory_limit=memory_limit,
            names=[str(layer) for layer in self.layers],
        )
        count = self.mesh.shape[STAGE]
        if wanted != "auto":
            return partition.explicit(wanted, times, stages=count, **options)
        padding = [c.parameter_bytes for c in self.costs]
        return partition.partition(times, count, padding=padding, **options)

    @property
    def replicas(self) -> int:
        """D, the number of data-parallel replicas."""
        return self.mesh.shape[DATA]

    @property
    def batch_size(self) -> int:
        """N, the examples of a full batch."""
        return self.example["weights"].shape[0]

    # --- parameters ------------------------------------------------------------------------------

    def init(self, seed: int = 0) -> State:
        """Fresh parameters, each made on its own device; the same for every K, D and schedule."""
        return jax.jit(self._init, out_shardings=self._state_shardings())(jnp.uint32(seed))

    def _init(self, seed: jax.Array) -> State:
        def make(shape: Any, i: jax.Array) -> PyTree:
            x = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape.input)
            return shape.layer.init(layer_key(seed, i), x)

        return State(executor.build_parameters(self.stages, self.mesh, make), seed)

    def _state_shardings(self) -> State:
        stage: Any = NamedSharding(self.mesh, P(STAGE))
        shape = jax.tree.map(lambda _: stage, self.stages.local_shapes())
        everywhere: Any = NamedSharding(self.mesh, P())
        return State(shape, everywhere)

    def to_layers(self, tree: PyTree) -> list[PyTree]:
        """Parameters or gradients as L trees of numpy arrays in layer order, for any K the same.

        `tree` is a `State`, or anything in the form of its `params`.
        """
        params = tree.params if isinstance(tree, State) else tree
        whole = jax.tree.map(np.asarray, params)
        layers = []
        for k in range(self.stages.count):
            local = jax.tree.map(lambda a, k=k: a[k], whole)
            layers += self.stages.split_layers(k, local)
        return layers

    def from_layers(self, trees: Sequence[PyTree], seed: int = 0) -> State:
        """A state with these parameters: the inverse of `to_layers`."""
        self._check_layers(trees)
        cuts = self.stages.cuts
        local = [self.stages.join_layers(k, [trees[i] for i in cut]) for k, cut in enumerate(cuts)]
        sharding = NamedSharding(self.mesh, P(STAGE))

        def place(*parts: np.ndarray) -> jax.Array:
            shape = (len(parts), *parts[0].shape)
            rows = lambda index: np.stack(parts[index[0]])  # noqa: E731
            return jax.make_array_from_callback(shape, sharding, rows)  # type: ignore[arg-type]

        params = jax.tree.map(place, *local)
        return State(params, jax.device_put(np.uint32(seed), NamedSharding(self.mesh, P())))

    def _check_layers(self, trees: Sequence[PyTree]) -> None:
        if len(trees) != len(self.layers):
            raise ValueError(f"{len(trees)} parameter trees for {len(self.layers)} layers")
        for i, (tree, shape) in enumerate(zip(trees, self.shapes, strict=True)):
            have, want = jax.tree.map(np.shape, (tree, shape.params))
            if have != want:
                have = describe(jax.tree.map(np.asarray, tree))
                raise ValueError(
                    f"layer {i}, {shape.layer}, has parameters {describe(shape.params)}, got {have}"
                )

    def spread(self, trees: Sequence[PyTree]) -> PyTree:
        """Traced: one number for each parameter, spread over the rectangular form.

        `trees` holds L trees of numbers in layer order; equal layers must have equal numbers.
        """
        by_layer = {id(s): tree for s, tree in zip(self.shapes, trees, strict=True)}

        def make(shape: Any, i: jax.Array) -> PyTree:
            return jax.tree.map(
                lambda a, v: jnp.full(a.shape, v, a.dtype), shape.params, by_layer[id(shape)]
            )

        return executor.build_parameters(self.stages, self.mesh, make)

    # --- one step --------------------------------------------------------------------------------

    def split(self, batch: dict) -> dict:
        """A batch as micro-batches on the devices: arrays [M, D*B, ...], weights summing to one.

        A batch of fewer than N examples is padded with copies of its first one, of weight zero.
        """
        batch = _with_weights(batch)
        _check_batch(batch, self.example)
        weights = np.asarray(batch["weights"], np.float64)
        if not weights.sum() > 0:
            raise ValueError(f"the weights of a batch must sum to more than 0, got {weights.sum()}")
        parts = {**batch, "weights": weights / weights.sum()}
        return {name: jax.tree.map(self._place, parts[name], self.example[name]) for name in parts}

    def _place(self, a: Any, spec: Any) -> jax.Array:
        a = np.asarray(a).astype(spec.dtype)
        missing = self.batch_size - a.shape[0]
        if missing and spec is self.example["weights"]:
            a = np.concatenate([a, np.zeros(missing, a.dtype)])
        elif missing:
            a = np.concatenate([a, np.repeat(a[:1], missing, axis=0)])
        parts = a.reshape(self.micro_batches, -1, *a.shape[1:])
        return jax.device_put(parts, NamedSharding(self.mesh, P(None, DATA)))

    def gradients(self, state: State, parts: dict, step: Any, *, idle_fill: float = 0.0) -> tuple:
        """Traced: ((loss, metrics), gradients) of the micro-batches that `split` made."""
        run = executor.build(self.stages, self.schedule, self.mesh, self.loss, idle_fill=idle_fill)
        return run(state.params, parts, step_key(state.seed, step))

    def losses(self, state: State, parts: dict) -> tuple:
        """Traced: (loss, metrics) through the forward-only schedule, in evaluation mode."""
        run = executor.build(self.stages, self._forward_schedule, self.mesh, self.loss)
        return run(state.params, parts, step_key(state.seed, 0))

    def outputs(self, state: State, inputs: PyTree) -> PyTree:
        """Traced: the network's outputs [M, D*B, ...] for inputs [M, D*B, ...]."""
        run = executor.build(self.stages, self._forward_schedule, self.mesh, None)
        return run(state.params, {"inputs": inputs}, step_key(state.seed, 0))

    @functools.cached_property
    def _forward_schedule(self) -> Schedule:
        return forward_only(self.mesh.shape[STAGE], self.micro_batches)

    @functools.cached_property
    def _jitted(self) -> dict[str, Callable]:
        names = ("gradients", "losses", "outputs")
        return {name: jax.jit(getattr(self, name)) for name in names}

    def value_and_grad(self, state: State, batch: dict, step: int = 0) -> tuple:
        """((loss, metrics), gradients, state) of a batch.

        The loss and the metrics are weighted means over the batch, seen by every host. Gradients
        have the form of `state.params`, in float32; `to_layers` gives them layer by layer. `step`
        seeds dropout.
        """
        result, grads = self._jitted["gradients"](state, self.split(batch), jnp.uint32(step))
        return result, grads, state

    def evaluate(self, state: State, batch: dict) -> tuple[jax.Array, dict]:
        """(loss, metrics) of a batch in evaluation mode: weighted means over its examples."""
        return self._jitted["losses"](state, self.split(batch))

    def apply(self, state: State, inputs: PyTree) -> PyTree:
        """The network's outputs in evaluation mode, for any number of examples."""
        count = jax.tree.leaves(inputs)[0].shape[0]
        chunks = []
        for start in range(0, count, self.batch_size):
            chunk = jax.tree.map(lambda a, s=start: np.asarray(a)[s : s + self.batch_size], inputs)
            _check_batch({"inputs": chunk}, self.example)
            parts = jax.tree.map(self._place, chunk, self.example["inputs"])
            out = self._jitted["outputs"](state, parts)
            size = min(self.batch_size, count - start)
            chunks.append(jax.tree.map(lambda a, n=size: a.reshape(-1, *a.shape[2:])[:n], out))
        return jax.tree.map(lambda *a: jnp.concatenate(a), *chunks)

    def lower(self) -> jax.stages.Lowered:
        """`gradients` lowered for the mesh's devices, from shapes, to compile and to measure."""
        shape = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
        state = jax.tree.map(
            shape, jax.eval_shape(self._init, jnp.uint32(0)), self._state_shardings()
        )
        split = NamedSharding(self.mesh, P(None, DATA))
        M = self.micro_batches
        parts = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                (M, a.shape[0] // M, *a.shape[1:]), a.dtype, sharding=split
            ),
            self.example,
        )
        step = jax.ShapeDtypeStruct((), jnp.uint32, sharding=NamedSharding(self.mesh, P()))
        return self._jitted["gradients"].lower(state, parts, step)

    # --- report ----------------------------------------------------------------------------------

    def __str__(self) -> str:
        return report.as_text(self)

    def _repr_html_(self) -> str:
        return report.as_html(self)


def _with_weights(batch: dict) -> dict:
    missing = {"inputs", "labels"} - set(batch)
    extra = set(batch) - {"inputs", "labels", "weights"}
    if missing or extra:
        raise ValueError(
            f"a batch has the keys 'inputs', 'labels' and, optionally, 'weights'; "
            f"missing {sorted(missing)}, unknown {sorted(extra)}"
        )
    count = jax.tree.leaves(batch["inputs"])[0].shape[0]
    return {**batch, "weights": batch.get("weights", np.ones(count, np.float32))}


def _shapes_of(example: dict, parts: int) -> dict:
    """The shapes of a full batch, whose examples must split into `parts` equal parts."""
    example = _with_weights(example)
    count = example["weights"].shape[0]
    for path, a in jax.tree.leaves_with_path(example):
        if not a.shape or a.shape[0] != count:
            raise ValueError(
                f"example{jax.tree_util.keystr(path)} has shape {list(a.shape)}, but the batch has "
                f"{count} examples; the first axis must be the examples"
            )
    if count % parts:
        raise ValueError(
            f"the example's {count} examples do not split into micro-batches x replicas = {parts} "
            f"equal parts; nearest legal values: {nearest_multiples(count, parts)}"
        )
    canonical = jax.dtypes.canonicalize_dtype
    weights = jax.ShapeDtypeStruct((count,), canonical(jnp.float64))
    shape = lambda a: jax.ShapeDtypeStruct(a.shape, canonical(a.dtype))  # noqa: E731
    return {**jax.tree.map(shape, example), "weights": weights}


def _check_batch(batch: dict, example: dict) -> None:
    """Raise unless `batch` looks like `example`, with the same or a smaller number of examples."""
    counts = {np.shape(a)[:1] for a in jax.tree.leaves(batch)}
    if len(counts) > 1:
        found = ", ".join(sorted(str(c[0]) if c else "none" for c in counts))
        raise ValueError(
            f"the arrays of a batch differ in the number of examples: {found} examples; the first "
            f"axis of each must be the examples"
        )
    for name, tree in batch.items():
        if jax.tree.structure(tree) != jax.tree.structure(example[name]):
            raise ValueError(
                f"batch[{name!r}] has structure {jax.tree.structure(tree)}, the pipeline's example "
                f"had {jax.tree.structure(example[name])}"
            )
        for (path, a), spec in zip(
            jax.tree.leaves_with_path(tree), jax.tree.leaves(example[name]), strict=True
        ):
            fits = a.shape[1:] == spec.shape[1:] and 0 < a.shape[0] <= spec.shape[0]
            if not fits:
                raise ValueError(
                    f"batch[{name!r}]{jax.tree_util.keystr(path)} has shape {list(a.shape)}, the "
                    f"pipeline's example had {list(spec.shape)}; only the number of examples may "
                    f"differ, and only be smaller"
                )
