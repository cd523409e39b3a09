"""Measure time and memory of a pipelined training step, as ratios to programs without it.

    python scripts/benchmark_step.py            # all, a few minutes on two cores
    python scripts/benchmark_step.py --json     # the same, with one JSON object as the last line
    python scripts/benchmark_step.py --model amoebanet    # one network

Times are medians of alternating calls in one process, on simulated CPU devices that share the
cores: they show overhead, not the speed of an accelerator. The memory row is compiled for a TPU pod
by the real compiler (needs `pip install 'gpipe-jax[tpu]'`) and has not run on one.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gpipe_jax as gpipe
from gpipe_jax import sequential
from gpipe_jax.layers import pooling, random_keys, windows
from gpipe_jax.layers.layer import Context
from gpipe_jax.utils.text import install_advice
from gpipe_jax.zoo.amoebanet import conv_norm
from gpipe_jax.zoo.transformer.layers import Block

LOSS = gpipe.losses.softmax_cross_entropy
BLOCK = dict(width=1024, heads=16, feed_forward=4096, dropout=0.0, dtype="bfloat16")


class Row(NamedTuple):
    """Hold one figure and its upper limit."""

    name: str
    value: float
    limit: float


def transformer() -> tuple[list, dict]:
    """Return layers and a batch."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 256, (32, 129))
    layers = gpipe.zoo.transformer_lm(layers=6, width=128, length=128)
    return layers, {"inputs": tokens[:, :-1], "labels": tokens[:, 1:]}


def convnet() -> tuple[list, dict]:
    """Return layers and a batch."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(128, 32, 32, 1)).astype(np.float32)
    layers = gpipe.zoo.convnet((16, 32, 64, 64), (2, 2, 2, 2))
    return layers, {"inputs": images, "labels": rng.integers(0, 10, 128)}


def amoebanet() -> tuple[list, dict]:
    """Return AmoebaNet-D with batch norm and drop-path: layers and a batch."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(64, 16, 16, 3)).astype(np.float32)
    layers = gpipe.zoo.amoebanet(
        "D", layers=6, filters=32, image=16, classes=10, stem="cifar", drop_path=0.2
    )
    return layers, {"inputs": images, "labels": rng.integers(0, 10, 64)}


MODELS = {"transformer": transformer, "convnet": convnet, "amoebanet": amoebanet}
# Time of a pipelined step over the sequential one. AmoebaNet's stages are all different.
STEP_LIMIT = {"transformer": 1.10, "convnet": 1.10, "amoebanet": 1.15}


def pipeline(layers: list, batch: dict, K: int, D: int, M: int, schedule: str) -> gpipe.Pipeline:
    """Return a pipeline of the layers."""
    mesh = gpipe.make_mesh(stages=K, data=D)
    return gpipe.Pipeline(
        layers, loss=LOSS, mesh=mesh, micro_batches=M, schedule=schedule, example=batch
    )


def step_ratio(model: str, K: int, D: int, M: int, schedule: str, repeats: int) -> float:
    """Return the time of a pipelined step over a sequential one with the same micro-batches.

    The sequential program recomputes too, except for one stage and one micro-batch. Then neither
    recomputes, and the comparison is with plain `jax.jit(jax.value_and_grad)`.
    """
    layers, batch = MODELS[model]()
    pipe = pipeline(layers, batch, K, D, M, schedule)
    ours = pipe.lower().compile()
    state, micro_batched, zero = pipe.init(0), pipe.split(batch), jnp.uint32(0)
    plain = jax.jit(
        plain_program(layers)
        if K * D * M == 1
        else sequential.value_and_grad(layers, LOSS, M * D, remat=True)
    )
    params, stats = jax.tree.map(jnp.asarray, (pipe.to_layers(state), pipe.statistics(state)))
    weights = np.ones(pipe.batch_size, np.float32)
    whole, key = {**batch, "weights": weights}, random_keys.step_key(0, 0)
    functions = [
        lambda: ours(state, micro_batched, zero),
        lambda: plain(params, stats, whole, key),
    ]
    times = time_alternately(functions, repeats)
    return times[0] / times[1]


