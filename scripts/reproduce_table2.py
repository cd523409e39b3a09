"""Normalised training throughput, predicted from compiler cycles: the GPipe paper's table 2.

    python scripts/reproduce_table2.py
    python scripts/reproduce_table2.py --hold micro-batch --csv table2.csv --png table2.png --json
    python scripts/reproduce_table2.py --models transformer --layers-only     # the quickest
    python scripts/reproduce_table2.py --interleaved

Needs the TPU compiler (`pip install 'gpipe-jax[tpu]'`, Linux x86-64) and no TPU. Nothing ran on a
TPU: times are the compiler's cycle estimates for TPU v3, at the clock and with the links of
`gpipe_jax.tpu_compiler.topologies`. A layer takes up to a minute or two to compile and is remembered.

The paper (https://arxiv.org/abs/1811.06965) trains Transformer-48 and AmoebaNet-D (18, 256) on K
partitions with M micro-batches, and adjusts the batch to memory. Here a batch is 32 sequences or
128 images, or with `--hold micro-batch` a micro-batch is 1 sequence or 4 images, whatever M. Each
block of Transformer-48 is two layers, attention and feed-forward, which can be cut more evenly.
A layout need not fit into memory to be timed, as a step is summed up from its layers, each compiled
alone (marked * where it would not fit). For the largest M whole stages are compiled too, where they
fit (`compute.predict`).
"""

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import tables
from tables import arguments, compiling, finish

from gpipe_jax.partition import solver
from gpipe_jax.planner import predict, programs, step_time
from gpipe_jax.planner.job import Job, Layout
from gpipe_jax.planner.predict import Compiling
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
    """One prediction."""

    model: str
    layout: Layout
    batch: int
    basis: str  # "layers" or "stages", each compiled alone
    step: StepTime
    slowest: float  # stage over the mean, by these times
    optimum: float  # the least possible for the times of the layers
    analysed_gib: float
    fits: bool  # by analysis

    @property
    def key(self) -> tuple[int, int]:
        """(K, M)."""
        return self.layout.stages, self.layout.micro_batches

    @property
    def throughput(self) -> float:
        """Examples in a second."""
        return self.batch / self.step.total


# --- predicting -----------------------------------------------------------------------------------


class LayerTimes(NamedTuple):
    """Seconds of each layer on one micro-batch, compiled alone."""

    forward: list[float]
    backward: list[float]  # with recomputation


