"""`Packed`: rows of different fill, end to end instead of padded to the longest."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxft.weights.core import Node, at_layer_rule, materialize_rule, node, pad_spec, specs_rule, static


@node
class Packed(Node):
    """`[*layers, k, ...]` of which a layer is the window of `k` that begins at `start[layer]` of one array.

    The trained part of a `SparseDelta`, `BlockSplit` or `RowSplit` whose layers have very different counts. Windows
    overlap; in each, what belongs to another layer has padding for its index, so that it means nothing there. Under a
    scan the array stays whole, and the gradient of each layer is added at its window. Layers lie end to end along
    `axis` of the array, which is the axis of a window too.
    """

    values: Float[Array, "..."]
    start: Int[Array, "*layers"]
    k: int = static(default=1)
    axis: int = static(default=0)

    @property
    def num_layers(self) -> int:
        return self.start.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        window = list(self.values.shape)
        window[self.axis] = self.k
        return (*self.start.shape, *window)


def pack(counts: Int[np.ndarray, " layers"], k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How rows of `k` are packed of which the first `counts` mean something, the rest is padding.

    Returns:
        how far what a row holds lies behind the start of its window (roll it by that) `[layers]`, where the windows
        start `[layers]`, and the flat positions, in the rows, of what the packed array holds `[total]`.
    """
    before = np.cumsum(counts) - counts
    start = np.minimum(before, max(int(counts.sum()) - k, 0))
    held = np.flatnonzero(np.arange(k) < counts[:, None])
    return (before - start).astype(np.int32), start.astype(np.int32), held


def repack(w: Packed, windows: Float[Array, "..."], own: Bool[Array, "*layers k"]) -> Packed:
    """`w` with other values: those of `windows` that belong to their layer (`own`), zero where no layer says so."""
    axis = w.axis - w.values.ndim if w.axis >= 0 else w.axis
    first = jnp.moveaxis(windows, axis, own.ndim - 1)
    place = jnp.where(own, w.start[..., None] + jnp.arange(w.k, dtype=jnp.int32), w.values.shape[axis])
    rest = first.shape[own.ndim :]
    empty = jnp.zeros((w.values.shape[axis], *rest), windows.dtype)
    flat = empty.at[place.reshape(-1)].set(first.reshape(-1, *rest), mode="drop")
    return w.replace(values=jnp.moveaxis(flat, 0, axis))


@at_layer_rule.register
def _(w: Packed, index: Array) -> Packed:
    return w.replace(start=jnp.asarray(w.start)[index])


@materialize_rule.register
def _(w: Packed) -> Array:
    if w.start.ndim:
        return jax.vmap(lambda start: materialize_rule(w.replace(start=start)))(w.start)
    return lax.dynamic_slice_in_dim(w.values, w.start, w.k, w.axis)


@specs_rule.register
def _(w: Packed, spec: PartitionSpec) -> Packed:
    """Of windows laid out as `spec` says."""
    entries = pad_spec(spec, len(w.shape))
    return w.replace(values=PartitionSpec(*entries[w.start.ndim :]), start=PartitionSpec())
