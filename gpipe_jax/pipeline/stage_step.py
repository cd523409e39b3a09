"""Run one stage (the paper's composite layer) on one micro-batch: forward, and backward.

    x[0] = the stage's input                          # forward
    for i in range(n): x[i + 1] = layer[i](x[i])
    for i in reversed(range(n)):                      # backward, from g, the gradient of x[n]
        pull = vjp(layer[i], x[i])                    # stored by the forward, or computed again
        d_params, g = pull(g)
        gradients[i] += d_params                      # in place, before the next layer's exist

So beside the sums, the parameter gradients of only one layer exist at a time. Frozen parameters
and constants join the trained parameters within a layer, and have no gradients. What the first
loop stores for the second depends on the recomputation policy (`remat`): with "layer" the inputs of
the layers, with "stage" what each `vjp` needs.

A long run of equal layers is a `lax.scan`. With "stage" the scan is one step of these loops, and
the gradients of all its layers exist at once.
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
from gpipe_jax.layers.shape_inference import Fixed
from gpipe_jax.layers.skips_and_ties import Boundary
from gpipe_jax.losses.weighting import weighted_sums
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.ragged.storage import Storage
from gpipe_jax.utils.trees import PyTree, cast_like, merge, vjp, wide
from gpipe_jax.utils.xla_workarounds import read_after, recompute_from


class Call(NamedTuple):
    """Describe one call of a stage: one micro-batch of one step."""

    key: jax.Array  # random key of the step
    micro_batch: Any  # global id of the micro-batch
    examples: int | None  # B if each example has random keys of its own, else None
    train: bool
    progress: Any  # fraction of the training run that is done, 0 to 1
    extras: dict[str, PyTree]  # of the micro-batch, [B, ...]
    differentiated: tuple[str, ...] = ()  # the extras whose gradients are asked for


class Gradients(NamedTuple):
    """Hold the gradients at one point of the backward pass."""

    x: list  # of the floating-point leaves of the boundary at this point
    params: dict  # sums for the trained parameters, in the form of the stage's storage
    shared: dict  # sums for the trained tied parameters
    extras: dict  # sums for the extras whose gradients are asked for


@dataclass(frozen=True)
class StageStep:
    """Hold stage s with its device's arrays, and run it on one micro-batch."""

    stages: Stages
    s: int
    params: dict  # trained
    stats: dict
    fixed: dict  # frozen parameters and constants
    shared: dict  # tied parameters, trained and frozen
    ids: jax.Array  # global ids of the stage's layers
    call: Call

    def forward(self, x: Boundary) -> tuple[Boundary, list]:
        """Return the output of the stage, and the moments of its batch norms, run by run."""
        y, _, moments = self._forward_storing_inputs(x)
        return y, moments

    def backward(
        self, x: Boundary, output_gradient: Callable, params: dict, shared: dict, extras: dict
    ) -> tuple[Gradients, list, Any]:
        """Recompute the stage from its input, and go back through it.

        Args:
            x: The input of the stage.
            output_gradient: A function of the recomputed output. It returns the gradients of the
                output's floating-point leaves, and any result.
            params: The sums to add the gradients of the parameters to.
            shared: The sums for the tied parameters.
            extras: The sums for the extras of this micro-batch.

        Returns:
            The gradients at x, the moments of batch norms, and the result of `output_gradient`.
        """
        forward, back = PASSES[self.stages.remat.name]
        y, stored, moments = forward(self, x)
        g, result = output_gradient(y)
        gradients = Gradients(g, params, shared, extras)
        for r in reversed(range(len(stored))):
            gradients = back(self, r, stored[r], gradients)
        return gradients, moments, result

    # --- policy "layer": store the inputs of the layers -------------------------------------------

    def _forward_storing_inputs(self, x: Boundary) -> tuple[Boundary, list, list]:
        """Return the output; for each run the inputs of its layers; for each run the moments."""
        inputs, moments = [], []
        for r, run in enumerate(self.stages.geometry.runs[self.s]):
            step = functools.partial(self._input_and_output, r)
            if run.scanned:
                x, (inputs_of_run, moments_of_run) = lax.scan(step, x, jnp.arange(run.count))
            else:
                inputs_of_run, moments_of_run = [None] * run.count, [None] * run.count
                for i in range(run.count):
                    x, (inputs_of_run[i], moments_of_run[i]) = step(x, i)
            inputs.append(inputs_of_run)
            moments.append(moments_of_run)
        return x, inputs, moments

    def _input_and_output(self, r: int, x: Boundary, i: Any) -> tuple[Boundary, tuple]:
        params, fixed, x = self._read(r, i, x)
        y, moments = self._layer(r, i, fixed, (params, {}, {}), x)
        return y, (x, moments)

    def _back_from_inputs(self, r: int, inputs: PyTree, gradients: Gradients) -> Gradients:
        """Go back through run r, from the inputs of its layers."""
        run = self.stages.geometry.runs[self.s][r]
        if run.scanned:

            def step(gradients: Gradients, row: tuple) -> tuple[Gradients, None]:
                i, x = row
                return self._back_from_input(r, i, x, gradients), None

            rows = (jnp.arange(run.count), inputs)
            return lax.scan(step, gradients, rows, reverse=True)[0]
        for i in reversed(range(run.count)):
            gradients = self._back_from_input(r, i, inputs[i], gradients)
        return gradients

    def _back_from_input(self, r: int, i: Any, x: Boundary, gradients: Gradients) -> Gradients:
        """Go back through layer i of run r, and compute it again for that."""
        x, g = recompute_from((x, gradients.x))
        params, fixed, x = self._read(r, i, x)
        variables = (params, self._tied(r), self._extras(r))
        _, pull, _ = vjp(functools.partial(self._layer, r, i, fixed), variables, x)
        return self._add(r, i, pull, gradients._replace(x=g))

    # --- policy "stage": store what the vjps need -------------------------------------------------

    def _forward_storing_pulls(self, x: Boundary) -> tuple[Boundary, list, list]:
        """Return the output; for each run its pulls; for each run the moments.

        An unrolled run has one pull, the second half of a vjp, for each layer. A scanned run has
        one for all its layers.
        """
        pulls, moments = [], []
        (params, fixed), x = read_after((self.params, self.fixed), x, self.call.micro_batch)
        for r, run in enumerate(self.stages.geometry.runs[self.s]):
            if run.scanned:
                own = self._storage.read_run(self._k, r, params)
                variables = (own, self._tied(r), self._extras(r))
                rest = self._fixed_storage.read_run(self._k, r, fixed)
                scan = functools.partial(self._scan, r, rest)
                x, pull, moments_of_run = vjp(scan, variables, x)
                pulls.append(pull)
                moments.append(moments_of_run)
                continue
            pulls.append([])
            moments.append([])
            for i in range(run.count):
                own = self._storage.read_layer(self._k, r, i, params)
                variables = (own, self._tied(r), self._extras(r))
                rest = self._fixed_storage.read_layer(self._k, r, i, fixed)
                layer = functools.partial(self._layer, r, i, rest)
                x, pull, moments_of_layer = vjp(layer, variables, x)
                pulls[r].append(pull)
                moments[r].append(moments_of_layer)
        return x, pulls, moments

    def _scan(self, r: int, fixed: Fixed, variables: tuple, x: Boundary) -> tuple[Boundary, PyTree]:
        """Run all layers of run r, whose parameters and constants are [n, ...]."""
        params, *others = variables

        def step(x: Boundary, row: tuple) -> tuple[Boundary, PyTree]:
            i, params_of_layer, fixed_of_layer = row
            return self._layer(r, i, fixed_of_layer, (params_of_layer, *others), x)

        count = self.stages.geometry.runs[self.s][r].count
        return lax.scan(step, x, (jnp.arange(count), params, fixed))

    def _back_from_pulls(self, r: int, pulls: Any, gradients: Gradients) -> Gradients:
        """Go back through run r by its pulls."""
        if self.stages.geometry.runs[self.s][r].scanned:
            return self._add(r, None, pulls, gradients)
        for i in reversed(range(len(pulls))):
            gradients = self._add(r, i, pulls[i], gradients)
        return gradients

    # --- one layer --------------------------------------------------------------------------------

    def _layer(
        self, r: int, i: Any, fixed: Fixed, variables: tuple, x: Boundary
    ) -> tuple[Boundary, PyTree]:
        """Run layer i of run r.

        `variables` are its trained parameters, the tied ones, and the extras to differentiate.
        """
        own, trained, extras = variables
        params = merge(own, fixed.params)
        run, call = self.stages.geometry.runs[self.s][r], self.call
        stats = self.stages.stats[self._c].read_layer(self._k, r, i, self.stats)
        key = apply_key(call.key, self.ids[run.start + i], call.micro_batch, call.examples)
        extras = call.extras | {name: cast_like(a, call.extras[name]) for name, a in extras.items()}
        context = Context(key, call.train, call.progress, fixed.constants, extras)
        shared = self.shared | trained
        return skips_and_ties.call(run.layer, params, stats, x, shared, context)

    def _read(self, r: int, i: Any, x: Boundary) -> tuple[PyTree, Fixed, Boundary]:
        """Return what layer i of run r trains, and what is fixed, read after its input x; and x."""
        (params, fixed), x = read_after((self.params, self.fixed), x, self.call.micro_batch)
        own, x = self._read_layer(self._storage, r, i, params, x)
        rest, x = self._read_layer(self._fixed_storage, r, i, fixed, x)
        return own, rest, x

    def _read_layer(
        self, storage: Storage, r: int, i: Any, arrays: dict, x: Boundary
    ) -> tuple[PyTree, Boundary]:
        leaves, tree = jax.tree.flatten(storage.read_layer(self._k, r, i, arrays))
        packed = storage.packed(self._k, r)
        values, x = read_after([leaves[n] for n in packed], x, self.call.micro_batch)
        for n, leaf in zip(packed, values, strict=True):
            leaves[n] = leaf
        return tree.unflatten(leaves), x

    def _tied(self, r: int) -> dict:
        """Return the trained tied parameters of run r."""
        run = self.stages.geometry.runs[self.s][r]
        frozen = self.stages.geometry.run_shape(self.s, run).frozen_ties
        return {name: self.shared[name] for _, name in run.layer.ties if name not in frozen}

    def _extras(self, r: int) -> dict:
        """Return the extras that run r reads and whose gradients are asked for, at least float32.

        So their gradients are summed in float32, wherever the layers that read them are.
        """
        reads = self.stages.geometry.runs[self.s][r].layer.reads
        names = [name for name in self.call.differentiated if name in reads]
        return {name: wide(self.call.extras[name]) for name in names}

    def _add(self, r: int, i: Any, pull: Callable, gradients: Gradients) -> Gradients:
        """Go back through layer i of run r, or the whole run if i is None; add to the sums."""
        (d_params, d_tied, d_extras), d_x = pull(gradients.x)
        params = self._storage.add(self._k, r, i, gradients.params, d_params)
        shared = dict(gradients.shared)
        for name, d in d_tied.items():
            shared[name] += d.astype(shared[name].dtype)
        extras = dict(gradients.extras)
        for name, d in d_extras.items():
            extras[name] = jax.tree.map(jnp.add, extras[name], d)
        return Gradients(d_x, params, shared, extras)

    @property
    def _c(self) -> int:
        return self.stages.geometry.at(self.s)[0]

    @property
    def _k(self) -> int:
        return self.stages.geometry.at(self.s)[1]

    @property
    def _storage(self) -> Storage:
        return self.stages.params[self._c]

    @property
    def _fixed_storage(self) -> Storage:
        return self.stages.fixed[self._c]


# By the name of a recomputation policy: the forward that stores something for each run of layers,
# and the step back through a run from what it stored.
PASSES: dict[str, tuple[Callable, Callable]] = {
    "stage": (StageStep._forward_storing_pulls, StageStep._back_from_pulls),
    "layer": (StageStep._forward_storing_inputs, StageStep._back_from_inputs),
}


def start_of_backward(
    loss: Callable, labels: PyTree, weights: jax.Array, y: Boundary
) -> tuple[list, tuple]:
    """Return the gradients of the loss in the floating-point leaves of y, and (loss, metrics)."""

    def loss_of(_: None, y: Boundary) -> tuple[jax.Array, dict]:
        return weighted_sums(loss, y.x, labels, weights)

    value, pull, metrics = vjp(loss_of, None, y)
    return pull([jnp.ones_like(value)])[1], (value, metrics)
