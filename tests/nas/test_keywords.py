"""Unknown arguments of the public functions and classes get a suggestion, or the new name."""

import inspect
import pickle
from dataclasses import replace

import pytest
from searches import Bits

import nas
from nas import keywords
from nas.training.evaluator import TrainingEvaluator


def test_a_misspelt_argument_of_a_search(tmp_path) -> None:
    rule = r"nas.search has no argument 'popluation'; did you mean 'population'\?"
    with pytest.raises(TypeError, match=rule):
        nas.search(space=Bits(), evaluate=sum, folder=tmp_path, popluation=3)
    rule = r"nas.Search has no argument 'cylces'; did you mean 'cycles'\?"
    with pytest.raises(TypeError, match=rule):
        nas.Search(space=Bits(), folder=tmp_path, cylces=3)
    assert not list(tmp_path.iterdir())


def test_an_argument_that_a_search_fills_in_itself(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"no argument 'evaluator'; did you mean 'evaluate'\?"):
        nas.search(space=Bits(), evaluate=sum, folder=tmp_path, evaluator=sum)


def test_all_unknown_arguments_are_named_at_once(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"'sede'; did you mean 'seed'\?; .*'x'; known: space, "):
        nas.search(space=Bits(), evaluate=sum, folder=tmp_path, sede=3, x=1)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: nas.Limit("ones", sum, atmost=3), "nas.Limit .*'atmost'; did you mean 'at_most'"),
        (lambda: nas.Retries(exceptions=3), "nas.Retries .* did you mean 'exception'"),
        (lambda: nas.Settings(popluation=3), "nas.Settings .* did you mean 'population'"),
        (lambda: nas.NASNetSpace(pair=3), "nas.NASNetSpace .* did you mean 'pairs'"),
        (lambda: nas.Repeated(sum, repeat=3), "nas.Repeated .* did you mean 'repeats'"),
        (lambda: nas.TabularEvaluator(sum, fitnes="x"), "nas.Tabular.* did you mean 'fitness'"),
        (lambda: nas.NASBench201Table(data="x"), "nas.NASBench201Table .* did you mean 'dataset'"),
        (lambda: nas.NetworkCosts(filter=3), "nas.NetworkCosts .* did you mean 'filters'"),
        (lambda: nas.TrainingEvaluator(epoch=3), "nas.Training.* did you mean 'epochs'"),
    ],
)
def test_a_misspelt_argument_of_a_class(make, problem: str) -> None:
    with pytest.raises(TypeError, match=problem):
        make()


@pytest.mark.parametrize("make", [nas.TrainingEvaluator, nas.NetworkCosts])
def test_an_argument_of_an_earlier_version_has_the_new_name(make) -> None:
    rule = f"nas.{make.__name__} has no argument 'cells'; it is called 'cells_per_stack' since"
    with pytest.raises(TypeError, match=rule):
        make(cells=3)
    with pytest.raises(TypeError, match=rule):
        replace(make(), cells=3)


def test_every_public_class_with_arguments_suggests() -> None:
    filled_in_by_a_search = (nas.Candidate, nas.Job, nas.Result)
    others = (nas.Search, nas.Space, nas.DrawableSpace)
    for name in nas.__all__:
        kind = getattr(nas, name)
        if not inspect.isclass(kind) or kind in filled_in_by_a_search + others:
            continue
        if issubclass(kind, BaseException) or not keywords.names_of(kind):
            continue
        with pytest.raises(TypeError, match=f"nas.{name} has no argument 'xyz'; known"):
            kind(xyz=1)


def test_constructors_stay_what_they_were() -> None:
    limit = nas.Limit("ones", sum, at_most=3)
    assert limit._replace(at_most=4) == nas.Limit("ones", sum, 4)
    assert pickle.loads(pickle.dumps(limit)) == limit
    evaluator = TrainingEvaluator(epochs=4)
    assert pickle.loads(pickle.dumps(evaluator)) == evaluator
    assert next(iter(inspect.signature(TrainingEvaluator).parameters)) == "data"
    assert "epochs" in keywords.names_of(TrainingEvaluator)
