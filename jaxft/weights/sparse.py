"""`SparseDelta` and `BlockSplit`: single entries, or blocks of entries, of a matrix train."""

import functools
import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.weights.core import (
    Node,
    Weight,
    axis_names,
    linear_rule,
    materialize,
    materialize_rule,
    node,
    pad_spec,
    specs,
    specs_rule,
)
from jaxft.weights.packed import Packed
from jaxft.weights.ragged import Axes, ragged_input_gradient, ragged_linear_rule, ragged_matmul, ragged_outer
from jaxft.weights.reduction import Stages, as_rows, divided_gradient, division, gathered


@node
class SparseDelta(Node):
    """`base` plus `values` at flat positions `indices`, row-major within the axes that follow those of `indices`: two
    of a matrix, one of a vector, three of the matrices of all experts of a layer.

    Positions are unique. An index equal to the number of entries is padding: it means nothing and its value stays
    zero, so that layers with different counts stack.
    """

    base: Weight
    values: Float[Array, "*layers k"] | Packed
    indices: Int[Array, "*layers k"]


def _coordinates(indices: Array, shape: tuple[int, ...]) -> tuple[Array, ...]:
    """Flat positions as one index for each axis; padding lies beyond the first. A matrix that is divided over a mesh is
    indexed as it lies, where flattening it would gather it."""
    found = []
    for size in reversed(shape[1:]):
        indices, rest = indices // size, indices % size
        found.append(rest)
    return (indices, *reversed(found))


def _scatter_add(base: Array, values: Array, indices: Array) -> Array:
    if indices.ndim > 1:
        return jax.vmap(_scatter_add)(base, values, indices)
    return _add_at_once(base, values, indices)


@functools.partial(jax.jit, inline=True)
def gather_flat(matrix: Array, indices: Array) -> Array:
    """Entries of `matrix` at flat positions; zero where the position is padding, or lies before the first."""
    place = matrix.at[_coordinates(indices, matrix.shape)]
    return place.get(mode="fill", fill_value=0, wrap_negative_indices=False)


# The TPU compiler (libtpu 0.0.42) has the positions of a scatter into bfloat16 sorted, in every step, and takes 20 s to
# compile one into a matrix of an 8B model. Piece by piece into a flat float32 array, in the memory next to the matrix
# units, nothing is sorted, and it takes 2 s. A gather of as many takes 5 s, in pieces 1. On a GPU pieces would wait for
# each other.
PIECE = 4096


def _in_pieces(array: Array, padding: float) -> Array:
    """A vector `[k]` as `[pieces, PIECE]`, filled up at the end."""
    size = min(PIECE, max(array.size, 1))
    return jnp.pad(array, (0, -array.size % size), constant_values=padding).reshape(-1, size)


def _add_in_pieces(matrix: Array, values: Array, indices: Array) -> Array:
    flat = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32)).reshape(-1)
    pieces = _in_pieces(values.astype(flat.dtype), 0), _in_pieces(indices, matrix.size)

    def add(flat: Array, piece: tuple[Array, Array]) -> tuple[Array, None]:
        values, indices = piece
        return flat.at[indices].add(values, mode="drop", wrap_negative_indices=False), None

    return lax.scan(add, flat, pieces)[0].reshape(matrix.shape).astype(matrix.dtype)


def _add_at_once(matrix: Array, values: Array, indices: Array) -> Array:
    place = jnp.asarray(matrix).at[_coordinates(indices, matrix.shape)]
    return place.add(values.astype(matrix.dtype), mode="drop", wrap_negative_indices=False)


def _get_in_pieces(matrix: Array, indices: Array) -> Array:
    flat = matrix.reshape(-1)

    def get(indices: Array) -> Array:
        return flat.at[indices].get(mode="fill", fill_value=0, wrap_negative_indices=False)

    return lax.map(get, _in_pieces(indices, matrix.size)).reshape(-1)[: indices.size]


def add_entries(
    matrix: Float[Array, "..."], values: Float[Array, " k"], indices: Int[Array, " k"]
) -> Float[Array, "..."]:
    """A matrix that lies on one device plus `values` at flat positions; those outside of it mean nothing."""
    return lax.platform_dependent(matrix, values, indices, tpu=_add_in_pieces, default=_add_at_once)


def get_entries(matrix: Float[Array, "..."], indices: Int[Array, " k"]) -> Float[Array, " k"]:
    """The entries at flat positions of a matrix that lies on one device; zero outside of it."""
    return lax.platform_dependent(matrix, indices, tpu=_get_in_pieces, default=gather_flat)


