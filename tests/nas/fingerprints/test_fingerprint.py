"""Notice what changes a fitness or a proposal, and nothing else."""

import importlib.util
import linecache
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any

import pytest

import nas
from nas.fingerprints.fingerprint import Fingerprint, fingerprint

Load = Callable[..., Any]


@pytest.fixture
def load(tmp_path, monkeypatch) -> Load:
    """Return a function that imports a source as the module `mine`, and returns a name of it."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load_source(source: str, name: str = "evaluate", module: str = "mine") -> Any:
        path = tmp_path / f"{module}.py"
        path.write_text(textwrap.dedent(source))
        spec = importlib.util.spec_from_file_location(module, path)
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, module, loaded)
        exec(compile(path.read_text(), str(path), "exec"), loaded.__dict__)
        return getattr(loaded, name)

    return load_source


def changes(load: Load, before: str, after: str, name: str = "evaluate") -> list[str]:
    """Return the changes from one source to another, by way of the store's JSON."""
    stored = fingerprint(load(before, name), name).to_json()
    return Fingerprint.from_json(stored).changes(fingerprint(load(after, name), name))


PLAIN = "def evaluate(bits): return sum(bits)"

CHANGED = {
    "body": (PLAIN, "def evaluate(bits): return 100 * sum(bits)", "code of evaluate"),
    "constant": ("def evaluate(b): return 1.0", "def evaluate(b): return 2.0", "code of evaluate"),
    "default": (
        "def evaluate(b, lr=0.1): return lr",
        "def evaluate(b, lr=0.2): return lr",
        "evaluate.lr has changed from 0.1 to 0.2",
    ),
    "global": (
        "LR = 0.1\ndef evaluate(b): return LR",
        "LR = 0.2\ndef evaluate(b): return LR",
        "evaluate.LR has changed from 0.1 to 0.2",
    ),
    "settings in a dict": (
        "C = {'lr': 0.1}\ndef evaluate(b): return C['lr']",
        "C = {'lr': 0.2}\ndef evaluate(b): return C['lr']",
        "evaluate.C has changed from {'lr': 0.1} to {'lr': 0.2}",
    ),
    "text with a method": (
        "T = 'a b'\ndef evaluate(b): return T.split()",
        "T = 'a c'\ndef evaluate(b): return T.split()",
        "evaluate.T has changed from 'a b' to 'a c'",
    ),
    "helper": (
        "def train(b): return 1\ndef evaluate(b): return train(b)",
        "def train(b): return 2\ndef evaluate(b): return train(b)",
        "the code of train has changed",
    ),
    "helper of a helper in a comprehension": (
        "def f(b): return 1\ndef g(b): return [f(x) for x in b]\ndef evaluate(b): return g(b)",
        "def f(b): return 2\ndef g(b): return [f(x) for x in b]\ndef evaluate(b): return g(b)",
        "the code of f has changed",
    ),
    "another helper by the same name": (
        "def f(b): return 1\ndef g(b): return 2\nh = f\ndef evaluate(b): return h(b)",
        "def f(b): return 1\ndef g(b): return 2\nh = g\ndef evaluate(b): return h(b)",
        "evaluate.h has changed from f to g",
    ),
    "closure": (
        "def make(n):\n    def inner(b): return n\n    return inner\nevaluate = make(1)",
        "def make(n):\n    def inner(b): return n\n    return inner\nevaluate = make(2)",
        "evaluate.n has changed from 1 to 2",
    ),
    "partial": (
        "import functools\ndef f(b, n): return n\nevaluate = functools.partial(f, n=1)",
        "import functools\ndef f(b, n): return n\nevaluate = functools.partial(f, n=2)",
        "evaluate.arguments has changed from {'n': 1} to {'n': 2}",
    ),
    "partial in place of a function": (
        "def f(b, n=1): return n\nevaluate = f",
        "import functools\ndef f(b, n=1): return n\nevaluate = functools.partial(f, n=2)",
        "evaluate has changed from function to partial",
    ),
    "object in place of a function": (
        PLAIN,
        "class E:\n    def __call__(self, b): return 2\nevaluate = E()",
        "evaluate has changed from function to E",
    ),
    "object in place of a number": (
        "RATE = 0.1\ndef evaluate(b): return RATE",
        "class Cosine: pass\nRATE = Cosine()\ndef evaluate(b): return RATE",
        "evaluate.RATE has changed from 0.1 to Cosine",
    ),
    "variable by the name of an attribute that is assigned": (
        "lr = 0.1\ndef evaluate(b): b.lr = lr; b.layers.append(lr)",
        "lr = 0.2\ndef evaluate(b): b.lr = lr; b.layers.append(lr)",
        "evaluate.lr has changed from 0.1 to 0.2",
    ),
    "list by the name of an attribute that grows": (
        "layers = [8]\ndef evaluate(b): b.layers.append(layers)",
        "layers = [9]\ndef evaluate(b): b.layers.append(layers)",
        "evaluate.layers has changed from [8] to [9]",
    ),
    "list by the name of a helper's own": (
        "layers = [8]\ndef f():\n    layers = []\n    layers.append(1)\n"
        "def evaluate(b): return f(), layers",
        "layers = [9]\ndef f():\n    layers = []\n    layers.append(1)\n"
        "def evaluate(b): return f(), layers",
        "evaluate.layers has changed from [8] to [9]",
    ),
    "one of two lambdas in a line": (
        "f, evaluate = lambda b: 1, lambda b: 2",
        "f, evaluate = lambda b: 1, lambda b: 3",
        "code of evaluate",
    ),
    "decorator": (
        "import functools\n@functools.lru_cache(1)\ndef evaluate(b): return 1",
        "import functools\n@functools.lru_cache(2)\ndef evaluate(b): return 1",
        "code of evaluate",
    ),
    "method of a class": (
        "class E:\n    def evaluate(self, job): return 1\nevaluate = E()",
        "class E:\n    def evaluate(self, job): return 2\nevaluate = E()",
        "the code of evaluate.evaluate has changed",
    ),
    "method of an object that is used": (
        "class M:\n    def train(self, b): return 1\nm = M()\ndef evaluate(b): return m.train(b)",
        "class M:\n    def train(self, b): return 2\nm = M()\ndef evaluate(b): return m.train(b)",
        "the code of evaluate.m.train has changed",
    ),
    "attribute of an object": (
        "class E:\n    def __init__(self, n): self.n = n\n"
        "    def evaluate(self, job): return self.n\nevaluate = E(1)",
        "class E:\n    def __init__(self, n): self.n = n\n"
        "    def evaluate(self, job): return self.n\nevaluate = E(2)",
        "evaluate.n has changed from 1 to 2",
    ),
    "base class": (
        "class B:\n    n = 1\nclass E(B):\n    def evaluate(self, job): return self.n\n"
        "evaluate = E()",
        "class B:\n    n = 2\nclass E(B):\n    def evaluate(self, job): return self.n\n"
        "evaluate = E()",
        "evaluate.B.n has changed from 1 to 2",
    ),
    "attribute that hides that of the base class": (
        "class B:\n    n = 1\n    def evaluate(self, job): return self.n\nclass E(B): pass\n"
        "evaluate = E()",
        "class B:\n    n = 1\n    def evaluate(self, job): return self.n\nclass E(B): n = 2\n"
        "evaluate = E()",
        "evaluate.members has changed from",
    ),
    "wrapped function": (
        "import nas\ndef f(b): return 1\nevaluate = nas.Repeated(f, 2)",
        "import nas\ndef f(b): return 2\nevaluate = nas.Repeated(f, 2)",
        "the code of evaluate.evaluator has changed",
    ),
    "table": (
        "import nas\nT = {(0, 1): {'a': 1}}\nevaluate = nas.TabularEvaluator(T.__getitem__, 'a')",
        "import nas\nT = {(0, 1): {'a': 2}}\nevaluate = nas.TabularEvaluator(T.__getitem__, 'a')",
        "evaluate.table.self has changed from",
    ),
    "field of a dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass S:\n    n: int = 1\nevaluate = S()",
        "from dataclasses import dataclass\n@dataclass\nclass S:\n    n: int = 1\nevaluate = S(3)",
        "evaluate.n has changed from 1 to 3",
    ),
    "module of yours": (
        "import types, sys\nm = types.ModuleType('m'); m.n = 1\ndef evaluate(b): return m.n",
        "import types, sys\nm = types.ModuleType('m'); m.n = 2\ndef evaluate(b): return m.n",
        "evaluate.m.n has changed from 1 to 2",
    ),
    "module of a package of yours": (
        "import types\np = types.ModuleType('p'); p.m = types.ModuleType('p.m'); p.m.n = 1\n"
        "p.m.p = p\ndef evaluate(b): return p.m.n",
        "import types\np = types.ModuleType('p'); p.m = types.ModuleType('p.m'); p.m.n = 2\n"
        "p.m.p = p\ndef evaluate(b): return p.m.n",
        "evaluate.p.m.n has changed from 1 to 2",
    ),
    "arguments of a command": (
        "import argparse\nargs = argparse.Namespace(lr=1)\n"
        "def f(args): return args.lr\ndef evaluate(b): return f(args)",
        "import argparse\nargs = argparse.Namespace(lr=2)\n"
        "def f(args): return args.lr\ndef evaluate(b): return f(args)",
        "evaluate.args.lr has changed from 1 to 2",
    ),
    "number of NumPy": (
        "import numpy as np\nLR = np.float32(1)\ndef evaluate(b): return LR",
        "import numpy as np\nLR = np.float32(2)\ndef evaluate(b): return LR",
        "evaluate.LR has changed from 1.0 to 2.0",
    ),
    "member of an Enum": (
        "import enum\nclass E(enum.Enum): A = 1\nX = E.A\ndef evaluate(b): return X.value",
        "import enum\nclass E(enum.Enum): A = 2\nX = E.A\ndef evaluate(b): return X.value",
        "evaluate.X has changed from E.A = 1 to E.A = 2",
    ),
    "default that a function of a dataclass makes": (
        "from dataclasses import dataclass, field\n@dataclass\nclass C:\n"
        "    n: list = field(default_factory=lambda: [1])\ndef evaluate(b): return C().n",
        "from dataclasses import dataclass, field\n@dataclass\nclass C:\n"
        "    n: list = field(default_factory=lambda: [2])\ndef evaluate(b): return C().n",
        "the code of C.n has changed",
    ),
    "default of a dataclass with slots": (
        "from dataclasses import dataclass\n@dataclass(slots=True)\nclass C:\n    n: int = 1\n"
        "def evaluate(b): return C().n",
        "from dataclasses import dataclass\n@dataclass(slots=True)\nclass C:\n    n: int = 2\n"
        "def evaluate(b): return C().n",
        "C.n has changed from 1 to 2",
    ),
    "what a function of a package is bound to, as an optimizer of optax": (
        "import reprlib\nf = reprlib.recursive_repr('a')\ndef evaluate(b): return f",
        "import reprlib\nf = reprlib.recursive_repr('b')\ndef evaluate(b): return f",
        "evaluate.f.fillvalue has changed from 'a' to 'b'",
    ),
    "shape of an array": (
        "import numpy as np\nX = np.zeros(3)\ndef evaluate(b): return X",
        "import numpy as np\nX = np.zeros(4)\ndef evaluate(b): return X",
        "evaluate.X has changed from float64 of shape (3,) to float64 of shape (4,)",
    ),
}

