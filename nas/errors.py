"""Define every exception of the search that a caller may catch; import nothing.

RuntimeError
    FailuresError             too many failures in a row
    LostRunError              the run's folder was removed while the search was running
    LostWeightsError          trained weights are not in the run's folder
    SearchInUseError          another driver has the run open
    WorkersError              the workers cannot be used
ValueError
    MismatchError             the run holds another search
    StoreVersionError         the run's file is of a newer version
    NotASearchError           the file is not a run's store
    ExportOptionError         an option of an export cannot be used
        OutputExistsError     the file to write exists already (a FileExistsError too)
        OutputFolderError     the folder of that file does not exist (a FileNotFoundError too)
OSError
    NetworkFileSystemError    the run's folder is on a network file system
    SearchExistsError         the file holds a search already (a FileExistsError)
TypeError
    ReturnError               an evaluator returned no fitness
MemoryError
    TooLargeError             a training does not fit into its device
AssertionError
    ReplayError               log and tables of a run disagree
"""

__all__ = [
    "ExportOptionError",
    "FailuresError",
    "LostRunError",
    "LostWeightsError",
    "MismatchError",
    "NetworkFileSystemError",
    "NotASearchError",
    "OutputExistsError",
    "OutputFolderError",
    "ReplayError",
    "ReturnError",
    "SearchExistsError",
    "SearchInUseError",
    "StoreVersionError",
    "TooLargeError",
    "WorkersError",
]


class ReplayError(AssertionError):
    """Report that a run's log and its tables do not agree.

    `nas.replay` raises it. The message has both sides: what the store holds and what the log gives.
    """


class FailuresError(RuntimeError):
    """Report too many failures in a row, which end the search.

    Either `max_failures` evaluations failed, or the limits rejected 10,000 candidates. The message
    has the last error. Everything until then is in the store: remove the cause and resume.
    """


class MismatchError(ValueError):
    """Report that the run's file holds another search.

    Its space, settings, limits or evaluator differ from the given ones; the message lists both.
    """


class LostRunError(RuntimeError):
    """Report that the run's folder was removed, moved or replaced while the search was running.

    Attributes:
        copy: Folder with a copy of the store, from which the search resumes; None if there is none.
    """

    def __init__(self, message: str, copy: str | None = None) -> None:
        super().__init__(message)
        self.copy = copy


class LostWeightsError(RuntimeError):
    """Report that a worker's trained weights are not in the run's folder on this machine."""


class StoreVersionError(ValueError):
    """Report a run's file that a newer version of this package has written."""


class NotASearchError(ValueError):
    """Report a file that is not a run's store."""


class SearchInUseError(RuntimeError):
    """Report that another driver has the run's file open; the message says which process."""


class SearchExistsError(FileExistsError):
    """Report that the file already holds a search, where a new one was to be created."""


class NetworkFileSystemError(OSError):
    """Report a run's folder on a network file system or in a bucket, where SQLite can lose data."""


class ReturnError(TypeError):
    """Report that an evaluator returned something that is not a fitness.

    While there is no result yet, this is a mistake in the evaluator and ends the search. Later on
    it is a failure of the candidate.
    """


class WorkersError(RuntimeError):
    """Report workers that cannot be started or reached, or that accept no more jobs."""


class TooLargeError(MemoryError):
    """Report a training that needs more memory than its device has."""


class ExportOptionError(ValueError):
    """Report an option of an export that cannot be used.

    Attributes:
        option: The name of the field of `ExportOptions`.
        value: Its value.
        problem: The rule and the remedy, without the name and the value.
    """

    def __init__(self, option: str, value: object, problem: str) -> None:
        super().__init__(f"`{option}` {value}: {problem}")
        self.option, self.value, self.problem = option, value, problem

    def __reduce__(self) -> tuple:
        return type(self), (self.option, self.value, self.problem)


class OutputExistsError(ExportOptionError, FileExistsError):
    """Report that the output file of an export exists already."""


class OutputFolderError(ExportOptionError, FileNotFoundError):
    """Report that the folder of an export's output file does not exist."""
