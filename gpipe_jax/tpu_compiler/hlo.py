"""Read a compiled program: its loops, its communication and its cycles.

A compiled module is text: computations, each a list of instructions, one a line. Loops, branches
and calls name the computations that they run:

    %body (c: (s32[], f32[8])) -> (s32[], f32[8]) {        a computation, and its instructions:
      %c = (s32[], f32[8]) parameter(0)                    name = results opcode(operands),
      %i = s32[] get-tuple-element(%c), index=0              attributes
      %two = s32[] constant(2)
      %next = s32[] add(%i, %two)
      ROOT %r = (s32[], f32[8]) tuple(%next, ...)          what it returns
    }

The TPU compiler writes the cycles that it expects of an instruction beside it
(`estimated_cycles`). The estimate of a loop is for one iteration of it. Texts can be 100 MB long,
so each line is parsed once and not kept; only the computations of loops are.
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
_INSTRUCTION = re.compile(
    r"^ +(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<results>.*?)"
    r" (?P<opcode>[a-z][a-z0-9\-]*)\((?P<arguments>[^)]*)\)(?P<attributes>.*)$"
)
_OPERAND = re.compile(r"%([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CALLS = re.compile(r"\b(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_BRANCH = re.compile(r"\b(?:true|false)_computation=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_INDEX = re.compile(r"\bindex=(\d+)")
_INTEGER = re.compile(r"-?\d+")
_DIRECTION = re.compile(r"\bdirection=(LT|LE|GT|GE)")


class Collective(NamedTuple):
    """Hold one instruction that communicates."""

    kind: str
    bytes: int  # delivered to each device, each time
    asynchronous: bool  # other instructions can run meanwhile
    in_loop: bool
    times: int  # how often it runs; a loop of unknown length counts as one


class WhileLoop(NamedTuple):
    """Hold one `while` instruction."""

    body: str  # the name of its computation
    trips: int | None  # iterations of each run; None if not known, as when a carried flag ends it
    times: int  # iterations in all, multiplied by those of the loops around it
    depth: int  # how many loops are around it


class Instruction(NamedTuple):
    """Hold one line of a computation, parsed."""

    name: str
    is_root: bool  # its computation returns what it returns
    results: str  # the types that it returns, as text
    opcode: str
    arguments: str  # the text in its brackets: "%a, %b", or "7" of `constant(7)`
    attributes: str  # the text after its brackets

    @classmethod
    def parse(cls, line: str) -> "Instruction | None":
        """Return the instruction of a line, or None if the line is something else."""
        match = _INSTRUCTION.match(line)
        if match is None:
            return None
        name, results, opcode, arguments, attributes = match.group(
            "name", "results", "opcode", "arguments", "attributes"
        )
        return cls(name, match["root"] is not None, results, opcode, arguments, attributes)

    @property
    def operands(self) -> list[str]:
        """Return the names of the values that it reads."""
        return _OPERAND.findall(self.arguments)

    @property
    def integer(self) -> int | None:
        """Return the number in its brackets: 7 of `constant(7)`, 0 of `parameter(0)`."""
        return int(self.arguments) if _INTEGER.fullmatch(self.arguments) else None

    @property
    def tuple_index(self) -> int:
        """Return the element that a `get-tuple-element` reads."""
        return int(self.attribute(_INDEX) or 0)

    def attribute(self, pattern: re.Pattern[str]) -> str | None:
        """Return the first match of a pattern in the attributes."""
        match = pattern.search(self.attributes)
        return match[1] if match else None


class _Computation:
    """Look up the instructions of one computation by name."""

    def __init__(self, lines: list[str]) -> None:
        parsed = [instruction for line in lines if (instruction := Instruction.parse(line))]
        self._by_name = {instruction.name: instruction for instruction in parsed}
        self.root = next((instruction for instruction in parsed if instruction.is_root), None)

    def source(self, name: str) -> Instruction | None:
        """Return the instruction that computes a value, past the copies of it."""
        instruction = self._by_name.get(name)
        while instruction and instruction.opcode in ("copy", "bitcast", "reshape"):
            instruction = self._by_name.get(instruction.operands[0])
        return instruction

    def is_parameter(self, name: str) -> bool:
        source = self.source(name)
        return source is not None and source.opcode == "parameter"


class _Call(NamedTuple):
    """Hold which computations an instruction runs."""

    kind: str  # "while", "conditional", "call", or "fusion" (whose line has the cycles of all)
    computations: list[str]
    trips: int | None = 1


class _Comparison(NamedTuple):
    """Hold a loop's condition: it runs while `counter` is below (or at) `bound`."""

    counter: str
    bound: str
    inclusive: bool


