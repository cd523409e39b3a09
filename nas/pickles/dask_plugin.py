"""Put a large evaluator into each worker of a dask cluster, also into those that join later."""

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
        self._names: list[str] = []

    def share(self, pickled: bytes) -> Parcel:
        """Return a parcel with the pickle, or with its digest after all workers have it."""
        if len(pickled) < sending.LARGE:
            return sending.in_each_job(pickled)
        plugin = EvaluatorPlugin(sending.digest_of(pickled), pickled)
        self._client.register_plugin(plugin)
        self._names.append(plugin.name)
        return Parcel(plugin.digest)

    def close(self) -> None:
        """Let all workers forget them, if the cluster still runs."""
        for name in self._names:
            if self._client.status == "running":
                self._client.unregister_worker_plugin(name)
        self._names.clear()
