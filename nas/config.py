"""Define the configuration of a search: immutable sections, with one default for each setting.

The loader and the base class of sections are those of `gpipe_jax`.
"""

from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic import ValidationError as PydanticError

from gpipe_jax.config.base import (
    Configuration,
    Count,
    CountOrZero,
    Fraction,
    Positive,
    PositiveOrZero,
    Section,
    Text,
    cross_check,
)
from gpipe_jax.genotypes.genotype import PAPER_OPERATIONS
from nas.choices import Builder, Dtype
from nas.evolution.evolution import Algorithm, FitnessPolicy, Settings


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
    folder: Text | None = Field(
        default=None,
        description="folder of nb201.npz; default: the environment variable GPIPE_JAX_DATA",
    )
    dataset: Literal["cifar10", "cifar100", "imagenet16_120"] = Field(
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
        description="module:name of a function that takes an architecture and returns its fitness",
    )


class TrainingConfig(Section):
    """Train small networks of the cells: `nas.TrainingEvaluator`."""

    kind: Literal["training"] = "training"
    data: Text = Field(
        default="digits", description="digits, cifar10, or a .npz file with inputs and labels"
    )
    folder: Text | None = Field(
        default=None,
        description="folder of cifar10's files; default: the environment variable GPIPE_JAX_DATA",
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
    compilation_cache: Text | None = Field(
        default=None,
        description="folder of compiled programs; default: JAX's setting, or the user's caches",
    )


class EvolutionConfig(Section):
    """Set what decides the proposals: `nas.Settings`."""

    population: Count = Field(default=100, description="P: members of the population")
    sample: Count = Field(default=25, description="S: members in a tournament, whose best wins")
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
            Settings(**dict(self))
        except ValueError as error:
            raise _problem("sample", str(error)) from error
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

    cycles: Count = Field(default=1000, description="results in total")
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
    workdir: Text | None = Field(
        default=None, description="folder of the run; default: runs/<name of the config file>"
    )


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

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        table = self.evaluate.kind == "table"
        if table and self.space.kind != "nasbench201":
            message = (
                f"evaluate 'table' has no cells of space {self.space.kind!r}; use evaluate.kind "
                "function or training, or space.kind nasbench201"
            )
            raise _problem("evaluate.kind", message)
        if self.evaluate.kind == "training" and self.space.kind != "nasnet":
            message = (
                f"evaluate 'training' has no cells of space {self.space.kind!r}; use space.kind "
                "nasnet"
            )
            raise _problem("evaluate.kind", message)
        problem = _limits_problem(self.limits, self.evaluate.kind)
        if problem:
            raise _problem("limits", problem)
        if self.run.cycles < self.evolution.population:
            message = (
                f"cycles {self.run.cycles} is less than evolution.population "
                f"{self.evolution.population}, and evolution begins after that many results; use "
                f"at least {self.evolution.population}"
            )
            raise _problem("run.cycles", message)
        return self


def _limits_problem(limits: LimitsConfig, kind: str) -> str | None:
    """Return what is wrong with limits for this kind of evaluator, or None."""
    compiled = [name for name in ("latency_ms", "memory_mib") if getattr(limits, name) is not None]
    if kind == "function" and limits != LimitsConfig():
        return (
            "limits need evaluate.kind table or training, because the size of a function's "
            "networks is unknown; remove them, or call nas.search(limits=[nas.Limit(...)])"
        )
    if kind == "table" and (compiled or limits.topology):
        return "latency and memory are not in the table; use params_m and flops_m"
    if compiled and not limits.topology:
        return f"{compiled[0]} needs a topology to compile for; add one, such as v5e:1x1"
    return None


def _problem(name: str, message: str) -> PydanticError:
    """Return an error that has its own place in the file."""
    return PydanticError.from_exception_data("SearchConfig", [cross_check(name, message)])
