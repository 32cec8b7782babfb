"""Products with one matrix a group of rows: what the experts of a mixture compute.

A weight of shape `[groups, d_in, d_out]` acts on rows `[shards, rows, d_in]` that are sorted by group:
`sizes [shards, groups]` says how many rows of each shard belong to each group, in order, and sums up to `rows`. A shard
is what one device holds of the rows: nothing is sorted, or gathered, across shards. `axes` names the mesh axes over
which they lie, of the ambient mesh.

The law of nodes reads here: row r of group e becomes `x[r] @ materialize(w)[e]`. A rule is registered beside the node.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.weights.core import Node, Weight, materialize_rule
from jaxft.weights.reduction import gathered, scattered, stages_of

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
    return _product(x, gathered(w, stages_of(w.shape[1])), sizes, axes)


def _forward(x: Array, w: Array, sizes: Array, axes: Axes) -> tuple[Array, tuple[Array, ...]]:
    return ragged_matmul(x, w, sizes, axes), (x, w, sizes)


def _backward(axes: Axes, residuals: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    x, w, sizes = residuals
    return ragged_input_gradient(g, w, sizes, axes), ragged_outer(x, g, sizes, axes), None


ragged_matmul.defvjp(_forward, _backward)


def ragged_input_gradient(
    g: Float[Array, "shards rows o"], w: Float[Array, "groups i o"], sizes: Int[Array, "shards groups"], axes: Axes
) -> Float[Array, "shards rows i"]:
    """The gradient of the rows: row r of group e of `g` times `w[e]` transposed."""
    return _product(g, gathered(w, stages_of(w.shape[1])).swapaxes(1, 2), sizes, axes)


def _product(x: Array, w: Array, sizes: Array, axes: Axes) -> Array:
    return _each_shard(lambda w, x, sizes: lax.ragged_dot(x, w, sizes), axes, w, x, sizes)


def ragged_outer(
    x: Float[Array, "shards rows i"], g: Float[Array, "shards rows o"], sizes: Int[Array, "shards groups"], axes: Axes
) -> Float[Array, "groups i o"]:
    """The gradient of a weight: for each group the sum of `x[r] g[r]^T` over its rows, in all shards together.

    Rows beyond the sum of `sizes` count nowhere. On a mesh every device computes the part of its shard, for its share
    of the columns along the axes that do not divide the shards, and the parts are summed where they will lie: groups
    divided over `expert`, inputs over `fsdp`.
    """
    mesh, arrays = jax.sharding.get_abstract_mesh(), (x, g, sizes)
    if mesh.empty:
        return functools.reduce(jnp.add, (_outer(*(a[shard] for a in arrays)) for shard in range(x.shape[0])))
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = tuple(axis for axis, kind in kinds if kind != AxisType.Manual)
    rest = tuple(axis for axis in free if axis not in axes and mesh.shape[axis] > 1)
    rest = rest if g.shape[-1] % math.prod(mesh.shape[axis] for axis in rest) == 0 else ()
    over_inputs = "fsdp" in axes and x.shape[-1] % mesh.shape["fsdp"] == 0
    over_groups = "expert" in axes and sizes.shape[1] % mesh.shape["expert"] == 0
    stages = stages_of(x.shape[-1])
    whole = tuple(a for a in axes if not (a == "fsdp" and over_inputs) and not (a == "expert" and over_groups))

    def local(*arrays: Array) -> Array:
        parts = (
            lax.platform_dependent(*(a[shard] for a in arrays), tpu=_outer_tpu, default=_outer)
            for shard in range(arrays[0].shape[0])
        )
        total = functools.reduce(jnp.add, parts)
        total = scattered(total, stages) if over_inputs else total
        total = lax.psum_scatter(total, "expert", scatter_dimension=0, tiled=True) if over_groups else total
        return lax.psum(total, whole) if whole else total

    rows = PartitionSpec(axes or None)
    return jax.shard_map(
        local,
        in_specs=(rows, PartitionSpec(axes or None, None, rest or None), rows),
        out_specs=PartitionSpec("expert" if over_groups else None, "fsdp" if over_inputs else None, rest or None),
        axis_names=set(free),
        check_vma=False,  # the kernel does not say along which axes its result varies
    )(*arrays)


def _outer(x: Float[Array, "rows i"], g: Float[Array, "rows o"], sizes: Int[Array, " groups"]) -> Array:
    return lax.ragged_dot_general(x, g, sizes, _OUTER)


def _outer_tpu(x: Float[Array, "rows i"], g: Float[Array, "rows o"], sizes: Int[Array, " groups"]) -> Array:
    # The grouped kernel that ships with JAX: XLA's ragged product would be a dense one, of all rows with all groups.
    short = -x.shape[0] % 128
    x, g = (jnp.pad(a, ((0, short), (0, 0))) if short else a for a in (x, g))
    tile = next(size for size in (512, 256, 128) if x.shape[0] % size == 0)
    wide = (min(512, -(-a.shape[1] // 128) * 128) for a in (x, g))
    return tgmm(x.T, g, sizes, preferred_element_type=x.dtype, tiling=(tile, *wide))


def group_of_row(sizes: Int[Array, "shards groups"], rows: int) -> Int[Array, "shards rows"]:
    """The group of each of `rows` rows; for those beyond the sum of `sizes`, the number of groups."""
    find = functools.partial(jnp.searchsorted, v=jnp.arange(rows), side="right")
    return jax.vmap(find)(jnp.cumsum(sizes, axis=-1)).astype(jnp.int32)


def _each_shard(fn: Callable[..., Array], axes: Axes, w: Array, *arrays: Array) -> Array:
    """`fn(w, *arrays of one shard)` of every shard. On a mesh each device runs its own shard, which the compiler does
    not find out by itself."""

    def local(w: Array, *arrays: Array) -> Array:
        return jnp.stack([fn(w, *(a[shard] for a in arrays)) for shard in range(arrays[0].shape[0])])

    if not axes:
        return local(w, *arrays)
    divided, whole = PartitionSpec(axes), PartitionSpec()
    specs = (whole, *(divided for _ in arrays))
    return jax.shard_map(local, in_specs=specs, out_specs=divided, axis_names=set(axes))(w, *arrays)
