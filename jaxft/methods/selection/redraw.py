"""What happens to values and optimizer state when other units train than before. Shapes stay, so nothing recompiles."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from jaxft.errors import JaxftError
from jaxft.methods.base import Signals, map_moments, restart_moments, update_like
from jaxft.partition import Trains, Tuned, combine, map_weights, mark, split, weights_by_path
from jaxft.weights import (
    BlockSplit,
    Packed,
    RowSplit,
    SparseDelta,
    Split,
    Tree,
    gather_blocks,
    gather_rows,
    is_node,
    materialize,
    repack,
    resplit,
)

OptimizerState = Literal["reset", "carry"]
Values = Literal["fold", "rewind"]

UnitNode: TypeAlias = SparseDelta | RowSplit | BlockSplit
PARTS = {SparseDelta: ("values", "indices"), RowSplit: ("rows", "index"), BlockSplit: ("blocks", "index")}
"""Of each node: the field that trains, and the field that says where it sits."""


def redraw(
    tuned: Tuned,
    opt_state: Any,
    new: dict[str, Array],
    signals: Signals,
    *,
    values: Values = "fold",
    optimizer_state: OptimizerState = "carry",
) -> tuple[Tuned, Any]:
    """The same model with other units training.

    Args:
        new: by path, the new indices of a `SparseDelta`, `RowSplit` or `BlockSplit` (of the shape of the old, padding
            allowed), or the new mask `bool[L]` of a `Split` (with as many true entries). Where the trained part is
            `Packed`, the indices of a layer stand where its old ones stood, or some of them.
        signals: those of the update; `donate` and `optimizer` are used.
        values: what a unit that stops training keeps: its value (`fold`), or the one before it trained (`rewind`).
            A unit that goes on keeps its value and its precision, one that starts does so from the frozen value.
        optimizer_state: `carry` moves the moments along with what goes on and starts the others afresh; `reset`
            restarts all moments and their step count, as a fresh optimizer would.

    Raises:
        JaxftError: values cannot be folded, because the frozen base is no plain array.
    """
    weights = weights_by_path(combine(tuned))
    for path in new:
        base = getattr(weights[path], "base", None)
        if values == "fold" and is_node(base):
            raise JaxftError(
                f'"{path}": values that stop training cannot be folded into a {type(base).__name__}; use values: rewind'
            )
    how = (values == "fold", optimizer_state == "carry", signals.optimizer)
    return update_like(_redraw, tuned, opt_state, new, *how, donate=signals.donate)


def _redraw(
    tuned: Tuned, opt_state: Any, new: dict, fold: bool, carry: bool, optimizer: optax.GradientTransformation | None
) -> tuple[Tuned, Any]:
    old = weights_by_path(combine(tuned))

    def move(path: str, w: Any) -> Any:
        if path not in new:
            return w
        if isinstance(w, Split):
            moved = resplit(old[path], new[path])
            return moved.replace(trainable=Trains(moved.trainable))
        return _reindex(old[path], new[path], fold)

    moved = split(map_weights(move, mark(tuned)), tuned.state)
    if not carry:
        return moved, restart_moments(opt_state, moved.trainable, optimizer)

    def follow(moments: Tree, fresh: Tree) -> Tree:
        begin = weights_by_path(fresh)

        def one(path: str, m: Any) -> Any:
            if path not in new:
                return m
            field = "trainable" if isinstance(m, Split) else PARTS[type(m)][0]
            moment, fresh = getattr(m, field), getattr(begin[path], field)
            if not jax.tree.leaves(moment):  # this part of the optimizer does not treat this leaf
                return m
            if isinstance(m, Split):
                return m.replace(trainable=_follow_layers(moment, old[path], new[path], fresh))
            at, there = _found(old[path], new[path])
            moment, fresh = (_windows(x, like=getattr(old[path], field)) for x in (moment, fresh))
            moved = _follow(moment, at, there, unit_axis(old[path]), fresh)
            moved = _held_like(getattr(old[path], field), moved, new[path] < num_units(old[path]))
            if isinstance(moved, Packed):
                moved = moved.replace(start=None)
            return m.replace(**{field: moved})

        return map_weights(one, moments)

    # What begins to train begins as under a fresh optimizer: mostly with moments of zero.
    fresh = jax.tree.map(jnp.zeros_like, opt_state) if optimizer is None else optimizer.init(moved.trainable)
    return moved, map_moments(opt_state, tuned.trainable, follow, fresh)


def _follow_layers(moment: Array, was: Split, now: Bool[Array, " layers"], fresh: Array) -> Array:
    k = moment.shape[0]
    order = jnp.argsort(~now, stable=True)[:k]
    stays = was.is_trainable[order].reshape(-1, *(1,) * (moment.ndim - 1))
    return jnp.where(stays, jnp.take(moment, jnp.minimum(was.slot, k - 1)[order], axis=0), fresh).astype(moment.dtype)


def unit_axis(w: UnitNode) -> int:
    """The axis of the trained part of a node along which its indices run."""
    if isinstance(w, RowSplit):
        return w.axis
    return -3 if isinstance(w, BlockSplit) else -1


def num_units(w: UnitNode) -> int:
    """How many positions the indices of a node can name; an index of that or more is padding."""
    shape = w.base.shape if not is_node(w.base) else jax.eval_shape(materialize, w.base).shape
    matrix = shape[getattr(w, PARTS[type(w)][1]).ndim - 1 :]
    if isinstance(w, RowSplit):
        return matrix[w.axis]
    entries = 1
    for side in matrix:
        entries *= side
    return entries // (w.blocks.shape[-2] * w.blocks.shape[-1]) if isinstance(w, BlockSplit) else entries


def _windows(part: Array | Packed, like: Array | Packed) -> Array:
    """`part`, as it is, or unpacked as `like` is; a moment has holes where `like` has starts."""
    return materialize(part.replace(start=like.start)) if isinstance(like, Packed) else part


def _held_like(part: Array | Packed, windows: Array, own: Bool[Array, "*layers k"]) -> Array | Packed:
    return repack(part, windows, own) if isinstance(part, Packed) else windows


def _found(w: UnitNode, new: Int[Array, "*layers k"]) -> tuple[Int[Array, "*layers k"], Bool[Array, "*layers k"]]:
    """Where each new index is among the old ones, and whether it is there at all."""
    return positions_in(getattr(w, PARTS[type(w)][1]), new, num_units(w))


def positions_in(old: Int[Array, "*layers k"], new: Int[Array, "*layers m"], n: int) -> tuple[Array, Array]:
    """For each of `new`, its position among `old` (any order) and whether it is there; `n` or more is padding."""
    if old.ndim > 1:
        return jax.vmap(lambda o, i: positions_in(o, i, n))(old, new)
    order = jnp.argsort(old)
    at = jnp.minimum(jnp.searchsorted(old[order], new), old.size - 1)
    return order[at], (old[order][at] == new) & (new < n)


def _follow(array: Array, at: Array, there: Array, axis: int, fresh: Array | int = 0) -> Array:
    """The entries of `array` at positions `at` along `axis`, those of `fresh` where they are not there."""
    trailing = (1,) * (-axis - 1)
    leading = (1,) * (array.ndim - at.ndim - len(trailing))
    shape = at.shape[:-1] + leading + at.shape[-1:] + trailing
    return jnp.where(there.reshape(shape), jnp.take_along_axis(array, at.reshape(shape), axis=axis), fresh)


def _reindex(w: UnitNode, new: Array, fold: bool) -> UnitNode:
    field, where = PARTS[type(w)]
    part, axis, n = getattr(w, field), unit_axis(w), num_units(w)
    values = materialize(part)
    at, stays = _found(w, new)
    trained = _follow(values, at, stays, axis)
    if isinstance(w, SparseDelta):
        if fold:
            _, goes_on = positions_in(new, w.indices, n)
            base = materialize(w.replace(values=jnp.where(goes_on, 0, values)))
        else:
            base = w.base
    else:
        base = materialize(w) if fold else w.base
        dense = base if fold else materialize(base)
        if isinstance(w, RowSplit):
            fresh = gather_rows(dense, new, w.axis)
        else:
            fresh = gather_blocks(dense, new, *values.shape[-2:])
        shape = [1] * values.ndim
        shape[: new.ndim - 1] = new.shape[:-1]
        shape[axis] = new.shape[-1]
        trained = jnp.where(stays.reshape(shape), trained, fresh.astype(values.dtype))
    held = _held_like(part, trained, new < n)
    marked = held.replace(values=Trains(held.values)) if isinstance(held, Packed) else Trains(held)
    return w.replace(base=base, **{field: marked, where: new})
