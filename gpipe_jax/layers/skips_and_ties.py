"""Connect layers beside their order: by stashed tensors that are popped later, and tied parameters.

skips = {}
for layer in layers:
    x = (x, *(skips.pop(name) for name in layer.pops))   # if it pops any
    y = layer(params with the tied ones filled in, x)
    x, *stashed = y                                      # if it stashes any
    skips.update(zip(layer.stashes, stashed))
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.utils.trees import PyTree, by_name, cast_for_sums, cast_like, strong


class Boundary(NamedTuple):
    """Hold the tree that passes between two layers, or two stages."""

    x: PyTree
    skips: dict[str, PyTree]  # tensors that are stashed and not yet popped


def call(
    layer: Layer, params: PyTree, stats: PyTree, boundary: Boundary, shared: dict, context: Context
) -> tuple[Boundary, PyTree]:
    """Apply one layer with its links; return the next boundary and the moments of batch norms.

    What passes on has strong types, as inferred, and moments have the types of their sums. So the
    numbers do not depend on where a stage ends.
    """
    x, rest = take(layer, boundary)
    filled = strong(fill(layer, params, shared))
    context = replace(context, extras=read(layer, context.extras))
    y, moments = layer.apply(filled, stats, x, context)
    if jax.tree.leaves(moments):
        moments = cast_for_sums(moments, stats)
    return give(layer, strong(y), rest), moments


def commit(layer: Layer, stats: PyTree, moments: PyTree) -> PyTree:
    """Return a layer's running statistics after a step, in the types that they had before."""
    return cast_like(layer.commit(stats, moments), stats)


def take(layer: Layer, boundary: Boundary) -> tuple[PyTree, dict]:
    """Return the layer's input, and the skips that it does not pop."""
    popped = [boundary.skips[name] for name in layer.pops]
    rest = {name: skip for name, skip in boundary.skips.items() if name not in layer.pops}
    return ((boundary.x, *popped) if popped else boundary.x), rest


def give(layer: Layer, y: PyTree, rest: dict) -> Boundary:
    """Return the boundary after a layer with this output."""
    if not layer.stashes:
        return Boundary(y, rest)
    return Boundary(y[0], {**rest, **dict(zip(layer.stashes, y[1:], strict=True))})


def read(layer: Layer, extras: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Return the extras that a layer reads, of those of a batch."""
    return {name: extras[name] for name in layer.reads}


# --- tied parameters ------------------------------------------------------------------------------


def borrow(layer: Layer, params: PyTree, shared: dict) -> tuple[PyTree, dict]:
    """Return the layer's own parameters, with None for shared ones, and the shared ones by name."""
    borrowed = {}
    for path, name in layer.ties:
        if name in shared:
            params, borrowed[name] = _replaced(params, path.split("."), None), shared[name]
    return params, borrowed


def offered(layer: Layer, own: PyTree) -> dict[str, PyTree]:
    """Return the tied parameters that this layer owns, by name."""
    tied = {name: _at(own, path.split(".")) for path, name in layer.ties}
    return {name: value for name, value in tied.items() if value is not None}


def fill(layer: Layer, params: PyTree, shared: dict) -> PyTree:
    """Return the layer's parameters with the shared ones filled in."""
    for path, name in layer.ties:
        if name in shared:
            params = _replaced(params, path.split("."), shared[name])
    return params


def _at(tree: PyTree, path: Sequence[str]) -> PyTree:
    for key in path:
        tree = tree[_key(tree, key)]
    return tree


def _replaced(tree: PyTree, path: Sequence[str], value: PyTree) -> PyTree:
    """Return a tree of dicts and sequences with another value at `path`."""
    if not path:
        return value
    key = _key(tree, path[0])
    new = _replaced(tree[key], path[1:], value)
    if isinstance(tree, dict):
        return {**tree, key: new}
    return type(tree)(new if i == key else a for i, a in enumerate(tree))


def _key(tree: PyTree, name: str) -> Any:
    """Return the key called `name` of a dict or a sequence; raise KeyError if there is none."""
    keys: Any = ()
    if isinstance(tree, dict):
        keys = tree
    elif type(tree) in (list, tuple):
        keys = range(len(tree))
    for key in keys:
        if str(key) == name:
            return key
    raise KeyError(name)


# --- checks ---------------------------------------------------------------------------------------


def check_names(layers: Sequence[Layer]) -> None:
    """Check that each stash is popped once, later, and that each tied name is used twice."""
    _check_skips(layers)
    _check_ties(layers)


def _check_skips(layers: Sequence[Layer]) -> None:
    waiting: dict[str, int] = {}
    for i, layer in enumerate(layers):
        for name in layer.pops:
            if name not in waiting:
                raise ValueError(
                    f"layer {i}, {layer}, pops {name!r}, but no layer before it stashes that, or "
                    f"another has popped it; stashed at this layer: {_listed(waiting)}"
                )
            del waiting[name]
        for name in layer.stashes:
            if name in waiting:
                raise ValueError(
                    f"layer {i}, {layer}, stashes {name!r}, but layer {waiting[name]} stashed that "
                    f"and no layer popped it yet; use another name"
                )
            waiting[name] = i
    for name, i in waiting.items():
        raise ValueError(
            f"layer {i}, {layers[i]}, stashes {name!r}, but no later layer pops it; "
            f"pop it, or leave the stash out"
        )


def _check_ties(layers: Sequence[Layer]) -> None:
    users: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        for _, name in layer.ties:
            users.setdefault(name, []).append(i)
            if users[name].count(i) > 1:
                raise ValueError(f"layer {i}, {layer}, ties {name!r} twice; tie it once in a layer")
        for path, _ in layer.ties:
            names = [repr(name) for p, name in layer.ties if p == path]
            if len(names) > 1:
                raise ValueError(
                    f"layer {i}, {layer}, ties {path!r} as {' and as '.join(names)}; "
                    f"tie a parameter by one name"
                )
    for name, ids in users.items():
        if len(ids) == 1:
            raise ValueError(
                f"layer {ids[0]}, {layers[ids[0]]}, ties {name!r}, but no other layer does; "
                f"tie the same name in another layer, or leave the tie out"
            )


def check_stashed(i: int, layer: Layer, output: PyTree) -> None:
    """Check that an output is (y, *stashed); raise ValueError if it is not."""
    length = 1 + len(layer.stashes)
    if length > 1 and not (isinstance(output, tuple) and len(output) == length):
        got = f"a tuple of {len(output)}" if isinstance(output, tuple) else type(output).__name__
        raise ValueError(
            f"layer {i}, {layer}, stashes {_listed(layer.stashes)}, so its output must be a tuple "
            f"of {length}: the next layer's input, and the stashed tensors; got {got}"
        )


def check_tied(i: int, layer: Layer, params: PyTree, shared: dict) -> None:
    """Check that each tied path is a parameter with the shape and type of the owner's."""
    for path, name in layer.ties:
        try:
            own = _at(params, path.split("."))
        except KeyError:
            own = None
        if own is None or not hasattr(own, "shape"):
            raise ValueError(
                f"layer {i}, {layer}, ties {name!r} to {path!r}, which is not one of its "
                f"parameters: {_listed(by_name(params))}"
            )
        owner = shared.get(name, own)
        if (own.shape, own.dtype) != (owner.shape, owner.dtype):
            raise ValueError(
                f"layer {i}, {layer}, ties {name!r} to its {path!r} of {own.dtype}"
                f"{list(own.shape)}, but the first layer of that name has {owner.dtype}"
                f"{list(owner.shape)}; tied parameters must have one shape and type"
            )


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "nothing"
