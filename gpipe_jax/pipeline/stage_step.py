"""The work of one stage (the paper's composite layer) on one micro-batch: forward, and backward.

    x[0] = the stage's input                          # forward
    for i in range(n): x[i + 1] = layer[i](x[i])
    for i in reversed(range(n)):                      # backward, from g, the gradient of x[n]
        pull = vjp(layer[i], x[i])                    # kept from the forward, or made again
        d_params, g = pull(g)
        gradients[i] += d_params                      # in place, before the next layer's are made

So no more than one layer's parameter gradients exist beside the sums. With `remat_layers` only the
layers' inputs are kept between the two loops, else what each `vjp` needs. A long run of equal
layers is a `lax.scan`, and without `remat_layers` a single step of these loops: the gradients of
all its layers exist at once.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gpipe_jax.layers import skips_and_ties
from gpipe_jax.layers.layer import Context
from gpipe_jax.layers.random_keys import apply_key
from gpipe_jax.layers.skips_and_ties import Boundary
from gpipe_jax.losses import weighted_sums
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.ragged.storage import Storage
from gpipe_jax.utils.trees import PyTree, vjp


class Call(NamedTuple):
    """What a stage is told about a call: one micro-batch of one step."""

    key: jax.Array  # of the step
    micro_batch: Any  # its global id
    examples: int | None  # of a micro-batch, if each of them has random keys of its own
    train: bool
    progress: Any  # of the training run, 0 to 1


class Gradients(NamedTuple):
    """What the backward pass has come to."""

    x: list  # of the floating-point leaves of the boundary that it has reached
    params: dict  # sums, in the form of the stage's storage
    shared: dict  # sums, of the tied parameters


@dataclass(frozen=True)
class StageStep:
    """Stage s with its device's arrays, at work on one micro-batch."""

    stages: Stages
    s: int
    params: dict
    stats: dict
    shared: dict  # tied parameters
    ids: jax.Array  # global ids of the stage's layers
    call: Call

    def forward(self, x: Boundary) -> tuple[Boundary, list]:
        """What the stage hands on, and the moments of its batch norms, run by run."""
        y, _, moments = self._keep_inputs(x)
        return y, moments

    def backward(
        self, x: Boundary, output_gradient: Callable, params: dict, shared: dict
    ) -> tuple[Gradients, list, Any]:
        """Recompute the stage from its input, and go back through it.

        `output_gradient(y)` returns the gradients of the floating-point leaves of what the stage
        hands on, and anything else. `params` and `shared` are the sums to add to. Returns
        the gradients at x, the moments of batch norms, and that anything else.
        """
        forward, back = PASSES[self.stages.remat.name]
        y, kept, moments = forward(self, x)
        g, result = output_gradient(y)
        so_far = Gradients(g, params, shared)
        for r in reversed(range(len(kept))):
            so_far = back(self, r, kept[r], so_far)
        return so_far, moments, result

    # --- with the inputs kept ---------------------------------------------------------------------

    def _keep_inputs(self, x: Boundary) -> tuple[Boundary, list, list]:
        """The output, the input of every layer, and the moments: of each run."""
        inputs, moments = [], []
        for r, run in enumerate(self.stages.geometry.runs[self.s]):
            one = functools.partial(self._input_and_output, r)
            if run.scanned:
                x, (before, seen) = lax.scan(one, x, jnp.arange(run.count))
            else:
                before, seen = [None] * run.count, [None] * run.count
                for i in range(run.count):
                    x, (before[i], seen[i]) = one(x, i)
            inputs.append(before)
            moments.append(seen)
        return x, inputs, moments

    def _input_and_output(self, r: int, x: Boundary, i: Any) -> tuple[Boundary, tuple]:
        params, x = self._read(r, i, x)
        y, seen = self._layer(r, i, (params, self.shared), x)
        return y, (x, seen)

    def _back_from_inputs(self, r: int, inputs: PyTree, so_far: Gradients) -> Gradients:
        run = self.stages.geometry.runs[self.s][r]
        if run.scanned:
            one = lambda g, row: (self._back_one(r, row[0], row[1], g), None)  # noqa: E731
            rows = (jnp.arange(run.count), inputs)
            return lax.scan(one, so_far, rows, reverse=True)[0]
        for i in reversed(range(run.count)):
            so_far = self._back_one(r, i, inputs[i], so_far)
        return so_far

    def _back_one(self, r: int, i: Any, x: Boundary, so_far: Gradients) -> Gradients:
        # Without the barrier the compiler would find that it has computed all this before, and
        # keep that instead of the input.
        x, g = lax.optimization_barrier((x, so_far.x))
        params, x = self._read(r, i, x)
        _, pull, _ = vjp(functools.partial(self._layer, r, i), (params, self._tied(r)), x)
        return self._add(r, i, pull, so_far._replace(x=g))

    # --- with what the vjps need kept -------------------------------------------------------------

    def _keep_pulls(self, x: Boundary) -> tuple[Boundary, list, list]:
        """The output, the vjp of every unit, and the moments: of each run.

        A unit is a layer, or a scanned run as a whole.
        """
        pulls, moments = [], []
        params, x = self._after(self.params, x)
        for r, run in enumerate(self.stages.geometry.runs[self.s]):
            if run.scanned:
                variables = (self._storage.read_run(self._k, r, params), self._tied(r))
                x, pull, seen = vjp(functools.partial(self._scan, r), variables, x)
                pulls.append(pull)
                moments.append(seen)
                continue
            pulls.append([])
            moments.append([])
            for i in range(run.count):
                variables = (self._storage.read_layer(self._k, r, i, params), self._tied(r))
                x, pull, seen = vjp(functools.partial(self._layer, r, i), variables, x)
                pulls[r].append(pull)
                moments[r].append(seen)
        return x, pulls, moments

    def _scan(self, r: int, variables: tuple, x: Boundary) -> tuple[Boundary, PyTree]:
        """A run as a whole; parameters [n, ...]."""
        params, tied = variables
        one = lambda x, row: self._layer(r, row[0], (row[1], tied), x)  # noqa: E731
        return lax.scan(one, x, (jnp.arange(self.stages.geometry.runs[self.s][r].count), params))

    def _back_from_pulls(self, r: int, pulls: Any, so_far: Gradients) -> Gradients:
        if self.stages.geometry.runs[self.s][r].scanned:
            return self._add(r, None, pulls, so_far)
        for i in reversed(range(len(pulls))):
            so_far = self._add(r, i, pulls[i], so_far)
        return so_far

    # --- one layer --------------------------------------------------------------------------------

    def _layer(self, r: int, i: Any, variables: tuple, x: Boundary) -> tuple[Boundary, PyTree]:
        """Layer i of run r; `variables` are its parameters and the tied ones."""
        params, shared = variables
        run, call = self.stages.geometry.runs[self.s][r], self.call
        stats = self.stages.stats[self._c].read_layer(self._k, r, i, self.stats)
        key = apply_key(call.key, self.ids[run.start + i], call.micro_batch, call.examples)
        context = Context(key, call.train, call.progress)
        return skips_and_ties.call(run.layer, params, stats, x, shared, context)

    def _read(self, r: int, i: Any, x: Boundary) -> tuple[PyTree, Boundary]:
        """The parameters of layer i of run r, and its input x."""
        arrays, x = self._after(self.params, x)
        leaves, tree = jax.tree.flatten(self._storage.read_layer(self._k, r, i, arrays))
        packed = self._storage.packed(self._k, r)
        some, x = self._after([leaves[n] for n in packed], x)
        for n, leaf in zip(packed, some, strict=True):
            leaves[n] = leaf
        return tree.unflatten(leaves), x

    def _after(self, params: PyTree, x: Boundary) -> tuple[PyTree, Boundary]:
        """The parameters, for the compiler not known before x is.

        Else it converts all of them to bfloat16 ahead of all loops and keeps them so, or converts a
        whole pack to take one layer out of it. It also moves conversions ahead of a barrier, unless
        the arrays are used as they are too: here in a case that never happens.
        """
        params, x = lax.optimization_barrier((params, x))
        never, some = self.call.micro_batch < 0, jnp.float32(0)
        for a in filter(jnp.size, jax.tree.leaves(params)):
            some += a[(0,) * a.ndim].astype(jnp.float32)
        return params, jax.tree.map(lambda a: jnp.where(never, some.astype(a.dtype), a), x)

    def _tied(self, r: int) -> dict:
        names = {name for _, name in self.stages.geometry.runs[self.s][r].layer.ties}
        return {name: self.shared[name] for name in names}

    def _add(self, r: int, i: Any, pull: Callable, so_far: Gradients) -> Gradients:
        """One step back: through layer i of run r, or the whole run if that is None."""
        (d_params, d_tied), d_x = pull(so_far.x)
        params = self._storage.add(self._k, r, i, so_far.params, d_params)
        shared = dict(so_far.shared)
        for name, d in d_tied.items():
            shared[name] += d.astype(shared[name].dtype)
        return Gradients(d_x, params, shared)

    @property
    def _c(self) -> int:
        return self.stages.geometry.at(self.s)[0]

    @property
    def _k(self) -> int:
        return self.stages.geometry.at(self.s)[1]

    @property
    def _storage(self) -> Storage:
        return self.stages.params[self._c]


# By the name of a recomputation policy: the forward that stores something for each run of layers,
# and the step back through a run from what it stored.
PASSES: dict[str, tuple[Callable, Callable]] = {
    "stage": (StageStep._keep_pulls, StageStep._back_from_pulls),
    "layer": (StageStep._keep_inputs, StageStep._back_from_inputs),
}


def start_of_backward(
    loss: Callable, labels: PyTree, weights: jax.Array, y: Boundary
) -> tuple[list, tuple]:
    """The gradients of the loss in the floating-point leaves of y, and (loss, metrics)."""
    of_outputs = lambda _, y: weighted_sums(loss, y.x, labels, weights)  # noqa: E731
    value, pull, metrics = vjp(of_outputs, None, y)
    return pull([jnp.ones_like(value)])[1], (value, metrics)