Division: TypeAlias = tuple[str | None, ...]
"""The mesh axis, of each axis of a matrix (or of the matrices of experts), over which it is divided."""


def _division(stages: Stages | None) -> Division | None:
    """Of a matrix, see `reduction.division`; None on one device, and where it lies in some other way."""
    return None if stages is None else ("fsdp", None)


def _division_of_experts(shape: tuple[int, ...]) -> Division | None:
    """Of matrices `[experts, d_in, d_out]`; None on one device, and where `tensor` divides them, too."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types) or mesh.shape.get("tensor", 1) > 1:
        return None
    sizes = [(axis, mesh.shape.get(axis, 1)) for axis in ("expert", "fsdp")]
    found = [axis if size > 1 and n % size == 0 else None for (axis, size), n in zip(sizes, shape, strict=False)]
    return (*found, None) if any(found) else None


def _own_places(part: Array, indices: Array, division: Division) -> Array:
    """Flat positions in a matrix as positions in the part of it that a chip holds; what others hold lies outside."""
    whole = tuple(n if axis is None else n * lax.axis_size(axis) for n, axis in zip(part.shape, division, strict=True))
    place, is_own = jnp.zeros_like(indices), jnp.ones_like(indices, bool)
    for coordinate, n, axis in zip(_coordinates(indices, whole), part.shape, division, strict=True):
        own = coordinate if axis is None else coordinate - lax.axis_index(axis) * n
        place, is_own = place * n + own, is_own & (own >= 0) & (own < n)
    return jnp.where(is_own, place, part.size)


def _everywhere(vector: Array) -> Array:
    """To every chip all of it: one that has some positions only would need the whole matrix."""
    return lax.with_sharding_constraint(vector, PartitionSpec())


def _tuned_matrix(base: Array, values: Array, indices: Array, division: Division | None) -> Array:
    """`base` plus `values` at `indices`: each chip adds to its own part."""
    if division is None:
        if jax.sharding.get_abstract_mesh().size > 1:  # left to the partitioner
            return _scatter_add(base, _everywhere(values), _everywhere(indices))
        return add_entries(base, values, indices)
    parts, whole = PartitionSpec(*division), PartitionSpec()
    divided = jax.shard_map(
        lambda part, values, indices: add_entries(part, values, _own_places(part, indices, division)),
        in_specs=(parts, whole, whole),
        out_specs=parts,
        check_vma=False,
    )
    return divided(base, values.astype(base.dtype), indices)


def _entries_of(gradient: Array, indices: Array, division: Division | None) -> Array:
    """Entries of the gradient of a weight: each chip reads those of its own part."""
    if division is None:
        if jax.sharding.get_abstract_mesh().size > 1:
            return _everywhere(gather_flat(gradient, _everywhere(indices)))
        return get_entries(gradient, indices)
    axes = tuple(axis for axis in division if axis is not None)
    is_divided = indices.size % math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes) == 0

    def local(part: Array, indices: Array) -> Array:
        found = get_entries(part, _own_places(part, indices, division))
        if not is_divided:
            return lax.psum(found, axes)
        for axis in axes:  # over both at once libtpu would sum by all-reduce
            found = lax.psum_scatter(found, axis, tiled=True)
        return found

    divided = jax.shard_map(
        local,
        in_specs=(PartitionSpec(*division), PartitionSpec()),
        out_specs=PartitionSpec(axes if is_divided else None),
        check_vma=False,
    )
    return divided(gradient, indices)


@materialize_rule.register
def _(w: SparseDelta) -> Array:
    return _scatter_add(jax.lax.stop_gradient(materialize(w.base)), materialize(w.values), w.indices)


def are_few(count: int, shape: tuple[int, ...]) -> bool:
    """Whether the gradient of so many entries of a matrix takes half of the products of that of all, or less, from the
    columns of input and gradient that belong to each."""
    d_in, d_out = shape
    return 2 * count * (d_in + d_out) <= d_in * d_out


def _entries_by_columns(
    x: Float[Array, "... d_in"], g: Float[Array, "... d_out"], indices: Int[Array, " k"], shape: tuple[int, ...]
) -> Float[Array, " k"]:
    """Entries of `x^T g`, each the product of two columns. Products with zeros and ones pick these, as they divide over
    a mesh like any other."""
    indices = indices if jax.sharding.get_abstract_mesh().size <= 1 else _everywhere(indices)
    places = _coordinates(indices, shape)  # padding lies beyond the rows, so that its column is zero
    left, right = (
        jnp.matmul(a, jax.nn.one_hot(place, size, dtype=a.dtype, axis=0)).astype(jnp.float32)
        for a, place, size in zip((as_rows(x), as_rows(g)), places, shape, strict=True)
    )
    return jnp.sum(left * right, axis=tuple(range(left.ndim - 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sparse_matmul(x: Array, base: Array, values: Array, indices: Array, stages: Stages | None) -> Array:
    return jnp.matmul(x, gathered(_tuned_matrix(base, values, indices, _division(stages)), stages or ()))


def _sparse_forward(
    x: Array, base: Array, values: Array, indices: Array, stages: Stages | None
) -> tuple[Array, tuple[Array, ...]]:
    return _sparse_matmul(x, base, values, indices, stages), (x, base, values, indices)


def _sparse_backward(stages: Stages | None, residuals: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    x, base, values, indices = residuals
    tuned = _tuned_matrix(base, values, indices, _division(stages))
    dx = jnp.matmul(g, gathered(tuned, stages or ()).T)
    if are_few(indices.size, base.shape):
        entries = _entries_by_columns(x, g, indices, base.shape)
    else:  # one layer's dense product is transient (it dies within the layer): only its `k` entries leave it
        entries = _entries_of(divided_gradient(x, g, stages), indices, _division(stages))
    return dx, None, entries.astype(values.dtype), None


_sparse_matmul.defvjp(_sparse_forward, _sparse_backward)


@linear_rule.register
def _(w: SparseDelta, x: Array) -> Array:
    base = materialize(w.base).astype(x.dtype)
    return _sparse_matmul(x, base, materialize(w.values), w.indices, division(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ragged_sparse_matmul(x: Array, base: Array, values: Array, indices: Array, sizes: Array, axes: Axes) -> Array:
    return ragged_matmul(x, _tuned_matrix(base, values, indices, _division_of_experts(base.shape)), sizes, axes)


def _ragged_sparse_forward(
    x: Array, base: Array, values: Array, indices: Array, sizes: Array, axes: Axes
) -> tuple[Array, tuple[Array, ...]]:
    return _ragged_sparse_matmul(x, base, values, indices, sizes, axes), (x, base, values, indices, sizes)


def _ragged_sparse_backward(axes: Axes, residuals: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    x, base, values, indices, sizes = residuals
    division = _division_of_experts(base.shape)
    dx = ragged_input_gradient(g, _tuned_matrix(base, values, indices, division), sizes, axes)
    entries = _entries_of(ragged_outer(x, g, sizes, axes), indices, division)
    return dx, None, entries.astype(values.dtype), None, None


_ragged_sparse_matmul.defvjp(_ragged_sparse_forward, _ragged_sparse_backward)


@ragged_linear_rule.register
def _(w: SparseDelta, x: Array, sizes: Array, axes: Axes) -> Array:
    base, values, indices = materialize(w.base).astype(x.dtype), materialize(w.values), w.indices
    if indices.ndim > 1:  # of each matrix by itself
        size = math.prod(base.shape[1:])
        indices = jnp.where(indices < size, indices + size * jnp.arange(len(base))[:, None], base.size)
    return _ragged_sparse_matmul(x, base, values.reshape(-1), indices.reshape(-1), sizes, axes)


@specs_rule.register
def _(w: SparseDelta, spec: PartitionSpec) -> SparseDelta:
    layers = w.indices.ndim - 1
    flat = PartitionSpec(*(None,) * layers, axis_names(*tuple(spec)[layers:]) or None)
    return SparseDelta(specs(w.base, spec), specs(w.values, flat), flat)


@node
class BlockSplit(Node):
    """A matrix `[..., d_in, d_out]` cut into blocks `[p, q]`, of which those at `index` are replaced by `blocks`.

    `index` is the flat block number (row-major over `d_in/p` by `d_out/q` blocks); one equal to the number of blocks
    is padding.
    """

    base: Weight
    blocks: Float[Array, "*layers m p q"] | Packed
    index: Int[Array, "*layers m"]


def _to_blocks(matrix: Array, p: int, q: int) -> Array:
    d_in, d_out = matrix.shape
    return matrix.reshape(d_in // p, p, d_out // q, q).swapaxes(1, 2).reshape(-1, p, q)


@functools.partial(jax.jit, static_argnums=(2, 3), inline=True)
def gather_blocks(matrix: Array, index: Array, p: int, q: int) -> Array:
    """Blocks `[..., m, p, q]` of matrices `[..., d_in, d_out]` by flat block number; zeros for padding."""
    if index.ndim > 1:
        return jax.vmap(lambda m, i: gather_blocks(m, i, p, q))(matrix, index)
    return jnp.take(_to_blocks(matrix, p, q), index, axis=0, mode="fill", fill_value=0)


def _replace_blocks(base: Array, blocks: Array, index: Array) -> Array:
    if base.ndim > 2:
        return jax.vmap(_replace_blocks)(base, blocks, index)
    p, q = blocks.shape[-2:]
    d_in, d_out = base.shape
    cut = _to_blocks(jnp.asarray(base), p, q).at[index].set(blocks.astype(base.dtype), mode="drop")
    return cut.reshape(d_in // p, d_out // q, p, q).swapaxes(1, 2).reshape(d_in, d_out)


@materialize_rule.register
def _(w: BlockSplit) -> Array:
    return _replace_blocks(jax.lax.stop_gradient(materialize(w.base)), materialize(w.blocks), w.index)


@jax.custom_vjp
def _block_matmul(x: Array, base: Array, blocks: Array, index: Array) -> Array:
    return jnp.matmul(x, _replace_blocks(base, blocks, index))


def _block_forward(x: Array, base: Array, blocks: Array, index: Array) -> tuple[Array, tuple[Array, ...]]:
    return _block_matmul(x, base, blocks, index), (x, base, blocks, index)


def _block_backward(residuals: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    # Only the selected blocks of the weight gradient are computed: a batch of [p, tokens] @ [tokens, q] products.
    x, base, blocks, index = residuals
    p, q = blocks.shape[-2:]
    columns = base.shape[1] // q
    dx = jnp.matmul(g, _replace_blocks(base, blocks, index).T)
    x, g = (rows.reshape(*rows.shape[:-1], -1, side) for rows, side in ((as_rows(x), p), (as_rows(g), q)))
    xs = jnp.take(x, index // columns, axis=-2, mode="fill", fill_value=0)
    gs = jnp.take(g, index % columns, axis=-2)
    return dx, None, jnp.einsum("...mp,...mq->mpq", xs, gs).astype(blocks.dtype), None


_block_matmul.defvjp(_block_forward, _block_backward)


@linear_rule.register
def _(w: BlockSplit, x: Array) -> Array:
    return _block_matmul(x, materialize(w.base).astype(x.dtype), materialize(w.blocks), w.index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ragged_block_matmul(x: Array, base: Array, blocks: Array, index: Array, sizes: Array, axes: Axes) -> Array:
    return ragged_matmul(x, _replace_blocks(base, blocks, index), sizes, axes)


def _ragged_block_forward(
    x: Array, base: Array, blocks: Array, index: Array, sizes: Array, axes: Axes
) -> tuple[Array, tuple[Array, ...]]:
    return _ragged_block_matmul(x, base, blocks, index, sizes, axes), (x, base, blocks, index, sizes)


def _ragged_block_backward(axes: Axes, residuals: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    x, base, blocks, index, sizes = residuals
    p, q = blocks.shape[-2:]
    dx = ragged_input_gradient(g, _replace_blocks(base, blocks, index), sizes, axes)
    dense = ragged_outer(x, g, sizes, axes)
    return dx, None, gather_blocks(dense, index, p, q).astype(blocks.dtype), None, None


_ragged_block_matmul.defvjp(_ragged_block_forward, _ragged_block_backward)


@ragged_linear_rule.register
def _(w: BlockSplit, x: Array, sizes: Array, axes: Axes) -> Array:
    return _ragged_block_matmul(x, materialize(w.base).astype(x.dtype), materialize(w.blocks), w.index, sizes, axes)


@specs_rule.register
def _(w: BlockSplit, spec: PartitionSpec) -> BlockSplit:
    layers = w.index.ndim - 1
    entries = pad_spec(spec, layers + 2)
    # Any number of blocks may train: the mesh divides each of them.
    blocks = PartitionSpec(*entries[:layers], None, *entries[layers:])
    return BlockSplit(specs(w.base, spec), specs(w.blocks, blocks), PartitionSpec())
