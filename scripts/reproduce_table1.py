"""Find the largest models for a number of partitions, beside those of the GPipe paper's table 1.

    python scripts/reproduce_table1.py                    # Transformer on TPU v3
    python scripts/reproduce_table1.py --rows amoebanet   # AmoebaNet-D on TPU v2
    python scripts/reproduce_table1.py --stages 1 8 --csv table1.csv --png table1.png --json

Needs the TPU compiler (`pip install 'gpipe-jax[tpu]'`, Linux x86-64) and no TPU. It compiles whole
training steps for the paper's TPU generations, and the compiler says whether they fit. Nothing ran
on a TPU. A step takes minutes to compile; results are cached.

The paper is https://arxiv.org/abs/1811.06965. As in the paper: RMSProp with two slots,
recomputation, 32 sequences of 1024 tokens or 128 images of 224 pixels. Here: 32 and 64
micro-batches, the schedule 1F1B, and recomputation layer by layer. A partition is a core, which JAX
calls a device.
"""

import functools
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from tables import amoebanet, arguments, finish, make_compiler, transformer

from gpipe_jax.layers.shape_inference import elements
from gpipe_jax.pipeline.memory import describe
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.planner import programs
from gpipe_jax.planner.job import Job, Layout
from gpipe_jax.planner.predict import Compiler
from gpipe_jax.tpu_compiler import topologies
from gpipe_jax.tpu_compiler.results import Compiled
from gpipe_jax.training.trainer import Trainer
from gpipe_jax.utils import figures
from gpipe_jax.utils.text import GIB, text_table
from gpipe_jax.utils.trees import tree_bytes

SEQUENCES, IMAGES = 32, 128  # in a batch
MICRO_BATCHES = {"transformer": 32, "amoebanet": 64}
STEP_FILTERS = 32  # steps in which AmoebaNet gets wider than in the paper
COMPILED_RATIO = 1.4  # compiled AmoebaNets need this much more than by analysis: a first guess


class Paper(NamedTuple):
    """Hold a column of the paper's table 1: "Pipeline-K"."""

    topology: str  # ours, with at least as many devices as partitions
    size: tuple[int, ...]  # (L,) or (L, D)
    parameters: float
    memory_gib: float  # model parameters and peak activations, of all partitions together


PAPER = {
    "transformer": {  # memory as printed, in GiB
        1: Paper("v3:2x2", (13,), 785.8e6, 8.8 + 6.4),
        8: Paper("v3:2x2", (103,), 5.3e9, 59.5 + 50.9),
        32: Paper("v3:4x4", (415,), 21.0e9, 235.1 + 199.9),
        128: Paper("v3:8x8", (1663,), 83.9e9, 937.9 + 796.1),
    },
    "amoebanet": {  # memory as printed, in 1e9 bytes
        1: Paper("v2:2x2", (18, 416), 318e6, (3.8 + 3.46) * 1e9 / GIB),
        2: Paper("v2:2x2", (18, 544), 542e6, (6.45 + 8.11) * 1e9 / GIB),
        4: Paper("v2:2x2", (36, 544), 1.05e9, (12.53 + 15.21) * 1e9 / GIB),
        8: Paper("v2:2x2", (72, 512), 1.8e9, (24.62 + 26.24) * 1e9 / GIB),
    },
}


class Measured(NamedTuple):
    """Hold the figures of a compiled training step."""

    size: tuple[int, ...]
    parameters: int
    memory: dict[str, int]  # bytes of a device by analysis, by use
    compiled_bytes: int  # of a device, 0 if unknown
    fits: bool | None  # None: the compiler did not finish
    compile_s: float = 0.0
    problem: str | None = None

    @property
    def analysed_gib(self) -> float:
        """Return the memory of a device by analysis."""
        return sum(self.memory.values()) / GIB

    @property
    def compiled_gib(self) -> float:
        """Return the memory of a device as compiled."""
        return self.compiled_bytes / GIB

    @property
    def ratio(self) -> float:
        """Return compiled memory over analysed memory."""
        return self.compiled_gib / self.analysed_gib

    def __str__(self) -> str:
        fits = {True: "fits", False: "does not fit", None: "unknown"}[self.fits]
        problem = f" ({self.problem})" if self.problem else ""
        return (
            f"{named(self.size)}: {fits}{problem}, {self.compiled_gib:.2f} GiB compiled, "
            f"{self.analysed_gib:.2f} by analysis: {describe(self.memory)}"
        )


class Row(NamedTuple):
    """Hold the results for one number of partitions."""

    stages: int
    paper: Paper
    same: Measured  # the paper's size
    largest: Measured | None  # None if nothing fits


# --- measuring ------------------------------------------------------------------------------------


