"""Reading a compiled program: which collectives it has, inside and outside of loops."""

import re
from collections import Counter

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
HOST = ("infeed", "outfeed", "send", "recv", "MoveToHost", "PinToHost")


def computations(text: str) -> dict[str, list[str]]:
    """Computation name -> its lines."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        head = re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            lines = found.setdefault(head[1], [])
        elif line.startswith(" "):
            lines.append(line)
    return found


def in_loops(text: str) -> set[str]:
    """Names of the computations that run inside a while loop."""
    known = computations(text)
    todo = re.findall(r" while\(.*body=%?([\w.\-]+)", text)
    seen: set[str] = set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in known.get(name, []):
            todo += [word for word in re.findall(r"%([\w.\-]+)", line) if word in known]
            todo += [w for w in re.findall(r"=([\w.\-]+)", line) if w in known]
    return seen


def collectives(text: str) -> tuple[list[str], list[str]]:
    """Return the instructions that communicate: (inside loops, outside)."""
    inside, loops = ([], []), in_loops(text)
    pattern = re.compile(rf" ({'|'.join(COLLECTIVES)})(-start)?\(")
    for name, lines in computations(text).items():
        inside[name not in loops].extend(line for line in lines if pattern.search(line))
    return inside


def kinds(lines: list[str]) -> Counter:
    """Count the collectives of each kind."""
    pattern = re.compile(rf" ({'|'.join(COLLECTIVES)})(-start)?\(")
    return Counter(match[1] for line in lines if (match := pattern.search(line)))


def elements_reduced(line: str) -> int:
    """Elements of all arrays of one all-reduce."""
    shapes = re.findall(r"\w+\[([\d,]*)\]", line.split(" all-reduce")[0])
    total = 0
    for shape in shapes:
        size = 1
        for n in filter(None, shape.split(",")):
            size *= int(n)
        total += size
    return total


def host_transfers(text: str) -> list[str]:
    return [
        line for line in text.splitlines() if re.search(rf" ({'|'.join(HOST)})(-start)?\(", line)
    ]