class _Summary(NamedTuple):
    """Hold what a computation does itself."""

    cycles: float
    calls: list[_Call]
    collectives: list[tuple[str, int, bool]]  # (kind, bytes, asynchronous)


class Module:
    """Parse a compiled program's text, and sum over its loops and calls."""

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
        self._parsed: dict[str, _Computation] = {}  # those of loops
        self._summaries = {name: self._summary(name) for name in self.computations}

    def cycles(self) -> float:
        """Return the compiler's estimate, for the slowest way through all conditionals."""
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
        """Return all instructions that communicate, on all branches."""
        return [
            Collective(kind, size, asynchronous, depth > 0, times)
            for name, times, depth in self._walk(self.entry, 1, 0)
            for kind, size, asynchronous in self._summaries[name].collectives
        ]

    def loops(self) -> list[WhileLoop]:
        """Return all loops, outer ones first."""
        return [
            WhileLoop(call.computations[0], call.trips, times * (call.trips or 1), depth)
            for name, times, depth in self._walk(self.entry, 1, 0)
            for call in self._summaries[name].calls
            if call.kind == "while"
        ]

    def _walk(self, name: str, times: int, depth: int) -> Iterator[tuple[str, int, int]]:
        """Yield each computation that runs: its name, how often, and the loops around it."""
        if name not in self._summaries:
            return
        yield name, times, depth
        for call in self._summaries[name].calls:
            trips = 1 if call.trips is None else call.trips
            inside = depth + 1 if call.kind == "while" else depth
            for called in call.computations:
                yield from self._walk(called, times * trips, inside)

    def _summary(self, name: str) -> _Summary:
        cycles, calls, collectives = 0.0, [], []
        for line in self.computations[name]:
            estimate = _CYCLES.search(line)
            if estimate:
                cycles += int(estimate[1])
            instruction = Instruction.parse(line)
            if instruction is None:
                continue
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                asynchronous = kind != instruction.opcode
                collectives.append((kind, _delivered_bytes(instruction), asynchronous))
            elif call := self._call(name, instruction, has_cycles=estimate is not None):
                calls.append(call)
        return _Summary(cycles, calls, collectives)

    def _call(self, scope: str, instruction: Instruction, *, has_cycles: bool) -> _Call | None:
        """Return what an instruction of `scope` runs, if anything.

        A function of single elements, such as that of a reduction, counts as nothing. The cycles
        of a line that has its own estimate, as fusions do, include those of what it calls.
        """
        opcode = instruction.opcode
        if opcode == "while":
            called = [instruction.attribute(pattern) for pattern in (_BODY, _CONDITION)]
            known = instruction.attribute(_TRIPS)
            trips = int(known) if known else self._trips(scope, instruction)
            return _Call("while", [name for name in called if name], trips)
        if opcode == "conditional":
            branches = instruction.attribute(_BRANCHES)
            if branches is None:
                return _Call("conditional", _BRANCH.findall(instruction.attributes))
            return _Call("conditional", branches.replace("%", "").split(", "))
        if opcode in ("call", "fusion", "async-start"):
            kind = "fusion" if has_cycles or opcode == "fusion" else "call"
            return _Call(kind, _CALLS.findall(instruction.attributes))
        return None

    # The TPU compiler does not write down trip counts. Loops made by `lax.scan` and `fori_loop`
    # compare a counter with a constant. Both may be elements of the tuple that the loop carries
    # instead of constants inside it.

    def _trips(self, scope: str, loop: Instruction) -> int | None:
        """Count the iterations of a loop whose counter runs from a constant to a constant."""
        condition_name, body_name = loop.attribute(_CONDITION), loop.attribute(_BODY)
        if condition_name is None or body_name is None:
            return None
        outside, condition, body = map(self._computation, (scope, condition_name, body_name))
        initial = outside.source(loop.operands[0])
        carried = initial.operands if initial and initial.opcode == "tuple" else []

        def constant(inside: _Computation, name: str) -> int | None:
            """Return a value that is constant in the loop, or that the loop starts with."""
            source = inside.source(name)
            if source and source.opcode == "get-tuple-element" and carried:
                if not inside.is_parameter(source.operands[0]):
                    return None
                source = outside.source(carried[source.tuple_index])
            return source.integer if source and source.opcode == "constant" else None

        comparison = self._comparison(condition)
        if comparison is None:
            return None
        bound = constant(condition, comparison.bound)
        if bound is None:
            return None
        start, step = constant(condition, comparison.counter) or 0, 1
        counter = condition.source(comparison.counter)
        increment = counter and _increment(body, counter.tuple_index)
        if increment:
            step = constant(body, increment) or 1
        end = bound + 1 if comparison.inclusive else bound
        return len(range(start, end, step))  # the values of the counter

    def _comparison(self, condition: _Computation) -> _Comparison | None:
        """Return what a loop's condition compares, if it counts up to a bound."""
        compare = condition.root
        if compare is None:
            return None
        operands = compare.operands
        called = compare.attribute(_CALLS)
        if compare.opcode == "fusion" and called:
            fused = self._computation(called)
            compare = fused.root
            if compare is None or not all(map(fused.is_parameter, compare.operands)):
                return None
            # The fusion's parameters are the operands of the instruction that calls it.
            sources = [fused.source(name) for name in compare.operands]
            operands = [operands[source.integer or 0] for source in sources if source]
        direction = compare.attribute(_DIRECTION)
        if compare.opcode != "compare" or direction is None:
            return None
        counter, bound = operands if direction.startswith("L") else reversed(operands)
        source = condition.source(counter)
        if source and source.opcode == "constant":
            return None  # it counts down
        return _Comparison(counter, bound, inclusive=direction.endswith("E"))

    def _computation(self, name: str) -> _Computation:
        if name not in self._parsed:
            self._parsed[name] = _Computation(self.computations.get(name, []))
        return self._parsed[name]


