"""Check CIFAR-10 in all published forms, the messages for damaged files, and augmentation."""

import builtins
import gzip
import os
import pickle
import sys
from pathlib import Path

import cifar10_files as written
import numpy as np
import pytest

from gpipe_jax.data import cifar10_files
from gpipe_jax.data.cifar10_files import normalised, read_cifar10
from gpipe_jax.data.images import cut_out, flipped, shifted
from gpipe_jax.data.stream import Draws

FILES = written.draw()


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10_files, "_PER_FILE", written.PER_FILE)


def write(folder: Path, form: str, files: list = FILES) -> Path:
    """Write the files and return their path."""
    version, _, how = form.partition(" ")
    if version == "jpeg":
        path = folder / "cifar10_jpeg_packed.npz"
        written.write_packed(path, files)
        return path
    if version == "binary":
        names = "cifar-10-batches-bin", "cifar-10-binary.tar.gz"
        contents = written.contents(files, written.records, ".bin")
    else:
        names = "cifar-10-batches-py", "cifar-10-python.tar.gz"
        encode = {
            "python": written.python2_pickle,
            "python3": written.python3_pickle,
            "fortran": written.fortran_pickle,
        }[version]
        contents = written.contents(files, encode)
    path = folder / names[how == "archive"]
    (written.write_archive if how == "archive" else written.write_folder)(path, contents)
    return path


# --- reading -------------------------------------------------------------------------------------

FORMS = ["python folder", "python archive", "binary folder", "binary archive", "python3 folder"]
FORMS += ["fortran archive", "jpeg"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(tmp_path: Path, form: str) -> None:
    write(tmp_path, form)
    train, test = read_cifar10(tmp_path)
    for split, files in ((train, FILES[:5]), (test, FILES[5:])):
        expected = written.images_of(files)
        assert split.pixels.dtype == np.uint8 and split.labels.dtype == np.int32
        assert split.pixels.shape == expected.shape
        # JPEG rounds twice, and its colours are not ours; any other image is 85 away on average
        error = np.abs(split.pixels.astype(int) - expected)
        assert error.mean() < 2 and error.max() < 20 if form == "jpeg" else error.max() == 0
        np.testing.assert_array_equal(split.labels, np.concatenate([labels for _, labels in files]))


def test_the_pickles_of_these_tests_are_those_of_numpy() -> None:
    """Check the test's writer with numpy's own reader, as ours runs no code of numpy."""
    rows, labels = FILES[0]
    for encode in (written.python2_pickle, written.fortran_pickle, written.python3_pickle):
        record = pickle.loads(encode(rows, labels), encoding="bytes")
        np.testing.assert_array_equal(record[b"data"], rows)
        assert record[b"labels"] == labels.tolist()


def test_a_folder_within_the_folder_will_do(tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    write(tmp_path / "cifar10", "binary archive")
    assert len(read_cifar10(str(tmp_path))[0].labels) == 150


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "python folder")
    monkeypatch.setenv("GPIPE_JAX_DATA", str(tmp_path))
    assert len(read_cifar10()[1].labels) == 30
    with pytest.raises(FileNotFoundError, match=r"no folder .*elsewhere"):  # what is given wins
        read_cifar10(tmp_path / "elsewhere")


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPIPE_JAX_DATA", raising=False)
    remedy = (
        "download the python or binary version from https://www.cs.toronto.edu/~kriz/cifar.html"
    )
    with pytest.raises(FileNotFoundError, match=f"not given and GPIPE_JAX_DATA is not .*{remedy}"):
        read_cifar10()
    with pytest.raises(FileNotFoundError, match=f"no folder .*/gone; {remedy}"):
        read_cifar10(tmp_path / "gone")
    names = "cifar-10-batches-py, cifar-10-batches-bin, cifar-10-python.tar.gz, .*packed.npz"
    with pytest.raises(FileNotFoundError, match=f"has none of {names}; {remedy}"):
        read_cifar10(tmp_path)


def test_missing_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "jpeg")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"packed.npz holds JPEG images: run pip install pillow"):
        read_cifar10(tmp_path)


def refused(folder: Path, reason: str) -> None:
    message = rf"cannot be read as CIFAR-10 \(.*{reason}.*\); download it again from https://www.cs"
    with pytest.raises(ValueError, match=message):
        read_cifar10(folder)


@pytest.mark.parametrize("form", ["python archive", "binary archive", "jpeg"])
def test_a_download_that_was_cut_off(tmp_path: Path, form: str) -> None:
    path = write(tmp_path, form)
    path.write_bytes(path.read_bytes()[:-1000])
    refused(tmp_path, "")


def test_an_archive_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(gzip.compress(b"not found"))
    refused(tmp_path, "ReadError: truncated header")


@pytest.mark.parametrize("form", ["python folder", "binary folder"])
def test_a_file_that_is_missing(tmp_path: Path, form: str) -> None:
    next(write(tmp_path, form).glob("data_batch_3*")).unlink()
    refused(tmp_path, "there is no data_batch_3")


@pytest.mark.parametrize("form", ["python folder", "binary folder"])
@pytest.mark.parametrize("keep", [-1, 1000])
def test_a_file_that_is_too_short(tmp_path: Path, form: str, keep: int) -> None:
    path = next(write(tmp_path, form).glob("data_batch_3*"))
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, "")


