"""Define every exception of the search that a caller may catch; this module imports nothing."""


class ReplayError(AssertionError):
    """The log does not lead to what the store has."""


class FailuresError(RuntimeError):
    """Too many evaluations have failed, or too many candidates were rejected, in a row."""


class MismatchError(ValueError):
    """The file holds a search with other settings, or by another evaluator."""


class LostWeightsError(RuntimeError):
    """What a worker has trained is not where this machine can see it."""


class StoreVersionError(ValueError):
    """The file was written by a newer version of this package."""


class NotASearchError(ValueError):
    """The file is something else."""


class SearchInUseError(RuntimeError):
    """Another driver has the file open."""


class SearchExistsError(FileExistsError):
    """A search is there already."""


class NetworkFileSystemError(OSError):
    """The folder is on another machine, or in a bucket."""


class ReturnError(TypeError):
    """The evaluator returned what is no fitness: a mistake in it, not a failed candidate."""


class WorkersError(RuntimeError):
    """The workers cannot be reached or started, or can take no more work."""


class TooLargeError(MemoryError):
    """A device cannot hold a training."""
