"""Products with one matrix a group of rows: what the experts of a mixture compute.

A weight of shape `[groups, d_in, d_out]` acts on rows `[shards, rows, d_in]` that are sorted by group:
`sizes [shards, groups]` says how many rows of each shard belong to each group, in order, and sums up to `rows`. A shard
is what one device holds of the rows: nothing is sorted, or gathered, across shards. `axes` names the mesh axes over
which they lie, of the ambient mesh.

The law of nodes reads here: row r of group e becomes `x[r] @ materialize(w)[e]`. A rule is registered beside the node.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.weights.core import Node, Weight, materialize_rule

Axes = tuple[str, ...]

_OUTER = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([0], [0]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


@functools.singledispatch
def ragged_linear_rule(w: Weight, x: Float[Array, "shards rows d_in"], sizes: Array, axes: Axes) -> Array:
    if isinstance(w, Node):
        name = type(w).__name__
        raise TypeError(
            f"{name} has no `ragged_linear` rule: register one beside it, "
            f"or ragged_linear_rule.register({name}, by_materializing_ragged) to use the dense array"
        )
    return ragged_matmul(x, w.astype(x.dtype), sizes, axes)


def ragged_linear(
    x: Float[Array, "shards rows d_in"], w: Weight, sizes: Int[Array, "shards groups"], axes: Axes = ()
) -> Float[Array, "shards rows d_out"]:
    """Row r of group e times `w[e]`, for a weight of shape `[groups, d_in, d_out]`, in the dtype of `x`."""
    return ragged_linear_rule(w, x, sizes, axes)


def by_materializing_ragged(w: Node, x: Array, sizes: Array, axes: Axes) -> Array:
    """A `ragged_linear` rule for nodes without a fast path; to be registered explicitly."""
    return ragged_linear(x, materialize_rule(w), sizes, axes)


# --- on arrays --------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def ragged_matmul(
    x: Float[Array, "shards rows i"], w: Float[Array, "groups i o"], sizes: Int[Array, "shards groups"], axes: Axes
) -> Float[Array, "shards rows o"]:
    """`ragged_linear` of an array of the dtype of `x`."""
    return _each_shard(lambda w, x, sizes: lax.ragged_dot(x, w, sizes), axes, w, x, sizes)


def _forward(x: Array, w: Array, sizes: Array, axes: Axes) -> tuple[Array, tuple[Array, ...]]:
    return ragged_matmul(x, w, sizes, axes), (x, w, sizes)


def _backward(axes: Axes, residuals: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    x, w, sizes = residuals
    return ragged_matmul(g, w.swapaxes(1, 2), sizes, axes), ragged_outer(x, g, sizes, axes), None


ragged_matmul.defvjp(_forward, _backward)


def ragged_outer(
    x: Float[Array, "shards rows i"], g: Float[Array, "shards rows o"], sizes: Int[Array, "shards groups"], axes: Axes
) -> Float[Array, "groups i o"]:
    """The gradient of a weight: for each group the sum of `x[r] g[r]^T` over its rows, in all shards together.

    Rows beyond the sum of `sizes` count nowhere.
    """

    def outer(_: None, x: Array, g: Array, sizes: Array) -> Array:
        return lax.ragged_dot_general(x, g, sizes, _OUTER)

    return _each_shard(outer, axes, None, x, g, sizes, summed=True)


def group_of_row(sizes: Int[Array, "shards groups"], rows: int) -> Int[Array, "shards rows"]:
    """The group of each of `rows` rows; for those beyond the sum of `sizes`, the number of groups."""
    find = functools.partial(jnp.searchsorted, v=jnp.arange(rows), side="right")
    return jax.vmap(find)(jnp.cumsum(sizes, axis=-1)).astype(jnp.int32)


def _each_shard(fn: Callable[..., Array], axes: Axes, w: Array | None, *arrays: Array, summed: bool = False) -> Array:
    """`fn(w, *arrays of one shard)` of every shard: stacked, or summed. On a mesh each device runs its own shard, which
    the compiler does not find out by itself."""

    def local(w: Array | None, *arrays: Array) -> Array:
        found = [fn(w, *(a[shard] for a in arrays)) for shard in range(arrays[0].shape[0])]
        if not summed:
            return jnp.stack(found)
        total = functools.reduce(jnp.add, found)
        return lax.psum(total, axes) if axes else total

    if not axes:
        return local(w, *arrays)
    divided, whole = PartitionSpec(axes), PartitionSpec()
    run = jax.shard_map(
        local,
        in_specs=(whole, *(divided for _ in arrays)),
        out_specs=whole if summed else divided,
        axis_names=set(axes),
    )
    return run(w, *arrays)
