"""Inspect the compiled training step, on CPU and for TPU pods that are not here.

The programs are compiled by the real TPU compiler (`jax[tpu]`), which needs no TPU. Nothing is run.
"""

import functools
import importlib.util

import hlo
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import NETWORKS, make_batch

import gpipe_jax as gpipe
from gpipe_jax.config.optimizers import AdamConfig

TPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'gpipe-jax[tpu]' (Linux x86-64)",
)
SLOW = pytest.mark.slow
PROGRAMS = [
    ("transformer", "cpu"),
    pytest.param("convnet", "v5e:4x4", marks=TPU),
    # The rest of both networks. The default compiles the transformer's whole step for v5e.
    pytest.param("convnet", "cpu", marks=SLOW),
    *(
        pytest.param("transformer", t, marks=[TPU, SLOW])
        for t in ("v3:4x4", "v5e:4x4", "v5p:4x4x8")
    ),
    *(pytest.param("convnet", t, marks=[TPU, SLOW]) for t in ("v3:4x4", "v5p:4x4x8")),
]


def mesh_of(topology: str, stages: int) -> jax.sharding.Mesh:
    if topology == "cpu":
        return gpipe.make_mesh(stages=stages, data=2)
    from jax.experimental import topologies

    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return gpipe.make_mesh(
        stages=stages, data=len(description.devices) // stages, devices=description.devices
    )


def small_pipeline(
    topology: str, name: str, kind: str = "1f1b", M: int = 8, K: int = 4
) -> gpipe.Pipeline:
    mesh = mesh_of(topology, K)
    return gpipe.Pipeline(
        NETWORKS[name](),
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=mesh,
        micro_batches=M,
        schedule=kind,
        example=make_batch(name, 2 * M * mesh.shape["data"]),
    )


@functools.cache
def compiled(topology: str, name: str, kind: str, M: int) -> jax.stages.Compiled:
    """Compile the whole step of four stages."""
    return small_pipeline(topology, name, kind, M).lower().compile()


def local_arrays(pipe: gpipe.Pipeline) -> list[jax.ShapeDtypeStruct]:
    """Return the shapes of the parameters that a device holds."""
    return jax.tree.leaves([storage.local_shapes() for storage in pipe.stages.params])


@pytest.mark.parametrize(("name", "topology"), PROGRAMS)
def test_only_permutes_in_loops_and_one_gradient_reduction(name: str, topology: str) -> None:
    pipe = small_pipeline(topology, name)
    text = compiled(topology, name, "1f1b", 8).as_text()
    assert text is not None
    inside, outside = hlo.collectives(text)
    assert set(hlo.kinds(inside)) == {"collective-permute"}
    assert set(hlo.kinds(outside)) <= {"all-reduce"}
    held = sum(a.size for a in local_arrays(pipe))
    sizes = [hlo.elements_reduced(line) for line in outside]
    gradient_reductions = [size for size in sizes if size > 8]
    assert len(gradient_reductions) == 1
    assert gradient_reductions[0] >= held
    assert not hlo.host_transfers(text)


@pytest.mark.parametrize(
    "topology", [pytest.param("cpu", marks=SLOW), pytest.param("v5e:4x4", marks=TPU)]
)
def test_the_whole_training_step_communicates_no_more(topology: str) -> None:
    """Add clipping, Adam and weight decay: the norm's scalar is the only new communication."""
    pipe = small_pipeline(topology, "transformer")
    config = AdamConfig(clip_norm=1.0, weight_decay=0.1)
    trainer = gpipe.Trainer(pipe, gpipe.optimizers.build(config, steps=10))
    compiled = trainer.lower().compile()
    text = compiled.as_text() or ""
    inside, outside = hlo.collectives(text)
    assert set(hlo.kinds(inside)) == {"collective-permute"}
    assert set(hlo.kinds(outside)) <= {"all-reduce"}
    held = sum(a.size for a in local_arrays(pipe))
    sizes = [hlo.elements_reduced(line) for line in outside]
    arrays = len(local_arrays(pipe))  # each has its part of the norm
    assert [size for size in sizes if size > arrays] == [held]
    assert not hlo.host_transfers(text)
    analysis = compiled.memory_analysis()
    assert analysis and analysis.alias_size_in_bytes >= 3 * 4 * held, "not in place"


