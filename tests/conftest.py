"""Run the tests on 16 simulated CPU devices."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
import xla_flags

import gpipe_jax

xla_flags.set_flags()
# A libtpu that is installed on a machine without a TPU must not look for one.
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

# Notes about code that a test ran do not belong to the user who runs the tests.
_STATE = tempfile.TemporaryDirectory(prefix="gpipe-jax-state-")
os.environ["XDG_STATE_HOME"] = _STATE.name

gpipe_jax.simulate_devices(16)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tenth",
        action="store_true",
        help="run the first of every ten selected tests, in the order of collection",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a tenth of the tests, after `-m` and `-k`: a quick check on another Python or JAX.

    The rule needs no chance, so that all workers choose the same tests. Ten neighbours are often
    the cases of one test, so that almost every file keeps some.
    """
    if config.getoption("tenth"):
        left_out = [item for number, item in enumerate(items) if number % 10]
        config.hook.pytest_deselected(items=left_out)
        items[:] = items[::10]


@pytest.fixture(autouse=True)
def no_module_left(tmp_path_factory: pytest.TempPathFactory):
    """Forget modules that a test wrote and imported: the next test may write one of that name."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path_factory.getbasetemp()):
            del sys.modules[name]
