"""Predict normalised training throughput from compiler cycles, as in the GPipe paper's table 2.

    python scripts/reproduce_table2.py
    python scripts/reproduce_table2.py --hold micro-batch --csv table2.csv --png table2.png --json
    python scripts/reproduce_table2.py --models transformer --layers-only     # the fastest
    python scripts/reproduce_table2.py --interleaved

Needs the TPU compiler (`pip install 'gpipe-jax[tpu]'`, Linux x86-64) and no TPU. Nothing ran on a
TPU: times are the compiler's cycle estimates for TPU v3, with the clock and the links of
`gpipe_jax.tpu_compiler.topologies`. A layer takes up to two minutes to compile; results are cached.

The paper (https://arxiv.org/abs/1811.06965) trains Transformer-48 and AmoebaNet-D (18, 256) on K
partitions with M micro-batches, and adjusts the batch to memory. Here a batch is 32 sequences or
128 images. With `--hold micro-batch`, a micro-batch is 1 sequence or 4 images for every M. Each
block of Transformer-48 is two layers, attention and feed-forward, which balance better.
A layout need not fit into memory to be timed: its step is the sum of its layers, each compiled
alone (* marks layouts that would not fit). For the largest M, whole stages are compiled too, if
they fit (`gpipe_jax.planner.predict.predict_step`).
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import tables
from tables import arguments, finish, make_compiler

from gpipe_jax.partition import solver
from gpipe_jax.planner import predict, programs, step_time
from gpipe_jax.planner.job import Job, Layout
from gpipe_jax.planner.predict import Compiler
from gpipe_jax.planner.step_time import StageTimes, StepTime
from gpipe_jax.tpu_compiler import topologies
from gpipe_jax.training.trainer import Trainer
from gpipe_jax.utils import figures
from gpipe_jax.utils.text import GIB, text_table

TOPOLOGY = "v3:2x2"
STAGES, MICRO_BATCHES = (2, 4, 8), (1, 4, 32)
BATCH = {"transformer": 32, "amoebanet": 128}
MODELS: dict[str, Callable[[int], Job]] = {
    "transformer": lambda batch: tables.transformer(48, batch, halves=True),
    "amoebanet": lambda batch: tables.amoebanet(18, 256, batch),
}
PAPER = {  # by (K, M); table 2's TPU columns
    "transformer": {
        (2, 1): 1.0, (4, 1): 1.07, (8, 1): 1.3,
        (2, 4): 1.7, (4, 4): 3.2, (8, 4): 4.8,
        (2, 32): 1.8, (4, 32): 3.4, (8, 32): 6.3,
    },
    "amoebanet": {
        (2, 1): 1.0, (4, 1): 1.13, (8, 1): 1.38,
        (2, 4): 1.07, (4, 4): 1.26, (8, 4): 1.72,
        (2, 32): 1.21, (4, 32): 1.84, (8, 32): 3.48,
    },
}  # fmt: skip
PAPER_IMBALANCE = 0.032  # of the step, with 2 partitions (the paper's section 4)
INTERLEAVED = ((1, "eager_1f1b"), (2, "interleaved"), (4, "interleaved"))  # (V, schedule)


class Cell(NamedTuple):
    """Hold one prediction."""

    model: str
    layout: Layout
    batch: int
    basis: str  # "layers" or "stages", each compiled alone
    step: StepTime
    slowest: float  # the slowest stage over the mean, by these times
    optimum: float  # the least possible for the times of the layers
    analysed_gib: float
    fits: bool  # by analysis

    @property
    def key(self) -> tuple[int, int]:
        """Return (K, M)."""
        return self.layout.stages, self.layout.micro_batches

    @property
    def throughput(self) -> float:
        """Return examples per second."""
        return self.batch / self.step.total


# --- predicting -----------------------------------------------------------------------------------


class LayerTimes(NamedTuple):
    """Hold the seconds of each layer for one micro-batch, compiled alone."""

    forward: list[float]
    backward: list[float]  # with recomputation


class Predictor:
    """Predict for one model; predictions share what is compiled."""

    def __init__(self, model: str, compiler: Compiler) -> None:
        self.model, self.compiler = model, compiler
        self.layer_times = functools.cache(self._layer_times)
        self.update_rate = functools.cache(self._update_rate)

    def _layer_times(self, size: int) -> LayerTimes:
        """Return the times for micro-batches of `size` examples."""
        job = MODELS[self.model](size)
        pipe = job.build_trainer(Layout(), _any_cost(job)).pipe
        compiled = self.compiler.compile(programs.of_layers(pipe))
        representatives = programs.representatives(pipe)
        forward, backward = (
            [
                self.compiler.seconds(compiled[programs.LayerBranch(operation, i)])
                for i in representatives
            ]
            for operation in programs.BOTH
        )
        return LayerTimes(forward, backward)

    def _update_rate(self) -> float:
        """Return the optimizer's seconds per byte of parameters: it is elementwise."""
        job = MODELS[self.model](max(STAGES))
        trainer = job.build_trainer(Layout(max(STAGES)), _any_cost(job))
        update = self.compiler.compile({programs.UPDATE: programs.update(trainer)})[programs.UPDATE]
        return self.compiler.seconds(update) / trainer.pipe.stages.params.device_bytes()

    def by_layers(self, layout: Layout, batch: int) -> Cell:
        """Predict a step as the sum of its layers."""
        times = self.layer_times(batch // layout.micro_batches)
        trainer = MODELS[self.model](batch).build_trainer(layout, self._cost(times))
        stages = trainer.pipe.stages
        whole = step_time.stage_times(
            of_stages(times.forward, stages.geometry.layer_ranges),
            of_stages(times.backward, stages.geometry.layer_ranges),
            remat=stages.remat,
        )
        step = step_time.step_time(
            stages,
            trainer.pipe.schedule,
            whole,
            self.compiler.topology,
            replicas=trainer.pipe.replicas,
            update_s=self.update_rate() * stages.params.device_bytes(),
        )
        return self._cell(layout, batch, "layers", trainer, times, whole, step)

    def by_stages(self, layout: Layout, batch: int) -> Cell:
        """Predict a step from whole compiled stages; raise ValueError if one does not fit."""
        times = self.layer_times(batch // layout.micro_batches)
        job = MODELS[self.model](batch)
        cost = self._cost(times)
        trainer, predicted = predict.predict_step(job, layout, self.compiler, cost)
        return self._cell(layout, batch, "stages", trainer, times, predicted.stages, predicted.step)

    def _cost(self, times: LayerTimes) -> str | list[float]:
        """Return what the partition balances: for AmoebaNet the cycles of its layers."""
        return times.backward if self.model == "amoebanet" else "flops"

    def _cell(
        self,
        layout: Layout,
        batch: int,
        basis: str,
        trainer: Trainer,
        layers: LayerTimes,
        whole: StageTimes,
        step: StepTime,
    ) -> Cell:
        needed_gib = sum(trainer.device_bytes().values()) / GIB
        cell = Cell(
            self.model,
            layout,
            batch,
            basis,
            step,
            slowest=imbalance(whole.backward),
            optimum=solver.partition(layers.backward, len(whole.backward)).imbalance,
            analysed_gib=needed_gib,
            fits=needed_gib <= self.compiler.topology.generation.hbm_gib,
        )
        print(f"{self.model}, {layout}: {step.total:.4g} s by {basis}", flush=True)
        return cell


def _any_cost(job: Job) -> list[float]:
    """Return costs for a partition that does not matter; counting FLOPs would take a minute."""
    return [1.0] * len(job.layers)


def of_stages(layers: Sequence[float], layer_ranges: Sequence[range]) -> list[float]:
    """Sum over each stage's layers."""
    return [sum(layers[i] for i in layer_range) for layer_range in layer_ranges]


def imbalance(times: Sequence[float]) -> float:
    """Return the slowest over the mean; 1 is balanced."""
    return max(times) * len(times) / sum(times)


def batch_of(model: str, micro_batches: int, hold: str) -> int:
    """Return the batch size; with "micro-batch", micro-batches are those of the largest M."""
    if hold == "batch":
        return BATCH[model]
    return BATCH[model] // max(MICRO_BATCHES) * micro_batches


# --- the tables -----------------------------------------------------------------------------------


def normalised(cells: Sequence[Cell]) -> dict[tuple[int, int], float]:
    """Return throughput by (K, M), over that of the smallest K with the smallest M."""
    base = base_of(cells)
    return {cell.key: cell.throughput / base for cell in cells}


def base_of(cells: Sequence[Cell]) -> float:
    """Return the throughput that counts as 1: of the smallest K with the smallest M."""
    return min(cells, key=lambda cell: cell.key).throughput


def throughput_table(cells: Sequence[Cell], interleaved: Sequence[Cell] = ()) -> str:
    """Format a row for each M: ours beside the paper's, for each K; the last is not the paper's."""
    paper, base = PAPER[cells[0].model], base_of(cells)
    stages = sorted({cell.key[0] for cell in cells})
    rows = [("M", *(name for K in stages for name in (f"K {K}", "paper")))]
    named: dict[str, dict[int, Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.key[::-1]):
        named.setdefault(str(cell.key[1]), {})[cell.key[0]] = cell
    for cell in interleaved:
        named.setdefault(f"{cell.key[1]}, V {cell.layout.chunks}", {})[cell.key[0]] = cell
    for name, row in named.items():
        ours = [f"{row[K].throughput / base:.2f}{'' if row[K].fits else '*'}" for K in stages]
        theirs = [
            f"{paper.get(row[K].key, '')}" if row[K].layout.chunks == 1 else "" for K in stages
        ]
        rows.append((name, *(text for pair in zip(ours, theirs, strict=True) for text in pair)))
    return text_table(rows, align_right=True)


def shares(step: StepTime) -> dict[str, float]:
    """Return the percentage of each cause in a step's time."""
    return {name: 100 * seconds / step.total for name, seconds in step._asdict().items()}


def breakdown_table(cells: Sequence[Cell]) -> str:
    """Format the causes of a step's time in per cent, and the balance of the stages."""
    names = ("compute", "recompute", "imbalance", "bubble", "transfer", "update")
    header = ("K", "M", "V", "by", "step s", "examples/s", *(f"{name} %" for name in names))
    rows: list[tuple[str, ...]] = [(*header, "slowest/mean", "optimum", "GiB", "fits")]
    for cell in cells:
        percent = shares(cell.step)
        rows.append(
            (
                *map(str, (*cell.key, cell.layout.chunks)),
                cell.basis,
                f"{cell.step.total:.4g}",
                f"{cell.throughput:.4g}",
                *(f"{percent[name]:.1f}" for name in names),
                f"{cell.slowest:.3f}",
                f"{cell.optimum:.3f}",
                f"{cell.analysed_gib:.2f}",
                "yes" if cell.fits else "no",
            )
        )
    return text_table(rows, align_right=True)


def theoretical_speedup(stages: int, micro_batches: int, chunks: int) -> float:
    """Return the speed-up of V chunks by the bubble alone: Narayanan et al. 2021, section 2.2."""
    K, M, V = stages, micro_batches, chunks
    return (M + K - 1) / ((V * M + K - 1) / V)


def interleaved_table(cells: Sequence[Cell]) -> str:
    """Format the speed-up over one chunk per device, predicted and theoretical."""
    rows = [("V", "schedule", "step s", "speed-up", "theoretical", "slowest/mean", "GiB", "fits")]
    for cell in cells:
        layout = cell.layout
        speedup = cells[0].step.total / cell.step.total
        theory = theoretical_speedup(*cell.key, layout.chunks)
        rows.append(
            (
                str(layout.chunks),
                layout.schedule,
                f"{cell.step.total:.4g}",
                f"{speedup:.3f}",
                f"{theory:.3f}",
                f"{cell.slowest:.3f}",
                f"{cell.analysed_gib:.2f}",
                "yes" if cell.fits else "no",
            )
        )
    return text_table(rows, align_right=True)


def records(cells: Sequence[Cell], base: float) -> Iterator[dict]:
    """Yield a record of each prediction, for CSV and JSON; `base` is the throughput of 1."""
    for cell in cells:
        K, M = cell.key
        yield {
            "model": cell.model,
            "stages": K,
            "micro_batches": M,
            "chunks": cell.layout.chunks,
            "schedule": cell.layout.schedule,
            "remat": cell.layout.remat,
            "batch": cell.batch,
            "basis": cell.basis,
            "step_s": cell.step.total,
            "throughput": cell.throughput,
            "normalised": cell.throughput / base,
            "paper": PAPER[cell.model].get((K, M)) if cell.layout.chunks == 1 else None,
            "slowest_over_mean": cell.slowest,
            "optimum": cell.optimum,
            "analysed_gib": cell.analysed_gib,
            "fits": cell.fits,
            **{f"{name}_s": seconds for name, seconds in cell.step._asdict().items()},
        }


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draw throughput against the number of partitions, for each M; the paper's is dashed."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    picture = figures.new_figure(5 * len(models), 3.8)
    panels = picture.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        own = [cell for cell in cells if cell.model == model]
        ours, paper = normalised(own), PAPER[model]
        stages, counts = (sorted({cell.key[i] for cell in own}) for i in (0, 1))
        for n, M in enumerate(counts):
            drawn = axes.plot(stages, [ours[K, M] for K in stages], "o-", label=f"M = {M}")
            known = [K for K in stages if (K, M) in paper]
            label = None if n else "GPipe paper"
            values = [paper[K, M] for K in known]
            axes.plot(known, values, "x--", color=drawn[0].get_color(), label=label)
        axes.set(xlabel="partitions", ylabel="normalised throughput", xticks=stages)
        axes.set_title(f"{model}: predicted, not run", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    picture.savefig(path, dpi=150)


def draw_interleaved(cells: Sequence[Cell], path: Path) -> None:
    """Draw the speed-up against the number of chunks."""
    picture = figures.new_figure(4.5, 3.6)
    axes, chunks = picture.subplots(), [cell.layout.chunks for cell in cells]
    axes.plot(chunks, [cells[0].step.total / c.step.total for c in cells], "o-", label="predicted")
    theory = [theoretical_speedup(*c.key, c.layout.chunks) for c in cells]
    axes.plot(chunks, theory, "x--", label="from the bubble alone")
    axes.set(xlabel="chunks on a device", ylabel="speed-up", xticks=chunks)
    axes.legend(fontsize=8)
    picture.savefig(path, dpi=150)


# --- the runs -------------------------------------------------------------------------------------


def run_model(model: str, options: argparse.Namespace) -> tuple[list[Cell], list[Cell]]:
    """Print one model's tables; return its cells by layers, and the others of the largest M."""
    predictor = Predictor(model, make_compiler(topologies.parse(TOPOLOGY), options.timeout))
    layout_of = functools.partial(Layout, schedule=options.schedule, remat="stage")
    cells, whole = [], []
    many = max(options.micro_batches)
    for M in options.micro_batches:
        batch = batch_of(model, M, options.hold)
        for K in options.stages:
            cells.append(predictor.by_layers(layout_of(K, micro_batches=M), batch))
    largest = [cell for cell in cells if cell.key[1] == many]
    layouts = [Layout(K, 1, many, "interleaved", 2) for K in options.stages]
    batch = batch_of(model, many, options.hold)
    interleaved = [predictor.by_layers(layout, batch) for layout in layouts]
    if not options.layers_only:
        whole = list(_whole_stages(predictor, largest))
    print(f"\n{model}, {options.schedule}, the {options.hold} held: throughput / the first\n")
    print(throughput_table(cells, interleaved))
    print("V 2: interleaved, two chunks per device")
    print("* does not fit, by analysis; the paper adjusts the batch until it does")
    print(f"\n{breakdown_table([*largest, *interleaved, *whole])}\n")
    if model == "amoebanet":
        print(f"in the paper imbalance takes {PAPER_IMBALANCE:.1%} of the step at K = 2\n")
    return cells, [*interleaved, *whole]


def _whole_stages(predictor: Predictor, cells: Sequence[Cell]) -> Iterator[Cell]:
    """Predict the same by stages, except where a stage alone does not fit."""
    for cell in cells:
        try:
            yield predictor.by_stages(cell.layout, cell.batch)
        except (ValueError, TimeoutError) as error:
            print(f"{cell.model}, {cell.layout}: not by stages: {error}")


def run_interleaved(options: argparse.Namespace) -> list[Cell]:
    """Print Transformer-48's speed-up with several chunks per device, K = 8, M = 8."""
    predictor = Predictor("transformer", make_compiler(topologies.parse(TOPOLOGY), options.timeout))
    batch = batch_of("transformer", 8, options.hold)
    cells = [
        predictor.by_layers(Layout(8, 1, 8, schedule, V), batch) for V, schedule in INTERLEAVED
    ]
    print(f"\ntransformer, K 8, M 8, a batch of {batch}\n\n{interleaved_table(cells)}\n")
    return cells


def main() -> None:
    """Print the tables."""
    assert __doc__ is not None
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--stages", type=int, nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=MICRO_BATCHES)
    parser.add_argument("--schedule", choices=("gpipe", "1f1b", "eager_1f1b"), default="gpipe")
    parser.add_argument(
        "--hold",
        choices=("batch", "micro-batch"),
        default="batch",
        help="what stays the same for all M",
    )
    parser.add_argument(
        "--layers-only", action="store_true", help="compile no whole stages, which takes longest"
    )
    parser.add_argument(
        "--interleaved", action="store_true", help="instead: Transformer-48 with 1, 2, 4 chunks"
    )
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # no device is used here
    if options.interleaved:
        cells = run_interleaved(options)
        rows = list(records(cells, cells[0].throughput))
        return finish(options, rows, lambda path: draw_interleaved(cells, path))
    rows, drawn = [], []
    for model in options.models:
        cells, more = run_model(model, options)
        rows += records([*cells, *more], base_of(cells))
        drawn += cells
    return finish(options, rows, lambda path: draw(drawn, path))


if __name__ == "__main__":
    main()
