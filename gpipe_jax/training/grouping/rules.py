"""Find the groups of parameters that an optimizer treats alike, and check that they may be packed.

A group may be packed if a trial gives the same updates for several arrays and for one array of the
same numbers; see `elementwise`. The optimizer must also do the same to the arrays of the trial, and
to the packed ones, as to the layers' own: its traced programs are compared.
"""

from collections.abc import Sequence

import jax
import numpy as np
import optax

from gpipe_jax.distributed.mesh import MeshLike
from gpipe_jax.errors import ArgumentError
from gpipe_jax.pipeline.ragged.chunked_storage import ChunkedStorage
from gpipe_jax.training.elementwise import (
    LARGE,
    REFUSED,
    SMALL,
    Forms,
    Probe,
    draw,
    packing_is_harmless,
)
from gpipe_jax.training.grouping.leaf_programs import (
    Codes,
    Programs,
    UnlikeParametersError,
    trace,
)
from gpipe_jax.training.grouping.logical_tree import LogicalTree, layers_tree
from gpipe_jax.utils.trees import PyTree, wide

_TRIED = 3  # parameters of a group in its trial
_PADDING = 3  # elements of other groups on each side of the packed array of a trial

_BY_SIZE = (
    "`tx` treats parameters differently by their sizes, which packed parameters do not have; give "
    "it the mask or the labels as a tree, computed once from `pipe.to_layers(state)`"
)


def programs_of(
    tx: optax.GradientTransformationExtraArgs, storage: ChunkedStorage, mesh: MeshLike
) -> tuple[Programs, list[int]]:
    """Return what `tx` does to each parameter, and the group of each.

    Raises:
        ArgumentError: `tx` does not take the layers' tree.
        ValueError: Packed parameters would not do: it sees whole parameters, or their sizes.
    """
    codes, tree = Codes(), layers_tree(storage)
    try:
        programs = trace(tx, jax.eval_shape(wide, tree), tree, codes)
    except UnlikeParametersError as error:
        raise ValueError(f"{REFUSED} ({error})") from error
    except Exception as error:  # optax raises anything for a tree that it cannot take
        raise ArgumentError("tx", _refusal(tree, error)) from error
    numbers = Codes()
    groups = [numbers[key] for key in programs.keys]
    logical, local = LogicalTree(storage, mesh, groups), storage.local_shapes()
    try:
        for group in range(len(numbers)):
            members = [i for i, own in enumerate(groups) if own == group]
            if not programs.constant[members[0]]:
                _check_group(tx, tree, members, programs, codes)
        packed = jax.eval_shape(lambda arrays: logical.present(arrays, logical.ids(arrays)), local)
        _check_programs(tx, packed, logical.standing, programs, codes)
    except ArithmeticError as error:  # Muon divides by the sides of an array, which may be empty
        raise ValueError(f"{REFUSED} ({error})") from error
    return programs, groups


_CAUSES = {  # by words in the error of optax
    "required keyword-only argument": (
        "`tx` needs more than gradients, state and parameters in an update, which is not "
        "supported; for a learning rate that follows the loss, use a schedule such as "
        "optax.cosine_decay_schedule, and gpipe_jax.EarlyStopping to end the training"
    ),
    "no corresponding transformation": (
        "`tx` has no transformation for some of the labels; give one for each label, "
        "optax.set_to_zero() for what stays as it is"
    ),
    "has no attribute 'fast'": (
        "`tx` keeps two sets of parameters, as optax.lookahead does, which is not supported; use "
        "its inner optimizer, and Trainer(ema=0.99) for an average"
    ),
}


def _refusal(tree: PyTree, error: Exception) -> str:
    """Word why `tx` could not be traced for the layers' tree."""
    for words, cause in _CAUSES.items():
        if words in str(error):
            return f"{cause} ({' '.join(str(error).split())})"
    first = str(error).strip().partition("\n")[0]
    return (
        f"`tx` does not take the parameters as the layers have them ({type(error).__name__}: "
        f"{first}); write masks, labels and functions of them for the list of {len(tree)} trees "
        f"that `pipe.to_layers(state)` returns, choose parameters by patterns with "
        f"gpipe_jax.optimizers.grouped, or turn those for a model that from_module divided "
        f"into such by gpipe_jax.optimizers.for_layers(pipe, mask)"
    )


def _check_programs(
    tx: optax.GradientTransformationExtraArgs,
    tree: PyTree,
    members: Sequence[int],
    programs: Programs,
    codes: Codes,
) -> None:
    """Check that `tx` does the same to these members of a tree as to the layers' own."""
    keys = trace(tx, jax.eval_shape(wide, tree), tree, codes).keys
    if any(keys[i] != programs.keys[i] for i in members):
        raise ValueError(_BY_SIZE)


def _check_group(
    tx: optax.GradientTransformationExtraArgs,
    tree: PyTree,
    members: Sequence[int],
    programs: Programs,
    codes: Codes,
) -> None:
    """Check by a trial that the parameters of a group may be packed."""
    rng, tried = np.random.default_rng(0), _choose(tree, members)
    params, *gradients = (_forms(rng, tree, tried) for _ in range(3))
    if not packing_is_harmless(tx, params, gradients, start=_PADDING):
        raise ValueError(REFUSED)
    for form, shown in zip(params, (tried, tried[:1]), strict=True):
        of_own_types = jax.tree.map(
            lambda a, like: jax.ShapeDtypeStruct(a.shape, like.dtype), form, tree
        )
        _check_programs(tx, of_own_types, shown, programs, codes)


def _choose(tree: PyTree, members: Sequence[int]) -> list[int]:
    """Return a few members of a group, of as many ranks as possible."""
    ranks = [len(a.shape) for a in jax.tree.leaves(tree)]
    seen: dict[int, int] = {}
    order = {}
    for i in members:
        order[i] = seen[ranks[i]] = seen.get(ranks[i], 0) + 1
    return sorted(sorted(members, key=order.__getitem__)[:_TRIED])


def _forms(rng: np.random.Generator, tree: PyTree, tried: Sequence[int]) -> Forms:
    """Draw numbers for some parameters; all others are empty."""
    leaves, structure = jax.tree.flatten(tree)
    ranks = [len(a.shape) for a in leaves]
    own = {
        i: draw(rng, Probe(_shape(ranks[i]), (LARGE, SMALL)[n % 2])) for n, i in enumerate(tried)
    }
    elements = [np.ravel(a) for a in own.values()]
    padding = np.zeros(_PADDING, np.float32)  # before too: noise depends on the position
    vector = np.concatenate([padding, *elements, padding])
    first = {tried[0]: vector.reshape(*(1 for _ in range(ranks[tried[0]] - 1)), -1)}
    empty = [np.zeros((0, *a.shape[1:]), np.float32) for a in leaves]
    return Forms(
        *(
            structure.unflatten([given.get(i, nothing) for i, nothing in enumerate(empty)])
            for given in (own, first)
        )
    )


def _shape(rank: int) -> tuple[int, ...]:
    """Return the shape of an array of a trial, with sides that differ."""
    return (5, 4, 3, 2, 1, *(1 for _ in range(rank)))[:rank]
