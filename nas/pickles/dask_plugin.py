"""Put a large evaluator into each worker of a dask cluster, also into those that join later."""

from contextlib import suppress
from typing import Any

from distributed import WorkerPlugin

from nas.pickles import sending
from nas.pickles.sending import Parcel


class EvaluatorPlugin(WorkerPlugin):
    """Keep a pickle in the worker's process."""

    def __init__(self, digest: str, pickled: bytes) -> None:
        self.name = f"nas evaluator {digest}"
        self.digest, self.pickled = digest, pickled

    def setup(self, worker: Any) -> None:
        """Keep it."""
        sending.put(self.digest, self.pickled)

    def teardown(self, worker: Any) -> None:
        """Keep it no longer."""
        sending.remove(self.digest)


class ClusterShare:
    """Share pickles with the workers of a client's cluster."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._plugins: list[EvaluatorPlugin] = []

    def share(self, pickled: bytes) -> Parcel:
        """Return a parcel with the pickle, or with its digest after all workers have it."""
        if len(pickled) < sending.LARGE:
            return sending.in_each_job(pickled)
        plugin = EvaluatorPlugin(sending.digest_of(pickled), pickled)
        self._client.register_plugin(plugin)
        self._plugins.append(plugin)
        return Parcel(plugin.digest)

    def renew(self) -> None:
        """Share all again, with a scheduler that was started again."""
        for plugin in self._plugins:
            self._client.register_plugin(plugin)

    def close(self) -> None:
        """Let all workers forget them, if the cluster still runs."""
        for plugin in self._plugins:
            if self._client.status == "running":
                with suppress(Exception):  # the cluster may be gone, or have been started again
                    self._client.unregister_worker_plugin(plugin.name)
        self._plugins.clear()
