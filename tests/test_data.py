"""Datasets: every batch is a function of (seed, step), and the held-out part stays held out."""

import itertools
import sys

import numpy as np
import pytest

from gpipe_jax.data import _stdlib_files, digits, text

LENGTH = 16


@pytest.fixture
def counter(tmp_path):
    """A text of 2000 bytes in which every two bytes in a row tell their place."""
    path = tmp_path / "counter.txt"
    path.write_bytes(np.arange(1000, dtype=">u2").tobytes())
    return path


@pytest.fixture(params=["digits", "topics", "file"])
def make(request, counter):
    """A data set as a function of batch size and seed."""
    if request.param == "digits":
        return digits
    source = counter if request.param == "file" else "topics"
    return lambda batch_size, seed: text(source, batch_size, LENGTH, seed)


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() == {"inputs", "labels"}
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def rows(batches, key="inputs"):
    return np.concatenate([batch[key] for batch in batches])


def test_batches_are_a_function_of_seed_and_step(make):
    first = take(make(8, seed=1).train(0), 6)
    assert_equal(first, take(make(8, seed=1).train(0), 6))
    assert_equal(first[4:], take(make(8, seed=1).train(4), 2))
    assert not np.array_equal(rows(first), rows(take(make(8, seed=2).train(0), 6)))
    assert not np.array_equal(first[0]["inputs"], first[1]["inputs"])


def test_starting_late_looks_nothing_up_before(make):
    late = take(make(8, seed=1).train(10**12), 2)  # iterating would take years
    assert_equal(late[1:], take(make(8, seed=1).train(10**12 + 1), 1))


def test_streams_are_independent(make):
    dataset = make(8, seed=1)
    one, other = dataset.train(0), dataset.train(0)
    next(one)
    assert_equal([next(other)], take(dataset.train(0), 1))


def test_test_set_is_one_pass_in_order_with_a_ragged_end(make):
    dataset = make(7, seed=1)
    sizes = [len(batch["labels"]) for batch in dataset.test()]
    assert sum(sizes) == dataset.test_examples
    assert set(sizes[:-1]) <= {7} and 1 <= sizes[-1] <= 7
    assert_equal(dataset.test(), dataset.test())
    np.testing.assert_array_equal(rows(dataset.test()), rows(make(64, seed=1).test()))


def test_digits_shapes_and_range():
    batch = next(digits(8, 0).train(0))
    assert batch["inputs"].shape == (8, 8, 8, 1) and batch["inputs"].dtype == np.float32
    assert batch["labels"].shape == (8,) and batch["labels"].dtype == np.int32
    inputs = rows(digits(8, 0).test())
    assert inputs.min() == -1 and inputs.max() == 1 and abs(inputs.mean()) < 0.5


def test_digits_split_is_complete_stratified_and_seeded():
    from sklearn.datasets import load_digits

    dataset = digits(1, seed=3)
    assert (dataset.train_examples, dataset.test_examples) == (1437, 360)
    every = np.concatenate(
        [rows(take(dataset.train(0), 1437)).reshape(-1, 64), rows(dataset.test()).reshape(-1, 64)]
    )
    # no two digits are alike, so equal sets mean: train and test are disjoint, an epoch is complete
    images = load_digits(return_X_y=True)[0] / 8 - 1
    assert len(np.unique(images, axis=0)) == 1797
    np.testing.assert_array_equal(np.unique(every, axis=0), np.unique(images, axis=0))
    counts = np.bincount(rows(dataset.test(), "labels"))
    assert counts.min() >= 34 and counts.max() <= 37
    assert not np.array_equal(rows(dataset.test()), rows(digits(1, seed=4).test()))


