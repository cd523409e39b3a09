"""Check data sets: a batch depends only on (seed, step), and held-out examples stay held out."""

import itertools
import os
import sys
from pathlib import Path

import cifar10_files
import numpy as np
import own_files
import pytest
from paths import SHARED_DATA

from gpipe_jax.data import array_record, arrays, stream
from gpipe_jax.data import cifar10_files as images
from gpipe_jax.data.cifar10_files import normalised
from gpipe_jax.data.images import cifar10, cut_out, digits, flipped, shifted
from gpipe_jax.data.synthetic import synthetic_images, synthetic_tokens
from gpipe_jax.data.text_files import _stdlib_files, text

LENGTH = 16


@pytest.fixture
def counter(tmp_path):
    """Write a text of 2000 bytes in which every two successive bytes give their position."""
    path = tmp_path / "counter.txt"
    path.write_bytes(np.arange(1000, dtype=">u2").tobytes())
    return path


FILES = cifar10_files.draw()


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Write a folder with a CIFAR-10 of 150 training and 30 test images."""
    monkeypatch.setattr(images, "_PER_FILE", cifar10_files.PER_FILE)
    contents = cifar10_files.contents(FILES, cifar10_files.records, ".bin")
    cifar10_files.write_folder(tmp_path / "cifar-10-batches-bin", contents)
    return tmp_path


@pytest.fixture(
    params=[
        *("digits", "topics", "file", "cifar10", "synthetic_images", "synthetic_tokens"),
        *("npz", "npy", "array_record"),
    ]
)
def make(request, counter, small, tmp_path):
    """Return a data set as a function of batch size and seed."""
    return {
        "digits": digits,
        "topics": lambda batch_size, seed: text("topics", batch_size, LENGTH, seed),
        "file": lambda batch_size, seed: text(counter, batch_size, LENGTH, seed),
        "cifar10": lambda batch_size, seed: cifar10(batch_size, seed, folder=small, cutout=8),
        "synthetic_images": lambda b, seed: synthetic_images(b, seed, image=5, classes=3),
        "synthetic_tokens": lambda b, seed: synthetic_tokens(b, LENGTH, 9, seed),
        "npz": lambda b, seed: arrays(own_files.npz(tmp_path), b, seed),
        "npy": lambda b, seed: arrays(own_files.npy(tmp_path), b, seed),
        "array_record": lambda b, seed: array_record(own_files.records(tmp_path), b, seed),
    }[request.param]


@pytest.mark.parametrize("rows", [[0, 1, 4, 5], [2, 3], list(range(8))])
def test_a_process_reads_its_rows_of_every_batch(make, rows):
    """Read and augment some rows as a process that reads all rows does."""
    dataset = make(8, 3)
    whole, selected = dataset.train(2), dataset.train(2, np.asarray(rows))
    for _ in range(3):
        batch, some = next(whole), next(selected)
        assert batch.keys() == some.keys()
        for name, array in batch.items():
            np.testing.assert_array_equal(some[name], array[rows])


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


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_rows_are_those_of_the_batch_for_any_number_of_processes(make, processes):
    whole, dataset = take(make(8, seed=1).train(3), 3), make(8, seed=1)
    rows = np.random.default_rng(processes).permutation(8).reshape(processes, -1)
    batches = [take(dataset.train(3, some), 3) for some in rows]
    for step, batch in enumerate(whole):
        for key in batch:
            read = np.concatenate([each[step][key] for each in batches])
            np.testing.assert_array_equal(read, batch[key][rows.ravel()])


def test_rows_of_other_processes_are_not_looked_up():
    looked_up = []

    def gather(index):
        looked_up.extend(index)
        return {"inputs": index, "labels": index}

    def change(batch, draws):
        return {**batch, "inputs": draws.random()}

    splits = (gather, 100), (gather, 10)
    batches = stream.dataset("counted", 10, 0, *splits, augment=change).train(0, np.array([2, 7]))
    assert all(len(a) == 2 for a in next(batches).values())
    batches = list(itertools.islice(batches, 20))
    assert set(looked_up[:42]) >= {i for batch in batches for i in batch["labels"]}
    assert len(looked_up) <= 2 * (21 + 8)  # those that were read ahead


def test_streams_are_independent(make):
    dataset = make(8, seed=1)
    ahead, other = dataset.train(0), dataset.train(0)
    next(ahead)
    assert_equal([next(other)], take(dataset.train(0), 1))


def test_test_set_is_one_pass_in_order_with_a_ragged_end(make):
    dataset = make(7, seed=1)
    sizes = [len(batch["labels"]) for batch in dataset.test()]
    assert sum(sizes) == dataset.test_examples
    assert set(sizes[:-1]) <= {7} and 1 <= sizes[-1] <= 7
    assert_equal(dataset.test(), dataset.test())
    more = rows(make(64, seed=1).test())
    np.testing.assert_array_equal(rows(dataset.test()), more[: dataset.test_examples])


def test_digits_shapes_and_range():
    batch = next(digits(8, 0).train(0))
    assert batch["inputs"].shape == (8, 8, 8, 1) and batch["inputs"].dtype == np.float32
    assert batch["labels"].shape == (8,) and batch["labels"].dtype == np.int32
    inputs = rows(digits(8, 0).test())
    assert inputs.min() == -1 and inputs.max() == 1 and abs(inputs.mean()) < 0.5


def test_digits_are_moved_over_the_background():
    plain, moved = (next(digits(256, 0, shift=shift).train(0)) for shift in (0, 7))
    np.testing.assert_array_equal(plain["labels"], moved["labels"])
    assert moved["inputs"].mean() < plain["inputs"].mean() - 0.2  # -1, where there was ink


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


# --- CIFAR-10 ------------------------------------------------------------------------------------


def stored(files):
    pixels = normalised(cifar10_files.images_of(files))
    return pixels, np.concatenate([labels for _, labels in files])


def test_cifar10_without_augmentation_is_its_images(small):
    dataset = cifar10(30, 0, folder=small, cutout=8, augment=False)
    assert (dataset.train_examples, dataset.test_examples) == (150, 30)
    (batch,) = dataset.test()
    pixels, labels = stored(FILES[5:])
    np.testing.assert_array_equal(batch["inputs"], pixels)
    np.testing.assert_array_equal(batch["labels"], labels)
    assert batch["inputs"].dtype == np.float32 and batch["labels"].dtype == np.int32
    epoch = take(dataset.train(0), 5)
    pixels, labels = stored(FILES[:5])
    have = np.concatenate([rows(epoch).reshape(150, -1), rows(epoch, "labels")[:, None]], 1)
    expected = np.concatenate([pixels.reshape(150, -1), labels[:, None]], 1)
    np.testing.assert_array_equal(np.unique(have, axis=0), np.unique(expected, axis=0))


@pytest.mark.parametrize("cutout", [0, 8])
def test_cifar10_training_images_are_moved_mirrored_and_cut_in_zeros(small, cutout):
    """Repeat the draws on the stored images, with the mean colour for edges."""
    plain = next(cifar10(50, 3, folder=small, augment=False).train(0))
    dataset = cifar10(50, 3, folder=small, cutout=cutout)
    batch = next(dataset.train(0))
    np.testing.assert_array_equal(batch["labels"], plain["labels"])
    holes = (batch["inputs"] == 0).all(-1)
    assert holes.any((1, 2)).mean() > 0.8  # one shift in 81 uncovers nothing
    kept = batch["inputs"][~holes]
    colours = {tuple(c) for c in np.round(plain["inputs"].reshape(-1, 3), 4)}
    assert {tuple(c) for c in np.round(kept, 4)} <= colours
    least = holes[:, 4:-4, 4:-4].sum((1, 2))  # what a move uncovers is at the edge
    assert (least.max() > 0) == (cutout > 0) and least.max() <= cutout**2
    np.testing.assert_array_equal(rows(dataset.test()), stored(FILES[5:])[0])


def test_cifar10_augments_step_by_step(small, monkeypatch):
    """Pad by 4, then mirror, then cut out: each from the generator of (seed, step)."""
    calls = []

    def spy(function):
        def called(inputs, rng, **options):
            calls.append((function.__name__, options))
            return function(inputs, rng, **options)

        return called

    for function in (shifted, flipped, cut_out):
        monkeypatch.setattr(f"gpipe_jax.data.images.{function.__name__}", spy(function))
    dataset = cifar10(50, 3, folder=small, cutout=8)
    next(dataset.train(0))
    assert calls[:3] == [("shifted", {"most": 4}), ("flipped", {}), ("cut_out", {"size": 8})]


@pytest.mark.parametrize("seed", [0, 1])
def test_cifar10_validation_images_are_held_out_of_training(small, seed):
    dataset = cifar10(1, seed, folder=small, validation=40, augment=False)
    assert (dataset.train_examples, dataset.test_examples) == (110, 40)
    splits = [rows(take(dataset.train(0), 110)), rows(dataset.test())]
    every = np.concatenate(splits).reshape(150, -1)
    expected = stored(FILES[:5])[0].reshape(150, -1)
    np.testing.assert_array_equal(np.unique(every, axis=0), np.unique(expected, axis=0))
    again = rows(cifar10(7, 5, folder=small, validation=40).test())
    np.testing.assert_array_equal(splits[1], again)  # with any seed
    labels = rows(dataset.test(), "labels")
    assert len(np.unique(labels)) > 5  # files may be sorted by class; the draw is not their end


@pytest.mark.parametrize("validation", [-1, 150])
def test_cifar10_validation_errors(small, validation):
    message = f"validation of cifar10 is {validation}: use 0 .* to 149 of the 150 training images"
    with pytest.raises(ValueError, match=message):
        cifar10(8, 0, folder=small, validation=validation)


@pytest.mark.parametrize("cutout", [-1, 33])
def test_cifar10_cutout_errors(cutout):
    message = rf"cutout of cifar10 is {cutout}: use 0 \(none\) to 32 pixels"
    with pytest.raises(ValueError, match=message):
        cifar10(8, 0, cutout=cutout)


REAL = Path(os.environ.get("GPIPE_JAX_DATA") or SHARED_DATA)


def is_there() -> bool:
    places = (REAL, REAL / "cifar10")
    return any((place / name).exists() for place in places for name in images._READERS)


@pytest.mark.slow
@pytest.mark.skipif(not is_there(), reason=f"no CIFAR-10 in {REAL}; set GPIPE_JAX_DATA")
def test_the_real_cifar10(monkeypatch):
    splits = images.read_cifar10(REAL)
    for split, count in zip(splits, (50_000, 10_000), strict=True):
        assert split.pixels.shape == (count, 32, 32, 3)
        np.testing.assert_array_equal(np.bincount(split.labels), [count // 10] * 10)
    some = normalised(splits[0].pixels[::10]).reshape(-1, 3).astype(np.float64)
    # Of a tenth of the images; lossy JPEG takes 0.7 % of the deviation.
    np.testing.assert_allclose(some.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(some.std(0), 1, atol=0.03)
    monkeypatch.setattr("gpipe_jax.data.images.read_cifar10", lambda folder: splits)
    dataset = cifar10(1000, 0, validation=5000)
    assert (dataset.train_examples, dataset.test_examples) == (45_000, 5_000)
    held_out = np.bincount(rows(dataset.test(), "labels"))
    assert len(held_out) == 10 and held_out.min() > 400 and held_out.max() < 600


# --- synthetic -----------------------------------------------------------------------------------


def test_synthetic_images_are_noise_of_the_given_shape():
    dataset = synthetic_images(64, 0, image=9, classes=3)
    batch = next(dataset.train(0))
    assert batch["inputs"].shape == (64, 9, 9, 3) and batch["inputs"].dtype == np.float32
    assert batch["labels"].shape == (64,) and batch["labels"].dtype == np.int32
    assert abs(batch["inputs"].mean()) < 0.05 and abs(batch["inputs"].std() - 1) < 0.02
    assert np.unique(batch["labels"]).tolist() == [0, 1, 2]
    assert len(np.unique(batch["inputs"], axis=0)) == 64


def test_synthetic_tokens_are_followed_by_their_labels():
    batch = next(synthetic_tokens(64, LENGTH, 9, 0).train(0))
    assert batch["inputs"].shape == batch["labels"].shape == (64, LENGTH)
    assert batch["inputs"].dtype == batch["labels"].dtype == np.int32
    assert np.unique(batch["inputs"]).tolist() == list(range(9))
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["labels"][:, :-1])


def test_synthetic_examples_held_out_are_others_and_two_batches():
    dataset = synthetic_images(4, 0, image=3, classes=5)
    assert len(rows(dataset.test())) == dataset.test_examples == 8
    both = [*take(dataset.train(0), 2), *dataset.test()]
    assert len(np.unique(rows(both), axis=0)) == 16
    other = synthetic_images(4, 1, image=3, classes=5)
    assert not np.isin(rows(other.test()), rows(dataset.test())).any()


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda: synthetic_images(8, 0, image=0, classes=3), "`image` must be a whole number"),
        (lambda: synthetic_images(8, 0, image=3, classes=0), "`classes` must be a whole number"),
        (
            lambda: synthetic_tokens(8, 0, 3, 0),
            "`length` must be a whole number",
        ),
        (lambda: synthetic_tokens(8, 3, 0, 0), "`vocabulary` must be a whole number"),
    ],
)
def test_synthetic_argument_errors(make_one, message):
    with pytest.raises(ValueError, match=message):
        make_one()


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed of .* is -1: use 0 to 4294967295"),
        ({"test_fraction": 1.0}, "`test_fraction` must be more than 0 and less than 1, got 1.0"),
    ],
)
def test_argument_errors(change, message):
    given = {"batch_size": 8, "seed": 0, **change}
    if "test_fraction" not in change:
        with pytest.raises(ValueError, match=message):
            cifar10(**given)
        with pytest.raises(ValueError, match=message):
            synthetic_images(**given, image=3, classes=3)
    with pytest.raises(ValueError, match=message):
        digits(**given)
    with pytest.raises(ValueError, match=message):
        text("topics", length=LENGTH, **given)


def test_batch_size_above_the_examples(counter):
    message = "`batch_size` 2000 is above the 1437 training examples of digits: use 1437 or fewer"
    with pytest.raises(ValueError, match=message):
        digits(2000, 0)
    with pytest.raises(
        ValueError, match="`batch_size` 2000 is above the 1784 training examples of"
    ):
        text(counter, 2000, LENGTH, 0)


def test_negative_step():
    with pytest.raises(ValueError, match="start_step is -1: steps count from 0"):
        digits(8, 0).train(-1)


def test_file_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot read text file .*gone.txt: No such file"):
        text(tmp_path / "gone.txt", 8, LENGTH, 0)
    with pytest.raises(IsADirectoryError, match="a readable file, a glob, 'topics' or"):
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


def test_text_of_many_files(tmp_path, counter):
    whole = counter.read_bytes()
    folder = tmp_path / "books" / "of one"
    folder.mkdir(parents=True)
    (tmp_path / "books" / "a.txt").write_bytes(whole[:700])
    (folder / "b.txt").write_bytes(whole[700:])
    many, single = (text(source, 8, LENGTH, 0) for source in (tmp_path / "books/**/*.txt", counter))
    assert_equal(take(many.train(0), 3), take(single.train(0), 3))
    assert_equal(many.test(), single.test())
    with pytest.raises(
        FileNotFoundError, match=r"cannot read text file .*\*.text: no file matches"
    ):
        text(tmp_path / "books" / "*.text", 8, LENGTH, 0)


# --- the inputs of several hosts -----------------------------------------------------------------


def test_a_sketch_tells_inputs_apart():
    """Differ for one other number, another order or shape; not for another rounding."""
    rng = np.random.default_rng(1)
    batch = {"inputs": rng.normal(size=(6, 8, 8, 3)), "labels": np.arange(6)}
    numbers, tolerance = stream.sketch(batch)

    def differs(inputs: np.ndarray) -> bool:
        found, _ = stream.sketch({**batch, "inputs": inputs})
        return bool((np.abs(found - numbers) > tolerance).any())

    inputs = batch["inputs"]
    other = inputs.copy()
    other[3, 1, 2, 0] += 0.5
    assert differs(other) and differs(inputs[::-1]) and differs(inputs[:, ::-1])
    assert not differs(inputs.astype(np.float32)) and not differs(inputs * (1 + 1e-7))
    assert not differs(inputs.copy())


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_sketch_of_any_numbers_is_finite(value):
    batch = {"inputs": np.full((2, 4), value, np.float32), "labels": np.zeros(2, np.int64)}
    assert all(np.isfinite(numbers).all() for numbers in stream.sketch(batch))
