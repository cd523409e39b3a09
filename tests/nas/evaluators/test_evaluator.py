"""Adapt functions and objects to evaluators, with defaults for what they do not declare."""

from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

import nas
from nas.evaluators.evaluator import Adapter, as_evaluator, identity_of
from nas.export import export

JOB = nas.Job(1, 0, (1, 0, 1), 7)


class Bare:
    def evaluate(self, job: nas.Job) -> float:
        return float(job.seed)


class Full(Bare, nas.Evaluator):
    compile_grace_s, rivals_metric = 2.5, "accuracy"

    @property
    def identity(self) -> dict:
        return {"data": Path("mine")}

    def prepare(self, space, folder, fitness_policy, timeout_s) -> Bare:
        assert (space, folder, fitness_policy, timeout_s) == ("space", Path("run"), "stored", 9.0)
        return Bare()


class OldNames(Bare):
    grace_s, compares, goes_by = 2.5, "accuracy", MappingProxyType({"data": 5})

    def in_search(self, space, folder, fitness_policy, timeout_s) -> Bare:
        return Full().prepare(space, folder, fitness_policy, timeout_s)


class Declared(nas.Evaluator):
    identity = MappingProxyType({"data": 3})

    def evaluate(self, job: nas.Job) -> float:
        return 2.0


def test_an_object_with_evaluate_alone_gets_the_defaults() -> None:
    evaluator = as_evaluator(Bare())
    assert (evaluator.compile_grace_s, evaluator.rivals_metric, evaluator.identity) == (
        0.0,
        None,
        {},
    )
    assert evaluator.prepare("space", Path("run"), "stored", None) is evaluator
    assert evaluator.evaluate(JOB) == 7.0 and identity_of(Bare()) == {"kind": "Bare"}


def test_optional_members_of_a_subclass_are_used() -> None:
    evaluator = as_evaluator(Full())
    assert (evaluator.compile_grace_s, evaluator.rivals_metric) == (2.5, "accuracy")
    assert identity_of(Full()) == identity_of(evaluator) == {"kind": "Full", "data": "PosixPath"}
    prepared = evaluator.prepare("space", Path("run"), "stored", 9.0)
    assert identity_of(prepared) == {"kind": "Bare"}


def test_an_object_may_have_the_old_names_of_members() -> None:
    evaluator = as_evaluator(OldNames())
    assert (evaluator.compile_grace_s, evaluator.rivals_metric) == (2.5, "accuracy")
    assert identity_of(OldNames()) == {"kind": "OldNames", "data": 5}
    prepared = evaluator.prepare("space", Path("run"), "stored", 9.0)
    assert isinstance(prepared, Adapter) and prepared.compile_grace_s == 0.0
    assert identity_of(prepared) == {"kind": "Bare"}


@pytest.mark.parametrize("name", ["identity", "rivals_metric", "compile_grace_s"])
def test_members_declared_without_the_base_class_are_refused(name: str) -> None:
    evaluator = Bare()
    setattr(evaluator, name, {})
    message = f"Bare has a member `{name}`, .* inherit from nas.Evaluator to declare `{name}`, or"
    with pytest.raises(TypeError, match=message):
        as_evaluator(evaluator)


def test_common_names_of_other_objects_mean_nothing() -> None:
    class Trainer(Bare):
        def prepare(self) -> None:
            raise NotImplementedError

    evaluator = as_evaluator(Trainer())
    assert (evaluator.compile_grace_s, evaluator.rivals_metric) == (0.0, None)
    assert identity_of(Trainer()) == {"kind": "Trainer"}
    assert evaluator.prepare("space", Path("run"), "stored", None) is evaluator


def test_a_subclass_of_evaluator_is_used_as_it_is() -> None:
    declared = Declared()
    assert as_evaluator(declared) is declared
    assert (
        identity_of(declared) == {"kind": "Declared", "data": 3} and declared.compile_grace_s == 0.0
    )
    with pytest.raises(NotImplementedError, match=r"Evaluator has no method evaluate\(job\): def"):
        nas.Evaluator().evaluate(JOB)


class SetInInit(Declared):
    def __init__(self) -> None:
        self.identity, self.rivals_metric, self.compile_grace_s = {"data": 4}, "accuracy", 2.5


@dataclass(frozen=True)
class SetAsFields(nas.Evaluator):
    compile_grace_s: float
    rivals_metric: str | None = "accuracy"
    identity: dict = field(default_factory=lambda: {"data": 4})


@pytest.mark.parametrize("make", [SetInInit, lambda: SetAsFields(2.5)])
def test_members_may_be_set_in_init_or_be_dataclass_fields(make) -> None:
    evaluator = make()
    assert (evaluator.compile_grace_s, evaluator.rivals_metric) == (2.5, "accuracy")
    assert identity_of(evaluator) == {"kind": type(evaluator).__name__, "data": 4}


