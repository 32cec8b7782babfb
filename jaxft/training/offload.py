"""Optimizer state that waits in host memory between updates: fetched, used and stored again, a parameter at a time.

XLA starts copies from the host as early as it can, so that all moments would be on the device together. Here the turn
of a parameter begins when the state of the one before it is stored, by a dependency the compiler cannot see through.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool

from jaxft.partition import key_name
from jaxft.weights.memory import in_host_memory

Tree = Any
Update = Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]


def in_turns(update: Update, shardings: Tree) -> Update:
    """`update(gradients, trainable, opt_state) -> (trainable, opt_state)`, whose state may be in host memory.

    The result has every array where the argument has it. What is computed is `update`, whatever the optimizer and the
    treatment of gradients: it is traced once, and for each parameter only what its new value and its state depend on
    runs, on state fetched when its turn comes (state that several parameters depend on, when the first of them does).

    Args:
        update: for arrays on the device.
        shardings: NamedShardings of `opt_state`.
    """
    places = jax.tree.leaves(shardings)

    def run(gradients: Tree, trainable: Tree, opt_state: Tree) -> tuple[Tree, Tree]:
        if not any(map(in_host_memory, jax.tree.leaves(opt_state))):
            return update(gradients, trainable, opt_state)
        inputs, treedef = jax.tree.flatten((gradients, trainable, opt_state))
        on_device = treedef.unflatten([jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs])
        closed, shapes = jax.make_jaxpr(update, return_shape=True)(*on_device)
        is_host = [in_host_memory(a) for a in jax.tree.leaves((trainable, opt_state))]
        states = zip(jax.tree.leaves(opt_state), places, strict=True)
        readable = [False] * (len(is_host) - len(places)) + [is_readable(a.shape, place) for a, place in states]
        results: list[Any] = [None] * len(is_host)
        stored = jnp.ones((), bool)
        for turn in _turns((trainable, opt_state), trainable):
            jaxpr, used = partial_eval.dce_jaxpr(closed.jaxpr, [i in turn for i in range(len(results))])
            for i in (i for i, wanted in enumerate(used) if wanted and in_host_memory(inputs[i])):
                inputs[i] = _fetch_if(stored, inputs[i])
            arguments = [a for a, wanted in zip(inputs, used, strict=True) if wanted]
            for i, value in zip(turn, jaxpr_as_fun(ClosedJaxpr(jaxpr, closed.consts))(*arguments), strict=True):
                results[i] = jax.device_put(value, jax.memory.Space.Host) if is_host[i] else value
            stored &= _are_stored(results[i] for i in turn if is_host[i] and readable[i])
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return run


def is_readable(shape: tuple[int, ...], place: NamedSharding) -> bool:
    """Whether the first matrix of a stack can be read back from host memory: each device has all layers, so that no
    communication is needed for it, and its part of a matrix is whole tiles (libtpu 0.0.42 fails on some others)."""
    part = place.shard_shape(shape)
    return len(shape) > 2 and part[0] == shape[0] and part[-1] % 128 == 0 and part[-2] % 8 == 0


def _turns(outputs: Tree, trainable: Tree) -> list[list[int]]:
    """Which leaves of `outputs`, by number, are computed together: those of one parameter, known by the end of their
    path, the largest parameters first; before them what belongs to no parameter alone."""
    sizes = {_names(keys): a.size for keys, a in jax.tree_util.tree_leaves_with_path(trainable)}
    turns: dict[tuple[str, ...], list[int]] = {(): [], **{p: [] for p in sorted(sizes, key=lambda p: -sizes[p])}}
    for i, (keys, _) in enumerate(jax.tree_util.tree_leaves_with_path(outputs)):
        names = _names(keys)
        turns[next((names[k:] for k in range(len(names)) if names[k:] in sizes), ())].append(i)
    return [turn for turn in turns.values() if turn]


def _names(keys: tuple) -> tuple[str, ...]:
    return tuple(map(key_name, keys))


def _fetch_if(stored: Bool[Array, ""], array: Array) -> Array:
    """`array` on the device. `stored` is always true; the compiler does not know, and waits for it."""
    return jax.lax.cond(
        stored, lambda: jax.device_put(array, jax.memory.Space.Device), lambda: jnp.zeros(array.shape, array.dtype)
    )


def _are_stored(arrays: Iterable[Array]) -> Bool[Array, ""]:
    """True, as soon as stacks of matrices have arrived in host memory: the first matrix of each is read back."""
    stored = jnp.ones((), bool)
    for array in arrays:
        first = jax.device_put(jax.lax.index_in_dim(array, 0, keepdims=False), jax.memory.Space.Device)
        stored &= ~jnp.any(first > jnp.inf)
    return stored
