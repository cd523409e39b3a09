"""Training as an evaluator of a search: see `TrainingEvaluator`. JAX is loaded when it is used."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gpipe_jax.genotypes.genotype import PAPER_OPERATIONS
from nas.ask_tell import trained_values
from nas.evaluators.evaluator import TRAINED_VALUES, Evaluator, Job
from nas.storage import old_names
from nas.training.options import BUILDERS, DATASETS, DTYPES, RUNG, check_data

if TYPE_CHECKING:
    from nas.training.datasets import Data, Split
    from nas.training.loop import Course
    from nas.training.network import Network
    from nas.training.recipe import Recipe


SMALLEST = 3
"""Pixels each way: two reduction cells make one of them."""

_AIDS = ("folder", "timeout_s", "compilation_cache", "operations", "pairs", "run")
"""Fields that leave a fitness as it is: where files are, how long it may take; and what is the
space's, which has a name for it. The builders draw other initial values, and so are no aid."""


@dataclass(frozen=True)
class TrainingEvaluator(Evaluator):
    """Trains a small network of a candidate's cells; its fitness is the validation accuracy.

        nas.search(space=nas.NASNetSpace(), workers="devices",
                   evaluate=nas.TrainingEvaluator(data="digits", cells_per_stack=1, filters=8, epochs=20))

    All chance comes from the job's seed, so that a candidate's result depends neither on the worker
    nor, without `stop_epoch` and inheritance, on what was trained before. Recorded beside the
    fitness: `train_loss` (mean of the last epoch), `parameters` (those that the architecture uses),
    `train_s`, and `compile_s`: the seconds before, if this evaluation was the first to need a
    program, else 0. With the interpreter all architectures share one program for each device;
    "static" compiles each by itself.
    """

    data: str = "digits"
    """digits, cifar10, or a .npz file with `inputs` and `labels`. Test images are left alone."""
    folder: str | None = None
    """Where the files of cifar10 are; default: the environment variable GPIPE_JAX_DATA."""
    cells_per_stack: int = 1
    """Normal cells in each of the three stacks (N)."""
    filters: int = 8
    """Of the first stack (F)."""
    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 0.05
    """At its highest: after `warmup_epochs`, from where it falls as a cosine to zero."""
    warmup_epochs: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """L2, of all entries that the architecture uses, and of no others."""
    label_smoothing: float = 0.0
    examples: int | None = None
    """Training images; default: all that are not held out."""
    validation_images: int | None = None
    """Images held out to judge by; default: a quarter of the digits, a tenth of others."""
    final_epochs: int = 3
    """The fitness is the mean of the accuracies after so many last epochs."""
    builder: str = "interpreter"
    dtype: str = "float32"
    """To compute in, float32 or bfloat16; parameters and scores are float32."""
    stop_epoch: int | None = None
    """After so many epochs hopeless candidates are stopped: those whose validation accuracy is
    below the `stop_quantile` of what the population's members had then, when the candidate was
    proposed. Their fitness is that accuracy, and the metric `stopped_at_epoch` says so."""
    stop_quantile: float = 0.25
    timeout_s: float | None = None
    """Seconds of training, without compiling; more is a failure. Looked at after each epoch. If the
    search has a limit too, the shorter one counts."""
    grace_s: ClassVar[float] = 1800.0
    """Seconds that compiling may take besides, before a search with `timeout_s` gives it up."""
    compilation_cache: str | None = None
    """Folder in which JAX keeps compiled programs between runs. Default: JAX's own setting (such as
    JAX_COMPILATION_CACHE_DIR), or else gpipe-jax/jax in the user's folder of caches."""
    operations: tuple[str, ...] = PAPER_OPERATIONS
    pairs: int = 5
    """Of the space's cells, as is `operations`; a search fills both in."""
    run: str | None = field(default=None, compare=False)
    """The run's folder, in which trained values are kept; a search fills it in if they are."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; runs of versions before 0.2 have other names of fields."""
        vars(self).update(old_names.current_fields("TrainingEvaluator", state))

    def __post_init__(self) -> None:
        object.__setattr__(self, "operations", tuple(self.operations))
        check_data(self.data)
        _check_counts(self)
        _check_numbers(self)
        for name, known in (("builder", BUILDERS), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                given = repr(getattr(self, name))
                raise ValueError(f"{name}: unknown {given}; known: {', '.join(known)}")
        last = self.epochs - 1
        if self.stop_epoch is not None and self.stop_epoch > last:
            raise ValueError(
                f"stop_epoch {self.stop_epoch} is not before the end, epochs {self.epochs}; give "
                f"{f'1 to {last}' if last else 'more epochs'}, or None for no stop"
            )

    # --- the search's side ------------------------------------------------------------------------

    @property
    def compares(self) -> str | None:
        """The metric of the population's members that jobs are to be told."""
        return RUNG if self.stop_epoch is not None else None

    @property
    def goes_by(self) -> dict[str, Any]:
        """What the fitness depends on; a search goes on with the same only."""
        aids = {*_AIDS, *(("stop_quantile",) if self.stop_epoch is None else ())}
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in aids}
        if self.data not in DATASETS:
            found["data"] = f"a file of SHA-256 {self._data().digest}"
        return found

    def in_search(
        self, space: Any, folder: Path, fitness_policy: str, timeout_s: float | None
    ) -> "TrainingEvaluator":
        """As a search uses it; ValueError or OSError says what it cannot train, or on what."""
        if not hasattr(space, "pairs") or not hasattr(space, "operations"):
            raise ValueError(
                f"space {space.name!r}: TrainingEvaluator trains cells of nas.NASNetSpace; use "
                "that, or an evaluator of your own"
            )
        keeps = str(folder.absolute()) if fitness_policy == "retrain_warm" else None
        limits = [limit for limit in (self.timeout_s, timeout_s) if limit is not None]
        found = replace(
            self,
            pairs=space.pairs,
            operations=space.operations,
            run=self.run or keeps,
            timeout_s=min(limits, default=None),
        )
        found.data_fits()
        return found

    def data_fits(self) -> "Split":
        """The images; ValueError or OSError says why there is no training on them."""
        found = self._data().split()
        count, size = found.images.shape[:2]
        if self.batch_size > count:
            raise ValueError(
                f"batch_size {self.batch_size} is more than the {count} training images of "
                f"{self.data}; give {count} or less"
            )
        if size < SMALLEST:
            raise ValueError(
                f"the images of {self.data} are {size}x{size}, too small for two reduction cells; "
                f"give images of {SMALLEST}x{SMALLEST} or more"
            )
        return found

    def network(self) -> "Network":
        """The builder of the candidates' networks."""
        from nas.training.network import Shape

        found = self.data_fits()
        size, _, channels = found.images.shape[1:]
        shape = Shape(
            self.cells_per_stack, self.filters, size, channels, found.classes, dtype=self.dtype
        )
        if self.builder == "static":
            from nas.training.static import Static

            return Static(shape)
        from nas.training.interpreter.network import Interpreter

        return Interpreter(shape, self.operations, self.pairs)

    # --- the worker's side ------------------------------------------------------------------------

    def evaluate(self, job: Job) -> dict[str, Any]:
        """Train, validate, and keep the trained values if the search does."""
        from nas.training import compilation_cache as cache
        from nas.training import programs, weights
        from nas.training.loop import Training

        cache.use(self.compilation_cache)
        begun = time.perf_counter()
        network, data = self.network(), self._data()
        architecture = network.encode(job.architecture)
        compiled, is_new = programs.get(network, self._recipe(), architecture, data)
        training = Training(compiled, architecture, self._course(), job.seed)
        if self.run is not None and job.inherit is not None:
            training.inherit(*weights.load(Path(self.run) / job.inherit, network))
        compile_s = time.perf_counter() - begun if is_new else 0.0
        found: dict[str, Any] = training.run(job.rivals)
        if self.run is not None:
            name = trained_values.file_name(job)
            weights.save(Path(self.run) / name, job.architecture, training.values)
            found[TRAINED_VALUES] = name
        return {**found, "compile_s": compile_s}

    def _data(self) -> "Data":
        from nas.training import datasets

        digest = None if self.data in DATASETS else datasets.digest(self.data)
        return datasets.Data(self.data, self.folder, self.validation_images, self.examples, digest)

    def _recipe(self) -> "Recipe":
        from nas.training.datasets import source
        from nas.training.recipe import Recipe

        rest = (self.momentum, self.weight_decay, self.label_smoothing)
        return Recipe(self.batch_size, *rest, source(self.data).augmentation)

    def _course(self) -> "Course":
        from nas.training.loop import Course

        return Course(
            self.epochs,
            self.learning_rate,
            self.warmup_epochs,
            self.final_epochs,
            self.stop_epoch,
            self.stop_quantile,
            self.timeout_s,
        )


