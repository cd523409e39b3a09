"""What a plan says: as a table, in a notebook, as JSON, as a picture."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpipe_jax.utils import text as utils_text
from gpipe_jax.utils.figures import blank, saved
from gpipe_jax.utils.text import GIB, format_bytes, format_seconds

COMPILED = "compiled, not run: times are predictions from the compiler's cycle estimates"
ANALYSED = "by analysis of shapes alone, not compiled: name a topology to compile for it"


@dataclass(frozen=True)
class StagePlan:
    """One stage."""

    layers: tuple[int, int]  # first and last
    first_layer: str
    cost: float  # part of all stages' backward work
    parameters: int
    boundary_bytes: int  # of what it gets, for one micro-batch on one replica
    padding_bytes: int  # of parameters, on its device
    forward_s: float | None = None  # one micro-batch
    backward_s: float | None = None


@dataclass(frozen=True)
class Plan:
    """What is known of a layout; times and what is compiled are None without a topology."""

    topology: str | None
    layout: dict[str, Any]  # stages, data, micro_batches, schedule, chunks, remat, partition
    parameters: int
    batch_size: int
    fits: bool | None
    hbm_needed_gib: float  # compiled, or else analysed
    hbm_usable_gib: float | None
    hbm_analysed_gib: float
    memory_gib: dict[str, float]  # analysed, by part
    compiled_gib: dict[str, float] | None  # arguments, temporaries, code
    bubble_fraction: float  # of the slots
    imbalance: float  # slowest stage over the mean
    step_time_s: float | None
    time_s: dict[str, float] | None
    throughput: float | None  # examples in a second
    collectives: dict[str, int] | None  # kind -> how many instructions, outside of loops
    collectives_in_loops: dict[str, int] | None
    asynchronous: bool | None  # whether the permutes are
    stages: list[StagePlan]
    versions: dict[str, str | None]
    compile_s: float | None = None
    problem: str | None = None  # why it does not fit, or did not compile
    warnings: list[str] = field(default_factory=list)
    config: dict[str, Any] | None = None  # that it was made for

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "note": ANALYSED if self.topology is None else COMPILED}

    def __str__(self) -> str:
        found = (f"{name}: {value}" for name, value in self.facts().items())
        return "\n".join([utils_text.text_table(self._rows()), *found])

    def _repr_html_(self) -> str:
        return utils_text.html_table(self._rows(), self.facts())

    def _rows(self) -> list[tuple[str, ...]]:
        head = ["stage", "layers", "first layer", "cost", "parameters", "boundary", "padding"]
        timed = ["forward", "backward"] if self.time_s is not None else []
        rows = [(*head, *timed)]
        for s, stage in enumerate(self.stages):
            first, last = stage.layers
            row = [
                str(s),
                f"{first}-{last}" if last > first else f"{first}",
                stage.first_layer,
                f"{stage.cost:.1%}",
                f"{stage.parameters:,}",
                format_bytes(stage.boundary_bytes),
                format_bytes(stage.padding_bytes),
            ]
            times = [format_seconds(s or 0) for s in (stage.forward_s, stage.backward_s) if timed]
            rows.append((*row, *times))
        return rows

    def facts(self) -> dict[str, str]:
        """The figures of the whole plan, by name."""
        found = {
            "layout": ", ".join(f"{k} {v}" for k, v in self.layout.items() if k != "partition"),
            "batch": f"{self.batch_size} examples",
            "parameters": f"{self.parameters:,}",
            "balance": f"slowest stage {self.imbalance:.3f} of the mean",
            "bubble": f"{self.bubble_fraction:.1%} of the slots",
            "memory": f"{_size(self.hbm_analysed_gib)} by analysis: {_sizes(self.memory_gib)}",
        }
        warnings = {f"warning {i}": text for i, text in enumerate(self.warnings, 1)}
        if self.topology is None:
            return {**found, **warnings, "note": ANALYSED}
        found = {"topology": self.topology, **found, "fits": self._fit()}
        if self.compiled_gib is not None:
            found["compiled memory"] = (
                f"{_size(self.hbm_needed_gib)}, {self.hbm_needed_gib / self.hbm_analysed_gib:.2f} "
                f"of the analysis: {_sizes(self.compiled_gib)}"
            )
        if self.time_s is not None and self.step_time_s is not None:
            parts = ", ".join(
                f"{k.replace('_', ' ')} {format_seconds(v)}" for k, v in self.time_s.items()
            )
            found["step"] = f"{format_seconds(self.step_time_s)} predicted: {parts}"
            found["throughput"] = f"{self.throughput:.4g} examples/s predicted"
        if self.collectives is not None and self.collectives_in_loops is not None:
            kind = "asynchronous" if self.asynchronous else "synchronous"
            inside, outside = map(_counts, (self.collectives_in_loops, self.collectives))
            found["collectives"] = f"in loops {inside} (permutes {kind}); outside {outside}"
        found["versions"] = ", ".join(f"{k} {v}" for k, v in self.versions.items())
        return {**found, **warnings, "note": COMPILED}

    def _fit(self) -> str:
        if self.fits is None:
            return f"unknown ({self.problem})"
        if self.hbm_usable_gib is None:
            return "yes" if self.fits else "no"
        left = self.hbm_usable_gib - self.hbm_needed_gib
        usable = f"{self.hbm_needed_gib:.2f} of {self.hbm_usable_gib:.2f} GiB on each device"
        return f"yes, {usable}" if self.fits else f"no, by {-left:.2f} GiB: {usable}"

    def plot(self, path: str | Path | None = None) -> Any:
        """Memory and time by part, as a picture; written to `path` where given."""
        panels: list[tuple[str, dict[str, float]]] = [("GiB on each device", self.memory_gib)]
        if self.time_s is not None:
            panels.append(("seconds of a step, predicted", self.time_s))
        return saved(_draw(panels, self.hbm_usable_gib), path, dpi=150)


def _draw(panels: list, limit: float | None) -> Any:
    picture = blank(9, 1.2 + 1.3 * len(panels))
    axes = picture.subplots(len(panels), 1, squeeze=False)[:, 0]
    for i, (ax, (title, parts)) in enumerate(zip(axes, panels, strict=True)):
        left = 0.0
        for name, value in parts.items():
            ax.barh(0, value, left=left, label=f"{name.replace('_', ' ')} {value:.3g}")
            left += value
        if i == 0 and limit is not None:
            ax.axvline(limit, color="black", linestyle="--", label=f"usable {limit:.4g}")
        ax.set_yticks([])
        ax.set_title(title, fontsize=9, loc="left")
        ax.legend(fontsize=7, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.15))
    return picture


def gib(parts: dict[str, int]) -> dict[str, float]:
    """Bytes in GiB."""
    return {name: n / GIB for name, n in parts.items()}


def _sizes(parts: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_size(n)}" for name, n in parts.items())


def _size(gib: float) -> str:
    return format_bytes(gib * GIB)


def _counts(kinds: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none"
