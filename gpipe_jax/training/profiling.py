"""Where the time of a run went."""

import contextlib
import time
from collections.abc import Iterator

PARTS = ("compile", "data", "checkpoint", "evaluation")


class Ledger:
    """Seconds by part; what is no part is training. Parts within parts count once, as the inner."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)

    @contextlib.contextmanager
    def spend(self, part: str) -> Iterator[None]:
        """Book the block's time on a part."""
        start, before = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            inner = sum(self.seconds.values()) - before
            self.seconds[part] += time.perf_counter() - start - inner
