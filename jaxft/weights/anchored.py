"""Nodes that carry something beside the weight: where it started (`Anchored`), or what flowed into it (`Observed`)."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxft.weights.core import (
    Node,
    Weight,
    embed,
    embed_rule,
    linear,
    linear_rule,
    materialize,
    materialize_rule,
    node,
    pad_spec,
    specs,
    specs_rule,
    unembed,
    unembed_rule,
)
from jaxft.weights.ragged import Axes, group_of_row, ragged_linear, ragged_linear_rule


@node
class Anchored(Node):
    """A weight that remembers the value it started from: `materialize(w) == value`; `anchor` never changes.

    For what is measured against the start: resetting to it, pulling toward it, ranking by distance from it.
    """

    keep_dtype = True  # an anchor in a narrower dtype would not be where the weight started

    value: Float[Array, "..."]
    anchor: Float[Array, "..."]


@node
class Observed(Node):
    """A weight that counts what flows into it: the gradient of `energy [..., d_in]` is the sum of `x**2` over tokens.

    `energy` is added nowhere, so outputs do not change; its gradient is a statistic, not a derivative. Every token
    that passes counts, padding too.
    """

    base: Weight
    energy: Float[Array, "*layers d_in"]


@materialize_rule.register
def _(w: Anchored) -> Array:
    return w.value


@linear_rule.register
def _(w: Anchored, x: Array) -> Array:
    return linear(x, w.value)


@ragged_linear_rule.register
def _(w: Anchored, x: Array, sizes: Array, axes: Axes) -> Array:
    return ragged_linear(x, w.value, sizes, axes)


@embed_rule.register
def _(w: Anchored, tokens: Array) -> Array:
    return embed(tokens, w.value)


@unembed_rule.register
def _(w: Anchored, x: Array) -> Array:
    return unembed(x, w.value)


@specs_rule.register
def _(w: Anchored, spec: PartitionSpec) -> Anchored:
    return Anchored(spec, spec)


@jax.custom_vjp
def _observe(x: Array, energy: Array) -> Array:
    return x


def _observe_forward(x: Array, energy: Array) -> tuple[Array, Array]:
    return x, jnp.sum(jnp.square(x.astype(energy.dtype)), axis=tuple(range(x.ndim - 1)))


def _observe_backward(squares: Array, g: Array) -> tuple[Array, Array]:
    return g, squares


_observe.defvjp(_observe_forward, _observe_backward)


@materialize_rule.register
def _(w: Observed) -> Array:
    return materialize(w.base)


@linear_rule.register
def _(w: Observed, x: Array) -> Array:
    return linear(_observe(x, w.energy), w.base)


@jax.custom_vjp
def _observe_groups(x: Array, energy: Array, sizes: Array) -> Array:
    return x


def _observe_groups_forward(x: Array, energy: Array, sizes: Array) -> tuple[Array, Array]:
    squares = jnp.square(x.astype(energy.dtype))
    return x, jnp.zeros_like(energy).at[group_of_row(sizes, x.shape[1])].add(squares, mode="drop")


def _observe_groups_backward(squares: Array, g: Array) -> tuple[Array | None, ...]:
    return g, squares, None


_observe_groups.defvjp(_observe_groups_forward, _observe_groups_backward)


@ragged_linear_rule.register
def _(w: Observed, x: Array, sizes: Array, axes: Axes) -> Array:
    return ragged_linear(_observe_groups(x, w.energy, sizes), w.base, sizes, axes)


@specs_rule.register
def _(w: Observed, spec: PartitionSpec) -> Observed:
    *layers, d_in, _ = pad_spec(spec, w.energy.ndim + 1)
    return Observed(specs(w.base, spec), PartitionSpec(*layers, d_in))