def measure(trainer: Trainer, size: tuple[int, ...], compiler: Compiler) -> Measured:
    """Compile a training step; return a time-out as a result too."""
    pipe, problem = trainer.pipe, None
    count = elements(pipe.shapes)
    step = Compiled("step", 0.0)
    try:
        step = compiler.compile({programs.STEP: programs.whole_step(trainer)})[programs.STEP]
    except (TimeoutError, RuntimeError) as error:
        problem = str(error).splitlines()[0]
    unknown = problem or (step.error and step.short_by_bytes is None)
    measured = Measured(
        size,
        count,
        trainer.device_bytes(),
        step.needed_bytes,
        None if unknown else step.fits,
        step.compile_s,
        problem or step.error,
    )
    print(f"K {pipe.stages.geometry.num_devices}, {measured}", flush=True)
    return measured


def largest(start: int, fits: Callable[[int], bool | None]) -> int:
    """Return the largest n that fits, trying one after the other from `start`; 0 if none fits."""
    if not fits(start):
        return next((n for n in range(start - 1, 0, -1) if fits(n)), 0)
    n = start
    while fits(n + 1):
        n += 1
    return n


def layout(model: str, stages: int) -> Layout:
    """Return the layout of a step on this many partitions."""
    return Layout(stages, micro_batches=MICRO_BATCHES[model], schedule="1f1b", remat="layer")


def analysed_gib(trainer: Trainer) -> float:
    """Return the memory of a device by analysis."""
    return sum(trainer.device_bytes().values()) / GIB


# --- Transformer ----------------------------------------------------------------------------------


def blocks(depth: int, stages: int) -> int:
    """Return L for `depth` layers on each partition, in all one less if K > 1 (as the paper)."""
    return depth * stages - 1 if stages > 1 else depth