def _increment(body: _Computation, index: int) -> str | None:
    """Return what a loop's body adds to its counter, the carried element at `index`."""
    if body.root is None or body.root.opcode != "tuple":
        return None
    added = body.source(body.root.operands[index])
    if added is None or added.opcode != "add":
        return None

    def is_counter(name: str) -> bool:
        source = body.source(name)
        if source is None or source.opcode != "get-tuple-element":
            return False
        return source.tuple_index == index

    counter = next(filter(is_counter, added.operands), None)
    others = [name for name in added.operands if name != counter]
    return others[0] if counter and others else None


def _delivered_bytes(collective: Instruction) -> int:
    """Count the bytes of a collective's results.

    The start of an asynchronous one also returns its operands, before the results, and integers
    for its bookkeeping. The start of an all-reduce returns its results alone.
    """
    arrays = _ARRAY.findall(collective.results)
    if not collective.opcode.endswith("-start"):
        return sum(_array_bytes(kind, shape) for kind, shape in arrays)
    sizes = [_array_bytes(kind, shape) for kind, shape in arrays if kind != "u32"]
    if collective.opcode != "all-reduce-start":
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def _array_bytes(kind: str, shape: str) -> int:
    """Count the bytes of an array as written: "f32" and "8,4"."""
    bits = re.match(r"[a-z]+(\d+)", kind)
    total = int(bits[1]) if bits else 8  # pred
    for n in filter(None, shape.split(",")):
        total *= int(n)
    return total // 8
