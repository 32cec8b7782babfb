"""`Gated` and `Damped`: weights whose gradient is switched, or scaled, by data."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxft.weights.core import (
    Node,
    Weight,
    by_materializing_linear,
    differentiated,
    linear,
    linear_rule,
    materialize,
    materialize_rule,
    merged,
    node,
    pad_spec,
    specs,
    specs_rule,
    static,
)
from jaxft.weights.ragged import (
    Axes,
    by_materializing_ragged,
    ragged_input_gradient,
    ragged_linear_rule,
    ragged_matmul,
    ragged_outer,
)
from jaxft.weights.reduction import Stages, gathered, stages_for, weight_gradient


@node
class Gated(Node):
    """A weight that trains while its gate is open; while it is closed no gradient of it is computed.

    Which gates are open is data: any number of them may open and close in a run, and nothing recompiles. The price
    beside `Split`: masters and moments exist for all layers. `propagates` says in which layers anything that trains
    sits at or below this weight (None: in all of them): elsewhere the gradient of its input is of no use, and is not
    computed either (so the law of nodes holds for that gradient where `propagates` is true).

    A gate a layer (`stacked=True`), or one for the whole weight. An optimizer moves what has moments though its
    gradient is zero: put `hold_closed` around it.
    """

    value: Float[Array, "..."]
    is_open: Bool[Array, "*layers"]
    propagates: Bool[Array, "*layers"] | None = None
    stacked: bool = static(default=True)


@node
class Damped(Node):
    """A weight whose gradient is multiplied by `rate`, broadcast over it: 1 trains as usual, 0 does not train."""

    base: Weight
    rate: Float[Array, "..."]


def gated_matmul(
    x: Float[Array, "... i"],
    w: Float[Array, "i o"],
    is_trainable: Bool[Array, ""],
    propagates: Bool[Array, ""] | None = None,
) -> Float[Array, "... o"]:
    """`x @ w` whose weight gradient is computed only where `is_trainable`, and that of `x` only where `propagates`.

    Otherwise they are zero and cost nothing: the matmuls sit inside a `lax.cond`, so they are skipped at run time.
    """
    return _gated_matmul(x, w, is_trainable, propagates, stages_for(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gated_matmul(x: Array, w: Array, is_trainable: Array, propagates: Array | None, stages: Stages) -> Array:
    return jnp.matmul(x, gathered(w, stages))


def _gated_forward(
    x: Array, w: Array, is_trainable: Array, propagates: Array | None, stages: Stages
) -> tuple[Array, tuple[Array | None, ...]]:
    return jnp.matmul(x, gathered(w, stages)), (x, w, is_trainable, propagates)


def _gated_backward(
    stages: Stages, residuals: tuple[Array, Array, Array, Array | None], g: Array
) -> tuple[Array | None, ...]:
    x, w, is_trainable, propagates = residuals

    def input_gradient() -> Array:
        return jnp.matmul(g, gathered(w, stages).T)

    dx = input_gradient() if propagates is None else lax.cond(propagates, input_gradient, lambda: jnp.zeros_like(x))
    dw = lax.cond(is_trainable, lambda: weight_gradient(x, g, stages), lambda: jnp.zeros_like(w))
    return dx, dw, None, None


_gated_matmul.defvjp(_gated_forward, _gated_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def gated_ragged_matmul(
    x: Float[Array, "shards rows i"],
    w: Float[Array, "groups i o"],
    sizes: Int[Array, "shards groups"],
    is_trainable: Bool[Array, ""],
    propagates: Bool[Array, ""] | None,
    axes: Axes,
) -> Float[Array, "shards rows o"]:
    """`ragged_matmul` with the gates of `gated_matmul`, which hold for all groups together."""
    return ragged_matmul(x, w, sizes, axes)


def _gated_ragged_forward(
    x: Array, w: Array, sizes: Array, is_trainable: Array, propagates: Array | None, axes: Axes
) -> tuple[Array, tuple[Array | None, ...]]:
    return ragged_matmul(x, w, sizes, axes), (x, w, sizes, is_trainable, propagates)


def _gated_ragged_backward(axes: Axes, residuals: tuple, g: Array) -> tuple[Array | None, ...]:
    x, w, sizes, is_trainable, propagates = residuals

    def input_gradient() -> Array:
        return ragged_input_gradient(g, w, sizes, axes)

    dx = input_gradient() if propagates is None else lax.cond(propagates, input_gradient, lambda: jnp.zeros_like(x))
    dw = lax.cond(is_trainable, lambda: ragged_outer(x, g, sizes, axes), lambda: jnp.zeros_like(w))
    return dx, dw, None, None, None


gated_ragged_matmul.defvjp(_gated_ragged_forward, _gated_ragged_backward)


@materialize_rule.register
def _(w: Gated) -> Array:
    is_open = w.is_open.reshape(w.is_open.shape + (1,) * (w.value.ndim - w.is_open.ndim))
    return jnp.where(is_open, w.value, lax.stop_gradient(w.value))


@linear_rule.register
def _(w: Gated, x: Array) -> Array:
    return gated_matmul(x, w.value.astype(x.dtype), w.is_open, w.propagates)


@ragged_linear_rule.register
def _(w: Gated, x: Array, sizes: Array, axes: Axes) -> Array:
    return gated_ragged_matmul(x, w.value.astype(x.dtype), sizes, w.is_open, w.propagates, axes)


@specs_rule.register
def _(w: Gated, spec: PartitionSpec) -> Gated:
    return Gated(spec, PartitionSpec(), None if w.propagates is None else PartitionSpec(), w.stacked)


@materialize_rule.register
def _(w: Damped) -> Array:
    base = materialize(w.base)
    fixed = lax.stop_gradient(base)
    return fixed + w.rate.astype(base.dtype) * (base - fixed)  # the value bit for bit: the difference is zero


@jax.custom_vjp
def _damped_linear(x: Array, base: Weight, rate: Array) -> Array:
    return linear(x, base)


def _damped_forward(x: Any, base: Any, rate: Any) -> tuple[Array, tuple[Any, Array]]:
    trained, fixed = differentiated(base)  # what is fixed may be in host memory, where no gradient of it could be
    y, gradients = jax.vjp(lambda x, trained: linear(x, merged(trained, fixed)), x.value, trained)
    return y, (gradients, rate.value)


def _damped_backward(residuals: tuple[Any, Array], g: Array | SymbolicZero) -> tuple[Any, ...]:
    gradients, rate = residuals
    if isinstance(g, SymbolicZero):
        return None, None, None
    return gradients(g)[0], gradients(g * rate.astype(g.dtype))[1], None


_damped_linear.defvjp(_damped_forward, _damped_backward, symbolic_zeros=True)


@linear_rule.register
def _(w: Damped, x: Array) -> Array:
    if w.rate.ndim > 1 and w.rate.shape[-2] > 1:
        return by_materializing_linear(w, x)
    # A rate for each column of `x.T @ g` may as well multiply those of `g`: the base keeps its own way to train.
    return _damped_linear(x, w.base, w.rate[0] if w.rate.ndim > 1 else w.rate)


ragged_linear_rule.register(Damped, by_materializing_ragged)


@specs_rule.register
def _(w: Damped, spec: PartitionSpec) -> Damped:
    entries = pad_spec(spec, w.rate.ndim)
    rate = PartitionSpec(*(s if n > 1 else None for s, n in zip(entries, w.rate.shape, strict=True)))
    return Damped(specs(w.base, spec), rate)
