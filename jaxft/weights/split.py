"""`Split`: a stack of layers of which some train and the others do not; which ones is data, not structure."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxft.weights.core import (
    Node,
    Tree,
    Weight,
    at_layer_rule,
    linear_rule,
    materialize,
    materialize_rule,
    node,
    specs,
    specs_rule,
    static,
)
from jaxft.weights.gated import Gated, gated_matmul, gated_ragged_matmul
from jaxft.weights.memory import fetch
from jaxft.weights.ragged import Axes, ragged_linear_rule


@node
class Split(Node):
    """`L` layers of one weight, `k` of which train.

    `materialize(w)[l] == trainable[slot[l]] if is_trainable[l] else frozen[slot[l]]`.
    Gradients flow to `trainable` only. Re-drawing which layers train rewrites arrays and compiles nothing.
    Inside a scan over layers `is_trainable` and `slot` are the scalars of the current layer; the stacks stay whole.

    `trainable` and `frozen` may differ in dtype (fp32 masters beside bf16 frozen weights), and `frozen` may be a node.
    `first`: below this layer nothing trains, in no weight of the stack and nothing that feeds it, however often layers
    are drawn again. `scan_layers` runs those below without a backward pass.
    """

    trainable: Float[Array, "k ..."]
    frozen: Weight
    is_trainable: Bool[Array, "*layers"]
    slot: Int[Array, "*layers"]
    first: int = static(default=0)

    @property
    def num_layers(self) -> int:
        return self.is_trainable.shape[0]


def split_layers(stack: Weight, is_trainable: Bool[Array, " layers"], k: int) -> Split:
    """Cut a stack `[L, ...]` by a mask with exactly `k` true entries. `k` is static, the mask may be traced."""
    order, slot = _order_and_slot(is_trainable, k)
    trainable, frozen = _cut(stack, order, k)
    return Split(trainable, frozen, is_trainable.astype(bool), slot)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _order_and_slot(is_trainable: Bool[Array, " layers"], k: int) -> tuple[Int[Array, " layers"], ...]:
    order = jnp.argsort(~is_trainable, stable=True)  # the layers that train first, each group in layer order
    slot = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    return order, jnp.where(is_trainable, slot, slot - k).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _cut(stack: Weight, order: Int[Array, " layers"], k: int) -> tuple[Weight, Weight]:
    first, rest = (
        jax.tree.map(lambda a, layers=layers: jnp.take(a, layers, axis=0), stack) for layers in (order[:k], order[k:])
    )
    return first, rest


def resplit(w: Split, is_trainable: Bool[Array, " layers"]) -> Split:
    """The same weights with another set of `k` layers training; values move between the stacks, dtypes stay."""
    k = w.trainable.shape[0]
    if not isinstance(w.frozen, Node):
        moved = split_layers(materialize_rule(w), is_trainable, k)
        return moved.replace(
            trainable=moved.trainable.astype(w.trainable.dtype),
            frozen=moved.frozen.astype(w.frozen.dtype),
            first=w.first,
        )
    raise TypeError(
        f"cannot move trained layers into a frozen stack of {type(w.frozen).__name__}: re-selection needs a dense base"
    )


def _is_split(w: Any) -> bool:
    return isinstance(w, Split)


def trained_from(tree: Tree, first: int) -> Tree:
    """`tree` whose splits say that nothing trains below layer `first`."""
    return jax.tree.map(lambda w: w.replace(first=first) if _is_split(w) else w, tree, is_leaf=_is_split)


def let_through(tree: Tree) -> Tree:
    """`tree` whose layers all pass gradients on to their inputs again: for when something trains below after all."""

    def one(w: Any) -> Any:
        if isinstance(w, Gated) and w.propagates is not None:
            return w.replace(propagates=jnp.ones_like(w.propagates))
        return w

    return trained_from(jax.tree.map(one, tree, is_leaf=lambda w: isinstance(w, Gated)), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _read(trainable: Array, frozen: Weight, is_trainable: Array, slot: Array, dtype: jnp.dtype) -> Array:
    def at(stack: Weight) -> Weight:
        return fetch(jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, slot, keepdims=False), stack))

    return lax.cond(
        is_trainable, lambda: at(trainable).astype(dtype), lambda: materialize_rule(at(frozen)).astype(dtype)
    )


def _read_forward(
    trainable: Array, frozen: Weight, is_trainable: Array, slot: Array, dtype: jnp.dtype
) -> tuple[Array, tuple[Array, ...]]:
    return _read(trainable, frozen, is_trainable, slot, dtype), (trainable, is_trainable, slot)


def _read_backward(dtype: jnp.dtype, residuals: tuple[Array, ...], g: Array) -> tuple[Array | None, ...]:
    # Written as an update of a stack of zeros: under scan XLA turns the sum of these into one in-place slice update.
    trainable, is_trainable, slot = residuals
    g = jnp.where(is_trainable, g, jnp.zeros_like(g)).astype(trainable.dtype)
    return lax.dynamic_update_index_in_dim(jnp.zeros_like(trainable), g, slot, 0), None, None, None


_read.defvjp(_read_forward, _read_backward)


@at_layer_rule.register
def _(w: Split, index: Array) -> Split:
    return w.replace(is_trainable=jnp.asarray(w.is_trainable)[index], slot=jnp.asarray(w.slot)[index])


@materialize_rule.register
def _(w: Split) -> Array:
    if w.is_trainable.ndim == 0:
        return _read(w.trainable, w.frozen, w.is_trainable, w.slot, _dtype(w))
    mask = w.is_trainable.reshape(w.is_trainable.shape + (1,) * (w.trainable.ndim - 1))
    frozen = lax.stop_gradient(materialize(w.frozen))
    k, rest = w.trainable.shape[0], frozen.shape[0]
    trained = jnp.take(w.trainable, jnp.minimum(w.slot, k - 1), axis=0)
    kept = jnp.take(frozen, jnp.minimum(w.slot, rest - 1), axis=0)
    return jnp.where(mask, trained, kept)


def _dtype(w: Split) -> jnp.dtype:
    frozen = jax.eval_shape(materialize_rule, w.frozen) if isinstance(w.frozen, Node) else w.frozen
    return jnp.promote_types(w.trainable.dtype, frozen.dtype)


@linear_rule.register
def _(w: Split, x: Array) -> Array:
    # Recomputed backward: what is kept is the stacks, which exist anyway, and not the matrix read of every layer, which
    # without remat would be a second copy of all weights. The matmul itself is not repeated.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def product(x: Array, w: Split) -> Array:
        weight = _read(w.trainable, w.frozen, w.is_trainable, w.slot, x.dtype)
        return gated_matmul(x, weight, w.is_trainable)

    return product(x, w)


@ragged_linear_rule.register
def _(w: Split, x: Array, sizes: Array, axes: Axes) -> Array:
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def product(x: Array, w: Split) -> Array:
        weight = _read(w.trainable, w.frozen, w.is_trainable, w.slot, x.dtype)
        return gated_ragged_matmul(x, weight, sizes, w.is_trainable, None, axes)

    return product(x, w)


@specs_rule.register
def _(w: Split, spec: PartitionSpec) -> Split:
    return Split(spec, specs(w.frozen, spec), PartitionSpec(), PartitionSpec(), w.first)
