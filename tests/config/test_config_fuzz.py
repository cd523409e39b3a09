"""Thousands of damaged config files: each is read, or refused with places and exit code 2.

The files of configs/ are changed at random (types, ranges, keys, nesting, YAML itself), from a seed
for each case, and given to `gpipe train` up to where something would be compiled: data, network,
loss, devices, schedule, batch, shapes and optimizer are still made.
"""

import functools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paths
import pytest
import yaml

from gpipe_jax.cli import main as cli
from gpipe_jax.layers.shape_inference import infer_shapes
from gpipe_jax.pipeline.batches import micro_batches
from gpipe_jax.schedules.generators import training_schedule
from gpipe_jax.training import from_config, run

CONFIGS = sorted(paths.CONFIGS.glob("*.yaml"))
CASES, SLICE = 5000, 150

NUMBERS = [0, -1, 1, 2, 3, 7, 64, 1000, 10**6, 2**31 - 1, 2**31, 2**63, -(2**63), 10**400, 0.0]
NUMBERS += [0.5, -0.5, 1.0, 1.5, 1e-300, 5e-324, 1e308, float("inf"), float("-inf"), float("nan")]
TEXTS = ["", " ", "x", "auto", "digits", "adamw", "mlp", "1", "3e-4", "1e400", "-0", "0x10", "0b2"]
TEXTS += ["12:30:45", "off", "null", "~", "é", "٣", "日本", "🙂", "\u202e", "a\nb", "'", '"', "\\"]
TEXTS += [
    "x" * 5000,
    "../..",
    "/",
    "\x00",
    "\x7f",
    "%",
    "{",
    "${HOME}",
    "!!int 3",
    "*a",
    "&a",
    "- 1",
]
THINGS = [None, True, False, [], {}, [1], [0, -1], [[1], 2], [None], {"a": 1}, {"kind": "mlp"}]
THINGS += [list(range(100)), {"": 0}, {1: 2}, {None: 0}, {True: {}}, b"\xff", [3, 3], [1.5]]
VALUES: list[Any] = [*NUMBERS, *TEXTS, *THINGS]


# --- changes of the values ------------------------------------------------------------------------


def pick(tree: dict, rng: random.Random) -> tuple[dict, Any]:
    """Choose a mapping in the tree, and one of its keys."""
    mappings = [tree, *(value for value in tree.values() if isinstance(value, dict) and value)]
    chosen = rng.choice([m for m in mappings if m])
    return chosen, rng.choice(list(chosen))


def set_value(tree: dict, rng: random.Random) -> None:
    mapping, key = pick(tree, rng)
    mapping[key] = rng.choice(VALUES)


def change_number(tree: dict, rng: random.Random) -> None:
    mapping, key = pick(tree, rng)
    if isinstance(mapping[key], int | float):
        change = rng.choice([-1, 0.5, 2, 3, 10, 1000, 1 << 40, 1e-9])
        mapping[key] = rng.choice([mapping[key] * change, str(mapping[key]), [mapping[key]]])


def remove(tree: dict, rng: random.Random) -> None:
    mapping, key = pick(tree, rng)
    del mapping[key]


def misspell(tree: dict, rng: random.Random) -> None:
    mapping, key = pick(tree, rng)
    letters = list(str(key))
    place = rng.randrange(len(letters) + 1)
    letters[place : place + rng.randrange(2)] = rng.choice(["", "x", "é", "_", " ", ".", "-", "\t"])
    mapping["".join(letters)] = mapping.pop(key)


def add_key(tree: dict, rng: random.Random) -> None:
    mapping, _ = pick(tree, rng)
    names: list[Any] = ["stages", "model", "width", "kind", "layers", "remat", "chunks", "ema"]
    mapping[rng.choice([*names, *VALUES[:60]])] = rng.choice(VALUES)


def change_kind(tree: dict, rng: random.Random) -> None:
    kinds = ["digits", "text", "cifar10", "synthetic_images", "synthetic_tokens", "mlp", "resnet"]
    kinds += ["transformer_lm", "amoebanet", "convnet", "sgd", "adamw", "rmsprop", "Adam", "arrays"]
    section = tree.get(rng.choice(["model", "data", "optimizer"]))
    if isinstance(section, dict):
        section["kind"] = rng.choice(kinds)


def nest(tree: dict, rng: random.Random) -> None:
    mapping, key = pick(tree, rng)
    value = mapping.pop(key)
    target, other = pick(tree or {"model": {}}, rng)
    wrapped: list[Any] = [
        value,
        [value],
        {key: value},
        functools.reduce(lambda a, _: [a], "x" * 30),
    ]
    target[rng.choice([key, other])] = rng.choice(wrapped)


def swap(tree: dict, rng: random.Random) -> None:
    one, a = pick(tree, rng)
    other, b = pick(tree, rng)
    one[a], other[b] = other[b], one[a]


IN_VALUES = [
    set_value,
    set_value,
    change_number,
    remove,
    misspell,
    add_key,
    change_kind,
    nest,
    swap,
]


# --- changes of the text --------------------------------------------------------------------------


def line(text: str, rng: random.Random, change: Callable[[str], str]) -> str:
    lines = text.splitlines(keepends=True) or ["\n"]
    i = rng.randrange(len(lines))
    lines[i] = change(lines[i])
    return "".join(lines)


def insert(text: str, rng: random.Random) -> str:
    place = rng.randrange(len(text) + 1)
    pieces = [
        *":-[]{},#&*!|>'\"%@`?=<\t\n\r\x00\x07\u0085\u2028\ufeff",
        "---\n",
        "...\n",
        "\n\n  - ",
    ]
    pieces += [
        "<<: *a\n",
        "&a ",
        "*a",
        "!!python/object/apply:os.abort []",
        "!!binary =",
        "!!set {}",
    ]
    pieces += [
        "%YAML 9.9\n",
        "? [a]\n: 1\n",
        "a: &a [*a]\n",
        "[" * 40,
        "{a: " * 40,
        "9" * 6000,
        "!x ",
    ]
    return text[:place] + rng.choice(pieces) + text[place:]


