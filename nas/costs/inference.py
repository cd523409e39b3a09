"""Analyse or compile the program of a network at inference, without running it.

To count parameters and operations starts no accelerator, which workers may need.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import export
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from gpipe_jax import errors
from gpipe_jax.genotypes.genotype import Genotype
from gpipe_jax.tpu_compiler import compiler, topologies
from gpipe_jax.tpu_compiler.results import Compiled, Program
from nas.training.network import Variables
from nas.training.static import Static


def parameters(network: Static, genotype: Genotype) -> int:
    """Count the parameters of a network."""
    shapes = [layer.shapes(None)[0] for layer in network.layers(network.encode(genotype))]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def operations(network: Static, genotype: Genotype) -> int:
    """Count the floating-point operations of convolutions and matrix products for one image."""
    function, specs = _program(network, genotype, 1)
    return count(jax.make_jaxpr(function)(*specs).jaxpr)


def count(program: Jaxpr) -> int:
    """Count the operations of a program without loops, in its form for accelerators."""
    return sum(_operations(equation) for equation in program.eqns)


def _operations(equation: JaxprEqn) -> int:
    name, settings = equation.primitive.name, equation.params
    inputs: list[Any] = [variable.aval for variable in equation.invars]
    outputs: list[Any] = [variable.aval for variable in equation.outvars]
    if name == "dot_general":
        (contracted, _), _ = settings["dimension_numbers"]
        terms = math.prod(inputs[0].shape[i] for i in contracted)
    elif name == "conv_general_dilated":
        kernel = inputs[1].shape
        terms = math.prod(kernel) // kernel[settings["dimension_numbers"].rhs_spec[0]]
    elif name == "cond":  # a choice by platform, whose last branch is the default
        return count(settings["branches"][-1].jaxpr)
    else:
        inner = (value for value in settings.values() if isinstance(value, ClosedJaxpr))
        return sum(count(value.jaxpr) for value in inner)
    return 2 * terms * math.prod(outputs[0].shape)


def compile_for(network: Static, genotype: Genotype, batch: int, topology: str) -> Compiled:
    """Compile a network for one device of a TPU slice, for a batch of images at inference."""
    function, specs = _program(network, genotype, batch)
    exported = export.export(jax.jit(function), platforms=["tpu"])(*specs)
    program = Program("a candidate", exported)
    try:
        return compiler.compile_programs([program], topologies.parse(topology))[0]
    except errors.CompilerNotInstalledError:
        raise
    except RuntimeError as error:  # this network crashed the compiler's process; others may not
        return Compiled(program.name, 0.0, error=str(error))


def _program(network: Static, genotype: Genotype, batch: int) -> tuple[Callable, tuple]:
    """Return the function from values and images to scores, and the shapes of its arguments."""
    architecture, shape = network.encode(genotype), network.shape
    values = jax.eval_shape(lambda: network.init(architecture, jax.random.key(0)))
    pixels = (batch, shape.image, shape.image, shape.channels)

    def scores(values: Variables, images: jax.Array) -> jax.Array:
        return network.apply(architecture, values, images, train=False)[0]

    return scores, (values, jax.ShapeDtypeStruct(pixels, jnp.float32))
