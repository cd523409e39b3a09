"""Folders of the repository, for tests in any room."""

from pathlib import Path

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent
CONFIGS = REPOSITORY / "configs"
DOCS = REPOSITORY / "docs"
NOTEBOOKS = REPOSITORY / "notebooks"
SCRIPTS = REPOSITORY / "scripts"
# Data sets that may lie beside the repository; tests that need one skip without it.
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
# Modules that tests import by name, for child processes too.
HELPERS = [TESTS, TESTS / "nas", TESTS / "nas" / "training"]
