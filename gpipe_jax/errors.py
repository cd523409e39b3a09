"""Define every exception that a caller may catch; this module imports nothing."""

from collections.abc import Sequence


class ConfigError(ValueError):
    """The configuration cannot be used. `problems` holds one line for each reason."""

    def __init__(self, problems: Sequence[str], where: str) -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problem{'s' * (len(problems) != 1)}"
        super().__init__("\n".join([f"{count} in {where}:", *problems]))


class SectionError(ValueError):
    """What a section of the config asks for cannot be had."""

    def __init__(self, section: str, problem: str) -> None:
        named = problem.startswith(f"{section}.")
        super().__init__(problem if named else f"{section}: {problem}")
        self.section = section


class DataError(ValueError):
    """What was read while training is not what the data set was to hold."""


class DivergedError(RuntimeError):
    """The loss became infinite or NaN."""


class StoppedError(RuntimeError):
    """The run was asked to stop, and what there was to save is saved."""


class MissingProcessError(RuntimeError):
    """Not all processes have come."""


class SaveError(OSError):
    """A checkpoint could not be written."""


class DamagedCheckpointError(ValueError):
    """A checkpoint is not whole: it was cut off while it was written, or damaged afterwards."""


class CheckpointFormatError(ValueError):
    """A checkpoint is of a format that this version does not read."""


class RunInUseError(OSError):
    """Another run is at work in the folder; it will end."""


class CompilerNotInstalledError(RuntimeError):
    """The TPU compiler is not there."""
