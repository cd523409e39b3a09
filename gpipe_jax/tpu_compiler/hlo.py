"""Reading a compiled program: its loops, what it communicates, and how many cycles it takes.

A compiled module is text: computations, each a list of instructions, one a line. Loops, branches
and calls name the computations that they run. The TPU compiler writes the cycles that it expects of
an instruction beside it (`estimated_cycles`); a loop's own count is not multiplied in. Texts can be
100 MB long, so lines are looked at once and only those that call or communicate are taken apart.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CALLS = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_BRANCH = re.compile(r"\b(?:true|false)_computation=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_INDEX = re.compile(r"\bindex=(\d+)")
_INTEGER = re.compile(r"constant\((-?\d+)\)")


class Collective(NamedTuple):
    """One instruction that communicates."""

    kind: str
    bytes: int  # that it delivers to each device, each time
    asynchronous: bool  # other instructions can run meanwhile
    in_loop: bool
    times: int  # how often it runs; a loop of unknown length counts as one


class WhileLoop(NamedTuple):
    """A `while` instruction."""

    body: str  # the name of its computation
    trips: int | None  # each time it runs; None if not known, as when a carried flag ends it
    times: int  # iterations in all, with those of the loops around it
    depth: int  # how many loops are around it


class _Call(NamedTuple):
    kind: str  # "while", "conditional", "call", or "fusion" (whose cycles its own line has)
    computations: list[str]
    trips: int | None = 1


class _Summary(NamedTuple):
    cycles: float  # of the instructions themselves
    calls: list[_Call]
    collectives: list[tuple[str, int, bool]]


class Module:
    """A compiled program's text, taken apart."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[str]] = {}
        self.entry = ""
        lines: list[str] = []
        for line in text.splitlines():
            if line.startswith(" "):
                lines.append(line)
            elif head := _HEAD.match(line):
                lines = self.computations.setdefault(head[2], [])
                self.entry = head[2] if head[1] else self.entry
        self._by_name: dict[str, dict[str, str]] = {}  # of computations that loops made us look at
        self._summaries = {name: self._summary(name) for name in self.computations}

    def cycles(self) -> float:
        """The compiler's estimate, for the slowest way through all conditionals."""
        return self._cycles(self.entry, {})

    def _cycles(self, name: str, known: dict[str, float]) -> float:
        if name not in known:
            total, calls, _ = self._summaries.get(name, _Summary(0.0, [], []))
            for call in calls:
                each = [self._cycles(c, known) for c in call.computations if call.kind != "fusion"]
                cost = max(each, default=0) if call.kind == "conditional" else sum(each)
                total += cost * (1 if call.trips is None else call.trips)
            known[name] = total
        return known[name]

    def collectives(self) -> list[Collective]:
        """All that communicates, on all branches."""
        return [
            Collective(kind, size, asynchronous, depth > 0, times)
            for name, times, depth in self._walk(self.entry, 1, 0)
            for kind, size, asynchronous in self._summaries[name].collectives
        ]

    def loops(self) -> list[WhileLoop]:
        """All loops, outer ones first."""
        return [
            WhileLoop(call.computations[0], call.trips, times * (call.trips or 1), depth)
            for name, times, depth in self._walk(self.entry, 1, 0)
            for call in self._summaries[name].calls
            if call.kind == "while"
        ]

    def _walk(self, name: str, times: int, depth: int) -> Iterator[tuple[str, int, int]]:
        """Each computation that runs: its name, how often, and how many loops are around it."""
        if name not in self._summaries:
            return
        yield name, times, depth
        for call in self._summaries[name].calls:
            trips = 1 if call.trips is None else call.trips
            for called in call.computations:
                yield from self._walk(called, times * trips, depth + (call.kind == "while"))

    def _summary(self, name: str) -> _Summary:
        cycles, calls, collectives = 0.0, [], []
        for line in self.computations[name]:
            own = _CYCLES.search(line)
            if own:
                cycles += int(own[1])
            opcode = _opcode(line)
            kind = opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                collectives.append((kind, _delivered(line), kind != opcode))
            elif call := self._call(name, opcode, line, bool(own)):
                calls.append(call)
        return _Summary(cycles, calls, collectives)

    def _call(self, scope: str, opcode: str, line: str, counted: bool) -> _Call | None:
        """What a line runs; functions of single elements (those of a reduction, say) are nothing.

        The cycles of a line that has its own estimate, as fusions do, include what it calls.
        """
        if opcode == "while":
            parts = [pattern.search(line) for pattern in (_BODY, _CONDITION)]
            names = [part[1] for part in parts if part]
            known = _TRIPS.search(line)
            return _Call("while", names, int(known[1]) if known else self._trips(scope, line))
        if opcode == "conditional":
            branches = _BRANCHES.search(line)
            names = branches[1].replace("%", "").split(", ") if branches else _BRANCH.findall(line)
            return _Call("conditional", names)
        if opcode in ("call", "fusion", "async-start"):
            kind = "fusion" if counted or opcode == "fusion" else "call"
            return _Call(kind, _CALLS.findall(line))
        return None

    # The TPU compiler does not write down trip counts. Loops made by `lax.scan` and `fori_loop`
    # compare a counter with a constant; both may be carried by the loop instead of standing in it.

    def _trips(self, scope: str, line: str) -> int | None:
        """The iterations of a loop that counts from a constant to a constant."""
        condition, body = _CONDITION.search(line), _BODY.search(line)
        if condition is None or body is None:
            return None
        carried = self._operands(scope, _operands(line)[0], "tuple")

        def constant(where: str, name: str) -> int | None:
            """Its value: a constant there, or one that the loop starts with."""
            found = self._source(where, name)
            if found and _opcode(found) == "get-tuple-element" and carried:
                if _opcode(self._source(where, _operands(found)[0]) or "") != "parameter":
                    return None
                found = self._source(scope, carried[_index(found)])
            value = _INTEGER.search(found or "")
            return int(value[1]) if value and _opcode(found or "") == "constant" else None

        compare = self._compare(condition[1])
        if compare is None:
            return None
        counter, bound, inclusive = compare
        last = constant(condition[1], bound)
        if last is None:
            return None
        start, step = constant(condition[1], counter) or 0, 1
        place = self._source(condition[1], counter)
        if place and (steps := self._steps(body[1], _index(place))):
            step = constant(body[1], steps[0]) or 1
        return max(-((start - last - inclusive) // step), 0)

    def _compare(self, condition: str) -> tuple[str, str, bool] | None:
        """(counter, bound, whether the bound itself counts) of a loop's condition."""
        root = next((x for x in self.computations.get(condition, []) if " ROOT " in x[:9]), "")
        names = _operands(root)
        if _opcode(root) == "fusion" and (called := _CALLS.search(root)):
            inner = self.computations.get(called[1], [])
            root = next((x for x in inner if " ROOT " in x[:9]), "")
            lines = [self._source(called[1], name) or "" for name in _operands(root)]
            if not all(_opcode(x) == "parameter" for x in lines):
                return None
            names = [names[int(x.split(" parameter(")[1].split(")")[0])] for x in lines]
        direction = re.search(r"direction=(L|G)(T|E)", root)
        if _opcode(root) != "compare" or direction is None:
            return None
        counter, bound = names if direction[1] == "L" else names[::-1]
        if _opcode(self._source(condition, counter) or "") == "constant":
            return None  # it counts down
        return counter, bound, direction[2] == "E"

    def _steps(self, body: str, index: int) -> list[str]:
        """What the loop adds to its counter."""
        root = next((x for x in self.computations.get(body, []) if " ROOT " in x[:9]), "")
        if _opcode(root) != "tuple":
            return []
        added = self._operands(body, _operands(root)[index], "add")
        sources = {name: self._source(body, name) or "" for name in added}
        counter = [
            n for n, x in sources.items() if "get-tuple-element(" in x and _index(x) == index
        ]
        return [name for name in added if name not in counter[:1]] if counter else []

    def _operands(self, scope: str, name: str, opcode: str) -> list[str]:
        line = self._source(scope, name)
        return _operands(line) if line and _opcode(line) == opcode else []

    def _source(self, scope: str, name: str) -> str | None:
        """The line that makes a value, past the copies of it."""
        lines = self._lines(scope)
        line = lines.get(name)
        while line and _opcode(line) in ("copy", "bitcast", "reshape"):
            line = lines.get(_operands(line)[0])
        return line

    def _lines(self, scope: str) -> dict[str, str]:
        if scope not in self._by_name:
            lines = self.computations.get(scope, [])
            self._by_name[scope] = {m[1]: line for line in lines if (m := _NAME.match(line))}
        return self._by_name[scope]


def _opcode(line: str) -> str:
    match = _OPCODE.search(line)
    return match[1] if match else ""


def _operands(line: str) -> list[str]:
    match = _OPCODE.search(line)
    return re.findall(r"%([\w.\-]+)", line[match.end() :].split(")")[0]) if match else []


def _index(line: str) -> int:
    match = _INDEX.search(line)
    return int(match[1]) if match else 0


def _delivered(line: str) -> int:
    """The bytes of a collective's results.

    What starts an asynchronous one returns its operands too, before the results, and empty arrays
    for its bookkeeping; a started reduction returns its results alone.
    """
    results, opcode = line[: _OPCODE.search(line).start()], _opcode(line)  # type: ignore[union-attr]
    started = opcode.endswith("-start")
    arrays = _ARRAY.findall(results)
    sizes = [_bytes(kind, shape) for kind, shape in arrays if (kind, started) != ("u32", True)]
    if started and opcode != "all-reduce-start":
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def _bytes(kind: str, shape: str) -> int:
    bits = re.match(r"[a-z]+(\d+)", kind)
    total = int(bits[1]) if bits else 8  # pred
    for n in filter(None, shape.split(",")):
        total *= int(n)
    return total // 8