def test_the_reader_sees_a_collective_in_a_loop() -> None:
    """Find a reduction at every step of a scan inside the loop, so the check above bites."""
    mesh = gpipe.make_mesh(stages=4, data=2)
    spec = jax.sharding.PartitionSpec("data")

    def add(c: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jax.lax.pcast(jax.lax.psum(c, "data"), "data", to="varying"), None

    def body(x: jax.Array) -> jax.Array:
        return jax.lax.scan(add, x, None, length=5)[0]

    mapped = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))
    inside, _ = hlo.collectives(mapped.lower(jnp.ones((2, 32))).compile().as_text() or "")
    assert hlo.kinds(inside)["all-reduce"] == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("transformer", "gpipe"), ("transformer", "1f1b")),
        *(pytest.param("convnet", kind, marks=SLOW) for kind in ("gpipe", "1f1b")),
    ],
)
def test_program_size_does_not_depend_on_the_number_of_micro_batches(name: str, kind: str) -> None:
    few, many = ((compiled("cpu", name, kind, M).as_text() or "").count("\n") for M in (8, 64))
    assert abs(many - few) <= 0.05 * few


@pytest.mark.parametrize(
    ("kind", "flat"),
    [("1f1b", True), pytest.param("eager_1f1b", True, marks=SLOW), ("gpipe", False)],
)
def test_temporary_memory_of_1f1b_does_not_depend_on_micro_batches(kind: str, flat: bool) -> None:
    def temporary(M: int) -> int:
        analysis = compiled("cpu", "transformer", kind, M).memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    few, many = temporary(8), temporary(64)
    assert (many <= 1.05 * few) == flat


def test_each_stage_is_computed_once_forward_and_recomputed_once() -> None:
    """Counting one primitive: K-1 forward branches, and K backward ones that recompute."""

    def init(key: jax.Array, x: jax.Array) -> dict:
        return {"w": jax.random.normal(key, (3,))}

    def make(i: int) -> gpipe.Layer:
        def apply(params: dict, x: jax.Array) -> jax.Array:
            return jax.lax.lgamma(jnp.abs(x * params["w"]) + 1 + i)

        return gpipe.layer(init, apply)

    batch = {"inputs": np.ones((8, 3), np.float32), "labels": np.zeros(8, np.int32)}
    pipe = gpipe.Pipeline(
        [make(i) for i in range(4)],
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=4),
        micro_batches=4,
        schedule="gpipe",
        example=batch,
    )
    state = pipe.init(0)
    jaxpr = jax.make_jaxpr(pipe.gradients)(state, pipe.split(batch), jnp.uint32(0))
    assert count(jaxpr.jaxpr, "lgamma") == 3 + 4
    forward = jax.make_jaxpr(pipe.losses)(state, pipe.split(batch))
    assert count(forward.jaxpr, "lgamma") == 4


def count(jaxpr: jax.extend.core.Jaxpr, name: str) -> int:
    inner = [
        v
        for eqn in jaxpr.eqns
        for v in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        )
    ]
    below = sum(
        count(getattr(v, "jaxpr", v), name)
        for v in inner
        if hasattr(getattr(v, "jaxpr", v), "eqns")
    )
    return below + sum(eqn.primitive.name == name for eqn in jaxpr.eqns)


def test_no_recompilation_for_a_shorter_batch() -> None:
    pipe = small_pipeline("cpu", "pytree_mlp", M=2)
    state, batch = pipe.init(0), make_batch("pytree_mlp", 8)
    step = functools.partial(pipe.value_and_grad, state)
    step(batch)
    step({name: a[:3] for name, a in batch.items()}, step=5)
    assert pipe._jitted["gradients"]._cache_size() == 1


def test_works_without_nnx_graph_mode() -> None:
    """Flax announced that it will be off by default; all else is tested with it."""
    import os
    import subprocess
    import sys

    code = (
        "import gpipe_jax as g; g.simulate_devices(2); import numpy as np;"
        "b={'inputs': np.zeros((4,5),int), 'labels': np.zeros((4,5),int)};"
        "p=g.Pipeline(g.zoo.transformer_lm(vocabulary=7,length=5,width=8,heads=2,feed_forward=8,"
        "layers=2,dropout=0.1), loss=g.losses.softmax_cross_entropy, mesh=g.make_mesh(stages=2),"
        "micro_batches=2, example=b);"
        "print(float(p.value_and_grad(p.init(0), b)[0][0]))"
    )
    env = {**os.environ, "NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert np.isfinite(float(done.stdout))
