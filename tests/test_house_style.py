"""Check the house style, as far as a program can see it."""

from house_style import bad_openers, definitions_of_pytree, named_lambdas, sources

PYTHON = sources("gpipe_jax", "nas", "scripts", "tests")


def test_docstrings_begin_with_a_verb() -> None:
    assert not [problem for path in PYTHON for problem in bad_openers(path)]


def test_no_lambda_has_a_name() -> None:
    assert not named_lambdas(PYTHON)


def test_pytree_is_defined_once() -> None:
    assert len(definitions_of_pytree(PYTHON)) == 1


def test_planted_faults_are_seen(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("house_style.REPOSITORY", tmp_path)
    file = tmp_path / "fault.py"
    suppression = "noqa" + ": E731"
    file.write_text(
        '"""What a module does."""\n\n\ndef f() -> None:\n    """Return nothing."""\n'
        f"g = lambda: 0  # {suppression}\nPyTree = Any\n"
    )
    assert bad_openers(file) == ["fault.py:1: What a module does."]
    assert named_lambdas([file]) == [f"fault.py:6: g = lambda: 0  # {suppression}"]
    assert definitions_of_pytree([file]) == ["fault.py:7: PyTree = Any"]