def transformer_row(K: int, paper: Paper, compiler: Compiler) -> Row:
    """Compile the paper's L, and search for the largest from the largest by analysis."""
    limit = compiler.topology.generation.hbm_gib

    def size(depth: int) -> tuple[int]:
        return (blocks(depth, K),)

    trainer = functools.cache(
        lambda n: transformer(*size(n), SEQUENCES).build_trainer(layout("transformer", K))
    )
    compiled = functools.cache(lambda n: measure(trainer(n), size(n), compiler))
    depth = -(-paper.size[0] // K)
    same = compiled(depth)
    guess = largest(depth, lambda n: analysed_gib(trainer(n)) <= limit)
    best = largest(max(guess, 1), lambda n: compiled(n).fits)
    return Row(K, paper, same, compiled(best) if best else None)


# --- AmoebaNet ------------------------------------------------------------------------------------


def layer_bytes(pipe: Pipeline) -> list[float]:
    """Return the bytes that each layer adds: value, gradient and two slots, and its input."""
    pairs = zip(pipe.costs, pipe.shapes, strict=True)
    return [float(4 * c.parameter_bytes + tree_bytes(s.boundary)) for c, s in pairs]


def cut_by_memory(job: Job, stages: int) -> Trainer:
    """Balance memory: most parameters are in the last cells, most work in the first ones."""
    chosen = layout("amoebanet", stages)
    even = job.build_trainer(chosen, [1.0] * len(job.layers))
    return job.build_trainer(chosen, layer_bytes(even.pipe))


def amoebanet_same(K: int, size: tuple[int, ...], compiler: Compiler) -> Measured:
    """Compile the paper's size in stages of equal work, or if it does not fit, of equal memory."""
    layers, filters = size
    job = amoebanet(layers, filters, IMAGES)
    trainer = job.build_trainer(layout("amoebanet", K))
    if K == 1:
        return measure(trainer, size, compiler)
    if analysed_gib(trainer) <= compiler.topology.generation.hbm_gib:
        measured = measure(trainer, size, compiler)
        if measured.fits:
            return measured
    return measure(cut_by_memory(job, K), size, compiler)


def amoebanet_row(K: int, paper: Paper, compiler: Compiler) -> Row:
    """Compile the paper's size, and for the most partitions search for the widest that fits."""
    same = amoebanet_same(K, paper.size, compiler)
    if max(PAPER["amoebanet"]) > K:
        return Row(K, paper, same, same if same.fits else None)
    limit, (layers, filters) = compiler.topology.generation.hbm_gib, paper.size

    def size(n: int) -> tuple[int, int]:
        return layers, filters + STEP_FILTERS * (n - 1)

    trainer = functools.cache(lambda n: cut_by_memory(amoebanet(*size(n), IMAGES), K))
    guess = largest(1, lambda n: COMPILED_RATIO * analysed_gib(trainer(n)) <= limit) or 1
    compiled = functools.cache(lambda n: measure(trainer(n), size(n), compiler))
    best = largest(guess, lambda n: compiled(n).fits)
    return Row(K, paper, same, compiled(best) if best else None)


ROWS = {"transformer": transformer_row, "amoebanet": amoebanet_row}


# --- the table ------------------------------------------------------------------------------------


def named(size: Sequence[int]) -> str:
    """Format a size: `103`, or `(72, 512)`."""
    return str(size[0]) if len(size) == 1 else f"({', '.join(map(str, size))})"


def counted(parameters: float) -> str:
    """Format a number of parameters: `786M`, `5.32B`."""
    return f"{parameters / 1e9:.3g}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def table(model: str, rows: Sequence[Row]) -> str:
    """Format the paper's columns, the same sizes, and our largest ones; memory is per device."""
    size = "L" if model == "transformer" else "(L, D)"
    measured = ("fits", "GiB", "analysis", "ratio")
    header = ("K", f"paper {size}", "parameters", "GiB", "ours", *measured, "compile s")
    largest_header = (f"largest {size}", "parameters", "of paper", *measured)
    lines: list[tuple[str, ...]] = [(*header, *largest_header)]
    for row in rows:
        K, paper, same, best = row
        ours = (counted(same.parameters), *_figures(same), f"{same.compile_s:.0f}")
        theirs = (named(paper.size), counted(paper.parameters), f"{paper.memory_gib / K:.2f}")
        lines.append((str(K), *theirs, *ours, *_largest(row, best)))
    return text_table(lines, align_right=True)


def _largest(row: Row, best: Measured | None) -> tuple[str, ...]:
    if best is None:
        return ("none", "", "", "", "", "", "")
    share = f"{growth(row):.2f}"
    return (named(best.size), counted(best.parameters), share, *_figures(best))


def _figures(measured: Measured) -> tuple[str, ...]:
    fits = {True: "yes", False: "no", None: "unknown"}[measured.fits]
    gib = f"{measured.compiled_gib:.2f}" if measured.compiled_bytes else ""
    ratio = f"{measured.ratio:.2f}" if measured.compiled_bytes else ""
    return fits, gib, f"{measured.analysed_gib:.2f}", ratio


def growth(row: Row) -> float:
    """Return our largest L over the paper's; for AmoebaNet, which widens, that of parameters."""
    if row.largest is None:
        return 0.0
    if len(row.paper.size) == 1:
        return row.largest.size[0] / row.paper.size[0]
    return row.largest.parameters / row.paper.parameters


def records(model: str, rows: Sequence[Row]) -> Iterator[dict]:
    """Yield a record of each compiled size, for CSV and JSON."""
    for row in rows:
        for which, measured in (("the paper's", row.same), ("largest", row.largest)):
            if measured is None:
                continue
            yield {
                "model": model,
                "stages": row.stages,
                "topology": row.paper.topology,
                "which": which,
                "size": named(measured.size),
                "parameters": measured.parameters,
                "paper_size": named(row.paper.size),
                "paper_parameters": row.paper.parameters,
                "paper_gib": row.paper.memory_gib / row.stages,
                "growth": growth(row) if which == "largest" else 1.0,
                "fits": measured.fits,
                "compiled_gib": measured.compiled_gib or None,
                "analysed_gib": measured.analysed_gib,
                "ratio": measured.ratio or None,
                "compile_s": measured.compile_s,
                "problem": measured.problem,
                **{f"{name}_gib": size / GIB for name, size in measured.memory.items()},
            }


def draw(model: str, rows: Sequence[Row], path: Path) -> None:
    """Draw bars: parameters of the paper's and of our largest model, by number of partitions."""
    picture = figures.new_figure(6.5, 3.8)
    axes = picture.subplots()
    paper = [row.paper.parameters for row in rows]
    ours = [row.largest.parameters if row.largest else 0 for row in rows]
    for shift, label, values in ((-0.2, "GPipe paper", paper), (0.2, "gpipe-jax", ours)):
        bars = axes.bar([i + shift for i in range(len(rows))], values, 0.4, label=label)
        axes.bar_label(bars, [counted(v) if v else "none" for v in values], fontsize=8)
    axes.set_xticks(range(len(rows)), [str(row.stages) for row in rows])
    axes.set(yscale="log", xlabel="partitions (TPU cores)", ylabel="parameters")
    axes.set_title(f"{model}: largest model that fits, compiled, not run", fontsize=10)
    axes.legend(fontsize=8)
    picture.savefig(path, dpi=150)


def host_gib() -> float:
    """Return the peak memory of one process of this run: this one, or a compiler's."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(process).ru_maxrss for process in who) * unit / GIB


def main() -> None:
    """Print the table."""
    assert __doc__ is not None
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", choices=PAPER, default="transformer", help="which half of the table"
    )
    parser.add_argument(
        "--stages", type=int, nargs="+", metavar="K", help="only these numbers of partitions"
    )
    options = parser.parse_args()
    paper = PAPER[options.rows]
    selected = options.stages or list(paper)
    if unknown := set(selected) - set(paper):
        parser.error(f"--stages: {min(unknown)} is not one of {', '.join(map(str, paper))}")
    jax.config.update("jax_platforms", "cpu")  # no device is used here
    rows = []
    for K in selected:
        compiler = make_compiler(topologies.parse(paper[K].topology), options.timeout)
        rows.append(ROWS[options.rows](K, paper[K], compiler))
    print(f"\n{table(options.rows, rows)}\n")
    for row in rows:
        if not row.same.fits:
            print(f"K {row.stages}, {row.same}")
    print(f"memory of the host: at most {host_gib():.1f} GiB per process, if anything was compiled")
    figures_of_rows = list(records(options.rows, rows))
    finish(options, figures_of_rows, lambda path: draw(options.rows, rows, path))


if __name__ == "__main__":
    main()
