"""Check the axes of a mesh, the order of its devices, and the errors for too few devices."""

import os
import re
import subprocess
import sys
import warnings

import jax
import pytest
from jax.sharding import AxisType
from paths import REPOSITORY

from gpipe_jax.distributed.mesh import make_mesh, simulate_devices


@pytest.mark.parametrize(("stages", "data"), [(1, 1), (4, 1), (1, 4), (4, 2), (2, 4), (3, 5)])
def test_stage_is_the_outer_axis(stages: int, data: int) -> None:
    mesh = make_mesh(stages=stages, data=data)
    assert mesh.axis_names == ("stage", "data")
    assert dict(mesh.shape) == {"stage": stages, "data": data}
    assert mesh.devices.flatten().tolist() == jax.devices()[: stages * data]
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_one_replica_is_the_default() -> None:
    assert make_mesh(stages=3).devices.shape == (3, 1)


def test_devices_can_be_chosen() -> None:
    chosen = jax.devices()[5:9]
    mesh = make_mesh(stages=2, data=2, devices=chosen)
    assert mesh.devices.flatten().tolist() == chosen


def test_a_mesh_larger_than_the_machine_says_how_to_simulate_it() -> None:
    have = jax.device_count()
    with pytest.raises(ValueError) as caught:
        make_mesh(stages=have, data=3)
    message = str(caught.value)
    assert f"{have} stages x 3 data replicas needs {3 * have} devices" in message
    assert (
        f"but only {have} {'is' if have == 1 else 'are'} available ({jax.default_backend()})"
        in message
    )
    assert f"gpipe_jax.simulate_devices({3 * have})" in message
    assert f"mesh.simulate={3 * have}" in message


def test_too_few_chosen_devices_are_counted_as_such() -> None:
    with pytest.raises(ValueError, match=r"needs 4 devices, but only 3 are available \("):
        make_mesh(stages=4, devices=jax.devices()[:3])


@pytest.mark.parametrize("value", [0, -2])
def test_values_below_one_are_refused(value: int) -> None:
    with pytest.raises(ValueError, match="`stages` must be a whole number of at least 1"):
        make_mesh(stages=value)
    with pytest.raises(ValueError, match="`data` must be a whole number of at least 1"):
        make_mesh(stages=2, data=value)
    with pytest.raises(ValueError, match="`n` must be a whole number of at least 1"):
        simulate_devices(value)


def test_simulating_fewer_devices_than_there_are_changes_nothing() -> None:
    if jax.default_backend() != "cpu":
        pytest.skip("about simulated devices")
    before, nproc = jax.devices(), os.environ.get("PJRT_NPROC")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate_devices(2)
    assert jax.devices() == before
    if nproc is not None:
        os.environ["PJRT_NPROC"] = nproc


RESTART = """
import os, warnings
import gpipe_jax, jax
assert jax.device_count() == 1
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    gpipe_jax.simulate_devices(3)
print([str(w.message) for w in caught], jax.device_count(), os.environ["PJRT_NPROC"])
print(float(jax.jit(lambda x: 2 * x)(jax.device_put(1.0, jax.devices()[2]))))
"""


def test_a_running_backend_is_restarted_with_a_warning() -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "PJRT_NPROC"):
        environment.pop(name, None)
    result = subprocess.run(
        [sys.executable, "-c", RESTART], env=environment, capture_output=True, text=True,
        cwd=REPOSITORY,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said, doubled = result.stdout.splitlines()
    assert "simulate_devices(3) restarts a backend that already ran with 1 cpu device" in said
    assert said.endswith(f" 3 {max(6, os.cpu_count() or 1)}") and doubled == "2.0"


def test_only_the_mesh_names_specs_and_collectives() -> None:
    """Check that all other modules take them from `mesh`, so that a new axis touches few files."""
    names = re.compile(
        r"PartitionSpec|NamedSharding|lax\.(psum|pmean|ppermute|all_gather|axis_index)"
    )
    files = (REPOSITORY / "gpipe_jax").rglob("*.py")
    naming = {f.relative_to(REPOSITORY) for f in files if names.search(f.read_text())}
    assert [str(path) for path in sorted(naming)] == ["gpipe_jax/distributed/mesh.py"]
