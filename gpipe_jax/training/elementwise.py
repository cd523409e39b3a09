"""Check that an optimizer acts on each element alone, so that packing parameters is harmless.

The check is a trial: it runs the optimizer twice, on arrays of several shapes, and on the same
numbers packed into one vector. Updates that are zero show nothing. So a trial lasts until it has
seen updates that are not, and there are trials from later steps on: a learning rate may be zero for
many steps, and gradient accumulation makes most updates zero. It also looks at the optimizer's
state, which `checkpoint` cuts by layers.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils.trees import PyTree


class Probe(NamedTuple):
    """Describe an array of the trial."""

    shape: tuple[int, ...]
    scale: float  # standard deviation of its numbers


# Each array is there for optimizers that treat it differently from a vector of the same numbers.
LARGE, SMALL = 30.0, 1.0
_PROBES = {
    # LAMB and LARS scale an update by the norms of its own array. So the arrays differ in scale.
    "scalar": Probe((), LARGE),
    "vector": Probe((5,), LARGE),  # a mask by rank leaves out norms and biases
    # Adafactor factors the second moments of a matrix if both sides have at least 128 elements.
    "factored_matrix": Probe((128, 129), SMALL),
    # Transformations that see a kernel's rank: centralized gradients, Muon, Shampoo.
    "rank_3": Probe((2, 3, 4), LARGE),
    "convolution": Probe((2, 3, 1, 4), LARGE),
    "rank_5": Probe((2, 1, 3, 2, 2), LARGE),
}
_TOLERANCE = 1e-4  # of the largest update: float32 and another order of sums give less
_SEEN = 2  # updates that are not zero, in each trial
_LONGEST = 1024  # steps of the first trial, in which most updates may be zero
_SHORT = 64  # steps of a later trial
_LATER = (2**10, 2**20)  # steps from which trials start in any case
_SEARCHED = tuple(4**i for i in range(1, 11))  # likewise, if all updates were zero so far

REFUSED = (
    "this optax transformation depends on how parameters are grouped into arrays, so its result "
    "would depend on the number of stages: it mixes elements of several parameters, or its state "
    "has arrays of other shapes than they have; use transformations of one parameter each, and "
    "global norms: optax.adamw, optax.lion, optax.lamb or optax.contrib.muon for Adafactor, "
    "optax.clip_by_global_norm for other limits of several parameters, more micro-batches for "
    "optax.MultiSteps of LAMB; masks and groups of parameters may be added"
)

_ALL_ZERO = (
    f"every update of this optax transformation was zero, in its first {_LONGEST} steps and in "
    f"trials from later steps on (up to step {_SEARCHED[-1]}), so it is not known whether it "
    f"depends on how parameters are grouped into arrays; use a learning rate that is not zero, "
    f"accumulate fewer gradients, or use optax.set_to_zero() to change no parameter"
)


def check_transformation(argument: str, tx: Any) -> None:
    """Raise ArgumentError unless an argument is an optax transformation."""
    if isinstance(tx, optax.GradientTransformation):
        return
    if isinstance(tx, Real):
        remedy = f"give an optimizer with this learning rate, such as optax.adam({tx})"
    elif callable(tx):
        remedy = f"call it, as {getattr(tx, '__name__', 'optax.adam')}(1e-3)"
    elif hasattr(tx, "tx"):
        remedy = "give the transformation that it holds, its `tx`"
    else:
        remedy = "give one, such as optax.adam(1e-3)"
    raise ArgumentError(
        argument,
        f"`{argument}` must be an optax transformation, got {type(tx).__name__}; {remedy}",
    )


@functools.lru_cache(maxsize=16)
def check_elementwise(tx: optax.GradientTransformation) -> None:
    """Check that an optimizer gives the same result on packed parameters as on the layers' own.

    Args:
        tx: An optax transformation.

    Raises:
        ValueError: It does not, its state has arrays that are not in the form of the parameters, or
            all updates were zero.
    """
    rng = np.random.default_rng(0)
    params, *gradients = (_forms(rng) for _ in range(3))
    try:
        like_params = _state_is_like_params(tx, params.arrays)
        accepted = like_params and packing_is_harmless(tx, params, gradients)
    except AllZeroError:
        raise
    except Exception as error:  # optax raises anything for arrays that it cannot take
        raise ValueError(f"{REFUSED} ({type(error).__name__}: {error})") from error
    if not accepted:
        raise ValueError(REFUSED)


class Forms(NamedTuple):
    """Hold the same numbers in two forms; both are trees."""

    arrays: PyTree  # of several arrays
    packed: PyTree  # in one array, which may be longer


def _forms(rng: np.random.Generator) -> Forms:
    """Draw numbers for all probes."""
    arrays = {name: draw(rng, probe) for name, probe in _PROBES.items()}
    return Forms(arrays, {"packed": np.concatenate([np.ravel(a) for a in jax.tree.leaves(arrays)])})


def draw(rng: np.random.Generator, probe: Probe) -> np.ndarray:
    """Draw the numbers of an array."""
    return np.asarray(probe.scale * rng.normal(size=probe.shape), np.float32)


def _form(tree: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
    return jax.tree.structure(tree), [np.shape(a) for a in jax.tree.leaves(tree)]


def _has_form(params: PyTree) -> Callable[[PyTree], bool]:
    """Return a function that checks whether a tree has the structure and shapes of `params`."""
    form = _form(params)

    def check(node: PyTree) -> bool:
        return _form(node) == form

    return check


def _state_is_like_params(tx: optax.GradientTransformation, params: PyTree) -> bool:
    """Return whether the state holds only scalars, and trees in the form of the parameters.

    Such trees can be cut by layers. A `MaskedState` cannot: it leaves out some of the parameters.
    """
    is_like_params = _has_form(params)

    def is_masked(node: PyTree) -> bool:
        return isinstance(node, optax.MaskedState)

    state = jax.eval_shape(tx.init, params)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: is_like_params(node) or is_masked(node))
    return all(is_like_params(node) or (not is_masked(node) and node.shape == ()) for node in nodes)


# --- trials ---------------------------------------------------------------------------------------


def packing_is_harmless(
    tx: optax.GradientTransformation, params: Forms, gradients: Sequence[Forms], start: int = 0
) -> bool:
    """Return whether the updates of several arrays are those of one array of the same numbers.

    Args:
        tx: An optax transformation.
        params: The parameters in both forms.
        gradients: The gradients of successive steps, likewise.
        start: Where the numbers begin in the packed array. Default: 0.

    Raises:
        AllZeroError: All updates were zero.
    """
    run = _Trials(tx, params, gradients, start).run
    first = run(limit=_LONGEST)
    if not (first.is_harmless or first.is_zero):
        return False
    limit = _SHORT if first.is_zero else first.steps
    later = [run(*start, limit=limit) for start in _starts(tx, params.arrays, _LATER)]
    results = [first, *(result for result in later if result.is_finite)]
    if all(result.is_zero for result in results):
        starts = [*_starts(tx, params.arrays, _SEARCHED)]
        if not starts:
            return True  # without counters, all steps are alike
        searched = (run(*start, limit=_SHORT) for start in starts)
        seen = next((r for r in searched if r.is_finite and not r.is_zero), None)
        if seen is None:
            raise AllZeroError(_ALL_ZERO)
        results = [seen]
    return all(result.is_harmless or result.is_zero for result in results)


class AllZeroError(ValueError):
    """Report that no trial has shown anything."""


def _starts(tx: Any, params: PyTree, offsets: Sequence[int]) -> Iterator[tuple[int, int | None]]:
    """Yield by how much counters are advanced at the start of a trial, and which one is not.

    A counter of accumulated gradients must not be advanced beyond their number.
    """
    nodes = jax.tree.leaves(jax.eval_shape(tx.init, params), is_leaf=_has_form(params))
    scalars = [node.dtype for node in nodes if getattr(node, "shape", None) == ()]
    counters = sum(jnp.issubdtype(dtype, jnp.integer) for dtype in scalars)
    if scalars:
        yield from ((offset, kept) for offset in offsets for kept in (None, *range(counters)))


class _Result(NamedTuple):
    """Hold what a trial has shown."""

    steps: int
    largest: float  # update
    difference: float  # the largest one between the two forms

    @property
    def is_zero(self) -> bool:
        """Return whether all updates were zero."""
        return self.largest == 0 == self.difference

    @property
    def is_finite(self) -> bool:
        """Return whether all updates were finite."""
        return bool(np.isfinite([self.largest, self.difference]).all())

    @property
    def is_harmless(self) -> bool:
        """Return whether there were updates, the same in both forms."""
        return self.largest > 0 and self.difference <= _TOLERANCE * self.largest


class _Trials:
    """Run an optimizer on arrays, and on the same numbers packed into one vector, side by side."""

    def __init__(self, tx: Any, params: Forms, gradients: Sequence[Forms], start: int) -> None:
        self._tx, self._start_of_packed = optax.with_extra_args_support(tx), start
        self._params = jax.tree.map(jnp.asarray, list(params))
        self._gradients = [jax.tree.map(jnp.asarray, list(forms)) for forms in gradients]
        # They run a few times, and on CPU their code takes longer to optimize than to compile.
        on_cpu = jax.default_backend() == "cpu"
        options: Any = {"xla_backend_optimization_level": 0} if on_cpu else None
        self._step = jax.jit(self._update, compiler_options=options)
        self._start = jax.jit(self._init, compiler_options=options)(self._params)

    def run(self, offset: int = 0, kept: int | None = None, *, limit: int) -> _Result:
        """Do steps until `_SEEN` updates were not zero, at most `limit`.

        Args:
            offset: By how much the state's counters are advanced before. Default: 0.
            kept: The number of the counter that is not. Default: none.
            limit: The most steps.
        """
        params, states, result, seen = self._params, self._start, _Result(0, 0.0, 0.0), 0
        if offset:
            both = zip(states, params, strict=True)
            states = [_advance(state, p, offset, kept) for state, p in both]
        while seen < _SEEN and result.steps < limit:
            gradients = self._gradients[result.steps % len(self._gradients)]
            params, states, shown = self._step(params, states, gradients)
            largest, difference = (float(a) for a in shown)
            seen += largest != 0 or difference != 0
            # `np.maximum` keeps NaN, and on CPU the maximum of a compiled program does not.
            largest = np.maximum(result.largest, largest)
            difference = np.maximum(result.difference, difference)
            result = _Result(result.steps + 1, float(largest), float(difference))
        return result

    def _init(self, params: Sequence[PyTree]) -> list[PyTree]:
        return [self._tx.init(p) for p in params]

    def _update(self, params: Any, states: Any, gradients: Any) -> tuple:
        """Do one update of both forms; return also the largest number, and difference, of both."""
        updates, after = [], []
        for p, s, g in zip(params, states, gradients, strict=True):
            u, s = self._tx.update(g, s, p, decaying=jax.tree.map(jnp.ones_like, p))
            updates.append(u)
            after.append((optax.apply_updates(p, u), s))
        of_arrays, of_vector = (
            jnp.concatenate([jnp.ravel(a) for a in jax.tree.leaves(u)]) for u in updates
        )
        of_vector = of_vector[self._start_of_packed :][: of_arrays.size]
        is_finite = jnp.isfinite(of_arrays).all() & jnp.isfinite(of_vector).all()
        shown = [jnp.abs(a).max() for a in (of_arrays, of_arrays - of_vector)]
        shown = [jnp.where(is_finite, a, jnp.nan) for a in shown]
        params, states = zip(*after, strict=True)
        return list(params), list(states), shown


def _advance(state: PyTree, params: PyTree, offset: int, kept: int | None) -> PyTree:
    """Return the state with advanced counters, and with 1 for each number that is 0.

    Such a number may be a learning rate that the caller is going to set.
    """
    is_like_params, counter = _has_form(params), itertools.count()

    def advance(node: PyTree) -> PyTree:
        if is_like_params(node) or node.ndim:
            return node
        if jnp.issubdtype(node.dtype, jnp.integer) and next(counter) != kept:
            largest = np.iinfo(node.dtype).max // 2
            return node + node.dtype.type(min(offset, largest))
        is_zero = jnp.issubdtype(node.dtype, jnp.floating) and node == 0
        return jnp.ones_like(node) if is_zero else node

    return jax.tree.map(advance, state, is_leaf=is_like_params)