@pytest.mark.parametrize("form", ["python archive", "binary archive", "jpeg"])
def test_too_few_images(tmp_path: Path, form: str) -> None:
    *most, (rows, labels) = FILES
    write(tmp_path, form, [*most, (rows[:-1], labels[:-1])])
    refused(
        tmp_path, r"pixels and labels of test\S* are \(\(29, 32, 32, 3\), \(29,\)\), not \(\(30"
    )


def test_a_label_for_each_image(tmp_path: Path) -> None:
    *most, (rows, labels) = FILES
    write(tmp_path, "python folder", [*most, (rows, labels[:-1])])
    refused(tmp_path, r"of test_batch are \(\(30, 32, 32, 3\), \(29,\)\)")


@pytest.mark.parametrize("form", ["python archive", "binary archive", "jpeg"])
def test_labels_that_are_none(tmp_path: Path, form: str) -> None:
    *most, (rows, labels) = FILES
    write(tmp_path, form, [*most, (rows, labels + 1)])
    refused(tmp_path, r"labels of test\S* are 1 to 10")


def test_pickles_run_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "python folder") / "data_batch_2"
    for call in (os.mkdir, builtins.open, np.frombuffer):
        reduce = type(
            "Reduce", (), {"__reduce__": lambda self, c=call: (c, (str(tmp_path / "x"),))}
        )
        path.write_bytes(pickle.dumps({b"data": reduce()}, protocol=3))
        refused(tmp_path, r"UnpicklingError: it asks for \S+, which no CIFAR-10 file does")
    assert not (tmp_path / "x").exists()


def test_packed_images_that_are_none(tmp_path: Path) -> None:
    path = write(tmp_path, "jpeg")
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "test_jpeg": np.zeros_like(arrays["test_jpeg"])})
    refused(tmp_path, "UnidentifiedImageError")
    del arrays["test_jpeg"]
    np.savez(path, **arrays)
    refused(tmp_path, "KeyError")


def test_pixels_are_normalised_channel_by_channel() -> None:
    """Check each channel; test_data.py checks the constants on the real images."""
    pixels = np.asarray([[[[0, 0, 0], [255, 255, 255]]]], np.uint8)
    black, white = normalised(pixels)[0, 0]
    np.testing.assert_allclose(white - black, [1 / 0.2470, 1 / 0.2435, 1 / 0.2616], rtol=1e-6)
    np.testing.assert_allclose(black, [-1.98947, -1.98029, -1.70681], rtol=1e-5)
    assert black.dtype == np.float32


# --- random changes ------------------------------------------------------------------------------

NUMBERED = np.arange(1, 1 + 400 * 6 * 6 * 2, dtype=np.float32).reshape(400, 6, 6, 2)


def draws(seed: int, rows: np.ndarray | None = None) -> Draws:
    return Draws(np.random.default_rng(seed), len(NUMBERED), rows)


def test_images_are_moved_as_wholes_by_every_amount() -> None:
    moved = shifted(NUMBERED, draws(0), most=2, fill=-1.0)
    assert moved.shape == NUMBERED.shape and moved.dtype == np.float32
    seen = set()
    for before, after in zip(NUMBERED, moved, strict=True):
        row, column = np.argwhere(after[..., 0] > 0)[0]  # the first pixel that is no edge
        start = np.argwhere(before[..., 0] == after[row, column, 0])[0]
        down, right = np.asarray([row, column]) - start
        seen.add((int(down), int(right)))
        expected = np.full_like(before, -1.0)
        for y in range(6):
            for x in range(6):
                if 0 <= y - down < 6 and 0 <= x - right < 6:
                    expected[y, x] = before[y - down, x - right]
        np.testing.assert_array_equal(after, expected)
    assert seen == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}


def test_half_of_the_images_are_mirrored_left_to_right() -> None:
    after = flipped(NUMBERED, draws(0))
    same = (after == NUMBERED).all((1, 2, 3))
    mirrored = (after == NUMBERED[:, :, ::-1]).all((1, 2, 3))
    assert np.all(same ^ mirrored) and 160 < mirrored.sum() < 240


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_squares_are_cut_out_around_every_pixel(size: int) -> None:
    after = cut_out(NUMBERED, draws(0), size=size)
    assert after.dtype == np.float32
    holes = after == 0
    np.testing.assert_array_equal(after[~holes], NUMBERED[~holes])
    expected = []
    for y in range(6):
        for x in range(6):
            top, left = y - size // 2, x - size // 2
            hole = np.zeros((6, 6, 2), bool)
            hole[max(top, 0) : top + size, max(left, 0) : left + size] = True
            expected.append(hole)
    seen = np.unique(holes, axis=0)
    np.testing.assert_array_equal(seen, np.unique(np.stack(expected), axis=0))


@pytest.mark.parametrize(
    "change",
    [lambda a, rng: shifted(a, rng, most=2), flipped, lambda a, rng: cut_out(a, rng, size=3)],
)
def test_changes_are_those_of_the_generator(change) -> None:
    first, again, other = (change(NUMBERED, draws(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    rows = np.array([5, 3, 300])
    np.testing.assert_array_equal(change(NUMBERED[rows], draws(0, rows)), first[rows])
