"""Check `Trainer.fit`: any iterable, callbacks, evaluations, early stopping, and its errors."""

import itertools
from collections.abc import Iterator

import numpy as np
import optax
import pytest

import gpipe_jax as gpipe
from gpipe_jax.errors import ArgumentError, DataError, DivergedError


def make_batches(start: int = 0, size: int = 8) -> Iterator[dict]:
    for step in itertools.count(start):
        inputs = np.random.default_rng(step).normal(size=(size, 4)).astype(np.float32)
        yield {"inputs": inputs, "labels": (inputs.sum(1) > 0).astype(np.int32)}


def first(count: int, start: int = 0) -> list[dict]:
    return list(itertools.islice(make_batches(start), count))


HELD_OUT = first(2, start=1000)


@pytest.fixture(scope="module")
def trainer() -> gpipe.Trainer:
    pipe = gpipe.Pipeline(
        gpipe.zoo.mlp((4, 8, 2)),
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=2),
        example=next(make_batches()),
        micro_batches=2,
    )
    return gpipe.Trainer(pipe, optax.adam(1e-2), ema=0.9)


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [list, iter, tuple], ids=["list", "iterator", "tuple"])
def test_without_steps_it_trains_until_the_batches_end(trainer, make):
    losses: list[float] = []
    current = trainer.fit(
        trainer.init(0), make(first(11)), record=lambda record: losses.append(record["loss"])
    )
    expected: list[float] = []
    endless = make_batches()
    same = trainer.fit(trainer.init(0), endless, 11, lambda record: expected.append(record["loss"]))
    assert current.step == same.step == 11 and losses == expected and len(losses) == 11


def test_more_steps_continue_a_finished_training(trainer):
    """Continue with more steps, and as an uninterrupted training does; give no record."""
    batches = make_batches()
    current = trainer.fit(trainer.init(0), batches, 4)
    current = trainer.fit(current, batches, 9)
    whole = trainer.fit(trainer.init(0), make_batches(), 9)
    assert current.step == whole.step == 9
    saved, expected = trainer.to_layers(current), trainer.to_layers(whole)
    for i, layer in expected.layers.items():
        for name, value in layer["params"]["linear"].items():
            np.testing.assert_array_equal(saved.layers[i]["params"]["linear"][name], value)


def test_more_steps_than_the_pipeline_knows_are_said(trainer, monkeypatch, capsys):
    monkeypatch.setattr(trainer.pipe, "steps", 4)
    current = trainer.fit(trainer.init(0), make_batches(), 4)
    assert capsys.readouterr().err == ""
    trainer.fit(current, make_batches(), 6)
    assert (
        "more than the pipeline's `steps` 4: layers that read `progress`" in capsys.readouterr().err
    )


# --- evaluations and callbacks -------------------------------------------------------------------


def test_evaluations_are_of_the_average_and_come_at_their_steps(trainer):
    """Check every record, with an evaluation at the end that is no multiple of `every`."""
    records: list[dict] = []
    current = trainer.fit(
        trainer.init(0), make_batches(), 7, records.append, evaluate=HELD_OUT, every=3
    )
    kinds = [(record["step"], "test_loss" in record) for record in records]
    steps = [(step, False) for step in range(1, 8)]
    assert kinds == [*steps[:3], (3, True), *steps[3:6], (6, True), steps[6], (7, True)]
    expected = trainer.evaluate(trainer.evaluated(current), HELD_OUT)
    assert records[-1] == {"step": 7, **expected}
    assert expected != trainer.evaluate(current.state, HELD_OUT)


@pytest.mark.parametrize("steps", [6, None])
def test_an_evaluation_at_the_end_is_done_once(trainer, steps):
    records: list[dict] = []
    trainer.fit(
        trainer.init(0), first(6), steps, records.append, evaluate=lambda: iter(HELD_OUT), every=3
    )
    assert [record["step"] for record in records if "test_loss" in record] == [3, 6]


def test_evaluations_change_no_step(trainer):
    plain: list[dict] = []
    evaluated: list[dict] = []
    trainer.fit(trainer.init(0), make_batches(), 6, plain.append)
    trainer.fit(trainer.init(0), make_batches(), 6, evaluated.append, evaluate=HELD_OUT, every=2)
    losses = [record["loss"] for record in evaluated if "loss" in record]
    assert losses == [record["loss"] for record in plain]


