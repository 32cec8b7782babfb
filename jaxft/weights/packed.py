"""`Packed`: rows of different fill, end to end instead of padded to the longest."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxft.weights.core import Node, at_layer_rule, materialize_rule, node, static


@node
class Packed(Node):
    """`[L, k, ...]` of which layer l is the window `values[start[l] : start[l] + k]` of one array.

    The trained part of a `SparseDelta` or `BlockSplit` whose layers have very different counts. Windows overlap; in
    each, what belongs to another layer has padding for its index, so that it means nothing there. Under a scan the
    array stays whole, and the gradient of each layer is added at its window.
    """

    values: Float[Array, "total ..."]
    start: Int[Array, "*layers"]
    k: int = static(default=1)

    @property
    def num_layers(self) -> int:
        return self.start.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.start.shape, self.k, *self.values.shape[1:])


def pack(index: Int[np.ndarray, "layers k"], n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How rows padded with indices of `n` or more are packed.

    Returns:
        the indices of the windows `[layers, k]`, their starts `[layers]`, and the flat positions, in `index`, of what
        the packed array holds `[total]`.
    """
    layers, k = index.shape
    valid = index < n
    counts = valid.sum(1)
    before = np.cumsum(counts) - counts
    start = np.minimum(before, max(int(counts.sum()) - k, 0))
    windows = np.full((layers, k), n, index.dtype)
    for layer in range(layers):
        offset = before[layer] - start[layer]
        windows[layer, offset : offset + counts[layer]] = index[layer, valid[layer]]
    return windows, start.astype(np.int32), np.flatnonzero(valid.reshape(-1))


@at_layer_rule.register
def _(w: Packed, index: Array) -> Packed:
    return w.replace(start=jnp.asarray(w.start)[index])


@materialize_rule.register
def _(w: Packed) -> Array:
    if w.start.ndim == 0:
        return lax.dynamic_slice_in_dim(w.values, w.start, w.k)
    return jax.vmap(lambda s: lax.dynamic_slice_in_dim(w.values, s, w.k))(w.start)
