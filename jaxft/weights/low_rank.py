"""`LowRank`: a weight plus a product of two thin factors."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt32

from jaxft.weights.core import (
    Node,
    Weight,
    divided_too,
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
    static,
    unembed,
    unembed_rule,
)
from jaxft.weights.ragged import Axes, ragged_linear, ragged_linear_rule
from jaxft.weights.reduction import as_rows, weight_gradient
from jaxft.weights.training import in_training_rule


@node
class LowRank(Node):
    """`base + scale * a @ b`, with `a [..., d_in, rank]` and `b [..., rank, d_out]`; leading axes are batch axes.

    The factors may be stored in fp32 under a bf16 base: products are computed in the dtype of the activation. A factor
    may itself be a node (a `Split` where only some layers have an update).

    In a training step the input of `a` loses each of its entries with probability `dropout`, by the numbers of `noise`
    uint32[..., 2] (the data of a key for each matrix of the stack), which `in_training` puts there; the others are
    scaled up to keep the mean. Rows of an embedding are not dropped.
    """

    base: Weight
    a: Weight
    b: Weight
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    noise: UInt32[Array, "*stack 2"] | None = None


@materialize_rule.register
def _(w: LowRank) -> Array:
    base = materialize(w.base)
    # Added in the wider dtype and rounded once: a small update of a bf16 base is not rounded before it counts.
    return (base + w.scale * jnp.matmul(materialize(w.a), materialize(w.b))).astype(base.dtype)


@in_training_rule.register
def _(w: LowRank, rng: PRNGKeyArray) -> LowRank:
    if not w.dropout:
        return w
    stack = jax.eval_shape(materialize, w.a).shape[:-2]
    return w.replace(noise=jax.random.key_data(jax.random.split(rng, stack) if stack else rng))


def _dropped(x: Float[Array, "... dim"], w: LowRank) -> Float[Array, "... dim"]:
    """The input as the factors see it. The experts of a layer share one draw: each token is with one of them."""
    if w.noise is None:
        return x
    key = jax.random.wrap_key_data(w.noise[(0,) * (w.noise.ndim - 1)])
    kept = jax.random.bernoulli(key, 1 - w.dropout, x.shape)
    return jnp.where(kept, x / (1 - w.dropout), 0).astype(x.dtype)


@linear_rule.register
def _(w: LowRank, x: Array) -> Array:
    inner = _dropped(x, w)
    thin = linear(inner, w.a) if isinstance(w.a, Node) else _narrow(inner, w.a.astype(x.dtype))
    return linear(x, w.base) + w.scale * linear(thin, w.b)


@jax.custom_vjp
def _narrow(x: Float[Array, "... d_in"], a: Float[Array, "d_in rank"]) -> Float[Array, "... rank"]:
    """`x @ a`, with the gradient of `a` computed as `[rank, d_in]` and then turned.

    XLA would swap the product to get `[d_in, rank]` at once, and on a CPU rows of 16 numbers take five times as long.
    """
    return jnp.matmul(as_rows(x), a).reshape(*x.shape[:-1], a.shape[-1])


def _narrow_forward(x: Array, a: Array) -> tuple[Array, tuple[Array, Array]]:
    return _narrow(x, a), (x, a)


def _narrow_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, a = residuals
    return jnp.matmul(as_rows(g), a.T).reshape(x.shape), jax.lax.optimization_barrier(weight_gradient(g, x)).T


_narrow.defvjp(_narrow_forward, _narrow_backward)


@embed_rule.register
def _(w: LowRank, tokens: Int[Array, "..."]) -> Array:
    rows = embed(tokens, w.base)
    return rows + (w.scale * linear(embed(tokens, w.a), w.b)).astype(rows.dtype)


@unembed_rule.register
def _(w: LowRank, x: Array) -> Array:
    return unembed(x, w.base) + w.scale * unembed(unembed(_dropped(x, w), w.b), w.a)


@specs_rule.register
def _(w: LowRank, spec: PartitionSpec) -> LowRank:
    *layers, d_in, d_out = pad_spec(spec, jax.eval_shape(materialize, w.a).ndim)
    a, b = PartitionSpec(*layers, d_in, None), PartitionSpec(*layers, None, divided_too(d_out, d_in))
    return LowRank(specs(w.base, spec), specs(w.a, a), specs(w.b, b), w.scale, w.dropout)


@ragged_linear_rule.register
def _(w: LowRank, x: Array, sizes: Array, axes: Axes) -> Array:
    thin = ragged_linear(_dropped(x, w), w.a, sizes, axes)
    return ragged_linear(x, w.base, sizes, axes) + w.scale * ragged_linear(thin, w.b, sizes, axes)