def test_a_callback_stops_at_an_evaluation_exactly(trainer):
    seen: list[int] = []

    def stop(record: dict) -> bool:
        seen.append(record["step"])
        return "test_loss" in record and record["step"] == 4

    current = trainer.fit(
        trainer.init(0), make_batches(), callbacks=[stop], evaluate=HELD_OUT, every=2
    )
    assert current.step == 4 and seen == [1, 2, 2, 3, 4, 4]


def test_a_callback_stops_soon_after_a_step_and_all_see_every_record(trainer):
    seen: list[int] = []
    current = trainer.fit(
        trainer.init(0),
        make_batches(),
        100,
        callbacks=[lambda record: record["step"] == 5, lambda record: seen.append(record["step"])],
    )
    assert 5 <= current.step <= 12 and seen == list(range(1, current.step + 1))


def test_a_callback_changes_no_record_of_another(trainer):
    records: list[dict] = []
    trainer.fit(trainer.init(0), make_batches(), 2, records.append, callbacks=[dict.clear])
    assert [record["step"] for record in records] == [1, 2]


def test_the_error_of_a_callback_loses_no_step(trainer):
    def fails(record: dict) -> None:
        if "test_loss" in record:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as error:
        trainer.fit(trainer.init(0), make_batches(), callbacks=[fails], evaluate=HELD_OUT, every=3)
    assert trainer.reached.step == 3 and "after step 3 is kept" in error.value.__notes__[0]
    assert trainer.fit(trainer.reached, make_batches(3), 5).step == 5


def test_held_out_data_that_gives_nan_is_a_divergence(trainer):
    nan = [{**HELD_OUT[0], "inputs": np.full((8, 4), np.nan, np.float32)}]
    with pytest.raises(DivergedError, match="the held-out loss became nan at step 2"):
        trainer.fit(trainer.init(0), make_batches(), 4, evaluate=nan, every=2)


# --- early stopping ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "settings", "ends"),
    [
        ([3, 2, 2, 2], {"patience": 2}, 4),
        ([3, 2, 2.5, 1.9, 2, 2], {"patience": 2}, 6),
        ([3, 2.95, 2.9, 2.85], {"patience": 1, "min_delta": 0.5}, 2),
        ([3, 2.5, 2.0, 1.9], {"patience": 1, "min_delta": 0.5}, 4),
        ([1, 2, 3, 3], {"patience": 1, "mode": "max"}, 4),
        ([3, 2, 1], {"patience": 1, "mode": "max"}, 2),
        ([3, 2, 1], {"patience": 1}, None),
        ([np.nan, 1, 2, 3], {"patience": 2, "mode": "max"}, None),
        ([3, np.nan, np.nan], {"patience": 2}, 3),
    ],
)
def test_early_stopping_stops_at_the_right_evaluation(values, settings, ends):
    stop = gpipe.EarlyStopping(**settings)
    answers = [stop({"step": 10 * i, "test_loss": v}) for i, v in enumerate(values, 1)]
    assert (answers.index(True) + 1 if True in answers else None) == ends
    sign = -1 if settings.get("mode") == "max" else 1
    if "min_delta" not in settings:
        best = min((v for v in values if v == v), key=lambda v: sign * v)
        assert (stop.best, stop.best_step) == (best, 10 * (values.index(best) + 1))


def test_accuracies_are_best_when_high():
    assert gpipe.EarlyStopping("test_accuracy").mode == "max"
    assert gpipe.EarlyStopping("test_loss").mode == "min"


def test_early_stopping_ends_a_training_at_an_evaluation(trainer):
    """Let nothing be good enough: the first value is the best, and two more end the training."""
    stop = gpipe.EarlyStopping(patience=2, min_delta=100)
    current = trainer.fit(
        trainer.init(0), make_batches(), callbacks=[stop], evaluate=HELD_OUT, every=2
    )
    assert current.step == 6 and stop.best_step == 2
    current = trainer.fit(current, make_batches(6), callbacks=[stop], evaluate=HELD_OUT, every=2)
    assert current.step == 12 and stop.best_step == 8, "it starts afresh"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "best"}, "`mode` must be 'min' or 'max', got 'best'"),
        ({"patience": 0}, "`patience` must be a whole number of at least 1, got 0"),
        ({"min_delta": -1}, "`min_delta` must be at least 0, got -1"),
        ({"min_delta": float("nan")}, "`min_delta` must be at least 0, got nan"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ArgumentError, match=message):
        gpipe.EarlyStopping(**settings)


