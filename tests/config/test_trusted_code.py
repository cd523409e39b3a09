"""Check which code of a folder runs unasked: what this user has run, known by its content."""

from pathlib import Path

import pytest

from gpipe_jax import known_code
from gpipe_jax.config import loader, trusted_code
from gpipe_jax.errors import ConfigError

CODE = "def make(batch_size, seed): ..."


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "mine.py").write_text(CODE)


def config(data: str = "{kind: python, source: mine.py:make}"):
    return loader.load({"model": {"kind": "mlp"}, "data": {"kind": "digits"}}, [f"data={data}"])


def test_code_is_asked_for_until_it_has_run(tmp_path: Path) -> None:
    message = (
        r"data.source: this command would run mine.py, which you have not run with `gpipe train` "
        r"on this machine; read the file, and add --trust"
    )
    with pytest.raises(ConfigError, match=message):
        trusted_code.check(config(), "run/config.yaml")
    trusted_code.remember(config())
    trusted_code.check(config(), "run/config.yaml")
    (tmp_path / "moved").mkdir()
    (tmp_path / "mine.py").rename(tmp_path / "moved" / "x.py")
    trusted_code.check(config("{kind: python, source: moved/x.py:make}"), "run/config.yaml")
    (tmp_path / "mine.py").write_text(CODE + "# changed")
    with pytest.raises(ConfigError, match=message):
        trusted_code.check(config(), "run/config.yaml")


def test_installed_code_is_asked_for_with_its_arguments() -> None:
    def named(depth: int):
        call = f"train.callbacks=[{{function: 'os:abort', arguments: {{depth: {depth}}}}}]"
        return loader.load({"model": {"kind": "mlp"}, "data": {"kind": "digits"}}, [call])

    trusted_code.remember(named(1))
    trusted_code.check(named(1), "run/config.yaml")
    with pytest.raises(ConfigError, match=r"train.callbacks: this command would run os:abort"):
        trusted_code.check(named(2), "run/config.yaml")


def test_without_code_there_is_nothing_to_ask() -> None:
    trusted_code.check(config("{kind: digits}"), "run/config.yaml")
    trusted_code.check(config("{kind: python, source: missing.py:make}"), "run/config.yaml")
    assert not known_code.is_known(b"")


def test_without_a_place_for_notes_it_asks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "mine.py"))
    known_code.remember(b"x")
    assert not known_code.is_known(b"x")