def test_an_attribute_kind_of_a_subclass_does_not_name_it() -> None:
    class Network(Declared):
        kind = "resnet"

    assert identity_of(Network()) == {"kind": "Network", "data": 3}


def test_a_function_is_known_by_its_name() -> None:
    assert identity_of(sum) == {"kind": "Function", "function": "sum", "module": "builtins"}
    assert identity_of(lambda bits: 1.0) == {"kind": "Function"}
    assert as_evaluator(sum).evaluate(JOB) == 2


def test_repeats_pass_on_what_the_inner_evaluator_declares() -> None:
    repeated = nas.Repeated(Full(), 2)
    assert (repeated.compile_grace_s, repeated.rivals_metric) == (2.5, "accuracy")
    inner = {"kind": "Full", "data": "PosixPath"}
    assert identity_of(repeated) == {"kind": "Repeated", "repeats": 2, "evaluator": inner}
    prepared = repeated.prepare("space", Path("run"), "stored", 9.0)
    assert isinstance(prepared, nas.Repeated) and prepared.identity["evaluator"] == {"kind": "Bare"}
    assert prepared.evaluate(JOB) == {"fitness": 7.5, "fitness_std": 0.5}
    with pytest.raises(TypeError, match="evaluate 3: expected a function"):
        nas.Repeated(3)


@pytest.mark.parametrize("repeats", [0, 2.5, True])
def test_repeats_are_a_whole_number(repeats) -> None:
    with pytest.raises(ValueError, match=f"`repeats` must be .* of at least 1, got {repeats}"):
        nas.Repeated(sum, repeats=repeats)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nas.Settings(algorithm="agin"), "algorithm: unknown 'agin'; did you mean 'aging'"),
        (lambda: nas.Settings(algorithm="x"), "algorithm: unknown 'x'; known: aging, non_aging"),
        (lambda: nas.NASBench201Table("cifar-10"), "dataset: .* did you mean 'cifar10'"),
        (lambda: nas.TrainingEvaluator(builder="statc"), "builder: .* did you mean 'static'"),
        (lambda: nas.TrainingEvaluator(dtype="float16"), "dtype: .* did you mean 'bfloat16'"),
        (lambda: nas.NetworkCosts(dtype="float16"), "dtype: .* did you mean 'bfloat16'"),
    ],
)
def test_unknown_values_get_a_suggestion(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        lambda: nas.NASNetSpace(pairs=2.5),
        lambda: nas.Search(space="nasnet", max_failures=True),
        lambda: nas.search(space="nasnet", evaluate=sum, workers=0),
        lambda: export.export(None, export.ExportOptions(Path("new.json"), top=2.5)),
    ],
)
def test_counts_are_whole_numbers(make, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        make()


def test_integers_of_numpy_are_stored_as_numbers(tmp_path) -> None:
    three = np.int64(3)
    evaluator = nas.Repeated(nas.TrainingEvaluator(epochs=three, stop_epoch=np.int64(1)), three)
    plain = nas.Repeated(nas.TrainingEvaluator(epochs=3, stop_epoch=1), 3)
    assert identity_of(evaluator) == identity_of(plain)
    options = {"population": three, "sample": np.int64(2), "cycles": three, "folder": tmp_path}
    assert nas.search(space="nasbench201", evaluate=sum, **options).counts.results == 3


@pytest.mark.parametrize("own", [lambda: {}, {(1, 2): 3}])
def test_an_identity_must_be_a_dict(own) -> None:
    class Own(Bare, nas.Evaluator):
        identity = own

    with pytest.raises(ValueError, match=r"`identity` of Own is .*: expected a dict with texts as"):
        identity_of(Own())


@pytest.mark.parametrize("kind", [Declared, Bare])
def test_a_class_is_no_evaluator(kind) -> None:
    rule = rf"evaluate is the class {kind.__name__}: expected an object .* {kind.__name__}\(\)"
    with pytest.raises(TypeError, match=rule):
        as_evaluator(kind)


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"rivals_metric": 3}, "`rivals_metric` of Own is 3: expected the name of a metric, or"),
        ({"compile_grace_s": "x"}, "`compile_grace_s` of Own is 'x': expected seconds, at least 0"),
        ({"compile_grace_s": -1}, "`compile_grace_s` of Own is -1: expected seconds, at least 0"),
        ({"prepare": lambda *_: None}, "`prepare` of Own returned None: .* with `return self`"),
        ({"identity": {"a": {(1, 2): 3}}}, "`identity` of Own cannot be stored as JSON .*texts"),
    ],
)
def test_members_of_another_type(tmp_path, members, problem) -> None:
    own = type("Own", (Declared,), members)()
    with pytest.raises((TypeError, ValueError), match=problem):
        nas.search(space="nasbench201", evaluate=own, folder=tmp_path)
    assert not list(tmp_path.iterdir())
