"""The products of `jaxft.weights.ragged` on a GPU: kernels that multiply each row with the matrix of its group alone.

XLA's own ragged product is a dense one there, of all rows with the matrices of all groups. These are Pallas kernels for
Triton: a program of the grid computes one tile of the result, and adds up in float32. They compile for GPUs from the
Ampere generation on.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

_SIDE = 128  # rows and columns of a tile of the result, at most
_LEAST = 16  # a side of what tensor cores multiply, at least
_BYTES = 128  # of a row or column that are multiplied at once, at most
_PARAMETERS = triton.CompilerParams(num_warps=8, num_stages=3)


def product(
    x: Float[Array, "rows i"],
    w: Float[Array, "groups i o"],
    sizes: Int[Array, " groups"],
    *,
    is_transposed: bool = False,
    interpret: bool = False,
) -> Float[Array, "rows o"]:
    """Row r of group e times `w[e]`; or rows `[rows, o]` times its transpose, `[rows, i]`. Rows beyond the sum of
    `sizes` are not written."""
    columns = w.shape[1 if is_transposed else 2]
    side, depth = _side(columns), _side(x.shape[1], _BYTES // x.dtype.itemsize)
    height = _side(x.shape[0])
    tiles = _tiles(sizes, x.shape[0], height)
    kernel = functools.partial(
        _product_kernel, height=height, side=side, depth=depth, columns=columns, is_transposed=is_transposed
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype),
        grid=(tiles[0].size, pl.cdiv(columns, side)),
        compiler_params=_PARAMETERS,
        interpret=interpret,
        name="ragged_product",
    )(x, w, *tiles)


def outer(
    x: Float[Array, "rows i"], g: Float[Array, "rows o"], sizes: Int[Array, " groups"], *, interpret: bool = False
) -> Float[Array, "groups i o"]:
    """For each group the sum of `x[r] g[r]^T` over its rows."""
    inputs, columns = x.shape[1], g.shape[1]
    height, side, depth = _side(inputs), _side(columns), _side(x.shape[0], _BYTES // x.dtype.itemsize)
    ends = jnp.cumsum(sizes)
    return pl.pallas_call(
        functools.partial(_outer_kernel, height=height, side=side, depth=depth),
        out_shape=jax.ShapeDtypeStruct((sizes.size, inputs, columns), x.dtype),
        grid=(pl.cdiv(inputs, height), pl.cdiv(columns, side), sizes.size),
        compiler_params=_PARAMETERS,
        interpret=interpret,
        name="ragged_outer",
    )(x, g, ends - sizes, ends)


def _side(size: int, most: int = _SIDE) -> int:
    """The side of a tile along a dimension of `size`: a power of two."""
    return max(_LEAST, min(most, pl.next_power_of_2(size)))


def _tiles(sizes: Int[Array, " groups"], rows: int, height: int) -> tuple[Int[Array, " tiles"], ...]:
    """Of each tile of at most `height` rows of one group: the group, the first row, and where its rows end. There are
    as many as any `sizes` of so many rows need; those that are left have no rows."""
    ends, counts = jnp.cumsum(sizes), -(-sizes // height)
    behind = jnp.cumsum(counts)
    index = jnp.arange(rows // height + sizes.size, dtype=sizes.dtype)
    group = jnp.minimum(jnp.sum(index[:, None] >= behind, axis=1, dtype=jnp.int32), sizes.size - 1)
    first = (ends - sizes)[group] + height * (index - (behind - counts)[group])
    last = jnp.where(index < behind[-1], jnp.minimum(first + height, ends[group]), first)
    return group, first, last


def _inside(first: Array, side: int, end: Any) -> Array:
    """Which of `side` places from `first` on lie before `end`."""
    return first + jnp.arange(side) < end


def _inside_or_all(first: Array, side: int, size: int) -> Array | None:
    """`_inside` of a dimension; None where tiles divide it, and all do."""
    return None if size % side == 0 else _inside(first, side, size)


def _both(rows: Array | None, columns: Array | None) -> Array | None:
    """The mask of a tile from those of its rows and its columns."""
    if columns is None:
        return None if rows is None else rows[:, None]
    return columns[None, :] if rows is None else rows[:, None] & columns[None, :]


def _load(ref: Any, mask: Array | None) -> Array:
    """A tile, zero where its mask is false."""
    return triton.load(ref, mask=mask, other=None if mask is None else 0)


def _product_kernel(
    x: Any, w: Any, groups: Any, firsts: Any, lasts: Any, y: Any, *,
    height: int, side: int, depth: int, columns: int, is_transposed: bool,
) -> None:  # fmt: skip
    tile, column = pl.program_id(0), pl.program_id(1) * side
    first, last, summed = firsts[tile], lasts[tile], x.shape[1]

    @pl.when(first < last)
    def _() -> None:
        group, is_row = groups[tile], _inside(first, height, last)
        is_column = _inside_or_all(column, side, columns)

        def add(step: Array, total: Array) -> Array:
            at = step * depth
            is_summed = _inside_or_all(at, depth, summed)
            left = _load(x.at[pl.ds(first, height), pl.ds(at, depth)], _both(is_row, is_summed))
            if is_transposed:
                right = _load(w.at[group, pl.ds(column, side), pl.ds(at, depth)], _both(is_column, is_summed))
            else:
                right = _load(w.at[group, pl.ds(at, depth), pl.ds(column, side)], _both(is_summed, is_column))
            return total + triton.dot(left, right, trans_b=is_transposed)

        total = lax.fori_loop(0, pl.cdiv(summed, depth), add, jnp.zeros((height, side), jnp.float32))
        place = y.at[pl.ds(first, height), pl.ds(column, side)]
        triton.store(place, total.astype(y.dtype), mask=_both(is_row, is_column))


def _outer_kernel(x: Any, g: Any, firsts: Any, ends: Any, result: Any, *, height: int, side: int, depth: int) -> None:
    row, column, group = pl.program_id(0) * height, pl.program_id(1) * side, pl.program_id(2)
    first, end = firsts[group], ends[group]
    is_row, is_column = _inside_or_all(row, height, x.shape[1]), _inside_or_all(column, side, g.shape[1])

    def add(step: Array, total: Array) -> Array:
        at = first + step * depth
        is_summed = _inside(at, depth, end)
        left = _load(x.at[pl.ds(at, depth), pl.ds(row, height)], _both(is_summed, is_row))
        right = _load(g.at[pl.ds(at, depth), pl.ds(column, side)], _both(is_summed, is_column))
        return total + triton.dot(left, right, trans_a=True)

    total = lax.fori_loop(0, pl.cdiv(end - first, depth), add, jnp.zeros((height, side), jnp.float32))
    place = result.at[group, pl.ds(row, height), pl.ds(column, side)]
    triton.store(place, total.astype(result.dtype), mask=_both(is_row, is_column))
