"""The loop of a training run: steps, evaluations and checkpoints, each when it is due."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from gpipe_jax.checkpoint.format import RunInfo
from gpipe_jax.config import TextConfig
from gpipe_jax.distributed import processes
from gpipe_jax.distributed.preemption import Stop
from gpipe_jax.errors import DataError, StoppedError
from gpipe_jax.pipeline.state import TrainState
from gpipe_jax.training import metrics, resume, writers
from gpipe_jax.training.from_config import Assembly
from gpipe_jax.training.profiling import Profile
from gpipe_jax.utils.console import say


class TrainingLoop:
    """The loop of a training run, and where it stands."""

    def __init__(
        self,
        parts: Assembly,
        restored: resume.Restored | None,
        show: Callable[[dict], None],
        stop: Stop,
        told: Sequence[writers.Writer] = (),
    ) -> None:
        from gpipe_jax.checkpoint.save import Saver  # Orbax takes two seconds

        self.parts, self.stop, config = parts, stop, parts.config.train
        self.current = restored.state if restored else parts.trainer.init(config.seed)
        self.saved: int | None = restored.manifest.step if restored else None
        self.evaluated = restored.manifest.metrics if restored else None
        if restored and processes.is_first():
            for line in resume.describe(restored):
                say(line)
            resume.set_aside(restored)
        path = parts.workdir / "metrics.jsonl" if processes.is_first() else None
        done = self.evaluated is not None
        self.log = metrics.MetricsLog(path, config.log_every, self.current.step, done, show, told)
        traces = parts.workdir / "profile" if processes.is_first() else None
        self.profile = Profile(parts.config.profile.start, parts.config.profile.steps, traces)
        self.saver = Saver(parts.checkpoints, keep=config.keep, keep_best=config.keep_best)
        for record in self.log.records:
            self.saver.note(record["step"], record)

    def to_the_end(self) -> None:
        """Train, evaluate and save, each when it is due. Raises StoppedError once it is saved."""
        trainer, config = self.parts.trainer, self.parts.config.train
        rows = trainer.pipe.rows
        some = rows if len(rows) < trainer.pipe.batch_size else None
        batches = self.parts.dataset.train(self.current.step, some)
        begun = self.current.step

        def stopped(step: int) -> bool:
            self.stop.unsaved = step > begun
            return self.stop.reached()

        while True:
            step, stopping = self.current.step, self._evaluate_if_due()
            if stopping or step == self._next(step - 1, config.save_every or config.eval_every):
                self._save()
            if stopping:
                raise self._stopped()
            if step == config.steps:
                return self._finish()
            due = self._next(step, config.eval_every)
            due = min(due, self._next(step, config.save_every or config.eval_every))
            due = min(due, self.profile.until(step) or due)
            with self.profile.over(step):
                self.current = trainer.fit(self.current, batches, due, self.log.step, stopped)
            if self.current.step > step:
                self.evaluated, self.stop.unsaved = None, True
            if self.current.step < due:
                self._save()
                raise self._stopped()

    def _next(self, step: int, every: int) -> int:
        """The next step after `step` that something is due at."""
        return min((step // every + 1) * every, self.parts.config.train.steps)

    def _evaluate_if_due(self) -> bool:
        """Evaluate, if it is the step for it; whether the run was told to stop meanwhile."""
        step, trainer = self.current.step, self.parts.trainer
        if step == 0 or step != self._next(step - 1, self.parts.config.train.eval_every):
            return False
        if self.evaluated is not None:
            return False
        try:
            figures = evaluate(self.parts, self.current, self.stop)
        except StoppedError:
            return True
        except DataError:
            # Of several processes the others may read well, and would not come to save.
            if jax.process_count() == 1:
                self._save()
                self._finish()
            raise
        trainer.check_finite("held-out loss", step, figures["test_loss"])
        self.log.evaluation({"step": step, **figures})
        self.evaluated = figures
        return False

    def _save(self) -> None:
        """Begin to save, unless this step is saved, or there is nothing to save."""
        step, trainer = self.current.step, self.parts.trainer
        if step in (0, self.saved):
            self.saver.note(step, self.evaluated)  # after a stop in the evaluation
            return
        with trainer.timings.spend("checkpoint"):
            self.log.sync()
            config = self.parts.config.model_dump(mode="json")
            info = RunInfo(step, config, metrics=self.evaluated, data=self.parts.data)
            descriptions = [str(layer) for layer in trainer.pipe.layers]
            self.saver.save(trainer.to_layers(self.current), info, descriptions)
        self.saved = step

    def _finish(self) -> None:
        with self.parts.trainer.timings.spend("checkpoint"):
            self.saver.wait()

    def _stopped(self) -> StoppedError:
        self._finish()
        step = self.current.step
        after = f"after step {step}, which is saved" if step else "before the first step"
        return StoppedError(f"stopped {after}; the same command goes on")


def evaluate(parts: Assembly, current: TrainState, stop: Stop | None = None) -> dict[str, float]:
    """Loss and metrics on the held-out data. Raises StoppedError if that is wished for."""
    trainer = parts.trainer

    def batches() -> Iterator[dict]:
        for batch in parts.dataset.test():
            if stop is not None and stop.reached():
                raise StoppedError("stopped during an evaluation")
            yield batch

    with trainer.timings.spend("evaluation"):
        figures = trainer.evaluate(trainer.evaluated(current), batches())
    if isinstance(parts.config.data, TextConfig):
        figures["bits_per_byte"] = figures["test_loss"] / float(np.log(2))
    return figures
