"""Run the loop of a training run: steps, evaluations and checkpoints, each when it is due."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from gpipe_jax.checkpoint.manifest import RunInfo
from gpipe_jax.distributed import processes
from gpipe_jax.distributed.preemption import StopRequest
from gpipe_jax.errors import DivergedError, StoppedError
from gpipe_jax.pipeline.state import TrainState
from gpipe_jax.run_folder.folder import METRICS, RunFolder
from gpipe_jax.training import metrics, resume
from gpipe_jax.training.fitting import callbacks
from gpipe_jax.training.from_config import Assembly
from gpipe_jax.training.profiling import Profile
from gpipe_jax.training.writers import Writer
from gpipe_jax.utils.messages import say


class TrainingLoop:
    """Train, and keep what has been evaluated and saved."""

    def __init__(
        self,
        assembly: Assembly,
        folder: RunFolder,
        restored: resume.Restored | None,
        show: Callable[[dict], None],
        stop: StopRequest,
        writers: Sequence[Writer] = (),
    ) -> None:
        from gpipe_jax.checkpoint.save import Saver  # Orbax takes two seconds

        self.assembly, self.folder, self.stop = assembly, folder, stop
        config = assembly.config.train
        self.current = restored.state if restored else assembly.first_state()
        self.saved_step: int | None = restored.manifest.step if restored else None
        # The evaluation of the current step, if it is done.
        self.evaluation = restored.manifest.metrics if restored else None
        self.ended = False  # whether a callback has ended the run before its last step
        if restored and processes.is_first():
            for line in resume.describe(restored):
                say(line)
            resume.set_aside(restored)
        path = assembly.workdir / METRICS if processes.is_first() else None
        self.log = metrics.MetricsLog(
            path,
            config.log_every,
            self.current.step,
            evaluated=self.evaluation is not None,
            show=show,
            writers=writers,
        )
        traces = assembly.workdir / "profile" if processes.is_first() else None
        profile = assembly.config.profile
        self.profile = Profile(profile.start, profile.steps, traces)
        self.saver = Saver(
            assembly.checkpoints,
            keep=config.keep,
            keep_best=config.keep_best,
            unusable=restored.newer if restored else (),
        )
        for record in self.log.records:
            self.saver.note(record["step"], record)
        # A run that resumes stops where it would have stopped without the interruption.
        earlier = [record for record in self.log.records if record["step"] < self.current.step]
        callbacks.replay(assembly.callbacks, earlier)

    def run(self) -> None:
        """Train to the last step, and evaluate and save when it is due.

        Raises:
            StoppedError: The run was stopped. Its state is saved.
            DivergedError: A loss, or the state after an update, is not finite.
            DataError: A batch is invalid. A single process saves the completed steps first.
            SaveError: A checkpoint, or the metrics, could not be written.
            RunInUseError: Another run has taken the folder.
        """
        trainer, config = self.assembly.trainer, self.assembly.config.train
        rows = trainer.pipe.rows
        own_rows = rows if len(rows) < trainer.pipe.batch_size else None
        first_step = self.current.step
        batches = self.assembly.dataset.train(first_step, own_rows)

        def stopped(step: int) -> bool:
            self.stop.has_unsaved = step > first_step
            return self.stop.should_stop() or self.ended

        save_every = config.save_every or config.eval_every
        if self.evaluation is not None:  # a resumed run ends again where a callback ended it
            self._call_back({"step": first_step, **self.evaluation})
        while True:
            step, stopping = self.current.step, self._evaluate_if_due()
            if stopping or self.ended or step == self._next(step - 1, save_every):
                self._save()
            if stopping:
                raise self._stopped()
            if step == config.steps or self.ended:
                return self._finish()
            due = min(self._next(step, config.eval_every), self._next(step, save_every))
            due = min(due, self.profile.until(step) or due)
            with self._saving_before_errors(), self.profile.over(step):
                self._fit(batches, due, stopped)
            if self.current.step < due and not self.ended:
                self._save()
                raise self._stopped()

    def _next(self, step: int, every: int) -> int:
        """Return the next step after `step` at which something is due."""
        return min((step // every + 1) * every, self.assembly.config.train.steps)

    def _evaluate_if_due(self) -> bool:
        """Evaluate, if it is due at this step; return whether the run was stopped meanwhile."""
        step, trainer = self.current.step, self.assembly.trainer
        is_due = self.ended or step == self._next(step - 1, self.assembly.config.train.eval_every)
        if step == 0 or not is_due:
            return False
        if self.evaluation is not None:
            return False
        try:
            with self._saving_before_errors():
                figures = evaluate(self.assembly, self.current, self.stop)
        except StoppedError:
            return True
        trainer.divergence.check_loss("held-out loss", step, figures["test_loss"])
        self.log.evaluation({"step": step, **figures})
        self.evaluation = figures
        with self._saving_before_errors():
            self._call_back({"step": step, **figures})
        return False

    def _record(self, record: dict) -> None:
        self.log.step(record)
        self._call_back(record)

    def _call_back(self, record: dict) -> None:
        """Call the callbacks of the config; the run ends if one of them returns true."""
        self.ended = callbacks.call(self.assembly.callbacks, record) or self.ended

    def _fit(self, batches: Iterator[dict], due: int, stopped: Callable[[int], bool]) -> None:
        """Train until `due`, or until an error."""
        trainer = self.assembly.trainer
        try:
            self._reach(trainer.fit(self.current, batches, due, self._record, stopped=stopped))
        except Exception:
            if trainer.reached is not None:
                self._reach(trainer.reached)
            raise

    def _reach(self, state: TrainState) -> None:
        if state.step > self.current.step:
            self.evaluation, self.stop.has_unsaved = None, True
        self.current = state

    @contextlib.contextmanager
    def _saving_before_errors(self) -> Iterator[None]:
        """Save the completed steps if an error in the block, such as a bad batch, ends the run.

        Several processes save nothing: the error may be in one, and saving takes all of them.
        """
        try:
            yield
        except (DivergedError, StoppedError):
            raise
        except Exception:
            if jax.process_count() == 1:
                self._save_reached()
            raise

    def _save_reached(self) -> None:
        """Save the completed steps; only print a problem with that, so the error stays visible."""
        step = self.current.step
        try:
            if step in (0, self.saved_step) or not self.assembly.trainer.is_finite(self.current):
                return
            self._save()
            self._finish()
        except Exception as error:
            say(f"step {step} cannot be saved before the run ends: {error}")
        else:
            say(f"step {step} is saved before the run ends; the same command resumes from it")

    def _save(self) -> None:
        """Begin to save, unless this step is saved, or there is nothing to save."""
        step, trainer = self.current.step, self.assembly.trainer
        if step in (0, self.saved_step):
            self.saver.note(step, self.evaluation)  # after a stop in the evaluation
            return
        with trainer.timings.spend("checkpoint"):
            self.folder.check()
            self.log.sync()
            info = RunInfo(
                step,
                self.assembly.config.model_dump(mode="json"),
                metrics=self.evaluation,
                data=self.assembly.data_identity,
                cut=list(trainer.pipe.partition.boundaries),
            )
            descriptions = [str(layer) for layer in trainer.pipe.layers]
            self.saver.save(trainer.to_layers(self.current), info, descriptions)
        if self.saved_step is not None:  # the saver has waited for it
            self.folder.note_saved()
        self.saved_step = step

    def _finish(self) -> None:
        with self.assembly.trainer.timings.spend("checkpoint"):
            self.saver.wait()
        if self.saved_step is not None:
            self.folder.note_saved()

    def _stopped(self) -> StoppedError:
        self._finish()
        step = self.current.step
        when = f"after step {step}, which is saved" if step else "before the first step"
        return StoppedError(f"stopped {when}; run the same command again to resume")


def evaluate(
    assembly: Assembly, current: TrainState, stop: StopRequest | None = None
) -> dict[str, float]:
    """Compute loss and metrics on the held-out data; a `stop` raises StoppedError."""
    trainer = assembly.trainer

    def batches() -> Iterator[dict]:
        for batch in assembly.dataset.test():
            if stop is not None and stop.should_stop():
                raise StoppedError("stopped during an evaluation")
            yield batch

    with trainer.timings.spend("evaluation"):
        figures = trainer.evaluate(trainer.evaluated(current), batches())
    if assembly.config.data.is_bytes:
        figures["bits_per_byte"] = figures["test_loss"] / float(np.log(2))
    return figures