def canonical_ratio(repeats: int) -> float:
    """Return the time of a pipelined AmoebaNet-A step over that with XLA's convolutions and pools.

    A has depthwise convolutions; D has none.
    """

    def plain_convolve(
        x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str = "SAME"
    ) -> jax.Array:
        h, w = kernel.shape[:2]
        strides = (stride, stride) if h == w else (stride if h > 1 else 1, stride if w > 1 else 1)
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)

    def step() -> Callable:
        rng = np.random.default_rng(0)
        images = rng.normal(size=(16, 32, 32, 3)).astype(np.float32)
        batch = {"inputs": images, "labels": rng.integers(0, 10, 16)}
        layers = gpipe.zoo.amoebanet("A", layers=3, filters=32, image=32, classes=10, stem="cifar")
        pipe = pipeline(layers, batch, 4, 1, 4, "gpipe")
        arguments = pipe.init(0), pipe.split(batch), jnp.uint32(0)
        compiled = pipe.lower().compile()
        return lambda: compiled(*arguments)

    def plain_form(
        form: Callable, default: Callable, shifts: windows.Windows, *arrays: jax.Array
    ) -> Any:
        del form
        return default(shifts, *arrays)

    ours, original = step(), (windows.on_cpu, conv_norm.convolve)
    windows.on_cpu = pooling.on_cpu = plain_form
    conv_norm.convolve = plain_convolve
    jax.clear_caches()
    try:
        plain = step()
    finally:
        windows.on_cpu, conv_norm.convolve = original
        pooling.on_cpu = windows.on_cpu
        jax.clear_caches()
    times = time_alternately([ours, plain], repeats)
    return times[0] / times[1]


def plain_program(layers: list) -> Callable:
    """Return the program that a user would write without a pipeline."""

    def loss(params: list, stats: list, batch: dict, key: jax.Array) -> tuple:
        x, new = batch["inputs"], []
        for layer, p, s in zip(layers, params, stats, strict=True):
            x, moments = layer.apply(p, s, x, Context(key, train=True))
            new.append(layer.commit(s, moments) if moments else s)
        return LOSS(x, batch["labels"])[0].mean(), new

    return jax.value_and_grad(loss, has_aux=True)


def time_alternately(functions: list[Callable], repeats: int) -> list[float]:
    """Return the median time of each function, called alternately to share disturbances.

    It prints the ratio of processor time of the first two as well. On shared cores, that reveals a
    program that is faster only because it uses more of them.
    """
    wall: list[list[float]] = [[] for _ in functions]
    busy: list[list[float]] = [[] for _ in functions]
    for i in range(repeats + 1):
        for k, function in enumerate(functions):
            start, processor = time.perf_counter(), time.process_time()
            jax.block_until_ready(function())
            if i:  # the first call compiles
                wall[k].append(time.perf_counter() - start)
                busy[k].append(time.process_time() - processor)
    print(f"  processor time: {statistics.median(busy[0]) / statistics.median(busy[1]):.3f}")
    return [statistics.median(times) for times in wall]


def growth_with_micro_batches(model: str, repeats: int) -> dict[str, float]:
    """Return compile time, program size and temporary memory with M = 64 over those with M = 8.

    Both have micro-batches of the same size.
    """
    layers, batch = MODELS[model]()
    micro_batch = {name: a[:2] for name, a in batch.items()}
    lowered, sizes, memory = [], [], []
    for M in (64, 8):
        example = {name: np.concatenate([a] * M) for name, a in micro_batch.items()}
        low = pipeline(layers, example, 4, 2, M, "1f1b").lower()
        compiled = low.compile()
        lowered.append(low)
        sizes.append((compiled.as_text() or "").count("\n"))
        memory.append(temporary_bytes(compiled))
    # Explicit options, although they equal the defaults, make XLA compile again.
    times = time_alternately([functools.partial(recompile, low) for low in lowered], repeats)
    return {
        "compile time": times[0] / times[1],
        "program size": sizes[0] / sizes[1],
        "temporary memory (1f1b)": memory[0] / memory[1],
    }


def temporary_bytes(compiled: Any) -> int:
    """Return the memory of one device beside a program's inputs and outputs."""
    return compiled.memory_analysis().temp_size_in_bytes


def recompile(lowered: Any) -> None:
    """Compile again, without caches."""
    jax.clear_caches()
    lowered.compile(compiler_options={"xla_embed_ir_in_executable": False})


