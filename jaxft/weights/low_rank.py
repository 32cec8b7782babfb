"""`LowRank`: a weight plus a product of two thin factors."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

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
    static,
    unembed,
    unembed_rule,
)
from jaxft.weights.ragged import Axes, ragged_linear, ragged_linear_rule


@node
class LowRank(Node):
    """`base + scale * a @ b`, with `a [..., d_in, rank]` and `b [..., rank, d_out]`; leading axes are batch axes.

    The factors may be stored in fp32 under a bf16 base: products are computed in the dtype of the activation. A factor
    may itself be a node (a `Split` where only some layers have an update).
    """

    base: Weight
    a: Weight
    b: Weight
    scale: float = static(default=1.0)


@materialize_rule.register
def _(w: LowRank) -> Array:
    base = materialize(w.base)
    # Added in the wider dtype and rounded once: a small update of a bf16 base is not rounded before it counts.
    return (base + w.scale * jnp.matmul(materialize(w.a), materialize(w.b))).astype(base.dtype)


@linear_rule.register
def _(w: LowRank, x: Array) -> Array:
    return linear(x, w.base) + w.scale * linear(linear(x, w.a), w.b)


@embed_rule.register
def _(w: LowRank, tokens: Int[Array, "..."]) -> Array:
    rows = embed(tokens, w.base)
    return rows + (w.scale * linear(embed(tokens, w.a), w.b)).astype(rows.dtype)


@unembed_rule.register
def _(w: LowRank, x: Array) -> Array:
    return unembed(x, w.base) + w.scale * unembed(unembed(x, w.b), w.a)


@specs_rule.register
def _(w: LowRank, spec: PartitionSpec) -> LowRank:
    *layers, d_in, d_out = pad_spec(spec, jax.eval_shape(materialize, w.a).ndim)
    a, b = PartitionSpec(*layers, d_in, None), PartitionSpec(*layers, None, d_out)
    return LowRank(specs(w.base, spec), specs(w.a, a), specs(w.b, b), w.scale)


@ragged_linear_rule.register
def _(w: LowRank, x: Array, sizes: Array, axes: Axes) -> Array:
    thin = ragged_linear(x, w.a, sizes, axes)
    return ragged_linear(x, w.base, sizes, axes) + w.scale * ragged_linear(thin, w.b, sizes, axes)
