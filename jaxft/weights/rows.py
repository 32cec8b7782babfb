"""`RowSplit`: some rows or columns of a matrix train (input channels, output channels, vocabulary rows)."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.weights.core import (
    Node,
    Weight,
    linear_rule,
    materialize,
    materialize_rule,
    node,
    pad_spec,
    specs,
    specs_rule,
    static,
)


@node
class RowSplit(Node):
    """A matrix `[..., d_in, d_out]` whose slices `index` along `axis` are replaced by `rows`, which train.

    `axis=-2` replaces rows (input channels): the backward pass keeps only `x[..., index]`.
    `axis=-1` replaces columns (output channels): the weight gradient is computed for those columns only.
    `index` is sorted or not, without repeats; its leading axes are the layers. An index equal to the number of slices
    (or beyond) is padding: it means nothing, so that layers with different counts stack.
    """

    base: Weight
    rows: Float[Array, "*layers d1 d2"]
    index: Int[Array, "*layers k"]
    axis: int = static(default=-2)


def _replace(base: Array, rows: Array, index: Array, axis: int) -> Array:
    rows = rows.astype(base.dtype)
    if base.ndim > 2:
        return jax.vmap(lambda b, r, i: _replace(b, r, i, axis))(base, rows, index)
    if axis == -2:
        return jnp.asarray(base).at[index].set(rows, mode="drop")
    return jnp.asarray(base).at[:, index].set(rows, mode="drop")


def gather_rows(matrix: Array, index: Array, axis: int) -> Array:
    """Slices of `[*layers, d_in, d_out]` along `axis` at `index [*layers, k]`; zeros for padding."""
    where = index[..., :, None] if axis == -2 else index[..., None, :]
    return jnp.take_along_axis(matrix, where, axis=axis, mode="fill", fill_value=0)


@materialize_rule.register
def _(w: RowSplit) -> Array:
    return _replace(jax.lax.stop_gradient(materialize(w.base)), w.rows, w.index, w.axis)


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
    drows = jnp.matmul(kept.reshape(-1, kept.shape[-1]).T, g.reshape(-1, g.shape[-1]))
    return dx, None, drows.astype(rows.dtype), None


_row_matmul.defvjp(_row_forward, _row_backward)


@linear_rule.register
def _(w: RowSplit, x: Array) -> Array:
    return _row_matmul(x, materialize(w.base).astype(x.dtype), w.rows, w.index, w.axis)


@specs_rule.register
def _(w: RowSplit, spec: PartitionSpec) -> RowSplit:
    *layers, d_in, d_out = pad_spec(spec, w.rows.ndim)
    rows = (None, d_out) if w.axis == -2 else (d_in, None)
    return RowSplit(specs(w.base, spec), PartitionSpec(*layers, *rows), PartitionSpec(), w.axis)
