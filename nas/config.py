"""Define the configuration of a search: immutable sections, with one default for each setting.

The loader and the base class of sections are those of `gpipe_jax`.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic import ValidationError as PydanticError

from gpipe_jax.config.base import (
    Configuration,
    Count,
    CountOrZero,
    Fraction,
    LocalPath,
    Positive,
    PositiveOrZero,
    Problems,
    Section,
    Text,
    cross_check,
)
from gpipe_jax.genotypes.genotype import PAPER_OPERATIONS
from gpipe_jax.utils.choices import FOLDER_VARIABLE
from nas.choices import (
    COMPILED_COSTS,
    DATASETS,
    Builder,
    Direction,
    Dtype,
    TableDataset,
    check_directions,
)
from nas.evolution.evolution import Algorithm, FitnessPolicy, Settings
from nas.evolution.length import length as length_of
from nas.evolution.length import too_short


class NASNetConfig(Section):
    """Search for two cells of pairwise combinations, in the space of NASNet and AmoebaNet."""

    kind: Literal["nasnet"] = "nasnet"
    pairs: Count = Field(default=5, description="pairwise combinations in a cell")
    operations: tuple[Text, ...] = Field(
        default=PAPER_OPERATIONS, description="operations that an element of a pair can be"
    )


class NASBench201Config(Section):
    """Search for cells of six edges with five operations, all of which have been trained."""

    kind: Literal["nasbench201"] = "nasbench201"


class TableConfig(Section):
    """Look accuracies up in the table of NAS-Bench-201."""

    kind: Literal["table"] = "table"
    folder: LocalPath | None = Field(
        default=None,
        description=f"folder of nb201.npz; default: the environment variable {FOLDER_VARIABLE}",
    )
    dataset: TableDataset = Field(
        default="cifar10", description="data set that the cells were trained on"
    )
    fitness: Literal["valid12", "test200"] = Field(
        default="valid12",
        description="valid12 (validation accuracy after 12 epochs) or test200 (test, after 200)",
    )


class FunctionConfig(Section):
    """Call a function of yours."""

    kind: Literal["function"] = "function"
    function: Text = Field(
        default="evaluate:evaluate",
        description="module:name of a function that takes an architecture and returns its fitness; "
        "the module is imported, also from the current folder",
    )


class TrainingConfig(Section):
    """Train small networks of the cells: `nas.TrainingEvaluator`."""

    kind: Literal["training"] = "training"
    data: LocalPath = Field(
        default="digits",
        description=f"{', '.join(DATASETS)}, or a .npz file with inputs and labels",
    )
    folder: LocalPath | None = Field(
        default=None,
        description=f"folder of cifar10's files; default: the environment variable "
        f"{FOLDER_VARIABLE}",
    )
    cells_per_stack: Count = Field(
        default=1, description="N: normal cells in each of the three stacks"
    )
    filters: Count = Field(default=8, description="F: filters of the first stack")
    epochs: Count = Field(default=20, description="epochs of training")
    batch_size: Count = Field(default=64, description="images in a step")
    learning_rate: Positive = Field(
        default=0.05, description="peak learning rate, which falls to zero as a cosine"
    )
    warmup_epochs: PositiveOrZero = Field(default=1.0, description="epochs of linear warm-up")
    momentum: Fraction = Field(default=0.9, description="decay of the velocity, in [0, 1)")
    weight_decay: PositiveOrZero = Field(
        default=5e-4, description="L2 regularization of the parameters that are used"
    )
    label_smoothing: Fraction = Field(default=0.0, description="label smoothing, in [0, 1)")
    examples: Count | None = Field(
        default=None, description="training images; default: all that are not held out"
    )
    validation_images: Count | None = Field(
        default=None,
        description="training images held out for validation; default: a quarter of the digits, a "
        "tenth of others",
    )
    final_epochs: Count = Field(
        default=3,
        description="the fitness is the mean validation accuracy after each of the last epochs, "
        "this many",
    )
    builder: Builder = Field(
        default="interpreter",
        description="interpreter (one program for all) or static (one for each architecture)",
    )
    dtype: Dtype = Field(default="float32", description="type of the computation")
    stop_epoch: Count | None = Field(
        default=None, description="epoch after which hopeless candidates are stopped; default: none"
    )
    stop_quantile: Fraction = Field(
        default=0.25,
        gt=0,
        description="a candidate below this quantile of the population's accuracies is hopeless",
    )
    compilation_cache: LocalPath | None = Field(
        default=None,
        description="folder of compiled programs; default: JAX's setting, or the user's caches",
    )


class EvolutionConfig(Section):
    """Set what decides the proposals: `nas.Settings`."""

    population: Count | None = Field(
        default=None,
        description="P: members of the population; default: 100, or half of run.cycles (or of "
        "run.evaluations) if that is less than 100",
    )
    sample: Count | None = Field(
        default=None,
        description="S: members in a tournament, whose best wins; default: 25, or a quarter of "
        "such a smaller population",
    )
    replacement: bool = Field(
        default=True, description="whether a sample is drawn with replacement"
    )
    algorithm: Algorithm = Field(
        default="aging",
        description="aging, non_aging (the worst of the parent's sample leaves), elitist (the "
        "worst of all leaves) or random",
    )
    fitness_policy: FitnessPolicy = Field(
        default="stored", description="whether sampled members are trained again, and from what"
    )
    maximise: bool = Field(default=True, description="whether a higher fitness is better")
    seed: CountOrZero = Field(default=0, description="seed of all randomness")

    @model_validator(mode="after")
    def _is_legal(self) -> Self:
        try:
            Settings(**{name: value for name, value in self if value is not None})
        except ValueError as error:
            problem = cross_check("sample", str(error))
            raise PydanticError.from_exception_data("EvolutionConfig", [problem]) from error
        return self


class LimitsConfig(Section):
    """Do not evaluate architectures beyond these. The last four need `evaluate.kind: training`."""

    params_m: Positive | None = Field(default=None, description="millions of parameters, at most")
    flops_m: Positive | None = Field(default=None, description="millions of operations, at most")
    topology: Text | None = Field(
        default=None,
        description="TPU slice such as v5e:1x1 for which the compiler estimates latency and memory "
        "at inference; they are recorded, with or without limits",
    )
    batch_size: Count = Field(default=1, description="images in a batch at inference")
    latency_ms: Positive | None = Field(default=None, description="time of such a batch, at most")
    memory_mib: Positive | None = Field(default=None, description="memory of the device, at most")


class RunConfig(Section):
    """Set how long a search is, and who does the work."""

    cycles: Count | None = Field(
        default=None,
        description="results in total, with answers of the cache; default: 1000, or ten times "
        "`evaluations`",
    )
    evaluations: Count | None = Field(
        default=None,
        description="evaluations in total; failures and answers of the cache do not count",
    )
    workers: Count | Text = Field(
        default=1,
        description="number of threads, or devices (one for each), processes, processes:4, or the "
        "address of a dask scheduler",
    )
    cache: bool | CountOrZero = Field(
        default=True,
        description="whether equal networks are evaluated only once; a number: this many times, "
        "after which their mean is the result",
    )
    target: float | None = Field(default=None, description="fitness that ends the search")
    timeout_s: Positive | None = Field(default=None, description="seconds for one evaluation")
    time_limit_s: Positive | None = Field(default=None, description="seconds for this command")
    max_failures: Count = Field(
        default=10, description="consecutive failures that end the search, with the last error"
    )
    directions: Annotated[dict[Text, Direction] | None, BeforeValidator(check_directions)] = Field(
        default=None,
        description="what is better in metrics of which reports show a Pareto front, such as "
        "{latency_ms: min, top5: max}; default: less, in metrics with such names as params_m",
    )
    workdir: LocalPath | None = Field(
        default=None, description="folder of the run; default: runs/<name of the config file>"
    )


# --- rules between sections -----------------------------------------------------------------------


def _evaluator_fits_space(
    space: NASNetConfig | NASBench201Config,
    evaluate: TableConfig | FunctionConfig | TrainingConfig,
) -> Problems:
    message = f"evaluate {evaluate.kind!r} has no cells of space {space.kind!r}; use "
    if evaluate.kind == "table" and space.kind != "nasbench201":
        message += "evaluate.kind function or training, or space.kind nasbench201"
        return [("evaluate.kind", message)]
    if evaluate.kind == "training" and space.kind != "nasnet":
        return [("evaluate.kind", f"{message}space.kind nasnet")]
    return []


def _limits_fit_evaluator(
    limits: LimitsConfig, evaluate: TableConfig | FunctionConfig | TrainingConfig
) -> Problems:
    compiled = [name for name in COMPILED_COSTS if getattr(limits, name) is not None]
    if evaluate.kind == "function" and limits != LimitsConfig():
        message = (
            "limits need evaluate.kind table or training, because the size of a function's "
            "networks is unknown; remove them, or call nas.search(limits=[nas.Limit(...)])"
        )
        return [("limits", message)]
    if evaluate.kind == "table" and (compiled or limits.topology):
        return [("limits", "latency and memory are not in the table; use params_m and flops_m")]
    if compiled and not limits.topology:
        message = f"{compiled[0]} needs a topology to compile for; add one, such as v5e:1x1"
        return [("limits", message)]
    return []


def _evolution_begins(run: RunConfig, evolution: EvolutionConfig) -> Problems:
    length, population = length_of(run.cycles, run.evaluations), evolution.population
    if population is None or evolution.algorithm == "random" or length.smaller >= population:
        return []
    name = "cycles" if length.smaller == length.cycles else "evaluations"
    return [(f"run.{name}", too_short(length, population, "evolution."))]


class SearchConfig(Configuration):
    """Configure a whole search. `space` and `evaluate` are required, the rest has defaults."""

    space: NASNetConfig | NASBench201Config = Field(
        discriminator="kind", description="what is searched"
    )
    evaluate: TableConfig | FunctionConfig | TrainingConfig = Field(
        discriminator="kind", description="how an architecture's fitness is measured"
    )
    evolution: EvolutionConfig = Field(default=EvolutionConfig(), description="the algorithm")
    limits: LimitsConfig = Field(
        default=LimitsConfig(), description="which architectures are not evaluated"
    )
    run: RunConfig = Field(default=RunConfig(), description="the run")

    rules = (_evaluator_fits_space, _limits_fit_evaluator, _evolution_begins)
    renamed: ClassVar = {
        "evaluate.cells": "evaluate.cells_per_stack",
        "evaluate.validation": "evaluate.validation_images",
        "evaluate.validations": "evaluate.final_epochs",
    }