def indent(text: str, rng: random.Random) -> str:
    return line(text, rng, lambda s: rng.choice([" ", "  ", "\t", "    "]) + s)


def dedent(text: str, rng: random.Random) -> str:
    return line(text, rng, str.lstrip)


def twice(text: str, rng: random.Random) -> str:
    return line(text, rng, lambda s: s + s)


def drop(text: str, rng: random.Random) -> str:
    return line(text, rng, lambda _: "")


def cut(text: str, rng: random.Random) -> str:
    return text[: rng.randrange(len(text) + 1)]


def splice(text: str, rng: random.Random) -> str:
    other = rng.choice(CONFIGS).read_text(encoding="utf-8")
    return cut(text, rng) + rng.choice(["", "\n"]) + other[rng.randrange(len(other)) :]


def alias(text: str, rng: random.Random) -> str:
    anchored = line(text, rng, lambda s: s.replace(": ", ": &a ", 1))
    return line(anchored, rng, lambda s: s.partition(":")[0] + ": *a\n")


IN_TEXT = [insert, insert, indent, dedent, twice, drop, cut, splice, alias]


def mutated(case: int) -> bytes:
    """Return the damaged file of a case: a function of its number."""
    rng = random.Random(f"config {case}")
    text = rng.choice(CONFIGS).read_text(encoding="utf-8")
    if rng.random() < 0.6:
        tree = yaml.safe_load(text)
        for _ in range(rng.randint(1, 3)):
            if tree:
                rng.choice(IN_VALUES)(tree, rng)
        text = yaml.safe_dump(tree, allow_unicode=rng.random() < 0.5, sort_keys=False)
    else:
        for _ in range(rng.randint(1, 3)):
            text = rng.choice(IN_TEXT)(text, rng)
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.02:
        place = rng.randrange(len(content) + 1)
        content = (
            content[:place] + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80"]) + content[place:]
        )
    if rng.random() < 0.02:
        content = rng.choice([b"", b"\n", b"\xef\xbb\xbf", content.replace(b"\n", b"\r\n")])
    return content


# --- the runs -------------------------------------------------------------------------------------


class Cheap:
    """Stands in for a pipeline: it makes everything that is made before something is compiled."""

    def __init__(self, layers: list, *, mesh: Any, example: dict, **options: Any) -> None:
        stages, data = mesh.shape["stage"], mesh.shape["data"]
        M = options["micro_batches"]
        training_schedule(options["schedule"], stages, M, options["chunks"])
        shapes = micro_batches.shapes_of(example, data, M)
        one = shapes["inputs"].shape[0] // (data * M)
        inputs = shapes["inputs"].update(shape=(one, *shapes["inputs"].shape[1:]))
        self.shapes = _shapes(tuple(layers), inputs)


@functools.cache
def _shapes(layers: tuple, inputs: Any) -> list:
    return infer_shapes(layers, inputs) if len(layers) <= 10 else []


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sklearn.datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GPIPE_JAX_DATA", raising=False)
    digits = sklearn.datasets.load_digits(return_X_y=True)
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda **_: digits)
    monkeypatch.setattr(
        from_config, "simulate_devices", lambda _: None
    )  # this process has 16 already
    monkeypatch.setattr(from_config, "Pipeline", Cheap)
    monkeypatch.setattr(from_config, "Trainer", lambda pipe, tx, ema: Trained(pipe))
    monkeypatch.setattr(run, "train", lambda parts, show, stop: run.RunSummary({"done": 1}, ""))


class Trained:
    def __init__(self, pipe: Cheap) -> None:
        self.pipe = pipe


def check(cases: range, capsys: pytest.CaptureFixture[str]) -> list[int]:
    """Count accepted and refused files; fail with every case that is neither."""
    codes, wrong = [0, 0], []
    for case in cases:
        path = Path(f"case-{case}.yaml")
        path.write_bytes(mutated(case))
        try:
            code = cli.main(["train", str(path)])
        except BaseException as error:
            code, reason = None, f"{type(error).__name__}: {str(error)[:300]}"
        said = capsys.readouterr().err
        if code == 2:
            head, *problems = said.splitlines()
            place = re.compile(rf"case-{case}\.yaml:\d+: \S")
            if not re.fullmatch(rf"gpipe: \d+ problems? in case-{case}\.yaml:", head):
                code, reason = None, head
            elif not problems or not all(place.match(problem) for problem in problems):
                code, reason = None, f"no place: {said[:300]}"
        if code in (0, 2):
            codes[code // 2] += 1
        else:
            wrong.append(f"case {case}: {reason if code is None else f'exit code {code}'}")
        path.unlink()
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:40])
    return codes


@pytest.mark.usefixtures("cheap")
def test_damaged_files_are_read_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    accepted, refused = check(range(SLICE), capsys)
    assert accepted > SLICE // 20 and refused > SLICE // 2


@pytest.mark.slow
@pytest.mark.usefixtures("cheap")
def test_all_damaged_files(capsys: pytest.CaptureFixture[str]) -> None:
    accepted, refused = check(range(CASES), capsys)
    assert accepted > CASES // 20 and refused > CASES // 2


def test_a_case_is_a_function_of_its_number() -> None:
    assert mutated(3) == mutated(3)
    assert len({mutated(case) for case in range(SLICE)}) > 0.9 * SLICE
