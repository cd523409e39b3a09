"""Hold a plan, and show it as a table, in a notebook, as JSON and as a picture."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpipe_jax.pipeline.summary import STAGE_HEADER, Summary, stage_row
from gpipe_jax.utils.figures import new_figure, save_figure
from gpipe_jax.utils.text import GIB, format_bytes, format_seconds

COMPILED = "compiled, not run: times are predictions from the compiler's cycle estimates"
ANALYSED = "by analysis of shapes alone, not compiled: name a topology to compile for it"


@dataclass(frozen=True)
class StagePlan:
    """Hold the figures of one stage."""

    layers: tuple[int, int]  # first and last
    first_layer: str
    cost_fraction: float  # of the backward work of all stages
    parameters: int
    boundary_bytes: int  # of its input, for one micro-batch on one replica
    padding_bytes: int  # of parameters, on its device
    forward_s: float | None = None  # for one micro-batch
    backward_s: float | None = None


@dataclass(frozen=True)
class Plan:
    """Hold what `plan` predicts for one layout.

    Times and compiled figures are None without a topology, or if the program does not compile.
    `print(plan)` shows a table of the stages and the facts of the whole plan; so does a notebook.

    Attributes:
        topology: The TPU slices that it is compiled for, as "v3:4x4".
        layout: The settings stages, data, micro_batches, schedule, chunks, remat and partition.
        parameters: The number of parameters of the network.
        batch_size: Examples of a batch (N).
        fits: Whether the program fits the devices; None if not known.
        hbm_needed_gib: Memory of a device, as compiled, or else as analysed.
        hbm_usable_gib: Memory that a program may use on a device of the topology.
        hbm_analysed_gib: Memory of a device by analysis of shapes.
        memory_gib: The analysed memory by use.
        compiled_gib: The compiled memory: arguments, temporaries, results, code.
        bubble_fraction: The idle fraction of the schedule's slots.
        imbalance: The cost of the slowest stage over the mean.
        step_time_s: The predicted time of a training step.
        time_s: The step's time by cause.
        throughput: Predicted examples per second.
        collectives: The number of collective instructions outside of loops, by kind.
        collectives_in_loops: Those in loops.
        asynchronous: Whether the permutes overlap with other instructions.
        stages: The figures of each stage.
        versions: The versions of jax, jaxlib and libtpu.
        compile_s: The time to compile the step.
        problem: Why it does not fit, or did not compile.
        warnings: What to look at.
        costs: What the cut balances, such as "operations, counted for tpu".
        config: The configuration that it is made for, if any.
    """

    topology: str | None
    layout: dict[str, Any]
    parameters: int
    batch_size: int
    fits: bool | None
    hbm_needed_gib: float
    hbm_usable_gib: float | None
    hbm_analysed_gib: float
    memory_gib: dict[str, float]
    compiled_gib: dict[str, float] | None
    bubble_fraction: float
    imbalance: float
    step_time_s: float | None
    time_s: dict[str, float] | None
    throughput: float | None
    collectives: dict[str, int] | None
    collectives_in_loops: dict[str, int] | None
    asynchronous: bool | None
    stages: list[StagePlan]
    versions: dict[str, str | None]
    compile_s: float | None = None
    problem: str | None = None
    warnings: list[str] = field(default_factory=list)
    costs: str | None = None
    config: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a dictionary for JSON.

        Returns:
            The attributes by name, and a "note" that says how the figures were obtained.
        """
        return {**asdict(self), "note": ANALYSED if self.topology is None else COMPILED}

    def __str__(self) -> str:
        return str(self._summary())

    def _repr_html_(self) -> str:
        return self._summary()._repr_html_()

    def _summary(self) -> Summary:
        times = ("forward", "backward") if self.time_s is not None else ()
        rows: list[tuple[str, ...]] = [(*STAGE_HEADER, "boundary", "padding", *times)]
        for s, stage in enumerate(self.stages):
            row = (
                *stage_row(
                    s, stage.layers, stage.first_layer, stage.cost_fraction, stage.parameters
                ),
                format_bytes(stage.boundary_bytes),
                format_bytes(stage.padding_bytes),
            )
            seconds = (stage.forward_s or 0, stage.backward_s or 0) if times else ()
            rows.append((*row, *map(format_seconds, seconds)))
        return Summary(rows, self.facts())

    def facts(self) -> dict[str, str]:
        """Return the figures of the whole plan as text, by name, in the order of printing."""
        facts = {
            "layout": ", ".join(f"{k} {v}" for k, v in self.layout.items() if k != "partition"),
            "batch": f"{self.batch_size} examples",
            "parameters": f"{self.parameters:,}",
            "balance": f"slowest stage {self.imbalance:.3f} of the mean",
            "costs": self.costs or "unknown",
            "bubble": f"{self.bubble_fraction:.1%} of the slots",
            "memory": f"{_size(self.hbm_analysed_gib)} by analysis: {_sizes(self.memory_gib)}",
        }
        warnings = {f"warning {i}": text for i, text in enumerate(self.warnings, 1)}
        if self.topology is None:
            return {**facts, **warnings, "note": ANALYSED}
        facts = {"topology": self.topology, **facts, "fits": self._fit()}
        if self.compiled_gib is not None:
            ratio = self.hbm_needed_gib / self.hbm_analysed_gib
            facts["compiled memory"] = (
                f"{_size(self.hbm_needed_gib)}, {ratio:.2f} of the analysis: "
                f"{_sizes(self.compiled_gib)}"
            )
        if self.time_s is not None and self.step_time_s is not None:
            times = ", ".join(
                f"{k.replace('_', ' ')} {format_seconds(v)}" for k, v in self.time_s.items()
            )
            facts["step"] = f"{format_seconds(self.step_time_s)} predicted: {times}"
            facts["throughput"] = f"{self.throughput:.4g} examples/s predicted"
        if self.collectives is not None and self.collectives_in_loops is not None:
            kind = "asynchronous" if self.asynchronous else "synchronous"
            inside, outside = map(_counts, (self.collectives_in_loops, self.collectives))
            facts["collectives"] = f"in loops {inside} (permutes {kind}); outside {outside}"
        facts["versions"] = ", ".join(f"{k} {v}" for k, v in self.versions.items())
        return {**facts, **warnings, "note": COMPILED}

    def _fit(self) -> str:
        if self.fits is None:
            return f"unknown ({self.problem})"
        if self.hbm_usable_gib is None:
            return "yes" if self.fits else "no"
        excess = self.hbm_needed_gib - self.hbm_usable_gib
        usable = f"{self.hbm_needed_gib:.2f} of {self.hbm_usable_gib:.2f} GiB on each device"
        return f"yes, {usable}" if self.fits else f"no, by {excess:.2f} GiB: {usable}"

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw memory by use, and time by cause if it is known.

        Args:
            path: Where to write the picture too; None writes nothing.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        panels: list[tuple[str, dict[str, float]]] = [("GiB on each device", self.memory_gib)]
        if self.time_s is not None:
            panels.append(("seconds of a step, predicted", self.time_s))
        return save_figure(_draw(panels, self.hbm_usable_gib), path, dpi=150)


def _draw(panels: list[tuple[str, dict[str, float]]], limit_gib: float | None) -> Any:
    """Draw a bar for each panel; the first has a line at `limit_gib`."""
    figure = new_figure(9, 1.2 + 1.3 * len(panels))
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for i, (ax, (title, values)) in enumerate(zip(axes, panels, strict=True)):
        left = 0.0
        for name, value in values.items():
            ax.barh(0, value, left=left, label=f"{name.replace('_', ' ')} {value:.3g}")
            left += value
        if i == 0 and limit_gib is not None:
            ax.axvline(limit_gib, color="black", linestyle="--", label=f"usable {limit_gib:.4g}")
        ax.set_yticks([])
        ax.set_title(title, fontsize=9, loc="left")
        ax.legend(fontsize=7, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.15))
    return figure


def to_gib(sizes: dict[str, int]) -> dict[str, float]:
    """Convert sizes from bytes to GiB."""
    return {name: n / GIB for name, n in sizes.items()}


def _sizes(sizes: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_size(n)}" for name, n in sizes.items())


def _size(gib: float) -> str:
    return format_bytes(gib * GIB)


def _counts(kinds: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none"
