"""Check that a network accepts the inputs and labels of a data set."""

from typing import NamedTuple

import numpy as np

from gpipe_jax.data.casts import cast
from gpipe_jax.data.stream import Batch
from gpipe_jax.errors import DataError

KEYS = ("inputs", "labels")


class Rules(NamedTuple):
    """Describe the inputs and labels that a network accepts.

    Args:
        tokens: Whether the inputs are whole numbers (tokens), not floats or pixels. Default: False.
        classes: One more than the largest label, and than the largest token. Default: None, not
            known.
        float_labels: Whether labels may be floats, which no class limits. Default: False.
        ignored_label: A label that the loss leaves out. Default: None.
    """

    tokens: bool = False
    classes: int | None = None
    float_labels: bool = False
    ignored_label: int | None = None

    def apply(self, source: str, batch: Batch) -> Batch:
        """Check a batch and return it in the types of training.

        Args:
            source: Where the batch comes from, for messages.
            batch: `inputs` and `labels`, as they are stored; anything else stays as it is.

        Returns:
            The inputs in float32 (pixels from -1 to 1), or in int32 for tokens; labels in int32.

        Raises:
            DataError: The batch breaks a rule.
        """
        self.check(source, batch)
        inputs, labels = (batch[key] for key in KEYS)
        dtype = np.int32 if np.issubdtype(labels.dtype, np.integer) else np.float32
        labels = cast(f"labels of {source}", labels, dtype)
        return {**batch, "inputs": self._inputs(source, inputs), "labels": labels}

    def check(self, source: str, batch: Batch) -> None:
        """Check that labels and tokens are whole numbers in the range of the network.

        Args:
            source: Where the batch comes from, for messages.
            batch: `inputs`, `labels`, and optionally `weights`: examples of weight 0 are ignored.

        Raises:
            DataError: They are not.
        """
        used = np.asarray(batch["weights"]) > 0 if "weights" in batch else slice(None)
        labels = np.asarray(batch["labels"])[used]
        if np.issubdtype(labels.dtype, np.integer):
            self._check_range(f"labels of {source}", labels[labels != self.ignored_label])
        elif not (self.float_labels and np.issubdtype(labels.dtype, np.floating)):
            raise DataError(f"labels of {source} have type {labels.dtype}; they must be integers")
        if self.tokens:
            self._check_range(f"inputs of {source}", np.asarray(batch["inputs"])[used])

    def _inputs(self, source: str, a: np.ndarray) -> np.ndarray:
        if np.issubdtype(a.dtype, np.integer if self.tokens else np.floating):
            return cast(f"inputs of {source}", a, np.int32 if self.tokens else np.float32)
        if a.dtype == np.uint8 and not self.tokens:
            return (a / 127.5 - 1).astype(np.float32)
        rule = "tokens are integers" if self.tokens else "use floats, or pixels in uint8"
        raise DataError(f"inputs of {source} have type {a.dtype}; {rule}")

    def _check_range(self, name: str, a: np.ndarray) -> None:
        largest = 2**31 if self.classes is None else self.classes
        if a.size and not 0 <= a.min() <= a.max() < largest:
            raise DataError(
                f"{name} are from {a.min()} to {a.max()}; the model accepts 0 to {largest - 1}"
            )


ANY = Rules()
