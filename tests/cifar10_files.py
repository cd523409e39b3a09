"""Write CIFAR-10 in its published forms, with few images, for tests of its reader."""

import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

PER_FILE = 30  # where the real files have 10,000
NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
File = tuple[np.ndarray, np.ndarray]  # rows [30, 3072], labels [30]


def draw(seed: int = 0) -> list[File]:
    """Draw six files of different images; each has every class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(PER_FILE) % 10
    return [
        (rng.integers(0, 256, (PER_FILE, 3072), np.uint8), rng.permutation(labels)) for _ in NAMES
    ]


def images_of(files: list[File]) -> np.ndarray:
    """Return the images [N, 32, 32, 3] of rows of planes."""
    rows = np.concatenate([rows for rows, _ in files])
    return np.stack([rows[:, plane : plane + 1024] for plane in (0, 1024, 2048)], -1).reshape(
        -1, 32, 32, 3
    )


def python2_pickle(rows: np.ndarray, labels: np.ndarray, *, fortran: bool = False) -> bytes:
    """Pickle as Python 2 did: all text is bytes, and numpy has its old names."""

    def text(a: bytes) -> bytes:
        return b"U" + bytes([len(a)]) + a

    dtype = (
        b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    shape = b"M" + struct.pack("<H", len(rows)) + b"M" + struct.pack("<H", 3072) + b"\x86"
    raw = rows.tobytes("F" if fortran else "C")
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01" + shape + dtype + (b"\x88" if fortran else b"\x89")
        + b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    )  # fmt: skip
    items = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    label = text(b"batch_label") + text(b"testing batch 1 of 1")
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + items + label + b"u."


def python3_pickle(rows: np.ndarray, labels: np.ndarray) -> bytes:
    return pickle.dumps({b"data": rows, b"labels": labels.tolist()}, protocol=3)


def fortran_pickle(rows: np.ndarray, labels: np.ndarray) -> bytes:
    return python2_pickle(rows, labels, fortran=True)


def records(rows: np.ndarray, labels: np.ndarray) -> bytes:
    """Encode the binary version."""
    return np.concatenate([labels[:, None].astype(np.uint8), rows], 1).tobytes()


def contents(files: list[File], encode: Callable, ending: str = "") -> dict[str, bytes]:
    return {n + ending: encode(*file) for n, file in zip(NAMES, files, strict=True)}


def write_folder(path: Path, files: dict[str, bytes]) -> None:
    path.mkdir(parents=True)
    for name, content in {"readme.html": b"<html>", **files}.items():
        (path / name).write_bytes(content)


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in {"readme.html": b"<html>", **files}.items():
            member = tarfile.TarInfo(f"cifar-10-batches/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_packed(path: Path, files: list[File]) -> None:
    """JPEG at its best quality: nearly the same pixels."""
    from PIL import Image

    arrays = {}
    for part, chosen in (("train", files[:5]), ("test", files[5:])):
        jpegs = []
        for image in images_of(chosen):
            stream = io.BytesIO()
            Image.fromarray(image).save(stream, "JPEG", quality=100, subsampling=0)
            jpegs.append(np.frombuffer(stream.getvalue(), np.uint8))
        arrays[f"{part}_jpeg"] = np.concatenate(jpegs)
        arrays[f"{part}_offset"] = np.cumsum([0, *map(len, jpegs)])
        arrays[f"{part}_label"] = np.concatenate([labels for _, labels in chosen]).astype(np.uint8)
    np.savez(path, **arrays)
