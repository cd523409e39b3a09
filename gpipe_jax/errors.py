"""Define every exception that a caller may catch; import nothing of the package.

ValueError
    ArgumentError             an argument of a function has an illegal value
    ConfigError               a configuration cannot be used
    SectionError              a section of a legal configuration cannot be realized
    OptionError               an option of the command line cannot be used
    DataError                 a batch is not what the data set promises
    DamagedCheckpointError    a checkpoint is incomplete or damaged
    CheckpointFormatError     a checkpoint is of another format
OSError
    SaveError                 a checkpoint could not be written
    UnreadableCheckpointError a checkpoint cannot be read now, but perhaps later
    RunInUseError             another run is using the folder
RuntimeError
    DivergedError             the loss, or a parameter, became infinite or NaN
    StoppedError              the run was stopped, and saved
    MissingProcessError       a process of the run did not start
    CompilerNotInstalledError the TPU compiler is not installed
"""

from collections.abc import Sequence

__all__ = [
    "ArgumentError",
    "CheckpointFormatError",
    "CompilerNotInstalledError",
    "ConfigError",
    "DamagedCheckpointError",
    "DataError",
    "DivergedError",
    "MissingProcessError",
    "OptionError",
    "RunInUseError",
    "SaveError",
    "SectionError",
    "StoppedError",
    "UnreadableCheckpointError",
]


MOST_SHOWN = 50  # problems in a message; more only scroll away


class ArgumentError(ValueError):
    """Report an illegal value of an argument; the message names it, the rule and the remedy.

    Attributes:
        argument: The name of the argument. A command uses it to find the line of the config, or
            the option, that set it.
    """

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(message)
        self.argument = argument

    def __reduce__(self) -> tuple:
        return type(self), (self.argument, str(self))


class ConfigError(ValueError):
    """Report that a configuration, or another input of a command, cannot be used.

    Raised by `load` for a file with mistakes, and by the commands for anything that is wrong with
    what they were given. Correct each problem at its place, and run the command again.

    Attributes:
        problems: One line for each problem, such as "x.yaml:7: unknown key 'data.batchsize'; did
            you mean 'data.batch_size'?".
        where: The file or the command that has the problems.

    The message has the first 50 problems at most.
    """

    def __init__(self, problems: Sequence[str], where: str) -> None:
        self.problems = tuple(problems)
        self.where = where
        noun = "problem" if len(problems) == 1 else "problems"
        head = f"{len(problems)} {noun} in {where}:"
        if len(problems) > MOST_SHOWN:
            head = f"{len(problems)} problems in {where}, the first {MOST_SHOWN}:"
        super().__init__("\n".join([head, *problems[:MOST_SHOWN]]))

    def __reduce__(self) -> tuple:
        return type(self), (self.problems, self.where)


class SectionError(ValueError):
    """Report that a section of a legal configuration cannot be realized here.

    Raised while data, network, mesh, pipeline and optimizer are built: a file is missing, there are
    too few devices, or a stage does not fit. `config.loader.locating` adds the line of the file.

    Attributes:
        section: The section of the configuration, such as "model".
        field: The field of the section, or None if the problem is not one of a single field.
        problem: What is wrong, without the section.
    """

    def __init__(self, section: str, field: str | None, problem: str) -> None:
        super().__init__(f"{section}: {problem}")
        self.section, self.field, self.problem = section, field, problem

    def __reduce__(self) -> tuple:
        return type(self), (self.section, self.field, self.problem)


class OptionError(ValueError):
    """Report that an option of a command cannot be used; the message begins with the option.

    Attributes:
        option: The option as it is written, such as "--out".
        problem: What is wrong, without the option.
    """

    def __init__(self, option: str, problem: str) -> None:
        super().__init__(f"{option}: {problem}")
        self.option, self.problem = option, problem

    def __reduce__(self) -> tuple:
        return type(self), (self.option, self.problem)


class DataError(ValueError):
    """Report a batch that is not what the data set promises: other shapes, types or labels.

    Raised while training or evaluating reads the data. Correct the data, or the `data` section.
    """


class DivergedError(RuntimeError):
    """Report that the loss, or the state after an update, became infinite or NaN.

    The last checkpoint is from before. Train in a new folder, with a lower learning rate, a longer
    warm-up or `clip_norm`.
    """


class StoppedError(RuntimeError):
    """Report that the run was stopped by a signal, after it saved its state.

    Run the same command again to resume.
    """


class MissingProcessError(RuntimeError):
    """Report that not all processes of a run have started in time.

    Check that the command runs on every host, and that they reach the coordinator's address.
    """


class SaveError(OSError):
    """Report that a checkpoint could not be written; the ones before it are intact.

    Free space, or correct the permissions, and run the same command again to resume.
    """


class DamagedCheckpointError(ValueError):
    """Report a checkpoint that is incomplete, or was damaged after it was written.

    A run then resumes from the newest intact one, and renames the damaged one.
    """


class UnreadableCheckpointError(OSError):
    """Report a checkpoint that cannot be read now: the disk, the network or permissions fail.

    A run then resumes from the newest one that it can read, and leaves this one where it is. Repair
    the cause, and run the same command again.
    """


class CheckpointFormatError(ValueError):
    """Report a checkpoint in a format that this version does not read.

    Use the version that wrote it, which the message names.
    """


class RunInUseError(OSError):
    """Report that another run is using the folder.

    Wait until it has ended, or use another folder (`train.workdir`).
    """


class CompilerNotInstalledError(RuntimeError):
    """Report that the TPU compiler (libtpu) is missing; the message says how to install it."""