def _check_counts(given: TrainingEvaluator) -> None:
    for name in ("cells_per_stack", "filters", "epochs", "batch_size", "final_epochs", "pairs"):
        _check_count(name, getattr(given, name))
    for name in ("examples", "validation_images", "stop_epoch"):
        if getattr(given, name) is not None:
            _check_count(name, getattr(given, name))
    if given.final_epochs > given.epochs:
        raise ValueError(
            f"final_epochs {given.final_epochs} is more than epochs {given.epochs}; give "
            f"{given.epochs} or less"
        )


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} {value!r}: expected a whole number of at least 1")


def _check_numbers(given: TrainingEvaluator) -> None:
    rules: list[tuple[str, str, Callable[[Any], bool]]] = [
        ("learning_rate", "more than 0", lambda x: x > 0),
        ("warmup_epochs", f"0 or more, less than epochs {given.epochs}",
         lambda x: 0 <= x < given.epochs),
        ("momentum", "0 or more, less than 1", lambda x: 0 <= x < 1),
        ("weight_decay", "0 or more", lambda x: x >= 0),
        ("label_smoothing", "0 or more, less than 1", lambda x: 0 <= x < 1),
        ("stop_quantile", "more than 0, less than 1", lambda x: 0 < x < 1),
        ("timeout_s", "seconds, more than 0, or None", lambda x: x > 0),
    ]  # fmt: skip
    for name, rule, is_legal in rules:
        value: Any = getattr(given, name)
        unlimited = value is None and name == "timeout_s"
        if not (unlimited or (_is_number(value) and is_legal(value))):
            raise ValueError(f"{name} {value!r}: expected {rule}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
