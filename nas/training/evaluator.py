"""Evaluate candidates of a search by training them; JAX is imported on use."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gpipe_jax.errors import ArgumentError
from gpipe_jax.genotypes.genotype import PAPER_OPERATIONS
from gpipe_jax.utils import paths
from gpipe_jax.utils.checks import check_count
from gpipe_jax.utils.text import did_you_mean_or_list
from nas.ask_tell import trained_values
from nas.choices import BUILDERS, DATASETS, DTYPES
from nas.evaluators.evaluator import RUNG, TRAINED_VALUES, Evaluator, Job
from nas.keywords import suggesting
from nas.spaces.space import GenotypeSpace
from nas.storage import old_names

if TYPE_CHECKING:
    from nas.training.datasets import Data, Split
    from nas.training.loop import TrainingSettings
    from nas.training.network import Network
    from nas.training.recipe import Recipe


MIN_IMAGE_SIZE = 3
"""Pixels each way; two reduction cells leave one of them."""

_NOT_IN_IDENTITY = ("folder", "timeout_s", "compilation_cache", "operations", "pairs", "run")
"""Fields that do not change a fitness, or that are the space's, which has its own identity.

`builder` is not among them: the builders draw different initial values.
"""

_COUNTS = ("cells_per_stack", "filters", "epochs", "batch_size", "final_epochs", "pairs")
_OPTIONAL_COUNTS = ("examples", "validation_images", "stop_epoch")


@suggesting(renamed=old_names.FIELDS["TrainingEvaluator"])
@dataclass(frozen=True)
class TrainingEvaluator(Evaluator):
    """Train a small network of a candidate's cells; its validation accuracy is the fitness.

    All randomness comes from the job's seed. So a result does not depend on the worker. Without
    `stop_epoch` and inheritance it does not depend on what was trained before either.

    Besides the fitness these metrics are stored: `train_loss` (mean of the last epoch),
    `parameters` (those that the architecture uses), `train_s`, and `compile_s`. The last one is the
    time before training in seconds if this evaluation compiled a program, else 0.

    The training is stochastic gradient descent with momentum. The learning rate rises linearly for
    `warmup_epochs` and then falls to zero as a cosine (Real et al., https://arxiv.org/abs/1802.01548,
    section "Experiments").

    Args:
        data: "digits", "cifar10", or the path of a .npz file with `inputs` [N, pixels, pixels,
            channels] and `labels` [N]. The test images of `gpipe train` with seed 0 are not used.
            Default: "digits".
        folder: Folder with the files of CIFAR-10. Default: the environment variable
            GPIPE_JAX_DATA.
        cells_per_stack: Normal cells in each of the three stacks (N). Default: 1.
        filters: Filters of the first stack (F). Default: 8.
        epochs: Epochs of training. Default: 20.
        batch_size: Images in a step; those that do not fill a batch are left out of an epoch.
            Default: 64.
        learning_rate: Peak learning rate. Default: 0.05.
        warmup_epochs: Epochs of linear warm-up, less than `epochs`. Default: 1.
        momentum: Decay of the velocity, in [0, 1). Default: 0.9.
        weight_decay: L2 regularization of all parameters that the architecture uses. Default: 5e-4.
        label_smoothing: Label smoothing, in [0, 1). Default: 0.
        examples: Training images. Default: all that are not held out.
        validation_images: Training images held out for validation. Default: a quarter of the
            digits, a tenth of other data.
        final_epochs: The fitness is the mean validation accuracy after each of the last
            `final_epochs` epochs. Default: 3.
        builder: "interpreter" (one program per device for all architectures) or "static" (one
            program per architecture). Default: "interpreter".
        dtype: "float32" or "bfloat16", for the computation. Parameters and scores are float32.
            Default: "float32".
        stop_epoch: Epoch after which hopeless candidates are stopped. Their fitness is the
            validation accuracy then, and the metric `stopped_at_epoch` is stored. Default: none.
        stop_quantile: A candidate is hopeless if its accuracy is below this quantile of the
            accuracies that the members of the population had after `stop_epoch`. The members are
            those at the time of the proposal. In (0, 1). Default: 0.25.
        timeout_s: Seconds of training, without compilation, checked after each epoch; more is a
            failure. The shorter one counts if the search has a `timeout_s` too. Default: no limit.
        compilation_cache: Folder in which JAX stores compiled programs between runs. Default: JAX's
            own setting (such as JAX_COMPILATION_CACHE_DIR), or else gpipe-jax/jax in the user's
            folder of caches.
        operations: Operations of the space. A search fills them in. Default: the paper's eight.
        pairs: Pairs in a cell of the space. A search fills them in. Default: 5.
        run: Folder of the run, in which trained weights are stored. A search fills it in if
            `fitness_policy` is "retrain_warm". Default: none.

    Raises:
        ValueError: An argument is not legal.

    Example::

        evaluator = nas.TrainingEvaluator(data="digits", cells_per_stack=1, filters=8, epochs=20)
        nas.search(space=nas.NASNetSpace(), evaluate=evaluator, workers="devices")
    """

    data: str = "digits"
    folder: str | None = None
    cells_per_stack: int = 1
    filters: int = 8
    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 0.05
    warmup_epochs: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    examples: int | None = None
    validation_images: int | None = None
    final_epochs: int = 3
    builder: str = "interpreter"
    dtype: str = "float32"
    stop_epoch: int | None = None
    stop_quantile: float = 0.25
    timeout_s: float | None = None
    compile_grace_s: ClassVar[float] = 1800.0
    """Seconds for compilation, which a search with a `timeout_s` allows in addition."""
    compilation_cache: str | None = None
    operations: tuple[str, ...] = PAPER_OPERATIONS
    pairs: int = 5
    run: str | None = field(default=None, compare=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; runs of versions before 0.2 have other names of fields."""
        own = [each.name for each in fields(self)]
        vars(self).update(old_names.current_fields("TrainingEvaluator", state, own))

    def __post_init__(self) -> None:
        if not isinstance(self.operations, list | tuple):
            raise ArgumentError(
                "operations",
                f"operations {self.operations!r}: expected a tuple of the space's operations; "
                "leave it out, as a search fills it in",
            )
        object.__setattr__(self, "operations", tuple(self.operations))
        _check_paths(self)
        _check_data(self.data)
        _check_counts(self)
        for name in (*_COUNTS, *_OPTIONAL_COUNTS):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, int(value))  # of NumPy: no JSON
        _check_numbers(self)
        for name, known in (("builder", BUILDERS), ("dtype", DTYPES)):
            value = getattr(self, name)
            if value not in known:
                suggestion = did_you_mean_or_list(value, known)
                raise ArgumentError(name, f"{name}: unknown {value!r}{suggestion}")
        if self.stop_epoch is not None and self.stop_epoch >= self.epochs:
            remedy = f"1 to {self.epochs - 1}" if self.epochs > 1 else "more epochs"
            raise ArgumentError(
                "stop_epoch",
                f"stop_epoch {self.stop_epoch} is not before the end, epochs {self.epochs}; use "
                f"{remedy}, or None for no stop",
            )

    # --- in the search's process ------------------------------------------------------------------

    @property
    def rivals_metric(self) -> str | None:
        """Return the metric whose values of the population's members a job gets."""
        return RUNG if self.stop_epoch is not None else None

    @property
    def identity(self) -> dict[str, Any]:
        """Return what the fitness depends on; a search resumes only with the same values."""
        identity = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name not in _NOT_IN_IDENTITY
        }
        if self.stop_epoch is None:
            del identity["stop_quantile"]
        if self.data not in DATASETS:
            identity["data"] = f"a file of SHA-256 {self._data().digest}"
        return identity

    def prepare(
        self, space: Any, folder: Path, fitness_policy: str, timeout_s: float | None
    ) -> "TrainingEvaluator":
        """Return the evaluator with the space, the folder and the time limit of a search.

        Raises:
            ValueError: It does not train the architectures of this space, or its data do not fit.
            OSError: The data cannot be read.
        """
        if not isinstance(space, GenotypeSpace):
            raise ValueError(
                f"space {space.name!r}: TrainingEvaluator trains cells of nas.NASNetSpace; use "
                "that space, or an evaluator of your own"
            )
        stores_weights = fitness_policy == "retrain_warm"
        limits = [limit for limit in (self.timeout_s, timeout_s) if limit is not None]
        evaluator = replace(
            self,
            pairs=space.pairs,
            operations=space.operations,
            run=self.run or (str(folder.absolute()) if stores_weights else None),
            timeout_s=min(limits, default=None),
        )
        evaluator.load_data()
        return evaluator

    def load_data(self) -> "Split":
        """Load the images.

        Returns:
            The images and labels of training and validation.

        Raises:
            ValueError: There are too few images, or they are too small.
            OSError: The files cannot be read.
        """
        split = self._data().split()
        count, size = split.images.shape[:2]
        if self.batch_size > count:
            raise ArgumentError(
                "batch_size",
                f"batch_size {self.batch_size} is more than the {count} training images of "
                f"{self.data}; use at most {count}",
            )
        if size < MIN_IMAGE_SIZE:
            raise ArgumentError(
                "data",
                f"the images of {self.data} are {size}x{size}, too small for two reduction cells; "
                f"use images of at least {MIN_IMAGE_SIZE}x{MIN_IMAGE_SIZE}",
            )
        return split

    def network(self) -> "Network":
        """Return the builder of the candidates' networks; raise as `load_data` does."""
        from nas.training.network import Shape

        split = self.load_data()
        shape = Shape(
            self.cells_per_stack,
            self.filters,
            image=split.images.shape[1],
            channels=split.images.shape[3],
            classes=split.classes,
            dtype=self.dtype,
        )
        if self.builder == "static":
            from nas.training.static import Static

            return Static(shape)
        from nas.training.interpreter.network import Interpreter

        return Interpreter(shape, self.operations, self.pairs)

    # --- in a worker ------------------------------------------------------------------------------

    def evaluate(self, job: Job) -> dict[str, Any]:
        """Train and validate a candidate, and store its weights if the search does.

        Returns:
            `fitness`, the metrics, and the name of the file of weights if there is one.

        Raises:
            FloatingPointError: The training diverged.
            TimeoutError: It took longer than `timeout_s`.
            TooLargeError: The device has too little memory.
        """
        from nas.training import compilation_cache, programs, weights
        from nas.training.loop import Training

        compilation_cache.use(self.compilation_cache)
        started = time.perf_counter()
        network, data = self.network(), self._data()
        architecture = network.encode(job.architecture)
        compiled, is_new = programs.get(network, self._recipe(), architecture, data)
        training = Training(compiled, architecture, self._settings(), job.seed)
        if self.run is not None and job.inherit is not None:
            training.inherit(*weights.load(Path(self.run) / job.inherit, network))
        compile_s = time.perf_counter() - started if is_new else 0.0
        result: dict[str, Any] = training.run(job.rivals)
        if self.run is not None:
            name = trained_values.file_name(job)
            weights.save(Path(self.run) / name, job.architecture, training.values)
            result[TRAINED_VALUES] = name
        return {**result, "compile_s": compile_s}

    def _data(self) -> "Data":
        from nas.training import datasets

        digest = None if self.data in DATASETS else datasets.digest(self.data)
        return datasets.Data(self.data, self.folder, self.validation_images, self.examples, digest)

    def _recipe(self) -> "Recipe":
        from nas.training.datasets import source
        from nas.training.recipe import Recipe

        return Recipe(
            self.batch_size,
            self.momentum,
            self.weight_decay,
            self.label_smoothing,
            source(self.data).augmentation,
        )

    def _settings(self) -> "TrainingSettings":
        from nas.training.loop import TrainingSettings

        return TrainingSettings(
            self.epochs,
            self.learning_rate,
            self.warmup_epochs,
            self.final_epochs,
            self.stop_epoch,
            self.stop_quantile,
            self.timeout_s,
        )


