"""Digest the code of one function, so that only a change of what it does changes the digest.

The digest of the source ignores comments, layout, docstrings and annotations, and is the same in
every version of Python. Where the source is not known, or is not that of the function (a file that
was edited after its import), the digest of the bytecode tells, within one version of Python.
"""

import __future__

import ast
import functools
import hashlib
import linecache
import sys
import warnings
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any, NamedTuple

Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
_FUTURE = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
_NO_EFFECT = ("annotation", "ctx", "kind", "returns", "type_comment")
"""Fields of syntax trees that do not change what a function does."""


class Digests(NamedTuple):
    """Hold the digests of one function's code."""

    source: str | None  # None if the source is not known
    bytecode: str  # with the version of Python before it

    def agrees(self, other: "Digests") -> bool:
        """Return whether the code may be the same, as far as the two can be compared."""
        if self.source and other.source:
            return self.source == other.source
        same_version = self.bytecode.partition(" ")[0] == other.bytecode.partition(" ")[0]
        return self.bytecode == other.bytecode or not same_version


def digests(function: FunctionType) -> Digests:
    """Return the digests of a function's code, without what it refers to."""
    node = syntax_tree(function)
    version = "{}.{}".format(*sys.version_info)
    bytecode = digest(repr(list(_bytecode(function.__code__, function.__doc__))))
    return Digests(None if node is None else digest(_text(node)), f"{version} {bytecode}")


def syntax_tree(function: FunctionType) -> Node | None:
    """Return the syntax tree of a function; None if its source is not known."""
    code = function.__code__
    linecache.checkcache(code.co_filename)
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    try:
        with warnings.catch_warnings(action="ignore"):  # which the import has shown before
            if not text or code not in _codes(text, code.co_flags & _FUTURE):
                return None
            nodes = [node for node in _nodes(text) if _first_line(node) == code.co_firstlineno]
    except (SyntaxError, ValueError):  # such as the magics of notebooks
        return None
    # Several lambdas may begin in one line.
    return max(nodes, key=lambda node: _match(node, code), default=None)


def inner_codes(code: CodeType) -> list[CodeType]:
    """Return the code of the functions that are defined directly within code."""
    return [each for each in code.co_consts if isinstance(each, CodeType)]


def digest(text: str) -> str:
    """Return a digest of 24 hexadecimal digits."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


@functools.lru_cache(maxsize=64)
def _codes(text: str, flags: int) -> frozenset[CodeType]:
    """Return all code objects of a source."""

    def within(code: CodeType) -> Iterator[CodeType]:
        yield code
        for each in inner_codes(code):
            yield from within(each)

    return frozenset(within(compile(text, "", "exec", flags, dont_inherit=True)))


@functools.lru_cache(maxsize=64)
def _nodes(text: str) -> list[Node]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, Node)]


def _first_line(node: Node) -> int:
    decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
    return min([node.lineno, *(each.lineno for each in decorators)])


def _match(node: Node, code: CodeType) -> tuple[bool, int, int, int]:
    """Return how well a node fits a function: a larger value fits better."""
    start, end = (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)
    inside = sum(
        start <= (line, column) <= end
        for line, _, column, _ in code.co_positions()
        if line is not None and column is not None
    )
    name = "<lambda>" if isinstance(node, ast.Lambda) else node.name
    arguments = [each.arg for each in (*node.args.posonlyargs, *node.args.args)]
    is_alike = (name, arguments) == (code.co_name, [*code.co_varnames[: code.co_argcount]])
    # Of a function and one within it, both of which have all instructions, the inner one fits.
    return is_alike, inside, start[0] - end[0], start[1] - end[1]


def _bytecode(code: CodeType, doc: str | None = None) -> Iterator[Any]:
    yield code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield list(_bytecode(value))
        elif doc is None or value != doc:
            yield sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def _text(node: Any) -> str:
    """Write a syntax tree so that all versions of Python write the same."""
    if isinstance(node, list):
        return f"[{','.join(map(_text, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    has_body = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    if has_body and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = node.body[1:]
    if isinstance(node, ast.JoinedStr):  # Python 3.12 has empty texts where others have none
        fields["values"] = [each for each in node.values if getattr(each, "value", None) != ""]
    parts = [
        f"{name}={_text(value)}"
        for name, value in fields.items()
        if name not in _NO_EFFECT and value is not None and value != []
    ]
    return f"{type(node).__name__}({','.join(parts)})"
