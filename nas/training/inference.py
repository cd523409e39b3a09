"""A network at inference, as a program that is analysed or compiled, but not run."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import export

from gpipe_jax.genotype import OPERATIONS, Genotype
from gpipe_jax.planning import accelerators, compiler, libtpu
from gpipe_jax.planning.compiled import Compiled, Program
from nas.training.interpreter import Interpreter
from nas.training.network import Architecture, Shape, Values
from nas.training.static import Static


def parameters(shape: Shape, genotype: Genotype) -> int:
    """How many there are: a millisecond, once the first of its shape has been counted."""
    network, count = _counter(shape, len(genotype.normal.pairs))
    return int(count(network.encode(genotype)))


@functools.lru_cache(maxsize=4)
def _counter(shape: Shape, pairs: int) -> tuple[Interpreter, Callable]:
    network = Interpreter(shape, tuple(OPERATIONS), pairs)

    def count(architecture: Architecture) -> jax.Array:
        used = jax.tree.leaves(network.used(architecture))
        return sum((jnp.sum(leaf, dtype=jnp.int32) for leaf in used), jnp.int32(0))

    return network, jax.jit(count)


def operations(network: Static, genotype: Genotype) -> float:
    """Floating-point operations for one image, as XLA counts them."""
    function, specs = _program(network, genotype, 1)
    analysis = jax.jit(function).lower(*specs).cost_analysis() or {}
    return float(analysis.get("flops", 0.0))


def compile_for(network: Static, genotype: Genotype, batch: int, topology: str) -> Compiled:
    """For one device of such a TPU slice."""
    function, specs = _program(network, genotype, batch)
    exported = export.export(jax.jit(function), platforms=["tpu"])(*specs)
    program = Program("a candidate", exported)
    where = accelerators.parse(topology)
    try:
        return compiler.compile_programs([program], where)[0]
    except libtpu.NotInstalledError:
        raise
    except RuntimeError as error:  # the compiler's process died: of this network, not of all
        return Compiled(program.name, 0.0, error=str(error))


def _program(network: Static, genotype: Genotype, batch: int) -> tuple[Callable, tuple]:
    """Scores of a batch of images, and the shapes of its arguments."""
    architecture, shape = network.encode(genotype), network.shape
    values = jax.eval_shape(lambda: network.init(architecture, jax.random.key(0)))
    pixels = (batch, shape.image, shape.image, shape.channels)

    def scores(values: Values, images: jax.Array) -> jax.Array:
        return network.apply(architecture, values, images, train=False)[0]

    return scores, (values, jax.ShapeDtypeStruct(pixels, jnp.float32))