def test_every_epoch_is_complete_and_differs(counter):
    dataset = text(counter, 100, LENGTH, seed=0)
    assert dataset.train_examples == 1800 - LENGTH
    count = dataset.train_examples
    seen = rows(take(dataset.train(0), 2 * count // 100 + 1))[: 2 * count]  # batches cross epochs
    epochs = seen[:count], seen[count:]
    assert not np.array_equal(*epochs)
    for epoch in epochs:
        assert len(np.unique(epoch, axis=0)) == count


def test_text_labels_are_the_next_bytes():
    dataset = text("topics", 8, LENGTH, seed=0)
    for batch in (next(dataset.train(0)), next(dataset.test())):
        assert batch["inputs"].shape == batch["labels"].shape == (8, LENGTH)
        assert batch["inputs"].dtype == batch["labels"].dtype == np.int32
        np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["labels"][:, :-1])


@pytest.mark.parametrize("length", [1, 8, 24, 200])
def test_text_predicts_each_held_out_byte_once(counter, length):
    data = np.frombuffer(counter.read_bytes(), np.uint8)
    dataset = text(counter, 3, length, seed=0)
    kept = 200 // length * length  # 24: eight bytes are left of a window and dropped
    assert dataset.test_examples == 200 // length
    np.testing.assert_array_equal(rows(dataset.test(), "labels").ravel(), data[1800:][:kept])
    np.testing.assert_array_equal(rows(dataset.test()).ravel(), data[1799:][:kept])


def test_text_never_trains_on_the_held_out_part(tmp_path):
    path = tmp_path / "two_parts.txt"
    path.write_bytes(b"a" * 900 + b"b" * 100)
    dataset = text(path, 50, LENGTH, seed=0)
    epoch = take(dataset.train(0), dataset.train_examples // 50 + 1)
    assert np.all(rows(epoch) == ord("a")) and np.all(rows(epoch, "labels") == ord("a"))
    assert np.all(rows(dataset.test(), "labels") == ord("b"))


def test_topics_are_in_order():
    from pydoc_data.topics import topics

    held_out = bytes(rows(text("topics", 1, 1, seed=0).test(), "labels").astype(np.uint8))
    assert "".join(topics[key] for key in sorted(topics)).encode().endswith(held_out)
    assert len(held_out) > 40_000


def test_stdlib_is_code_without_tests():
    files = [path.as_posix() for path in _stdlib_files()]
    assert any(path.endswith("/asyncio/events.py") for path in files)
    assert not any("/test/" in path or "/site-packages/" in path for path in files)
    dataset = text("stdlib", 4, LENGTH, seed=0)
    assert 5_000_000 < dataset.train_examples < 50_000_000
    assert next(dataset.train(0))["inputs"].max() < 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size of .* is 0: use 1 or more"),
        ({"seed": -1}, "seed of .* is -1: use 0 to 4294967295"),
        ({"test_fraction": 1.0}, r"test_fraction of .* is 1.0: use a number in \(0, 1\)"),
    ],
)
def test_argument_errors(change, message):
    given = {"batch_size": 8, "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        digits(**given)
    with pytest.raises(ValueError, match=message):
        text("topics", length=LENGTH, **given)


def test_batch_size_above_the_examples(counter):
    message = "batch_size 2000 is above the 1437 training examples of digits: use 1437 or fewer"
    with pytest.raises(ValueError, match=message):
        digits(2000, 0)
    with pytest.raises(ValueError, match="batch_size 2000 is above the 1784 training examples of"):
        text(counter, 2000, LENGTH, 0)


def test_negative_step():
    with pytest.raises(ValueError, match="start_step is -1: steps count from 0"):
        digits(8, 0).train(-1)


def test_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot read text file .*gone.txt: No such file"):
        text(tmp_path / "gone.txt", 8, LENGTH, 0)
    with pytest.raises(IsADirectoryError, match="give the path of a readable file, 'topics' or"):
        text(tmp_path, 8, LENGTH, 0)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"text file .*empty.txt is empty: give a file with text"):
        text(tmp_path / "empty.txt", 8, LENGTH, 0)


@pytest.mark.parametrize("length", [0, 201])
def test_text_length_errors(counter, length):
    message = (
        rf"length {length} does not fit text .*counter.txt of 2000 bytes, 1800 for training and "
        "200 held out: use a length of 1 to 200"
    )
    with pytest.raises(ValueError, match=message):
        text(counter, 8, length, 0)


def test_text_too_short(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(b"a")
    with pytest.raises(ValueError, match=r"one.txt of 1 bytes is too short: .* use a longer text"):
        text(path, 1, 1, 0)


def test_missing_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'gpipe-jax\[examples\]'"):
        digits(8, 0)
