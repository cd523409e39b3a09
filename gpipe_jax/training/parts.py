"""What a config describes, put together: data, network, mesh, pipeline, optimizer."""

from typing import NamedTuple

from etils import epath

from gpipe_jax import data
from gpipe_jax.config import Config, FromFiles
from gpipe_jax.data import dataset as stream
from gpipe_jax.distributed.mesh import make_mesh, simulate_devices
from gpipe_jax.pipeline import micro_batches
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.training import from_config, optimizers, writers
from gpipe_jax.training.from_config import section
from gpipe_jax.training.trainer import Trainer


class Parts(NamedTuple):
    """What a config describes."""

    config: Config
    workdir: epath.Path
    dataset: data.Dataset
    trainer: Trainer
    data: dict  # what the data set is, as `stream.identity` tells it

    @property
    def checkpoints(self) -> epath.Path:
        """The folder of the run's checkpoints."""
        return self.workdir / "checkpoints"


def assemble(config: Config, workdir: epath.PathLike, processes: int = 1) -> Parts:
    """Data, network, mesh, pipeline and optimizer of a config; trains nothing.

    Simulated devices are shared among so many processes. Raises `build.SectionError`: until the
    first step, what is wrong is the config.
    """
    if config.mesh.simulate:
        with section("mesh"):
            simulate_devices(_share(config.mesh.simulate, processes))
    with section("train"):
        writers.check(config.train.writers)
    with section("data"):
        dataset = from_config.dataset(config)
        example = next(dataset.train(0))
    with section("model"):
        layers, loss = from_config.network(config.model), from_config.loss(config.model)
    with section("mesh"):
        mesh = make_mesh(stages=config.mesh.stages, data=config.mesh.data)
    with section("pipeline"):
        options = config.pipeline.model_dump(exclude={"memory_limit_gib"})
        options["memory_limit"] = config.pipeline.memory_limit
        steps = config.train.steps
        pipe = Pipeline(layers, loss=loss, mesh=mesh, example=example, steps=steps, **options)
    if isinstance(config.data, FromFiles):
        with section("data"):
            _check_data(dataset, example, pipe, from_config.rules(config.model))
    with section("optimizer"):
        tx = optimizers.build(config.optimizer, config.train.steps)
    with section("pipeline"):  # with this optimizer it may need more than the memory limit
        trainer = Trainer(pipe, tx, ema=config.optimizer.ema)
    return Parts(config, epath.Path(workdir), dataset, trainer, stream.identity(dataset, example))


def _check_data(dataset: data.Dataset, example: dict, pipe: Pipeline, rules: data.Rules) -> None:
    """Raise DataError now for what would be found at the first step, or the first evaluation."""
    held_out = next(iter(dataset.test()), None)
    if held_out is None:
        raise data.DataError(f"the held-out data of {dataset.name} has no examples; give some")
    micro_batches.split(held_out, pipe.example, pipe.micro_batches)
    rules.check(f"the first training batch of {dataset.name}", example)
    rules.check(f"the first held-out batch of {dataset.name}", held_out)


def _share(simulated: int, processes: int) -> int:
    if simulated % processes:
        raise ValueError(
            f"`simulate` {simulated} devices do not split over {processes} processes; use a "
            f"multiple of {processes}"
        )
    return simulated // processes
