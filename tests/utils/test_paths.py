"""Check the one rule for paths: `~`, environment variables, addresses."""

import pathlib
from typing import Any

import pytest
from etils import epath

from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils import paths


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SOME_WHERE", "/disk 1")
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.setattr("os.getcwd", lambda: "/work folder")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/x", "/home/me/x"),
        ("$HOME/x", "/home/me/x"),
        ("${SOME_WHERE}/x", "/disk 1/x"),
        ("a/$SOME_WHERE", "a/disk 1"),
        (pathlib.Path("~/x"), "/home/me/x"),
        ("a/~b", "a/~b"),
        ("./~b", "/work folder/~b"),
        ("cost 1$", "cost 1$"),
        ("data/*.txt", "data/*.txt"),
        ("c:", "c:"),
    ],
)
def test_paths_on_this_machine(written: Any, meant: str) -> None:
    path = paths.local("folder", written)
    assert path == paths.local("folder", path) == pathlib.Path(meant)
    assert paths.anywhere("folder", written) == epath.Path(meant)
    assert paths.is_local(written) and paths.path_problem(written) is None


def test_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAME", "c")
    assert str(paths.anywhere("workdir", "gs://b/$NAME")) == "gs://b/c"
    assert not paths.is_local("gs://b/x")
    with pytest.raises(ArgumentError, match="`train` gs://b/x: gs:// addresses are not supported"):
        paths.local("train", "gs://b/x")
    with pytest.raises(ArgumentError, match="write gs:// as text, not as a Path"):
        paths.anywhere("workdir", pathlib.Path("gs://b/x"))


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("http://a/b", "http:// addresses are not supported; give a path on this machine"),
        ("s3://a/b", "s3:// addresses are not supported; give a path on this machine"),
        ("file:///a/b", "file:// addresses are not supported; give a path on this machine"),
        (pathlib.Path("s3://a/b"), "s3:// addresses are not supported"),
        ("a\0b", "a path cannot hold a zero byte; remove it"),
        ("$UNSET/x", "the environment variable UNSET is not set; set it, or write the path out"),
        ("~nobody_of_this_name/x", "there is no user nobody_of_this_name; for a name that begins"),
    ],
)
@pytest.mark.parametrize("resolve", [paths.local, paths.anywhere])
def test_paths_that_cannot_be_used(resolve: Any, written: Any, problem: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        resolve("folder", written)
    assert caught.value.argument == "folder"
    assert str(caught.value).startswith(f"`folder` {written}: {problem}")