def test_a_metric_that_no_evaluation_has_is_an_error(trainer):
    stop = gpipe.EarlyStopping("test_acuracy")
    with pytest.raises(ArgumentError, match=r"'test_acuracy' is not in .* did you mean 'test_acc"):
        trainer.fit(trainer.init(0), make_batches(), 2, callbacks=[stop], evaluate=HELD_OUT)
    assert trainer.reached.step == 2


# --- progress ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "end"), [(4, "step 4/4: accuracy "), (None, "step 1: accuracy ")]
)
def test_progress_prints_lines_where_there_is_no_terminal(trainer, capsys, steps, end):
    trainer.fit(trainer.init(0), first(4), steps, progress=True, evaluate=HELD_OUT)
    printed = capsys.readouterr().out
    assert end in printed and "test_loss" in printed


def test_without_progress_nothing_is_printed(trainer, capsys):
    trainer.fit(trainer.init(0), first(4))
    assert capsys.readouterr().out == ""


# --- errors --------------------------------------------------------------------------------------

DIGITS = gpipe.data.digits(batch_size=8, seed=0)
WRONG = {
    "one batch": ({"batches": first(1)[0]}, r"`batches` is one batch, with \['inputs', 'labels'\]"),
    "a function": ({"batches": make_batches}, r"must be a list or an iterator .* call it, as data"),
    "a data set": ({"batches": DIGITS}, r"`batches` is a data set; give data.train\(0\)"),
    "a data set to evaluate": ({"evaluate": DIGITS}, "`evaluate` is a data set; give data.test"),
    "a number": ({"batches": 3}, "`batches` must be a list or an iterator of batches, got 3"),
    "no steps": ({"steps": 0}, "`steps` must be a whole number of at least 1, got 0"),
    "one callback": ({"callbacks": print}, "`callbacks` must be a list of functions, got <built"),
    "no function": ({"callbacks": [3]}, "`callbacks` has 3, which cannot be called"),
    "a class": (
        {"callbacks": [gpipe.EarlyStopping]},
        r"has the class EarlyStopping; make an instance: EarlyStopping\(...\)",
    ),
    "used up": ({"evaluate": iter(HELD_OUT)}, "`evaluate` is an iterator, which one evaluation"),
    "one held-out batch": ({"evaluate": HELD_OUT[0]}, "`evaluate` is one batch.* put it into a"),
    "nothing to evaluate": ({"every": 5}, "`every` 5 is the number of .* give held-out batches"),
    "every zero": (
        {"evaluate": HELD_OUT, "every": 0},
        "`every` must be a whole number of at least",
    ),
    "early": (
        {"callbacks": [gpipe.EarlyStopping()]},
        "'test_loss' of an evaluation.*evaluate=data",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_name_the_rule(trainer, arguments, message):
    current = trainer.init(0)
    with pytest.raises(ArgumentError, match=message):
        trainer.fit(current, **{"batches": first(2), **arguments})
    assert trainer.fit(current, first(1)).step == 1, "nothing was done"


def test_batches_without_a_batch_are_an_error(trainer):
    with pytest.raises(
        DataError, match=r"`batches` has no batch; give a list, or an iterator that"
    ):
        trainer.fit(trainer.init(0), iter([]))


def test_none_in_place_of_a_batch_does_not_end_training(trainer):
    with pytest.raises(DataError, match=r"`batches` has None in place of a batch, after step 2"):
        trainer.fit(trainer.init(0), [*first(2), None, *first(2)])
    assert trainer.reached.step == 2


def test_a_state_that_cannot_be_trained_is_refused(trainer):
    with pytest.raises(ArgumentError, match=r"must be a TrainState, got State; .* `trainer.start"):
        trainer.fit(trainer.pipe.init(0), first(1))
    old = trainer.init(0)
    current = trainer.fit(old, first(3))
    with pytest.raises(ArgumentError, match=r"`current` has been updated in place by an earlier"):
        trainer.fit(old, first(1))
    with pytest.raises(
        ArgumentError, match=r"`steps` 2 is the number of updates in all, .* done 3"
    ):
        trainer.fit(current, first(1), 2)
    assert trainer.fit(current, first(1), 3).step == 3, "they are done already"
