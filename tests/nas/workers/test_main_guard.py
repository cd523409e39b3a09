"""Give a script without a main guard one message, whoever starts its worker processes."""

import subprocess
import sys
from pathlib import Path

import pytest

from nas.workers import main_guard

SCRIPT = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
import nas

with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
    nas.search(
        space="nasbench201", evaluate=sum, workers={workers}, population=4, sample=2, cycles=8
    )
"""
RULE = "in a script, call nas.search under `if __name__ == '__main__':`, because each worker"


@pytest.mark.parametrize(
    ("workers", "problem"),
    [
        ("pool", "WorkersError: the workers take no more jobs (A"),
        pytest.param(
            '"processes:2"', "WorkersError: workers 'processes:2' cannot be", marks=pytest.mark.slow
        ),
    ],
)
def test_a_script_without_a_main_guard(tmp_path: Path, workers: str, problem: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(workers=workers))
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    (line,) = (line for line in done.stderr.splitlines() if RULE in line)
    assert problem in line, done.stderr
    assert done.stderr.count('script.py", line') == 1, done.stderr


def test_a_process_of_another_parent_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        main_guard.multiprocessing.current_process(), "_inheriting", True, raising=False
    )
    with pytest.raises(main_guard.WorkersError, match="while it was started itself; in a script"):
        main_guard.check_not_importing()
    with main_guard.quiet_workers(), pytest.raises(SystemExit):
        main_guard.check_not_importing()