class Predictor:
    """Predictions for one model; what is compiled for one of them serves the others."""

    def __init__(self, model: str, target: Compiling) -> None:
        self.model, self.compiling = model, target
        self.layer_times = functools.cache(self._layer_times)
        self.update_rate = functools.cache(self._update_rate)

    def _layer_times(self, size: int) -> LayerTimes:
        """Of micro-batches of `size` examples."""
        job = MODELS[self.model](size)
        pipe = job.trainer(Layout(), _any_cost(job)).pipe
        found = self.compiling(programs.of_layers(pipe))
        alike = programs.first_alike(pipe)
        forward, backward = (
            [self.compiling.seconds(found[f"{name} {i}"]) for i in alike]
            for name in ("forward", "backward")
        )
        return LayerTimes(forward, backward)

    def _update_rate(self) -> float:
        """The optimizer's seconds for a byte of parameters: it goes through them one by one."""
        job = MODELS[self.model](max(STAGES))
        trainer = job.trainer(Layout(max(STAGES)), _any_cost(job))
        update = self.compiling([programs.update(trainer)])["update"]
        return self.compiling.seconds(update) / trainer.pipe.stages.params.device_bytes()

    def by_layers(self, layout: Layout, batch: int) -> Cell:
        """A step summed up from its layers."""
        times = self.layer_times(batch // layout.micro_batches)
        trainer = MODELS[self.model](batch).trainer(layout, self._cost(times))
        stages = trainer.pipe.stages
        whole = step_time.stage_times(
            *(of_stages(each, stages.geometry.layer_ranges) for each in times),
            remat=stages.remat,
        )
        step = step_time.step_time(
            stages,
            trainer.pipe.schedule,
            whole,
            self.compiling.topology,
            replicas=trainer.pipe.replicas,
            update_s=self.update_rate() * stages.params.device_bytes(),
        )
        return self._cell(layout, batch, "layers", trainer, times, whole, step)

    def by_stages(self, layout: Layout, batch: int) -> Cell:
        """A step whose stages are compiled whole; ValueError if one of them does not fit."""
        times = self.layer_times(batch // layout.micro_batches)
        job = MODELS[self.model](batch)
        trainer, found = predict.predict(job, layout, self.compiling, self._cost(times))
        return self._cell(layout, batch, "stages", trainer, times, found.stages, found.step)

    def _cost(self, times: LayerTimes) -> str | list[float]:
        """What the partition balances: AmoebaNet's layers by their cycles."""
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
        need = sum(trainer.device_bytes().values()) / GIB
        best = solver.partition(layers.backward, len(whole.backward)).imbalance
        slowest, limit = imbalance(whole.backward), self.compiling.topology.generation.hbm_gib
        found = Cell(
            self.model, layout, batch, basis, step, slowest, best, need, fits=need <= limit
        )
        print(f"{self.model}, {layout}: {step.total:.4g} s by {basis}", flush=True)
        return found


def _any_cost(job: Job) -> list[float]:
    """For a network whose cut does not matter; counting operations would take a minute."""
    return [1.0] * len(job.layers)


def of_stages(layers: Sequence[float], cuts: Sequence[range]) -> list[float]:
    """The sum over each stage's layers."""
    return [sum(layers[i] for i in cut) for cut in cuts]


def imbalance(times: Sequence[float]) -> float:
    """The slowest over the mean: 1 is even."""
    return max(times) * len(times) / sum(times)


def batch_of(model: str, micro_batches: int, hold: str) -> int:
    """Examples of a step; with "micro-batch" a micro-batch is that of the paper's largest M."""
    if hold == "batch":
        return BATCH[model]
    return BATCH[model] // max(MICRO_BATCHES) * micro_batches


# --- the tables -----------------------------------------------------------------------------------


def normalised(cells: Sequence[Cell]) -> dict[tuple[int, int], float]:
    """Throughput by (K, M), over that of the smallest K with the smallest M."""
    base = base_of(cells)
    return {cell.key: cell.throughput / base for cell in cells}


def base_of(cells: Sequence[Cell]) -> float:
    """The throughput that counts as 1: of the smallest K with the smallest M."""
    return min(cells, key=lambda cell: cell.key).throughput


def throughput_table(cells: Sequence[Cell], interleaved: Sequence[Cell] = ()) -> str:
    """A row for each M: ours beside the paper's, for each K. The last row is not in the paper."""
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
        theirs = [f"{paper.get(row[K].key, '')}" * (row[K].layout.chunks == 1) for K in stages]
        rows.append((name, *(text for pair in zip(ours, theirs, strict=True) for text in pair)))
    return text_table(rows, align_right=True)


def shares(step: StepTime) -> dict[str, float]:
    """Each part of a step, in per cent."""
    return {name: 100 * part / step.total for name, part in step._asdict().items()}


def breakdown_table(cells: Sequence[Cell]) -> str:
    """Where the time of a step goes, in per cent, and how even the stages are."""
    names = ("compute", "recompute", "imbalance", "bubble", "transfer", "update")
    head = ("K", "M", "V", "by", "step s", "examples/s", *(f"{name} %" for name in names))
    rows: list[tuple[str, ...]] = [(*head, "slowest/mean", "optimum", "GiB", "fits")]
    for cell in cells:
        parts = shares(cell.step)
        rows.append(
            (
                *map(str, (*cell.key, cell.layout.chunks)),
                cell.basis,
                f"{cell.step.total:.4g}",
                f"{cell.throughput:.4g}",
                *(f"{parts[name]:.1f}" for name in names),
                f"{cell.slowest:.3f}",
                f"{cell.optimum:.3f}",
                f"{cell.analysed_gib:.2f}",
                "yes" if cell.fits else "no",
            )
        )
    return text_table(rows, align_right=True)


def theoretical_speedup(stages: int, micro_batches: int, chunks: int) -> float:
    """Of V chunks over one, from the bubble alone: Narayanan et al. 2021, section 2.2."""
    K, M, V = stages, micro_batches, chunks
    return (M + K - 1) / ((V * M + K - 1) / V)


def interleaved_table(cells: Sequence[Cell]) -> str:
    """Speed-up over one chunk a device, predicted and theoretical."""
    rows = [("V", "schedule", "step s", "speed-up", "theoretical", "slowest/mean", "GiB", "fits")]
    for cell in cells:
        chosen = cell.layout
        speedup = cells[0].step.total / cell.step.total
        theory = theoretical_speedup(*cell.key, chosen.chunks)
        rows.append(
            (
                str(chosen.chunks),
                chosen.schedule,
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
    """A record of each prediction, for CSV and JSON; `base` is the throughput that counts as 1."""
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
            **{f"{name}_s": part for name, part in cell.step._asdict().items()},
        }


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Lines against the number of partitions, for each M; the paper's are dashed."""
    models = list(dict.fromkeys(cell.model for cell in cells))
    picture = figures.blank(5 * len(models), 3.8)
    panels = picture.subplots(1, len(models), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        own = [cell for cell in cells if cell.model == model]
        ours, paper = normalised(own), PAPER[model]
        stages, counts = (sorted({cell.key[i] for cell in own}) for i in (0, 1))
        for n, M in enumerate(counts):
            drawn = axes.plot(stages, [ours[K, M] for K in stages], "o-", label=f"M = {M}")
            known = [K for K in stages if (K, M) in paper]
            line = {"color": drawn[0].get_color(), "label": None if n else "GPipe paper"}
            axes.plot(known, [paper[K, M] for K in known], "x--", **line)
        axes.set(xlabel="partitions", ylabel="normalised throughput", xticks=stages)
        axes.set_title(f"{model}: predicted, not run", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    picture.savefig(path, dpi=150)


def draw_interleaved(cells: Sequence[Cell], path: Path) -> None:
    """Speed-up against the number of chunks."""
    picture = figures.blank(4.5, 3.6)
    axes, chunks = picture.subplots(), [cell.layout.chunks for cell in cells]
    axes.plot(chunks, [cells[0].step.total / c.step.total for c in cells], "o-", label="predicted")
    theory = [theoretical_speedup(*c.key, c.layout.chunks) for c in cells]
    axes.plot(chunks, theory, "x--", label="from the bubble alone")
    axes.set(xlabel="chunks on a device", ylabel="speed-up", xticks=chunks)
    axes.legend(fontsize=8)
    picture.savefig(path, dpi=150)


# --- what is run ----------------------------------------------------------------------------------


def run_model(model: str, options: argparse.Namespace) -> tuple[list[Cell], list[Cell]]:
    """Print one model's tables: (its cells by layers, those with more of the largest M)."""
    predictor = Predictor(model, compiling(topologies.parse(TOPOLOGY), options.timeout))
    one = functools.partial(Layout, schedule=options.schedule, remat="stage")
    cells, whole = [], []
    many = max(options.micro_batches)
    for M in options.micro_batches:
        batch = batch_of(model, M, options.hold)
        for K in options.stages:
            cells.append(predictor.by_layers(one(K, micro_batches=M), batch))
    largest = [cell for cell in cells if cell.key[1] == many]
    two = [Layout(K, 1, many, "interleaved", 2) for K in options.stages]
    twice = [predictor.by_layers(each, batch_of(model, many, options.hold)) for each in two]
    if not options.layers_only:
        whole = list(_whole_stages(predictor, largest))
    print(f"\n{model}, {options.schedule}, the {options.hold} held: throughput / the first\n")
    print(throughput_table(cells, twice))
    print("V 2: interleaved, two chunks a device")
    print("* does not fit, by analysis; the paper adjusts the batch until it does")
    print(f"\n{breakdown_table([*largest, *twice, *whole])}\n")
    if model == "amoebanet":
        print(f"in the paper imbalance takes {PAPER_IMBALANCE:.1%} of the step at K = 2\n")
    return cells, [*twice, *whole]


def _whole_stages(predictor: Predictor, cells: Sequence[Cell]) -> Iterator[Cell]:
    """The same by stages, but for those with a stage that does not fit even alone."""
    for cell in cells:
        try:
            yield predictor.by_stages(cell.layout, cell.batch)
        except (ValueError, TimeoutError) as error:
            print(f"{cell.model}, {cell.layout}: not by stages: {error}")


def run_interleaved(options: argparse.Namespace) -> list[Cell]:
    """Print Transformer-48's speed-up with several chunks a device, K = 8, M = 8."""
    predictor = Predictor("transformer", compiling(topologies.parse(TOPOLOGY), options.timeout))
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
        "--hold", choices=("batch", "micro-batch"), default="batch", help="what M leaves as it is"
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
        found = list(records(cells, cells[0].throughput))
        return finish(options, found, lambda path: draw_interleaved(cells, path))
    found, drawn = [], []
    for model in options.models:
        cells, more = run_model(model, options)
        found += records([*cells, *more], base_of(cells))
        drawn += cells
    return finish(options, found, lambda path: draw(drawn, path))


if __name__ == "__main__":
    main()
