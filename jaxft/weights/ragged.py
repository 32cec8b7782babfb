"""Products with one matrix a group of rows: what the experts of a mixture compute.

A weight of shape `[groups, d_in, d_out]` acts on rows `[shards, rows, d_in]` that are sorted by group:
`sizes [shards, groups]` says how many rows of each shard belong to each group, in order, and sums up to at most `rows`;
those beyond the sum are zero, and so is what becomes of them. A shard is what one device holds of the rows: nothing is
sorted, or gathered, across shards. `axes` names the axes of the ambient mesh over which shards, and perhaps groups,
lie.

The law of nodes reads here: row r of group e becomes `x[r] @ materialize(w)[e]`. A rule is registered beside the node.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.weights import ragged_gpu
from jaxft.weights.core import Node, Weight, materialize_rule
from jaxft.weights.reduction import gathered, scattered, stages_of


class Axes(NamedTuple):
    """The mesh axes that products with groups divide.

    shards: over which the shards of rows lie. groups: of those, the ones that divide the groups, too: a shard has rows
    of the groups of its device alone (of the others its sizes are zero), so that no matrix is gathered over them.
    """

    shards: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


UNDIVIDED = Axes()

_BLOCK = 64  # sums that one product of `sum_rows` makes, of which each row belongs to one: the rest is in vain
_WIDE = 2048  # columns of a product of `sum_rows`: with fewer, steps of the grid take longer than what they compute
_BY_OUTPUTS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([1], [2]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)
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
    x: Float[Array, "shards rows d_in"], w: Weight, sizes: Int[Array, "shards groups"], axes: Axes = UNDIVIDED
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
    return _product(x, gathered(w, stages_of(w.shape[1]), axes.groups), sizes, axes)


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
    return _product(g, gathered(w, stages_of(w.shape[1]), axes.groups), sizes, axes, is_transposed=True)


def _product(x: Array, w: Array, sizes: Array, axes: Axes, *, is_transposed: bool = False) -> Array:
    def of_xla(x: Array, w: Array, sizes: Array) -> Array:
        return lax.ragged_dot_general(x, w, sizes, _BY_OUTPUTS) if is_transposed else lax.ragged_dot(x, w, sizes)

    def product(w: Array, x: Array, sizes: Array) -> Array:
        on_gpu = functools.partial(ragged_gpu.product, is_transposed=is_transposed)
        y = lax.platform_dependent(x, w, sizes, cuda=on_gpu, default=of_xla)
        if not axes.groups:
            return y
        # Beyond the sum of sizes the kernels write nothing: what was there before need not even be a number.
        return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes), y, 0)

    return _each_shard(product, axes, w, x, _own(sizes, axes))


def _own(sizes: Int[Array, "shards groups"], axes: Axes) -> Int[Array, "shards own"]:
    """The sizes of the groups that the device of each shard holds: those of the others are zero."""
    size = jax.sharding.get_abstract_mesh().shape
    parts = math.prod(size[axis] for axis in axes.groups)
    return jnp.sum(sizes.reshape(sizes.shape[0], parts, -1), axis=1)


def ragged_outer(
    x: Float[Array, "shards rows i"], g: Float[Array, "shards rows o"], sizes: Int[Array, "shards groups"], axes: Axes
) -> Float[Array, "groups i o"]:
    """The gradient of a weight: for each group the sum of `x[r] g[r]^T` over its rows, in all shards together.

    Rows beyond the sum of `sizes` count nowhere. On a mesh every device computes the part of its shard, for its share
    of the columns along the axes that do not divide the shards, and the parts are summed where they will lie: groups
    divided over `expert`, inputs over `fsdp`. A device that has all rows of its groups keeps what it computes of them.
    """
    mesh, arrays = jax.sharding.get_abstract_mesh(), (x, g, _own(sizes, axes))
    if mesh.empty:
        return functools.reduce(jnp.add, (_outer(*(a[shard] for a in arrays)) for shard in range(x.shape[0])))
    free, rest = _other_axes(axes, g.shape[-1])
    over_inputs = "fsdp" in axes.shards and x.shape[-1] % mesh.shape["fsdp"] == 0
    over_groups = "expert" in axes.shards and sizes.shape[1] % mesh.shape["expert"] == 0
    stages = stages_of(x.shape[-1])
    divided = {"fsdp": over_inputs, "expert": over_groups}
    whole = tuple(axis for axis in axes.shards if not divided.get(axis))

    def local(*arrays: Array) -> Array:
        parts = (
            lax.platform_dependent(*(a[shard] for a in arrays), tpu=_outer_tpu, cuda=ragged_gpu.outer, default=_outer)
            for shard in range(arrays[0].shape[0])
        )
        total = functools.reduce(jnp.add, parts)
        total = scattered(total, stages) if over_inputs else total
        if over_groups and not axes.groups:
            total = lax.psum_scatter(total, "expert", scatter_dimension=0, tiled=True)
        return lax.psum(total, whole) if whole else total

    rows = PartitionSpec(axes.shards or None)
    return jax.shard_map(
        local,
        in_specs=(rows, PartitionSpec(axes.shards or None, None, rest or None), rows),
        out_specs=PartitionSpec("expert" if over_groups else None, "fsdp" if over_inputs else None, rest or None),
        axis_names=set(free),
        check_vma=False,  # the kernel does not say along which axes its result varies
    )(*arrays)


def _outer(x: Float[Array, "rows i"], g: Float[Array, "rows o"], sizes: Int[Array, " groups"]) -> Array:
    return lax.ragged_dot_general(x, g, sizes, _OUTER)


def _outer_tpu(
    x: Float[Array, "rows i"],
    g: Float[Array, "rows o"],
    sizes: Int[Array, " groups"],
    most: tuple[int, int, int] = (512, 512, 512),
) -> Array:
    """`_outer` in tiles of at most so many rows, inputs and outputs."""
    # The grouped kernel that ships with JAX: XLA's ragged product would be a dense one, of all rows with all groups.
    short = -x.shape[0] % 128
    x, g = (jnp.pad(a, ((0, short), (0, 0))) if short else a for a in (x, g))
    rows = next(size for size in (512, 256, 128) if x.shape[0] % size == 0 and size <= most[0])
    sides = (min(side, -(-a.shape[1] // 128) * 128) for side, a in zip(most[1:], (x, g), strict=True))
    return tgmm(x.T, g, sizes, preferred_element_type=x.dtype, tiling=(rows, *sides))


def sum_rows(
    rows: Float[Array, "shards rows dim"], index: Int[Array, "shards rows"], count: int, axes: Axes = UNDIVIDED
) -> Float[Array, "shards count dim"]:
    """Of each shard the sums of the rows with the same `index`, for indices up to `count`, which itself has no sum."""

    def local(rows: Array, index: Array) -> Array:
        tpu, other = (functools.partial(fn, count=count) for fn in (_sum_rows_tpu, _sum_rows))
        pairs = zip(rows, index, strict=True)
        return jnp.stack([lax.platform_dependent(*pair, tpu=tpu, default=other) for pair in pairs])

    if jax.sharding.get_abstract_mesh().empty:
        return local(rows, index)
    free, rest = _other_axes(axes, rows.shape[-1])
    divided = PartitionSpec(axes.shards or None, None, rest or None)
    return jax.shard_map(
        local,
        in_specs=(divided, PartitionSpec(axes.shards or None)),
        out_specs=divided,
        axis_names=set(free),
        check_vma=False,  # as in `ragged_outer`
    )(rows, index)


def _other_axes(axes: Axes, columns: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that the compiler divides, all of which a kernel must be told of, and those of them that divide so
    many columns of shards that lie over `axes`."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = tuple(axis for axis, kind in kinds if kind != AxisType.Manual)
    rest = tuple(axis for axis in free if axis not in axes.shards and mesh.shape[axis] > 1)
    return free, rest if columns % math.prod(mesh.shape[axis] for axis in rest) == 0 else ()


def _sum_rows(rows: Float[Array, "rows dim"], index: Int[Array, " rows"], count: int) -> Array:
    return jnp.zeros((count, rows.shape[1]), rows.dtype).at[index].add(rows, mode="drop")


def _sum_rows_tpu(rows: Float[Array, "rows dim"], index: Int[Array, " rows"], count: int) -> Array:
    # A scatter would add row after row. In the order of `index`, the rows of each block of sums are a group, and which
    # row goes to which sum of a block is a matrix of zeros and ones: a product that adds up in float32.
    index, order = lax.sort_key_val(index, jnp.arange(index.shape[0], dtype=jnp.int32))
    blocks = -(-count // _BLOCK)
    edges = jnp.searchsorted(index, _BLOCK * jnp.arange(blocks + 1), method="compare_all")
    place = (index[:, None] % _BLOCK == jnp.arange(_BLOCK)).astype(rows.dtype)
    return _outer_tpu(place, rows[order], jnp.diff(edges), (128, _BLOCK, _WIDE)).reshape(-1, rows.shape[1])[:count]


def group_of_row(sizes: Int[Array, "shards groups"], rows: int) -> Int[Array, "shards rows"]:
    """The group of each of `rows` rows; for those beyond the sum of `sizes`, the number of groups."""
    find = functools.partial(jnp.searchsorted, v=jnp.arange(rows), side="right")
    return jax.vmap(find)(jnp.cumsum(sizes, axis=-1)).astype(jnp.int32)


def _each_shard(fn: Callable[..., Array], axes: Axes, w: Array, *arrays: Array) -> Array:
    """`fn(w, *arrays of one shard)` of every shard. On a mesh each device runs its own shard, which the compiler does
    not find out by itself."""

    def local(w: Array, *arrays: Array) -> Array:
        return jnp.stack([fn(w, *(a[shard] for a in arrays)) for shard in range(arrays[0].shape[0])])

    if not axes.shards:
        return local(w, *arrays)
    divided = PartitionSpec(axes.shards)
    specs = (PartitionSpec(axes.groups or None), *(divided for _ in arrays))
    return jax.shard_map(local, in_specs=specs, out_specs=divided, axis_names=set(axes.shards), check_vma=False)(
        w, *arrays
    )