def _check_paths(evaluator: TrainingEvaluator) -> None:
    for name in ("data", "folder", "compilation_cache"):
        value = getattr(evaluator, name)
        is_path = isinstance(value, str | os.PathLike) and os.fspath(value)
        if not (is_path or (value is None and name != "data")):
            rule = "a data set, or the path of a file" if name == "data" else "a path, or None"
            raise ArgumentError(name, f"{name} {value!r}: expected {rule}")


def _check_data(name: str) -> None:
    if name in DATASETS or paths.local("data", name).exists():
        return
    hint = did_you_mean_or_list(name, DATASETS)
    raise ArgumentError(
        "data", f"data: unknown data set {name!r}{hint} or give a .npz file with inputs and labels"
    )


def _check_counts(evaluator: TrainingEvaluator) -> None:
    for name in _COUNTS:
        check_count(name, getattr(evaluator, name))
    for name in _OPTIONAL_COUNTS:
        if getattr(evaluator, name) is not None:
            check_count(name, getattr(evaluator, name))
    if evaluator.final_epochs > evaluator.epochs:
        raise ArgumentError(
            "final_epochs",
            f"final_epochs {evaluator.final_epochs} is more than epochs {evaluator.epochs}; use "
            f"at most {evaluator.epochs}",
        )


def _check_numbers(evaluator: TrainingEvaluator) -> None:
    rules: list[tuple[str, str, Callable[[Any], bool]]] = [
        ("learning_rate", "more than 0", lambda x: x > 0),
        ("warmup_epochs", f"0 or more, less than epochs {evaluator.epochs}",
         lambda x: 0 <= x < evaluator.epochs),
        ("momentum", "0 or more, less than 1", lambda x: 0 <= x < 1),
        ("weight_decay", "0 or more", lambda x: x >= 0),
        ("label_smoothing", "0 or more, less than 1", lambda x: 0 <= x < 1),
        ("stop_quantile", "more than 0, less than 1", lambda x: 0 < x < 1),
        ("timeout_s", "seconds, more than 0, or None", lambda x: x > 0),
    ]  # fmt: skip
    for name, rule, is_legal in rules:
        value: Any = getattr(evaluator, name)
        if value is None and name == "timeout_s":  # no limit
            continue
        if not (_is_number(value) and is_legal(value)):
            raise ArgumentError(name, f"{name} {value!r}: expected {rule}")
        if type(value) not in (int, float):  # of NumPy: no JSON
            object.__setattr__(evaluator, name, float(getattr(evaluator, name)))


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)