SAME = {
    "comments, layout, docstrings and annotations": (
        PLAIN,
        "\n# new\ndef evaluate(bits: list) -> int:\n    '''Sum.'''\n\n    return sum(bits,)  # new",
    ),
    "other functions of the module": (PLAIN, f"def other(): return 3\n{PLAIN}"),
    "call around a lambda": (
        "f = dict(evaluate=lambda b: sum(b), cycles=1)\nevaluate = f['evaluate']",
        "f = dict(evaluate=lambda b: sum(b), cycles=2)\nevaluate = f['evaluate']",
    ),
    "counter": (
        "n = 0\ndef evaluate(b):\n    global n\n    n += 1\n    return 1",
        "n = 7\ndef evaluate(b):\n    global n\n    n += 1\n    return 1",
    ),
    "list of calls": (
        "calls = []\ndef evaluate(b):\n    calls.append(b)\n    return 1",
        "calls = [1]\ndef evaluate(b):\n    calls.append(b)\n    return 1",
    ),
    "results by name": (
        "seen = {}\ndef evaluate(b):\n    seen['a'] = b\n    return 1",
        "seen = {'a': 3}\ndef evaluate(b):\n    seen['a'] = b\n    return 1",
    ),
    "list to which a helper's helper adds": (
        "calls = []\ndef g(b): calls.append(b)\ndef f(b): g(b)\n"
        "def evaluate(b): return f(b), len(calls)",
        "calls = [1]\ndef g(b): calls.append(b)\ndef f(b): g(b)\n"
        "def evaluate(b): return f(b), len(calls)",
    ),
    "list that a helper reads": (
        "calls = []\ndef mean(): return len(calls)\ndef evaluate(b): calls.append(b); mean()",
        "calls = [1]\ndef mean(): return len(calls)\ndef evaluate(b): calls.append(b); mean()",
    ),
    "default that remembers": (
        "def evaluate(b, known={}): known[b] = 1",
        "def evaluate(b, known={}): known[b] = 1\nevaluate(3)",
    ),
    "state of an object": (
        "class E:\n    def __init__(self, n): self.n = n\n"
        "    def evaluate(self, job): self.n += 1\nevaluate = E(1)",
        "class E:\n    def __init__(self, n): self.n = n\n"
        "    def evaluate(self, job): self.n += 1\nevaluate = E(2)",
    ),
    "what the identity leaves out": (
        "import nas\nclass E(nas.Evaluator):\n    identity = {'data': 1}\n"
        "    def __init__(self, n): self.n = n\nevaluate = E(1)",
        "import nas\nclass E(nas.Evaluator):\n    identity = {'data': 1}\n"
        "    def __init__(self, n): self.n = n\nevaluate = E(2)",
    ),
    "place of the data": (
        "DATA = '/home/a/data'\ndef evaluate(b): return open(DATA)",
        "DATA = '/mnt/b/data'\ndef evaluate(b): return open(DATA)",
    ),
    "arguments of a command that are not read": (
        "import argparse\nargs = argparse.Namespace(lr=1, cycles=2)\n"
        "def f(args): return args.lr\ndef evaluate(b): return f(args)",
        "import argparse\nargs = argparse.Namespace(lr=1, cycles=3)\n"
        "def f(args): return args.lr\ndef evaluate(b): return f(args)",
    ),
    "number of NumPy in place of Python's": (
        "LR = 0.5\ndef evaluate(b): return LR",
        "import numpy as np\nLR = np.float64(0.5)\ndef evaluate(b): return LR",
    ),
    "state of a package's function": (
        "import itertools\nnumbers = itertools.count()\ndef evaluate(b): return next(numbers)",
        "import itertools\nnumbers = itertools.count(3)\ndef evaluate(b): return next(numbers)",
    ),
    "constants that happen to be one object": (
        "A = (1, 2)\nB = (1, 2)\ndef evaluate(b): return A, B",
        "A = (1, 2)\nB = tuple([1, 2])\ndef evaluate(b): return A, B",
    ),
    "object without attributes": (
        "class P:\n    def __getattr__(self, name): raise RuntimeError(name)\np = P()\n"
        "def evaluate(b): return p",
        "class P:\n    def __getattr__(self, name): raise RuntimeError(name)\np = P()\n"
        "def evaluate(b): return p",
    ),
    "values of arrays": (
        "import numpy as np\nX = np.zeros(3)\ndef evaluate(b): return X",
        "import numpy as np\nX = np.ones(3)\ndef evaluate(b): return X",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_change_is_noticed(load, case) -> None:
    before, after, words = CHANGED[case]
    assert words in "; ".join(changes(load, before, after))
    assert not changes(load, before, before)
    assert not changes(load, after, after)


@pytest.mark.parametrize("case", SAME)
def test_what_changes_no_fitness_is_no_change(load, case) -> None:
    assert not changes(load, *SAME[case])


def test_a_file_of_yours_may_have_the_name_of_one_of_pythons(load) -> None:
    first = fingerprint(load("def evaluate(b): return 1", module="this"), "evaluate")
    assert first.changes(fingerprint(load("def evaluate(b): return 2", module="this"), "evaluate"))


def test_values_nested_deeply_take_no_time(load) -> None:
    source = "D = {}\nfor i in range(19): D = {'a': D, 'b': i}\ndef evaluate(b): return D"
    began = time.perf_counter()
    fingerprint(load(source), "evaluate")
    assert time.perf_counter() - began < 1.0


def test_arguments_of_a_command_are_read_in_another_module_of_yours(load) -> None:
    load("def train(args): return args.lr", "train", module="trains")
    source = "import argparse, trains\nargs = argparse.Namespace(lr=%d, cycles=%d)\n"
    source += "def evaluate(b): return trains.train(args)"
    found = changes(load, source % (1, 2), source % (3, 4))
    assert found == ["evaluate.args.lr has changed from 1 to 3"]


def test_code_of_packages_may_move_within_them(load) -> None:
    source = "import json\nf, g = json.JSONDecoder, json.dumps\ndef evaluate(b): return f, g"
    found = fingerprint(load(source), "evaluate").values
    assert found["evaluate.f"] == "json.JSONDecoder"  # which is in `json.decoder` today
    assert found["evaluate.g"] == "json.dumps"


def test_many_objects_of_a_class_count(load) -> None:
    source = """
        class Layer:
            def __init__(self, n): self.n = n
            def f(self): return 1
            def g(self): return 2
            def h(self): return 3
        layers = [Layer(i) for i in range(500)]
        layers[499].n = %d
        def evaluate(b): return layers
    """
    found = changes(load, source % 0, source % 1)
    assert found == ["evaluate.layers[499].n has changed from 0 to 1"]


def test_built_in_spaces_and_evaluators_have_no_code_of_the_users() -> None:
    for value in (
        nas.NASNetSpace(),
        nas.NASBench201Space(),
        nas.TrainingEvaluator(folder="here"),
        nas.Repeated(nas.TrainingEvaluator(), 3),
        sum,
    ):
        found = fingerprint(value, "x")
        assert not found.codes and "x.members" not in found.values


def test_a_space_of_the_users_is_known_as_such(load) -> None:
    space = load("class S: name = 'nasnet'\nspace = S()", "space")
    assert "space.members" in fingerprint(space, "space").values


def test_bytecode_tells_where_the_source_is_of_another_time(load, tmp_path) -> None:
    """Edit a file after its import: what runs is the old code, and the source is the new one."""
    evaluate = load("def evaluate(b): return 1")
    (tmp_path / "mine.py").write_text("def evaluate(b): return 2\n")
    linecache.clearcache()
    stored = fingerprint(evaluate, "evaluate")
    assert stored.codes["evaluate"].source is None
    assert stored.changes(fingerprint(load("def evaluate(b): return 2"), "evaluate"))
    assert not stored.changes(fingerprint(load("def evaluate(b): return 1"), "evaluate"))


def test_other_versions_of_python_agree(load) -> None:
    """Compare by source; without one, the bytecode of another version tells nothing."""
    now = fingerprint(load(PLAIN), "evaluate")
    (digests,) = now.codes.values()
    other = digests._replace(bytecode="3.99 0123")
    assert not Fingerprint({"evaluate": other}, {}).changes(now)
    assert Fingerprint({"evaluate": other._replace(source="0")}, {}).changes(now)
    assert not Fingerprint({"evaluate": other._replace(source=None)}, {}).changes(now)


def test_the_digest_of_a_source_stays() -> None:
    """Keep digests from version to version: a stored one must be found again."""
    namespace: dict[str, Any] = {}
    lines = ["def evaluate(bits, scale=2):\n", "    return scale * sum(x for x in bits if x)\n"]
    linecache.cache["<cell 1>"] = (len("".join(lines)), None, lines, "<cell 1>")
    exec(compile("".join(lines), "<cell 1>", "exec"), namespace)
    digests = fingerprint(namespace["evaluate"], "evaluate").codes["evaluate"]
    assert digests.source == "4c3dcea86c70c269775dd1a8"


def test_large_and_looped_values_end(load) -> None:
    big = fingerprint(load("X = list(range(10**6))\ndef evaluate(b): return X"), "evaluate")
    assert big.values["evaluate.X"] == "list of 1000000"
    source = """
        class Node: pass
        a = Node(); a.next = a
        def f(b): return g(b)
        def g(b): return f(b)
        L = []; L.append(L)
        def evaluate(b): return a, f(b), L
    """
    looped = fingerprint(load(source), "evaluate")
    assert {"evaluate", "f", "g"} <= looped.codes.keys()
