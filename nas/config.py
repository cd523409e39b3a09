"""What a search can be told by a file: frozen models, one default for each setting.

The loader, and what makes a section, are those of `gpipe_jax`.
"""

from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic import ValidationError as PydanticError

from gpipe_jax.config.base import (
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
from nas.evolution.evolution import Algorithm, FitnessPolicy, Settings


class NASNetConfig(Section):
    """Two cells of pairwise combinations, the space of NASNet and AmoebaNet."""

    kind: Literal["nasnet"] = "nasnet"
    pairs: Count = Field(default=5, description="pairwise combinations in a cell")
    operations: tuple[Text, ...] = Field(
        default=PAPER_OPERATIONS, description="what an element of a pair can do"
    )


class NASBench201Config(Section):
    """Cells of six edges with five operations, all of which have been trained."""

    kind: Literal["nasbench201"] = "nasbench201"


class TableConfig(Section):
    """Accuracies from the table of NAS-Bench-201."""

    kind: Literal["table"] = "table"
    folder: Text | None = Field(
        default=None,
        description="folder of nb201.npz; default: the environment variable GPIPE_JAX_DATA",
    )
    dataset: Literal["cifar10", "cifar100", "imagenet16_120"] = Field(
        default="cifar10", description="what the cells were trained on"
    )
    fitness: Literal["valid12", "test200"] = Field(
        default="valid12",
        description="valid12 (validation accuracy after 12 epochs) or test200 (test, after 200)",
    )


class FunctionConfig(Section):
    """A function of yours."""

    kind: Literal["function"] = "function"
    function: Text = Field(
        default="evaluate:evaluate",
        description="module:name of a function of an architecture that returns its fitness",
    )


class TrainingConfig(Section):
    """Real training of small networks: `nas.TrainingEvaluator`."""

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
    filters: Count = Field(default=8, description="F: width of the first stack")
    epochs: Count = Field(default=20, description="times that each image is seen")
    batch_size: Count = Field(default=64, description="images in a step")
    learning_rate: Positive = Field(
        default=0.05, description="peak; a cosine falls from it to zero"
    )
    warmup_epochs: PositiveOrZero = Field(default=1.0, description="epochs of linear warm-up")
    momentum: Fraction = Field(default=0.9, description="decay of the velocity, in [0, 1)")
    weight_decay: PositiveOrZero = Field(default=5e-4, description="L2 of all that is used")
    label_smoothing: Fraction = Field(default=0.0, description="in [0, 1)")
    examples: Count | None = Field(
        default=None, description="training images; default: all that are not held out"
    )
    validation_images: Count | None = Field(
        default=None,
        description="training images held out to judge by; default: a quarter of the digits, a "
        "tenth of others",
    )
    final_epochs: Count = Field(
        default=3, description="the fitness is the mean accuracy after so many last epochs"
    )
    builder: Literal["interpreter", "static"] = Field(
        default="interpreter",
        description="interpreter (one program for all) or static (one for each architecture)",
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="to compute in")
    stop_epoch: Count | None = Field(
        default=None, description="epoch after which hopeless candidates are stopped; default: none"
    )
    stop_quantile: Fraction = Field(
        default=0.25, gt=0, description="those below this quantile of the population's accuracies"
    )
    compilation_cache: Text | None = Field(
        default=None,
        description="folder of compiled programs; default: JAX's setting, or the user's caches",
    )


class EvolutionConfig(Section):
    """What decides the proposals: `nas.evolution.evolution.Settings`."""

    population: Count = Field(default=100, description="P: members of the population")
    sample: Count = Field(default=25, description="S: members of which the best is the parent")
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
    maximise: bool = Field(default=True, description="whether more fitness is better")
    seed: CountOrZero = Field(default=0, description="seed of all chance")

    @model_validator(mode="after")
    def _is_legal(self) -> Self:
        try:
            Settings(**dict(self))
        except ValueError as error:
            raise _problem("sample", str(error)) from error
        return self


class LimitsConfig(Section):
    """Architectures beyond these are not evaluated. The last four go with real training only."""

    params_m: Positive | None = Field(default=None, description="millions of parameters, at most")
    flops_m: Positive | None = Field(default=None, description="millions of operations, at most")
    topology: Text | None = Field(
        default=None,
        description="TPU slice, as v5e:1x1, of which the compiler tells latency and memory at "
        "inference; they are recorded, with or without limits",
    )
    batch_size: Count = Field(default=1, description="images in a batch at inference")
    latency_ms: Positive | None = Field(default=None, description="of a batch there, at most")
    memory_mib: Positive | None = Field(default=None, description="of a device there, at most")


class RunConfig(Section):
    """How long a search is, and who does the work."""

    cycles: Count = Field(default=1000, description="results in all")
    workers: Count | Text = Field(
        default=1,
        description="threads, or devices (one for each), processes, processes:4, or the address of "
        "a dask scheduler",
    )
    cache: bool | CountOrZero = Field(
        default=True,
        description="evaluate equal networks once only; or so many times before the mean answers",
    )
    target: float | None = Field(default=None, description="fitness that ends the search")
    timeout_s: Positive | None = Field(default=None, description="seconds for one evaluation")
    time_limit_s: Positive | None = Field(default=None, description="seconds for this command")
    max_failures: Count = Field(
        default=10, description="failures in a row that end the search, with the last error"
    )
    workdir: Text | None = Field(
        default=None, description="folder of the run; default: runs/<name of the config file>"
    )


class SearchConfig(Section):
    """A whole search. `space` and `evaluate` are required, the rest has defaults."""

    space: NASNetConfig | NASBench201Config = Field(
        discriminator="kind", description="what is searched"
    )
    evaluate: TableConfig | FunctionConfig | TrainingConfig = Field(
        discriminator="kind", description="what tells how good an architecture is"
    )
    evolution: EvolutionConfig = Field(default=EvolutionConfig(), description="the algorithm")
    limits: LimitsConfig = Field(default=LimitsConfig(), description="what is not evaluated")
    run: RunConfig = Field(default=RunConfig(), description="the run")

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        table = self.evaluate.kind == "table"
        if table and self.space.kind != "nasbench201":
            message = (
                f"evaluate 'table' has no cells of space {self.space.kind!r}; use evaluate.kind "
                "function, or space.kind nasbench201"
            )
            raise _problem("evaluate.kind", message)
        if self.evaluate.kind == "training" and self.space.kind != "nasnet":
            message = f"evaluate 'training' has no cells of space {self.space.kind!r}; use nasnet"
            raise _problem("evaluate.kind", message)
        problem = _misused(self.limits, self.evaluate.kind)
        if problem:
            raise _problem("limits", problem)
        if self.run.cycles < self.evolution.population:
            message = (
                f"cycles {self.run.cycles} is less than evolution.population "
                f"{self.evolution.population}; evolution begins when there are so many results"
            )
            raise _problem("run.cycles", message)
        return self


def _misused(limits: LimitsConfig, kind: str) -> str | None:
    """What is wrong with limits of such an evaluator."""
    compiled = [name for name in ("latency_ms", "memory_mib") if getattr(limits, name)]
    if kind == "function" and limits != LimitsConfig():
        return (
            "limits need evaluate.kind table or training, as of a function the size of its "
            "networks is not known; remove them, or give nas.search limits=[nas.Limit(...)]"
        )
    if kind == "table" and (compiled or limits.topology):
        return "latency and memory are not in the table; use params_m and flops_m"
    if compiled and not limits.topology:
        return f"{compiled[0]} needs a topology to compile for; give one, as v5e:1x1"
    return None


def _problem(name: str, message: str) -> PydanticError:
    """An error with its own place in the file."""
    return PydanticError.from_exception_data("SearchConfig", [cross_check(name, message)])
