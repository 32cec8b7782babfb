"""`RowSplit`: some rows or columns of a matrix train (input and output channels, vocabulary rows), or some experts."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.weights.core import (
    Node,
    Weight,
    divided_too,
    linear_rule,
    materialize,
    materialize_rule,
    node,
    pad_spec,
    specs,
    specs_rule,
    static,
)
from jaxft.weights.packed import Packed
from jaxft.weights.ragged import (
    Axes,
    group_of_row,
    ragged_input_gradient,
    ragged_linear_rule,
    ragged_matmul,
    ragged_outer,
)
from jaxft.weights.reduction import as_rows, weight_gradient

SOME_EXPERTS = "some_experts"  # in the names of operations: products of the rows of those experts that train


@node
class RowSplit(Node):
    """A matrix `[..., d_in, d_out]` whose slices `index` along `axis` are replaced by `rows`, which train.

    `axis=-2` replaces rows (input channels): the backward pass keeps only `x[..., index]`.
    `axis=-1` replaces columns (output channels): the weight gradient is computed for those columns only.
    `axis=-3` replaces whole matrices of a stack `[..., experts, d_in, d_out]`: only they have a weight gradient.
    `index` is sorted or not, without repeats; its leading axes are the layers. An index equal to the number of slices
    (or beyond) is padding: it means nothing, so that layers with different counts stack.
    """

    base: Weight
    rows: Float[Array, "*layers d1 d2"] | Packed
    index: Int[Array, "*layers k"]
    axis: int = static(default=-2)


def _replace(base: Array, rows: Array, index: Array, axis: int) -> Array:
    rows = rows.astype(base.dtype)
    if base.ndim > max(2, -axis):
        return jax.vmap(lambda b, r, i: _replace(b, r, i, axis))(base, rows, index)
    if axis != -1:
        return jnp.asarray(base).at[index].set(rows, mode="drop")
    return jnp.asarray(base).at[:, index].set(rows, mode="drop")


@functools.partial(jax.jit, static_argnums=2, inline=True)
def gather_rows(matrix: Array, index: Array, axis: int) -> Array:
    """Slices of `[*layers, (experts,) d_in, d_out]` along `axis` at `index [*layers, k]`; zeros for padding."""
    where = index[..., None, :] if axis == -1 else index.reshape(*index.shape, *(1,) * (-axis - 1))
    return jnp.take_along_axis(matrix, where, axis=axis, mode="fill", fill_value=0)


@materialize_rule.register
def _(w: RowSplit) -> Array:
    return _replace(jax.lax.stop_gradient(materialize(w.base)), materialize(w.rows), w.index, w.axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _row_matmul(x: Array, base: Array, rows: Array, index: Array, axis: int) -> Array:
    return jnp.matmul(x, _replace(base, rows, index, axis))


def _row_forward(x: Array, base: Array, rows: Array, index: Array, axis: int) -> tuple[Array, tuple[Array, ...]]:
    kept = jnp.take(x, index, axis=-1, mode="fill", fill_value=0) if axis == -2 else x
    return _row_matmul(x, base, rows, index, axis), (kept, base, rows, index)


def _row_backward(axis: int, residuals: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    kept, base, rows, index = residuals
    dx = jnp.matmul(g, _replace(base, rows, index, axis).T)
    if axis == -1:
        g = jnp.take(g, index, axis=-1, mode="fill", fill_value=0)
    return dx, None, weight_gradient(kept, g).astype(rows.dtype), None


_row_matmul.defvjp(_row_forward, _row_backward)


@linear_rule.register
def _(w: RowSplit, x: Array) -> Array:
    return _row_matmul(x, materialize(w.base).astype(x.dtype), materialize(w.rows), w.index, w.axis)


def parted(
    w: RowSplit, parts: int
) -> tuple[Float[Array, "vocab dim"], Float[Array, "parts trained dim"], Int[Array, " vocab"]]:
    """A table `[vocab, dim]` of which some rows train, in an order for `unembed_parted`: they are the first of each of
    `parts` equal parts.

    Returns:
        the table in that order, of which no gradient is taken; its rows that train; and where each row lies in it.
    """
    vocab, k = w.base.shape[0], w.index.shape[0]
    own = w.index < vocab  # padding is the place of a row that does not train
    is_taken = jnp.zeros(vocab, bool).at[:k].set(own)
    trains = jnp.zeros(vocab, bool).at[w.index].set(True, mode="drop")
    order = jnp.zeros(vocab, jnp.int32).at[jnp.argsort(is_taken)].set(jnp.argsort(trains).astype(jnp.int32))
    order = order.at[jnp.where(own, jnp.arange(k), vocab)].set(w.index, mode="drop")
    order = jnp.concatenate([order[:k].reshape(parts, -1), order[k:].reshape(parts, -1)], axis=1).reshape(-1)
    table = jnp.take(jax.lax.stop_gradient(materialize(w)), order, axis=0)
    rows = jnp.where(own[:, None], materialize(w.rows), 0).reshape(parts, -1, table.shape[1])
    return table, rows, jnp.zeros_like(order).at[order].set(jnp.arange(vocab, dtype=jnp.int32))


@jax.custom_vjp
def unembed_parted(
    x: Float[Array, "... dim"], table: Float[Array, "vocab dim"], rows: Float[Array, "parts trained dim"]
) -> Float[Array, "... vocab"]:
    """`x @ table.T` for what `parted` returns: the gradient of the table is computed for the rows that train alone."""
    return jnp.matmul(as_rows(x), table.T).reshape(*x.shape[:-1], table.shape[0])


def _parted_forward(x: Array, table: Array, rows: Array) -> tuple[Array, tuple[Array, ...]]:
    return unembed_parted(x, table, rows), (x, table, rows)


def _parted_backward(residuals: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    x, table, rows = residuals
    parts, trained, _ = rows.shape
    flat, scores = as_rows(x), as_rows(g)
    tokens = tuple(range(flat.ndim - 1))
    scores = scores.reshape(*scores.shape[:-1], parts, -1)[..., :trained]
    return jnp.matmul(g, table), None, jnp.tensordot(scores, flat, (tokens, tokens)).astype(rows.dtype)


unembed_parted.defvjp(_parted_forward, _parted_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _ragged_row_matmul(x: Array, base: Array, rows: Array, index: Array, sizes: Array, axis: int, axes: Axes) -> Array:
    return ragged_matmul(x, _replace(base, rows, index, axis), sizes, axes)


def _ragged_row_forward(
    x: Array, base: Array, rows: Array, index: Array, sizes: Array, axis: int, axes: Axes
) -> tuple[Array, tuple[Array, ...]]:
    kept = _channels(x, index, sizes) if axis == -2 else x
    return _ragged_row_matmul(x, base, rows, index, sizes, axis, axes), (kept, base, rows, index, sizes)


def _ragged_row_backward(axis: int, axes: Axes, residuals: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    kept, base, rows, index, sizes = residuals
    dx = ragged_input_gradient(g, _replace(base, rows, index, axis), sizes, axes)
    if axis == -1:
        g = _channels(g, index, sizes)
    if axis != -3:
        return dx, None, ragged_outer(kept, g, sizes, axes).astype(rows.dtype), None, None
    kept, g, sizes = _of_experts(kept, g, sizes, index)
    axes = axes._replace(groups=())  # those that train lie where they like: each device sums what it has of them
    with jax.named_scope(SOME_EXPERTS):
        return dx, None, ragged_outer(kept, g, sizes, axes).astype(rows.dtype), None, None


_ragged_row_matmul.defvjp(_ragged_row_forward, _ragged_row_backward)


def _channels(x: Array, index: Array, sizes: Array) -> Array:
    """Of each row `[shards, rows, d]` the channels `index [groups, k]` of its group; zeros for padding."""
    where = jnp.take(index, group_of_row(sizes, x.shape[1]), axis=0, mode="clip")
    return jnp.take_along_axis(x, where, axis=-1, mode="fill", fill_value=0)


def _of_experts(x: Array, g: Array, sizes: Array, index: Array) -> tuple[Array, Array, Array]:
    """`x` and `g` with the rows of the experts at `index [k]` in front, in that order, and how many each has."""
    k, experts = index.shape[0], sizes.shape[1]
    place = jnp.full(experts + 1, k, jnp.int32).at[index].set(jnp.arange(k, dtype=jnp.int32), mode="drop")
    order = jnp.argsort(place.at[experts].set(k)[group_of_row(sizes, x.shape[1])], axis=-1, stable=True)[..., None]
    x, g = (jnp.take_along_axis(a, order, axis=1) for a in (x, g))
    return x, g, jnp.take(sizes, index, axis=1, mode="fill", fill_value=0)


@ragged_linear_rule.register
def _(w: RowSplit, x: Array, sizes: Array, axes: Axes) -> Array:
    base, rows = materialize(w.base).astype(x.dtype), materialize(w.rows)
    return _ragged_row_matmul(x, base, rows, w.index, sizes, w.axis, axes)


@specs_rule.register
def _(w: RowSplit, spec: PartitionSpec) -> RowSplit:
    entries = list(pad_spec(spec, len(w.rows.shape)))
    if w.axis != -1:
        entries[w.axis + 1] = divided_too(entries[w.axis + 1], entries[w.axis])
    entries[w.axis] = None
    return w.replace(base=specs(w.base, spec), rows=specs(w.rows, PartitionSpec(*entries)), index=PartitionSpec())