def memory_ratio(
    topology: str, K: int, M: int, per_stage: int, shape: tuple[int, int], remat: str
) -> float:
    """Return temporary memory of a 1F1B table over that of a differentiated scan.

    A stage has `per_stage` Transformer blocks; a micro-batch has the `shape` (examples, positions).
    Both programs recompute stages, and with `remat="layer"` also layer by layer within a stage.
    """
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = gpipe.make_mesh(stages=K, data=len(devices) // K, devices=devices)
    block = gpipe.layer(Block, **BLOCK)
    B, S = shape
    batch_shape = (M * mesh.shape["data"] * B, S, BLOCK["width"])
    example = {
        name: jax.ShapeDtypeStruct(batch_shape, jnp.bfloat16) for name in ("inputs", "labels")
    }
    example["weights"] = jax.ShapeDtypeStruct(batch_shape[:1], jnp.float32)
    loss = gpipe.losses.squared_error
    pipe = gpipe.Pipeline(
        [block] * (K * per_stage),
        loss=loss,
        mesh=mesh,
        micro_batches=M,
        example=example,
        remat=remat,
    )
    baseline = differentiated_scan(block, mesh, M, per_stage, example, remat)
    temporary = [temporary_bytes(program.compile()) for program in (pipe.lower(), baseline)]
    print(f"  temporary memory on {topology}: {temporary[0] / 1e6:.0f} MB, "
          f"differentiated scan {temporary[1] / 1e6:.0f} MB", flush=True)  # fmt: skip
    return temporary[0] / temporary[1]


def differentiated_scan(
    block: Any, mesh: Any, M: int, per_stage: int, example: dict, remat: str
) -> Any:
    """Lower the usual pipeline in JAX: `jax.grad` through a scan of rematerialised stages."""
    K = mesh.shape["stage"]
    key = jax.random.key(0)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return block.apply(params, {}, x, Context(key, train=True))[0]

    layer = jax.checkpoint(apply) if remat == "layer" else apply

    def stage(params: Any, x: jax.Array) -> jax.Array:
        for i in range(per_stage):
            x = layer(jax.tree.map(lambda a, i=i: a[i], params), x)
        return x

    def body(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        params = jax.tree.map(lambda a: jax.lax.pcast(a[0], ("data",), to="varying"), params)
        k, step = jax.lax.axis_index("stage"), jax.checkpoint(stage)

        def tick(carry: jax.Array, t: jax.Array) -> tuple:
            x = jnp.where(k == 0, inputs[jnp.clip(t, 0, M - 1)], carry)
            y = step(params, x)
            return jax.lax.ppermute(y, "stage", [(j, j + 1) for j in range(K - 1)]), y

        zero = jnp.zeros(inputs.shape[1:], inputs.dtype)
        zero = jax.lax.pcast(zero, ("stage", "data"), to="varying")
        outputs = jax.lax.scan(tick, zero, jnp.arange(M + K - 1))[1][K - 1 :]
        error = jnp.square(outputs - labels).astype(jnp.float32).mean()
        return jax.lax.pmean(jax.lax.psum(jnp.where(k == K - 1, error, 0.0), "stage"), "data")

    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(P("stage"), P(None, "data"), P(None, "data")), out_specs=P()
    )
    block_params = jax.eval_shape(block.init, key, None)
    lead = NamedSharding(mesh, P("stage"))
    params = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((K, per_stage, *a.shape), a.dtype, sharding=lead),
        block_params,
    )
    split = NamedSharding(mesh, P(None, "data"))
    a = example["inputs"]
    batch = jax.ShapeDtypeStruct((M, a.shape[0] // M, *a.shape[1:]), a.dtype, sharding=split)
    return jax.jit(jax.value_and_grad(mapped)).lower(params, batch, batch)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="only this network")
    parser.add_argument("--repeats", type=int, default=7, help="steps to take the median of")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    options = parser.parse_args()
    gpipe.simulate_devices(8)
    rows = []

    def add(name: str, value: float, limit: float) -> None:
        rows.append(Row(name, value, limit))
        print(f"{name:<66}{value:>8.3f}   at most {limit:.2f}", flush=True)

    for model in [options.model] if options.model else MODELS:
        for schedule in ("gpipe", "1f1b", "eager_1f1b"):
            ratio = step_ratio(model, 4, 2, 8, schedule, options.repeats)
            name = f"{model}: step, 4 stages x 2 replicas, {schedule} / sequential"
            add(name, ratio, STEP_LIMIT[model])
        ratio = step_ratio(model, 1, 1, 1, "gpipe", options.repeats)
        add(f"{model}: step, 1 stage, 1 micro-batch / plain jit", ratio, 1.05)
        if model == "amoebanet":
            add("amoebanet: step, canonical / plain convolutions", canonical_ratio(3), 0.10)
            continue
        for quantity, ratio in growth_with_micro_batches(model, 3).items():
            add(f"{model}: {quantity}, M = 64 / M = 8", ratio, 1.05)
    if options.model not in (None, "transformer"):
        print("skipped the memory row: it is for the transformer only")
    elif importlib.util.find_spec("libtpu"):
        for blocks, shape, remat in ((1, (4, 1024), "stage"), (2, (8, 512), "layer")):
            ratio = memory_ratio("v5p:4x4x8", 16, 64, blocks, shape, remat)
            name = f"temporary memory, 1f1b / differentiated scan, {blocks} blocks a stage"
            add(f"{name}, remat {remat}", ratio, 0.70)
    else:
        print(f"skipped the memory row: it needs the TPU compiler; {install_advice('tpu')}")
    if options.json:
        print(json.dumps({row.name: row.value for row in rows}))
    sys.exit(any(row.value > row.limit for row in rows))


if __name__ == "__main__":
    main()
